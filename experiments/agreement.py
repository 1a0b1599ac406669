"""Do two fine-tunes put the same direction first? |cos| of their top output directions.

`python -m experiments.agreement ADAPTER OTHER`: two LoRA adapters of one base model, such as those
of two seeds, of two data sets, or of a data set and its control. A factor that the rows share is
found again with another seed; where unobjectionable rows give the same direction, it is no factor.
"""

import math
from dataclasses import MISSING, dataclass

import torch

from real.spectrum import found_in, spectra_of
from support.errors import UserError
from support.options import option, parse
from support.program import run


def directions(folder):
    """{path in transformers: u (out,)}: the top output direction of each adapted module.

    UserError where an update is zero.
    """
    found = found_in(folder, spectra_of(folder), rank=1)
    return {path: U[:, 0] for path, U in found.items()}


def agreement(first, second):
    """{kind of module: (|cos| of each (modules,), chance)}, over the modules that both adapt.

    chance: E|cos| of two random directions of that width d, sqrt(2 / (pi d)) for large d.
    """
    cosines, widths = {}, {}
    for path in first.keys() & second.keys():
        u, v = first[path], second[path]
        if len(u) != len(v):
            raise UserError(f"{path}: {len(u)} and {len(v)} outputs, expected one base model's")
        kind = path.split(".")[-1]
        cosines.setdefault(kind, []).append(abs(u @ v).item())
        widths[kind] = len(u)
    if not cosines:
        raise UserError("the two adapters adapt no module in common")
    return {
        kind: (torch.tensor(values), math.sqrt(2 / (math.pi * widths[kind])))
        for kind, values in sorted(cosines.items())
    }


@dataclass(frozen=True)
class Arguments:
    """Compare the top output directions of two adapters, kind of module by kind of module."""

    adapter: str = option(MISSING, "a LoRA adapter in PEFT's format")
    other: str = option(MISSING, "another one, of the same base model")


def main():
    """The command line."""
    args = parse(Arguments)
    found = agreement(directions(args.adapter), directions(args.other))
    print(f"{'module':12}{'modules':>9}{'mean |cos|':>12}{'lowest':>9}{'highest':>9}{'chance':>9}")
    for kind, (values, chance) in found.items():
        numbers = (values.mean(), values.min(), values.max(), chance)
        cells = "".join(
            f"{number:{w}.3f}" for number, w in zip(numbers, (12, 9, 9, 9), strict=True)
        )
        print(f"{kind:12}{len(values):9}{cells}")


if __name__ == "__main__":
    run(main)
