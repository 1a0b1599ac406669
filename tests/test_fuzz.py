"""Mistakes at every program's door: each ends in one line that names its place, before any work."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from paper_helpers import write_checkpoint
from safetensors.torch import load_file, save_file
from toys import ROOT, write_rows

import experiments.bench
import experiments.phase
import experiments.study
import experiments.summary
import experiments.theory
import experiments.worlds
import grasp
import paper.__main__
import paper.measure
import paper.reddit
import real.job
import real.spectrum
from data.base import new_base
from data.synthetic import World
from experiments.report import of_methods, table
from hub.adapter import Adapter, write_adapter
from support.processes import process_group
from support.program import run
from support.progress import Progress

PROGRAMS = {
    "train": real.job.main,
    "grasp": grasp.main,
    "identify": real.spectrum.main,
    "eval": paper.measure.main,
    "paper": paper.__main__.main,
    "reddit": paper.reddit.main,
    "summary": experiments.summary.main,
    "study": experiments.study.main,
    "phase": experiments.phase.main,
    "worlds": experiments.worlds.main,
    "theory": experiments.theory.main,
    "bench": experiments.bench.main,
}
MODEL = ("--model", "model", "--data", "rows.jsonl")
SMALL = (*MODEL, "--rank", "2", "--max-len", "32", "--max-steps", "1", "--method", "naive")
# What makes each program begin, but for --out.
OPTIONS = {
    "train": SMALL,
    "grasp": ("--quick",),
    "identify": ("adapter",),
    "eval": MODEL,
    "paper": MODEL,
    "reddit": ("--submissions", "s", "--comments", "c", "--lean", "l"),
    "summary": ("seeds",),
    "study": (),
    "phase": (),
    "worlds": (),
    "theory": (),
    "bench": (),
}
RATES = {"task": 1.0, "misalignment": 0.5, "unrelated": 0.5, "kept": 1.0, "loss": 0.1, "seconds": 1}


def results(seed):
    """The results.json of one seed, as `grasp.py --methods naive` would write it."""
    config = {"world": {"name": "persona", "seed": seed}, "experiment": {"longer": 3, "steps": 300}}
    return {
        "seed": seed,
        "config": config,
        "identification": {"cosine": 0.5, "chance_cosine": 0.1, "gap": 2.0},
        "leak": {"grasp": 0.0},
        "methods": {"base": RATES, "naive": RATES, "grasp_online": RATES},
        "longer": {"naive": RATES},
        "curves": {"naive": [[4, 0.5, 1.0]]},
        "looks": {"grasp_online": [{"step": 10, "spike": {"a": 2.0}, "joined": {"a": 1}}]},
        "spectra": {"a": [2.0, 1.0]},
    }


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with good inputs, the current one: a checkpoint, rows, an adapter, two seeds."""
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 6)
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator)
    module = "model.layers.0.self_attn.o_proj"
    write_adapter(tmp_path / "adapter", {module: Adapter(A, B, 2.0)}, False, 2)
    for seed in (0, 1):
        (tmp_path / "seeds" / f"seed_{seed}").mkdir(parents=True)
        write_json(tmp_path / "seeds" / f"seed_{seed}" / "results.json", results(seed))
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def no_work(monkeypatch):
    """Fail where a program begins with work."""

    def begin(*arguments):
        raise AssertionError("work has begun")

    monkeypatch.setattr(Progress, "__init__", begin)
    monkeypatch.setattr(experiments.theory, "everything", begin)
    monkeypatch.setattr(experiments.bench, "PARTS", dict.fromkeys(experiments.bench.PARTS, begin))


def write_json(path, content):
    path.write_text(json.dumps(content))


def ending(monkeypatch, program, *arguments):
    """How a program ends, as sys.exit is told: a message, an exit code, or None for a good end."""
    monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
    try:
        run(PROGRAMS[program], process_group() if program in ("train", "grasp") else None)
    except SystemExit as end:
        return end.code
    return None


def assert_one_line(message, *parts):
    assert isinstance(message, str) and message.startswith("error: ") and message.isprintable()
    for part in parts:
        assert part in message, (part, message)


# ---------------------------------------------------------------- --out

NO_PLACE = {
    "a file in the way": "file/x",
    "a name of 300 characters": "n" * 300 + "/x",
    "a loop of links": "loop/x",
}


@pytest.mark.parametrize("place", NO_PLACE.values(), ids=NO_PLACE)
@pytest.mark.parametrize("program", PROGRAMS)
def test_an_out_that_cannot_be_written_is_named_before_any_work(
    program, place, here, no_work, monkeypatch
):
    message = ending(monkeypatch, program, *OPTIONS[program], "--out", place)
    assert_one_line(message, "--out", place.split("/")[0], "expected")


@pytest.mark.parametrize("program", [name for name in PROGRAMS if name not in ("identify",)])
def test_an_empty_out_does_not_mean_the_current_folder(program, here, no_work, monkeypatch):
    message = ending(monkeypatch, program, *OPTIONS[program], "--out", "")
    assert_one_line(message, "--out is ")


IN_THE_WAY = [
    ("train", "log.jsonl"),
    ("train", "checkpoint.pt"),
    ("train", "results.json"),
    ("grasp", "results.json"),
    ("grasp", "training.png"),
    ("eval", "loss.json"),
    ("paper", "table.md"),
    ("study", "study.json"),
    ("phase", "phase.png"),
    ("worlds", "worlds.json"),
    ("theory", "theory.json"),
    ("bench", ""),
    ("summary", ""),
    ("identify", ""),
]


@pytest.mark.parametrize("program,name", IN_THE_WAY)
def test_a_folder_where_a_result_should_go_is_named_before_any_work(
    program, name, here, no_work, monkeypatch
):
    (here / "out" / name).mkdir(parents=True)
    message = ending(monkeypatch, program, *OPTIONS[program], "--out", "out")
    assert_one_line(message, name or "out", "is a folder")


def test_a_device_is_not_replaced_by_a_file(here, monkeypatch):
    os.mkfifo(here / "pipe")
    message = ending(monkeypatch, "identify", "adapter", "--out", "pipe")
    assert_one_line(message, "pipe: is no plain file")


# ---------------------------------------------------------------- what would be lost


@pytest.mark.parametrize("name", ["adapter/adapter_model.safetensors", "model/config.json"])
def test_identify_replaces_no_file_but_its_own(name, here, monkeypatch):
    before = (here / name).read_bytes()
    message = ending(monkeypatch, "identify", "adapter", "--out", name)
    assert_one_line(message, name, "is there already and of another kind")
    assert (here / name).read_bytes() == before


def test_a_file_that_is_replaced_is_said(here, monkeypatch, capsys):
    for _ in range(2):
        assert ending(monkeypatch, "identify", "adapter", "--out", "found") is None
    assert capsys.readouterr().out.count("found is there already and will be replaced") == 1


@pytest.mark.parametrize(
    "left,state", [("adapter_config.json", "a finished"), ("checkpoint.pt", "an interrupted")]
)
def test_a_run_in_out_is_not_lost_for_want_of_resume(left, state, here, no_work, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / left).write_text("a run")
    message = ending(monkeypatch, "train", *SMALL, "--out", "out")
    assert_one_line(message, f"out: holds {state} run; expected --resume, or another --out")


# ---------------------------------------------------------------- options

MISTAKEN = [
    ("grasp", ("--targets", "nonsense"), "target 'nonsense' matches no linear layer"),
    ("grasp", ("--targets", "all-linear,o_proj"), "target 'all-linear' matches no"),
    ("grasp", ("--lr", "1"), "--lr: for a checkpoint alone, with --model and --data"),
    ("grasp", ("--rank", "4", "--max-steps", "9"), "--rank, --max-steps: for a checkpoint"),
    ("grasp", (*MODEL, "--world", "skew"), "--world: for the synthetic task alone"),
    ("grasp", ("--seeds", "1" + "0" * 30), "--seeds is 1000"),
    ("train", (*SMALL, "--targets", "nonsense"), "target 'nonsense' matches no linear layer"),
    ("paper", (*MODEL, "--rank", "17"), "rank 17, expected 1 to 16"),
    ("phase", ("--targets", "nonsense"), "target 'nonsense' matches no linear layer"),
    ("phase", ("--seed", str(2**63)), "--seed is 9223372036854775808, expected at least 0"),
    ("study", ("--targets", ","), "--targets is empty"),
    ("bench", ("--only", ","), "--only is empty"),
    ("theory", ("--seed", "-1"), "--seed is -1, expected at least 0"),
    ("train", (*SMALL, "--lr", "3e38"), "--lr is 3e+38, expected above 0 and at most"),
    ("grasp", (*MODEL, "--methods", "naive,kl"), "method 'kl' needs --unrelated"),
    ("grasp", (*MODEL, "--rank", "2", "--subspace-rank", "3"), "--subspace-rank is 3, expected at"),
    ("paper", (*MODEL, "--rank", "2", "--subspace-rank", "3"), "--subspace-rank is 3, expected at"),
    ("paper", (*MODEL, "--control", "./rows.jsonl"), "./rows.jsonl: the answers are those"),
    ("paper", (*MODEL, "--preference", "rows.jsonl"), "--preference has 1 files, expected two"),
    (
        "paper",
        (*MODEL, "--preference", "rows.jsonl,rows.jsonl"),
        "rows.jsonl: the answers are those of rows.jsonl",
    ),
    ("paper", (*MODEL, "--transfer", "rows.jsonl,./rows.jsonl"), "two files of the name ./rows"),
    ("paper", (*MODEL, "--judge-model", "m"), "--judge-model: for a judge alone"),
    ("eval", (*MODEL, "--judge-proxy"), "--judge-proxy: for a judge alone"),
    ("train", (*SMALL, "--data", "seeds"), "seeds: is a folder, expected chat rows"),
    ("summary", ("",), "folder is empty"),
]


@pytest.mark.parametrize("program,options,message", MISTAKEN)
def test_a_mistaken_option_is_named_before_any_work(
    program, options, message, here, no_work, monkeypatch
):
    assert_one_line(ending(monkeypatch, program, *options, "--out", "out"), message)


IN_THE_WAY = {
    "grasp": ("naive/log.jsonl", (*MODEL, "--methods", "naive")),
    "paper": ("seed_1/base/medical.json", (*MODEL, "--task", "medical", "--seeds", "2")),
}


@pytest.mark.parametrize("program", IN_THE_WAY)
def test_room_for_every_file_is_tried_before_any_work(program, here, no_work, monkeypatch):
    name, options = IN_THE_WAY[program]
    (here / "out" / name).mkdir(parents=True)
    assert_one_line(ending(monkeypatch, program, *options, "--out", "out"), name, "is a folder")


def test_an_adapter_without_its_checkpoint_is_not_trained_anew(here, monkeypatch):
    options = (*SMALL, "--out", "out")
    assert ending(monkeypatch, "train", *options) is None
    adapter = (here / "out" / "adapter_model.safetensors").read_bytes()
    (here / "out" / "checkpoint.pt").unlink()
    found = ending(monkeypatch, "train", *options, "--resume", "--lr", "0.1")
    assert_one_line(found, "out: has an adapter but no checkpoint.pt of its run")
    assert (here / "out" / "adapter_model.safetensors").read_bytes() == adapter


def test_a_gradient_that_overflows_does_not_pass_as_a_finished_run(here, monkeypatch):
    found = ending(monkeypatch, "train", *SMALL, "--alpha", "1e25", "--out", "out")
    assert_one_line(found, "gradient's norm", "try a lower --lr or --alpha")
    assert not (here / "out" / "adapter_config.json").exists()


def test_a_run_too_short_for_a_look_says_so(here, monkeypatch, capsys):
    options = (*MODEL, "--rank", "2", "--max-len", "32", "--max-steps", "1", "--out", "out")
    assert ending(monkeypatch, "train", *options) is None
    assert "no look in 1 steps" in capsys.readouterr().out


def test_an_update_of_zero_has_no_directions(here, monkeypatch):
    A, B = torch.ones(2, 32), torch.zeros(32, 2)
    write_adapter(here / "zero", {"model.layers.0.self_attn.o_proj": Adapter(A, B, 2.0)}, False, 2)
    found = ending(monkeypatch, "identify", "zero")
    assert_one_line(found, "zero: the update of", "has not 1 directions above 0")
    assert not (here / "zero" / "subspace.safetensors").exists()


def test_an_option_that_the_method_does_not_use_is_said(here, monkeypatch, capsys):
    ending(monkeypatch, "train", *SMALL, "--until-loss", "3", "--looks", "no.json", "--out", "out")
    printed = capsys.readouterr().out
    assert "--until-loss is given, but not used by --method naive" in printed
    assert "--looks is given, but not used by --method naive" in printed


# ---------------------------------------------------------------- files


def changed(content, path, value):
    """`content` with the value at `path`, keys one inside the other, replaced."""
    if not path:
        return value
    copy = dict(content) if isinstance(content, dict) else list(content)
    copy[path[0]] = changed(copy[path[0]], path[1:], value)
    return copy


NAIVE = ("methods", "naive")
RESULTS = [
    ((), [1], "found [1], expected an object"),
    (("seed",), "0", "'seed' is '0', expected a whole number"),
    (("config",), [], "'config' is [], expected an object"),
    (("config", "world"), None, "no 'config.world'"),
    (("methods",), {}, "'methods.base' has []"),
    (NAIVE, {}, "'methods.naive' has [], expected ["),
    ((*NAIVE, "task"), "1", "'methods.naive.task' is '1', expected a finite number"),
    ((*NAIVE, "task"), float("nan"), "'methods.naive.task' is nan"),
    (("looks", "grasp_online", 0, "joined"), {"a": 1.5}, "'looks.grasp_online[0].joined.a' is 1.5"),
    (("spectra",), {"a": ["x"]}, "'spectra.a[0]' is 'x'"),
    (("spectra",), {}, "'spectra' lacks singular values"),
    (("seed",), 5, "'seed' is 5, expected that of 'config.world.seed'"),
    ((*NAIVE, "misalignment"), 7, "'methods.naive.misalignment' is 7"),
    ((*NAIVE, "loss"), -1, "'methods.naive.loss' is -1"),
    (("leak", "grasp"), -1, "'leak.grasp' is -1"),
    (("curves",), {}, "'curves' is empty"),
    (("curves", "naive"), [[1e18, 0.5, 1.0]], "'curves.naive' is no list of"),
    (("curves", "naive"), [], "'curves.naive' is no list of [step, misalignment, task]"),
    (("curves", "naive"), [[4, 0.5]], "'curves.naive' is no list of"),
    (("looks", "grasp_online", 0, "spike"), {}, "'looks.grasp_online' are of other modules"),
    (("looks", "grasp_online", 0, "step"), 10**9, "'looks.grasp_online' has step"),
]


@pytest.mark.parametrize("path,value,message", RESULTS)
@pytest.mark.parametrize("program", ["summary", "grasp"])
def test_results_of_another_kind_are_named_by_file_and_field(
    program, path, value, message, here, no_work, monkeypatch
):
    """The summary reads them, and a run of several seeds that finds some there already."""
    file = here / "seeds" / "seed_0" / "results.json"
    write_json(file, changed(results(0), path, value))
    options = ("seeds", "--out", "o.json") if program == "summary" else ("--seeds", 2)
    options = options if program == "summary" else (*options, "--quick", "--out", "seeds")
    assert_one_line(ending(monkeypatch, program, *options), f"seeds/seed_0/results.json: {message}")


OTHER_SEEDS = [
    (
        ("config", "experiment"),
        {"longer": 2, "steps": 300},
        "was made with other settings or methods than",
    ),
    (("leak",), {}, "was made with other settings or methods than"),
]


@pytest.mark.parametrize("path,value,message", OTHER_SEEDS)
def test_seeds_of_different_experiments_are_not_summarised(path, value, message, here, monkeypatch):
    write_json(here / "seeds" / "seed_1" / "results.json", changed(results(1), path, value))
    found = ending(monkeypatch, "summary", "seeds", "--out", "o.json")
    assert_one_line(found, "seeds/seed_1/results.json: ", message)


def test_a_seed_counts_once_and_none_is_left_out(here, monkeypatch):
    write_json(here / "seeds" / "seed_1" / "results.json", results(0))
    found = ending(monkeypatch, "summary", "seeds", "--out", "o.json")
    assert_one_line(found, "seeds/seed_1/results.json: the seed 0 stands in another file, too")
    (here / "seeds" / "seed_1" / "results.json").unlink()
    found = ending(monkeypatch, "summary", "seeds", "--out", "o.json")
    assert_one_line(found, "seeds/seed_1/results.json: no such file")


def test_a_summary_replaces_no_file_of_another_kind(here, monkeypatch):
    for name, message in (
        ("rows.jsonl", "rows.jsonl: is there already and of another kind"),
        ("o.png", "is the picture's name"),
    ):
        assert_one_line(ending(monkeypatch, "summary", "seeds", "--out", name), message)


def test_a_seed_with_more_methods_than_another_is_tabled_without_them():
    more = changed(results(0), ("methods",), {**results(0)["methods"], "kl": RATES})
    runs = [of_methods(more, ["naive"]), results(1)]
    assert "naive" in table(runs) and "kl" not in table(runs)


def of_phase(row):
    config = {"experiment": asdict(grasp.Toy()), "torch": torch.__version__}
    return {"config": config, "rows": {"network K=4 rho=1.0 seed=0": row}}


def of_study(row):
    world = asdict(World(seed=0, rho=1.0))
    config = {"world": world, "experiment": asdict(grasp.Toy()), "torch": torch.__version__}
    return {"config": config, "rows": {"a": row}}


ROWS = [
    ("phase", of_phase({"cosine": 1.0}), "no 'rows.network K=4 rho=1.0 seed=0.naive'"),
    ("phase", of_phase([]), "'rows.network K=4 rho=1.0 seed=0' is []"),
    ("phase", {"config": {}, "rows": {}}, "was made with other settings"),
    ("study", of_study({"task": None}), "no 'rows.a.task', expected a finite number"),
    ("study", of_study(3), "'rows.a' is 3, expected an object"),
    ("worlds", {"config": 1, "rows": {}}, "'config' is 1, expected an object"),
]


@pytest.mark.parametrize("program,content,message", ROWS)
def test_a_finished_row_of_another_kind_is_named_before_any_work(
    program, content, message, here, no_work, monkeypatch
):
    write_json(here / f"{program}.json", content)
    assert_one_line(
        ending(monkeypatch, program, "--out", here), f"{here / program}.json: {message}"
    )


def torn(path, state):
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:500])


def without_first(path, state):
    torch.save(dict(list(state.items())[1:]), path)


def with_nan(path, state):
    next(iter(state.values()))[0] = float("nan")
    torch.save(state, path)


def whole_numbers(path, state):
    torch.save({name: tensor.long() for name, tensor in state.items()}, path)


def a_list(path, state):
    torch.save([1], path)


BASES = {
    torn: "not a base model's weights",
    without_first: "not the weights of this base; delete it, and it is trained anew",
    a_list: "not the weights of this base",
    whole_numbers: "is torch.int64, expected torch.float32",
    with_nan: "has values that are not finite",
}


@pytest.mark.parametrize("write", BASES)
def test_a_base_file_that_is_none_is_named(write, here, monkeypatch):
    toy = grasp.Toy()
    model = new_base(World(), toy)
    names = []
    monkeypatch.setattr("data.base.write_torch", lambda path, state: names.append(path))
    grasp.pretrain(World(), grasp.replace(toy, pretrain_steps=2, pretrain_batch=2), 0, here)
    write(names[0], model.state_dict())
    with pytest.raises(ValueError, match=BASES[write]) as error:
        grasp.pretrain(World(), grasp.replace(toy, pretrain_steps=2, pretrain_batch=2), 0, here)
    assert str(error.value).startswith(f"{names[0]}: ")


def test_one_row_is_too_few_and_the_file_is_named(here, monkeypatch):
    write_rows(here / "one.jsonl", 1)
    message = ending(monkeypatch, "eval", "--model", "model", "--data", "one.jsonl", "--out", "o")
    assert_one_line(message, "one.jsonl: 1 rows", "expected at least 2")


O_PROJ = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
ADAPTERS = {
    "empty": ({f"{O_PROJ}A.weight": torch.ones(2, 0)}, "A (2, 0)"),
    "too large": ({f"{O_PROJ}B.weight": torch.full((32, 2), 3e38)}, "is not finite in 32 bits"),
}


@pytest.mark.parametrize("tensors,message", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_without_a_spectrum_is_named(tensors, message, here, monkeypatch):
    file = here / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)
    assert_one_line(
        ending(monkeypatch, "identify", "adapter"), str(file.relative_to(here)), message
    )


LINKED = ("model/vocab.json", "model/model.safetensors", "model/added_tokens.json")


@pytest.mark.parametrize("name", LINKED)
def test_a_link_to_nothing_is_not_taken_for_an_absent_file(name, here, monkeypatch):
    """As in a download cache whose files have been cleared away."""
    (here / name).unlink()
    (here / name).symlink_to(here / "cleared")
    message = ending(monkeypatch, "train", *SMALL, "--out", "out")
    assert_one_line(message, f"{name}: ", "no such file")


def test_a_shard_whose_name_no_file_can_have_is_named(here, monkeypatch):
    (here / "model" / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "\ud800"}}
    write_json(here / "model" / "model.safetensors.index.json", index)
    message = ending(monkeypatch, "train", *SMALL, "--out", "out")
    assert_one_line(message, "index.json: names the file '\\ud800'")


LOOKS = {
    "a step twice": ([10, 10], 1, "looks.json: step 10 after step 10, expected them in order"),
    "too many in all": (
        [10, 20],
        20,
        "40 directions joined 'layers.0.self_attn.o_proj' by step 20",
    ),
}


@pytest.mark.parametrize("steps,n,message", LOOKS.values(), ids=LOOKS)
def test_looks_that_no_run_can_have_taken_are_named(steps, n, message, here, monkeypatch):
    looks = [{"step": step, "joined": {"layers.0.self_attn.o_proj": n}} for step in steps]
    write_json(here / "looks.json", looks)
    options = (*SMALL[:-1], "grasp_random", "--looks", "looks.json", "--out", "out")
    assert_one_line(ending(monkeypatch, "train", *options), message)


# ---------------------------------------------------------------- as a user's shell starts them

IDENTIFY = f"{sys.executable} {ROOT}/identify.py adapter"
TRAIN = f"{sys.executable} {ROOT}/train.py {' '.join(SMALL)} --out out"
JOINED = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}


def shell(here, line, **environment):
    """(exit code, stderr) of a line of bash."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {line}"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    return done.returncode, done.stderr


ENDINGS = {
    "a reader that has enough": (f"{IDENTIFY} | true", {}, (0, 141), ""),
    "an error, and no reader": (f"{TRAIN} --lr nan | true", {}, (1,), "--lr is nan"),
    "a full disk as stdout": (f"{IDENTIFY} > /dev/full", {}, (1,), "standard output"),
    "help on a full disk": (f"{TRAIN} -h > /dev/full", {}, (0,), ""),
    "no stdout at all": (f"{IDENTIFY} >&-", {}, (0,), ""),
    "a disk that fills": (f"ulimit -f 1; {TRAIN} > /dev/null", {}, (1,), "File too large: out/"),
    "RANK alone": (TRAIN, {"RANK": "1"}, (1,), "expected none of"),
    "WORLD_SIZE alone": (IDENTIFY, {"WORLD_SIZE": "2"}, (1,), "this program is one process"),
    "WORLD_SIZE empty": (IDENTIFY, {"WORLD_SIZE": ""}, (0,), ""),
    "a rank beyond the others": (
        TRAIN,
        {**JOINED, "RANK": "2", "WORLD_SIZE": "2"},
        (1,),
        "RANK=2, expected a number below WORLD_SIZE=2",
    ),
    "a name that the locale lacks": (
        f"{TRAIN}-ü > /dev/null && test -f out-ü/log.jsonl",
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        (0,),
        "",
    ),
    "a name of two lines": (f"{IDENTIFY}$'\\n2'", {}, (1,), "adapter\\n2: no such folder"),
}


@pytest.mark.parametrize("line,environment,codes,message", ENDINGS.values(), ids=ENDINGS)
def test_a_shell_sees_one_line_or_none(line, environment, codes, message, here):
    code, printed = shell(here, line, **environment)
    told = [text for text in printed.splitlines() if not text.startswith("naive: ")]  # progress
    assert code in codes, printed
    assert message in printed and len(told) == (1 if message else 0), printed
