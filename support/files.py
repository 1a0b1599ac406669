"""Files that are whole or absent, and errors that name them."""

import contextlib
import hashlib
import io
import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.errors import UserError
from support.processes import RANK


def writable_folder(folder, names=(), expected="a folder that files can be written to"):
    """`folder` as a Path, made where there was none; tried before there is work to lose.

    UserError where no file can be written in it, or there is no room for one of the file `names`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"probe")
    except OSError as e:
        raise UserError(f"--out {folder}: {e.strerror}, expected {expected}") from None
    for name in names:
        path = folder / name
        if path.exists() and not path.is_file():
            what = "a folder" if path.is_dir() else "no plain file"
            raise UserError(f"{path}: is {what}, expected room for a file of that name")
    return folder


def writable_file(path, may_replace=lambda path: True):
    """`path` as a Path, its folder made; tried before there is work to lose. UserError as above.

    Where a file is there already, says that it will be replaced; UserError where it may not be.
    """
    path = Path(path)
    writable_folder(path.parent, [path.name], f"one that {path.name} can be written to")
    if path.exists():
        if not may_replace(path):
            raise UserError(f"{path}: is there already and of another kind; expected another --out")
        print(f"{path} is there already and will be replaced")
    return path


def has_keys(*keys):
    """A test for `writable_file`: whether the file there is a JSON object with these keys."""

    def is_ours(path):
        try:
            found = read_json(path, "")
        except UserError:
            return False
        return isinstance(found, dict) and all(key in found for key in keys)

    return is_ours


@contextlib.contextmanager
def named(path):
    """Give an OSError within this context the file's name: a failed write knows none of its own."""
    try:
        yield
    except OSError as e:
        e.filename = str(path)
        raise


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary name beside `path`, renamed at the end: `path` is absent or complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with named(path):
            yield temporary
            if RANK == 0:
                os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as JSON to `path`, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def write_torch(path, value):
    """torch.save by way of memory: a full disk is then an OSError with a reason, not torch's."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_torch(path, what):
    """What torch.save wrote to `path`, on the CPU, or a UserError: it is not `what`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle that torch did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises whatever its unpickler met: OSError, RuntimeError, ...
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{path}: not {what} ({reason})") from None


def read_json(path, what):
    """The JSON in `path`, or a UserError that names the file and `what` it should have been."""
    try:
        with named(path):
            return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected {what}") from None
    except (ValueError, RecursionError) as e:  # of JSON, of UTF-8, of a number with too many digits
        raise UserError(f"{path}: not valid JSON ({e}), expected {what}") from None


def contents(path):
    """A fingerprint of a file, or of the files of a folder by their names, that tells others apart.

    Of a large file only some blocks are read: weights of gigabytes would take minutes.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    sha = hashlib.sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            sha.update(f"{file.name if path.is_dir() else ''} {file.stat().st_size} ".encode())
            for block in some_blocks(file):
                sha.update(block)
    return sha.hexdigest()[:16]


def some_blocks(path, n=1024, size=4096):
    """The bytes of `n` blocks spread over the file, or of all of it where it has not more."""
    total = path.stat().st_size
    stride = max(total // n, size)
    with named(path), open(path, "rb") as file:
        for start in range(0, total, stride):
            file.seek(start)
            yield file.read(size)


def open_safetensors(path):
    """An open safetensors file, or a UserError that names it."""
    if Path(path).is_dir():
        raise UserError(f"{path}: is a folder, expected a safetensors file")
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected safetensors") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e})") from None
