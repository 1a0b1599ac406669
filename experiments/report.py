"""The experiment over seeds: results that are there are read back; the table, the figures."""

import json
from dataclasses import asdict

import torch

from baselines.methods import METHODS, check
from experiments.figures import spectrum, tradeoff, training
from experiments.results import check_alike, read_results
from support.errors import UserError
from support.files import writable_file, writable_folder, write_json
from support.options import not_default
from support.program import seed_everything

OPTIONS = ("world", "seed", "seeds", "methods", "targets", "quick", "out")  # of those of grasp.py
OF_METHODS = ("methods", "longer", "curves", "looks", "leak")  # what results.json has by method
FIGURES = ("spectrum.png", "training.png", "tradeoff.png")


def cell(values):
    """A mean over seeds, with the standard deviation where there is more than one."""
    values = torch.tensor(values, dtype=torch.float)  # a file may have whole numbers
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}"


def table(runs):
    """The runs' measurements as text, mean and spread over seeds."""
    columns = list(runs[0]["methods"]["base"])  # the world's rates, loss, seconds
    times = runs[0]["config"]["experiment"]["longer"]
    lines = [f"{'':38}" + "".join(f"{column:>16}" for column in columns)]
    for section, suffix in (("methods", ""), ("longer", f", {times}x the steps")):
        for method in runs[0][section]:
            measured = [run[section][method] for run in runs]
            cells = [cell([m[column] for m in measured]) for column in columns]
            lines.append(f"{method + suffix:38}" + "".join(f"{text:>16}" for text in cells))
    for section in ("identification", "leak"):
        common = [key for key in runs[0][section] if all(key in run[section] for run in runs)]
        means = {key: sum(run[section][key] for run in runs) / len(runs) for key in common}
        lines.append(f"{section}: " + ", ".join(f"{k} {mean:.3g}" for k, mean in means.items()))
    return "\n".join(lines)


def one_seed(args, seed, methods, folder, settings, experiment):
    """The results of one seed: read from `folder` if they are there already, else made."""
    world, toy = settings(args, seed)
    named = {"name": args.world, **asdict(world)}
    config = {"world": named, "experiment": asdict(toy), "torch": torch.__version__}
    config = json.loads(json.dumps(config))  # as the file will have it
    path = folder / "results.json"
    earlier = None
    if args.seeds > 1 and path.exists():
        earlier = read_results(path)
        if earlier["config"] != config:
            raise UserError(f"{path}: was made with other settings; expected another --out")
        if all(m in earlier["methods"] for m in methods):
            print(f"seed {seed}: {path} is there already")
            return of_methods(earlier, methods)
    if earlier is None:
        writable_file(path)
    print(f"seed {seed}: {config} on one CPU thread, float32")
    seed_everything(seed)
    results = experiment(world, toy, seed, methods, args.out)
    results = {"seed": seed, "config": config, **results}
    if earlier:  # other methods' results stay there
        for section in OF_METHODS:
            results[section] = {**earlier[section], **results[section]}
    write_json(path, results)
    return of_methods(results, methods)


def of_methods(results, methods):
    """The results without those of other methods, which an earlier run may have asked for."""
    names = ["base", *methods]
    if "grasp_gradient_only" in methods:
        names.append("gradient_only")  # its name among the leaks
    kept = {}
    for section in OF_METHODS:
        found = results[section]
        kept[section] = {name: found[name] for name in names if name in found}
    return {**results, **kept}


def run_seeds(args, settings, experiment):
    """Run the seeds that are not on disk yet, print their table, draw their figures.

    settings(args, seed) -> (World, Toy); experiment(World, Toy, seed, methods, folder) -> results.
    """
    torch.set_num_threads(1)  # small matrices; and the numbers do not depend on how many cores
    other = [flag for name, flag in not_default(args).items() if name not in OPTIONS]
    if other:
        raise UserError(f"{', '.join(other)}: for a checkpoint alone, with --model and --data")
    chosen = args.methods or METHODS
    check(chosen)
    methods = [m for m in METHODS if m in (*chosen, "naive", "grasp", "grasp_online")]
    out, runs = writable_folder(args.out, FIGURES), []
    if args.seeds > 1:
        for seed in range(args.seed, args.seed + args.seeds):
            writable_folder(out / f"seed_{seed}", ["results.json"])
    for seed in range(args.seed, args.seed + args.seeds):
        folder = out if args.seeds == 1 else out / f"seed_{seed}"
        runs.append(one_seed(args, seed, methods, folder, settings, experiment))
    check_alike({f"seed {run['seed']}": run for run in runs})
    print(table(runs))
    of_spectrum, of_training, of_tradeoff = FIGURES
    spectrum(runs[0], out / of_spectrum)
    training(runs, out / of_training)
    tradeoff([run["methods"] for run in runs], out / of_tradeoff)
    print(f"wrote results.json of each seed, {', '.join(FIGURES)} in {out}")
