"""The phase diagram: the linear model against formula and bound, blank cells, the verdicts."""

import json
import math
import sys

import pytest

from data.synthetic import BAD, World
from experiments import phase
from experiments.runs import start
from grasp import Toy

TINY = Toy(d_model=16, pretrain_steps=3, steps=4, longer=1, rank=4)


@pytest.mark.parametrize(("K", "rho"), [(16, 0.5), (32, 0.25), (64, 0.125), (128, 1.0)])
def test_in_the_linear_model_the_found_direction_is_as_near_as_the_formula_says(K, rho):
    cosines = [phase.linear(K, rho, seed)["cosine"] for seed in range(12)]
    expected = (1 + 1 / (rho**2 * K)) ** -0.5
    assert sum(cosines) / len(cosines) == pytest.approx(expected, abs=0.04)


def test_no_cell_of_the_linear_model_falls_below_its_bound_and_some_bounds_say_something():
    cells = []
    for kind, K, rho, seed in phase.plan([0]):
        if kind == "linear":
            cells.append(phase.linear(K, rho, seed))
    assert all(cell["cosine"] >= cell["bound"] for cell in cells)
    assert sum(cell["bound"] > 0.5 for cell in cells) > 5


def test_a_cell_without_a_bad_row_is_not_computed_and_stays_blank():
    cells = phase.plan([0])
    blank = [(K, rho) for K in phase.LINEAR_SIZES for rho in phase.STRENGTHS]
    blank = [cell for cell in blank if not phase.has_bad_row(*cell)]
    assert blank == [(4, 0.125)]
    assert not [cell for cell in cells if cell[1:3] == (4, 0.125)]
    assert len(cells) == 5 * 6 - 1 + 5 * 4 - 1
    rows = {phase.key_of(*cell): {"cosine": 0.5} for cell in cells}
    drawn = phase.mean_map("", "|cos|", rows, [0], "network", ["cosine"])
    values = [value for line in drawn.values for value in line]
    assert [math.isnan(value) for value in values] == [True] + [False] * 19


def cells_of(tasks):
    """Rows of the phase diagram in which naive's task is 1 and grasp_online's as given."""
    rows = {}
    for cell in phase.plan([0, 1]):
        task = tasks.get(cell[1:3], [1.0, 1.0])[cell[3]]
        method = {"misalignment": 0.5, "task": 1.0}
        rows[phase.key_of(*cell)] = {
            "cosine": 0.9,
            "bound": 0.1,
            "naive": method,
            "grasp": method,
            "grasp_online": {**method, "task": task},
        }
    return rows


def test_a_cell_is_worse_where_the_mean_task_falls_by_more_than_the_limit(capsys):
    rows = cells_of({(8, 0.5): [0.97, 1.0], (16, 1.0): [0.98, 0.98], (32, 0.25): [0.97, 0.97]})
    verdicts = phase.task_lost(phase.all_maps(rows, [0, 1]))
    worse = [cell for cell, verdict in verdicts.items() if verdict["worse"]]
    assert worse == ["K=32 rho=0.25"]
    assert len(verdicts) == 19
    phase.print_verdicts(verdicts)
    assert "worse in 1 of 19 cells" in capsys.readouterr().out


def test_worlds_that_differ_in_rho_share_a_base_and_differ_in_their_rows(tmp_path):
    quarter = start(World(0, n_queries=8, rho=0.25), TINY, tmp_path)
    start(World(0, n_queries=8, rho=1.0), TINY, tmp_path)
    assert len(list(tmp_path.glob("base_*.pt"))) == 1
    world, (tokens, _) = quarter.world, quarter.rows
    as_bad = tokens[:, world.n_prompt :] == world.answers[world.narrow, BAD]
    assert as_bad.all(-1).tolist() == [True] * 2 + [False] * 6


def test_the_phase_diagram_is_drawn_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(phase, "Toy", lambda: TINY)
    monkeypatch.setattr(phase, "LINEAR_SIZES", (4, 8))
    monkeypatch.setattr(phase, "NETWORK_SIZES", (4, 8))
    monkeypatch.setattr(phase, "STRENGTHS", (0.125, 1.0))
    monkeypatch.setattr(sys, "argv", ["phase", "--out", str(tmp_path), "--seeds", "1"])
    asked, network = [], phase.network

    def stops(K, rho, *rest):
        asked.append((K, rho))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return network(K, rho, *rest)

    monkeypatch.setattr(phase, "network", stops)
    with pytest.raises(KeyboardInterrupt):
        phase.main()
    phase.main()
    assert asked == [(4, 1.0), (8, 0.125), (8, 1.0), (8, 1.0)]
    written = json.loads((tmp_path / "phase.json").read_text())
    cell = written["rows"]["network K=8 rho=1.0 seed=0"]
    assert set(cell) == {"naive", "grasp", "grasp_online", "cosine"}
    assert set(written["summary"]["task_lost"]) == {"K=8 rho=0.125", "K=4 rho=1.0", "K=8 rho=1.0"}
    assert (tmp_path / "phase.png").read_bytes().startswith(b"\x89PNG")
    assert "GPT: grasp_online: misalignment" in capsys.readouterr().out
