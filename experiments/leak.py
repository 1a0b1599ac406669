"""What leaks where the gradient alone is projected, and what that does.

After one look, projecting the gradient alone leaves less misalignment than the exact constraint.
AdamW divides each coordinate of a projected gradient by that coordinate's own size, so its step has
a part along u again: the leak. Here it is measured with its sign, taken out of the trained weights,
turned around, and, as a control, moved to a random direction. All of it is ours.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch

from data.synthetic import World
from eval import evaluate
from experiments.runs import Finished, Rates, attach, start, train
from experiments.study import TARGETS, cell, check_targets
from grasp import Toy
from identify import spectra, top_directions
from model import response_loss
from real.settings import SEED, SEEDS
from support.options import option, parse
from support.program import run
from support.schema import value
from train import Recipe, keep_off_, project_

RUNS = {
    "naive": "naive",
    "exact": "B projected, too (grasp)",
    "gradient": "the gradient alone projected",
    "removed": "... its leak taken out",
    "turned": "... its leak turned around",
    "moved": "... its leak moved to a random direction",
}
LEAKS = {
    "leak": "signed leak, mean of the modules",
    "positive": "share of modules whose leak is above 0",
    "first_step": "cosine of AdamW's first step with naive's direction",
    "naive_first_step": "... where the gradient is not projected",
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is measured of one seed and one choice of modules."""

    naive: Rates = value()
    exact: Rates = value()
    gradient: Rates = value()
    removed: Rates = value()
    turned: Rates = value()
    moved: Rates = value()
    leak: float = value()
    positive: float = value(low=0, high=1)
    first_step: float = value(low=-1, high=1)
    naive_first_step: float = value(low=-1, high=1)


def key_of(targets_name, seed):
    """A row's name in leak.json."""
    return f"{targets_name}, seed {seed}"


def first_steps(bench, modules, svds):
    """The cosine of AdamW's first step of B with naive's direction u (A v)', mean of the modules.

    Of the projected gradient, and of the gradient as it is: (first_step, naive_first_step). The
    first step is the gradient's sign, downhill. u, v: naive's top singular vectors.
    """
    response_loss(bench.model, *bench.rows).backward()
    projected, whole = [], []
    for name, (U, _, V) in svds.items():
        direction = U[:, :1] @ (modules[name].lora_A.data @ V[:, :1]).T  # (out, r), of rank one
        descent = -modules[name].lora_B.grad
        whole.append(cosine(descent.sign(), direction))
        project_(descent, U[:, :1])
        projected.append(cosine(descent.sign(), direction))
    bench.model.zero_grad()
    return fmean(projected), fmean(whole)


def cosine(X, Y):
    """The cosine of two matrices of one shape, as vectors."""
    return ((X * Y).sum() / (X.norm() * Y.norm())).item()


@torch.no_grad()
def signed_leaks(modules, svds):
    """[u' dW v over naive's sigma1], one a module: 1 for naive itself, below 0 the other way."""
    parts = []
    for name, (U, S, V) in svds.items():
        m = modules[name]
        said = U[:, 0] @ m.lora_B @ (m.lora_A @ V[:, 0])
        parts.append((m.scaling * said / S[0]).item())
    return parts


@torch.no_grad()
def put_back(modules, leaks, factor, seed):
    """Add each module's leak U'B (k, r) along random directions that are orthogonal to U (out, k).

    The size is kept, and what A makes of it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, U in factor.items():
        random = torch.randn(U.shape, generator=generator)
        project_(random, U)
        modules[name].lora_B += torch.linalg.qr(random)[0] @ leaks[name]


def measure(bench, targets):
    """One Row, as a dictionary."""

    def rates():
        measured = evaluate(bench.model, bench.world)
        return {name: measured[name] for name in ("task", "misalignment", "kept")}

    steps, row = bench.toy.steps, {}
    attach(bench, targets)
    train(bench, Recipe(), steps, label="naive")
    row["naive"] = rates()
    svds = spectra(bench.model)
    factor = top_directions(svds)

    modules = attach(bench, targets)
    row["first_step"], row["naive_first_step"] = first_steps(bench, modules, svds)
    train(bench, Recipe(factor=factor), steps, label="exact")
    row["exact"] = rates()

    modules = attach(bench, targets)
    train(bench, Recipe(factor=factor, project_B=False), steps, label="gradient alone")
    row["gradient"] = rates()
    parts = signed_leaks(modules, svds)
    row["leak"] = fmean(parts)
    row["positive"] = fmean(part > 0 for part in parts)
    leaks = {name: U.T @ modules[name].lora_B.data for name, U in factor.items()}
    for change in ("removed", "turned"):  # once: none is left; twice: as much, the other way
        for name, U in factor.items():
            modules[name].lora_B.data -= U @ leaks[name]
        row[change] = rates()
    keep_off_(modules, factor)
    put_back(modules, leaks, factor, bench.seed)
    row["moved"] = rates()
    return row


def table(rows, targets_names, seeds):
    """The rows as text, mean ± standard deviation over the seeds."""
    lines = []
    for targets in targets_names:
        found = [rows[key_of(targets, seed)] for seed in seeds]
        lines.append(f"{targets:55}{'task':>16}{'misalignment':>16}{'kept':>16}")
        for run_name, title in RUNS.items():
            columns = [
                [row[run_name][c] for row in found] for c in ("task", "misalignment", "kept")
            ]
            lines.append(f"{title:55}" + "".join(f"{cell(column):>16}" for column in columns))
        for name, title in LEAKS.items():
            lines.append(f"{title:55}{cell([row[name] for row in found]):>16}")
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
