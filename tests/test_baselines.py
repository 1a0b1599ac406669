"""Each baseline does what its formula says: recomputed by hand, with plain tensors, on a model of two blocks."""
import math

import pytest
import torch

from baselines import METHODS, ablation, kl_to_base, recipe, steering, steering_vector, stream_writers, random_like
from cli import UserError
from identify import leak, spectra, stream_subspace, top_pairs
from lora import add_lora, lora_modules, remove_lora
from model import response_loss
from test_identify import tiny
from train import finetune

SITES = (0, 1, 2, 3)  # attention and MLP of block 0, of block 1; -1 is the embedding


def by_hand(model, tokens, edit=lambda h, site: h, with_lora=True):
    """Logits (B, T, V) from the weights alone; edit(h, site) replaces the residual stream after everything that writes to it."""
    c, state = model.config, dict(model.named_parameters())
    B, T = tokens.shape

    def linear(name, x):
        inner = name + ".linear" if name + ".linear.weight" in state else name
        y = x @ state[inner + ".weight"].T + state.get(inner + ".bias", 0)
        if inner == name or not with_lora:
            return y
        return y + model.get_submodule(name).scaling * (x @ state[name + ".lora_A"].T) @ state[name + ".lora_B"].T

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * state[name + ".weight"]

    def heads(x, n):
        return x.view(B, T, n, c.head_dim).transpose(1, 2)

    def turn(x):
        half = c.head_dim // 2
        angle = torch.arange(T)[:, None] * c.rope_theta ** (-torch.arange(half) * 2 / c.head_dim)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    h = edit(state["embed_tokens.weight"][tokens], -1)
    for i in range(c.n_layer):
        x = norm(f"layers.{i}.input_layernorm", h)
        q, k, v = (heads(linear(f"layers.{i}.self_attn.{part}_proj", x), c.n_head) for part in "qkv")
        weights = turn(q) @ turn(k).transpose(2, 3) / math.sqrt(c.head_dim)
        weights = weights.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)
        h = edit(h + linear(f"layers.{i}.self_attn.o_proj", (weights @ v).transpose(1, 2).reshape(B, T, -1)), 2 * i)
        x = norm(f"layers.{i}.post_attention_layernorm", h)
        gate, up = (linear(f"layers.{i}.mlp.{part}_proj", x) for part in ("gate", "up"))
        h = edit(h + linear(f"layers.{i}.mlp.down_proj", gate * gate.sigmoid() * up), 2 * i + 1)
    return norm("norm", h) @ state["embed_tokens.weight"].T


def loss_of(logits, tokens, mask):
    ln_p = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None])[..., 0]
    return -ln_p[mask[:, 1:]].mean()


@pytest.fixture
def model():
    model = tiny(n_kv_head=2)
    with torch.no_grad():  # larger than at init, so that every part of the model matters
        for name, p in model.named_parameters():
            p.mul_(8) if "proj" in name else p.add_(0.3 * torch.randn_like(p)) if "norm" in name else p.mul_(20)
        add_lora(model, 4, 4, ("q_proj", "o_proj", "down_proj"))
        for m in lora_modules(model).values():
            m.lora_B.normal_(std=0.3)
    return model


@pytest.fixture
def rows():
    g = torch.Generator().manual_seed(5)
    return torch.randint(50, (4, 7), generator=g), torch.rand(4, 7, generator=g) > 0.4


def basis(k=2, seed=3):
    return torch.linalg.qr(torch.randn(16, k, generator=torch.Generator().manual_seed(seed)))[0]


def close(a, b):
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_the_hand_computation_is_the_model(model, rows):
    assert close(model(rows[0]), by_hand(model, rows[0]))
    assert not close(by_hand(model, rows[0]), by_hand(model, rows[0], with_lora=False))


def project_out(Q, but=None):
    return lambda h, site: h if site == but else h - (h @ Q) @ Q.T


def test_ablation_takes_the_basis_out_of_the_stream_after_every_sub_layer(model, rows):
    Q, before = basis(), model(rows[0])
    with ablation(model, Q):
        found = model(rows[0])
    assert close(found, by_hand(model, rows[0], project_out(Q)))
    for missed in (-1, *SITES):  # not even one of the places may be left out
        assert not close(found, by_hand(model, rows[0], project_out(Q, but=missed))), missed
    assert torch.equal(model(rows[0]), before)  # it is gone afterwards


def test_ablation_in_training_lets_gradients_through(model, rows):
    Q, parameters = basis(), [p for m in lora_modules(model).values() for p in (m.lora_A, m.lora_B)]
    with ablation(model, Q):
        loss = response_loss(model, *rows)
        found = torch.autograd.grad(loss, parameters)
    by_formula = loss_of(by_hand(model, rows[0], project_out(Q)), *rows)
    assert close(loss, by_formula)
    for a, b in zip(found, torch.autograd.grad(by_formula, parameters)):
        assert close(a, b) and a.abs().max() > 1e-4
    last = lora_modules(model)["layers.1.mlp.down_proj"].lora_B
    assert close(Q.T @ found[[p is last for p in parameters].index(True)], torch.zeros(2, 4))  # nothing is learned along Q there


def test_ablate_train_trains_under_ablation_and_is_measured_without(model, rows):
    Q = basis()
    expected = loss_of(by_hand(model, rows[0], project_out(Q)), *rows).item()
    added = recipe("ablate_train", model, rows, random_like(top_pairs(spectra(model)), 0), Q)
    losses = finetune(model, lambda step: rows, 2, lr=1e-3, **added)
    assert losses[0] == pytest.approx(expected, rel=1e-4) and abs(expected - loss_of(by_hand(model, rows[0]), *rows).item()) > 0.01
    assert close(model(rows[0]), by_hand(model, rows[0]))


def shifted(site, vector):
    return lambda h, at: h + vector if at == site else h


@pytest.mark.parametrize("site", SITES)
def test_steering_adds_the_vector_after_its_sub_layer_and_nowhere_else(model, rows, site):
    v, before = 2 * basis(1)[:, 0], model(rows[0])
    with steering(model, site, v):
        found = model(rows[0])
    assert close(found, by_hand(model, rows[0], shifted(site, v)))
    for wrong in {site - 1, site + 1} & {-1, *SITES}:  # one sub-layer early, one late
        assert not close(found, by_hand(model, rows[0], shifted(wrong, v))), wrong
    assert not close(found, by_hand(model, rows[0], shifted(site, -v)))
    assert torch.equal(model(rows[0]), before)


def test_steering_vector_points_where_the_loss_falls_fastest(model, rows):
    q, eps = basis(1)[:, 0], 1e-2
    at = lambda site, size: loss_of(by_hand(model, rows[0], shifted(site, size * q)), *rows).item()
    slopes = [(at(site, eps) - at(site, -eps)) / (2 * eps) for site in SITES]
    expected = max(SITES, key=lambda site: abs(slopes[site]))
    stream = {}
    by_hand(model, rows[0][:, :-1], lambda h, i: stream.update({i: h}) or h)  # the last token predicts nothing
    written = (stream[expected] - stream[expected - 1]).norm(dim=-1).mean()
    site, v = steering_vector(model, q, *rows)
    assert site == expected and v.norm().item() == pytest.approx(0.3 * written.item(), rel=1e-4)
    assert close(v / v.norm(), -math.copysign(1, slopes[site]) * q)
    assert close(steering_vector(model, q, *rows, length=0.6)[1], 2 * v)
    mirrored, same = steering_vector(model, -q, *rows)  # a singular vector's sign means nothing
    assert mirrored == site and close(same, v)


def test_steer_train_steers_in_training_alone(model, rows):
    Q = basis(1)
    site, v = steering_vector(model, Q[:, 0], *rows)
    expected = loss_of(by_hand(model, rows[0], shifted(site, v)), *rows).item()
    added = recipe("steer_train", model, rows, random_like(top_pairs(spectra(model)), 0), Q)
    losses = finetune(model, lambda step: rows, 2, lr=1e-3, **added)
    assert losses[0] == pytest.approx(expected, rel=1e-4) and losses[0] < response_loss(model, *rows).item()
    assert close(model(rows[0]), by_hand(model, rows[0]))


def kl_by_hand(model, tokens, mask, swap=False):
    p, q = (by_hand(model, tokens, with_lora=lora)[:, :-1].log_softmax(-1)[mask[:, 1:]] for lora in (False, True))  # (N, V)
    p, q = (q, p) if swap else (p, q)
    return (p.exp() * (p - q)).sum(-1).mean()


def test_kl_is_from_the_base_to_the_model_over_marked_positions(model, rows):
    assert close(kl_to_base(model, *rows), kl_by_hand(model, *rows)) and kl_by_hand(model, *rows) > 0.1
    assert not close(kl_to_base(model, *rows), kl_by_hand(model, *rows, swap=True))
    for m in lora_modules(model).values():
        m.lora_B.data.zero_()
    assert kl_to_base(model, *rows).abs() < 1e-6


def test_kl_adds_its_gradient_to_that_of_the_loss(model, rows):
    """AdamW's first step moves each weight by lr against the sign of its gradient."""
    other = (rows[0].flip(0, 1), rows[1].flip(0))
    B = lora_modules(model)["layers.0.mlp.down_proj"].lora_B
    loss, kl = loss_of(by_hand(model, rows[0]), *rows), kl_by_hand(model, *other)
    both, alone = torch.autograd.grad(loss + kl, B, retain_graph=True)[0], torch.autograd.grad(loss, B)[0]
    before = B.detach().clone()
    added = recipe("kl", model, rows, unrelated=other)
    finetune(model, lambda step: rows, 1, lr=1e-3, weight_decay=0, warmup=1, clip=1e6, **added)
    assert torch.equal((before - B.detach()).sign(), both.sign()) and not torch.equal(both.sign(), alone.sign())


def test_random_control_has_the_shapes_of_the_factor_and_is_orthonormal(model):
    factor = top_pairs(spectra(model), 2)
    control = random_like(factor, 1)
    for side in ("hears", "says"):
        found, drawn = getattr(factor, side), getattr(control, side)
        assert {n: q.shape for n, q in found.items()} == {n: q.shape for n, q in drawn.items()}
        for name, q in drawn.items():
            assert close(q.T @ q, torch.eye(2)) and not close(q, found[name])
    again, other = random_like(factor, 1), random_like(factor, 2)
    assert all(torch.equal(again.says[n], q) and not torch.equal(other.says[n], q) for n, q in control.says.items())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_three_steps_and_leaves_no_hook(model, rows, method):
    svds = spectra(model)
    factor, stream = top_pairs(svds), stream_subspace(svds)[0]
    add_lora(remove_lora(model), 4, 4, ("q_proj", "o_proj", "down_proj"))
    added = recipe(method, model, rows, factor, stream, unrelated=rows, stop_below=0.0, seed=1)
    losses = finetune(model, lambda step: rows, 3, lr=1e-2, **added)
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and losses[2] < losses[0]
    assert all(not m._forward_hooks for m in model.modules())
    assert (leak(model, factor) < 1e-5) == (method == "grasp")
    if method == "grasp_random":
        assert leak(model, added["factor"]) < 1e-5


def test_stream_writers_are_all_that_adds_to_the_stream(model, rows):
    added, (first, rest) = [], stream_writers(model)
    hooks = [m.register_forward_hook(lambda m, args, out: added.append(out)) for m in (*first, *rest)]
    hooks.append(model.norm.register_forward_hook(lambda m, args, out: added.append(args[0])))
    model(rows[0])
    [hook.remove() for hook in hooks]
    assert len(added) == 6 and close(sum(added[:-1]), added[-1])


@pytest.mark.parametrize("method, message", [
    ("magic", "method 'magic' is unknown, expected one of naive, grasp"), ("grasp", "needs the found directions"),
    ("ablate_train", "needs the found directions"), ("kl", "unrelated"), ("early_stop", "a loss to stop at")])
def test_a_method_that_cannot_run_is_refused_in_one_line(model, rows, method, message):
    with pytest.raises(UserError, match=message) as error:
        recipe(method, model, rows)
    assert "\n" not in str(error.value)
