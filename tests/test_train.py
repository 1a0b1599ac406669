"""The fine-tuning loop: the constraint holds to rounding at every step; nothing else changes."""

import random

import pytest
import torch
from toys import TARGETS, fit, lora_values, random_patterns, rows, tiny, top_patterns

from baselines.methods import Found, baseline
from identify import leak, look_spectra
from lora import add_lora, lora_factors, lora_modules, remove_lora
from model import response_loss
from train import Recipe

FREE = {"both": (), "output": (1,), "input": (0,)}  # the sides that are not held


def fresh(rank=4, seed=0, **changes):
    """A tiny model with a fresh LoRA."""
    return add_lora(tiny(**changes), rank, 4, TARGETS, seed=seed)


def along(model, patterns):
    """The largest entries of UᵀB and of A V over all modules, where there are any."""
    factors = lora_factors(model)
    said = [U.T @ factors[name][1] for name, (U, _) in patterns.items()]
    heard = [factors[name][0] @ V for name, (_, V) in patterns.items()]
    return tuple(
        torch.cat([x.flatten() for x in side]).abs().max().item() for side in (said, heard)
    )


# ---------------------------------------------------------------- the constraint


@pytest.mark.parametrize("seed", range(6))
def test_the_constraint_holds_at_every_step(seed):
    """Over shapes, ranks, rates, decay and clipping; in fp32 and beside a bf16 base."""
    draw = random.Random(seed)
    model = tiny(seed, d_model=draw.choice([16, 24, 40]), d_mlp=draw.choice([13, 33, 64]))
    if seed % 3 == 0:
        model.to(torch.bfloat16)
    add_lora(model, draw.choice([1, 3, 8]), 8, TARGETS, draw.random() < 0.5, seed)
    patterns, steps = random_patterns(model, draw.choice([1, 2, 5]), seed), []

    def each(step):
        assert max(along(model, patterns)) < 1e-6
        steps.append(step)

    lr, decay, clip = draw.choice([1e-3, 3e-2]), draw.choice([0, 0.3]), draw.choice([0.05, 1.0])
    fit(model, 30, Recipe(patterns=patterns), lr=lr, weight_decay=decay, clip=clip, each=each)
    assert len(steps) == 30 and leak(lora_factors(model), patterns) <= 1e-6
    assert all(m.lora_B.abs().max() > 1e-4 for m in lora_modules(model).values())


@pytest.mark.parametrize("sides,free", FREE.items())
def test_A_is_off_the_patterns_from_the_start_and_a_side_that_is_not_held_is_free(sides, free):
    model = fresh()
    patterns, before, seen = random_patterns(model, 2), lora_values(model), []

    def batch_at(step):
        seen.append((along(model, patterns)[1], torch.equal(lora_values(model), before)))
        return rows()

    result = fit(model, 10, Recipe(patterns=patterns, sides=sides), batch_at)
    heard, unchanged = seen[0]  # before the first step
    assert (heard > 0.01 and unchanged) if 1 in free else heard < 1e-6
    for side, largest in enumerate(along(model, patterns)):
        assert largest > 1e-3 if side in free else largest < 1e-6
        widths = {pattern[side].shape[1] for pattern in result.patterns.values()}
        assert widths == {0 if side in free else 2}


@pytest.mark.parametrize("project", ["step", "gradient", "both"])
def test_projecting_the_gradients_alone_leaks_under_adamw_and_nothing_touches_the_base(project):
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    patterns = random_patterns(add_lora(model, 8, 8, TARGETS), 2)
    fit(model, 40, Recipe(patterns=patterns, project=project))
    found = leak(lora_factors(model), patterns)
    assert found > 0.02 if project == "gradient" else found <= 1e-6
    remove_lora(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


# ---------------------------------------------------------------- the loop


def by_hand(model, steps, patterns, project, lr, warmup, clip):
    """The LoRA's values after the same loop in dense matrices."""
    modules = lora_modules(model)
    parameters = [p for m in modules.values() for p in (m.lora_A, m.lora_B)]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)

    def off(values):
        for name, (U, V) in patterns.items():
            A, B = values(modules[name].lora_A), values(modules[name].lora_B)
            A.copy_(A @ (torch.eye(len(V)) - V @ V.T))
            B.copy_((torch.eye(len(U)) - U @ U.T) @ B)

    off(lambda p: p.data)
    for step in range(steps):
        response_loss(model, *rows(seed=step)).backward()
        if project in ("gradient", "both"):
            off(lambda p: p.grad)
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.grad *= min(1, clip / norm)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warmup, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if project in ("step", "both"):
            off(lambda p: p.data)
    return lora_values(model)


@pytest.mark.parametrize("k,project", [(0, "step"), (3, "step"), (3, "gradient"), (3, "both")])
def test_the_loop_is_adamw_with_warm_up_decay_clipping_and_projections_in_their_places(k, project):
    model, dense, options = fresh(8), fresh(8), {"lr": 1e-2, "warmup": 3, "clip": 0.03}
    patterns = random_patterns(model, k)
    recipe = Recipe(patterns=patterns, project=project)
    fit(model, 8, recipe, lambda step: rows(seed=step), **options)
    expected = by_hand(dense, 8, patterns, project, **options)
    assert torch.allclose(lora_values(model), expected, atol=1e-5)
    assert not torch.allclose(expected, lora_values(fresh(8)), atol=1e-3)


def test_micro_batches_give_the_steps_of_the_whole_batch():
    whole, parts = fresh(), fresh()
    losses = [fit(whole, 5).losses, fit(parts, 5, micro_batch=4).losses]
    assert torch.allclose(lora_values(whole), lora_values(parts), atol=1e-4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_penalty_adds_its_gradient_and_not_to_the_losses():
    plain, pulled = fresh(), fresh()
    B = [m.lora_B for m in lora_modules(pulled).values()]
    penalty = Recipe(penalty=lambda: 100 * sum(b.square().sum() for b in B) + 7)
    losses = [fit(plain, 10).losses, fit(pulled, 10, penalty).losses]
    assert losses[0][0] == losses[1][0]
    size = [sum(m.lora_B.norm() for m in lora_modules(run).values()) for run in (pulled, plain)]
    assert size[0] < 0.5 * size[1]


def test_early_stop_ends_at_the_first_loss_below_its_target():
    losses = fit(fresh(8), 100, Recipe(stop_below=3.7), lr=2e-2).losses
    assert losses[-1] <= 3.7 < min(losses[:-1]) and len(losses) < 100


def test_a_loss_that_is_not_finite_ends_in_one_line_that_names_the_step():
    model = fresh()

    def each(step):
        if step == 1:
            model.embed_tokens.weight.data.fill_(float("nan"))

    with pytest.raises(ValueError, match="^fine-tune: loss nan, .* at step 2; try a lower --lr"):
        fit(model, 5, each=each)


# ---------------------------------------------------------------- looks while it trains


@pytest.mark.parametrize("sides,free", FREE.items())
def test_what_a_look_takes_joins_and_the_update_is_off_it_at_once_and_from_then_on(sides, free):
    model = fresh(8)
    held = [random_patterns(model, 1)]

    def look(step, svds):
        for name, expected in look_spectra(lora_factors(model)).items():
            assert all(map(torch.equal, svds[name], expected))
        if step + 1 not in (3, 6):
            return {}
        held.append(top_patterns(svds))
        return held[-1]

    def each(step):
        for patterns in held:
            largest = along(model, patterns)
            assert all(largest[side] < 1e-6 for side in (0, 1) if side not in free)

    recipe = Recipe(patterns=held[0], look=look, look_every=3, sides=sides)
    result = fit(model, 11, recipe, each=each)
    joined = [(entry["step"], set(entry["joined"].values())) for entry in result.looks]
    assert joined == [(3, {1}), (6, {1}), (9, set())]
    assert all(entry["spike"].keys() == held[0].keys() for entry in result.looks)
    for pair in result.patterns.values():
        for side, Q in enumerate(pair):
            assert torch.allclose(Q.T @ Q, torch.eye(0 if side in free else 3), atol=1e-5)


def test_the_control_joins_as_many_at_the_same_moments_in_other_directions():
    look = Recipe(look=lambda step, svds: top_patterns(svds) if step == 9 else {})
    real, controls = fit(fresh(8), 20, look), []
    for seed in (0, 0, 1):
        model = fresh(8)
        control = baseline("grasp_random", model, rows(), Found(looks=real.looks), seed)
        control = fit(model, 20, control)
        assert leak(lora_factors(model), control.patterns) <= 1e-6
        assert [entry["joined"] for entry in control.looks] == [e["joined"] for e in real.looks]
        controls.append(control)
    for name, pair in real.patterns.items():
        for side, Q in enumerate(pair):
            first, again, other = (control.patterns[name][side] for control in controls)
            assert first.shape == Q.shape and first.norm() == pytest.approx(1)
            assert torch.equal(first, again)
            assert max((first.T @ Q).abs(), (first.T @ other).abs()) < 0.9
