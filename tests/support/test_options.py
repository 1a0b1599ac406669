"""Options: what the command line says is what the program gets, or one line says why not."""

from dataclasses import MISSING, dataclass

import pytest

from support.options import option, parse, run


@dataclass(frozen=True)
class Options:
    """A program."""

    folder: str = option(MISSING, "a folder")
    rate: float = option(0.5, "of 100 %")
    names: tuple = option(("a",), "some")
    fast: bool = option(False, "whether")
    kind: str = option("a", "which", choices=("a", "b"))
    some_long_name: int = option(3, "with dashes")


def test_each_type_is_read_as_itself_and_the_defaults_are_the_dataclasss():
    argv = ["x", "--rate", "1e-3", "--names", "p, q,", "--fast", "--kind", "b"]
    found = parse(Options, [*argv, "--some-long-name", "-4"])
    assert found == Options("x", 1e-3, ("p", "q"), True, "b", -4)
    assert parse(Options, ["here"]) == Options("here")


@pytest.mark.parametrize(
    "argv,message",
    [
        (["x", "--some-long-name", "2.5"], "argument --some-long-name: invalid int value: '2.5'"),
        (["x", "--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["x", "--nam", "p"], "unrecognized arguments: --nam"),
        ([], "arguments are required: folder"),
        (["-h"], "--rate RATE of 100 % (default: 0.5)"),
    ],
)
def test_a_mistake_in_an_option_is_named_and_help_has_its_line_and_default(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(Options, argv)
    printed = capsys.readouterr()
    assert message in " ".join((printed.out + printed.err).split())
    assert (end.value.code == 0) == (argv == ["-h"])


@pytest.mark.parametrize(
    "raised,traceback,ends",
    [
        (ValueError("f.json: no row"), "", "error: f.json: no row"),
        (FileNotFoundError(2, "No such file", "f"), "", "error: [Errno 2] No such file: 'f'"),
        (KeyboardInterrupt(), "", "interrupted; the same command goes on from what is on disk"),
        (ValueError(), "1", None),
        (TypeError(), "", None),  # a fault of the program's own
    ],
)
def test_a_users_mistake_ends_in_one_line_and_a_fault_keeps_its_traceback(
    raised, traceback, ends, monkeypatch
):
    def main():
        raise raised

    monkeypatch.setenv("GRASP_TRACEBACK", traceback)
    with pytest.raises(SystemExit if ends else type(raised)) as end:
        run(main)
    assert not ends or end.value.code == ends  # Python prints it and exits with 1
