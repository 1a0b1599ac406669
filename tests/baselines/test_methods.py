"""Each method does what its formula says, by a hand computation of a model of two blocks."""

import math

import pytest
import torch
from by_hand import basis, by_hand, close, loss_of, project_out, shifted, some_model, some_rows
from toys import fit

from baselines.methods import METHODS, NEEDS, Found, kl_to_base, recipe, replay
from baselines.stream import steering_vector, stream_subspace
from identify import identify, leak, output_spectra, spectra
from lora import add_lora, lora_modules, remove_lora
from model import response_loss
from support.errors import UserError


@pytest.fixture
def model():
    return some_model()


@pytest.fixture
def batch():
    return some_rows()


def train(model, batch, steps, added, **options):
    return fit(model, steps, added, lambda step: batch, **{"lr": 1e-3, **options})


def test_ablate_train_trains_under_ablation_and_is_measured_without(model, batch):
    Q, plain = basis(), loss_of(by_hand(model, batch[0]), *batch).item()
    expected = loss_of(by_hand(model, batch[0], project_out(Q)), *batch).item()
    losses = train(model, batch, 2, recipe("ablate_train", model, batch, Found(stream=Q))).losses
    assert losses[0] == pytest.approx(expected, rel=1e-4) and abs(expected - plain) > 0.01
    assert close(model(batch[0]), by_hand(model, batch[0]))


def test_steer_train_steers_in_training_alone(model, batch):
    Q, plain = basis(1), response_loss(model, *batch).item()
    site, v = steering_vector(model, Q[:, 0], *batch)
    expected = loss_of(by_hand(model, batch[0], shifted(site, v)), *batch).item()
    losses = train(model, batch, 2, recipe("steer_train", model, batch, Found(stream=Q))).losses
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[0] < plain
    assert close(model(batch[0]), by_hand(model, batch[0]))


def kl_by_hand(model, tokens, mask, swap=False):
    """KL(base || model), or the other way round."""
    p, q = (
        by_hand(model, tokens, with_lora=lora)[:, :-1].log_softmax(-1)[mask[:, 1:]]
        for lora in ((True, False) if swap else (False, True))
    )  # (N, V)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_kl_is_from_the_base_to_the_model_over_marked_positions(model, batch):
    found = kl_to_base(model, *batch)
    assert close(found, kl_by_hand(model, *batch)) and found > 0.1
    assert not close(found, kl_by_hand(model, *batch, swap=True))


def test_kl_is_zero_where_nothing_was_learned(model, batch):
    for m in lora_modules(model).values():
        m.lora_B.data.zero_()
    assert kl_to_base(model, *batch).abs() < 1e-6


def test_kl_adds_its_gradient_to_that_of_the_loss(model, batch):
    """AdamW's first step moves each weight by lr against the sign of its gradient."""
    other = (batch[0].flip(0, 1), batch[1].flip(0))
    B = lora_modules(model)["layers.0.mlp.down_proj"].lora_B
    loss, kl = loss_of(by_hand(model, batch[0]), *batch), kl_by_hand(model, *other)
    both = torch.autograd.grad(loss + kl, B, retain_graph=True)[0]
    alone = torch.autograd.grad(loss, B)[0]
    before = B.detach().clone()
    added = recipe("kl", model, batch, Found(unrelated=other))
    train(model, batch, 1, added, weight_decay=0, warmup=1, clip=1e6)
    assert torch.equal((before - B.detach()).sign(), both.sign())
    assert not torch.equal(both.sign(), alone.sign())


# ---------------------------------------------------------------- the control


LOOKS = [
    {"step": 10, "joined": {"layers.0.mlp.down_proj": 2}},
    {"step": 20, "joined": {}},
    {"step": 30, "joined": {"layers.0.mlp.down_proj": 1, "layers.1.self_attn.q_proj": 3}},
]


def test_the_control_draws_as_many_at_the_same_moments_and_never_else(model):
    look, svds = replay(LOOKS, seed=0), output_spectra(model)
    drawn = [look(step, svds) for step in range(30)]
    assert {
        step + 1: {n: U.shape[1] for n, U in d.items()} for step, d in enumerate(drawn) if d
    } == {look["step"]: look["joined"] for look in LOOKS if look["joined"]}


def test_the_controls_directions_are_orthonormal_and_random(model):
    svds = output_spectra(model)
    first, again, other = (replay(LOOKS, seed)(29, svds) for seed in (0, 0, 1))
    for name, U in first.items():
        assert close(U.T @ U, torch.eye(U.shape[1]))
        assert torch.equal(U, again[name]) and not close(U, other[name])


def test_the_control_draws_anew_at_every_moment(model):
    looks = [{"step": step, "joined": {"layers.0.mlp.down_proj": 2}} for step in (10, 20)]
    look, svds = replay(looks, seed=0), output_spectra(model)
    first, second = (look(step, svds)["layers.0.mlp.down_proj"] for step in (9, 19))
    assert (first.T @ second).abs().max() < 0.99


# ---------------------------------------------------------------- all of them


def everything(model, batch):
    """All that a method may need."""
    looks = [{"step": 10, "joined": {"layers.0.mlp.down_proj": 1}}]
    svds = spectra(model)
    return Found(identify(model), stream_subspace(svds)[0], looks, loss=0.0, unrelated=batch)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_and_leaves_no_hook(model, batch, method):
    found = everything(model, batch)
    add_lora(remove_lora(model), 4, 4, ("q_proj", "o_proj", "down_proj"))
    losses = train(model, batch, 12, recipe(method, model, batch, found, seed=1), lr=1e-2).losses
    assert len(losses) == 12 and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_grasp_alone_leaks_nothing_of_the_found_factor(model, batch, method):
    found = everything(model, batch)
    add_lora(remove_lora(model), 4, 4, ("q_proj", "o_proj", "down_proj"))
    train(model, batch, 12, recipe(method, model, batch, found, seed=1), lr=1e-2)
    assert (leak(model, found.factor) < 1e-6) == (method == "grasp")


@pytest.mark.parametrize("method", ["grasp_online", "grasp_random"])
def test_the_methods_that_look_leak_nothing_of_what_joined(model, batch, method):
    found = everything(model, batch)
    add_lora(remove_lora(model), 4, 4, ("q_proj", "o_proj", "down_proj"))
    result = train(model, batch, 12, recipe(method, model, batch, found), lr=1e-2)
    assert len(result.looks) == 1
    assert leak(model, result.factor) < 1e-6


@pytest.mark.parametrize("method", [method for method in METHODS if method not in NEEDS])
def test_the_methods_that_need_nothing_run_without_anything(model, batch, method):
    assert recipe(method, model, batch) is not None


@pytest.mark.parametrize(
    "method,message",
    [
        ("magic", "method 'magic' is unknown, expected one of naive, grasp"),
        *((method, f"method '{method}' needs {what}") for method, (_, what) in NEEDS.items()),
    ],
)
def test_a_method_that_cannot_run_is_refused_in_one_line(model, batch, method, message):
    with pytest.raises(UserError) as error:
        recipe(method, model, batch)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
