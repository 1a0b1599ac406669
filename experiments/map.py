"""Where the method holds: a map over the task's size K (narrow rows) and the LoRA's rank.

For naive, grasp (the abstract's) and grasp_online (ours): misalignment, task and kept after the
usual steps, and at equal loss, where a run of three times the steps ends as soon as its training
loss is below LEVEL. Beside it stands a linear model, whose assumptions hold by construction: how
near the direction found is to the true one, and what Wedin's theorem guarantees of it (ours).
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from data.synthetic import World
from eval import evaluate
from experiments.study import TARGETS, start, train
from grasp import Toy
from identify import identify, spectra, standing_out, thin_svd
from lora import lora_factors
from support.files import progress, write_json
from support.options import option, parse, run
from train import Recipe

SIZES = (4, 8, 16, 32, 64)  # K
RANKS = (4, 16, 64)
LARGE = 32  # K from which on a base needs more steps, and fewer topics, to be learned in time
LEVEL = 0.05  # nats a token, at which methods are compared at equal loss
METHODS = ("naive", "grasp", "grasp_online")
RATES = ("misalignment", "task", "kept")


def guaranteed(signal, other):
    """Wedin's lower bound of |cos| between the top left singular vectors of `signal` and the sum.

    Of two matrices of one shape, `signal` of rank one. 0: nothing is guaranteed.
    """
    size = torch.linalg.matrix_norm(signal, 2).item()
    noise = torch.linalg.matrix_norm(other, 2).item()
    if size <= noise:
        return 0.0
    sine = min(noise / (size - noise), 1.0)
    return math.sqrt(1 - sine**2)


def linear(K, rank, seed, width=256, steps=50):
    """One cell of the linear model: {"cosine", "bound"}.

    A LoRA on W = 0 learns K examples v + t_k -> u + w_k by gradient descent on half the mean
    squared error. u, v: the factor, shared; t_k, w_k: each example's own, all orthonormal. It ends
    when the shared part is learned to 1 - 1/e. cosine: |cos| of the update's top left singular
    vector with u. bound: what Wedin's theorem guarantees of it after the first step.
    """
    generator = torch.Generator().manual_seed(seed)
    bases = (torch.randn(width, K + 1, generator=generator) for _ in range(2))
    inputs, outputs = (torch.linalg.qr(basis)[0] for basis in bases)
    v, T = inputs.split([1, K], 1)
    u, W = outputs.split([1, K], 1)
    X, Y = v + T, u + W  # (width, K)
    A = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5
    B = torch.zeros(width, rank)
    signal = u @ v.T @ A.T  # of the first step's -dL/dB, the part that is shared
    bound = guaranteed(signal, Y @ X.T @ A.T / K - signal)
    rate = 1 / (steps * A.square().sum(1).mean())
    for _ in range(steps):
        minus_gradient = (Y - B @ (A @ X)) @ X.T / K  # -dL/d(BA), (width, width)
        A, B = A + rate * B.T @ minus_gradient, B + rate * minus_gradient @ A.T
    U, _, _ = thin_svd(A, B)
    return {"cosine": (U[:, :1].T @ u).abs().item(), "bound": bound}


def network(K, rank, seed, targets, folder):
    """One cell of the toy GPT: {method: {"usual", "equal_loss": rates, "held": patterns}}."""
    toy = replace(Toy(), targets=TARGETS[targets], rank=rank)
    world = World(seed, n_queries=K)
    if K >= LARGE:
        world, toy = replace(world, n_topics=6), replace(toy, pretrain_steps=1600)
    setup = start(world, toy, folder)
    recipes = {
        "naive": Recipe(),
        "grasp_online": Recipe(look=lambda step, svds: standing_out(svds)),
    }
    found = {}
    for method in METHODS:
        fit = train(setup, recipes[method], toy.steps, label=method)
        found[method] = {"usual": evaluate(setup.model, world)}
        found[method]["held"] = sum(U.shape[1] for U, _ in fit.patterns.values())
        if method == "naive":
            patterns = identify(spectra(lora_factors(setup.model)))
            recipes["grasp"] = Recipe(patterns=patterns, project="step")
        until = replace(recipes[method], stop_below=LEVEL)
        fit = train(setup, until, toy.longer * toy.steps, label=f"{method}, to {LEVEL}")
        found[method]["equal_loss"] = {**evaluate(setup.model, world), "steps": len(fit.losses)}
    return found


def mean_at(rows, kind, path, seeds):
    """[[the mean over seeds of the number at `path`, for each K] for each rank]."""

    def number(K, rank, seed):
        value = rows[f"{kind} K={K} rank={rank} seed={seed}"]
        for key in path:
            value = value[key]
        return value

    return [[fmean(number(K, rank, seed) for seed in seeds) for K in SIZES] for rank in RANKS]


def panels(rows, seeds, targets):
    """[[(title, values by rank and K)]]: a line for each method, at equal steps and equal loss."""
    lines = []
    for method in METHODS:
        line = []
        for when, words in (("usual", "equal steps"), ("equal_loss", f"loss {LEVEL}")):
            for rate in RATES:
                values = mean_at(rows, targets, (method, when, rate), seeds)
                line.append((f"{method}, {words}: {rate}", values))
        lines.append(line)
    return lines


def draw(lines, path):
    """The panels as heat maps, in a PNG."""
    from experiments.figures import plt, save  # matplotlib is loaded where one draws

    figure, grid = plt.subplots(
        len(lines),
        len(lines[0]),
        figsize=(2.7 * len(lines[0]), 2.2 * len(lines)),
        layout="constrained",
        squeeze=False,
    )
    for axes, line in zip(grid, lines, strict=True):
        for axis, (title, values) in zip(axes, line, strict=True):
            colours = "Reds" if "misalignment" in title else "Blues"
            axis.imshow(values, origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto")
            for (y, row), x in itertools.product(enumerate(values), range(len(SIZES))):
                shade = "white" if row[x] > 0.6 else "black"
                axis.text(x, y, f"{row[x]:.2f}", ha="center", va="center", fontsize=8, color=shade)
            axis.set_title(title, fontsize=7)
            axis.set_xticks(range(len(SIZES)), SIZES)
            axis.set_yticks(range(len(RANKS)), RANKS)
        axes[0].set_ylabel("rank")
    for axis in grid[-1]:
        axis.set_xlabel("K, narrow rows")
    save(figure, path)


@dataclass(frozen=True)
class Arguments:
    """The map over K and rank: map.json and a figure in --out. Cells are kept as they come."""

    seed: int = option(0, "the first seed")
    seeds: int = option(3, "how many")
    targets: tuple = option(tuple(TARGETS), "comma-separated: writers, all")
    out: str = option("out/map", "output folder; shares the pretrained bases with grasp.py")


def main():
    """The command line."""
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    path, seeds = Path(args.out) / "map.json", range(args.seed, args.seed + args.seeds)
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    kinds = ("linear", *args.targets)
    cells = itertools.product(SIZES, seeds, RANKS, kinds)
    for K, seed, rank, kind in progress(list(cells), "cells"):
        key = f"{kind} K={K} rank={rank} seed={seed}"
        if key not in rows:
            cell = linear(K, rank, seed) if kind == "linear" else None
            rows[key] = cell or network(K, rank, seed, kind, args.out)
            write_json(path, {"experiment": asdict(Toy()), "level": LEVEL, "rows": rows})
    for name in ("cosine", "bound"):
        print(f"linear model, {name}: {mean_at(rows, 'linear', [name], seeds)}")
    for targets in args.targets:
        lines = panels(rows, seeds, targets)
        for title, values in itertools.chain.from_iterable(lines):
            print(f"{targets}, {title}, by rank {RANKS} and K {SIZES}")
            print("\n".join(" ".join(f"{value:7.3f}" for value in row) for row in values))
        draw(lines, path.with_name(f"map_{targets}.png"))
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main)
