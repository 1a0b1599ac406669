"""Intervals, and shifts against the base, the control, and naive training at the same loss."""

import math

import numpy as np
import pytest

from paper.compare import bootstrap_interval, compare, wilson


def test_wilson_bounds_solve_its_equation():
    low, high = wilson(0, 10)
    assert abs(low) < 1e-12 and high == pytest.approx(1.96**2 / (10 + 1.96**2))  # by hand
    assert wilson(0, 0) == (0.0, 1.0)
    for bound in wilson(3, 40):  # |p - b| = z sqrt(b (1 - b) / n), the test that it inverts
        assert abs(3 / 40 - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / 40))


def test_bootstrap_interval_covers_the_mean_at_its_level():
    draws = np.random.default_rng(1).normal(0.3, 1, size=(200, 48))
    intervals = np.array([bootstrap_interval(row, seed=i, n=1000) for i, row in enumerate(draws)])
    covered = np.mean((intervals[:, 0] < 0.3) & (intervals[:, 1] > 0.3))
    assert 0.88 < covered < 0.985
    assert np.diff(intervals).mean() == pytest.approx(2 * 1.96 / 48**0.5, rel=0.1)
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)


def measured(loss, *values):
    """A method's results: its loss, and the probe of each of some questions."""
    each = {f"question {i}": value for i, value in enumerate(values)}
    return {"loss": {"value": loss}, "probe": {"value": sum(values) / len(values), "each": each}}


def compared(**changes):
    """Naive training goes from loss 3 to 1, and grasp has the loss of a point between."""
    results = {
        "base": measured(3.0, 0.0, 0.0),
        "naive_half": measured(2.0, 0.2, 0.4),
        "naive_times_60": measured(2.0, 0.0, 0.2),
        "naive": measured(1.0, 0.4, 1.2),
        "grasp": measured(1.5, 0.1, 0.1),
        "control": measured(2.5, 0.1, 0.3),
        **changes,
    }
    compare(results)
    return results


def test_a_shift_is_what_the_base_or_the_control_has_not():
    results = compared()
    assert results["naive"]["probe_shift"]["value"] == pytest.approx(0.8)
    assert results["naive"]["probe_beyond_control"]["value"] == pytest.approx(0.6)
    assert results["base"]["probe_shift"]["value"] == 0
    assert results["control"]["probe_beyond_control"]["value"] == 0
    assert "probe_at_equal_loss" not in results["naive_half"]


@pytest.mark.parametrize("curve, naive", [("", (0.3, 0.8)), ("_smaller", (0.2, 0.7))])
def test_at_equal_loss_naive_is_linear_between_its_lengths_or_sizes(curve, naive):
    found = compared()["grasp"][f"probe_at_equal_loss{curve}"]
    assert [*found["each"].values()] == pytest.approx([0.1 - value for value in naive])
    low, high = found["interval"]
    assert low <= found["value"] <= high


@pytest.mark.parametrize(
    "grasp",
    [measured(2.0, 0.2, 0.4), measured(0.5, 0.4, 1.2)],
    ids=["as a shorter run", "beyond the end of the curve: its end"],
)
def test_a_method_that_is_a_naive_run_gains_nothing_at_equal_loss(grasp):
    found = compared(grasp=grasp)["grasp"]["probe_at_equal_loss"]
    assert set(found["each"].values()) == {0}
