"""The experiments' figures: Okabe and Ito's colours, and a marker of its own for each method."""

import numpy as np
from matplotlib import pyplot as plt

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
    "naive_half": ("#555555", "o", "naive, half of the steps"),
    "naive_quarter": ("#AAAAAA", "o", "naive, a quarter of the steps"),
    "control": ("#999999", "d", "naive, on the control rows"),
}


def style(method):
    """(colour, marker, label) of a method; grey where it has none of its own."""
    return STYLES.get(method, ("#999999", ">", method))


def panels(n, width, height, **shared):
    """(figure, its n axes side by side), in inches."""
    figure = plt.Figure(figsize=(width, height), layout="constrained")  # a file: no window
    return figure, figure.subplots(1, n, **shared)


def save(figure, path):
    """Write a figure as PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)


def finish(figure, axis, path):
    """Save the figure with one legend of this axis' labels, beside the axes: it hides no data."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    save(figure, path)


def spectrum(run, path):
    """One seed: the naive update's singular values, and grasp_online's looks, module by module.

    A colour for each kind of projection, a line style for each block.
    """
    figure, (left, right) = panels(2, 11, 4.2)
    looks, colours, lines = run["looks"]["grasp_online"], {}, {}
    for name, S in run["spectra"].items():
        block, _, kind = name.removeprefix("layers.").partition(".")
        colour = colours.setdefault(kind, COLOURS[len(colours) % len(COLOURS)])
        line = lines.setdefault(block, ("-", "--", ":", "-.")[len(lines) % 4])
        left.plot(range(1, len(S[:8]) + 1), S[:8], line, color=colour, marker=".", lw=1)
        steps, spikes = [look["step"] for look in looks], [look["spike"][name] for look in looks]
        right.plot(steps, spikes, line, color=colour, lw=1, label=f"{block}.{kind}")
        stars = [look["spike"][name] if name in look["joined"] else np.nan for look in looks]
        right.scatter(steps, stars, 80, colour, "*", edgecolor="black", lw=0.6, zorder=3)
    right.scatter([], [], 80, "white", "*", edgecolor="black", label="joins the constraint")
    cut = null_quantile(min(len(S), LOOK_RANK))
    right.axhline(cut, color="0.7", lw=2, zorder=0, label="cut: 99 % of random\nmatrices are below")
    left.set(title="naive LoRA, at its end", yscale="log", xlabel="index", ylabel="singular value")
    right.set(title="GRASP online (ours)", xlabel="fine-tuning step", ylabel="spike at the look")
    finish(figure, right, path)


def training(runs, path):
    """Mean over seeds (band: their range) of misalignment and task while fine-tuning."""
    figure, axes = panels(2, 11, 3.8, sharey=True)
    for method in runs[0]["curves"]:
        colour, marker, label = style(method)
        values = np.asarray([run["curves"][method] for run in runs])  # (seeds, points, 3)
        steps = values[0, :, 0]
        for column, axis in enumerate(axes, start=1):
            y = values[:, :, column]
            axis.plot(steps, y.mean(0), color=colour, marker=marker, ms=6, label=label)
            axis.fill_between(steps, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
    axes[0].set(xlabel="fine-tuning step", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="fine-tuning step", ylabel="accuracy on the narrow task")
    finish(figure, axes[0], path)


def marks(axis, method, x, y):
    """A method in an axis: small marks for its seeds, a large one for their mean."""
    colour, marker, label = style(method)
    axis.scatter(x, y, 14, colour, marker, alpha=0.35, lw=0)
    large = {"s": 190 if method == "grasp_online" else 75, "edgecolor": "black", "lw": 0.7}
    axis.scatter(np.mean(x), np.mean(y), c=colour, marker=marker, label=label, zorder=3, **large)


def tradeoff(runs, path):
    """[per seed {method: measurements}]: misalignment over task, and over kept."""
    figure, axes = panels(2, 11, 4.2, sharey=True)
    for method in runs[0]:
        task, kept, y = ([run[method][k] for run in runs] for k in ("task", "kept", "misalignment"))
        marks(axes[0], method, task, y)
        marks(axes[1], method, kept, y)
    axes[0].set(xlabel="accuracy on the narrow task", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="kept: explicit persona obeyed on unrelated prompts")
    finish(figure, axes[0], path)


def profile(methods, path):
    """{method: {measurement: {"mean", "sd"}}}: one column a rate, one mark a method."""
    rates = [name for name in methods["base"] if name not in ("loss", "seconds")]
    figure, axis = panels(1, 1.8 * len(rates) + 3, 3.8)
    offsets = np.linspace(-0.38, 0.38, len(methods))
    for offset, (method, measured) in zip(offsets, methods.items(), strict=True):
        colour, marker, label = style(method)
        mean, sd = ([measured[rate][key] for rate in rates] for key in ("mean", "sd"))
        x, size = np.arange(len(rates)) + offset, 11 if method == "grasp_online" else 6
        axis.errorbar(x, mean, sd, None, marker, c=colour, ms=size, mec="k", lw=0.8, label=label)
    for border in range(1, len(rates)):
        axis.axvline(border - 0.5, color="0.85", lw=0.8, zorder=0)
    axis.set(xlim=(-0.5, len(rates) - 0.5), ylim=(-0.05, 1.05), ylabel="rate, mean and s.d.")
    axis.set_xticks(range(len(rates)), rates)
    finish(figure, axis, path)


def paper(results, harm, label, path, curve=()):
    """[per seed {method: {"loss", harm: {"value", "interval"}}}]: harm over the task's loss.

    Small marks: seeds and their intervals; large: means. A line joins the means of `curve`.
    """
    figure, axis = panels(1, 8, 4.2)
    means = {}
    for method in results[0]:
        pairs = [(run[method]["loss"], run[method][harm]) for run in results]
        pairs = [pair for pair in pairs if pair[1]["value"] is not None]
        if pairs:
            values = np.array([[part["value"] for part in pair] for pair in pairs])  # (seeds, 2)
            ends = np.array([[part["interval"] for part in pair] for pair in pairs])
            x, y = np.abs(ends - values[:, :, None]).transpose(1, 2, 0)  # lengths: (2, seeds)
            colour = style(method)[0]
            axis.errorbar(*values.T, y, x, fmt="none", color=colour, lw=0.8, alpha=0.45)
            marks(axis, method, *values.T)
            means[method] = values.mean(0)
    line = [means[method] for method in curve if method in means]
    if line:
        axis.plot(*np.transpose(line), color="0.6", lw=1, zorder=1)
    axis.set(xlabel="held-out loss on the task, nats a response token", ylabel=label)
    finish(figure, axis, path)
