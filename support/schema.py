"""The one place where values from files are typed.

A dataclass says what a JSON object holds; `value` gives a field its range. For example:

    @dataclass(frozen=True, kw_only=True)
    class Result:
        seed: int = value(low=0)
        rates: dict[str, float] = value(low=0, high=1)  # a range holds for every number inside
        method: str = value(choices=("naive", "grasp"))
        note: str | None = None  # may be absent

    result = read_file(Result, "out/results.json", "the results of one run")
    result.rates["task"]

Where the file says otherwise, a UserError names the file, the field, what was found and what was
expected: `out/results.json: 'rates.task' is 1.5, expected a finite number from 0 to 1`.

Types that a field can have: bool, int, float, str, list[T], dict[str, T], another dataclass, unions
of these, object (anything), and any other class, such as torch.Tensor (an instance of it).
true is no number, "8" is no number, 8.0 is no whole number, and no number may be NaN or infinite.
null counts as absent. Fields of the file that the dataclass does not have are ignored.
A dataclass may check its fields against each other in __post_init__, by raising a ValueError.
"""

import dataclasses
import math
import reprlib
import types
import typing
from dataclasses import MISSING, dataclass

from support.errors import UserError
from support.files import read_json

SCALARS = (bool, int, float, str)
MOST = 2**63  # every whole number is smaller, in magnitude; larger ones are nothing that we can use

_short = reprlib.Repr()
_short.maxlevel = 2
_short.maxlist = _short.maxtuple = _short.maxdict = _short.maxset = 4
_short.maxstring = _short.maxother = 100


def show(found):
    """`found` on one short line, however long or deep it is."""
    try:
        return _short.repr(found).replace("\n", " ")  # a tensor's has several lines
    except ValueError:  # Python refuses to write out a number of more than 4,300 digits
        return "a number of very many digits"


@dataclass(frozen=True)
class Limits:
    """What a field's values are held to, beside their type; `above` is a bound never reached."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple | None = None

    def allow(self, found):
        """Whether `found`, of the right type, is within the limits."""
        if self.choices is not None:
            return found in self.choices
        if not isinstance(found, (int, float)):
            return True
        if self.low is not None and found < self.low:
            return False
        if self.above is not None and found <= self.above:
            return False
        return self.high is None or found <= self.high

    def describe(self):
        """The range in words, such as " from 0 to 1"."""
        if self.low is not None and self.high is not None:
            return f" from {self.low} to {self.high}"
        bounds = []
        if self.low is not None:
            bounds.append(f"at least {self.low}")
        if self.above is not None:
            bounds.append(f"above {self.above}")
        if self.high is not None:
            bounds.append(f"at most {self.high}")
        return " " + " and ".join(bounds) if bounds else ""


NO_LIMITS = Limits()


def value(default=MISSING, *, low=None, high=None, above=None, choices=None):
    """A dataclass field with limits. Without a default the file must have it."""
    metadata = {"limits": Limits(low, high, above, choices)}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_file(kind, path, what, limits=NO_LIMITS):
    """The JSON file at `path` as a `kind`; `what` it should have been, for an error."""
    return from_json(kind, read_json(path, what), path, limits)


def once(path, ids):
    """UserError unless a file has entries, and each id once."""
    if not ids:
        raise UserError(f"{path}: no entries, expected one at least")
    for i, name in enumerate(ids):
        if name in ids[:i]:
            raise UserError(f"{path}: the id {show(name)} stands twice")


def from_json(kind, found, where, limits=NO_LIMITS, name=""):
    """A JSON value as a `kind`: a dataclass, or any type that a field can have.

    where: the file that it comes from, and name: its place in the file, both for the UserError.
    """
    if kind in SCALARS:  # first, since a vocabulary holds a hundred thousand of them
        if not _is_scalar(kind, found) or not limits.allow(found):
            raise _refusal(kind, found, where, limits, name)
        return float(found) if kind is float else found
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _one_of(kind, found, where, limits, name)
    if not _fits(kind, found):
        raise _refusal(kind, found, where, limits, name)
    if dataclasses.is_dataclass(kind):
        return _object(kind, found, where, name)
    inside = typing.get_args(kind)
    if inside and isinstance(found, list):
        return [
            from_json(inside[0], element, where, limits, f"{name}[{i}]")
            for i, element in enumerate(found)
        ]
    if inside and isinstance(found, dict):
        return {
            key: from_json(inside[1], element, where, limits, _join(name, key))
            for key, element in found.items()
        }
    if not limits.allow(found):
        raise _refusal(kind, found, where, limits, name)
    return found


def _is_scalar(kind, found):
    """Whether `found` is a bool, int, float or str, as `kind` says: a whole number is a float."""
    if kind is float and isinstance(found, float):
        return math.isfinite(found)
    if kind in (int, float):
        return isinstance(found, int) and not isinstance(found, bool) and abs(found) < MOST
    return isinstance(found, kind)


def _fits(kind, found):
    """Whether `found` is of the type `kind`, its parts not looked at."""
    if kind in SCALARS:
        return _is_scalar(kind, found)
    if dataclasses.is_dataclass(kind):
        return isinstance(found, dict)
    origin = typing.get_origin(kind) or kind
    if origin is dict:
        return isinstance(found, dict) and all(isinstance(key, str) for key in found)
    return isinstance(found, origin)


def _one_of(kind, found, where, limits, name):
    """`found` as the first member of the union `kind` whose type it has."""
    members = [member for member in typing.get_args(kind) if member is not types.NoneType]
    if found is None and len(members) < len(typing.get_args(kind)):
        return None
    for member in members:
        if len(members) == 1 or _fits(member, found):
            return from_json(member, found, where, limits, name)
    raise _refusal(kind, found, where, limits, name)


def _object(kind, found, where, name):
    """The dataclass `kind` from the dictionary `found`."""
    hints = typing.get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        limits = field.metadata.get("limits", NO_LIMITS)
        inside = _join(name, field.name)
        if found.get(field.name) is not None:
            values[field.name] = from_json(hint, found[field.name], where, limits, inside)
        elif field.default is MISSING and field.default_factory is MISSING:
            if types.NoneType not in typing.get_args(hint):
                raise UserError(f"{where}: no '{inside}', expected {_describe(hint, limits)}")
            values[field.name] = None
    try:
        return kind(**values)
    except UserError:
        raise
    except ValueError as e:  # of the dataclass's own __post_init__
        raise UserError(f"{where}: {e}") from None


def _refusal(kind, found, where, limits, name):
    subject = f"'{name}' is" if name else "found"
    return UserError(f"{where}: {subject} {show(found)}, expected {_describe(kind, limits)}")


def _describe(kind, limits):
    """What a value should have been, in words."""
    if limits.choices is not None and typing.get_origin(kind) not in (list, dict):
        return " or ".join(show(choice) for choice in limits.choices)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not types.NoneType]
        return " or ".join(_describe(member, limits) for member in members)
    if dataclasses.is_dataclass(kind):
        return "an object"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        list: "a list",
        dict: "an object",
    }
    origin = typing.get_origin(kind) or kind
    if origin in (int, float):
        return words[origin] + limits.describe()
    return words.get(origin, f"a {origin.__name__}")


def readable(name):
    """A name from a file, which may be anything: as it is if it fits on a line, else shortened."""
    fits = isinstance(name, str) and name.isprintable() and len(name) <= 100
    return name if fits else show(name)


def _join(name, key):
    """The name of a field in an object."""
    return f"{name}.{readable(key)}" if name else readable(key)
