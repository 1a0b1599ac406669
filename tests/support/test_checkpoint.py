"""A checkpoint is whole, of this run and of this step, or it is refused by name."""

import math
import random

import pytest
import torch
from toys import TARGETS, fit, lora_values, random_factor, tiny

from lora import add_lora, lora_modules
from support.checkpoint import Checkpoint
from support.errors import UserError
from train import Recipe

STEPS = 6
CONFIG = {"lr": 0.01, "rows": "abc"}
MODULE = "layers.0.self_attn.o_proj"


def top_pair(step, svds):
    return {name: U[:, :1].clone() for name, (U, _) in svds.items()}


def run(folder, config=None, rank=4, targets=TARGETS, resume=True):
    """Six steps with a look after the fourth, from the folder's checkpoint if there is one."""
    model = add_lora(tiny(), rank, 4, targets)
    added = Recipe(factor=random_factor(model, 1), look=top_pair, look_every=4)
    checkpoint = Checkpoint(folder, config or CONFIG, resume)
    return fit(model, STEPS, added, checkpoint=checkpoint), lora_values(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The bytes of a finished run's checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    run(folder)
    return (folder / "checkpoint.pt").read_bytes()


@pytest.fixture
def folder(tmp_path, saved):
    (tmp_path / "checkpoint.pt").write_bytes(saved)
    return tmp_path


def edit(folder, change):
    """Apply a change to the state in the folder's checkpoint."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    changed = change(state)
    torch.save(state if changed is None else changed, folder / "checkpoint.pt")


def refusal(folder, **options):
    """The one line with which a resumed run ends."""
    with pytest.raises(UserError) as error:
        run(folder, **options)
    text = str(error.value)
    assert text.startswith(f"{folder / 'checkpoint.pt'}: ") and "\n" not in text
    return text


def test_the_state_is_that_of_the_last_step(folder):
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) == STEPS and len(state["looks"]) == 1
    assert all(U.shape[1] == 2 for U in state["factor"].values())


def test_without_resume_the_state_is_not_read(folder):
    (folder / "checkpoint.pt").write_bytes(b"torn")
    run(folder, resume=False)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(add_lora(tiny(), 4, 4, TARGETS), 3)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- files that are no checkpoint


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_torn_file_is_refused(folder, saved, share):
    (folder / "checkpoint.pt").write_bytes(saved[: int(share * len(saved))])
    assert "not a whole checkpoint" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x05", b"x" * 1000])
def test_another_file_is_refused(folder, content):
    (folder / "checkpoint.pt").write_bytes(content)
    assert "not a whole checkpoint" in refusal(folder)


def test_code_in_a_file_is_not_run(folder):
    torch.save({"config": CONFIG, "code": print}, folder / "checkpoint.pt")
    assert "not a whole checkpoint" in refusal(folder)


@pytest.mark.parametrize("value", [None, 3, "text", [1, 2], torch.ones(3)])
def test_another_value_is_refused(folder, value):
    torch.save(value, folder / "checkpoint.pt")
    assert "expected an object" in refusal(folder)


PARTS = ("config", "losses", "looks", "factor", "parameters", "moments")


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(folder, part):
    edit(folder, lambda state: state.pop(part) and None)
    assert f"no '{part}'" in refusal(folder)


@pytest.mark.parametrize("value", [3, "text", torch.ones(2, 2), True])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_another_type_is_named(folder, part, value):
    edit(folder, lambda state: state.update({part: value}))
    assert f"'{part}' is" in refusal(folder)


# ---------------------------------------------------------------- of another run or step


@pytest.mark.parametrize(
    "config,named",
    [
        ({**CONFIG, "lr": 0.02}, "(lr)"),
        ({**CONFIG, "rows": "b", "lr": 1}, "(lr, rows)"),
        ({"lr": 0.01}, "(rows)"),
        ({**CONFIG, "new": 1}, "(new)"),
    ],
)
def test_other_settings_are_named(folder, config, named):
    assert f"was made with other settings {named}" in refusal(folder, config=config)


@pytest.mark.parametrize("losses", [[], [1.0] * (STEPS - 1), [1.0] * (STEPS + 1), [1.0] * 10_000])
def test_another_step_than_the_moments_have_is_refused(folder, losses):
    edit(folder, lambda state: state.update(losses=losses))
    assert f"step {len(losses)}" in refusal(folder)


def set_step(value):
    def change(state):
        for moments in state["moments"]:
            moments["step"] = torch.tensor(value)

    return change


@pytest.mark.parametrize("step", [-3.0, 0.0, 5.0, 1e6, math.nan, math.inf])
def test_moments_of_another_step_are_refused(folder, step):
    edit(folder, set_step(step))
    assert "parameter 0" in refusal(folder)


def test_another_rank_is_refused(folder):
    assert "parameter 0 is (4, 16), expected (3, 16)" in refusal(folder, rank=3)


def test_other_targets_are_refused(folder):
    assert "expected 4" in refusal(folder, targets=("o_proj",))


# ---------------------------------------------------------------- tensors


def put(part, *path, value):
    """A change that sets state[part][path...] = value."""

    def change(state):
        *inner, last = path
        place = state[part]
        for key in inner:
            place = place[key]
        place[last] = value

    return change


def fill(value, part, *path):
    """A change that writes one value into the tensor at state[part][path...]."""

    def change(state):
        place = state[part]
        for key in path:
            place = place[key]
        place[(0,) * place.dim()] = value

    return change


def drop(part, *path):
    """A change that takes state[part][path...] out."""

    def change(state):
        *inner, last = path
        place = state[part]
        for key in inner:
            place = place[key]
        del place[last]

    return change


BROADCASTABLE = torch.ones(1, 16)
BROKEN = [
    ("a missing parameter", drop("parameters", -1), "15 parameters at step 6, expected 16"),
    ("a broadcastable parameter", put("parameters", 0, value=BROADCASTABLE), "parameter 0 is (1,"),
    ("a scalar parameter", put("parameters", 0, value=torch.tensor(0.0)), "parameter 0 is ()"),
    ("a turned parameter", put("parameters", 0, value=torch.ones(16, 4)), "parameter 0 is (16, 4)"),
    ("an int parameter", put("parameters", 0, value=torch.ones(4, 16).int()), "is torch.int32"),
    ("a bool parameter", put("parameters", 0, value=torch.ones(4, 16) > 0), "is torch.bool"),
    ("half a parameter", put("parameters", 0, value=torch.ones(4, 16).half()), "is torch.float16"),
    ("a sparse one", put("parameters", 0, value=torch.eye(16)[:4].to_sparse()), "torch.sparse_coo"),
    ("a parameter that is none", put("parameters", 0, value=[1.0]), "'parameters[0]' is [1.0]"),
    ("NaN", fill(math.nan, "parameters", 3), "parameter 3 has values that are not finite"),
    ("infinity", fill(math.inf, "parameters", 3), "parameter 3 has values that are not finite"),
    ("no moments", lambda state: state.update(moments=[]), "0 moments at step 6, expected 16"),
    ("missing moments", drop("moments", 5), "15 moments at step 6, expected 16"),
    ("empty moments", put("moments", 2, value={}), "moments of parameter 2 are not those of AdamW"),
    ("no second moment", drop("moments", 2, "exp_avg_sq"), "parameter 2 are not those of AdamW"),
    ("no step", drop("moments", 2, "step"), "parameter 2 are not those of AdamW"),
    ("a number for a moment", put("moments", 2, "exp_avg", value=0.5), "'moments[2].exp_avg' is"),
    (
        "a broadcastable moment",
        put("moments", 0, "exp_avg", value=BROADCASTABLE),
        "exp_avg of parameter 0 is (1, 16)",
    ),
    ("NaN in a moment", fill(math.nan, "moments", 1, "exp_avg"), "exp_avg of parameter 1 has"),
    ("a negative variance", fill(-1.0, "moments", 1, "exp_avg_sq"), "not those of step 6"),
    ("NaN among the losses", put("losses", 1, value=math.nan), "'losses[1]' is nan"),
    ("a text among the losses", put("losses", 1, value="1"), "'losses[1]' is '1'"),
    ("true among the losses", put("losses", 1, value=True), "'losses[1]' is True"),
    ("a look without a step", drop("looks", 0, "step"), "no 'looks[0].step'"),
    ("a look at step 0", put("looks", 0, "step", value=0), "'looks[0].step' is 0"),
    ("a look that is none", put("looks", 0, value=3), "'looks[0]' is 3"),
    (
        "a constraint on another module",
        put("factor", "layers.9.x", value=torch.eye(16)[:, :1]),
        "constrains 'layers.9.x', which has no LoRA",
    ),
    ("a wide constraint", put("factor", MODULE, value=torch.eye(17)[:, :1]), "is (17, 1)"),
    ("a flat constraint", put("factor", MODULE, value=torch.ones(16)), f"factor of {MODULE} is"),
    ("a scalar constraint", put("factor", MODULE, value=torch.tensor(1.0)), "is ()"),
    ("NaN in the constraint", fill(math.nan, "factor", MODULE), f"the factor of {MODULE} has"),
    (
        "twice a constraint",
        put("factor", MODULE, value=2 * torch.eye(16)[:, :2]),
        f"the factor of {MODULE} is not orthonormal, Q'Q is off by 3",
    ),
    (
        "another constraint",
        put("factor", MODULE, value=torch.eye(16)[:, :2]),
        f"the update of {MODULE} is not off its factor",
    ),
    (
        "a constraint whose square overflows",
        put("factor", MODULE, value=3e19 * torch.tensor([[1.0, 1.0], [1.0, -1.0]] * 8)),
        f"the factor of {MODULE} is not orthonormal, Q'Q is off by",
    ),
    ("no constraint", lambda state: state.update(factor={}), "constrains [], expected ["),
    ("a direction too few", put("factor", MODULE, value=torch.eye(16)[:, :1]), "is (16, 1)"),
    ("no looks", lambda state: state.update(looks=[]), "looks at steps [], expected [4]"),
    ("a look at another step", put("looks", 0, "step", value=5), "steps [5], expected [4]"),
    ("a look at nothing", put("looks", 0, "spike", value={}), "look at step 4 is of other modules"),
    ("a tensor for an option", put("config", "lr", value=torch.ones(2)), "not what JSON can hold"),
]


@pytest.mark.parametrize(
    "change,message", [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
def test_what_is_wrong_inside_is_named(folder, change, message):
    edit(folder, change)
    assert message in refusal(folder)


def test_the_given_directions_are_those_that_a_run_without_looks_goes_on_with(tmp_path):
    """A constraint that was taken out of the file would leave a naive run under GRASP's name."""
    model = add_lora(tiny(), 4, 4, TARGETS)
    added = Recipe(factor=random_factor(model, 1))
    fit(model, STEPS, added, checkpoint=Checkpoint(tmp_path, CONFIG))
    other = Recipe(factor=random_factor(model, 1, seed=1))
    with pytest.raises(UserError, match="is not the one that the run was given"):
        fit(model, STEPS, other, checkpoint=Checkpoint(tmp_path, CONFIG, resume=True))
    naive = Checkpoint(tmp_path, CONFIG, resume=True)
    with pytest.raises(UserError, match="constrains .* expected \\[\\]"):
        fit(model, STEPS, Recipe(), checkpoint=naive)


def test_a_moment_that_shares_its_memory_is_copied(folder):
    edit(folder, put("moments", 0, "exp_avg", value=torch.zeros(1, 1).expand(4, 16)))
    run(folder)


def anything(draw):
    """A value that a part of a state may be replaced by."""
    return draw.choice(
        [None, -1, 10**9, 1.5, math.nan, True, "x", [], {}, [[1]], {"a": 1}]
        + [torch.ones(1), torch.ones(16, 4), torch.zeros(()), torch.full((4, 16), math.nan)]
    )


def replace_somewhere(value, draw):
    """Replace a value at a random depth of nested lists and dictionaries, in place."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        inner = value[key]
        if not isinstance(inner, (dict, list)) or not inner or draw.random() < 0.2:
            value[key] = anything(draw)
            return
        value = inner


@pytest.mark.parametrize("seed", range(40))
def test_a_state_with_any_value_replaced_is_refused_in_one_line_or_gives_the_same(folder, seed):
    """The same: where the value was replaced by one that says the same, or that says nothing."""
    expected = run(folder)[1]
    edit(folder, lambda state: replace_somewhere(state, random.Random(seed)))
    try:
        _, values = run(folder)
    except UserError as e:
        assert "\n" not in str(e) and len(str(e)) < 500 + len(str(folder))
    else:
        assert values.shape == expected.shape and values.isfinite().all()


def test_resuming_a_refused_state_changes_nothing_on_disk(folder):
    edit(folder, fill(math.nan, "moments", 1, "exp_avg"))
    before = (folder / "checkpoint.pt").read_bytes()
    refusal(folder)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert not (folder / "log.jsonl").exists()


def test_the_number_of_parameters_is_that_of_the_modules():
    assert 2 * len(lora_modules(add_lora(tiny(), 4, 4, TARGETS))) == 16
