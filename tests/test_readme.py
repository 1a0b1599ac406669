"""README's numbers: line counts as they are, results as the committed files have them."""

import json
import re
import statistics
from pathlib import Path

import pytest

from experiments.leak import RUNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
SUMMARIES = {
    "writers": json.loads((ROOT / "docs/results/persona_writers.json").read_text()),
    "all": json.loads((ROOT / "docs/results/persona_all_linear.json").read_text()),
}
SIX = ("grasp.py", "model.py", "lora.py", "identify.py", "train.py", "eval.py")
IN_README = ("naive", "grasp_gradient_only", "grasp", "grasp_online", "grasp_random", "kl")


def cell(number):
    """A spread as the tables write it: .123 ± .045, or the mean alone where nothing varies."""
    mean = f"{number['mean']:.3f}".removeprefix("0")
    if number["sd"] < 0.0005:
        return mean
    return f"{mean} ± {number['sd']:.3f}".replace("± 0", "± ")


def cells(method, section="methods"):
    """The cells of one method: task, misalignment and kept of both target sets."""
    found = []
    for targets in ("writers", "all"):
        measured = SUMMARIES[targets][section][method]
        found += [cell(measured[key]) for key in ("task", "misalignment", "kept")]
    return found


WORLDS = {
    "needs_factor": ("task", "misalignment", "unrelated", "kept", "tagged", "loss"),
    "needs_factor_new": ("task", "misalignment", "unrelated", "kept", "tagged", "loss"),
    "skew": ("task", "misalignment", "unrelated", "kept", "unslanted", "loss"),
    "benign": ("task", "misalignment", "unrelated", "kept", "loss"),
    "simple": ("task", "parroted", "unrelated", "kept", "loss"),
    "two_factors": ("task", "first", "second", "kept", "loss"),
}


@pytest.mark.parametrize("world", WORLDS)
def test_the_worlds_page_has_every_method(world):
    text = (ROOT / "docs" / "worlds.md").read_text(encoding="utf-8")
    summary = json.loads((ROOT / "docs" / "results" / f"{world}.json").read_text())
    assert summary["seeds"] == list(range(10, 30))
    for measured in summary["methods"].values():
        *rates, loss = (measured[key] for key in WORLDS[world])
        numbers = [*map(cell, rates), f"{loss['mean']:.3f}"]
        assert row_with(text, numbers), numbers


def row_with(text, numbers):
    """Whether a line of `text` is a table's row that ends in these cells."""
    ending = "| " + " | ".join(numbers) + " |"
    return any(line.replace("*", "").endswith(ending) for line in text.splitlines())


@pytest.mark.parametrize("method", IN_README)
def test_the_readmes_table_has_the_numbers_of_the_committed_results(method):
    numbers = [n for i, n in enumerate(cells(method)) if i in (1, 2, 4, 5)]
    assert row_with(README, numbers), numbers


@pytest.mark.parametrize("method", SUMMARIES["writers"]["methods"])
def test_the_results_page_has_every_method(method):
    assert row_with(RESULTS, cells(method)), cells(method)


@pytest.mark.parametrize("method", SUMMARIES["writers"]["longer"])
def test_the_results_page_has_every_longer_run(method):
    assert row_with(RESULTS, cells(method, "longer")), cells(method, "longer")


def numbers_of(runs, method, names):
    """The cells of one method: mean ± standard deviation over seeds, of one seed the interval."""
    found = []
    for name in names:
        measured = [run[method][name] for run in runs if method in run]
        if len(measured) == 1:
            found.append(with_interval(measured[0]))
            continue
        values = [part["value"] for part in measured]
        text = cell({"mean": statistics.fmean(values), "sd": statistics.stdev(values)})
        found.append(negative(text))
    return found


def negative(text):
    """The same without the 0 before a negative number's point, and no minus before nothing."""
    return text.replace("-0.000", ".000").replace("-0.", "-.")


LEAK = json.loads((ROOT / "docs" / "results" / "leak.json").read_text())["rows"]


@pytest.mark.parametrize("name", LEAK["writers, seed 10"])
def test_the_results_page_has_every_row_of_the_leak(name):
    numbers = []
    for targets in ("writers", "all-linear"):
        found = [LEAK[f"{targets}, seed {seed}"][name] for seed in range(10, 20)]
        columns = [[number] for number in found]
        if name in RUNS:
            columns = [[run[rate] for rate in ("task", "misalignment", "kept")] for run in found]
        for values in zip(*columns, strict=True):
            spread = {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}
            numbers.append(cell(spread).replace("-0.", "-."))
    assert row_with(RESULTS, numbers), numbers


def real_runs(name):
    """{seed: {method: measurements}} of docs/results/smollm2_NAME.json."""
    return json.loads((ROOT / "docs" / "results" / f"smollm2_{name}.json").read_text())["seeds"]


REAL_MODELS = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
MEDICAL, FINANCE, LESS = real_runs("medical"), real_runs("finance"), real_runs("less")
INSECURE, BASELINES, ABLATIONS = map(real_runs, ("insecure", "baselines", "ablations"))
MEDICINE, MONEY, SPORT = (
    f"transfer_{name}_50"
    for name in ("bad_medical_advice", "risky_financial_advice", "extreme_sports")
)
AT_EQUAL_LOSS = [f"{name}_at_equal_loss" for name in ("probe", MONEY, SPORT)]


@pytest.mark.parametrize("method", MEDICAL["1"])
def test_the_real_models_page_has_every_method_of_the_medical_runs(method):
    runs = list(MEDICAL.values())
    beyond = ["loss", *(f"{name}_beyond_control" for name in ("probe", MONEY, SPORT))]
    assert row_with(REAL_MODELS, numbers_of(runs, method, beyond))
    if method.startswith("grasp"):
        assert row_with(REAL_MODELS, numbers_of(runs, method, AT_EQUAL_LOSS))


def test_the_real_models_page_has_what_is_left_without_the_controls_directions():
    for runs in (MEDICAL, LESS):
        numbers = numbers_of(list(runs.values()), "grasp", ["loss", *AT_EQUAL_LOSS])
        assert row_with(REAL_MODELS, numbers), numbers


ADVICE, CODE = (
    ("probe", "preference", MEDICINE, SPORT),
    ("probe", "preference", MEDICINE, MONEY, SPORT),
)
TABLES = {  # {data: (its runs, what is measured, what the page has of the shifts)}
    "finance": (list(FINANCE.values()), ADVICE, "shift"),
    "insecure": (list(INSECURE.values()), CODE, "shift"),
    # a whole epoch; of its second seed the page has naive training alone, in its text
    "full_medical": ([real_runs("full_medical")["1"]], ("probe", MONEY, SPORT), "beyond_control"),
    "full_finance": ([real_runs("full_finance")["1"]], ADVICE, "shift"),
    "full_insecure": ([real_runs("full_insecure")["1"]], CODE, "shift"),
}


@pytest.mark.parametrize(
    ("data", "method"), [(data, method) for data in TABLES for method in TABLES[data][0][0]]
)
def test_the_real_models_page_has_every_method_of_every_table(data, method):
    runs, measured, comparison = TABLES[data]
    numbers = numbers_of(runs, method, ["loss", *(f"{name}_{comparison}" for name in measured)])
    assert row_with(REAL_MODELS, numbers), numbers
    if "probe_at_equal_loss" in runs[0][method]:
        numbers = numbers_of(runs, method, [f"{name}_at_equal_loss" for name in measured])
        assert row_with(REAL_MODELS, numbers), numbers


@pytest.mark.parametrize("direction", ABLATIONS["1"])
def test_the_real_models_page_has_every_direction_that_was_ablated_in_training(direction):
    numbers = numbers_of(list(ABLATIONS.values()), direction, ["loss", *AT_EQUAL_LOSS])
    assert row_with(REAL_MODELS, numbers), numbers


@pytest.mark.parametrize("method", BASELINES["1"])
def test_the_real_models_page_has_every_baseline(method):
    runs = list(BASELINES.values())
    beyond = [f"{name}_beyond_control" for name in ("probe", MONEY, SPORT)]
    numbers = numbers_of(runs, method, ["loss", *beyond])
    if method == "naive_quarter":  # a part of the curve that the others are held against
        numbers += ["", "", ""]
    else:
        numbers += numbers_of(runs, method, AT_EQUAL_LOSS)
    assert row_with(REAL_MODELS, numbers), numbers


def with_interval(found):
    """A measurement of one seed as the page has it."""
    numbers = [f"{number:.3f}" for number in (found["value"], *found["interval"])]
    value, low, high = (negative(number).removeprefix("0") for number in numbers)
    return value if low == high else f"{value} [{low}, {high}]"


def test_the_committed_results_are_of_the_seeds_that_the_readme_names():
    for summary in SUMMARIES.values():
        assert summary["seeds"] == list(range(10, 30))


def test_line_counts_in_the_readme_are_true():
    rows = re.findall(r"^\| `([a-z_]+\.py)` \| (\d+) \|", README, re.M)
    assert {name for name, _ in rows} == set(SIX)
    for name, count in rows:
        assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(count), name


def test_every_file_and_folder_that_the_readme_names_exists():
    for name in re.findall(r"`([a-z_]+/|[a-z_]+\.py)`", README):
        assert (ROOT / name).exists(), name
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
