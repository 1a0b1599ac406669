"""The experiment, end to end: pretrain -> naive fine-tune -> identify -> GRASP -> baselines.

That the factor can be found in the weights of a naive LoRA fine-tune, and that gradients are then
projected in a second one, is the abstract's (arXiv 2605.27676). The singular vectors, the
constraint on the parameters, and `grasp_online`, which needs no naive run, are ours.
"""

import math
import time
from dataclasses import dataclass, replace

from baselines.methods import Found, recipe
from baselines.stream import ablation, stream_subspace
from data.base import pretrain
from data.synthetic import World
from data.worlds import WORLDS
from eval import evaluate, persona_direction
from identify import gap, identify, leak, spectra
from lora import add_lora, remove_lora
from model import GPT
from real.settings import SEEDS, Training
from support.errors import user_errors
from support.options import option, parse
from support.processes import process_group
from support.program import run
from train import Optimisation, finetune

WATCHED = ("naive", "grasp", "grasp_online", "grasp_random")  # measured on the way, for the figure
LONGER = WATCHED  # fine-tuned again with three times the steps


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
    subspace_rank: int = 1  # directions of each module that `grasp` takes from the naive run
    ablation_rank: int = 1  # directions of the residual stream that ablation takes out
    steering: float = 0.3  # the vector's length, in mean norms of what its sub-layer adds
    kl_weight: float = 1.0


@dataclass(frozen=True)
class Bench:
    """One seed's world, base model and rows: what every run of the experiment starts from."""

    world: World
    toy: Toy
    seed: int
    model: GPT
    rows: tuple  # tokens, mask


def measure(bench, method, found):
    """The model as it is now, with the hooks that `method` has while it answers."""
    during = ablation(bench.model, found.stream) if method == "ablate_inference" else None
    return evaluate(bench.model, bench.world, during)


def run_method(bench, method, found, times=1):
    """Train a fresh LoRA by `method` for `times` the usual steps, and leave it on the model.

    Returns its Fit, its measurements, and [(step, misalignment, task)] on the way.
    """
    toy, curve = bench.toy, []
    seconds_watching = 0.0

    def watch(step):
        nonlocal seconds_watching
        if (step + 1) % max(toy.steps // 15, 1) == 0:
            paused = time.monotonic()
            now = measure(bench, method, found)
            curve.append((step + 1, now["misalignment"], now["task"]))
            seconds_watching += time.monotonic() - paused

    remove_lora(bench.model)
    with user_errors():
        add_lora(bench.model, toy.rank, alpha=toy.rank, targets=toy.targets, seed=bench.seed)
    began = time.monotonic()
    added = recipe(method, bench.model, bench.rows, found, bench.seed)
    each = watch if method in WATCHED and times == 1 else None
    label = method if times == 1 else f"{method}, {times}x the steps"
    options = Optimisation(steps=times * toy.steps, lr=toy.lr)
    fit = finetune(bench.model, lambda step: bench.rows, options, added, each=each, label=label)
    seconds = time.monotonic() - began - seconds_watching
    return fit, {**measure(bench, method, found), "seconds": round(seconds, 3)}, curve


def train_longer(bench, methods, found):
    """{method: its measurements after `longer` times the steps}, to see what comes back."""
    longer = {}
    for method in methods:
        fit, longer[method], _ = run_method(bench, method, found, bench.toy.longer)
        if method == "grasp_online":
            found = replace(found, looks=fit.looks)  # the control replays those of this run
    return longer


def compare_with_labels(bench, svds):
    """How near the direction found without labels is to the one that labels would give."""
    Q, pooled = stream_subspace(svds)
    direction = persona_direction(remove_lora(bench.model), bench.world)
    chance = math.sqrt(2 / (math.pi * bench.toy.d_model))  # E|cos| of a random direction, D large
    cosine = abs(Q[:, 0] @ direction).item()
    return {"cosine": cosine, "chance_cosine": chance, "gap": gap(pooled)}


def before_training(bench):
    """What methods may use that need no other run."""
    toy = bench.toy
    rows = bench.world.spare_rows()
    return Found(unrelated=rows, steering=toy.steering, kl_weight=toy.kl_weight)


def add_found(bench, method, fit, loss, found):
    """`found` with what the run of `method`, still on the model, gives to those that come later."""
    if method == "naive":  # identification: from these weights, and nothing else
        factor = identify(bench.model, bench.toy.subspace_rank)
        stream = stream_subspace(spectra(bench.model), bench.toy.ablation_rank)[0]
        return replace(found, factor=factor, stream=stream)
    if method == "grasp_online":  # for its controls
        return replace(found, looks=fit.looks, loss=loss)
    return found


def experiment(world, toy, seed, methods, folder):
    """One seed, from nothing, in the order in which the abstract tells it; as in results.json."""
    model = pretrain(world, toy, seed, folder)
    bench = Bench(world, toy, seed, model, world.finetuning_rows())
    found = before_training(bench)
    results = {"base": {**measure(bench, "base", found), "seconds": 0.0}}
    curves, looks, leaks = {}, {}, {}
    for method in methods:  # naive comes first
        fit, results[method], curve = run_method(bench, method, found)
        if curve:
            curves[method] = curve
        if fit.looks:
            looks[method] = fit.looks
        if fit.factor:
            name = "gradient_only" if method == "grasp_gradient_only" else method
            leaks[name] = leak(model, fit.factor)
        if method == "naive":
            svds = spectra(model)
        found = add_found(bench, method, fit, results[method]["loss"], found)
    return {
        "identification": compare_with_labels(bench, svds),
        "leak": leaks,
        "methods": results,
        "longer": train_longer(bench, [m for m in LONGER if m in methods], found),
        "curves": curves,
        "looks": looks,
        "spectra": {name: S.tolist() for name, (_, S, _) in svds.items()},
    }


def settings(args, seed):
    """(World, Toy) that the options ask for."""
    world = WORLDS[args.world](seed)
    toy = Toy(**{"targets": args.targets or Toy.targets, **world.toy})
    if args.quick:
        world = replace(world, n_topics=5, n_queries=8)
        toy = replace(toy, d_model=64, pretrain_steps=150, steps=60, lr=1e-3, longer=2)
    return world, toy


@dataclass(frozen=True)
class Arguments(Training):
    """The whole method: on the synthetic task, or on a checkpoint (--model) and rows (--data).

    The synthetic task has settings of its own, `Toy` in grasp.py. Of these options it takes --out,
    --targets (default: o_proj,down_proj), --seed, --seeds, --methods, --world and --quick.
    """

    world: str = option("persona", "the synthetic world, of data/worlds.py", choices=tuple(WORLDS))
    seeds: int = option(1, "how many seeds, each in a folder of its own", **SEEDS)
    methods: tuple = option((), "comma-separated (default: all; with --model, grasp_online)")
    subspace_rank: int = option(
        1, "directions of each module that are identified, with --model", low=1
    )
    quick: bool = option(
        False, "a tiny world, in seconds: to see that it runs, not for its numbers"
    )


def main():
    """The command line. What only one of the two kinds of run needs is loaded by that one."""
    args = parse(Arguments)
    if args.model or args.data:
        from real.stages import stages

        stages(args)
    else:
        from experiments.report import run_seeds

        run_seeds(args, settings, experiment)


if __name__ == "__main__":
    run(main, process_group())
