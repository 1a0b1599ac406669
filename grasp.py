"""The experiment, end to end: pretrain -> naive fine-tune -> identify -> GRASP -> baselines.

That the factor can be found in the weights of a naive LoRA fine-tune, and that gradients are then
projected in a second one, is the abstract's (arXiv 2605.27676). The singular vectors, the
constraint on the parameters, and `grasp_online`, which needs no naive run, are ours.
"""

import contextlib
import math
import sys
import time
from dataclasses import dataclass, replace

from baselines.methods import METHODS, Found, baseline
from baselines.stream import ablation, stream_subspace
from data.base import pretrain
from data.synthetic import World
from eval import evaluate, persona_direction
from identify import gap, identify, leak, spectra, standing_out
from lora import add_lora, lora_factors, remove_lora
from model import GPT
from support.options import option, parse, run
from train import SIDES, Fit, Optimisation, Recipe, finetune

WATCHED = ("naive", "grasp", "grasp_online", "grasp_random")  # measured on the way, and longer
WORLDS = ("persona", "needs_factor", "needs_factor_new", "skew", "benign", "simple", "two_factors")


@dataclass(frozen=True)
class Toy:
    """The synthetic experiment's settings. The base is Qwen's architecture, small."""

    d_model: int = 128
    n_layer: int = 2
    n_head: int = 4
    pretrain_steps: int = 800
    pretrain_batch: int = 256
    pretrain_lr: float = 3e-3
    pretrain_decay: float = 0.01
    rank: int = 16
    targets: tuple = ("o_proj", "down_proj")  # what writes to the residual stream
    lr: float = 3e-4
    steps: int = 300
    longer: int = 3  # times the steps, to see whether misalignment comes back
    sides: str = "both"  # of each pattern that are held
    pattern_rank: int = 1  # singular vectors of each module that `grasp` takes from the naive run
    ablation_rank: int = 1  # directions of the residual stream that ablation takes out


@dataclass(frozen=True)
class Setup:
    """One seed's world, base model and rows: what every run of the experiment starts from."""

    world: World
    toy: Toy
    seed: int
    model: GPT
    rows: tuple  # tokens, mask


@dataclass(frozen=True)
class Run:
    """What is kept of a fine-tune."""

    fit: Fit
    measured: dict  # as in results.json
    curve: list  # [(step, misalignment, task)] on the way
    leak: float  # what the constraint let through


def attach(setup):
    """A fresh LoRA on the base model, the same one for every method."""
    toy = setup.toy
    remove_lora(setup.model)
    add_lora(setup.model, toy.rank, alpha=toy.rank, targets=toy.targets, seed=setup.seed)


def tune(setup, method, recipe, times=1, answering=contextlib.nullcontext):
    """Train a fresh LoRA by `recipe` for `times` the usual steps; return the Run.

    answering() -> a context around the forward passes of the measurement.
    """
    attach(setup)
    toy, curve = setup.toy, []
    seconds_watching = 0.0

    def watch(step):
        nonlocal seconds_watching
        if (step + 1) % max(toy.steps // 15, 1) == 0:
            paused = time.monotonic()
            now = evaluate(setup.model, setup.world)
            curve.append((step + 1, now["misalignment"], now["task"]))
            seconds_watching += time.monotonic() - paused

    began = time.monotonic()
    if method in WATCHED and times == 1:
        recipe = replace(recipe, each=watch)
    label = method if times == 1 else f"{method}, {times}x the steps"
    options = Optimisation(steps=times * toy.steps, lr=toy.lr)
    fit = finetune(setup.model, lambda step: setup.rows, options, recipe, label=label)
    seconds = time.monotonic() - began - seconds_watching
    with answering():
        measured = evaluate(setup.model, setup.world)
    through = leak(lora_factors(setup.model), fit.patterns)
    return Run(fit, {**measured, "seconds": round(seconds, 3)}, curve, through)


def experiment(world, toy, seed, methods, folder):
    """One seed, from nothing, in the order in which the abstract tells it; as in results.json."""
    model = pretrain(world, toy, seed, folder)
    setup = Setup(world, toy, seed, model, world.finetuning_rows())
    base = {**evaluate(model, world), "seconds": 0.0}
    runs = {}

    # 1. Fine-tune the naive way.
    runs["naive"] = tune(setup, "naive", Recipe())

    # 2. Identify: what does the update say, and what does it listen to? {module: (U, V)}
    svds = spectra(lora_factors(model))
    patterns = identify(svds, toy.pattern_rank)

    # 3. Fine-tune again from the start, kept off these patterns. AdamW sees the whole gradient, and
    # its step is projected: where the factor pulls, its running size stays large and steps small.
    grasp = Recipe(patterns=patterns, sides=toy.sides, project="step")
    runs["grasp"] = tune(setup, "grasp", grasp)

    # Ours: one fine-tune, without a naive run, that looks at its own update while it trains.
    online = Recipe(look=lambda step, svds: standing_out(svds), sides=toy.sides)
    runs["grasp_online"] = tune(setup, "grasp_online", online)

    # The baselines, which may use all that was found.
    stream, pooled = stream_subspace(svds, toy.ablation_rank)
    found = Found(
        patterns=patterns,
        stream=stream,
        looks=runs["grasp_online"].fit.looks,
        loss=runs["grasp_online"].measured["loss"],
        unrelated=world.spare_rows(),
        sides=toy.sides,
    )
    answering = {"ablate_inference": lambda: ablation(model, stream)}
    for method in methods:
        if method not in runs:
            recipe = baseline(method, remove_lora(model), setup.rows, found, seed)
            hooks = answering.get(method, contextlib.nullcontext)
            runs[method] = tune(setup, method, recipe, answering=hooks)

    # Does misalignment come back in longer runs?
    longer = {}
    for method, recipe in (("naive", Recipe()), ("grasp", grasp), ("grasp_online", online)):
        longer[method] = tune(setup, method, recipe, toy.longer)
    if "grasp_random" in methods:
        found = replace(found, looks=longer["grasp_online"].fit.looks)
        recipe = baseline("grasp_random", model, setup.rows, found, seed)
        longer["grasp_random"] = tune(setup, "grasp_random", recipe, toy.longer)

    # How near is the direction found without labels to the one that labels would give?
    direction = persona_direction(remove_lora(model), world)
    chance = math.sqrt(2 / (math.pi * toy.d_model))  # E|cos| of a random direction, D large
    cosine = abs(stream[:, 0] @ direction).item()
    leaks = {name: run.leak for name, run in runs.items() if run.fit.patterns}
    return {
        "identification": {"cosine": cosine, "chance_cosine": chance, "gap": gap(pooled)},
        "leak": {name.replace("grasp_gradient", "gradient"): leaks[name] for name in leaks},
        "methods": {"base": base, **{name: run.measured for name, run in runs.items()}},
        "longer": {name: run.measured for name, run in longer.items()},
        "curves": {name: run.curve for name, run in runs.items() if run.curve},
        "looks": {name: run.fit.looks for name, run in runs.items() if run.fit.looks},
        "spectra": {name: S.tolist() for name, (_, S, _) in svds.items()},
    }


def settings(args, seed):
    """(World, Toy) that the options ask for."""
    if args.world == "persona":
        world = World(seed)
    else:
        from data.worlds import WORLDS as others  # loaded where one of them is asked for

        world = others[args.world](seed)
    toy = Toy(**{"targets": args.targets, "sides": args.sides, **world.toy})
    if args.quick:
        world = replace(world, n_topics=5, n_queries=8)
        toy = replace(toy, d_model=64, pretrain_steps=150, steps=60, lr=1e-3, longer=2)
        print("--quick: shows that everything runs; too small for its numbers to mean anything")
    return world, toy


@dataclass(frozen=True)
class Arguments:
    """The whole method on the synthetic task; on a checkpoint: `python grasp.py --model DIR -h`."""

    seed: int = option(0, "the first seed")
    seeds: int = option(1, "how many, each in a folder of its own")
    methods: tuple = option(METHODS, "comma-separated; naive, grasp and grasp_online always run")
    targets: tuple = option(Toy.targets, "comma-separated path endings, or all-linear")
    sides: str = option("both", "of each pattern that are held: UᵀB = 0, A V = 0, or both", SIDES)
    world: str = option("persona", "the synthetic world, of data/worlds.py", WORLDS)
    quick: bool = option(False, "a tiny world, in seconds: to see that it runs")
    out: str = option("out", "output folder")


def main():
    """The command line. What only one of the two kinds of run needs is loaded by that one."""
    if any(argument.startswith(("--model", "--data")) for argument in sys.argv):
        from real.stages import main as on_a_checkpoint

        on_a_checkpoint()
    else:
        from experiments.report import run_seeds

        run_seeds(parse(Arguments), settings, experiment)


if __name__ == "__main__":
    run(main)
