"""How a program starts and ends: seeds, signals, one line for whatever goes wrong."""

import contextlib
import errno
import io
import os
import re
import signal
import sys

import torch

from support.errors import UserError
from support.processes import RANK, several

# An OSError that names a file is about a user's path. One without a name is our fault and keeps its
# traceback, unless it is of a full disk: `program > file`, as all other writes have a name.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main, processes=None):
    """Call `main` and end in one line and a non-zero exit where a user can mend what went wrong.

    processes: the context under which torchrun may start this program; None where it may not.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if RANK or sys.stdout is None:  # None: the shell closed it, `>&-`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that the terminal can't show
    try:
        if processes is None and several():
            raise UserError(
                "this program is one process; torchrun starts train.py and grasp.py --model"
            )
        with processes or contextlib.nullcontext():
            main()
        sys.stdout.flush()
    except SystemExit as e:  # -h
        end(e.code)
    except UserError as e:
        end(f"error: {e}")
    except KeyboardInterrupt:
        ignore_signals()
        print(
            "interrupted: what was finished is on disk; the same command goes on from there "
            "(train.py: with --resume)",
            file=sys.stderr,
        )
        end(130)
    except BrokenPipeError:  # `... | head`: the reader has enough
        end(141)
    except torch.OutOfMemoryError as e:
        end(f"error: out of GPU memory: {str(e).splitlines()[0]}")
    except (MemoryError, RuntimeError) as e:  # torch has no class of its own for the CPU's
        if not (isinstance(e, MemoryError) or re.search("allocate memory|unable to mmap", str(e))):
            raise
        end("error: out of memory; fewer rows at once need less (--micro-batch, --sample-batch)")
    except OSError as e:
        if e.filename is None and e.errno not in FULL:
            raise
        end(f"error: {e.strerror}: {e.filename or 'standard output'}")


def end(how):
    """End the program with an exit code, or with a text, one line whatever is in it, and code 1."""
    ignore_signals()
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe, a full disk: Python would try again at its end, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(how, str):
        how = "".join(c if c.isprintable() else repr(c)[1:-1] for c in how)
    sys.exit(how)


def ignore_signals():
    """Let no further Ctrl-C or kill, as torchrun sends one, end the program in a traceback."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)


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
