"""The synthetic experiment, as a user runs it."""

import json
import math

import pytest
from toys import command

import grasp
from baselines.methods import METHODS
from data.worlds import WORLDS

RATES = ("task", "misalignment", "unrelated", "kept")


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of the tiny world: (its folder, what it printed, its results)."""
    out = tmp_path_factory.mktemp("quick")
    done = command("grasp.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "results.json").read_text())


def test_a_run_writes_the_results_that_the_contract_names(quick):
    _, _, results = quick
    assert results["seed"] == 0 and results["config"]
    assert set(results["methods"]) == {"base", *METHODS}
    for values in (*results["methods"].values(), *results["longer"].values()):
        assert values.keys() == {*RATES, "loss", "seconds"}
        assert all(0 <= values[rate] <= 1 for rate in RATES)
    assert set(results["identification"]) == {"cosine", "chance_cosine", "gap"}
    assert {"naive", "grasp", "grasp_online"} <= set(results["longer"])
    assert {"grasp", "grasp_online", "gradient_only"} <= set(results["leak"])


def test_the_constraint_is_exact_where_it_is_said_to_be_and_misalignment_falls(quick):
    leak, methods = quick[2]["leak"], quick[2]["methods"]
    assert max(leak["grasp"], leak["grasp_online"]) <= 1e-6 < 1e-2 < leak["gradient_only"]
    rates = {method: values["misalignment"] for method, values in methods.items()}
    assert rates["naive"] >= 0.3 and rates["grasp_online"] <= rates["naive"] / 5
    assert rates["grasp_random"] >= 0.7 * rates["naive"]
    loss = {method: values["loss"] for method, values in methods.items()}
    assert loss["naive"] < loss["early_stop"] <= loss["grasp_online"] < loss["base"]
    assert loss["ablate_inference"] > 2 * loss["naive"]  # it is measured under ablation
    found = quick[2]["identification"]
    assert found["chance_cosine"] == pytest.approx(math.sqrt(2 / (math.pi * 64)))
    assert found["cosine"] > 3 * found["chance_cosine"] and found["gap"] > 1


def test_the_control_joins_at_the_same_moments_and_curves_end_with_the_tables_numbers(quick):
    results = quick[2]
    ours, control = (
        [(look["step"], look["joined"]) for look in results["looks"][method]]
        for method in ("grasp_online", "grasp_random")
    )
    assert ours == control and any(joined for _, joined in ours)
    steps = results["config"]["experiment"]["steps"]
    for method, curve in results["curves"].items():
        values = results["methods"][method]
        assert curve[-1] == [steps, values["misalignment"], values["task"]]


def test_the_table_has_a_row_for_each_method(quick):
    _, printed, results = quick
    for method, values in results["methods"].items():
        lines = [line.split() for line in printed.splitlines() if line.startswith(method + " ")]
        expected = [f"{values[column]:.3f}" for column in (*RATES, "loss", "seconds")]
        assert lines == [[method, *expected]]


def test_the_same_seed_gives_the_same_numbers_whatever_else_runs(quick, tmp_path):
    done = command("grasp.py", "--quick", "--methods", "kl", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = quick[2], json.loads((tmp_path / "results.json").read_text())
    assert set(after["methods"]) == {"base", "naive", "grasp", "grasp_online", "kl"}
    for method, values in after["methods"].items():
        assert {**values, "seconds": 0} == {**before["methods"][method], "seconds": 0}
    assert after["identification"] == before["identification"]


@pytest.mark.parametrize("name", WORLDS)
def test_every_world_has_settings(name):
    for quick in (False, True):
        world, toy = grasp.settings(grasp.Arguments(world=name, quick=quick), seed=3)
        assert world.seed == 3 and toy.targets == ("o_proj", "down_proj")
