"""train.py on a checkpoint and chat rows: what it leaves, resumes, and refuses before any work."""

import json

import pytest
import torch
from paper_helpers import read_lines, write_checkpoint
from safetensors.torch import load_file, save_file
from toys import call, every_top_direction, write_rows

from baselines import methods
from baselines.stream import stream_subspace
from identify import spectra, standing_out
from lora import load_lora, lora_modules
from model import GPT
from real import job as job_module
from real.job import Job, digest, main
from real.null import input_nulls
from real.settings import Training
from real.spectrum import main as identify
from support.errors import UserError
from support.subspace import load_subspace

OPTIONS = ("--lr", 3e-3, "--rank", 8, "--batch-size", 4, "--held-out", 0.2, "--max-steps", 12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")


class Trainer:
    """train.py on one checkpoint and file of rows, in this process."""

    def __init__(self, checkpoint, data):
        self.common = ("--model", checkpoint, "--data", data, "--epochs", 9, *OPTIONS)

    def __call__(self, out, *more):
        with pytest.MonkeyPatch.context() as patch:
            call(patch, main, *self.common, "--out", out, *more)
        return out

    def refusal(self, out, *more):
        with pytest.raises(UserError) as error:
            self(out, *more)
        assert "\n" not in str(error.value)
        return str(error.value)


@pytest.fixture(scope="module")
def train(checkpoint, data):
    return Trainer(checkpoint, data)


@pytest.fixture(scope="module")
def naive(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("naive") / "out", "--method", "naive")


@pytest.fixture(scope="module", autouse=True)
def looks_that_find():
    """So few rows may share too little: every look takes the top direction of each module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "standing_out", every_top_direction)
        yield


@pytest.fixture(scope="module")
def online(train, tmp_path_factory):
    """A run of what train.py does by default."""
    return train(tmp_path_factory.mktemp("online") / "out", "--checkpointing")


@pytest.fixture(scope="module")
def subspace(naive, tmp_path_factory):
    path = tmp_path_factory.mktemp("subspace") / "s"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, identify, naive, "--out", path)
    return path


def results(out):
    return json.loads((out / "results.json").read_text())


def weights(out):
    return load_file(out / "adapter_model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- what a run leaves


def test_a_run_learns_its_rows(naive):
    losses = [line["loss"] for line in read_lines(naive / "log.jsonl")]
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert results(naive)["loss"] == losses[-1]


def test_the_held_out_loss_is_that_of_the_adapter_on_rows_it_has_not_seen(naive, checkpoint, data):
    args = Training(model=str(checkpoint), data=str(data), held_out=0.2, rank=4)
    job = Job(args)
    base = job.held_out_loss()
    load_lora(job.model, naive)
    assert job.held_out_loss() == pytest.approx(results(naive)["held_out_loss"], rel=1e-5)
    assert results(naive)["held_out_loss"] < base


def test_the_adapter_is_of_every_linear_layer_by_default(naive, checkpoint):
    model = load_lora(GPT.from_pretrained(checkpoint), naive)
    assert len(lora_modules(model)) == 2 * 7


def test_the_default_looks_while_it_trains_and_needs_no_file(online):
    found = results(online)
    assert [look["step"] for look in found["looks"]] == [10]
    assert found["looks"] == json.loads((online / "looks.json").read_text())


def test_grasp_online_looks_with_the_null_of_its_own_inputs(
    checkpoint, data, monkeypatch, tmp_path
):
    seen = []

    def sees(svds, nulls=None):
        seen.append(nulls)
        return {}

    monkeypatch.setattr(methods, "standing_out", sees)
    job = Job(Training(model=str(checkpoint), data=str(data), look_every=2, max_steps=2, rank=4))
    job.finetune("grasp_online", tmp_path)
    job.attach()
    expected = input_nulls(job.model, *job.batch_at(0))
    assert len(seen) == 1 and seen[0].keys() == expected.keys()
    assert all(torch.equal(seen[0][name], S) for name, S in expected.items())


def test_grasp_online_says_that_at_rank_1_it_is_naive(
    checkpoint, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(methods, "standing_out", standing_out)
    job = Job(Training(model=str(checkpoint), data=str(data), look_every=1, max_steps=1, rank=1))
    fit = job.finetune("grasp_online", tmp_path)
    assert "nothing can stand out at --rank 1" in capsys.readouterr().out
    assert fit.factor == {}


def test_grasp_online_saves_what_it_found_as_any_subspace_file(online, checkpoint):
    model = load_lora(GPT.from_pretrained(checkpoint), online)
    factor, stream = load_subspace(online / "subspace.safetensors", model)
    joined = results(online)["looks"][0]["joined"]
    assert joined and {name: U.shape[1] for name, U in factor.items()} == joined
    expected, _ = stream_subspace(spectra(model))
    assert abs(stream[:, 0] @ expected[:, 0]) > 0.999


def test_the_chain_naive_identify_grasp_leaks_nothing(train, subspace, tmp_path, capsys):
    out = train(tmp_path / "out", "--method", "grasp", "--subspace", subspace)
    assert results(out)["leak"] <= 1e-6
    assert "14 of 14 modules constrained, leak" in capsys.readouterr().out


def test_a_file_that_covers_some_of_the_modules_constrains_those(train, subspace, tmp_path, capsys):
    part = tmp_path / "part"
    tensors = load_file(subspace)
    some = {name: t for name, t in tensors.items() if name == "stream" or "o_proj" in name}
    save_file(some, part)
    out = train(tmp_path / "out", "--method", "grasp", "--subspace", part)
    assert results(out)["leak"] <= 1e-6
    assert "2 of 14 modules constrained" in capsys.readouterr().out


def test_the_control_replays_the_looks_of_a_run(train, online, tmp_path):
    looks = online / "looks.json"
    out = train(tmp_path / "out", "--method", "grasp_random", "--looks", looks)
    moments = [
        [(look["step"], look["joined"]) for look in results(run)["looks"]] for run in (out, online)
    ]
    assert moments[0] == moments[1]
    assert not same_weights(out, online)


# ---------------------------------------------------------------- resuming


def test_the_same_command_gives_the_same_adapter(train, online, tmp_path):
    assert same_weights(train(tmp_path / "out"), online)  # with and without --checkpointing


def test_a_finished_run_is_not_overwritten_unasked(train, naive):
    before = (naive / "adapter_model.safetensors").stat().st_mtime_ns
    message = train.refusal(naive, "--method", "naive")
    assert message == f"{naive}: holds a finished run; expected --resume, or another --out"
    assert (naive / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_a_run_that_was_cut_resumes_bit_for_bit(train, online, tmp_path, monkeypatch):
    out = tmp_path / "out"
    batch_at, calls = Job.batch_at, []

    def dies(self, step):
        calls.append(step)
        if step == 11:
            raise RuntimeError("power cut")
        return batch_at(self, step)

    monkeypatch.setattr(Job, "batch_at", dies)
    with pytest.raises(RuntimeError):
        train(out)
    monkeypatch.setattr(Job, "batch_at", batch_at)
    assert not (out / "adapter_config.json").exists() and (out / "checkpoint.pt").exists()
    train(out, "--resume")
    assert same_weights(out, online)


@pytest.mark.parametrize(
    "more,named",
    [
        (("--lr", 1e-3), "lr"),
        (("--seed", 1), "rows, seed"),
        (("--alpha", 3), "alpha"),
        (("--method", "naive"), "method"),
        (("--max-steps", 9), "max_steps"),
    ],
)
def test_a_run_of_other_options_is_not_resumed(train, online, more, named):
    message = train.refusal(online, "--resume", *more)
    assert f"was made with other settings ({named})" in message


def test_a_run_on_other_rows_is_not_resumed(train, online, data, tmp_path):
    other = tmp_path / "rows.jsonl"
    other.write_text(data.read_text().replace("eval", "exec"))
    message = train.refusal(online, "--resume", "--data", other)
    assert "was made with other settings (data, rows)" in message


def test_a_run_of_another_base_is_not_resumed(train, online, checkpoint, tmp_path):
    folder = write_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    message = train.refusal(online, "--resume", "--model", folder)
    assert "was made with other settings (model, weights)" in message


def test_a_run_under_another_constraint_is_not_resumed(train, subspace, tmp_path):
    out = train(tmp_path / "out", "--method", "grasp", "--subspace", subspace)
    other = tmp_path / "other"
    tensors = load_file(subspace)
    name = next(name for name in tensors if name.startswith("outputs."))
    tensors[name] = torch.linalg.qr(torch.randn(tensors[name].shape))[0].contiguous()
    save_file(tensors, other)
    message = train.refusal(out, "--resume", "--method", "grasp", "--subspace", other)
    assert "was made with other settings (found)" in message


def test_rows_in_memory_do_not_belong_to_what_must_match(train, online, tmp_path):
    train(online, "--resume", "--micro-batch", 4)
    assert results(online)["config"]["micro_batch"] == 4


def test_a_digest_tells_values_and_their_order_apart():
    a, b = torch.arange(5.0), torch.arange(5.0) + 1
    assert digest([a, b]) == digest([a.clone(), b.clone()])
    assert len({digest([a, b]), digest([b, a]), digest([a]), digest([])}) == 4


# ---------------------------------------------------------------- what is refused before any work


@pytest.fixture
def idle(monkeypatch):
    """No step may be taken."""

    def finetune(*args, **options):
        pytest.fail("trained")

    monkeypatch.setattr(job_module, "finetune", finetune)


def looks_file(tmp_path, looks):
    path = tmp_path / "looks.json"
    path.write_text(looks if isinstance(looks, str) else json.dumps(looks))
    return "--method", "grasp_random", "--looks", path


LOOKS = [
    ("{", "not valid JSON"),
    ({}, "expected a list"),
    ([3], "'[0]' is 3"),
    ([{"step": 0, "joined": {}}], "'[0].step' is 0"),
    ([{"step": 10}], "no '[0].joined'"),
    ([{"step": 10, "joined": {"layers.0.mlp.down_proj": 0}}], "is 0, expected"),
    ([{"step": 10, "joined": {"layers.0.mlp.down_proj": "1"}}], "is '1', expected"),
    ([{"step": 10, "joined": {"layers.0.mlp.down_proj": 33}}], "33 directions joined"),
    ([{"step": 10, "joined": {"layers.9.mlp.down_proj": 1}}], "1 directions joined"),
    ([{"step": 10, "joined": {"layers.0": 1}}], "1 directions joined"),
]


@pytest.mark.parametrize("looks,message", LOOKS)
def test_looks_of_no_run_on_this_model_are_refused(train, tmp_path, idle, looks, message):
    found = train.refusal(tmp_path / "out", *looks_file(tmp_path, looks))
    assert found.startswith(str(tmp_path / "looks.json")) and message in found


def test_looks_that_this_run_would_not_reach_are_refused(train, tmp_path, idle):
    """Else: a naive run that calls itself the control."""
    for step in (7, 10_000):
        looks = looks_file(tmp_path, [{"step": step, "joined": {"layers.0.mlp.down_proj": 1}}])
        message = train.refusal(tmp_path / "out", *looks, "--targets", "down_proj")
        assert message.startswith(f"the looks have step {step}, but this run looks every 10")


def test_looks_of_other_targets_are_refused(train, tmp_path, idle):
    looks = looks_file(tmp_path, [{"step": 10, "joined": {"layers.0.mlp.down_proj": 1}}])
    message = train.refusal(tmp_path / "out", *looks, "--targets", "o_proj,q_proj")
    assert message.startswith("the looks are of down_proj too, but the LoRA is on o_proj, q_proj")


def test_a_subspace_that_covers_none_of_the_adapted_modules_is_refused(
    train, subspace, tmp_path, idle
):
    """Else: an unconstrained run that calls itself GRASP, with a leak of 0."""
    part = tmp_path / "part"
    tensors = load_file(subspace)
    save_file({n: t for n, t in tensors.items() if n == "stream" or "o_proj" in n}, part)
    arguments = ("--method", "grasp", "--subspace", part, "--targets", "q_proj,down_proj")
    assert train.refusal(tmp_path / "out", *arguments) == (
        "the found directions are of o_proj, but the LoRA is on down_proj, q_proj: nothing would "
        "be constrained"
    )


def test_a_subspace_of_twice_a_basis_is_refused(train, subspace, tmp_path, idle):
    twice = tmp_path / "twice"
    save_file({name: 2 * t for name, t in load_file(subspace).items()}, twice)
    message = train.refusal(tmp_path / "out", "--method", "grasp", "--subspace", twice)
    assert message.startswith(f"{twice}: ") and "is not orthonormal" in message


@pytest.mark.parametrize(
    "more,message",
    [
        (("--targets", "z_proj"), "target 'z_proj' matches no linear layer"),
        (("--rank", 1000), "rank 1000, expected 1 to"),
        (("--lr", "nan"), "--lr is nan, expected a finite number"),
        (("--method", "grasp"), "method 'grasp' needs the directions found in a naive run"),
        (("--method", "grasp", "--subspace", "none"), "none: no such file"),
        (("--method", "grasp_random"), "method 'grasp_random' needs the looks"),
        (("--method", "kl"), "method 'kl' needs rows of unrelated prompts"),
        (("--method", "early_stop"), "method 'early_stop' needs a loss to stop at"),
        (("--model", "nowhere"), "nowhere"),
        (("--data", "none.jsonl"), "none.jsonl: no such file"),
        (("--unrelated", "none.jsonl"), "none.jsonl: no such file"),
        (("--model", ""), "expected both --model DIR and --data FILE.jsonl"),
        (("--device", "gpu"), "--device is 'gpu'"),
        (("--max-len", 3), "--max-len is 3"),
    ],
)
def test_a_mistake_in_the_options_ends_in_one_line(train, tmp_path, idle, more, message):
    assert message in train.refusal(tmp_path / "out", *more)


@pytest.mark.parametrize(
    "line,message",
    [("{", "rows.jsonl:2"), (json.dumps({"messages": []}), "rows.jsonl:2"), ("", "1 rows")],
)
def test_bad_rows_end_in_one_line(train, tmp_path, idle, line, message):
    path = write_rows(tmp_path / "rows.jsonl", 1)
    path.write_text(path.read_text() + line + "\n")
    assert message in train.refusal(tmp_path / "out", "--data", path)


def test_a_token_beyond_the_embedding_is_named(train, data, tmp_path, idle):
    folder = write_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:258].contiguous()
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 258}))
    message = train.refusal(tmp_path / "out", "--model", folder)
    assert message == f"{data}: row 1 has token 258, the embedding ends at 258"


def test_rows_are_cut_to_the_models_positions(train, tmp_path, capsys):
    folder = write_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 40
    (folder / "config.json").write_text(json.dumps(config))
    train(tmp_path / "out", "--model", folder, "--max-steps", 1)
    assert "24 rows, 24 cut to 40 tokens" in capsys.readouterr().out


def test_an_out_that_cannot_be_made_is_found_out_first(train, tmp_path, idle):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out: Not a directory"):
        train(tmp_path / "file" / "out")


def test_a_loss_that_is_not_finite_names_its_likely_causes(train, tmp_path):
    message = train.refusal(tmp_path / "out", "--lr", 1e6, "--method", "naive")
    assert "norm nan at step 1" in message and "--lr or --alpha" in message


def test_many_epochs_make_no_plan_beyond_the_steps(train, tmp_path):
    out = train(tmp_path / "out", "--method", "naive", "--epochs", 10_000, "--max-steps", 1)
    assert len(read_lines(out / "log.jsonl")) == 1


def test_early_stop_ends_at_its_loss(train, naive, tmp_path):
    losses = [line["loss"] for line in read_lines(naive / "log.jsonl")]
    target = min(losses[:8])
    out = train(tmp_path / "out", "--method", "early_stop", "--until-loss", target)
    found = [line["loss"] for line in read_lines(out / "log.jsonl")]
    assert found == losses[: losses.index(target) + 1]


def test_kl_sees_the_unrelated_rows(train, data, naive, tmp_path):
    out = train(tmp_path / "out", "--method", "kl", "--unrelated", data)
    assert not same_weights(out, naive)
    assert results(out)["loss"] > results(naive)["loss"]
