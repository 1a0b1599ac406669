"""Many seeds' results.json in one small file, and a figure: what docs/results keeps."""

from dataclasses import MISSING, dataclass
from pathlib import Path

import torch

from experiments.figures import profile
from experiments.results import check_alike, read_results
from support.errors import UserError
from support.files import has_keys, writable_file, write_json
from support.options import option, parse
from support.program import run


def spread(values):
    """Mean, standard deviation and range of one number over seeds, to five digits."""
    values = torch.tensor(values, dtype=torch.double)
    deviation = values.std().item() if len(values) > 1 else 0.0
    numbers = {
        "mean": values.mean().item(),
        "sd": deviation,
        "min": values.min().item(),
        "max": values.max().item(),
    }
    return {name: float(f"{number:.5g}") for name, number in numbers.items()}


def section(runs, name):
    """{method: {measurement: its spread}} of one section of the results."""
    summary = {}
    for method, measured in runs[0][name].items():
        summary[method] = {key: spread([r[name][method][key] for r in runs]) for key in measured}
    return summary


def paired(runs, reference="grasp_online"):
    """{method: {measurement: {"mean", "se"}}}: each seed's difference to the reference's value.

    se: the standard error of the mean.
    """
    found = {}
    for method, measured in runs[0]["methods"].items():
        found[method] = {}
        for key in measured:
            differences = [r["methods"][method][key] - r["methods"][reference][key] for r in runs]
            differences = torch.tensor(differences, dtype=torch.double)
            error = differences.std().item() / len(runs) ** 0.5 if len(runs) > 1 else 0.0
            numbers = {"mean": differences.mean().item(), "se": error}
            found[method][key] = {name: float(f"{number:.5g}") for name, number in numbers.items()}
    return found


def summarise(runs):
    """The summary of [results of one seed], which share their configuration but for the seed."""
    directions = []
    for result in runs:
        looks = result["looks"].get("grasp_online", [])
        directions.append(float(sum(sum(look["joined"].values()) for look in looks)))
    return {
        "seeds": [result["seed"] for result in runs],
        "config": runs[0]["config"],
        "methods": section(runs, "methods"),
        "minus_grasp_online": paired(runs),
        "longer": section(runs, "longer"),
        "identification": {
            key: spread([r["identification"][key] for r in runs])
            for key in runs[0]["identification"]
        },
        "leak": {key: spread([r["leak"][key] for r in runs]) for key in runs[0]["leak"]},
        "directions": spread(directions),
    }


def read_seeds(paths):
    """The results in these files, by seed; UserError where one is not of the same experiment."""
    runs, files = {}, {}
    for path in paths:
        result = read_results(path)
        if result["seed"] in runs:
            raise UserError(f"{path}: the seed {result['seed']} stands in another file, too")
        if "grasp_online" not in result["methods"]:
            raise UserError(f"{path}: no method 'grasp_online', which the others are held against")
        runs[result["seed"]] = files[path] = result
    check_alike(files)
    return [runs[seed] for seed in sorted(runs)]


@dataclass(frozen=True)
class Arguments:
    """Summarise the seeds under a folder that `python grasp.py --seeds N --out FOLDER` wrote."""

    folder: str = option(MISSING, "the folder with seed_*/results.json")
    out: str = option("summary.json", "the file to write")


def main():
    """The command line."""
    args = parse(Arguments)
    folders = sorted(Path(args.folder).glob("seed_*"))
    paths = [folder / "results.json" for folder in folders]
    if not paths:
        raise UserError(
            f"{args.folder}: no seed_*/results.json, expected those of `grasp.py --seeds`"
        )
    out = writable_file(args.out, has_keys("seeds", "methods"))
    picture = out.with_suffix(".png")
    if picture == out:
        raise UserError(f"--out {picture}: is the picture's name, expected one that ends in .json")
    writable_file(picture)
    summary = summarise(read_seeds(paths))
    write_json(out, summary)
    profile(summary["methods"], picture)
    print(f"wrote {args.out} and {picture}: {len(paths)} seeds")


if __name__ == "__main__":
    run(main)
