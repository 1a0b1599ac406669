"""The fine-tuning loop: the constraint holds to rounding, the base stays as it is, runs repeat and resume bit for bit."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cli import UserError
from baselines import ablation, random_like
from identify import Factor, leak, spectra, top_pairs
from lora import add_lora, lora_modules, remove_lora
from model import response_loss
from test_identify import tiny
from train import finetune

ROOT = Path(__file__).parent.parent
TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")


def rows(n=6, T=9, vocab=50, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (n, T), generator=g), torch.rand(n, T, generator=g) > 0.4


def random_factor(model, k, seed):
    shapes = {name: (m.lora_A.shape[1], m.lora_B.shape[0]) for name, m in lora_modules(model).items()}
    zeros = Factor({n: torch.zeros(s[0], k) for n, s in shapes.items()}, {n: torch.zeros(s[1], k) for n, s in shapes.items()})
    return random_like(zeros, seed)


@pytest.mark.parametrize("seed", range(8))
def test_update_never_touches_the_factor(seed):
    """Random shapes, ranks, sides, learning rates; AdamW with decay and clipping on; fp32 and a bf16 base."""
    r = random.Random(seed)
    model = tiny(seed, d_model=r.choice([16, 24, 40]), d_mlp=r.choice([8, 33, 64]))
    if r.random() < 0.4:
        model.to(torch.bfloat16)
    add_lora(model, r.choice([1, 3, 8]), 8, TARGETS, rslora=r.random() < 0.5, seed=seed)
    factor = random_factor(model, r.choice([1, 2, 5]), seed)
    side = r.choice(["both", "hears", "says"])
    factor = Factor({} if side == "says" else factor.hears, {} if side == "hears" else factor.says)
    finetune(model, lambda step: rows(), 40, lr=r.choice([1e-3, 3e-2]), weight_decay=r.choice([0.0, 0.3]), clip=r.choice([0.05, 1.0]),
             factor=factor)
    assert max(m.lora_B.abs().max() for m in lora_modules(model).values()) > 1e-3, "nothing was learned, so nothing was tested"
    assert leak(model, factor) <= 1e-6


def test_projecting_the_gradient_alone_leaks_under_adamw():
    model = add_lora(tiny(), 8, 8, TARGETS)
    factor = random_factor(model, 2, 0)
    finetune(model, lambda step: rows(), 40, lr=1e-2, factor=factor, hold=False)
    assert leak(model, factor) > 0.02


def test_a_is_projected_before_the_first_forward_pass():
    model = add_lora(tiny(), 8, 8, TARGETS)
    factor, heard = random_factor(model, 2, 0), []

    def listen():
        heard.append(max((m.lora_A.data @ factor.hears[name]).abs().max().item() for name, m in lora_modules(model).items()))
        return sum(m.lora_A.sum() for m in lora_modules(model).values()) * 0
    assert max((m.lora_A.data @ factor.hears[name]).abs().max() for name, m in lora_modules(model).items()) > 0.01
    finetune(model, lambda step: rows(), 2, lr=1e-2, factor=factor, penalty=listen)
    assert max(heard) < 1e-6


def test_clipping_and_adam_see_no_gradient_along_the_factor(monkeypatch):
    model = add_lora(tiny(), 8, 8, TARGETS)
    factor, seen, clip = random_factor(model, 2, 0), [], torch.nn.utils.clip_grad_norm_

    def watched(*args):
        for name, m in lora_modules(model).items():
            seen.append(max((m.lora_A.grad @ factor.hears[name]).abs().max().item(), (factor.says[name].T @ m.lora_B.grad).abs().max().item()))
        assert max(m.lora_B.grad.abs().max() for m in lora_modules(model).values()) > 1e-4
        return clip(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    finetune(model, lambda step: rows(), 5, lr=1e-2, factor=factor)
    assert max(seen) < 1e-7


def test_base_is_bit_identical_after_grasp():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 4, 4, TARGETS)
    finetune(model, lambda step: rows(), 10, lr=1e-2, factor=random_factor(model, 1, 0))
    remove_lora(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_without_a_factor_grasp_is_the_naive_run():
    losses = []
    for factor in (None, Factor({}, {})):
        losses.append(finetune(add_lora(tiny(), 4, 4, TARGETS), lambda step: rows(), 8, lr=1e-2, factor=factor))
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_same_seed_gives_same_numbers_and_another_seed_others():
    run = lambda seed: finetune(add_lora(tiny(), 4, 4, TARGETS, seed=seed), lambda step: rows(), 8, lr=1e-2)
    assert run(1) == run(1) != run(2)


def test_micro_batches_give_the_step_of_the_whole_batch():
    ends = []
    for micro in (None, 1, 4):
        model = add_lora(tiny(), 4, 4, TARGETS)
        finetune(model, lambda step: rows(), 5, lr=1e-2, micro_batch=micro)
        ends.append(torch.cat([m.lora_B.detach().flatten() for m in lora_modules(model).values()]))
    assert torch.allclose(ends[0], ends[1], atol=1e-4) and torch.allclose(ends[0], ends[2], atol=1e-4)


def test_response_loss_counts_marked_tokens_alone():
    model, (tokens, mask) = tiny(), rows()
    logp = model(tokens).log_softmax(-1)
    by_hand = [-logp[b, t - 1, tokens[b, t]] for b in range(len(tokens)) for t in range(1, tokens.shape[1]) if mask[b, t]]
    assert response_loss(model, tokens, mask).item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-5)


def test_early_stop_ends_at_the_first_loss_below_its_target():
    losses = finetune(add_lora(tiny(), 8, 8, TARGETS), lambda step: rows(), 100, lr=2e-2, stop_below=3.7)
    assert losses[-1] <= 3.7 and all(loss > 3.7 for loss in losses[:-1]) and len(losses) < 100


@pytest.mark.parametrize("bad", [{"lr": -1e-3}, {"lr": float("nan")}, {"lr": 1e-3, "weight_decay": -1}, {"lr": 1e-3, "clip": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(UserError, match="expected"):
        finetune(add_lora(tiny(), 2, 2, TARGETS), lambda step: rows(), 3, **bad)


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step():
    model = add_lora(tiny(), 2, 2, TARGETS)
    batch = rows()

    def batch_at(step):
        if step == 2:
            model.embed_tokens.weight.data.fill_(float("nan"))
        return batch
    with pytest.raises(UserError, match="nan at step 2"):
        finetune(model, batch_at, 5, lr=1e-3)


def test_resume_continues_bit_for_bit(tmp_path):
    def run(folder, die_at=None, resume=False):
        model = add_lora(tiny(), 4, 4, TARGETS)

        def batch_at(step):
            if step == die_at:
                raise RuntimeError("power cut")
            return rows(seed=step)
        losses = finetune(model, batch_at, 30, lr=1e-2, factor=random_factor(model, 1, 0), folder=folder, resume=resume, config={"a": 1})
        return losses, [p.clone() for m in lora_modules(model).values() for p in (m.lora_A, m.lora_B)]
    whole, end = run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "cut", die_at=17)
    losses, resumed = run(tmp_path / "cut", resume=True)
    assert losses == whole and all(map(torch.equal, end, resumed))
    log = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(30)) and [entry["loss"] for entry in log] == whole


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    run = lambda config: finetune(add_lora(tiny(), 4, 4, TARGETS), lambda s: rows(), 3, lr=1e-2, folder=tmp_path, resume=True, config=config)
    run({"lr": 1})
    with pytest.raises(UserError, match="other settings .lr"):
        run({"lr": 2})


def test_ctrl_c_and_a_kill_leave_a_checkpoint_of_the_last_step(tmp_path):
    code = ("import sys, time; sys.path[:0] = ['tests', '.']; from test_train import *; import cli\n"
            "def batch_at(step):\n    print(step, flush=True); time.sleep(.02); return rows()\n"
            f"cli.run(lambda: finetune(add_lora(tiny(), 4, 4, TARGETS), batch_at, 500, lr=1e-2, folder={str(tmp_path)!r}, config={{}}))")
    for sent, resume_from in ((signal.SIGINT, 20), (signal.SIGTERM, 20)):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while int(process.stdout.readline()) < resume_from:
            pass
        os.kill(process.pid, sent)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
        saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        assert saved["step"] == len(saved["losses"]) >= resume_from


def test_compiled_steps_equal_eager_ones_and_a_later_run_keeps_its_own_hooks(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(f, **options, backend="aot_eager"))  # needs no C++ compiler

    def losses(compiled, *contexts):
        model, runs = add_lora(tiny(), 4, 8, TARGETS), []
        for context in contexts:
            during = ablation(model, torch.eye(16)[:, :8]) if context else None
            runs += finetune(model, lambda step: rows(4, 9 - step), 3, lr=1e-2, during=during, compile=compiled)
        return runs
    eager = losses(False, False, True)
    assert losses(True, False, True) == pytest.approx(eager, rel=1e-4) and abs(eager[0] - eager[3]) > 1e-3
