"""Two processes on the CPU, as torchrun starts them, against one."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_eval import FIXTURES, write_checkpoint

ROOT = Path(__file__).parent.parent
TINY = """
import sys; sys.path[:0] = ["tests", "."]
import torch
from baselines import random_like
from identify import leak, spectra, top_pairs
from lora import add_lora, lora_modules
from parallel import joined, place, shard
from test_identify import tiny
from train import finetune

def main(out, sharded):
    model, random = tiny().requires_grad_(False), torch.Generator().manual_seed(1)
    if sharded:
        shard(model, torch.device("cpu"))
        assert all(type(p.data).__name__ == "DTensor" for p in model.parameters())
    batches = [(torch.randint(50, (n, 9), generator=random), torch.rand(n, 9, generator=random) < 0.5) for n in [5, 4, 1, 3] * 5]
    add_lora(model, 4, 8, "all-linear")
    factor = random_like(top_pairs(spectra(model)), 0)
    lora = [p for p in model.parameters() if p.requires_grad]
    losses = finetune(model, batches.__getitem__, 20, lr=1e-2, factor=factor, micro_batch=2,
                      penalty=lambda: 1e-2 * sum(p.square().sum() for p in lora))
    torch.save({"losses": losses, "lora": torch.cat([p.data.flatten() for p in lora]), "leak": leak(model, factor)}, f"{out}.{place()[0]}")
with joined():
    main(sys.argv[1], len(sys.argv) > 2)
"""
DIES = """
import os, signal, sys; sys.path.insert(0, ".")
import checkpoint, cli, train
record = checkpoint.Checkpoint.record
def dying(self, step, loss):
    record(self, step, loss)
    if cli.RANK == int(os.environ.get("WORLD_SIZE", 1)) - 1 and step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoint.record = dying
cli.run(train.main, train.joined())
"""


def torchrun(*command, processes=2):
    command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []),
               *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """What one process computes in 20 steps, and the script that does it."""
    folder = tmp_path_factory.mktemp("single")
    (folder / "tiny.py").write_text(TINY)
    result = torchrun("-c", TINY, folder / "one", processes=0)
    assert result.returncode == 0, result.stderr
    return folder / "tiny.py", torch.load(folder / "one.0")


@pytest.mark.parametrize("sharded", [[], ["sharded"]])
def test_two_processes_train_what_one_does_and_stay_identical(single, sharded, tmp_path):
    script, one = single
    result = torchrun(script, tmp_path / "two", *sharded)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"two.{rank}") for rank in (0, 1))
    assert torch.equal(first["lora"], second["lora"]) and first["losses"] == second["losses"]
    assert (first["lora"] - one["lora"]).abs().max() < 1e-5 and first["leak"] < 1e-6
    assert first["losses"] == pytest.approx(one["losses"], abs=1e-5)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder)
    return ("--model", folder, "--data", FIXTURES / "medical_24.jsonl", "--rank", 4, "--lr", 1e-2, "--batch-size", 3, "--max-len", 64,
            "--epochs", 4, "--max-steps", 20)


def weights(folder):
    return torch.cat([t.flatten() for _, t in sorted(load_file(folder / "adapter_model.safetensors").items())])


def test_the_three_stages_under_torchrun_on_a_sharded_base_give_one_processs_adapters(command, tmp_path):
    for out, more, processes in (("one", (), 0), ("two", ("--shard",), 2)):
        result = torchrun("grasp.py", *command, "--rounds", 2, "--out", tmp_path / out, *more, processes=processes)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("wrote ") == result.stderr.count("naive: 20/20") == 1  # the first process alone speaks
    for name in ("naive", "grasp"):
        assert (weights(tmp_path / "one" / name) - weights(tmp_path / "two" / name)).abs().max() < 1e-5
    one, two = (json.loads((tmp_path / out / "results.json").read_text()) for out in ("one", "two"))
    assert two["leak"]["grasp"] < 1e-6 and two["held_out_loss"] == pytest.approx(one["held_out_loss"], abs=1e-5)


@pytest.mark.parametrize("processes", [0, 2])
def test_after_a_killed_process_resume_goes_on_bit_for_bit(command, processes, tmp_path):
    (tmp_path / "dies.py").write_text(DIES)
    result = torchrun(tmp_path / "dies.py", *command, "--out", tmp_path / "out", processes=processes)
    assert result.returncode != 0
    if processes:
        assert "error: another process of this run has gone" in result.stderr and "--resume" in result.stderr
    assert torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["step"] in (6, 8)
    for out, more in (("out", ("--resume",)), ("whole", ())):
        result = torchrun("train.py", *command, "--out", tmp_path / out, *more, processes=processes)
        assert result.returncode == 0, result.stderr
    assert torch.equal(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("program, message", [(["train.py", "--shard"], "--shard needs several processes"), (["eval.py"], "one process")])
def test_what_needs_several_processes_or_one_says_so(command, program, message, monkeypatch):
    if program == ["eval.py"]:
        monkeypatch.setenv("WORLD_SIZE", "2")
        command = ()
    result = torchrun(*program, *command, processes=0)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
