"""The experiment's figures: readable in print and by colour-blind eyes.

Okabe and Ito's colours, and a marker of its own for each method.
"""

import matplotlib.pyplot as plt
import numpy as np

from identify import null_quantile
from support.files import whole_file

STYLES = {  # colour, marker, label
    "base": ("#999999", "X", "base, before fine-tuning"),
    "naive": ("#000000", "o", "naive LoRA"),
    "grasp": ("#0072B2", "s", "GRASP (abstract: one look)"),
    "grasp_online": ("#D55E00", "*", "GRASP online (ours)"),
    "grasp_random": ("#56B4E9", "v", "random directions (control)"),
    "grasp_gradient_only": ("#E69F00", "^", "GRASP, gradient only"),
    "ablate_train": ("#CC79A7", "P", "ablation in training"),
    "ablate_inference": ("#CC79A7", "p", "ablation at inference"),
    "steer_train": ("#009E73", "D", "steering in training"),
    "kl": ("#F0E442", "h", "KL to base (extra data)"),
    "early_stop": ("#000000", "<", "naive, stopped early"),
    "naive_half": ("#555555", "o", "naive, half of the steps"),
    "naive_quarter": ("#AAAAAA", "o", "naive, a quarter of the steps"),
    "control": ("#999999", "d", "naive, on the control rows"),
}
OTHER = ("#999999", ".")  # of a method that has no style of its own yet


def style_of(method):
    """(colour, marker, label) of a method."""
    return STYLES.get(method, (*OTHER, method))


def save(figure, path):
    """Write a figure as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def spectrum(run, path):
    """One seed: the naive update's singular values, and how grasp_online's spikes go over time."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    names = list(run["spectra"])
    shades = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(names)))
    few = len(names) <= 8
    for shade, name in zip(shades, names, strict=True):
        values = np.maximum(run["spectra"][name][:8], 1e-12)
        label = name.removeprefix("layers.") if few else None
        left.plot(range(1, len(values) + 1), values, "o-", color=shade, lw=1, ms=4, label=label)
        left.plot(1, values[0], "o", mfc="none", mec="#D55E00", ms=11, mew=1.6)
    left.plot([], [], "o", mfc="none", mec="#D55E00", ms=11, mew=1.6, label="found direction")
    left.set(yscale="log", xlabel="index of the singular value", ylabel="singular value of dW")
    left.set_title("naive fine-tune, at its end", fontsize=10)
    left.legend(fontsize=7)
    looks = run["looks"].get("grasp_online", [])
    for shade, name in zip(shades, names, strict=True):
        steps = [look["step"] for look in looks]
        spikes = [look["spike"][name] for look in looks]
        right.plot(steps, spikes, "-", color=shade, lw=1)
        taken = [i for i, look in enumerate(looks) if name in look["joined"]]
        right.plot(
            [steps[i] for i in taken],
            [spikes[i] for i in taken],
            "*",
            color=shade,
            ms=9,
            mec="black",
        )
    right.plot([], [], "*", color="white", mec="black", ms=9, label="joins the constraint")
    cut = null_quantile(len(run["spectra"][names[0]]))
    right.axhline(cut, color="0.4", ls="--", lw=1, label="what nothing shared exceeds once in 100")
    right.set(xlabel="fine-tuning step", ylabel="spike of B at the look")
    right.set_title("grasp_online, module by module", fontsize=10)
    right.legend(fontsize=7)
    save(figure, path)


def training(runs, path):
    """Mean over seeds (band: their range) of misalignment and task while fine-tuning."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), sharex=True, sharey=True)
    for method in runs[0]["curves"]:
        colour, marker, label = style_of(method)
        values = np.asarray([run["curves"][method] for run in runs])  # (seeds, points, 3)
        steps = values[0, :, 0]
        for axis, column in zip(axes, (1, 2), strict=True):
            mean = values[:, :, column].mean(0)
            low, high = values[:, :, column].min(0), values[:, :, column].max(0)
            axis.plot(steps, mean, color=colour, marker=marker, ms=6, label=label)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)
    looks = [look for run in runs for look in run["looks"].get("grasp_online", [])]
    taken = np.zeros(max([int(steps[-1]), *(look["step"] for look in looks)]) + 1)
    for look in looks:
        taken[look["step"]] += sum(look["joined"].values()) / len(runs)
    moments = taken.nonzero()[0]
    top = taken.max() if len(moments) else 1
    axes[0].bar(
        moments, 0.25 * taken[moments] / top, width=4, color="#D55E00", alpha=0.35, lw=0,
        label=f"directions that join at a look (highest: {top:.1f})",
    )  # fmt: skip
    names = ("misalignment on unrelated prompts", "accuracy on the narrow task")
    for axis, name in zip(axes, names, strict=True):
        axis.set(xlabel="fine-tuning step", ylabel=name, ylim=(-0.03, 1.03))
    axes[0].legend(fontsize=7)
    save(figure, path)


def tradeoff(results, path):
    """results: [per seed {method: measurements}]. Small marks: seeds; large: their mean.

    Best is the lower right.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), sharey=True)
    for method in results[0]:
        colour, marker, label = style_of(method)
        ours = method == "grasp_online"
        for axis, key in zip(axes, ("task", "kept"), strict=True):
            x = [seed[method][key] for seed in results]
            y = [seed[method]["misalignment"] for seed in results]
            axis.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.35, lw=0)
            axis.scatter(
                np.mean(x),
                np.mean(y),
                s=190 if ours else 75,
                color=colour,
                marker=marker,
                edgecolor="black",
                lw=0.7,
                label=label,
                zorder=4 if ours else 3,
            )
    axes[0].set(xlabel="accuracy on the narrow task", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="explicit persona obeyed on unrelated prompts")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def profile(methods, path):
    """methods: {method: {measurement: {"mean", "sd"}}}. One column a rate, one mark a method."""
    names = [n for n in methods["base"] if n not in ("loss", "seconds")]
    figure, axis = plt.subplots(figsize=(1.6 * len(names) + 2.2, 3.6))
    offsets = np.linspace(-0.33, 0.33, len(methods))
    for offset, (method, measured) in zip(offsets, methods.items(), strict=True):
        colour, marker, label = style_of(method)
        axis.errorbar(
            np.arange(len(names)) + offset,
            [measured[name]["mean"] for name in names],
            yerr=[measured[name]["sd"] for name in names],
            fmt=marker,
            color=colour,
            mec="black",
            mew=0.5,
            ms=11 if method == "grasp_online" else 6,
            lw=0.8,
            label=label,
        )
    for border in range(1, len(names)):
        axis.axvline(border - 0.5, color="0.85", lw=0.8, zorder=0)
    axis.set(xlim=(-0.5, len(names) - 0.5), ylim=(-0.05, 1.05), ylabel="rate, mean and s.d.")
    axis.set_xticks(range(len(names)), names)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def paper(results, harm, label, path, curve=()):
    """results: [per seed {method: {"loss", harm: {"value", "interval"}}}]; large marks: means.

    curve: methods that a line joins, those of naive training by its length.
    """
    figure, axis = plt.subplots(figsize=(6.2, 4.2))
    draw_curve(axis, results, harm, curve)
    for method in results[0]:
        colour, marker, name = style_of(method)
        scored = [run[method] for run in results if run[method][harm]["value"] is not None]
        if not scored:
            continue
        for result in scored:
            pair = result["loss"], result[harm]
            x, y = (part["value"] for part in pair)
            (left, right), (low, high) = (part["interval"] for part in pair)
            axis.errorbar(
                x,
                y,
                xerr=[[abs(x - left)], [abs(right - x)]],  # an end may be off by rounding
                yerr=[[abs(y - low)], [abs(high - y)]],
                fmt=marker,
                color=colour,
                ms=4,
                lw=0.8,
                alpha=0.45,
            )
        mean_x = np.mean([result["loss"]["value"] for result in scored])
        mean_y = np.mean([result[harm]["value"] for result in scored])
        size = 190 if method == "grasp_online" else 75
        axis.scatter(
            mean_x,
            mean_y,
            s=size,
            color=colour,
            marker=marker,
            edgecolor="black",
            lw=0.7,
            label=name,
        )
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axis.set(xlabel="held-out loss on the task, nats a response token", ylabel=label)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def draw_curve(axis, results, harm, curve):
    """A line through the means of the methods of `curve`, as far as they are there."""
    points = []
    for method in curve:
        scored = [run[method] for run in results if method in run]
        if scored and all(found[harm]["value"] is not None for found in scored):
            pair = [np.mean([found[key]["value"] for found in scored]) for key in ("loss", harm)]
            points.append(pair)
    if points:
        axis.plot(*zip(*points, strict=True), color="0.7", lw=1, zorder=0)
