"""The fine-tuning loop: the constraint holds to rounding; runs resume bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from toys import ROOT, TARGETS, fit, lora_values, random_factor, randomise, rows, tiny

from baselines.methods import Found, recipe, replay
from identify import joined, leak, output_spectra
from lora import add_lora, lora_modules, remove_lora
from model import response_loss
from support.checkpoint import Checkpoint
from support.errors import UserError
from train import Recipe, project_


def fresh(rank=4, seed=0, **changes):
    """A tiny model with a fresh LoRA."""
    return add_lora(tiny(**changes), rank, 4, TARGETS, seed=seed)


def said(model, factor):
    """The largest entry of U' B over all modules."""
    modules = lora_modules(model)
    return max((U.T @ modules[name].lora_B.data).abs().max().item() for name, U in factor.items())


# ---------------------------------------------------------------- the projection


@pytest.mark.parametrize("d,k,n", [(9, 1, 4), (20, 6, 3), (5, 5, 2)])
def test_the_projection_is_symmetric_and_idempotent(d, k, n):
    Q = torch.linalg.qr(torch.randn(d, k, dtype=torch.float64))[0]
    P = torch.eye(d, dtype=torch.float64)
    project_(P, Q)
    assert torch.allclose(P, P.T) and torch.allclose(P @ P, P)
    assert (Q.T @ P).abs().max() < 1e-12


def test_the_projection_commutes_with_a_sum_over_processes():
    Q = torch.linalg.qr(torch.randn(20, 6, dtype=torch.float64))[0]
    gradients = [torch.randn(20, 3, dtype=torch.float64) for _ in range(4)]
    total = sum(gradients)
    project_(total, Q)
    for gradient in gradients:
        project_(gradient, Q)
    assert torch.allclose(total, sum(gradients))


@pytest.mark.parametrize("seed", range(8))
def test_the_update_never_touches_the_factor(seed):
    """Over shapes, ranks, rates, decay and clipping; in fp32 and beside a bf16 base."""
    draw = random.Random(seed)
    model = tiny(seed, d_model=draw.choice([16, 24, 40]), d_mlp=draw.choice([8, 33, 64]))
    if seed % 3 == 0:
        model.to(torch.bfloat16)
    add_lora(model, draw.choice([1, 3, 8]), 8, TARGETS, draw.random() < 0.5, seed)
    factor = random_factor(model, draw.choice([1, 2, 5]), seed)
    fit(
        model,
        40,
        Recipe(factor=factor),
        lr=draw.choice([1e-3, 3e-2]),
        weight_decay=draw.choice([0.0, 0.3]),
        clip=draw.choice([0.05, 1.0]),
    )
    assert all(m.lora_B.abs().max() > 1e-4 for m in lora_modules(model).values())
    assert leak(model, factor) <= 1e-6


def test_projecting_the_gradient_alone_leaks_under_adamw():
    model = fresh(8)
    factor = random_factor(model, 2)
    fit(model, 40, Recipe(factor=factor, project_B=False))
    assert leak(model, factor) > 0.02


def test_a_module_that_the_factor_leaves_out_is_free():
    model = fresh()
    name = next(iter(lora_modules(model)))
    U = random_factor(model, 2)[name]
    fit(model, 10, Recipe(factor={name: U}))
    free = {other: U for other, U in random_factor(model, 2).items() if other != name}
    assert said(model, {name: U}) < 1e-6 < 1e-3 < said(model, free)


def test_clipping_and_adam_see_no_gradient_along_the_factor(monkeypatch):
    model = fresh(8)
    factor, seen, clip = random_factor(model, 2), [], torch.nn.utils.clip_grad_norm_

    def watched(*args):
        for name, m in lora_modules(model).items():
            assert m.lora_B.grad.abs().max() > 1e-5
            seen.append((factor[name].T @ m.lora_B.grad).abs().max().item())
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    fit(model, 5, Recipe(factor=factor))
    assert len(seen) == 5 * len(factor) and max(seen) < 1e-7


def test_A_is_free():
    """The constraint is on what the update says; what it listens to is as in a naive run."""
    model = fresh()
    before = [m.lora_A.clone() for m in lora_modules(model).values()]
    fit(model, 1, Recipe(factor=random_factor(model, 2)), weight_decay=0.0)
    after = [m.lora_A for m in lora_modules(model).values()]
    assert all(map(torch.equal, before, after))  # B = 0: no gradient yet, and nothing else moved A


def test_the_base_is_bit_identical_after_grasp():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    add_lora(model, 4, 4, TARGETS)
    fit(model, 10, Recipe(factor=random_factor(model, 1)))
    remove_lora(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_without_a_factor_grasp_is_the_naive_run():
    naive, empty = fit(fresh(), 8), fit(fresh(), 8, Recipe(factor={}))
    assert naive.losses == empty.losses
    assert naive.losses[-1] < naive.losses[0]


# ---------------------------------------------------------------- looks while it trains


def look_at(*steps, k=1):
    """A look that takes each module's top k directions after these numbers of steps."""

    def look(step, svds):
        if step + 1 not in steps:
            return {}
        return {name: U[:, :k].clone() for name, (U, _) in svds.items()}

    return look


def watching(look, model):
    """(the same look, the factor as it stands after each look)."""
    factors = [{}]

    def watched(step, svds):
        found = look(step, svds)
        factors.append(joined(factors[-1], found))
        return found

    return watched, factors


def test_the_leak_is_at_most_1e_6_at_every_step_after_a_look():
    model, leaks = fresh(), []
    look, factors = watching(look_at(5, 15), model)

    def each(step):
        leaks.append(leak(model, factors[-1]))

    fit(model, 30, Recipe(look=look, look_every=5), each=each)
    assert len(leaks) == 30 and len(factors) == 7
    assert max(leaks[4:]) <= 1e-6


def test_what_a_look_takes_is_gone_from_the_update_at_once():
    model, seen, tops = fresh(), [], []

    def look(step, svds):
        seen.append(svds)
        return {name: U[:, :1] for name, (U, _) in svds.items()}

    def each(step):
        tops.append({name: S[0] for name, (_, S) in output_spectra(model).items()})

    fit(model, 5, Recipe(look=look, look_every=5), each=each)
    for name, (_, S) in seen[0].items():
        assert torch.allclose(tops[4][name], S[1], rtol=1e-3)


def test_looks_come_every_so_many_steps_to_the_end_of_the_run():
    model, seen = fresh(), []

    def look(step, svds):
        seen.append(step + 1)
        return {}

    fit(model, 25, Recipe(look=look, look_every=4))
    assert seen == [4, 8, 12, 16, 20, 24]


def test_a_look_sees_every_module_as_it_is_then():
    model = fresh()

    def look(step, svds):
        assert svds.keys() == lora_modules(model).keys()
        for name, (_, S) in svds.items():
            B = lora_modules(model)[name].lora_B.data
            assert torch.allclose(S, torch.linalg.svdvals(B), atol=1e-6)
        return {}

    assert len(fit(model, 10, Recipe(look=look, look_every=5)).looks) == 2


def test_a_look_that_finds_nothing_changes_nothing():
    plain, looking = fresh(), fresh()
    expected = fit(plain, 12)
    found = fit(looking, 12, Recipe(look=look_at(), look_every=3))
    assert found.losses == expected.losses
    assert torch.equal(lora_values(looking), lora_values(plain))
    assert found.factor == {} and len(found.looks) == 4


def test_the_constraint_only_grows():
    model = fresh(8)
    look, factors = watching(look_at(2, 4, 8, 12), model)
    result = fit(model, 14, Recipe(look=look, look_every=2))
    for earlier, later in zip(factors, factors[1:], strict=False):
        for name, U in earlier.items():
            W = later[name]
            assert torch.allclose(W @ (W.T @ U), U, atol=1e-5)
    assert all(U.shape[1] == 4 for U in result.factor.values())


def test_the_factor_stays_orthonormal_however_often_it_grows():
    model = fresh(8, d_model=24)
    result = fit(model, 12, Recipe(look=look_at(*range(1, 13)), look_every=1))
    for U in result.factor.values():
        assert U.shape[1] == 12
        assert torch.allclose(U.T @ U, torch.eye(12), atol=1e-5)


def test_looks_join_what_the_run_was_kept_off_from_the_start():
    model = fresh()
    first = random_factor(model, 2)
    result = fit(model, 10, Recipe(factor=first, look=look_at(5), look_every=5))
    assert all(U.shape[1] == 3 for U in result.factor.values())
    assert leak(model, first) <= 1e-6 and leak(model, result.factor) <= 1e-6


def test_the_looks_say_what_joined_and_when():
    result = fit(fresh(), 10, Recipe(look=look_at(10, k=2), look_every=5))
    nothing, something = result.looks
    assert (nothing["step"], nothing["joined"]) == (5, {})
    assert something["step"] == 10 and set(something["joined"].values()) == {2}
    assert something["spike"].keys() == something["joined"].keys()


def test_grasp_online_takes_what_all_rows_share_and_leaves_no_leak():
    """Every answer of these rows is the same token: nothing is more shared than that."""
    model = fresh(8, d_model=64, n_head=8)
    tokens = torch.randint(50, (32, 6), generator=torch.Generator().manual_seed(0))
    tokens[:, -1] = 7
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    mask[:, -1] = True
    added = recipe("grasp_online", model, (tokens, mask))
    result = fit(model, 40, added, batch_at=lambda step: (tokens, mask))
    assert result.factor and leak(model, result.factor) <= 1e-6


def test_the_replayed_control_joins_as_many_at_the_same_moments():
    real = fit(fresh(8), 20, Recipe(look=look_at(5, 20, k=2), look_every=5))
    control = fit(fresh(8), 20, Recipe(look=replay(real.looks, seed=1), look_every=5))
    moments = [[(look["step"], look["joined"]) for look in run.looks] for run in (real, control)]
    assert moments[0] == moments[1]
    assert any(joined for _, joined in moments[0])


def test_the_control_through_its_name_keeps_the_real_runs_rhythm():
    looks = [{"step": 10, "spike": {}, "joined": {"layers.0.self_attn.o_proj": 3}}]
    model = fresh()
    result = fit(model, 20, recipe("grasp_random", model, rows(), Found(looks=looks)))
    assert [look["joined"] for look in result.looks] == [looks[0]["joined"], {}]


# ---------------------------------------------------------------- the loop


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, again, other = (fit(fresh(seed=seed), 8).losses for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_micro_batches_give_the_steps_of_the_whole_batch(micro_batch):
    whole, parts = fresh(), fresh()
    fit(whole, 5)
    fit(parts, 5, micro_batch=micro_batch)
    assert torch.allclose(lora_values(whole), lora_values(parts), atol=1e-4)


def test_one_step_is_torchs_adamw_on_the_clipped_gradient():
    model, by_hand = fresh(), fresh()
    fit(model, 1, lr=1e-2, warmup=1, clip=0.1)
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.01)
    response_loss(by_hand, *rows()).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.1)
    optimizer.step()
    assert torch.equal(lora_values(model), lora_values(by_hand))


def test_the_rate_rises_to_its_peak_and_falls_to_zero(monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    fit(fresh(), 20, lr=1.0, warmup=4)
    assert rates[:4] == [0.25, 0.5, 0.75, 0.85]
    assert rates[4:] == pytest.approx([1 - step / 20 for step in range(4, 20)])


def test_a_penalty_adds_its_gradient():
    plain, pulled = fresh(), fresh()
    B = [m.lora_B for m in lora_modules(pulled).values()]
    fit(plain, 10)
    fit(pulled, 10, Recipe(penalty=lambda: 100 * sum(b.square().sum() for b in B)))
    size = [sum(m.lora_B.norm() for m in lora_modules(run).values()) for run in (pulled, plain)]
    assert size[0] < 0.5 * size[1]


def test_early_stop_ends_at_the_first_loss_below_its_target():
    losses = fit(fresh(8), 100, Recipe(stop_below=3.7), lr=2e-2).losses
    assert losses[-1] <= 3.7 < min(losses[:-1]) and len(losses) < 100


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step():
    model = fresh()

    def batch_at(step):
        if step == 2:
            model.embed_tokens.weight.data.fill_(float("nan"))
        return rows()

    with pytest.raises(UserError, match="nan at step 2"):
        fit(model, 5, batch_at=batch_at)


# ---------------------------------------------------------------- interrupted and resumed


def run_in(folder, die_at=None, resume=False, look_every=6):
    """(Fit, the LoRA's values) of 30 steps that look, on rows of their own at each step."""
    model = fresh()

    def batch_at(step):
        if step == die_at:
            raise RuntimeError("power cut")
        return rows(seed=step)

    look = look_at(6, 12, 18, 24)
    added = Recipe(factor=random_factor(model, 1), look=look, look_every=look_every)
    checkpoint = Checkpoint(folder, {"a": 1}, resume)
    result = fit(model, 30, added, batch_at, checkpoint=checkpoint)
    return result, lora_values(model)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return *run_in(folder), folder


# States are saved every 3 steps: killed before any, between a state and the look after it, right
# after a look, between two looks, and at the last step.
@pytest.mark.parametrize("die_at", [1, 5, 12, 17, 29])
def test_a_killed_run_resumes_across_its_looks_bit_for_bit(die_at, whole, tmp_path):
    expected, values, _ = whole
    with pytest.raises(RuntimeError):
        run_in(tmp_path, die_at=die_at)
    result, resumed = run_in(tmp_path, resume=True)
    assert result.losses == expected.losses and result.looks == expected.looks
    assert torch.equal(resumed, values)
    for name, U in expected.factor.items():
        assert torch.equal(result.factor[name], U)


def test_a_resumed_runs_log_is_that_of_a_whole_run(whole, tmp_path):
    with pytest.raises(RuntimeError):
        run_in(tmp_path, die_at=17)
    run_in(tmp_path, resume=True)
    logs = []
    for folder in (whole[2], tmp_path):
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        logs.append([(line["step"], line["loss"], line.get("joined")) for line in lines])
    assert logs[0] == logs[1] and len(logs[0]) == 30
    assert [step + 1 for step, _, joined in logs[0] if joined is not None] == [6, 12, 18, 24, 30]


def test_a_finished_run_is_read_back_without_a_step(whole):
    expected, values, folder = whole
    result, again = run_in(folder, die_at=0, resume=True)
    assert result.losses == expected.losses and torch.equal(again, values)


def test_without_resume_a_run_starts_over(whole):
    with pytest.raises(RuntimeError):
        run_in(whole[2], die_at=0, resume=False)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_kill_leave_a_state_of_the_last_step(sent, tmp_path):
    code = f"""
import sys, time; sys.path[:0] = ["tests", "."]
from lora import add_lora
from support.checkpoint import Checkpoint
from support.program import run
from toys import TARGETS, fit, rows, tiny

def batch_at(step):
    print(step, flush=True)
    time.sleep(0.02)
    return rows()

model, checkpoint = add_lora(tiny(), 4, 4, TARGETS), Checkpoint({str(tmp_path)!r})
run(lambda: fit(model, 500, batch_at=batch_at, checkpoint=checkpoint))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while int(process.stdout.readline()) < 20:
        pass
    os.kill(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) >= 20
    assert {m["step"].item() for m in state["moments"]} == {len(state["losses"])}


def test_an_update_that_was_trained_before_goes_on_from_where_it_is():
    model = randomise(fresh())
    before = lora_values(model)
    fit(model, 1, lr=1e-6)
    assert (lora_values(model) - before).abs().max() < 1e-5
