"""Where identification works: over the task's complexity K and the spurious strength rho, in a linear model and in the toy GPT.

The linear model is the one of docs/derivation.md, where the assumptions hold by construction; the GPT is `python grasp.py`'s.
"""
import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import figures
from cli import Progress, option, parse, read_json, run, write_json
from data.synthetic import World
from eval import evaluate, persona_direction
from grasp import Toy
from identify import in_rounds, stream_subspace, thin_svd
from lora import remove_lora
from study import Bench

STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0)
LINEAR, NETWORK = (4, 8, 16, 32, 64, 128), (4, 8, 16, 32)  # K


def linear(K, rho, seed, width=256, rank=16, steps=50):
    """A LoRA on W = 0 learns K examples x_k = v + t_k -> y_k = m_k u + w_k by gradient descent on half the mean squared error.

    u, v: the factor, shared; t_k, w_k: each example's own, all orthonormal; m_k: 1 for a share rho of the examples, else 0. It ends
    when the shared part is learned to 1 - 1/e, and an example's own to about 1/K. Returns |cos| of the update's top left singular
    vector with u, and what Wedin's theorem guarantees of it after the first step (0: nothing)."""
    generator = torch.Generator().manual_seed(seed)
    orthonormal = lambda: torch.linalg.qr(torch.randn(width, K + 1, generator=generator))[0].split([1, K], 1)
    (v, T), (u, W) = orthonormal(), orthonormal()
    shared = (torch.arange(K) < round(rho * K)).float()  # m
    X, Y = v + T, u * shared + W  # (width, K)
    A, B = (torch.rand(rank, width, generator=generator) * 2 - 1) / width ** 0.5, torch.zeros(width, rank)
    signal = shared.mean() * u @ v.T @ A.T  # of the first step's -dL/dB = Y X' A' / K; all else is in the way
    other = Y @ X.T @ A.T / K - signal
    size, noise = torch.linalg.matrix_norm(signal, 2), torch.linalg.matrix_norm(other, 2)
    sine = min((noise / (size - noise)).item(), 1.0) if size > noise else 1.0
    rate = 1 / (steps * A.square().sum(1).mean())
    for _ in range(steps):
        gradient = (Y - B @ (A @ X)) @ X.T / K  # -dL/d(BA)
        A, B = A + rate * B.T @ gradient, B + rate * gradient @ A.T
    return {"cosine": (thin_svd(A, B)[0][:, 0] @ u).abs().item(), "bound": math.sqrt(1 - sine ** 2)}


def network(K, rho, seed, folder):
    """The synthetic task with K narrow queries, a share rho of them answered badly."""
    world = World(seed, n_queries=K, rho=rho)
    bench, result = Bench(world, folder), {}

    def one_round(i, factor, steps):
        svds = bench.train(factor, steps)
        if i == 0:
            result["naive"] = evaluate(bench.model, world)
        return svds
    factor, svds = in_rounds(one_round, bench.toy.rounds, bench.toy.steps)
    bench.train(factor)
    result["grasp"] = evaluate(bench.model, world)
    direction = persona_direction(remove_lora(bench.model), world)
    return {**result, "cosine": (stream_subspace(svds[0])[0][:, 0] @ direction).abs().item()}


@dataclass(frozen=True)
class Arguments:
    """The phase diagram: phase.json and phase.png in --out. Cells that are in phase.json are not computed again."""
    seed: int = option(0, "the first seed")
    seeds: int = option(3, "how many")
    out: str = option("out", "output folder; shares the pretrained bases with grasp.py")


def main():
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    path, seeds = Path(args.out) / "phase.json", range(args.seed, args.seed + args.seeds)
    config = json.loads(json.dumps({"experiment": asdict(Toy()), "torch": torch.__version__}))
    earlier = read_json(path, "an earlier phase diagram") if path.exists() else {}
    cells = earlier.get("cells", {}) if earlier.get("config") == config else {}
    plan = [(kind, K, rho, seed) for kind, sizes in (("linear", LINEAR), ("network", NETWORK))
            for K, seed, rho in itertools.product(sizes, seeds, STRENGTHS)]
    progress = Progress(len(plan), "cells")
    for kind, K, rho, seed in plan:
        key = f"{kind} K={K} rho={rho} seed={seed}"
        if key not in cells:
            cells[key] = linear(K, rho, seed) if kind == "linear" else network(K, rho, seed, args.out)
            write_json(path, {"config": config, "cells": cells})
        progress.update()
    mean = lambda kind, sizes, read: [[sum(read(cells[f"{kind} K={K} rho={rho} seed={seed}"]) for seed in seeds) / len(seeds)
                                       for K in sizes] for rho in STRENGTHS]
    maps = [("linear model: |cos(found, true)|", LINEAR, mean("linear", LINEAR, lambda cell: cell["cosine"])),
            ("linear model: guaranteed by the bound", LINEAR, mean("linear", LINEAR, lambda cell: cell["bound"])),
            ("GPT: |cos(found, supervised)|", NETWORK, mean("network", NETWORK, lambda cell: cell["cosine"])),
            ("GPT: misalignment, naive", NETWORK, mean("network", NETWORK, lambda cell: cell["naive"]["misalignment"])),
            ("GPT: misalignment, GRASP", NETWORK, mean("network", NETWORK, lambda cell: cell["grasp"]["misalignment"]))]
    for title, sizes, rows in maps:
        print(f"{title}\n{'rho':>8}" + "".join(f"{f'K={K}':>8}" for K in sizes))
        for rho, row in reversed(list(zip(STRENGTHS, rows))):
            print(f"{rho:8}" + "".join(f"{value:8.3f}" for value in row))
    figures.phase(maps, STRENGTHS, Path(args.out) / "phase.png")
    print(f"wrote {path} and {args.out}/phase.png")


if __name__ == "__main__":
    run(main)
