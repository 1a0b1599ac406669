"""What the entry points share: options from a dataclass, one-line errors, progress, seeding, files that are whole or absent."""
import argparse
import contextlib
import errno
import io
import json
import os
import signal
import sys
import time
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm


RANK = int(os.environ.get("RANK", 0))  # of the processes that torchrun starts, the first alone prints and writes


class UserError(Exception):
    """A mistake that the user can mend. Its text is the whole message: what was found, where, what was expected."""


def option(default, help, *, type=None, choices=None):
    """A dataclass field that `parse` turns into a command-line option; MISSING as the default makes it positional."""
    metadata = {"help": help, "type": type or (str if default in (None, MISSING) else default.__class__), "choices": choices}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def parse(cls, argv=None):
    """The command line as an instance of the dataclass `cls`: its docstring is the description, its fields the options."""
    parser = argparse.ArgumentParser(description=cls.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in fields(cls):
        flag, kind = "--" + f.name.replace("_", "-"), f.metadata["type"]
        if f.default is MISSING:
            parser.add_argument(f.name, type=kind, help=f.metadata["help"])
        elif kind is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            parse_one = (lambda text: tuple(t for t in text.split(",") if t)) if kind is tuple else kind
            metavar = None if f.metadata["choices"] else {tuple: "A,B,..."}.get(kind, kind.__name__.upper())
            parser.add_argument(flag, type=parse_one, default=f.default, choices=f.metadata["choices"], metavar=metavar,
                                help=f.metadata["help"].replace("%", "%%"))
    return cls(**vars(parser.parse_args(argv)))


def run(main, joined=None):
    """Call `main`, within the context `joined` where torchrun may start it; a user's mistake, Ctrl-C, a kill, a full disk and full
    memory each end in one line and a non-zero exit."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if joined is None and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.exit("error: this program is one process; torchrun starts train.py and grasp.py --model alone")
    if RANK:
        sys.stdout = open(os.devnull, "w")
    try:
        with joined or contextlib.nullcontext():
            main()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("interrupted: what was finished is on disk; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of GPU memory: {str(e).splitlines()[0]}")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise
        sys.exit(f"error: {e.strerror}" + (f": {e.filename}" if e.filename else ""))


class Progress:
    """A tqdm bar on a terminal, a plain line for every tenth of the work elsewhere. `update(loss=...)` after each step."""

    def __init__(self, total, label, start=0):
        self.total, self.label, self.done = total, label, start
        self.bar = tqdm(total=total, desc=label, initial=start, leave=False, dynamic_ncols=True,
                        disable=RANK > 0) if sys.stderr.isatty() else None
        self.began = time.monotonic()

    def update(self, **numbers):
        self.done += 1
        text = "  ".join(f"{k} {v:.4g}" for k, v in numbers.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
            if self.done == self.total:
                self.bar.close()
        elif self.done * 10 // self.total > (self.done - 1) * 10 // self.total and not RANK:
            print(f"{self.label}: {self.done}/{self.total}  {text}  {time.monotonic() - self.began:.0f} s", file=sys.stderr, flush=True)


def seed_everything(seed):
    """The one place where random numbers are seeded; returns a generator for draws that must not disturb the global one."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary name beside `path` and renames it at the end, so that `path` is always absent or complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        if not RANK:
            os.replace(temporary, path)
    except OSError as e:
        e.filename = str(path)  # a failed write knows no name of its own
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_torch(path, value):
    """torch.save by way of memory: a full disk is then an OSError, with a reason, and not torch's own."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with whole_file(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def write_json(path, value):
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path, what):
    """The JSON in `path`, or a UserError that names the file and `what` it should have been."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected {what}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid JSON ({e}), expected {what}") from None


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file, expected safetensors") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"{path}: not a whole safetensors file ({e})") from None


@contextlib.contextmanager
def deferred_interrupt():
    """Yields a list that is no longer empty once Ctrl-C or a kill has come: for work that must end between two steps."""
    came, previous = [], {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for s in previous:
            signal.signal(s, lambda number, frame: came.append(number))
        yield came
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def pick_device(device="", dtype=""):
    """(torch.device, torch.dtype): what was asked for, else CUDA in bfloat16 where there is one, else the CPU in float32."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no GPU; expected cpu")
    return device, getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32"))
