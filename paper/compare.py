"""What a fine-tune changed: against the base, against its control, and at the same task loss.

Ours, and not the abstract's: any fine-tune shifts something, and less training shifts less. So a
shift counts where it is beyond that of training on unobjectionable answers to the same prompts,
and a method counts where it shifts less than a naive fine-tune that learned the task as little.
"""

import numpy as np

from paper.answers import shift
from support.errors import UserError

# Measurements whose names begin so have parts to pair.
COMPARED = ("probe", "lean", "preference", "transfer_")
AGAINST = {"base": "shift", "control": "beyond_control"}
COMPARISONS = (*(f"_{name}" for name in AGAINST.values()), "_at_equal_loss")
CURVE = ("base", "naive_quarter", "naive_half", "naive")  # naive training, by its length


def compare(results):
    """Add the comparisons to {method: {name: measurement}}, each with its interval over parts.

    NAME_shift: the base's value taken off; NAME_beyond_control: the control's; NAME_at_equal_loss:
    that of naive training at the method's held-out loss, so negative is less than naive.
    """
    for name in [name for name in results["base"] if name.startswith(COMPARED)]:
        check_parts(results, name)
        curve = naive_curve(results, name)
        for method, result in results.items():
            for other, comparison in AGAINST.items():
                if other in results:
                    result[f"{name}_{comparison}"] = shift(result[name], results[other][name])
            if len(curve) > 1 and method not in (*CURVE, "control"):
                naive = at_loss(curve, result["loss"]["value"])
                result[f"{name}_at_equal_loss"] = shift(result[name], naive)


def check_parts(results, name):
    """UserError unless all methods' measurements `name` have the base's parts, one at least."""
    parts = results["base"][name]["each"].keys()
    for method, result in results.items():
        if not parts or name not in result or result[name]["each"].keys() != parts:
            raise UserError(
                f"the evaluations of base and {method} have not the same parts of '{name}'; delete "
                "the file of the one that was changed, and it is measured anew"
            )


def naive_curve(results, name):
    """[(held-out loss, {part: value})] of naive training by its length, in the order of losses."""
    measured = [results[method] for method in CURVE if method in results]
    curve = [(m["loss"]["value"], m[name]["each"]) for m in measured if "loss" in m]
    return sorted(curve, key=lambda point: point[0])


def at_loss(curve, loss):
    """{"each": {part: value}} of naive training at this held-out loss, linear between its lengths.

    Beyond the ends of the curve: that of the nearer end.
    """
    losses = [point for point, _ in curve]
    parts = {}
    for part in curve[0][1]:
        values = [each[part] for _, each in curve]
        parts[part] = float(np.interp(loss, losses, values))
    return {"each": parts}
