"""What leaks where the gradient alone is projected, and what that does.

After one look, projecting the gradient alone leaves less misalignment than the exact constraint.
This says why. AdamW divides each coordinate of a projected gradient by that coordinate's own size,
so its step has a part along u again. That part points *away* from the factor: what is left of the
gradient, seen from u, has a few large coordinates on the naive run's side and many small ones on
the other, which balance; a step that makes all coordinates equally large counts them. Then the leak
is taken out of the trained weights, and turned around, to see what it was worth. All of it is ours.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from data.synthetic import World
from eval import evaluate
from experiments.runs import Finished, attach, start, train
from experiments.study import TARGETS, check_targets
from grasp import Toy
from identify import spectra, top_directions
from model import response_loss
from real.settings import SEED, SEEDS
from support.options import option, parse
from support.program import run
from support.schema import value
from train import Recipe, keep_off_, project_

RATES = {  # misalignment of
    "naive": "the naive run",
    "exact": "B projected, too (grasp)",
    "gradient": "the gradient alone projected",
    "removed": "... its leak taken out afterwards",
    "turned": "... its leak turned around",
}
COLUMNS = {
    **RATES,
    "leak": "u' dW v of the gradient alone over naive's, mean of the modules",
    "positive": "the share of modules in which that is above 0",
    "share": "coordinates on naive's side in the first step's gradient, share",
    "first_step": "u' step over its norm, in AdamW's first step",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured of one seed and one choice of modules."""

    naive: float = value(low=0, high=1)
    exact: float = value(low=0, high=1)
    gradient: float = value(low=0, high=1)
    removed: float = value(low=0, high=1)
    turned: float = value(low=0, high=1)
    leak: float = value()
    positive: float = value(low=0, high=1)
    share: float = value(low=0, high=1)
    first_step: float = value(low=-1, high=1)


def key_of(targets_name, seed):
    """A row's name in leak.json."""
    return f"{targets_name}, seed {seed}"


def first_step(bench, modules, svds):
    """(share, first_step) of COLUMNS, over the modules, before anything is trained.

    Column k of B moves naive's way along u where it moves by the sign of v' A_k; so each column is
    oriented. The projected descent D (out, r) has u' D = 0. AdamW's first step is its sign.
    """
    response_loss(bench.model, *bench.rows).backward()
    shares, steps = [], []
    for name, (U, _, V) in svds.items():
        u, v = U[:, :1], V[:, 0]
        descent = -modules[name].lora_B.grad
        project_(descent, u)
        oriented = descent * (modules[name].lora_A.data @ v).sign()  # (out, r)
        shares.append(((u * oriented) > 0).float().mean().item())
        step = oriented.sign()
        steps.append(((u.T @ step).sum() / (step.norm() * step.shape[1] ** 0.5)).item())
    bench.model.zero_grad()
    return fmean(shares), fmean(steps)


@torch.no_grad()
def leaked(modules, svds):
    """[u' dW v over naive's sigma1], one a module: below 0 where it undoes what naive did."""
    parts = []
    for name, (U, S, V) in svds.items():
        m = modules[name]
        said = U[:, 0] @ m.lora_B @ (m.lora_A @ V[:, 0])
        parts.append((m.scaling * said / S[0]).item())
    return parts


@torch.no_grad()
def turn_around(modules, before):
    """B less its leak, as it is now, to B less twice its leak. before: {name: B with the leak}."""
    for name, m in modules.items():
        m.lora_B += m.lora_B - before[name]


def measure(bench, targets):
    """One Row, as a dictionary."""

    def misalignment():
        return evaluate(bench.model, bench.world)["misalignment"]

    steps, row = bench.toy.steps, {}
    attach(bench, targets)
    train(bench, Recipe(), steps, label="naive")
    row["naive"] = misalignment()
    svds = spectra(bench.model)
    factor = top_directions(svds)

    modules = attach(bench, targets)
    row["share"], row["first_step"] = first_step(bench, modules, svds)
    train(bench, Recipe(factor=factor), steps, label="exact")
    row["exact"] = misalignment()

    modules = attach(bench, targets)
    train(bench, Recipe(factor=factor, project_B=False), steps, label="gradient alone")
    row["gradient"] = misalignment()
    parts = leaked(modules, svds)
    row["leak"] = fmean(parts)
    row["positive"] = fmean(part > 0 for part in parts)
    before = {name: m.lora_B.data.clone() for name, m in modules.items()}
    keep_off_(modules, factor)
    row["removed"] = misalignment()
    turn_around(modules, before)
    row["turned"] = misalignment()
    return row


def table(rows, targets_names, seeds):
    """The rows as text, mean ± standard deviation over the seeds."""
    lines = [f"{'':66}" + "".join(f"{name:>18}" for name in targets_names)]
    for column, title in COLUMNS.items():
        if column in RATES:
            title = f"misalignment, {title}"
        cells = []
        for name in targets_names:
            values = torch.tensor([rows[key_of(name, seed)][column] for seed in seeds])
            spread = f" ±{values.std():.3f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.3f}{spread}")
        lines.append(f"{title:66}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


@dataclass(frozen=True)
class Arguments:
    """What leaks where the gradient alone is projected: a table, and leak.json in --out."""

    seed: int = option(0, "the first seed", **SEED)
    seeds: int = option(3, "how many", **SEEDS)
    targets: tuple = option(tuple(TARGETS), f"comma-separated, of {', '.join(TARGETS)}")
    out: str = option("out", "output folder; shares the pretrained bases with grasp.py")


def main():
    """The command line."""
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    check_targets(args.targets)
    toy = Toy()
    path = Path(args.out) / "leak.json"
    config = {"experiment": asdict(toy), "torch": torch.__version__}
    finished = Finished(path, config, lambda key: Row, "the rows of an earlier run")
    seeds = range(args.seed, args.seed + args.seeds)
    for seed in seeds:
        missing = [name for name in args.targets if key_of(name, seed) not in finished.rows]
        if missing:
            bench = start(World(seed), toy, args.out)
            for name in missing:
                finished.keep(key_of(name, seed), measure(bench, TARGETS[name]))
    print(table(finished.rows, args.targets, seeds))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
