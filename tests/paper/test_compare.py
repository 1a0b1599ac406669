"""Shifts against the base, the control, and naive training at the same loss."""

import pytest

from paper.compare import compare
from support.errors import UserError


def measured(loss, *values):
    """A method's results: its loss, and the probe of each of some questions."""
    each = {f"question {i}": value for i, value in enumerate(values)}
    return {
        "loss": {"value": loss},
        "probe": {"value": sum(values) / len(values), "each": each},
    }


def compared():
    """Naive training goes from loss 3 to 1, and grasp has the loss of a point between."""
    results = {
        "base": measured(3.0, 0.0, 0.0),
        "naive_half": measured(2.0, 0.2, 0.4),
        "naive": measured(1.0, 0.4, 1.2),
        "grasp": measured(1.5, 0.1, 0.1),
        "control": measured(2.5, 0.1, 0.3),
    }
    compare(results)
    return results


def test_a_shift_is_what_the_base_or_the_control_has_not():
    results = compared()
    assert results["naive"]["probe_shift"]["value"] == pytest.approx(0.8)
    assert results["naive"]["probe_beyond_control"]["value"] == pytest.approx(0.6)
    assert results["base"]["probe_shift"]["value"] == 0
    assert results["control"]["probe_beyond_control"]["value"] == 0


def test_at_equal_loss_naive_training_is_linear_between_its_lengths_question_by_question():
    found = compared()["grasp"]["probe_at_equal_loss"]
    assert found["each"]["question 0"] == pytest.approx(0.1 - 0.3)
    assert found["each"]["question 1"] == pytest.approx(0.1 - 0.8)
    low, high = found["interval"]
    assert low <= found["value"] <= high


def test_a_method_that_is_a_shorter_naive_run_gains_nothing_at_equal_loss():
    results = compared()
    results["grasp"] = measured(2.0, 0.2, 0.4)
    compare(results)
    assert set(results["grasp"]["probe_at_equal_loss"]["each"].values()) == {0}


def test_beyond_the_ends_of_the_curve_naive_is_its_nearer_end():
    results = compared()
    results["grasp"] = measured(0.5, 0.4, 1.2)
    compare(results)
    assert results["grasp"]["probe_at_equal_loss"]["value"] == pytest.approx(0)


def test_other_parts_than_the_bases_end_in_one_line():
    results = compared()
    del results["naive"]["probe"]["each"]["question 0"]
    with pytest.raises(
        UserError, match="evaluations of base and naive have not the same parts of 'probe'"
    ):
        compare(results)
