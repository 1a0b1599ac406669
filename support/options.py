"""A program's options from a dataclass, and its end in one line where a user can mend it."""

import argparse
import os
import sys
from dataclasses import MISSING, field, fields


def option(default, help, choices=None):
    """A dataclass field that `parse` makes an option of; with MISSING as default, a positional."""
    return field(default=default, metadata={"help": help.replace("%", "%%"), "choices": choices})


def comma_separated(text):
    """'a,b' -> ('a', 'b')."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse(cls, argv=None):
    """The command line as an instance of the dataclass `cls`, whose docstring describes it."""
    how = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser(description=cls.__doc__, **how)
    for f in fields(cls):
        flag = "--" + f.name.replace("_", "-")
        if f.default is MISSING:
            parser.add_argument(f.name, **f.metadata)
        elif isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            kind = comma_separated if isinstance(f.default, tuple) else type(f.default)
            parser.add_argument(flag, type=kind, default=f.default, **f.metadata)
    return cls(**vars(parser.parse_args(argv)))


def run(main):
    """Call `main`; a mistake that a user can mend ends in one line (GRASP_TRACEBACK: in full)."""
    try:
        main()
    except (ValueError, OSError) as e:
        if os.environ.get("GRASP_TRACEBACK"):
            raise
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is on disk")
