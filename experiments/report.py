"""The experiment over seeds: what is on disk is read back; the table and the three figures."""

import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch

from baselines.methods import METHODS
from experiments.figures import spectrum, tradeoff, training
from support.files import write_json


def table(runs):
    """The results of all seeds as text: means, with standard deviations if there are several."""
    columns = list(runs[0]["methods"]["base"])  # the world's rates, loss, seconds
    lines = [f"{'':38}" + "".join(f"{column:>16}" for column in columns)]
    times = runs[0]["config"]["experiment"]["longer"]
    for section, suffix in (("methods", ""), ("longer", f", {times}x the steps")):
        for method in runs[0][section]:
            line = f"{method + suffix:38}"
            for column in columns:
                values = [run[section][method][column] for run in runs]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                line += f"{fmean(values):.3f}{spread}".rjust(16)
            lines.append(line)
    for section in ("identification", "leak"):
        means = {key: fmean(run[section][key] for run in runs) for key in runs[0][section]}
        lines.append(f"{section}: " + ", ".join(f"{key} {mean:.3g}" for key, mean in means.items()))
    return "\n".join(lines)


def run_seeds(args, settings, experiment):
    """Run the seeds that are not on disk or lack a method; print the table, draw the figures."""
    torch.set_num_threads(1)  # small matrices; and the numbers do not depend on how many cores
    unknown = [method for method in args.methods if method not in METHODS]
    if unknown:
        raise ValueError(f"method {', '.join(unknown)}, expected some of {', '.join(METHODS)}")
    out = Path(args.out)
    paths = {s: out / f"seed_{s}/results.json" for s in range(args.seed, args.seed + args.seeds)}
    runs = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}
    if args.seeds == 1:  # is run again, as the code may have changed
        paths, runs = {args.seed: out / "results.json"}, {}
    chosen = {"naive", "grasp", "grasp_online", *args.methods}
    chosen.update(*(run["methods"] for run in runs.values()))
    methods = [method for method in METHODS if method in chosen]  # the same for all seeds
    for seed, path in paths.items():
        world, toy = settings(args, seed)
        config = {"world": {"name": args.world, **asdict(world)}, "experiment": asdict(toy)}
        config = json.loads(json.dumps({**config, "torch": torch.__version__}))  # as in the file
        if seed in runs and runs[seed]["config"] != config:
            raise ValueError(f"{path}: made with other settings; expected another --out")
        if seed not in runs or not runs[seed]["methods"].keys() >= {*methods}:
            print(f"seed {seed}: {config} on one CPU thread, float32")
            torch.manual_seed(seed)
            results = experiment(world, toy, seed, methods, out)
            runs[seed] = {"seed": seed, "config": config, **results}
            write_json(path, runs[seed])
    runs = [runs[seed] for seed in paths]
    spectrum(runs[0], out / "spectrum.png")
    training(runs, out / "training.png")
    tradeoff([run["methods"] for run in runs], out / "tradeoff.png")
    print(f"{table(runs)}\nwrote results.json of each seed and three figures in {out}")
