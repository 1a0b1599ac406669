"""The worlds' studies: what is kept out of the update, and what is left out of the constraint."""

from dataclasses import replace

import pytest
import torch

from data.base import new_base
from data.worlds import WORLDS
from experiments.worlds import (
    cells,
    compare,
    deafen_,
    heard,
    input_side,
    looks_at_both_sides,
    one_kept,
    without,
)
from grasp import Bench, Toy
from identify import thin_svd
from lora import add_lora, lora_modules
from support.errors import UserError

TINY = {"n_topics": 3, "n_queries": 4, "n_tags": 4, "n_words": 8}
TOY = Toy(d_model=32, n_head=2, rank=4, steps=24, lr=1e-2)


def bench(name):
    """A bench of a tiny world, on a base that has learned nothing."""
    world = replace(WORLDS[name](), **TINY)
    torch.manual_seed(0)
    model = new_base(world, TOY).requires_grad_(False)
    return Bench(world, TOY, 0, model, world.finetuning_rows())


def a_lora(seed=0):
    """{name: module} of LoRAs with a random B on an untrained base."""
    model = bench("persona").model
    add_lora(model, 4, 4, TOY.targets, seed=seed)
    modules = lora_modules(model)
    for m in modules.values():
        torch.nn.init.normal_(m.lora_B)
    return modules


def test_what_a_direction_is_heard_by_are_the_right_singular_vectors_of_its_part():
    for m in a_lora().values():
        U, _, V = thin_svd(m.lora_A.data, m.lora_B.data)
        found = heard(m, U[:, :1])
        assert abs(found[:, 0] @ V[:, 0]).item() == pytest.approx(1, abs=1e-4)


def test_a_deaf_update_hears_nothing_of_its_inputs_and_loses_nothing_else():
    modules = a_lora()
    V = {name: torch.linalg.qr(torch.randn(m.lora_A.shape[1], 2))[0] for name, m in modules.items()}
    before = {name: m.lora_A.data.clone() for name, m in modules.items()}
    deafen_(modules, V)
    for name, m in modules.items():
        assert (m.lora_A.data @ V[name]).abs().max() < 1e-5
        other = torch.eye(len(V[name])) - V[name] @ V[name].T
        assert torch.allclose(m.lora_A.data @ other, before[name] @ other, atol=1e-5)


def test_what_joins_joins_on_both_sides():
    modules = a_lora()
    recipe, each = looks_at_both_sides(modules)
    svds = {}
    for name, m in modules.items():
        U, _, _ = torch.linalg.svd(m.lora_B.data, full_matrices=False)
        svds[name] = U, torch.tensor([100.0, 1.0, 1.0, 1.0])  # one direction stands out
    found = recipe.look(0, svds)
    heard_by = {name: heard(modules[name], U) for name, U in found.items()}
    each(0)
    assert set(found) == set(modules)
    for name, m in modules.items():
        assert (m.lora_A.data @ heard_by[name]).abs().max() < 1e-5


def test_leaving_a_direction_out_leaves_the_rest_of_the_span_orthogonal_to_it():
    U, d = torch.linalg.qr(torch.randn(32, 3))[0], torch.randn(32)
    left = without(U, d)
    assert left.shape == (32, 2)
    assert torch.allclose(left.T @ left, torch.eye(2), atol=1e-5)
    assert (left.T @ d).abs().max() < 1e-4
    assert torch.allclose(U @ (U.T @ left), left, atol=1e-5)


@pytest.mark.parametrize(
    "name,study,variants",
    [("needs_factor_new", input_side, 6), ("two_factors", one_kept, 6)],
)
def test_each_study_measures_the_worlds_rates_of_every_variant(name, study, variants):
    rows = study(bench(name))
    assert len(rows) == variants
    for rates in rows.values():
        assert {"task", "misalignment", "unrelated", "kept", "loss", "early"} <= set(rates)


def test_methods_are_compared_as_the_experiment_measures_them():
    rows = compare(bench("skew"), ["naive", "grasp", "grasp_online", "ablate_train"])
    assert list(rows) == ["naive", "grasp", "grasp_online", "ablate_train"]


def test_an_unknown_part_is_an_error():
    class Args:
        only, methods = ("nothing",), ()

    with pytest.raises(UserError, match="--only has 'nothing'"):
        cells(Args)
