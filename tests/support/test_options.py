"""Options: what the command line says is what the program gets, or one line says why not."""

from dataclasses import MISSING, dataclass

import pytest
import torch

import grasp
from paper.measure import Arguments as Measure
from real.job import Arguments as Train
from real.spectrum import Arguments as Identify
from support.errors import UserError
from support.options import option, parse, pick_device


@dataclass(frozen=True)
class Options:
    """A program."""

    folder: str = option(MISSING, "a folder")
    steps: int = option(3, "how many", low=1, high=9)
    rate: float = option(0.5, "of 100 %", above=0)
    names: tuple = option((), "some")
    fast: bool = option(False, "whether")
    kind: str = option("a", "which", choices=("a", "b"))
    some_long_name: int = option(0, "with dashes")


def refused(cls, *argv):
    with pytest.raises(UserError) as error:
        parse(cls, argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_defaults_are_those_of_the_dataclass():
    assert parse(Options, ["here"]) == Options("here")


def test_each_type_is_read_as_itself():
    argv = ["x", "--steps", "9", "--rate", "1e-3", "--names", "p, q,", "--fast", "--kind", "b"]
    found = parse(Options, [*argv, "--some-long-name", "-4"])
    assert found == Options("x", 9, 1e-3, ("p", "q"), True, "b", -4)


@pytest.mark.parametrize(
    "argv,message",
    [
        (["--steps", "0"], "--steps is 0, expected at least 1 and at most 9"),
        (["--steps", "10"], "--steps is 10, expected at least 1 and at most 9"),
        (["--steps", "2.5"], "argument --steps: invalid int value: '2.5'; -h lists the options"),
        (["--steps", "9" * 5000], "argument --steps: invalid int value"),
        (["--rate", "0"], "--rate is 0.0, expected above 0"),
        (["--rate", "nan"], "--rate is nan, expected a finite number"),
        (["--rate", "inf"], "--rate is inf, expected a finite number"),
        (["--kind", "c"], "argument --kind: invalid choice: 'c'"),
        (["--stepz", "1"], "unrecognized arguments: --stepz"),
    ],
)
def test_a_value_of_another_type_or_out_of_range_is_refused(argv, message):
    assert refused(Options, "here", *argv).startswith(message)


def test_a_missing_positional_is_named():
    assert "folder" in refused(Options)


# What the programs' own options refuse: (program, option, values, a part of the message).
RANGES = [
    (Train, "--lr", ("nan", "inf", "0", "-1"), "--lr is"),
    (Train, "--alpha", ("nan", "inf", "0", "-2"), "--alpha is"),
    (Train, "--weight-decay", ("nan", "-0.1"), "--weight-decay is"),
    (Train, "--rank", ("0", "-4"), "--rank is"),
    (Train, "--epochs", ("0", "-1", "1000000000"), "--epochs is"),
    (Train, "--batch-size", ("0", "-1"), "--batch-size is"),
    (Train, "--micro-batch", ("0", "-1"), "--micro-batch is"),
    (Train, "--max-steps", ("-1",), "--max-steps is -1, expected at least 0"),
    (Train, "--max-len", ("0", "3", "-1"), "--max-len is"),
    (Train, "--held-out", ("0", "1", "nan", "-0.1"), "--held-out is"),
    (Train, "--warmup", ("-1",), "--warmup is"),
    (Train, "--seed", ("-1", str(2**64)), "--seed is"),
    (Train, "--until-loss", ("-1", "nan"), "--until-loss is"),
    (Train, "--method", ("magic",), "'magic'"),
    (Train, "--scaling", ("none",), "'none'"),
    (Train, "--dtype", ("int8", "float16"), "argument --dtype"),
    (grasp.Arguments, "--seeds", ("0", "-3"), "--seeds is"),
    (grasp.Arguments, "--seed", ("-1",), "--seed is"),
    (grasp.Arguments, "--subspace-rank", ("0",), "--subspace-rank is"),
    (Measure, "--seed", ("-1",), "--seed is"),
    (Measure, "--max-new-tokens", ("0", "-1"), "--max-new-tokens is"),
    (Measure, "--held-out", ("0", "nan"), "--held-out is"),
]


@pytest.mark.parametrize(
    "program,flag,value,message",
    [(program, flag, value, text) for program, flag, values, text in RANGES for value in values],
)
def test_the_programs_ranges_end_in_one_line(program, flag, value, message):
    assert message in refused(program, flag, value)


def test_identify_refuses_a_rank_below_one():
    assert refused(Identify, "folder", "--rank", "0") == "--rank is 0, expected at least 1"


@pytest.mark.parametrize("program", [Train, grasp.Arguments, Measure, Identify])
def test_every_option_has_a_help_line_and_the_program_a_description(program, capsys):
    with pytest.raises(SystemExit) as end:
        parse(program, ["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and " ".join(program.__doc__.split()) in " ".join(text.split())
    for block in text.split("\n  --")[1:]:
        assert len(block.split()) > 2, block


def test_the_cpu_works_in_float32_unless_asked_otherwise():
    assert pick_device("cpu") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bfloat16") == (torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize(
    "device,message",
    [
        ("gpu", "--device is 'gpu', expected cpu, cuda or cuda:N"),
        ("meta", "--device is meta, expected cpu, cuda or cuda:N"),
        ("mps", "--device is mps, expected cpu, cuda or cuda:N"),
        ("cuda:99", "--device is cuda:99, but"),
        ("cpu:x", "--device is 'cpu:x', expected"),
    ],
)
def test_a_device_that_is_none_is_refused_in_one_line(device, message):
    with pytest.raises(UserError) as error:
        pick_device(device)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
