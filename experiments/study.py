"""What settled the formulation: variants of GRASP on the synthetic task, one row each.

Among them controls that tell why a choice matters: random directions, and a slower or frozen A.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import torch

from data.base import pretrain
from data.worlds import WORLDS
from eval import evaluate
from grasp import Setup, Toy, attach
from identify import identify, spectra, standing_out
from lora import lora_factors, lora_modules
from support.files import progress, write_json
from support.options import option, parse, run
from train import Optimisation, Recipe, finetune, held, keep_off_

NEVER, ONCE, ONLINE = "never", "once, at a naive run's weights", "while it trains"
LEVEL = 0.05  # nats a token: methods are compared at equal loss where they get below it
RUNS = {"usual": (1, None), "longer": (3, None), "equal_loss": (3, LEVEL)}  # times the steps
TARGETS = {"writers": Toy.targets, "all": ("all-linear",)}


@dataclass(frozen=True)
class Variant:
    """One way to fine-tune: when it looks, and what it does with what it sees."""

    name: str
    looks: str = NEVER
    sides: str = "both"
    project: str = "step"
    pairs: int = 1  # of each module, where it looks once
    look_every: int = 10  # steps, where it looks while it trains
    rate_A: float = 1.0  # factor on the steps of A; 0: A stays as it was drawn
    random: int | None = None  # the side with random directions, 0: output, 1: input; a control


VARIANTS = (
    Variant("naive"),
    Variant("naive, A at a tenth of the rate", rate_A=0.1),
    Variant("naive, A frozen", rate_A=0.0),
    Variant("one look", ONCE),
    Variant("one look, output side", ONCE, "output"),
    Variant("one look, input side", ONCE, "input"),
    Variant("one look, input side random", ONCE, random=1),
    Variant("one look, output side random", ONCE, random=0),
    Variant("one look, gradients and steps projected", ONCE, project="both"),
    Variant("one look, gradients alone projected", ONCE, project="gradient"),
    Variant("one look, output side, gradients and steps projected", ONCE, "output", "both"),
    Variant("one look, output side, gradients alone projected", ONCE, "output", "gradient"),
    Variant("one look, A at a tenth of the rate", ONCE, rate_A=0.1),
    Variant("one look, output side, A at a tenth of the rate", ONCE, "output", rate_A=0.1),
    Variant("one look, 4 pairs", ONCE, pairs=4),
    Variant("online", ONLINE, project="both"),
    Variant("online, output side", ONLINE, "output", "both"),
    Variant("online, input side", ONLINE, "input", "both"),
    Variant("online, steps alone projected", ONLINE),
    Variant("online, looks every 5 steps", ONLINE, project="both", look_every=5),
    Variant("online, looks every 20 steps", ONLINE, project="both", look_every=20),
)


def start(world, toy, folder):
    """(Setup of a world, its base in `folder`; {module: (U, S, V)} after a naive run on it)."""
    model = pretrain(world, toy, world.seed, folder)
    setup = Setup(world, toy, world.seed, model, world.finetuning_rows())
    train(setup, Recipe(), toy.steps, label="naive")
    return setup, spectra(lora_factors(model))


def train(setup, recipe, steps, rate_A=1.0, label="fine-tune"):
    """Train a fresh LoRA and leave it on the model; return its Fit. rate_A scales A's steps."""
    attach(setup)
    modules = lora_modules(setup.model).values()
    before = [m.lora_A.detach().clone() for m in modules]

    @torch.no_grad()
    def slow_down(step):
        for m, earlier in zip(modules, before, strict=True):
            m.lora_A.copy_(earlier + rate_A * (m.lora_A - earlier))
            earlier.copy_(m.lora_A)

    if rate_A != 1:
        recipe = replace(recipe, each=slow_down)
    options = Optimisation(steps=steps, lr=setup.toy.lr)
    return finetune(setup.model, lambda step: setup.rows, options, recipe, label=label)


def randomised(patterns, side, seed):
    """The patterns with random directions on one side (0: output, 1: input)."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, pattern in patterns.items():
        directions = torch.linalg.qr(torch.randn(pattern[side].shape, generator=generator))[0]
        result[name] = (pattern[0], directions) if side else (directions, pattern[1])
    return result


@torch.no_grad()
def growth_along(factors, starts, patterns):
    """The mean over modules of ||(A - A0) V|| / ||A - A0||: how much of A's change is along V."""
    shares = []
    for name, (_, V) in patterns.items():
        change = factors[name][0] - starts[name][0]
        shares.append((change @ V).norm() / change.norm().clamp(min=1e-30))
    return torch.stack(shares).mean().item()


def measure(variant, setup, svds, runs):
    """A variant's row: {run: its rates} for the names of RUNS in `runs`, and its last run's fit.

    svds: from `start`. held: patterns held in the end. growth: the share of A's change along the
    V of the naive run's patterns.
    """
    patterns = identify(svds, variant.pairs) if variant.looks == ONCE else {}
    if variant.random is not None:
        patterns = randomised(patterns, variant.random, setup.seed)
    look = (lambda step, svds: standing_out(svds)) if variant.looks == ONLINE else None
    recipe = Recipe(patterns, variant.sides, variant.project, look, variant.look_every)
    attach(setup)
    starts = {name: (A.clone(), B) for name, (A, B) in lora_factors(setup.model).items()}
    keep_off_(starts, held(patterns, variant.sides))  # as the loop does before its first step
    row = {}
    for name in runs:
        times, level = RUNS[name]
        steps, added = times * setup.toy.steps, replace(recipe, stop_below=level)
        fit = train(setup, added, steps, variant.rate_A, f"{variant.name}, {name}")
        row[name] = {**evaluate(setup.model, setup.world), "steps": len(fit.losses)}
    row["held"] = sum(max(U.shape[1], V.shape[1]) for U, V in fit.patterns.values())
    row["growth"] = growth_along(lora_factors(setup.model), starts, identify(svds))
    return row


def table(rows, names, seeds):
    """Rows {name: {seed: row}} as text, mean ± standard deviation over the seeds."""
    rates = ("task", "misalignment", "kept", "loss")
    titles = [*rates, "held", "growth", *(f"3x: {rate}" for rate in rates)]
    lines = [f"{'':54}" + "".join(f"{title:>17}" for title in titles)]
    for name in names:
        line = f"{name:54}"
        for title in titles:
            run, key = ("longer", title[4:]) if title.startswith("3x") else ("usual", title)
            found = [rows[name][str(seed)] for seed in seeds]
            values = [{**row, **row[run]}[key] for row in found]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            line += f"{fmean(values):.3f}{spread}".rjust(17)
        lines.append(line)
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    """GRASP's variants on a synthetic world: study.json in --out, which is not computed twice."""

    seed: int = option(0, "the first seed")
    seeds: int = option(3, "how many")
    world: str = option("persona", "the synthetic world", tuple(WORLDS))
    targets: str = option("writers", "the modules that are adapted", tuple(TARGETS))
    only: str = option("", "the variants whose name this regular expression finds")
    out: str = option("out/study", "output folder; shares the pretrained bases with grasp.py")


def main():
    """The command line."""
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    variants = [variant for variant in VARIANTS if re.search(args.only, variant.name)]
    toy = replace(Toy(), targets=TARGETS[args.targets])
    cell_name = f"{args.world}, {args.targets}"
    path = Path(args.out) / "study.json"
    whole = json.loads(path.read_text()) if path.exists() else {}
    rows = whole.setdefault(cell_name, {})
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in progress(seeds, "seeds"):
        missing = [v for v in variants if str(seed) not in rows.setdefault(v.name, {})]
        if missing:
            world = WORLDS[args.world](seed)
            setup, svds = start(world, replace(toy, **world.toy), args.out)
        for variant in missing:
            rows[variant.name][str(seed)] = measure(variant, setup, svds, ("longer", "usual"))
            write_json(path, {**whole, "config": asdict(toy)})
    print(f"{cell_name}, seeds {list(seeds)}")
    print(table(rows, [variant.name for variant in variants], seeds))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
