"""Seeds are read back, never mixed and never lost; the table, the summary and the figures."""

import json
import math
from argparse import Namespace
from dataclasses import dataclass

import pytest
from toys import call

from baselines.methods import METHODS
from experiments import figures, paper_figure, report, summary
from paper.__main__ import SHORTER, SMALLER

MISALIGNMENT = {"naive": (0.7, 0.9), "grasp": (0.3, 0.3), "grasp_online": (0.1, 0.2)}
PNG = b"\x89PNG"


@dataclass
class Toy:
    seed: int
    longer: int = 3


def experiment(world, toy, seed, methods, folder):
    rates = {"task": 1.0, "kept": 1.0, "loss": 0.5}
    values = {name: MISALIGNMENT.get(name, (0.5, 0.5))[seed - 7] for name in ("base", *methods)}
    measured = {method: {"misalignment": value, **rates} for method, value in values.items()}
    look = {"step": 10, "spike": {"layers.0.o_proj": 2.0}, "joined": {"layers.0.o_proj": seed - 6}}
    return {
        "methods": measured,
        "longer": {method: measured[method] for method in MISALIGNMENT},
        "identification": {"cosine": 0.5},
        "leak": {"grasp": 0.0},
        "curves": {method: [[20, 0.5, 1.0]] for method in MISALIGNMENT},
        "looks": {"grasp_online": [look]},
        "spectra": {"layers.0.o_proj": [2.0, 1.0]},
    }


def run(out, *methods, seeds=2, longer=3, experiment=experiment):
    """Run seeds as grasp.py does; return the results.json of each."""
    args = Namespace(methods=methods, out=out, seed=7, seeds=seeds, world="fake")
    report.run_seeds(args, lambda args, seed: (Toy(seed), Toy(seed, longer)), experiment)
    return [json.loads(path.read_text()) for path in sorted(out.glob("seed_*/results.json"))]


def never(*arguments):
    raise AssertionError("a seed that is on disk is run again")


def test_seeds_on_disk_are_read_back_and_run_again_as_a_whole_for_another_method(tmp_path):
    first = run(tmp_path, "kl")
    assert run(tmp_path, experiment=never) == first
    (tmp_path / "seed_8" / "results.json").unlink()
    for results in run(tmp_path, "early_stop"):  # all seeds get what any has
        assert results["methods"].keys() == {*first[0]["methods"], "early_stop"}


def test_other_settings_and_unknown_methods_are_refused(tmp_path):
    first = run(tmp_path)
    with pytest.raises(ValueError, match="seed_7.*other settings"):
        run(tmp_path, longer=2)
    with pytest.raises(ValueError, match="method magic, expected some of naive"):
        run(tmp_path, "magic")
    assert run(tmp_path, experiment=never) == first


def test_the_table_has_means_and_deviations_and_three_figures_stand_beside_it(tmp_path, capsys):
    run(tmp_path)
    lines = capsys.readouterr().out.split("\n")
    naive = next(line for line in lines if line.startswith("naive "))
    assert "0.800 ± 0.141" in naive
    assert any(line.startswith("naive, 3x the steps") for line in lines)
    for name in ("spectrum", "training", "tradeoff"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == PNG


def test_a_summary_has_the_spread_over_seeds_and_each_seeds_own_difference(tmp_path, monkeypatch):
    run(tmp_path)
    out = tmp_path / "summary.json"
    call(monkeypatch, summary.main, tmp_path, "--out", out)
    found = json.loads(out.read_text())
    naive = found["methods"]["naive"]["misalignment"]
    assert naive == {"mean": 0.8, "se": 0.1, "sd": 0.14142, "min": 0.7, "max": 0.9}
    paired = found["minus_grasp_online"]["naive"]["misalignment"]
    differences = 0.7 - 0.1, 0.9 - 0.2
    error = (differences[1] - differences[0]) / math.sqrt(2) / math.sqrt(2)
    assert (paired["mean"], paired["se"]) == pytest.approx((0.65, error), rel=1e-4)
    assert (found["seeds"], found["patterns"]["mean"]) == ([7, 8], 1.5)


def test_every_method_has_a_look_of_its_own_and_the_abstracts_and_ours_are_named():
    looks = [figures.style(method)[:2] for method in ("base", *METHODS, "mine")]
    looks += [look[:2] for look in paper_figure.STYLES.values()]
    assert len(set(looks)) == len(looks)
    assert {*SHORTER, *SMALLER, "control"} == paper_figure.STYLES.keys()
    assert "abstract" in figures.style("grasp")[2]
    assert "ours" in figures.style("grasp_online")[2]
    assert figures.style("mine") == ("#999999", ">", "mine")


def test_a_measurement_that_is_missing_is_left_out_of_the_papers_figure(tmp_path):
    part = {"value": 1.0, "interval": [0.9, 1.2]}
    nothing = {"value": None, "interval": None}
    seed = {"base": {"loss": part, "harm": part}, "naive": {"loss": part, "harm": nothing}}
    paper_figure.paper([seed, seed], "harm", "harm", tmp_path / "paper.png", [("base", "naive")])
    assert (tmp_path / "paper.png").read_bytes()[:4] == PNG
