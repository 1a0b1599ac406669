"""The figure of a paper task, for `python -m paper`."""

import numpy as np

from experiments.figures import marks, panels, save, style

STYLES = {  # of runs that a paper task alone has: colour, marker, label
    "naive_half": ("#555555", "o", "naive, half of the steps"),
    "naive_quarter": ("#AAAAAA", "o", "naive, a quarter of the steps"),
    "naive_times_80": ("#333333", "s", "naive, its update times .8"),
    "naive_times_60": ("#777777", "s", "naive, its update times .6"),
    "naive_times_40": ("#BBBBBB", "s", "naive, its update times .4"),
    "control": ("#999999", "d", "naive, on the control rows"),
}


def paper(results, harm, label, path, curves=()):
    """[per seed {method: measurements}]: harm over loss; a line joins the means of each curve."""
    figure, axis = panels(1, 8, 4.2)
    means = {}
    for method in results[0]:
        look, seeds = STYLES.get(method, style(method)), []
        for run in results:
            loss, found = run[method]["loss"], run[method][harm]
            if found["value"] is not None:
                seeds.append((loss["value"], found["value"]))
                axis.vlines(loss["value"], *found["interval"], look[0], lw=0.8, alpha=0.45)
                axis.hlines(found["value"], *loss["interval"], look[0], lw=0.8, alpha=0.45)
        if seeds:
            marks(axis, look, *np.transpose(seeds))
            means[method] = np.mean(seeds, 0)
    for curve, stroke in zip(curves, ("-", "--"), strict=False):
        line = [means[method] for method in curve if method in means]
        axis.plot(*np.transpose(line), ls=stroke, color="0.6", lw=1, zorder=1)
    axis.set(xlabel="held-out loss on the task, nats a response token", ylabel=label)
    save(figure, path, axis)
