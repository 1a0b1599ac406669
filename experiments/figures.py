"""The experiment's figures: Okabe and Ito's colours, and a marker of its own for each method."""

import numpy as np
from matplotlib.figure import Figure

from identify import LOOK_RANK, null_quantile
from support.files import whole_file

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = {  # colour, marker, label
    "base": ("#999999", "X", "base, before fine-tuning"),
    "naive": ("#000000", "o", "naive LoRA"),
    "grasp": ("#0072B2", "s", "GRASP (abstract: one look)"),
    "grasp_online": ("#D55E00", "*", "GRASP online (ours)"),
    "grasp_random": ("#56B4E9", "v", "random patterns (control)"),
    "grasp_gradient_only": ("#E69F00", "^", "GRASP, gradients only"),
    "ablate_train": ("#CC79A7", "P", "ablation in training"),
    "ablate_inference": ("#CC79A7", "p", "ablation at inference"),
    "steer_train": ("#009E73", "D", "steering in training"),
    "kl": ("#F0E442", "h", "KL to base (extra data)"),
    "early_stop": ("#000000", "<", "naive, stopped early"),
}


def style(method):
    """(colour, marker, label) of a method; grey where it has none of its own."""
    return STYLES.get(method, ("#999999", ">", method))


def panels(n, width, height, **shared):
    """(figure, its n axes side by side), in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")  # a file: no window
    return figure, figure.subplots(1, n, **shared)


def save(figure, path, labelled=None):
    """Write a figure as PNG; the labels of the axis `labelled` stand beside the axes."""
    if labelled:
        labels = labelled.get_legend_handles_labels()
        figure.legend(*labels, loc="outside right center", fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def spectrum(run, path):
    """One seed: the naive update's singular values, and grasp_online's looks, by module."""
    figure, (left, right) = panels(2, 11, 4.2)
    looks = run["looks"]["grasp_online"]
    steps = [look["step"] for look in looks]
    for i, (name, S) in enumerate(run["spectra"].items()):
        line = {"color": COLOURS[i % 7], "ls": ("-", "--", ":", "-.")[i // 7 % 4], "lw": 1}
        left.plot(range(1, len(S[:8]) + 1), S[:8], marker=".", label=name, **line)
        spikes = [look["spike"][name] for look in looks]
        joins = [name in look["joined"] for look in looks]
        right.plot(steps, spikes, marker="*", ms=10, mec="black", markevery=joins, **line)
    right.axhline(null_quantile(min(len(S), LOOK_RANK)), color="0.7", lw=2, zorder=0)
    left.set(title="naive LoRA, at its end", yscale="log", xlabel="index", ylabel="singular value")
    right.set(title="GRASP online (ours); star: joins the constraint", xlabel="fine-tuning step")
    right.set(ylabel="spike; grey: 99 % of random matrices are below")
    save(figure, path, left)


def training(runs, path):
    """Mean over seeds (band: their range) of misalignment and task while fine-tuning."""
    figure, axes = panels(2, 11, 3.8, sharey=True)
    for method in runs[0]["curves"]:
        colour, marker, label = style(method)
        steps, *rates = np.transpose([run["curves"][method] for run in runs])  # (points, seeds)
        for axis, y in zip(axes, rates, strict=True):
            axis.plot(steps[:, 0], y.mean(1), color=colour, marker=marker, label=label)
            axis.fill_between(steps[:, 0], y.min(1), y.max(1), color=colour, alpha=0.15, lw=0)
    axes[0].set(xlabel="fine-tuning step", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="fine-tuning step", ylabel="accuracy on the narrow task")
    save(figure, path, axes[0])


def marks(axis, look, x, y):
    """A method, drawn as `style` says: small marks for its seeds, a large one for their mean."""
    colour, marker, label = look
    axis.scatter(x, y, 14, colour, marker, alpha=0.35, lw=0)
    size = 190 if marker == "*" else 75
    axis.scatter(np.mean(x), np.mean(y), size, colour, marker, ec="black", lw=0.7, label=label)


def tradeoff(runs, path):
    """[per seed {method: measurements}]: misalignment over task, and over kept."""
    figure, axes = panels(2, 11, 4.2, sharey=True)
    for method in runs[0]:
        task, kept, y = ([run[method][k] for run in runs] for k in ("task", "kept", "misalignment"))
        marks(axes[0], style(method), task, y)
        marks(axes[1], style(method), kept, y)
    axes[0].set(xlabel="accuracy on the narrow task", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="kept: explicit persona obeyed on unrelated prompts")
    save(figure, path, axes[0])
