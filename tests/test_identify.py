"""Identification: linear algebra against dense oracles, and what stands out where nothing does."""

import math

import pytest
import torch
from torch.nn.functional import normalize
from toys import TARGETS, fit, random_factor, randomise, tiny

from identify import (
    FALSE_POSITIVES,
    gap,
    identify,
    joined,
    leak,
    null_quantile,
    output_spectra,
    spectra,
    spike,
    standing_out,
    thin_svd,
    top_directions,
)
from lora import LoRALinear, add_lora, lora_modules, remove_lora
from train import Recipe


def off_identity(Q):
    """How far the columns of Q are from orthonormal."""
    return (Q.T @ Q - torch.eye(Q.shape[1])).abs().max().item()


# ---------------------------------------------------------------- the decomposition


SHAPES = [(7, 5, 3), (5, 40, 5), (33, 12, 1), (64, 64, 16)]


@pytest.mark.parametrize("d_out,d_in,rank", SHAPES)
def test_thin_svd_equals_the_dense_svd(d_out, d_in, rank):
    A, B = torch.randn(rank, d_in), torch.randn(d_out, rank)
    U, S, V = thin_svd(A, B, 0.7)
    dense = 0.7 * B @ A
    assert torch.allclose(U * S @ V.T, dense, atol=1e-4)
    assert torch.allclose(S, torch.linalg.svdvals(dense)[:rank], atol=1e-4)


@pytest.mark.parametrize("d_out,d_in,rank", SHAPES)
def test_thin_svd_gives_orthonormal_directions(d_out, d_in, rank):
    U, _, V = thin_svd(torch.randn(rank, d_in), torch.randn(d_out, rank))
    assert off_identity(U) < 1e-5 and off_identity(V) < 1e-5


def test_a_looks_spectrum_is_that_of_B():
    model = randomise(add_lora(tiny(), 4, 9, TARGETS))
    for name, (U, S) in output_spectra(model).items():
        B = lora_modules(model)[name].lora_B.data
        left, values, _ = torch.linalg.svd(B, full_matrices=False)
        assert torch.allclose(S, values, atol=1e-5)
        assert torch.allclose((U * S) @ U.T, (left * values) @ left.T, atol=1e-5)


def test_identify_gives_each_modules_top_output_directions():
    model = randomise(add_lora(tiny(), 4, 4, TARGETS))
    factor = identify(model, rank=2)
    assert factor.keys() == lora_modules(model).keys()
    for name, m in lora_modules(model).items():
        dense = torch.linalg.svd(m.lora_B.data @ m.lora_A.data)[0][:, :2]
        U = factor[name]
        assert off_identity(U) < 1e-5
        assert torch.allclose(U @ U.T, dense @ dense.T, atol=1e-3)


def test_a_rank_above_the_updates_is_refused_in_one_line():
    model = add_lora(tiny(), 3, 3, ("o_proj",))
    with pytest.raises(ValueError, match="subspace rank 4, but the LoRA on .* has rank 3"):
        identify(model, rank=4)


@pytest.mark.parametrize("S,expected", [([6.0, 2.0, 1.0], 3.0), ([5.0], math.inf)])
def test_gap_is_the_ratio_of_the_first_two(S, expected):
    assert gap(torch.tensor(S)) == expected


def test_leak_equals_its_dense_definition():
    model = randomise(add_lora(tiny(), 3, 3, TARGETS))
    factor = random_factor(model, 2)
    dense = []
    for name, m in lora_modules(model).items():
        dW = m.lora_B.data @ m.lora_A.data
        dense.append((factor[name].T @ dW).norm() / dW.norm())
    assert leak(model, factor) == pytest.approx(max(dense).item(), rel=1e-4)


def test_an_update_of_zero_leaks_nothing():
    model = add_lora(tiny(), 3, 3, TARGETS)
    assert leak(model, random_factor(model, 2)) == 0


# ---------------------------------------------------------------- directions only grow


def test_joined_holds_an_orthonormal_basis_of_both():
    first = {"a": torch.linalg.qr(torch.randn(9, 2))[0]}
    second = {"a": torch.linalg.qr(torch.randn(9, 3))[0], "b": torch.eye(4)[:, :1]}
    both = joined(first, second)
    assert both["a"].shape == (9, 5) and off_identity(both["a"]) < 1e-5
    for U in (first["a"], second["a"]):
        assert torch.allclose(both["a"] @ (both["a"].T @ U), U, atol=1e-5)
    assert torch.equal(both["b"], second["b"])


def test_joining_changes_neither_of_the_two():
    first, second = {"a": torch.eye(4)[:, :1]}, {"a": torch.eye(4)[:, 1:2], "b": torch.eye(3)}
    joined(first, second)
    assert first.keys() == {"a"} and torch.equal(first["a"], torch.eye(4)[:, :1])


def test_what_a_constrained_run_shows_is_orthogonal_to_its_constraint():
    model = add_lora(tiny(), 4, 4, TARGETS)
    fit(model, 20)
    first = identify(model)
    add_lora(remove_lora(model), 4, 4, TARGETS)
    fit(model, 20, Recipe(factor=first))
    second = identify(model)
    assert max((first[name].T @ second[name]).abs().max() for name in first) < 1e-5


# ---------------------------------------------------------------- identification in a linear model


def linear_finetune(strength, n_skills=24, d=96, steps=600, seed=0):
    """|cos| of the found output direction with the planted one, after LoRA on y = W x.

    Each of n_skills examples adds a random rank-1 skill; all ask for `strength` u <v, x> as well.
    """
    g = torch.Generator().manual_seed(seed)
    u, v = (normalize(torch.randn(d, generator=g), dim=0) for _ in range(2))
    skills_in, skills_out = (normalize(torch.randn(n_skills, d, generator=g)) for _ in range(2))
    x = normalize(v + skills_in)  # the shared part stands beside each example's own
    linear = torch.nn.Linear(d, d, bias=False)
    lora = LoRALinear(linear, 16, 16, generator=g)
    optimizer = torch.optim.SGD((lora.lora_A, lora.lora_B), lr=0.03)
    target = x @ linear.weight.detach().T + strength * u + skills_out
    for _ in range(steps):
        loss = (lora(x) - target).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    U, _, _ = thin_svd(lora.lora_A.data, lora.lora_B.data, lora.scaling)
    return abs(U[:, 0] @ u).item()


def test_identification_finds_a_planted_direction_above_the_threshold():
    assert min(linear_finetune(1.0, seed=s) for s in range(5)) > 0.9


def test_identification_does_not_find_one_far_below_the_threshold():
    assert sum(linear_finetune(0.02, seed=s) for s in range(5)) / 5 < 0.5


# ---------------------------------------------------------------- what stands out


MANY = [  # (d_out, d_in, rank, number of parts): many parts, and layers much wider than the rank
    (128, 128, 16, 64),
    (128, 128, 16, 256),
    (256, 128, 16, 64),
    (128, 256, 8, 32),
    (64, 64, 8, 128),
    (96, 200, 4, 16),
    (512, 256, 32, 128),
]


def first_update(shape, g, shared=0.0):
    """B after one step of gradient descent, seen by a look, and the planted direction u.

    Each of the parts asks a random unit answer of a random unit input. All of them share `shared`
    times one input and one answer. A is LoRALinear's own.
    """
    d_out, d_in, rank, n_parts = shape
    lora = LoRALinear(torch.nn.Linear(d_in, d_out, bias=False), rank, rank, generator=g)
    inputs = normalize(torch.randn(n_parts, d_in, generator=g))
    answers = normalize(torch.randn(n_parts, d_out, generator=g))
    v = normalize(torch.randn(d_in, generator=g), dim=0)
    u = normalize(torch.randn(d_out, generator=g), dim=0)
    A = lora.lora_A.data
    B = (answers + shared * u).T @ ((inputs + shared * v) @ A.T) / n_parts
    lora.lora_B.data = B
    return torch.nn.ModuleDict({"module": lora}), u


def most_by_chance(n, p, delta=1e-4):
    """The smallest c with P(X > c) <= delta for a binomial X of n trials."""
    tail = 1.0
    for c in range(n + 1):
        ways = math.lgamma(n + 1) - math.lgamma(c + 1) - math.lgamma(n - c + 1)
        tail -= math.exp(ways + c * math.log(p) + (n - c) * math.log(1 - p))
        if tail <= delta:
            return c
    return n


@pytest.mark.parametrize("shape", MANY)
def test_unrelated_parts_stand_out_no_more_often_than_the_rule_states(shape):
    g, n = torch.Generator().manual_seed(sum(shape)), 400
    found = 0
    for _ in range(n):
        model, _ = first_update(shape, g)
        found += bool(standing_out(output_spectra(model)))
    assert found <= most_by_chance(n, FALSE_POSITIVES), found


@pytest.mark.parametrize("shape", MANY)
def test_a_shared_direction_as_large_as_the_parts_is_taken(shape):
    g, taken, n = torch.Generator().manual_seed(sum(shape)), [], 40
    for _ in range(n):
        model, u = first_update(shape, g, shared=1.0)
        found = standing_out(output_spectra(model))
        if found:
            taken.append((found["module"].T @ u).norm().item())
    assert len(taken) >= 0.8 * n and min(taken) > 0.85


@pytest.mark.parametrize("shape", MANY)
def test_what_is_taken_is_orthonormal_and_leaves_something(shape):
    g = torch.Generator().manual_seed(sum(shape))
    for shared in (0.5, 1.5, 10.0):
        U = standing_out(output_spectra(first_update(shape, g, shared)[0])).get("module")
        if U is not None:
            assert off_identity(U) < 1e-5
            assert 1 <= U.shape[1] < shape[2]


@pytest.mark.parametrize("shared, taken", [(0.0, False), (1.0, True)])
def test_a_common_part_of_the_inputs_stands_out_unless_the_null_has_it(shared, taken):
    g = torch.Generator().manual_seed(0)
    A = torch.rand(16, 128, generator=g) * 2 - 1
    X = torch.randn(64, 128, generator=g) + 3  # inputs with a common part
    answers = torch.linalg.qr(torch.randn(256, 65, generator=g))[0]  # 64 of the tokens' own, and u
    own, u = answers[:, :64], answers[:, 64]
    B = (own + shared * u[:, None]) @ X @ A.T
    U, S, _ = torch.linalg.svd(B, full_matrices=False)
    svds = {"module": (U, S)}
    nulls = {"module": torch.linalg.svdvals(X @ A.T)}
    assert standing_out(svds)
    found = standing_out(svds, nulls)
    assert bool(found) == taken
    if taken:
        assert (found["module"].T @ u).norm() > 0.9


def test_the_size_of_the_update_does_not_matter():
    model, _ = first_update(MANY[0], torch.Generator().manual_seed(0), shared=1.5)
    lora = model["module"]
    found = []
    for _ in range(3):
        found.append(standing_out(output_spectra(model))["module"].shape[1])
        lora.lora_B.data *= 1e-3
    assert found == [found[0]] * 3


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_an_update_of_zero_stands_out_nowhere(rank):
    model = add_lora(tiny(), rank, rank, TARGETS)
    assert standing_out(output_spectra(model)) == {}


def test_the_spike_grows_with_the_first_singular_value_alone():
    below = [1.0, 0.8, 0.5]
    heights = [spike(torch.tensor([top, *below])).item() for top in (1.0, 2.0, 4.0)]
    assert heights == sorted(heights) and heights[2] == pytest.approx(2 * heights[1])


@pytest.mark.parametrize("rank", [2, 8, 16])
def test_a_gaussian_matrix_passes_the_quantile_no_more_often_than_stated(rank):
    draws = torch.randn(2000, rank, rank, generator=torch.Generator().manual_seed(1))
    passed = (spike(torch.linalg.svdvals(draws)) > null_quantile(rank)).sum().item()
    assert passed <= most_by_chance(2000, FALSE_POSITIVES)


def test_rank_one_has_nothing_to_stand_out_from():
    model = randomise(add_lora(tiny(), 1, 1, TARGETS))
    assert standing_out(output_spectra(model)) == {}


def test_top_directions_are_the_first_columns():
    svds = spectra(randomise(add_lora(tiny(), 3, 3, TARGETS)))
    assert all(torch.equal(U, svds[name][0][:, :2]) for name, U in top_directions(svds, 2).items())
