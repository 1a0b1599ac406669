import json
import sys

import pytest
import torch

from experiments import map as over_k
from experiments import study
from grasp import Toy, attach
from lora import lora_factors
from train import Recipe

SMALL = {"d_model": 32, "pretrain_steps": 5, "steps": 4}


@pytest.fixture
def setup(tmp_path):
    return study.start(study.WORLDS["persona"](0), Toy(**SMALL), tmp_path)[0]


@pytest.mark.parametrize("rate, moved", [(0.0, False), (0.5, True)])
def test_a_rate_of_0_freezes_A_and_B_learns_anyway(setup, rate, moved):
    attach(setup)
    before = {name: A.clone() for name, (A, _) in lora_factors(setup.model).items()}
    study.train(setup, Recipe(), 4, rate)
    for name, (A, B) in lora_factors(setup.model).items():
        assert torch.equal(A, before[name]) != moved
        assert B.norm() > 0


def test_the_control_replaces_one_side_by_random_orthonormal_directions():
    U, V = (torch.linalg.qr(torch.randn(n, 2))[0] for n in (8, 6))
    other_U, same_V = study.randomised({"m": (U, V)}, 0, seed=0)["m"]
    assert torch.equal(same_V, V) and not torch.allclose(other_U, U)
    torch.testing.assert_close(other_U.T @ other_U, torch.eye(2), atol=1e-6, rtol=0)


def test_growth_is_the_share_of_the_change_of_A_along_V():
    V, start = torch.eye(5)[:, :1], torch.randn(3, 5)
    change = torch.zeros(3, 5)
    change[0, 0], change[1, 3] = 3.0, 4.0
    grown = study.growth_along({"m": (start + change, 0)}, {"m": (start, 0)}, {"m": (None, V)})
    assert grown == pytest.approx(3 / 5)


def test_a_study_measures_each_row_once_and_the_map_has_a_cell_for_each_k_and_rank(
    tmp_path, monkeypatch, capsys
):
    for module in (study, over_k):
        monkeypatch.setattr(module, "Toy", lambda: Toy(**SMALL))
    argv = ["study", "--seeds", "2", "--only", "^naive$|^one look$", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    study.main()
    first = (tmp_path / "study.json").read_text()
    monkeypatch.setattr(study, "measure", None)  # a second run that measured would fail
    study.main()
    assert (tmp_path / "study.json").read_text() == first
    assert "one look" in capsys.readouterr().out

    monkeypatch.setattr(over_k, "SIZES", (4,))
    monkeypatch.setattr(over_k, "RANKS", (2, 4))
    argv = ["map", "--seeds", "1", "--targets", "writers", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    over_k.main()
    rows = json.loads((tmp_path / "map.json").read_text())["rows"]
    assert [*rows] == ["writers K=4 rank=2 seed=0", "writers K=4 rank=4 seed=0"]
    assert rows["writers K=4 rank=4 seed=0"]["grasp"]["equal_loss"]["steps"] <= 12
    assert (tmp_path / "map_writers.png").exists()
