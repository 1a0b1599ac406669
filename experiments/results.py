"""results.json of `python grasp.py`, as it is read back: by the next run, and by the summary."""

import math
from dataclasses import dataclass

from support.errors import UserError
from support.files import read_json
from support.schema import from_json, value

MEASURED = {"task", "misalignment", "kept", "loss"}  # of every method in every world


@dataclass(frozen=True, kw_only=True)
class _Config:
    world: dict = value()
    experiment: dict = value()


@dataclass(frozen=True, kw_only=True)
class _Identification:
    cosine: float = value(low=0, high=1.0001)  # |cos|, with room for rounding
    chance_cosine: float = value(low=0, high=1)
    gap: float = value(low=0)


@dataclass(frozen=True, kw_only=True)
class _Look:
    step: int = value(low=1)
    spike: dict[str, float] = value()
    joined: dict[str, int] = value(low=1)


@dataclass(frozen=True, kw_only=True)
class _Results:
    """One seed's results."""

    seed: int = value(low=0)
    config: _Config = value()
    identification: _Identification = value()
    leak: dict[str, float] = value(low=0)
    methods: dict[str, dict[str, float]] = value()
    longer: dict[str, dict[str, float]] = value()
    curves: dict[str, list[list[float]]] = value()
    looks: dict[str, list[_Look]] = value()
    spectra: dict[str, list[float]] = value(low=0)

    def __post_init__(self):
        base = self.methods.get("base", {})
        if not base.keys() >= MEASURED:
            names = ", ".join(sorted(MEASURED))
            raise ValueError(f"'methods.base' has {list(base)}, expected {names} at least")
        if self.config.world.get("seed") != self.seed:
            raise ValueError(f"'seed' is {self.seed}, expected that of 'config.world.seed'")
        for section in ("methods", "longer"):
            for method, rates in getattr(self, section).items():
                check_rates(f"{section}.{method}", rates, base)
        last = self.config.experiment.get("steps", 0)
        if not self.curves:
            raise ValueError("'curves' is empty, expected that of naive at least")
        for method, curve in self.curves.items():
            if not curve or any(len(point) != 3 or point[0] > last for point in curve):
                raise ValueError(
                    f"'curves.{method}' is no list of [step, misalignment, task] up to step {last}"
                )
        if not self.spectra or not all(self.spectra.values()):
            raise ValueError("'spectra' lacks singular values, expected some of every module")
        for method, looks in self.looks.items():
            for look in looks:
                if look.spike.keys() != self.spectra.keys():
                    raise ValueError(f"'looks.{method}' are of other modules than 'spectra'")
                if look.step > last:
                    raise ValueError(f"'looks.{method}' has step {look.step}, beyond the run's end")


def check_rates(name, rates, base):
    """ValueError unless a method was measured as the base was, in numbers that can be."""
    if rates.keys() != base.keys():
        raise ValueError(f"'{name}' has {list(rates)}, expected {list(base)} as the base")
    for key, rate in rates.items():
        highest = math.inf if key in ("loss", "seconds") else 1
        if not 0 <= rate <= highest:
            raise ValueError(f"'{name}.{key}' is {rate}, expected a number from 0 to {highest}")


def read_results(path):
    """The results in `path` as a dictionary, every value of the right type; UserError if not."""
    results = read_json(path, "the results of a seed")
    from_json(_Results, results, path)
    return results


def check_alike(runs):
    """UserError unless {where: results} have the same settings, methods and measurements."""
    first, *others = runs
    for where in others:
        if settings(runs[where]) != settings(runs[first]):
            raise UserError(
                f"{where}: was made with other settings or methods than {first}, expected the "
                "seeds of one experiment"
            )


def settings(result):
    """What the results of different seeds share: the configuration, and what was measured."""
    config = result["config"]
    sections = ("methods", "longer", "curves", "identification", "leak")
    world = {**config["world"], "seed": None}
    points = [[point[0] for point in curve] for curve in result["curves"].values()]
    names = [result["methods"]["base"].keys(), *(result[section].keys() for section in sections)]
    return {**config, "world": world}, names, points
