"""The methods beside GRASP, each as what it adds to the one fine-tuning loop.

None sees a label. To add one: a line in BASELINES, its Recipe in `baseline` (docs/methods.md).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from baselines.stream import ablation, steering, steering_vector
from lora import without_lora
from train import Recipe

PATTERNS = "the patterns found in a naive run (--subspace)"
BASELINES = {  # name: the field of Found that it needs or None, and that in words for a user
    "grasp_random": ("looks", "the looks of a run of grasp_online (--looks)"),
    "grasp_gradient_only": ("patterns", PATTERNS),
    "ablate_train": ("stream", PATTERNS),
    "ablate_inference": ("stream", PATTERNS),
    "steer_train": ("stream", PATTERNS),
    "kl": ("unrelated", "rows of unrelated prompts (--unrelated)"),
    "early_stop": ("loss", "a loss to stop at (--until-loss)"),
}
METHODS = ("naive", "grasp", "grasp_online", *BASELINES)  # each after the runs that it builds on


@dataclass(frozen=True)
class Found:
    """What a method may use beside the rows; None where it is not there."""

    patterns: dict | None = None  # {module: (U, V)}, identified from the naive run's weights
    stream: torch.Tensor | None = None  # (D, k), the same as a basis of the residual stream
    looks: list | None = None  # grasp_online's, for the control that replays them
    loss: float | None = None  # at which early_stop ends
    unrelated: tuple | None = None  # rows (tokens, mask), for kl
    steering: float = 0.3  # the steering vector's length, the largest that kept the synthetic task
    kl_weight: float = 1.0
    sides: str = "both"  # of the patterns that are held


def baseline(method, model, batch, found, seed=0):
    """The Recipe of `method`; ValueError where it lacks what it needs. batch: of its first step."""
    needs, words = BASELINES[method]
    if needs and getattr(found, needs) is None:
        raise ValueError(f"method '{method}' needs {words}")
    if method == "grasp_random":
        return Recipe(look=random_looks(found.looks, seed), sides=found.sides)
    if method == "grasp_gradient_only":  # the abstract's, as we read it: AdamW's steps are free
        return Recipe(patterns=found.patterns, sides=found.sides, project="gradient")
    if method == "ablate_train":  # Concept Ablation Fine-Tuning
        return Recipe(during=ablation(model, found.stream))
    if method == "steer_train":  # preventative steering
        site, vector = steering_vector(model, found.stream[:, 0], *batch, found.steering)
        return Recipe(during=steering(model, site, vector))
    if method == "kl":
        return Recipe(penalty=lambda: found.kl_weight * kl_to_base(model, *found.unrelated))
    if method == "early_stop":  # at grasp_online's loss: what would less training alone do?
        return Recipe(stop_below=found.loss)
    return Recipe()  # ablate_inference: a naive run, ablated where it is measured


def random_looks(looks, seed):
    """The control: random patterns of the same shapes join the same modules at the same moments."""
    joined_at = {entry["step"]: entry["joined"] for entry in looks}

    def look_at_random(step, svds):
        # From (seed, step), so that a resumed run draws alike.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        drawn = {}
        for name, n in joined_at.get(step + 1, {}).items():
            U, _, V = svds[name]
            pair = [torch.randn(len(side), n, generator=generator) for side in (U, V)]
            drawn[name] = tuple(torch.linalg.qr(side)[0].to(U.device) for side in pair)
        return drawn

    return look_at_random


def kl_to_base(model, tokens, mask):
    """KL(base || model) in nats a marked token (Kaczer et al. 2025, arXiv 2508.06249)."""
    with torch.no_grad(), without_lora(model):
        base = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    new = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    return F.kl_div(new, base, reduction="batchmean", log_target=True)
