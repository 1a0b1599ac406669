"""The residual stream by hand, with plain tensors: what ablation and steering do to it."""

import math

import pytest
import torch
from by_hand import (
    SITES,
    basis,
    by_hand,
    close,
    loss_of,
    project_out,
    shifted,
    some_model,
    some_rows,
)

from baselines.stream import (
    ablation,
    embeddings,
    residual_streams,
    steering,
    steering_vector,
    stream_subspace,
    sublayers,
)
from identify import gap, spectra, thin_svd
from lora import lora_modules
from model import response_loss


@pytest.fixture
def model():
    return some_model()


@pytest.fixture
def batch():
    return some_rows()


def test_the_hand_computation_is_the_model(model, batch):
    assert close(model(batch[0]), by_hand(model, batch[0]))
    assert not close(by_hand(model, batch[0]), by_hand(model, batch[0], with_lora=False))


def test_embeddings_and_sublayers_are_all_that_adds_to_the_stream(model, batch):
    added, last = [], []
    hooks = [
        part.register_forward_hook(lambda module, inputs, output: added.append(output))
        for part in (*embeddings(model), *sublayers(model))
    ]
    hooks.append(model.norm.register_forward_hook(lambda m, inputs, output: last.append(inputs[0])))
    model(batch[0])
    for hook in hooks:
        hook.remove()
    assert len(added) == 5 and close(sum(added), last[0])


def test_ablation_takes_the_basis_out_of_the_stream_after_every_sublayer(model, batch):
    Q = basis()
    with ablation(model, Q):
        found = model(batch[0])
    assert close(found, by_hand(model, batch[0], project_out(Q)))


@pytest.mark.parametrize("missed", [-1, *SITES])
def test_ablation_leaves_out_no_place(model, batch, missed):
    Q = basis()
    with ablation(model, Q):
        found = model(batch[0])
    assert not close(found, by_hand(model, batch[0], project_out(Q, but=missed)))


def test_ablation_is_gone_afterwards(model, batch):
    before = model(batch[0])
    with ablation(model, basis()):
        assert not close(model(batch[0]), before)
    assert torch.equal(model(batch[0]), before)


def test_ablation_is_gone_after_an_error_too(model, batch):
    before = model(batch[0])
    with pytest.raises(ZeroDivisionError), ablation(model, basis()):
        1 / 0  # noqa: B018 - it is here to raise
    assert torch.equal(model(batch[0]), before)


def test_ablation_lets_gradients_through(model, batch):
    Q = basis()
    parameters = [p for m in lora_modules(model).values() for p in (m.lora_A, m.lora_B)]
    with ablation(model, Q):
        found = torch.autograd.grad(response_loss(model, *batch), parameters)
    by_formula = loss_of(by_hand(model, batch[0], project_out(Q)), *batch)
    expected = torch.autograd.grad(by_formula, parameters)
    for ours, theirs in zip(found, expected, strict=True):
        assert close(ours, theirs) and ours.abs().max() > 1e-4


def test_under_ablation_the_last_writer_learns_nothing_along_the_basis(model, batch):
    Q, B = basis(), lora_modules(model)["layers.1.mlp.down_proj"].lora_B
    with ablation(model, Q):
        gradient = torch.autograd.grad(response_loss(model, *batch), B)[0]
    assert gradient.abs().max() > 1e-3
    assert (Q.T @ gradient).abs().max() < 1e-5


@pytest.mark.parametrize("site", SITES)
def test_steering_adds_the_vector_after_its_sublayer(model, batch, site):
    v = 2 * basis(1)[:, 0]
    with steering(model, site, v):
        found = model(batch[0])
    assert close(found, by_hand(model, batch[0], shifted(site, v)))


@pytest.mark.parametrize("site", SITES)
def test_steering_adds_it_nowhere_else(model, batch, site):
    v = 2 * basis(1)[:, 0]
    with steering(model, site, v):
        found = model(batch[0])
    for wrong in {site - 1, site + 1} & {-1, *SITES}:  # one sub-layer early, one late
        assert not close(found, by_hand(model, batch[0], shifted(wrong, v)))
    assert not close(found, by_hand(model, batch[0], shifted(site, -v)))


def slopes_along(model, q, batch, eps=1e-2):
    """The slope of the loss along q after each sub-layer, by differences."""

    def loss_at(site, size):
        return loss_of(by_hand(model, batch[0], shifted(site, size * q)), *batch).item()

    return [(loss_at(site, eps) - loss_at(site, -eps)) / (2 * eps) for site in SITES]


def test_the_steering_vector_points_where_the_loss_falls_fastest(model, batch):
    q = basis(1)[:, 0]
    slopes = slopes_along(model, q, batch)
    site, v = steering_vector(model, q, *batch)
    assert site == max(SITES, key=lambda s: abs(slopes[s]))
    assert close(v / v.norm(), -math.copysign(1, slopes[site]) * q)


def test_the_steering_vectors_length_is_in_units_of_what_its_sublayer_adds(model, batch):
    q, streams = basis(1)[:, 0], {}

    def keep(h, site):
        streams[site] = h
        return h

    by_hand(model, batch[0][:, :-1], keep)  # the last token predicts nothing
    site, v = steering_vector(model, q, *batch, length=0.6)
    added = (streams[site] - streams[site - 1]).norm(dim=-1).mean().item()
    assert v.norm().item() == pytest.approx(0.6 * added, rel=1e-4)


def test_a_singular_vectors_sign_means_nothing_to_steering(model, batch):
    q = basis(1)[:, 0]
    (site, v), (mirrored, same) = (steering_vector(model, s * q, *batch) for s in (1, -1))
    assert mirrored == site and close(same, v)


def test_residual_streams_are_those_of_the_last_token(model, batch):
    expected = {}

    def keep(h, site):
        expected[site] = h[:, -1]
        return h

    by_hand(model, batch[0], keep)
    found = residual_streams(model, batch[0])
    assert close(found, torch.stack([expected[site] for site in SITES]))


def weakly_said(q, rank, g):
    """A writer's update of rank directions, one of them q, none larger than the others."""
    others = torch.nn.functional.normalize(torch.randn(len(q), rank - 1, generator=g), dim=0)
    return thin_svd(torch.randn(rank, 50, generator=g), torch.cat((q[:, None], others), 1))


def test_stream_subspace_finds_what_all_writers_say_though_each_says_it_weakly():
    g = torch.Generator().manual_seed(0)
    q = torch.nn.functional.normalize(torch.randn(200, generator=g), dim=0)
    svds = {f"layers.{i}.mlp.down_proj": weakly_said(q, 3, g) for i in range(12)}
    Q, S = stream_subspace(svds)
    assert abs(Q[:, 0] @ q) > 0.95 and gap(S) > 1.5


def test_stream_subspace_is_of_the_writers_where_there_are_any(model):
    svds = spectra(model)
    writers = {name: svd for name, svd in svds.items() if "q_proj" not in name}
    assert len(writers) < len(svds)
    assert torch.equal(stream_subspace(svds, 2)[0], stream_subspace(writers, 2)[0])


def test_stream_subspace_of_readers_alone_is_what_they_listen_to(model):
    readers = {name: svd for name, svd in spectra(model).items() if "q_proj" in name}
    Q, _ = stream_subspace(readers, 2)
    heard = torch.cat([V * S for _, S, V in readers.values()], 1)
    expected = torch.linalg.svd(heard)[0][:, :2]
    assert close(Q @ Q.T, expected @ expected.T)


def test_modules_of_different_widths_share_no_stream():
    svds = {
        f"layers.{i}.o_proj": thin_svd(torch.randn(2, 9), torch.randn(5 + i, 2)) for i in (0, 1)
    }
    with pytest.raises(ValueError, match="widths differ"):
        stream_subspace(svds)
