"""Files that are whole or absent, and errors that name them."""

import contextlib
import io
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.errors import UserError
from support.processes import RANK


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary name beside `path`, renamed at the end: `path` is absent or complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        if RANK == 0:
            os.replace(temporary, path)
    except OSError as e:
        e.filename = str(path)  # a failed write knows no name of its own
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as JSON to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def write_torch(path, value):
    """torch.save by way of memory: a full disk is then an OSError with a reason, not torch's."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_json(path, what):
    """The JSON in `path`, or a UserError that names the file and `what` it should have been."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected {what}") from None
    except (ValueError, RecursionError) as e:  # of JSON, of UTF-8, of a number with too many digits
        raise UserError(f"{path}: not valid JSON ({e}), expected {what}") from None


def open_safetensors(path):
    """An open safetensors file, or a UserError that names it."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected safetensors") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e})") from None
