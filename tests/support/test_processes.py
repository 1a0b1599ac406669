"""Two processes on the CPU, as torchrun starts them, train what one does."""

import json
import re

import pytest
import torch
from paper_helpers import FIXTURES, write_checkpoint
from safetensors.torch import load_file
from toys import call, command

from real.job import main
from support.errors import UserError
from support.processes import my_rows, process_group, several

TINY = """
import sys; sys.path[:0] = ["tests", "."]
import torch
from identify import leak
from lora import add_lora
from support.processes import RANK, process_group, shard
from toys import fit, random_factor, tiny
from train import Recipe

def top_pair(step, svds):
    return {name: U[:, :1].clone() for name, (U, _) in svds.items()}

def main(out, sharded):
    model, random = tiny().requires_grad_(False), torch.Generator().manual_seed(1)
    if sharded:
        shard(model, torch.device("cpu"))
        assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    batches = []
    for n in [5, 4, 1, 3] * 5:  # rows that two processes can and can't divide
        tokens = torch.randint(50, (n, 9), generator=random)
        batches.append((tokens, torch.rand(n, 9, generator=random) < 0.5))
    add_lora(model, 4, 8, "all-linear")
    lora = [p for p in model.parameters() if p.requires_grad]
    added = Recipe(
        factor=random_factor(model, 1),
        look=top_pair,
        penalty=lambda: 1e-2 * sum(p.square().sum() for p in lora),
    )
    result = fit(model, 20, added, batches.__getitem__, micro_batch=2)
    found = {
        "losses": result.losses,
        "looks": [(look["step"], look["joined"]) for look in result.looks],
        "lora": torch.cat([p.data.flatten() for p in lora]),
        "leak": leak(model, result.factor),
    }
    torch.save(found, f"{out}.{RANK}")

with process_group():
    main(sys.argv[1], len(sys.argv) > 2)
"""
DIES = """
import os, signal, sys; sys.path.insert(0, ".")
from real.job import program
from support.checkpoint import Checkpoint
from support.processes import RANK

record = Checkpoint.record

def dying(self, step, fit):
    record(self, step, fit)
    if RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1 and step == 14:
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoint.record = dying
program()
"""


def torchrun(*arguments, processes=2):
    """The same command in this many processes; 1: without torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    return command(*(launcher if processes > 1 else ()), *arguments)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The script of a fine-tune that looks, and what one process computes by it."""
    folder = tmp_path_factory.mktemp("single")
    (folder / "tiny.py").write_text(TINY)
    done = command(folder / "tiny.py", folder / "one")
    assert done.returncode == 0, done.stderr
    return folder / "tiny.py", torch.load(folder / "one.0")


@pytest.fixture(scope="module", params=["whole", "sharded"])
def double(request, single, tmp_path_factory):
    """What each of two processes computes, with the base whole in each or divided."""
    out = tmp_path_factory.mktemp("double") / "two"
    done = torchrun(single[0], out, *(["sharded"] if request.param == "sharded" else []))
    assert done.returncode == 0, done.stderr
    return [torch.load(f"{out}.{rank}") for rank in (0, 1)]


def test_two_processes_stay_identical(double):
    first, second = double
    assert torch.equal(first["lora"], second["lora"]) and first["losses"] == second["losses"]


def test_two_processes_train_what_one_does(single, double):
    one, two = single[1], double[0]
    assert (two["lora"] - one["lora"]).abs().max() < 2e-5
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)


def test_two_processes_look_as_one_does_and_leak_nothing(single, double):
    assert double[0]["looks"] == single[1]["looks"] and single[1]["looks"][0][1]
    assert double[0]["leak"] < 1e-6


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("model"))
    data = FIXTURES / "medical_24.jsonl"
    train = ("--rank", 4, "--lr", 1e-2, "--batch-size", 3, "--max-len", 64, "--max-steps", 20)
    return ("--model", folder, "--data", data, "--epochs", 4, *train)


def weights(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(tensors.items())])


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one(options, tmp_path_factory):
    """What grasp.py --model leaves, run by one process."""
    out = tmp_path_factory.mktemp("one")
    done = command("grasp.py", *options, "--methods", "grasp,grasp_online", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_stages_under_torchrun_on_a_sharded_base_give_one_processs(options, one, tmp_path):
    methods = ("--methods", "grasp,grasp_online")
    done = torchrun("grasp.py", *options, *methods, "--shard", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    # the first process alone speaks
    assert done.stdout.count("wrote ") == done.stderr.count("naive: 20/20") == 1
    for method in ("naive", "grasp", "grasp_online"):
        assert (weights(one / method) - weights(tmp_path / method)).abs().max() < 1e-3
    ours, theirs = results(tmp_path), results(one)
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], abs=2e-3)
    assert max(ours["leak"].values()) < 1e-6


@pytest.fixture(scope="module")
def two(options, tmp_path_factory):
    """What train.py leaves, run by two processes."""
    out = tmp_path_factory.mktemp("two")
    done = torchrun("train.py", *options, "--method", "grasp_online", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_torchrun_looks_when_one_process_does_and_takes_as_many(one, two):
    looks = json.loads((two / "looks.json").read_text())
    expected = results(one)["looks"]["grasp_online"]
    joined_at = [[(look["step"], look["joined"]) for look in run] for run in (looks, expected)]
    assert joined_at[0] == joined_at[1]


def test_after_a_killed_process_resume_goes_on_bit_for_bit(options, two, tmp_path):
    """Killed after the first of the run's two looks."""
    (tmp_path / "dies.py").write_text(DIES)
    arguments = (*options, "--method", "grasp_online", "--out", tmp_path / "out")
    done = torchrun(tmp_path / "dies.py", *arguments)
    assert done.returncode != 0
    # torchrun sends a kill as well, which may come first
    said = "error: another process of this run has gone|interrupted: what was finished is on disk"
    assert re.search(said, done.stderr) and "--resume" in done.stderr
    state = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) == 14 and len(state["looks"]) == 1
    done = torchrun("train.py", *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    assert torch.equal(weights(tmp_path / "out"), weights(two))
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 20


def test_a_program_of_one_process_says_so():
    done = command("identify.py", "folder", WORLD_SIZE="2", RANK="0")
    assert done.returncode == 1 and "this program is one process" in done.stderr
    assert "Traceback" not in done.stderr


def test_shard_needs_several_processes(options, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--shard needs several processes"):
        call(monkeypatch, main, *options, "--shard", "--out", tmp_path)


@pytest.mark.parametrize(
    "environment,named",
    [
        ({"WORLD_SIZE": "2"}, "RANK=''"),
        ({"RANK": "1"}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, "MASTER_ADDR=''"),
    ],
)
def test_half_of_torchruns_environment_is_refused_in_one_line(environment, named, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as error, process_group():
        pass
    assert named in str(error.value) and "\n" not in str(error.value)


def test_a_program_with_half_of_torchruns_environment_ends_in_one_line(tmp_path):
    done = command("train.py", "--out", tmp_path, RANK="x")
    assert done.returncode == 1 and done.stderr.startswith("error: the environment has")
    assert done.stderr.count("\n") == 1


def test_alone_a_process_keeps_all_rows():
    tokens, mask = torch.ones(3, 2), torch.ones(3, 2)
    with process_group():
        assert not several()
        assert my_rows(tokens, mask) == (tokens, mask)
