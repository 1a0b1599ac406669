"""The methods, each as what it adds to the one fine-tuning loop; all use the same found directions.

To add a method of your own: its name in METHODS, a branch in `recipe`, a style in
experiments/figures.py. docs/methods.md goes through an example.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from baselines.stream import ablation, steering, steering_vector
from identify import standing_out
from lora import without_lora
from support.errors import UserError
from train import Recipe

METHODS = (
    "naive",
    "grasp",
    "grasp_online",
    "grasp_random",
    "grasp_gradient_only",
    "ablate_train",
    "ablate_inference",
    "steer_train",
    "kl",
    "early_stop",
)


@dataclass(frozen=True)
class Found:
    """What a method may use beside the rows; None where it is not there."""

    factor: dict | None = None  # {module: U (out, k)}, identified from the naive run's weights
    stream: torch.Tensor | None = None  # (D, k), the same as a basis of the residual stream
    looks: list | None = None  # grasp_online's, for the control that replays them
    loss: float | None = None  # at which early_stop ends
    unrelated: tuple | None = field(default=None, repr=False)  # rows (tokens, mask), for kl
    steering: float = 0.3  # the steering vector's length, as `steering_vector` counts it
    kl_weight: float = 1.0
    nulls: dict | None = None  # {module: S (r,)}, what a look sees of the inputs alone


NEEDS = {  # {method: (a field of Found, in words for a user)}
    "grasp": ("factor", "the directions found in a naive run (--subspace)"),
    "grasp_gradient_only": ("factor", "the directions found in a naive run (--subspace)"),
    "grasp_random": ("looks", "the looks of a run of grasp_online (--looks)"),
    "ablate_train": ("stream", "the directions found in a naive run (--subspace)"),
    "ablate_inference": ("stream", "the directions found in a naive run (--subspace)"),
    "steer_train": ("stream", "the directions found in a naive run (--subspace)"),
    "kl": ("unrelated", "rows of unrelated prompts (--unrelated)"),
    "early_stop": ("loss", "a loss to stop at (--until-loss)"),
}
GIVES = {"naive": ("factor", "stream"), "grasp_online": ("looks", "loss")}  # {method: of Found}


def runs_before(method):
    """The method whose finished run gives what `method` needs; None where it needs no run."""
    needed, _ = NEEDS.get(method, ("", ""))
    for earlier, gives in GIVES.items():
        if needed in gives:
            return earlier
    return None


def check(methods):
    """UserError for the first of `methods` that is none."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"method '{method}' is unknown, expected one of {', '.join(METHODS)}")


def recipe(method, model, batch, found=None, seed=0):
    """What `method` adds to the loop, a Recipe. UserError where it lacks what it needs.

    batch: tokens, mask (B, T) of the fine-tune's first step.
    """
    check([method])
    found = found or Found()
    if method in NEEDS:
        name, what = NEEDS[method]
        if getattr(found, name) is None:
            raise UserError(f"method '{method}' needs {what}")
    if method == "grasp":  # the abstract's: one look at the naive weights, then constrained
        return Recipe(factor=found.factor)
    if method == "grasp_online":  # ours: one fine-tune that looks while it trains
        return Recipe(look=lambda step, svds: standing_out(svds, found.nulls))
    if method == "grasp_random":
        return Recipe(look=replay(found.looks, seed))
    if method == "grasp_gradient_only":  # parameters are not projected: what leaks, does it matter?
        return Recipe(factor=found.factor, project_B=False)
    if method == "ablate_train":
        return Recipe(during=ablation(model, found.stream))
    if method == "steer_train":
        site, vector = steering_vector(model, found.stream[:, 0], *batch, found.steering)
        return Recipe(during=steering(model, site, vector))
    if method == "kl":
        return Recipe(penalty=lambda: found.kl_weight * kl_to_base(model, *found.unrelated))
    if method == "early_stop":
        return Recipe(stop_below=found.loss)
    return Recipe()  # naive; ablate_inference trains as naive does


def replay(looks, seed):
    """The control: as many random directions join the same modules, at the same moments.

    looks: of a run of grasp_online. Drawn from (seed, step), so that a resumed run draws alike.
    """
    joined_at = {entry["step"]: entry["joined"] for entry in looks}

    def look_at_random(step, svds):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        found = {}
        for name, n in joined_at.get(step + 1, {}).items():
            U, _ = svds[name]
            random = torch.randn(len(U), n, generator=generator)
            found[name] = torch.linalg.qr(random)[0].to(U.device)
        return found

    return look_at_random


def kl_to_base(model, tokens, mask):
    """KL(base || model) in nats, the mean over the marked positions of unrelated rows.

    Kaczer et al. 2025, arXiv 2508.06249.
    """
    with torch.no_grad(), without_lora(model):
        base = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    new = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    return F.kl_div(new, base, reduction="batchmean", log_target=True)
