"""The experiment's pictures: readable in print and for colour-blind eyes (Okabe and Ito's colours, a marker of its own each)."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from cli import whole_file

LOOKS = {"base": ("#999999", "X", "base, before fine-tuning"), "naive": ("#000000", "o", "naive LoRA"), "grasp": ("#D55E00", "*", "GRASP"),
         "grasp_random": ("#56B4E9", "v", "GRASP, random directions"),
         "grasp_gradient_only": ("#E69F00", "^", "GRASP, gradient only"), "grasp_inputs": ("#CC79A7", "s", "mean inputs instead"),
         "ablate_train": ("#0072B2", "P", "ablation in training"), "ablate_inference": ("#0072B2", "p", "ablation at inference"),
         "steer_train": ("#009E73", "D", "steering in training"), "kl": ("#F0E442", "h", "KL to base (extra data)"),
         "early_stop": ("#000000", "<", "naive, stopped at GRASP's loss"), "neutral": ("#999999", "d", "naive, on neutral data")}


def save(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)


def spectrum(rounds, path):
    """rounds: [{module: singular values}]. A panel for the naive run, round 2 and the last; the direction found is circled."""
    shown = sorted({0, 1, len(rounds) - 1} & set(range(len(rounds))))
    figure, axes = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.6), sharey=True, squeeze=False)
    for axis, i in zip(axes[0], shown):
        spectra = rounds[i]
        names = list(spectra)
        shades, few = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(names))), len(names) <= 8
        for shade, marker, name in zip(shades, "os^DvP*X" * len(names), names):
            values = np.maximum(np.asarray(spectra[name][:8]), 1e-12)
            axis.plot(range(1, len(values) + 1), values, marker=marker, color=shade, lw=1, ms=4, label=name if few else None)
            axis.plot(1, values[0], "o", mfc="none", mec="#D55E00", ms=11, mew=1.6)
        axis.plot([], [], "o", mfc="none", mec="#D55E00", ms=11, mew=1.6, label="found direction" + ("" if few else f", {len(names)} modules"))
        axis.set(yscale="log", xlabel="index of the singular value",
                 title="naive fine-tune" if i == 0 else f"round {i + 1}: off what was found before")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("singular value of the module's update")
    save(figure, path)


def training(curves, steps, path):
    """curves: {method: [per seed [(step, misalignment, task)]]}: the mean over seeds, and their range as a band."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.6), sharex=True, sharey=True)
    for method, seeds in curves.items():
        values, (colour, marker, label) = np.asarray(seeds), LOOKS[method]  # (seeds, points, 3)
        for axis, column in zip(axes, (1, 2)):
            axis.plot(values[0, :, 0], values[:, :, column].mean(0), color=colour, marker=marker, label=label,
                      **({"ms": 10, "zorder": 4} if method == "grasp" else {"ms": 5}))
            axis.fill_between(values[0, :, 0], values[:, :, column].min(0), values[:, :, column].max(0), color=colour, alpha=0.15, lw=0)
    for axis, name in zip(axes, ("misalignment on unrelated prompts", "accuracy on the narrow task")):
        axis.axvline(steps, color="0.7", ls="--", lw=1)
        axis.set(xlabel="fine-tuning steps (dashed: the usual length)", ylabel=name, ylim=(-0.03, 1.03))
    axes[0].legend(fontsize=7)
    save(figure, path)


def tradeoff(results, path):
    """results: [per seed {method: measurements}]. Small marks are seeds, large ones their mean; best is the lower right."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.9), sharey=True)
    for method in results[0]:
        colour, marker, label = LOOKS[method]
        for axis, key in zip(axes, ("task", "kept")):
            x, y = ([seed[method][k] for seed in results] for k in (key, "misalignment"))
            axis.scatter(x, y, s=14, color=colour, marker=marker, alpha=0.35, lw=0)
            axis.scatter(np.mean(x), np.mean(y), s=190 if method == "grasp" else 75, color=colour, marker=marker, edgecolor="black", lw=0.7,
                         label=label, zorder=4 if method == "grasp" else 3)
    axes[0].set(xlabel="accuracy on the narrow task", ylabel="misalignment on unrelated prompts")
    axes[1].set(xlabel="explicit persona obeyed on unrelated prompts")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def paper(results, harm, label, path):
    """results: [per seed {method: {"loss", harm: {"value", "interval"}}}]. Small marks: seeds; large: means."""
    figure, axis = plt.subplots(figsize=(6.2, 4.2))
    for method in results[0]:
        colour, marker, name = LOOKS[method]
        pairs = [(run[method]["loss"], run[method][harm]) for run in results if run[method][harm]["value"] is not None]
        if not pairs:
            continue  # nothing was scored
        points = np.array([[part["value"] for part in pair] for pair in pairs])  # (seeds, 2)
        for point, pair in zip(points, pairs):
            ends = np.array([part["interval"] for part in pair])  # (2, 2): a row for x, one for y
            bars = np.abs(ends - point[:, None])[..., None]
            axis.errorbar(*point, xerr=bars[0], yerr=bars[1], fmt=marker, color=colour, ms=4, lw=0.8, alpha=0.45)
        axis.scatter(*points.mean(0, keepdims=True).T, s=190 if method == "grasp" else 75, color=colour, marker=marker,
                     edgecolor="black", lw=0.7, label=name, zorder=3)
    axis.axhline(0, color="0.8", lw=0.8, zorder=0)
    axis.set(xlabel="held-out loss on the task, nats a response token", ylabel=label)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path)


def phase(maps, strengths, path):
    """maps: [(title, K of the columns, values by row)], a row for each of `strengths`. Dashed: rho^2 K = 1 (docs/derivation.md)."""
    figure, axes = plt.subplots(1, len(maps), figsize=(3.1 * len(maps), 3.2), sharey=True,
                                gridspec_kw={"width_ratios": [len(sizes) for _, sizes, _ in maps]})
    for axis, (title, sizes, rows) in zip(axes, maps):
        axis.imshow(rows, origin="lower", cmap="cividis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.5 else "black")
        K = np.geomspace(sizes[0], sizes[-1])
        line = np.interp(K ** -0.5, strengths, range(len(strengths)), left=np.nan)
        axis.plot(np.interp(np.log(K), np.log(sizes), range(len(sizes))), line, "--", color="#D55E00", lw=2)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="K, narrow examples", xlim=(-0.5, len(sizes) - 0.5), ylim=(-0.5, len(strengths) - 0.5),
                 xticks=range(len(sizes)), xticklabels=sizes, yticks=range(len(strengths)), yticklabels=strengths)
    axes[0].set_ylabel("rho, share of them with the spurious part")
    save(figure, path)
