"""Where the method holds: a map over the task's size K (narrow rows) and the LoRA's rank.

For naive, grasp (the abstract's) and grasp_online (ours), after the usual steps and at equal loss:
a run of three times the steps ends as soon as its training loss is below LEVEL. Beside it stands
what Theorem 1 of docs/theory.md guarantees of the direction found (ours, for a linear model).
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import fmean

import torch

from data.synthetic import World
from experiments.figures import Figure, save
from experiments.study import LEVEL, ONCE, ONLINE, TARGETS, Variant, measure, start
from experiments.theory import first_step_bound, parts_bound
from grasp import Toy
from support.files import progress, write_json
from support.options import option, parse, run

SIZES = (4, 16, 48)  # K
RANKS = (4, 16, 64)
METHODS = (
    Variant("naive"),
    Variant("grasp", ONCE),
    Variant("grasp_online", ONLINE, project="both"),
)
RUNS = {"usual": "equal steps", "equal_loss": f"loss {LEVEL}"}
RATES = ("misalignment", "task", "kept")


def guaranteed(K, rank, width=Toy.d_model):
    """The least |cos| of the found output direction with the true one, by Theorem 1; 0: nothing."""
    sine = first_step_bound(parts_bound(K, 1.0, 0.0), rank, width)
    return math.sqrt(max(1 - sine**2, 0.0))


def measure_cell(K, rank, seed, targets, folder):
    """{method: its row} of the toy GPT at one K and rank; see study.measure."""
    toy = replace(Toy(), targets=TARGETS[targets], rank=rank)
    world = World(seed, n_queries=K)
    if K >= 32:  # its base needs more steps, and fewer topics, to be learned in time
        world, toy = replace(world, n_topics=6), replace(toy, pretrain_steps=1600)
    setup, svds = start(world, toy, folder)
    return {method.name: measure(method, setup, svds, RUNS) for method in METHODS}


def panels(rows, targets, seeds):
    """[(title, [[mean over seeds for each K] for each rank])], for each method as many."""
    found = []
    for method, (when, words), rate in product(METHODS, RUNS.items(), RATES):
        values = []
        for rank in RANKS:
            cells = [[rows[f"{targets} K={K} rank={rank} seed={s}"] for s in seeds] for K in SIZES]
            values.append([fmean(row[method.name][when][rate] for row in cell) for cell in cells])
        found.append((f"{method.name}, {words}: {rate}", values))
    return found


def draw(found, path):
    """The panels as heat maps, a line for each method, in a PNG."""
    shape = len(METHODS), len(found) // len(METHODS)
    figure = Figure(figsize=(2.7 * shape[1], 2.2 * shape[0]), layout="constrained")
    for axis, (title, values) in zip(figure.subplots(*shape).flat, found, strict=True):
        colours = "Reds" if "misalignment" in title else "Blues"
        axis.imshow(values, origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto")
        for (y, row), x in product(enumerate(values), range(len(SIZES))):
            shade = "white" if row[x] > 0.6 else "black"
            axis.text(x, y, f"{row[x]:.2f}", ha="center", va="center", fontsize=8, color=shade)
        axis.set_title(title, fontsize=8)
        axis.set(xlabel="K, narrow rows", xticks=range(len(SIZES)), xticklabels=SIZES)
        axis.set(ylabel="rank", yticks=range(len(RANKS)), yticklabels=RANKS)
        axis.label_outer()
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
    cells = list(product(SIZES, seeds, RANKS, args.targets))
    for K, seed, rank, targets in progress(cells, "cells"):
        key = f"{targets} K={K} rank={rank} seed={seed}"
        if key not in rows:
            rows[key] = measure_cell(K, rank, seed, targets, args.out)
            write_json(path, {"experiment": asdict(Toy()), "level": LEVEL, "rows": rows})
    for targets in args.targets:
        draw(panels(rows, targets, seeds), path.with_name(f"map_{targets}.png"))
    for rank in RANKS:
        bounds = ", ".join(f"{guaranteed(K, rank):.2f}" for K in SIZES)
        print(f"|cos| that Theorem 1 guarantees at rank {rank} and K {SIZES}: {bounds}")
    print(f"wrote {path} and its figures")


if __name__ == "__main__":
    run(main)
