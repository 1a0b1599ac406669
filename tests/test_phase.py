"""The phase diagram and the study: the theory's formula and bound against the linear model, and both programs end to end, tiny."""
import json
import sys
from functools import partial

import pytest

import phase
import study
from grasp import Toy

TINY = partial(Toy, d_model=16, pretrain_steps=3, steps=4, longer=1, rank=4)


def run(program, out, monkeypatch, *more):
    monkeypatch.setattr(sys, "argv", [program.__name__, "--out", str(out), "--seeds", "1", *more])
    program.main()


@pytest.mark.parametrize("K, rho", [(16, 0.5), (32, 0.25), (64, 0.125), (128, 0.125), (128, 1.0)])
def test_the_found_direction_is_as_near_as_the_formula_says(K, rho):
    cosines = [phase.linear(K, rho, seed)["cosine"] for seed in range(20)]  # each ± .03
    assert sum(cosines) / 20 == pytest.approx((1 + 1 / (rho ** 2 * K)) ** -0.5, abs=0.03)


def test_no_cell_of_the_linear_model_falls_below_its_bound_and_some_bounds_say_something():
    cells = [phase.linear(K, rho, seed) for K in phase.LINEAR for rho in phase.STRENGTHS for seed in range(2)]
    assert all(cell["cosine"] >= cell["bound"] for cell in cells) and sum(cell["bound"] > 0.5 for cell in cells) > 10


def test_the_phase_diagram_is_drawn_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    for module in (phase, study):
        monkeypatch.setattr(module, "Toy", TINY)
    monkeypatch.setattr(phase, "NETWORK", (4, 8))
    monkeypatch.setattr(phase, "STRENGTHS", (0.5, 1.0))
    asked, network = [], phase.network

    def stops(K, rho, *more):
        asked.append((K, rho))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return network(K, rho, *more)
    monkeypatch.setattr(phase, "network", stops)
    with pytest.raises(KeyboardInterrupt):
        run(phase, tmp_path, monkeypatch)
    run(phase, tmp_path, monkeypatch)
    assert asked == [(4, 0.5), (4, 1.0), (8, 0.5), (8, 0.5), (8, 1.0)]
    cells = json.loads((tmp_path / "phase.json").read_text())["cells"]
    assert set(cells["network K=8 rho=0.5 seed=0"]) == {"naive", "grasp", "cosine"} and (tmp_path / "phase.png").stat().st_size > 10000
    assert "GPT: misalignment, GRASP" in capsys.readouterr().out


def test_the_share_rho_of_the_narrow_queries_is_answered_badly(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "Toy", TINY)
    bench = study.Bench(phase.World(0, n_queries=8, rho=0.25), tmp_path)
    bad = [tuple(row) for row in bench.world.answers[bench.world.narrow, 1].tolist()]
    assert [tuple(row) in bad for row in bench.rows[0][:, bench.world.n_prompt:].tolist()] == [True] * 2 + [False] * 6
    assert len(list(tmp_path.glob("base_*.pt"))) == 1
    study.Bench(phase.World(0, n_queries=8, rho=1.0), tmp_path)
    assert len(list(tmp_path.glob("base_*.pt"))) == 1  # pretraining does not know rho


def test_the_study_measures_each_variant_and_how_near_short_runs_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "Toy", TINY)
    names = ("naive", "says, 2 rounds", "both, says pooled over modules, 3 rounds", "residual side, 3 rounds, all seven projections",
             "both, 3 rounds of 50% of the steps")
    monkeypatch.setattr(study, "VARIANTS", {name: study.VARIANTS[name] for name in names})
    run(study, tmp_path, monkeypatch)
    rows = json.loads((tmp_path / "study.json").read_text())
    assert tuple(rows) == names and 0 < rows[names[-1]][0]["cosine"] <= 1 and "long_misalignment" in rows["naive"][0]
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
