"""The synthetic experiment, as a user runs it."""

import json

import pytest
from toys import command

from baselines.methods import METHODS


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run of the tiny world: (its folder, what it printed, its results)."""
    out = tmp_path_factory.mktemp("quick")
    done = command("grasp.py", "--quick", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout, json.loads((out / "results.json").read_text())


def measured(method, results):
    """A method's measurements, without the seconds."""
    return {k: v for k, v in results["methods"][method].items() if k != "seconds"}


def test_a_run_writes_the_results_that_the_contract_names(quick):
    _, _, results = quick
    assert set(results["methods"]) == {"base", *METHODS}
    for values in results["methods"].values():
        assert set(values) == {"task", "misalignment", "unrelated", "kept", "loss", "seconds"}
        for rate in ("task", "misalignment", "unrelated", "kept"):
            assert 0 <= values[rate] <= 1
    assert set(results["identification"]) == {"cosine", "chance_cosine", "gap"}
    assert {"naive", "grasp", "grasp_online"} <= set(results["longer"])
    assert {"grasp", "grasp_online", "gradient_only"} <= set(results["leak"])


def test_the_constraint_is_exact_and_projecting_the_gradient_alone_leaks(quick):
    leak = quick[2]["leak"]
    assert max(leak["grasp"], leak["grasp_online"]) <= 1e-6
    assert leak["gradient_only"] > 1e-2


def test_naive_misaligns_grasp_online_does_not_and_random_directions_change_little(quick):
    methods = quick[2]["methods"]
    naive = methods["naive"]["misalignment"]
    assert naive >= 0.3
    assert methods["grasp_online"]["misalignment"] <= naive / 5
    assert methods["grasp_random"]["misalignment"] >= 0.7 * naive


def test_the_control_joins_as_many_directions_at_the_same_moments(quick):
    looks = quick[2]["looks"]
    ours = [(look["step"], look["joined"]) for look in looks["grasp_online"]]
    control = [(look["step"], look["joined"]) for look in looks["grasp_random"]]
    assert ours == control and any(joined for _, joined in ours)


def test_curves_end_at_the_usual_length_with_the_numbers_of_the_table(quick):
    results = quick[2]
    steps = results["config"]["experiment"]["steps"]
    for method, curve in results["curves"].items():
        values = results["methods"][method]
        assert curve[-1] == [steps, values["misalignment"], values["task"]]


def test_the_table_and_the_figures_are_there(quick):
    out, printed, _ = quick
    assert all(method in printed for method in METHODS)
    for name in ("spectrum.png", "training.png", "tradeoff.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_reuses_the_base_and_gives_the_same_numbers(quick):
    out, _, before = quick
    again = command("grasp.py", "--quick", "--out", out, "--methods", "naive")
    assert again.returncode == 0 and "trained before" in again.stdout
    after = json.loads((out / "results.json").read_text())
    assert set(after["methods"]) == {"base", "naive", "grasp", "grasp_online"}
    for method in after["methods"]:
        assert measured(method, after) == measured(method, before)
    assert after["identification"] == before["identification"]


def test_several_seeds_have_a_folder_each_and_a_finished_one_is_read_back(quick, tmp_path):
    arguments = ("grasp.py", "--quick", "--seeds", "2", "--methods", "naive", "--out", tmp_path)
    first = command(*arguments)
    assert first.returncode == 0 and "±" in first.stdout
    again = command(*arguments)
    assert again.stdout.count("is there already") == 2
    seeds = [json.loads((tmp_path / f"seed_{s}/results.json").read_text()) for s in (0, 1)]
    assert measured("naive", seeds[0]) == measured("naive", quick[2])
    assert measured("naive", seeds[0]) != measured("naive", seeds[1])
    more = command(*arguments[:4], "--methods", "kl", "--out", tmp_path)
    assert more.returncode == 0 and "kl" in more.stdout
    later = json.loads((tmp_path / "seed_1/results.json").read_text())
    assert later["methods"].keys() == {*seeds[1]["methods"], "kl"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--methods", "naive,magic"], "method 'magic' is unknown"),
        (["--targets", "nowhere", "--quick"], "target 'nowhere' matches no linear layer"),
        (["--model", "x"], "expected both --model DIR and --data FILE.jsonl"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_a_users_mistake_ends_in_one_line(tmp_path, arguments, message):
    done = command("grasp.py", "--out", tmp_path, *arguments)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
