"""Files that are whole or absent, the reading of somebody else's files, and a progress bar."""

import contextlib
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary name beside `path`, renamed at the end: `path` is absent or complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # only there if something went wrong, such as a full disk


def write_json(path, value):
    """Write `value` as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def reading(path, what):
    """Make one ValueError of whatever is wrong with a user's file, which should be `what`."""
    try:
        yield
    except OSError:  # it can't be opened, and the error says so
        raise
    except Exception as e:  # KeyError, TypeError, UnicodeDecodeError, SafetensorError, struct.error
        found = f"no {e}" if isinstance(e, KeyError) else str(e) or type(e).__name__
        raise ValueError(f"{path}: not {what}: {' '.join(found.split())}") from e


def progress(steps, label):
    """tqdm's bar over `steps`: at every moment on a terminal, every ten seconds in a log."""
    return tqdm(steps, label, leave=False, mininterval=0.1 if sys.stderr.isatty() else 10)
