"""What the worlds of data/worlds.py are asked beside the table of `python grasp.py --world NAME`.

input_side: what it costs, where the task needs the factor, to keep the update from listening to it
(A V = 0) beside, or instead of, keeping it from saying it (U' B = 0). skew: drift and task over
rho. one_kept: of two factors, one is left out of the constraint on demand.
"""

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

from baselines.methods import METHODS, check
from baselines.stream import stream_subspace
from data.worlds import WORLDS
from eval import evaluate, persona_direction
from experiments.runs import Finished, attach, start, train
from grasp import Toy, add_found, before_training, run_method
from identify import identify, joined, spectra, standing_out
from lora import remove_lora
from model import response_loss
from real.settings import SEED, SEEDS
from support.errors import UserError
from support.options import option, parse
from support.program import run
from support.schema import Limits, from_json
from train import Recipe

RELIANCE = ("needs_factor", "needs_factor_new")
STRENGTHS = (0.5, 0.75, 1.0)  # rho


@torch.no_grad()
def deafen_(modules, inputs):
    """Make A V = 0 hold, module by module; inputs: {module name: V (in, k), orthonormal}."""
    for name, V in inputs.items():
        A = modules[name].lora_A.data
        A -= (A @ V) @ V.T


def deafening(modules, inputs):
    """A callback for every step: make A V = 0 hold for what `inputs` has by then."""

    def each(step):
        deafen_(modules, inputs)

    return each


@torch.no_grad()
def heard(module, U):
    """The input directions (in, n) of what the module's update says along U (out, n)."""
    return torch.linalg.qr(module.lora_A.data.T @ (module.lora_B.data.T @ U))[0]


def looks_at_both_sides(modules):
    """grasp_online with A V = 0 for what joins: (Recipe, each)."""
    inputs = {}

    def look(step, svds):
        found = standing_out(svds)
        new = {name: heard(modules[name], U) for name, U in found.items()}
        inputs.update(joined(inputs, new))
        return found

    return Recipe(look=look), deafening(modules, inputs)


def evaluated(bench, recipe, each=None, label="fine-tune"):
    """The world's rates and the loss after a fine-tune of the LoRA on the bench's model.

    early: the loss after a quarter of the steps, to see what a constraint costs in speed.
    """
    early = []

    def after_step(step):
        if each is not None:
            each(step)
        if step + 1 == bench.toy.steps // 4:
            with torch.no_grad():
                early.append(response_loss(bench.model, *bench.rows).item())

    train(bench, recipe, bench.toy.steps, after_step, label)
    return {**evaluate(bench.model, bench.world), "early": early[0]}


def input_side(bench):
    """{variant: rates}: each side alone and both, with one look and while training."""
    attach(bench)
    rows = {"naive": evaluated(bench, Recipe(), label="naive")}
    outputs = identify(bench.model)
    inputs = {name: V[:, :1] for name, (_, _, V) in spectra(bench.model).items()}
    for name, factor, deaf in (
        ("grasp: U'B = 0", outputs, {}),
        ("grasp: AV = 0", {}, inputs),
        ("grasp: both", outputs, inputs),
    ):
        each = deafening(attach(bench), deaf)
        each(None)  # A is random at the start
        rows[name] = evaluated(bench, Recipe(factor=factor), each, name)
    attach(bench)
    online = Recipe(look=lambda step, svds: standing_out(svds))
    rows["grasp_online: U'B = 0"] = evaluated(bench, online, label="grasp_online")
    recipe, each = looks_at_both_sides(attach(bench))
    rows["grasp_online: both"] = evaluated(bench, recipe, each, "grasp_online, both sides")
    return rows


def compare(bench, methods):
    """{method: rates}, as `python grasp.py` measures them, without the longer runs."""
    found, rows = before_training(bench), {}
    for method in methods:
        fit, rows[method], _ = run_method(bench, method, found)
        found = add_found(bench, method, fit, rows[method]["loss"], found)
    return rows


def without(U, d):
    """Of the span of U (out, k), the part (out, k - 1) orthogonal to the stream's direction d."""
    inside = U.T @ d  # (k,)
    basis = torch.linalg.qr(torch.cat((inside[:, None], torch.eye(len(inside))), 1))[0]
    return U @ basis[:, 1:]


def one_kept(bench):
    """{variant: rates} of two factors: both constrained, or one left out of the constraint.

    From the naive run's top two directions of each module. Which of them is which factor no weight
    says: here the supervised directions do, to leave one out on demand. "found": how much of each
    supervised direction lies in the two pooled directions (1: all of it).
    """
    attach(bench)
    rows = {"naive": evaluated(bench, Recipe(), label="naive")}
    pairs = identify(bench.model, 2)
    Q, _ = stream_subspace(spectra(bench.model), 2)
    remove_lora(bench.model)
    directions = []
    for factor in range(2):
        contrast = partial(bench.world.contrast, factor=factor)
        directions.append(persona_direction(bench.model, SimpleNamespace(contrast=contrast)))
    rows["naive"]["found"] = [(Q.T @ d).norm().item() for d in directions]
    constraints = {
        "one direction": {name: U[:, :1] for name, U in pairs.items()},
        "two directions": pairs,
        "two, first kept": {name: without(U, directions[0]) for name, U in pairs.items()},
        "two, second kept": {name: without(U, directions[1]) for name, U in pairs.items()},
    }
    for name, factor in constraints.items():
        attach(bench)
        rows[name] = evaluated(bench, Recipe(factor=factor), label=name)
    attach(bench)
    online = Recipe(look=lambda step, svds: standing_out(svds))
    rows["grasp_online"] = evaluated(bench, online, label="grasp_online")
    return rows


Rows = dict[str, dict[str, float | list[float]]]  # {variant: {rate or "found": ...}}


def measured_alike(rows, where):
    """UserError unless there are variants, the same in every row, and each has the same rates."""
    kinds = {tuple(row) for row in rows}
    rates = {frozenset(measured) - {"found"} for row in rows for measured in row.values()}
    if len(kinds) != 1 or len(rates) != 1 or kinds == {()} or rates == {frozenset()}:
        raise UserError(f"{where}: the rows do not have the same variants and rates")
    for row in rows:
        for variant, measured in row.items():
            for name, rate in measured.items():
                highest = None if name in ("loss", "seconds", "early") else 1
                if name != "found":
                    from_json(float, rate, where, Limits(0, highest), f"{variant}.{name}")


def table(rows):
    """Rows of {variant: rates}, one a seed, as text: mean and spread over the seeds."""
    first = next(iter(rows[0].values()))
    columns = [key for key in first if key not in ("found", "seconds")]
    lines = [f"{'':24}" + "".join(f"{column:>16}" for column in columns)]
    for variant in rows[0]:
        values = torch.tensor([[row[variant][c] for c in columns] for row in rows])
        spread = values.std(0) if len(values) > 1 else torch.zeros(len(columns))
        pairs = zip(values.mean(0).tolist(), spread.tolist(), strict=True)
        cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in pairs]
        lines.append(f"{variant:24}" + "".join(f"{text:>16}" for text in cells))
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    """Beside the table: the input side, the skew's strength, one of two factors kept on demand."""

    only: tuple = option(("input_side", "skew", "one_kept"), "comma-separated parts")
    seed: int = option(0, "the first seed", **SEED)
    seeds: int = option(1, "how many seeds", **SEEDS)
    methods: tuple = option(("naive", "grasp", "grasp_online"), "comma-separated, for skew")
    out: str = option("out/worlds", "the folder of the base models and of worlds.json")


def cells(args):
    """[(heading, world's name, its changed fields, bench -> rows)] that the options ask for."""
    chosen = []
    for part in args.only:
        if part == "input_side":
            chosen += [(f"{part}, {name}", name, {}, input_side) for name in RELIANCE]
        elif part == "skew":
            methods = [m for m in METHODS if m in args.methods or m == "naive"]
            by_method = partial(compare, methods=methods)
            chosen += [(f"skew, rho {rho}", "skew", {"rho": rho}, by_method) for rho in STRENGTHS]
        elif part == "one_kept":
            chosen.append((part, "two_factors", {}, one_kept))
        else:
            raise UserError(f"--only has '{part}', expected input_side, skew or one_kept")
    return chosen


def main():
    """The command line: each part's table, mean and spread over the seeds."""
    args = parse(Arguments)
    check(args.methods)
    torch.set_num_threads(1)
    settings = {"experiment": asdict(Toy()), "methods": args.methods, "torch": torch.__version__}
    path = Path(args.out) / "worlds.json"
    finished = Finished(path, settings, lambda key: Rows, "the worlds' measurements")
    for heading, name, changes, measured in cells(args):
        rows = []
        for seed in range(args.seed, args.seed + args.seeds):
            key = f"{heading}, seed {seed}"
            if key not in finished.rows:
                world = replace(WORLDS[name](seed), **changes)
                bench = start(world, Toy(**world.toy), args.out)
                finished.keep(key, measured(bench))
            rows.append(finished.rows[key])
        measured_alike(rows, f"{path}: {heading}")
        print(f"{heading}, {len(rows)} seeds\n{table(rows)}")


if __name__ == "__main__":
    run(main)
