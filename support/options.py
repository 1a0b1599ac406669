"""Command-line options from a dataclass, one for each entry point."""

import argparse
import math
from dataclasses import MISSING, field, fields

import torch

from support.errors import UserError

LARGEST = (
    10**9
)  # of whole numbers, where an option does not say; torch and Python count no further than 2^63


def option(default, help, *, choices=None, low=None, above=None, high=None):
    """A dataclass field that `parse` turns into an option; with MISSING as default, a positional.

    low, high: the smallest and the largest value that are allowed; above: smaller ones are not.
    """
    kind = str if default in (None, MISSING) else type(default)
    metadata = {
        "help": help,
        "type": kind,
        "choices": choices,
        "low": low,
        "above": above,
        "high": high,
    }
    if default is MISSING:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


class OneLineParser(argparse.ArgumentParser):
    """argparse, but a mistake is a UserError in place of the usage's many lines."""

    def error(self, message):
        """End in one line."""
        raise UserError(f"{message}; -h lists the options")


def comma_separated(text):
    """'a,b' -> ('a', 'b')."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def expected_range(low, above, high):
    """The allowed range in words."""
    words = []
    if low is not None:
        words.append(f"at least {low}")
    if above is not None:
        words.append(f"above {above}")
    if high is not None:
        words.append(f"at most {high}")
    return " and ".join(words)


def check_range(flag, value, low=None, above=None, high=None):
    """UserError where a number is not finite, or outside of its range."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} is {value}, expected a finite number")
    too_small = (low is not None and value < low) or (above is not None and value <= above)
    too_large = high is not None and value > high
    if high is None and isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f"{flag} is {value}, expected a number of at most {LARGEST}")
    if too_small or too_large:
        raise UserError(f"{flag} is {value}, expected {expected_range(low, above, high)}")


def parse(cls, argv=None):
    """The command line as an instance of the dataclass `cls`.

    Its docstring is the program's description, its fields are the options. UserError for an option
    that is unknown, or a value of another type or out of its range.
    """
    parser = OneLineParser(description=cls.__doc__)
    for f in fields(cls):
        kind, choices = f.metadata["type"], f.metadata["choices"]
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in (MISSING, "", (), False):
            text += f" (default: {f.default})"
        flag = "--" + f.name.replace("_", "-")
        if f.default is MISSING:
            parser.add_argument(f.name, type=kind, help=text)
        elif kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif kind is tuple:
            parser.add_argument(
                flag, type=comma_separated, default=f.default, metavar="A,B,...", help=text
            )
        else:
            metavar = None if choices else kind.__name__.upper()
            parser.add_argument(
                flag, type=kind, default=f.default, choices=choices, metavar=metavar, help=text
            )
    args = cls(**vars(parser.parse_args(argv)))
    for f in fields(cls):
        value, flag = getattr(args, f.name), "--" + f.name.replace("_", "-")
        if f.metadata["type"] in (int, float):
            limits = (f.metadata[name] for name in ("low", "above", "high"))
            check_range(flag, value, *limits)
        elif f.default and value in ("", ()):  # as where a shell's variable is not set
            raise UserError(f"{flag if f.default is not MISSING else f.name} is empty")
    return args


def not_default(args):
    """{field: flag} of the options that have another value than their default."""
    return {
        f.name: "--" + f.name.replace("_", "-")
        for f in fields(args)
        if getattr(args, f.name) != f.default
    }


def pick_device(device="", dtype=""):
    """(torch.device, torch.dtype) as asked for.

    The defaults are CUDA in bfloat16 where there is a GPU, else the CPU in float32.
    """
    available = torch.cuda.is_available()
    try:
        device = torch.device(device or ("cuda" if available else "cpu"))
    except RuntimeError:
        raise UserError(f"--device is {device!r}, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {device}, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not available:
        raise UserError(f"--device is {device}, but torch sees no GPU; expected cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is {device}, but there are {torch.cuda.device_count()} GPUs")
    default = "bfloat16" if device.type == "cuda" else "float32"
    return device, getattr(torch, dtype or default)
