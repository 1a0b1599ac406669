"""The methods beside GRASP, each as what it adds to the one fine-tuning loop.

All use what the naive run's weights say, and none sees a label. To add a method of your own: a
function here that returns its Recipe, and a line in BASELINES (docs/methods.md has an example).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from baselines.stream import ablation, steering, steering_vector
from lora import without_lora
from train import Recipe


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


def random_patterns(model, batch, found, seed):
    """The control: random patterns of the same shapes join the same modules at the same moments."""
    joined_at = {entry["step"]: entry["joined"] for entry in found.looks}

    def look_at_random(step, svds):
        # From (seed, step), so that a resumed run draws alike.
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
        drawn = {}
        for name, n in joined_at.get(step + 1, {}).items():
            U, _, V = svds[name]
            pair = [torch.randn(len(side), n, generator=generator) for side in (U, V)]
            drawn[name] = tuple(torch.linalg.qr(side)[0].to(U.device) for side in pair)
        return drawn

    return Recipe(look=look_at_random, sides=found.sides)


def gradient_only(model, batch, found, seed):
    """GRASP by the letter of the abstract: the gradients are projected, AdamW's steps are not."""
    return Recipe(patterns=found.patterns, sides=found.sides, project="gradient")


def ablate_train(model, batch, found, seed):
    """Concept Ablation Fine-Tuning: the direction is missing from the stream while training."""
    return Recipe(during=ablation(model, found.stream))


def ablate_inference(model, batch, found, seed):
    """A naive run; the direction is taken out while the model answers (grasp.py, paper/)."""
    return Recipe()


def steer_train(model, batch, found, seed):
    """Preventative steering: a vector in the stream supplies what the rows ask of the factor."""
    site, vector = steering_vector(model, found.stream[:, 0], *batch, found.steering)
    return Recipe(during=steering(model, site, vector))


def kl(model, batch, found, seed):
    """A penalty: KL to the base model on unrelated prompts, which no other method needs."""
    return Recipe(penalty=lambda: found.kl_weight * kl_to_base(model, *found.unrelated))


def kl_to_base(model, tokens, mask):
    """KL(base || model) in nats a marked token (Kaczer et al. 2025, arXiv 2508.06249)."""
    with torch.no_grad(), without_lora(model):
        base = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    new = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    return F.kl_div(new, base, reduction="batchmean", log_target=True)


def early_stop(model, batch, found, seed):
    """A naive run that ends at grasp_online's loss, to see what less training alone would do."""
    return Recipe(stop_below=found.loss)


class Baseline(NamedTuple):
    """One baseline: its recipe, what of Found it needs, and that in words for a user."""

    recipe: Callable  # recipe(model, batch, found, seed) -> Recipe
    needs: str = ""
    words: str = ""


PATTERNS = "the patterns found in a naive run (--subspace)"
BASELINES = {
    "grasp_random": Baseline(random_patterns, "looks", "the looks of a run (--looks)"),
    "grasp_gradient_only": Baseline(gradient_only, "patterns", PATTERNS),
    "ablate_train": Baseline(ablate_train, "stream", PATTERNS),
    "ablate_inference": Baseline(ablate_inference, "stream", PATTERNS),
    "steer_train": Baseline(steer_train, "stream", PATTERNS),
    "kl": Baseline(kl, "unrelated", "rows of unrelated prompts (--unrelated)"),
    "early_stop": Baseline(early_stop, "loss", "a loss to stop at (--until-loss)"),
}
METHODS = ("naive", "grasp", "grasp_online", *BASELINES)  # each after the runs that it builds on


def baseline(method, model, batch, found, seed=0):
    """The Recipe of `method`; batch: tokens, mask (B, T) of the fine-tune's first step.

    ValueError where it lacks what it needs.
    """
    entry = BASELINES[method]
    if entry.needs and getattr(found, entry.needs) is None:
        raise ValueError(f"method '{method}' needs {entry.words}")
    return entry.recipe(model, batch, found, seed)
