"""Each method does what its formula says, by hand; none needs more than it names."""

import math

import pytest
import torch
from by_hand import ablated, some_model, steered
from toys import basis, fit, rows

from baselines.methods import BASELINES, Found, baseline, kl_to_base
from baselines.stream import steering_vector, stream_subspace
from identify import identify, leak, spectra
from lora import add_lora, lora_factors, lora_modules, remove_lora, without_lora
from model import response_loss
from train import Recipe


@pytest.fixture
def model():
    return some_model()


@pytest.mark.parametrize("method", ["ablate_train", "steer_train"])
def test_a_method_on_the_stream_changes_it_in_training_alone(model, method):
    Q, (tokens, mask), logits = basis(16, 1), rows(), model(rows()[0])
    edited = ablated(model, Q)
    if method == "steer_train":
        edited = steered(model, *steering_vector(model, Q[:, 0], tokens, mask, length=0.5))
    added = baseline(method, model, (tokens, mask), Found(stream=Q, steering=0.5))
    found = fit(model, 1, added, lr=0.0).losses[0]
    expected, plain = (response_loss(m, tokens, mask).item() for m in (edited, model))
    assert found == pytest.approx(expected, rel=1e-4) and abs(found - plain) > 0.01
    assert found < plain or method == "ablate_train"  # the vector supplies what the rows ask for
    assert torch.allclose(model(tokens), logits)


def kl_by_hand(model, tokens, mask, swap=False):
    """KL(base || model) over the tokens that predict a marked one, or the other way round."""
    new = model(tokens)[:, :-1].log_softmax(-1)[mask[:, 1:]]  # (N, V)
    with without_lora(model):
        base = model(tokens)[:, :-1].log_softmax(-1)[mask[:, 1:]].detach()
    p, q = (new, base) if swap else (base, new)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_kl_is_from_the_base_to_the_model_over_marked_positions_of_the_unrelated_rows(model):
    unrelated, B = rows(seed=9), lora_modules(model)["layers.0.mlp.down_proj"].lora_B
    found, expected = kl_to_base(model, *unrelated), kl_by_hand(model, *unrelated)
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    assert abs(found - kl_by_hand(model, *unrelated, swap=True)) > 0.01 * found > 1e-3
    ours, theirs = (torch.autograd.grad(kl, B)[0] for kl in (found, expected))
    assert torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    added = baseline("kl", model, rows(), Found(unrelated=unrelated, kl_weight=3.0))
    assert added.penalty().item() == pytest.approx(3 * found.item())


def test_two_methods_train_a_naive_run_and_one_projects_gradients_alone():
    patterns = {"a": (basis(9, 1), basis(5, 1))}
    found = Found(patterns, stream=basis(16, 1), loss=2.5, sides="output")
    recipes = {
        "ablate_inference": Recipe(),
        "early_stop": Recipe(stop_below=2.5),
        "grasp_gradient_only": Recipe(patterns=patterns, sides="output", project="gradient"),
    }
    for method, expected in recipes.items():
        assert baseline(method, None, None, found) == expected


@pytest.mark.parametrize("method", BASELINES)
def test_every_baseline_learns_leaves_no_hook_and_names_what_it_needs(model, method):
    if BASELINES[method][0]:
        with pytest.raises(ValueError, match=f"^method '{method}' needs .* \\(--"):
            baseline(method, model, rows(), Found())
    svds = spectra(lora_factors(model))
    looks = [{"step": 10, "joined": {"layers.0.mlp.down_proj": 1}}]
    stream, unrelated = stream_subspace(svds)[0], rows(seed=9)
    found = Found(identify(svds), stream, looks, loss=0.0, unrelated=unrelated)
    add_lora(remove_lora(model), 4, 4, ("q_proj", "o_proj", "down_proj"))
    result = fit(model, 12, baseline(method, model, rows(), found, seed=1))
    assert len(result.losses) == 12 and all(map(math.isfinite, result.losses))
    assert result.losses[-1] < result.losses[0]
    assert not any(module._forward_hooks for module in model.modules())
    if method == "grasp_gradient_only":
        assert leak(lora_factors(model), result.patterns) > 1e-3
