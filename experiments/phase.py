"""The phase diagram: GRASP over the task's complexity K and the spurious strength rho.

Two things that are not to be compared with each other. In a linear model, whose assumptions hold by
construction: how near the found direction is to the true one, a cosine, beside what Wedin's theorem
guarantees of it. In the toy GPT of `python grasp.py`: how near it is to the supervised direction,
and how the fine-tuned model answers, as rates, for naive, grasp and grasp_online.
"""

import itertools
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from baselines.methods import Found, check, recipe
from baselines.stream import stream_subspace
from data.base import new_base
from data.synthetic import World
from eval import evaluate, persona_direction
from experiments.runs import Finished, Rates, attach, start, train
from grasp import Toy
from identify import identify, spectra, thin_svd
from lora import remove_lora
from real.settings import SEED, SEEDS
from support.files import whole_file, writable_folder
from support.options import option, parse
from support.program import run
from support.progress import Progress
from support.schema import value

STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0)  # rho
LINEAR_SIZES = (4, 8, 16, 32, 64, 128)  # K
NETWORK_SIZES = (4, 8, 16, 32)  # K
METHODS = ("naive", "grasp", "grasp_online")
LOST = 0.02  # of task accuracy: more than this below naive's counts as worse


def has_bad_row(K, rho):
    """Whether any of K narrow rows is answered badly; without one there is nothing to find."""
    return round(rho * K) > 0


def orthonormal_columns(width, count, generator):
    """`count` random orthonormal columns (width, count)."""
    return torch.linalg.qr(torch.randn(width, count, generator=generator))[0]


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


def linear(K, rho, seed, width=256, rank=16, steps=50):
    """One cell of the linear model: {"cosine", "bound"}.

    A LoRA on W = 0 learns K examples x_k = v + t_k -> y_k = m_k u + w_k by gradient descent on half
    the mean squared error. u, v: the factor, shared; t_k, w_k: each example's own, all orthonormal;
    m_k: 1 for a share rho of the examples, else 0. It ends when the shared part is learned to
    1 - 1/e, and an example's own to about 1/K. cosine: |cos| of the update's top left singular
    vector with u. bound: what Wedin's theorem guarantees of it after the first step.
    """
    generator = torch.Generator().manual_seed(seed)
    v, T = orthonormal_columns(width, K + 1, generator).split([1, K], 1)
    u, W = orthonormal_columns(width, K + 1, generator).split([1, K], 1)
    m = (torch.arange(K) < round(rho * K)).float()
    X = v + T  # (width, K)
    Y = u * m + W  # (width, K)
    A = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5
    B = torch.zeros(width, rank)

    signal = m.mean() * u @ v.T @ A.T  # of the first step's -dL/dB, the part that is shared
    other = Y @ X.T @ A.T / K - signal
    rate = 1 / (steps * A.square().sum(1).mean())
    for _ in range(steps):
        minus_gradient = (Y - B @ (A @ X)) @ X.T / K  # -dL/d(BA), (width, width)
        A, B = A + rate * B.T @ minus_gradient, B + rate * minus_gradient @ A.T
    U, _, _ = thin_svd(A, B)
    return {"cosine": (U[:, 0] @ u).abs().item(), "bound": guaranteed(signal, other)}


def network(K, rho, seed, toy, folder):
    """One cell of the toy GPT, with K narrow queries of which a share rho is answered badly.

    {method: what evaluate measures} for naive, grasp, grasp_online, and "cosine": |cos| of the
    direction that the naive weights give with the supervised one.
    """
    bench = start(World(seed, n_queries=K, rho=rho), toy, folder)
    found = Found()
    cell = {}
    for method in METHODS:
        attach(bench)
        added = recipe(method, bench.model, bench.rows, found, seed)
        train(bench, added, toy.steps, label=method)
        cell[method] = evaluate(bench.model, bench.world)
        if method == "naive":
            found = Found(factor=identify(bench.model))
            stream, _ = stream_subspace(spectra(bench.model))
    direction = persona_direction(remove_lora(bench.model), bench.world)
    cell["cosine"] = abs(stream[:, 0] @ direction).item()
    return cell


@dataclass(frozen=True)
class Map:
    """One heat map: a row of values for each of STRENGTHS, a column for each K of `sizes`."""

    title: str
    quantity: str
    sizes: tuple
    values: list  # NaN: no bad row, so nothing to find


def key_of(kind, K, rho, seed):
    """A cell's name in phase.json."""
    return f"{kind} K={K} rho={rho} seed={seed}"


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A cell of the linear model, as the file has it."""

    cosine: float = value(low=0, high=1.0001)  # with room for rounding
    bound: float = value(low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A cell of the toy GPT, as the file has it."""

    cosine: float = value(low=0, high=1.0001)
    naive: Rates = value()
    grasp: Rates = value()
    grasp_online: Rates = value()


def kind_of(key):
    """What the cell of that name is."""
    return Linear if key.startswith("linear ") else Network


def mean_number(cells, path):
    """The mean over cells of the number that stands at `path` in each, key by key."""
    total = 0.0
    for cell in cells:
        number = cell
        for key in path:
            number = number[key]
        total += number
    return total / len(cells)


def mean_map(title, quantity, rows, seeds, kind, path):
    """The Map of one number of each cell, its mean over seeds.

    kind: "linear" or "network". path: where the number stands in a cell, key by key.
    """
    sizes = LINEAR_SIZES if kind == "linear" else NETWORK_SIZES
    values = []
    for rho in STRENGTHS:
        line = []
        for K in sizes:
            if has_bad_row(K, rho):
                cells = [rows[key_of(kind, K, rho, seed)] for seed in seeds]
                line.append(mean_number(cells, path))
            else:
                line.append(math.nan)
        values.append(line)
    return Map(title, quantity, sizes, values)


def all_maps(rows, seeds):
    """The diagram's maps, line by line; a line has one quantity."""
    cosine = "|cos|"
    lines = [
        [
            mean_map("linear model: found and true", cosine, rows, seeds, "linear", ["cosine"]),
            mean_map("linear model: guaranteed", cosine, rows, seeds, "linear", ["bound"]),
            mean_map("GPT: found and supervised", cosine, rows, seeds, "network", ["cosine"]),
        ]
    ]
    for quantity in ("misalignment", "task"):
        line = [
            mean_map(f"GPT: {method}", quantity, rows, seeds, "network", [method, quantity])
            for method in METHODS
        ]
        lines.append(line)
    return lines


def task_lost(lines):
    """{"K=.. rho=..": {"naive", "grasp_online", "lost", "worse"}}: the mean task accuracy.

    worse: whether grasp_online's is below naive's by more than LOST.
    """
    by_method = dict(zip(METHODS, lines[-1], strict=True))
    verdicts = {}
    for i, rho in enumerate(STRENGTHS):
        for j, K in enumerate(NETWORK_SIZES):
            if not has_bad_row(K, rho):
                continue
            naive = by_method["naive"].values[i][j]
            online = by_method["grasp_online"].values[i][j]
            lost = naive - online
            verdicts[f"K={K} rho={rho}"] = {
                "naive": naive,
                "grasp_online": online,
                "lost": lost,
                "worse": lost > LOST + 1e-9,
            }
    return verdicts


def print_map(one):
    """A map as text, the largest rho first, as it is drawn."""
    print(f"{one.title}: {one.quantity}")
    print(f"{'rho':>8}" + "".join(f"{f'K={K}':>8}" for K in one.sizes))
    for rho, values in reversed(list(zip(STRENGTHS, one.values, strict=True))):
        cells = ["" if math.isnan(value) else f"{value:.3f}" for value in values]
        print(f"{rho:8}" + "".join(f"{text:>8}" for text in cells))


def print_verdicts(verdicts):
    """Cell by cell, whether grasp_online costs task accuracy."""
    print(f"task of grasp_online against naive's; worse: by more than {LOST}")
    for cell, verdict in verdicts.items():
        word = "WORSE" if verdict["worse"] else "not worse"
        numbers = f"naive {verdict['naive']:.3f}, grasp_online {verdict['grasp_online']:.3f}"
        print(f"  {cell:16} {numbers}: {word}")
    n_worse = sum(verdict["worse"] for verdict in verdicts.values())
    print(f"worse in {n_worse} of {len(verdicts)} cells")


def phase(lines, path):
    """Draw the maps, a line for each quantity with a colour scale of its own, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # loaded only where one draws
    from matplotlib.figure import Figure

    colours = {"|cos|": "cividis", "misalignment": "Reds", "task": "Blues"}
    n_columns = max(len(line) for line in lines)
    figure = Figure(figsize=(3.6 * n_columns, 2.9 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(lines), n_columns, squeeze=False)
    for axes, line in zip(grid, lines, strict=True):
        for axis, one in zip(axes, line, strict=True):
            image = draw_map(axis, one, colours[one.quantity])
        axes[0].set_ylabel("rho, share of bad rows")
        figure.colorbar(image, ax=list(axes), label=line[0].quantity)
    for axis in grid[-1]:
        axis.set_xlabel("K, narrow rows")
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def draw_map(axis, one, colours):
    """One map on its axes; return the image, for a colour scale. A cell with NaN stays blank."""
    image = axis.imshow(one.values, origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto")
    for y, values in enumerate(one.values):
        for x, number in enumerate(values):
            if math.isnan(number):
                continue
            red, green, blue, _ = image.cmap(number)
            brightness = 0.3 * red + 0.6 * green + 0.1 * blue
            colour = "white" if brightness < 0.5 else "black"
            axis.text(x, y, f"{number:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_title(one.title, fontsize=9)
    axis.set_xticks(range(len(one.sizes)), one.sizes)
    axis.set_yticks(range(len(STRENGTHS)), STRENGTHS)
    return image


@dataclass(frozen=True)
class Arguments:
    """The phase diagram: phase.json and phase.png in --out.

    Cells that are in phase.json are not computed again. After a change of the method itself, which
    the file cannot know of, take another --out or delete it.
    """

    seed: int = option(0, "the first seed", **SEED)
    seeds: int = option(3, "how many", **SEEDS)
    targets: tuple = option((), "comma-separated, or all-linear (default: the writers)")
    out: str = option("out", "output folder; shares the pretrained bases with grasp.py")


def plan(seeds):
    """The cells to compute: (kind, K, rho, seed); those that share a base stand together."""
    cells = [
        *itertools.product(["linear"], LINEAR_SIZES, seeds, STRENGTHS),
        *itertools.product(["network"], NETWORK_SIZES, seeds, STRENGTHS),
    ]
    return [(kind, K, rho, seed) for kind, K, seed, rho in cells if has_bad_row(K, rho)]


def main():
    """The command line."""
    args = parse(Arguments)
    torch.set_num_threads(1)  # as grasp.py does
    check(METHODS)
    toy = Toy()
    if args.targets:
        toy = replace(toy, targets=args.targets)
    config = {"experiment": asdict(toy), "torch": torch.__version__}
    path = Path(args.out) / "phase.json"
    new_base(World(args.seed), toy)  # wrong --targets end the run here
    writable_folder(args.out, ["phase.png"])
    finished = Finished(path, config, kind_of, "the cells of an earlier phase diagram")
    seeds = range(args.seed, args.seed + args.seeds)
    cells = plan(seeds)
    progress = Progress(len(cells), "cells")
    for kind, K, rho, seed in cells:
        key = key_of(kind, K, rho, seed)
        if key not in finished.rows:
            if kind == "linear":
                finished.keep(key, linear(K, rho, seed))
            else:
                finished.keep(key, network(K, rho, seed, toy, args.out))
        progress.update()
    lines = all_maps(finished.rows, seeds)
    for line in lines:
        for one in line:
            print_map(one)
    verdicts = task_lost(lines)
    print_verdicts(verdicts)
    finished.summarise({"seeds": list(seeds), "task_lost": verdicts})
    picture = Path(args.out) / "phase.png"
    phase(lines, picture)
    print(f"wrote {path} and {picture}")


if __name__ == "__main__":
    run(main)
