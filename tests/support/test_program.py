"""How a program ends: one line where a user can mend it, a traceback where it is ours."""

import errno
import io
import os
import signal
import sys

import pytest
import torch
from toys import command

from support.errors import UserError
from support.program import deferred_interrupt, run, seed_everything


@pytest.fixture(autouse=True)
def signals_as_before():
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def ending(error):
    """(exit code or message) of a program that raises `error`."""

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run(main)
    return end.value.code


def os_error(number, *name):
    return OSError(number, os.strerror(number), *name)


OUT_OF_MEMORY = "error: out of memory; fewer rows at once need less (--micro-batch, --sample-batch)"


@pytest.mark.parametrize(
    "error,expected",
    [
        (UserError("file: what was wrong"), "error: file: what was wrong"),
        (os_error(errno.ENOSPC, "out/x"), "error: No space left on device: out/x"),
        (os_error(errno.EACCES, "x"), "error: Permission denied: x"),
        (os_error(errno.EISDIR, "x"), "error: Is a directory: x"),
        (os_error(errno.ENAMETOOLONG, "x"), "error: File name too long: x"),
        (os_error(errno.ELOOP, "x"), "error: Too many levels of symbolic links: x"),
        (os_error(errno.ENOSPC), "error: No space left on device: standard output"),
        (torch.OutOfMemoryError("no room\nand a table"), "error: out of GPU memory: no room"),
        (MemoryError(), OUT_OF_MEMORY),
        (RuntimeError("alloc_cpu.cpp: can't allocate memory: you tried 9 bytes"), OUT_OF_MEMORY),
        (RuntimeError("unable to mmap 9 bytes from file <x>"), OUT_OF_MEMORY),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, expected):
    assert ending(error) == expected


def test_ctrl_c_ends_with_a_line_and_130(capsys):
    assert ending(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), RuntimeError("ours"), os_error(errno.EBADF)]
)
def test_our_own_mistakes_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run(main)


def test_a_kill_is_as_ctrl_c():
    def main():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    with pytest.raises(SystemExit) as end:
        run(main)
    assert end.value.code == 130


@pytest.mark.parametrize("error", [UserError("file: what was wrong"), KeyboardInterrupt()])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_kill_while_the_program_ends_changes_nothing(error, sent):
    """As torchrun sends one to a process that has just said that another is gone."""
    expected = ending(error)

    class Killed(io.StringIO):
        def flush(self):
            os.kill(os.getpid(), sent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", Killed())
        assert ending(error) == expected


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_deferred_interrupt_waits_for_its_place(sent):
    with deferred_interrupt() as came:
        os.kill(os.getpid(), sent)
        assert came == [sent]


def test_a_deferred_interrupt_gives_the_handlers_back():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), deferred_interrupt():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_seeding_repeats_torchs_draws():
    draws = []
    for _ in range(2):
        seed_everything(5)
        draws.append(torch.randn(3))
    assert torch.equal(*draws)


PRINTS = """
import sys
from support.program import run

def main():
    for i in range(100_000):
        print(sys.argv[1], i)

run(main)
"""


def test_a_closed_pipe_ends_without_a_word(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS)
    line = f"{sys.executable} {tmp_path / 'prints.py'} x | head -1; echo ${{PIPESTATUS[0]}}"
    done = command_line(line)
    assert done.stdout.split() == ["x", "0", "141"] and done.stderr == ""


def command_line(line):
    code = f"import subprocess; subprocess.run(['bash', '-c', {line!r}])"
    return command("-c", code, PYTHONPATH=".")


def test_what_the_terminal_cannot_show_is_escaped(tmp_path):
    (tmp_path / "prints.py").write_text(PRINTS.replace("100_000", "1"))
    done = command(tmp_path / "prints.py", "ordner-ü", PYTHONPATH=".", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "ordner-\\xfc 0\n", "")
