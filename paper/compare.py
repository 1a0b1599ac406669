"""Measurements with their intervals, and what a fine-tune changed.

These are ours, not the abstract's. Any fine-tune shifts something, and less of one shifts less.
So a shift counts beyond that of training on unobjectionable answers to the same prompts, and a
method where it shifts less than what has less of a naive fine-tune, at the same task loss.
"""

import math
from statistics import fmean, stdev

import numpy as np

# Measurements whose names begin so have parts to pair.
COMPARED = ("probe", "lean", "spill", "preference", "transfer_")
AGAINST = {"base": "shift", "control": "beyond_control"}
# The naive update, made smaller after training (Wortsman et al. 2022, arXiv 2109.01903).
SMALLER = {"naive_times_40": 0.4, "naive_times_60": 0.6, "naive_times_80": 0.8}
CURVES = {  # from the base to naive: by a shorter training, or by a smaller update
    "at_equal_loss": ("base", "naive_quarter", "naive_half", "naive"),
    "at_equal_loss_smaller": ("base", *SMALLER, "naive"),
}
COMPARISONS = tuple(f"_{name}" for name in (*AGAINST.values(), *CURVES))


def wilson(k, n):
    """(low, high) of 95 % for a rate of which `k` of `n` were seen: holds near 0 and 1, too.

    Wilson 1927, Journal of the American Statistical Association 22:209-212.
    """
    if n == 0:
        return 0.0, 1.0
    z = 1.96  # standard errors
    p, shrink = k / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap_interval(values, seed=0, n=10000):
    """(low, high) of 95 % for the mean of `values`: percentiles over n resamples (Efron 1979)."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(n, len(values)))].mean(axis=1)  # (n,)
    return tuple(np.quantile(means, [0.025, 0.975]).tolist())


def share(k, n):
    """A rate, k of n, with its Wilson interval; no value where there is nothing to count."""
    return {"value": k / n if n else None, "interval": wilson(k, n), "k": k, "n": n}


def mean(each):
    """The mean of {name: value}, with a bootstrap interval over the names."""
    values = list(each.values())
    return {"value": fmean(values), "interval": bootstrap_interval(values), "each": each}


def shift(found, base):
    """How far the mean of `found` is from that of `base`, with an interval over the differences."""
    return mean({name: value - base["each"][name] for name, value in found["each"].items()})


def cell(parts):
    """One measurement over seeds in text: mean ± standard deviation; of one seed, its interval."""
    parts = [part for part in parts if part.get("value") is not None]
    values = [part["value"] for part in parts]
    if len(values) > 1:
        return f"{fmean(values):.4f} ± {stdev(values):.4f}"
    shown = [f"{value:.4f}" for value in values]
    shown += ["[{:.4f}, {:.4f}]".format(*part["interval"]) for part in parts if "interval" in part]
    return " ".join(shown)


def at_loss(curve, name, loss):
    """{part: value} of the measurement `name` at `loss`: linear between the runs of a curve.

    Beyond the curve's ends it is as at the nearer end.
    """
    curve = sorted(curve, key=lambda run: run["loss"]["value"])
    losses = [run["loss"]["value"] for run in curve]
    parts = {part: [run[name]["each"][part] for run in curve] for part in curve[0][name]["each"]}
    return {part: float(np.interp(loss, losses, values)) for part, values in parts.items()}


def compare(results):
    """Add the comparisons to {method: {name: measurement}}, each with its interval over parts.

    NAME_shift: the base's value taken off; NAME_beyond_control: the control's; NAME_at_equal_loss:
    that of a shorter naive training at the method's held-out loss, so negative is less than naive;
    NAME_at_equal_loss_smaller: that of naive's update made smaller, at that loss.
    """
    for name in [name for name in results["base"] if name.startswith(COMPARED)]:
        for method, result in results.items():
            for other, comparison in AGAINST.items():
                if other in results:
                    result[f"{name}_{comparison}"] = shift(result[name], results[other][name])
            for comparison, methods in CURVES.items():
                curve = [results[m] for m in methods if m in results and "loss" in results[m]]
                if len(curve) > 2 and method not in (*methods, "control"):
                    each = at_loss(curve, name, result["loss"]["value"])
                    result[f"{name}_{comparison}"] = shift(result[name], {"each": each})
