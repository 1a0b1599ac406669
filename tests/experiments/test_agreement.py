"""Directions of two adapters, compared."""

import math

import pytest
import torch

from experiments.agreement import agreement, directions, main
from hub.adapter import Adapter, write_adapter
from support.errors import UserError

PATHS = [f"model.layers.{i}.mlp.down_proj" for i in range(40)]


def write(folder, seed, shared=None):
    """An adapter of random updates; `shared` (out,) is what each of them mainly says."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for path in PATHS:
        A, B = (torch.randn(shape, generator=generator) for shape in ((4, 32), (64, 4)))
        if shared is not None:
            B = B + 100 * torch.outer(shared, torch.randn(4, generator=generator))
        adapters[path] = Adapter(A, B, alpha=4)
    folder.mkdir()
    write_adapter(folder, adapters, fan_in_fan_out=False, n_layer=40)
    return folder


def test_unrelated_updates_agree_as_random_directions_do(tmp_path):
    first, second = (directions(write(tmp_path / str(seed), seed)) for seed in (0, 1))
    values, chance = agreement(first, second)["down_proj"]
    assert chance == pytest.approx(math.sqrt(2 / (math.pi * 64)))
    assert len(values) == 40
    assert values.mean().item() == pytest.approx(chance, abs=4 * values.std().item() / 40**0.5)


def test_updates_that_share_a_direction_agree_in_it(tmp_path, monkeypatch, capsys):
    shared = torch.nn.functional.normalize(torch.randn(64), dim=0)
    folders = [write(tmp_path / str(seed), seed, shared) for seed in (0, 1)]
    values, _ = agreement(*(directions(folder) for folder in folders))["down_proj"]
    assert values.min() > 0.9
    monkeypatch.setattr("sys.argv", ["agreement", *map(str, folders)])
    main()
    assert "down_proj" in capsys.readouterr().out


def test_adapters_of_different_models_end_in_one_line():
    here, there = {"a.q_proj": torch.ones(3)}, {"a.q_proj": torch.ones(4)}
    with pytest.raises(UserError, match="3 and 4 outputs"):
        agreement(here, there)
    with pytest.raises(UserError, match="no module in common"):
        agreement(here, {"b.q_proj": torch.ones(3)})


def test_an_update_of_zero_has_no_direction_to_compare(tmp_path):
    folder = tmp_path / "zero"
    folder.mkdir()
    zero = Adapter(torch.ones(4, 32), torch.zeros(64, 4), alpha=4)
    write_adapter(folder, {PATHS[0]: zero}, fan_in_fan_out=False, n_layer=40)
    with pytest.raises(UserError, match="has not 1 directions above 0"):
        directions(folder)
