"""The residual stream: what ablation and steering do to it is what edits of the weights do."""

import math

import pytest
import torch
from by_hand import SITES, ablated, some_model, steered, streams
from toys import basis, rows

from baselines.stream import ablation, steering, steering_vector, stream_subspace
from identify import gap, spectra, thin_svd
from lora import lora_factors, lora_modules
from model import response_loss


@pytest.fixture(params=[1e4, None], ids=["rotary", "learned positions"])
def model(request):
    return some_model(rope_theta=request.param)


def close(a, b):
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_ablation_is_the_model_that_never_writes_along_the_basis(model):
    (tokens, _), Q = rows(), basis(16, 2)
    before = model(tokens)
    with ablation(model, Q):
        found = model(tokens)
        assert (streams(model, tokens) @ Q).abs().max() < 1e-3
    assert close(found, ablated(model, Q)(tokens)) and not close(found, before)
    assert torch.equal(model(tokens), before)


def test_under_ablation_gradients_flow_and_writers_learn_nothing_along_the_basis(model):
    (tokens, mask), Q = rows(), basis(16, 2)
    with pytest.raises(KeyboardInterrupt), ablation(model, Q):
        response_loss(model, tokens, mask).backward()
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in model.modules())
    edited = ablated(model, Q)
    response_loss(edited, tokens, mask).backward()
    for name, m in lora_modules(edited).items():
        found = lora_modules(model)[name].lora_B.grad
        expected = m.lora_B.grad
        if "q_proj" not in name:  # the edit's own factor of the chain rule
            expected = expected - Q @ (Q.T @ expected)
        assert close(found, expected) and found.abs().max() > 1e-3


@pytest.mark.parametrize("site", SITES)
def test_steering_adds_the_vector_after_its_sublayer_alone(model, site):
    (tokens, _), v = rows(), 3 * basis(16, 1)[:, 0]
    before = model(tokens)
    with steering(model, site, v):
        found = model(tokens)
    assert close(found, steered(model, site, v)(tokens)) and not close(found, before)
    assert torch.equal(model(tokens), before)


def test_the_steering_vector_lowers_the_loss_fastest_in_units_of_what_its_sublayer_adds(model):
    (tokens, mask), q, slopes = rows(), basis(16, 1)[:, 0], []
    for site in SITES:
        up, down = (response_loss(steered(model, site, e * q), tokens, mask) for e in (0.03, -0.03))
        slopes.append((up - down).item())
    site, v = steering_vector(model, q, tokens, mask, length=0.6)
    assert site == max(SITES, key=lambda s: abs(slopes[s]))
    assert close(v / v.norm(), -math.copysign(1, slopes[site]) * q)
    stream = streams(model, tokens[:, :-1])  # the last token predicts nothing
    added = (stream[site + 1] - stream[site]).norm(dim=-1).mean().item()
    assert v.norm().item() == pytest.approx(0.6 * added, rel=1e-4)
    mirrored, same = steering_vector(model, -q, tokens, mask, length=0.6)
    assert mirrored == site and close(same, v)  # a singular vector's sign means nothing


def test_stream_subspace_finds_what_all_writers_say_though_each_says_it_weakly():
    g, svds = torch.Generator().manual_seed(0), {}
    q = basis(200, 1, g)
    for i in range(12):
        others = torch.nn.functional.normalize(torch.randn(200, 2, generator=g), dim=0)
        B = torch.cat((q, others), 1)  # none is larger than the others
        svds[f"layers.{i}.mlp.down_proj"] = thin_svd(torch.randn(3, 50, generator=g), B)
    Q, S = stream_subspace(svds)
    assert abs(Q[:, 0] @ q) > 0.95 and gap(S) > 1.5


def test_stream_subspace_is_what_writers_say_or_what_readers_listen_to():
    factors = lora_factors(some_model())
    readers = {name for name in factors if "q_proj" in name}
    said = torch.cat([B @ A for name, (A, B) in factors.items() if name not in readers], 1)
    heard = torch.cat([(B @ A).T for name, (A, B) in factors.items() if name in readers], 1)
    svds = spectra(factors)
    for dense, some in ((said, svds), (heard, {name: svds[name] for name in readers})):
        Q, S = stream_subspace(some, 2)
        U, values, _ = torch.linalg.svd(dense)
        assert close(Q @ Q.T, U[:, :2] @ U[:, :2].T) and close(S[:5], values[:5])


def test_modules_of_different_widths_share_no_stream():
    svds = {f"{i}.o_proj": thin_svd(torch.randn(2, 9), torch.randn(5 + i, 2)) for i in (0, 1)}
    with pytest.raises(ValueError, match="widths differ"):
        stream_subspace(svds)
