"""How a program starts and ends: seeds, signals, one line for whatever goes wrong."""

import contextlib
import errno
import io
import os
import signal
import sys

import torch

from support.errors import UserError
from support.processes import RANK, several

# What a user's path or disk can cause; any other OSError is our fault and keeps its traceback.
USER_ERRNOS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EPERM,
)


def run(main, processes=None):
    """Call `main` and end in one line and a non-zero exit where a user can mend what went wrong.

    processes: the context under which torchrun may start this program; None where it may not.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if processes is None and several():
        sys.exit(
            "error: this program is one process; torchrun starts train.py and grasp.py --model"
        )
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal can't show
    try:
        with processes or contextlib.nullcontext():
            main()
        sys.stdout.flush()
    except UserError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print(
            "interrupted: what was finished is on disk; the same command goes on from there",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # `... | head`: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except torch.OutOfMemoryError as e:
        sys.exit(f"error: out of GPU memory: {str(e).splitlines()[0]}")
    except OSError as e:
        if e.errno not in USER_ERRNOS:
            raise
        place = f": {e.filename}" if e.filename else ""
        sys.exit(f"error: {e.strerror}{place}")


def seed_everything(seed):
    """Seed torch's global generator: the one place where that is done."""
    torch.manual_seed(seed)


@contextlib.contextmanager
def deferred_interrupt():
    """Yield a list that is no longer empty once Ctrl-C or a kill has come.

    For work that must end between two steps.
    """
    came = []
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for s in previous:
            signal.signal(s, lambda number, frame: came.append(number))
        yield came
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
