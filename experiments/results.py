"""results.json of `python grasp.py`, as it is read back: by the next run, and by the summary."""

from dataclasses import dataclass

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
    leak: dict[str, float] = value()
    methods: dict[str, dict[str, float]] = value()
    longer: dict[str, dict[str, float]] = value()
    curves: dict[str, list[list[float]]] = value()
    looks: dict[str, list[_Look]] = value()
    spectra: dict[str, list[float]] = value()

    def __post_init__(self):
        base = self.methods.get("base", {})
        if not base.keys() >= MEASURED:
            names = ", ".join(sorted(MEASURED))
            raise ValueError(f"'methods.base' has {list(base)}, expected {names} at least")
        for section in ("methods", "longer"):
            for method, rates in getattr(self, section).items():
                for name in ("task", "kept"):
                    if not 0 <= rates.get(name, 0) <= 1:
                        raise ValueError(
                            f"'{section}.{method}.{name}' is {rates[name]}, expected a number from "
                            "0 to 1"
                        )
                if rates.keys() != base.keys():
                    raise ValueError(
                        f"'{section}.{method}' has {list(rates)}, expected {list(base)} as the base"
                    )


def read_results(path):
    """The results in `path` as a dictionary, every value of the right type; UserError if not."""
    results = read_json(path, "the results of a seed")
    from_json(_Results, results, path)
    return results
