"""Many seeds' results.json in one small file: what docs/results keeps."""

import json
from dataclasses import MISSING, dataclass
from pathlib import Path
from statistics import fmean, stdev

from support.files import write_json
from support.options import option, parse, run


def spread(values):
    """Mean over seeds, its standard error, standard deviation and range, to five digits."""
    sd = stdev(values) if len(values) > 1 else 0.0
    found = {"mean": fmean(values), "se": sd / len(values) ** 0.5, "sd": sd}
    found |= {"min": min(values), "max": max(values)}
    return {name: float(f"{value:.5g}") for name, value in found.items()}


def combine(function, parts):
    """Nested dictionaries with the same keys as one, with function(numbers) in each place."""
    if isinstance(parts[0], dict):
        return {key: combine(function, [part[key] for part in parts]) for key in parts[0]}
    return function(parts)


def summarised(result):
    """The numbers of one seed that a summary has; minus_grasp_online: each method's difference."""
    methods = result["methods"]
    online = dict.fromkeys(methods, methods["grasp_online"])
    found = {name: result[name] for name in ("methods", "longer", "identification", "leak")}
    found["minus_grasp_online"] = combine(lambda pair: pair[0] - pair[1], [methods, online])
    joined = [look["joined"].values() for look in result["looks"]["grasp_online"]]
    return {**found, "patterns": sum(map(sum, joined))}


@dataclass(frozen=True)
class Arguments:
    """Summarise the seeds under a folder that `python grasp.py --seeds N --out FOLDER` wrote."""

    folder: str = option(MISSING, "the folder with seed_*/results.json")
    out: str = option("summary.json", "the file to write")


def main():
    """The command line."""
    args = parse(Arguments)
    paths = Path(args.folder).glob("seed_*/results.json")
    runs = sorted((json.loads(path.read_text()) for path in paths), key=lambda found: found["seed"])
    if not runs:
        raise ValueError(f"{args.folder}: no seed_*/results.json, as of grasp.py --seeds")
    summary = {"seeds": [found["seed"] for found in runs], "config": runs[0]["config"]}
    summary |= combine(spread, [summarised(found) for found in runs])
    write_json(args.out, summary)
    print(f"wrote {args.out}: {len(runs)} seeds")


if __name__ == "__main__":
    run(main)
