"""The benchmark runs, and what it times is the same on both sides; no time is asserted."""

import re

import torch
from toys import call

from experiments import bench


def test_a_table_of_every_part_is_printed_and_both_sides_compute_the_same(monkeypatch, capsys):
    monkeypatch.setattr(bench, "LINEARS_7B", [(24, 40), (40, 24)])
    options = ("--repeats", "1", "--tokens", "20", "--rows", "4", "--rank", "16")
    call(monkeypatch, bench.main, *options, "--new-tokens", "4")
    table = capsys.readouterr().out
    assert "(4 of 4 rows the same)" in table
    assert float(re.search(r"losses differ by (\S+)\)", table)[1]) < 1e-4
    for part in ("epoch of 4 rows", "`grasp`", "`grasp_online`", "a look", "identification"):
        assert part in table
    rows = [line for line in table.split("\n") if line.startswith("| ")][1:]
    assert len(rows) == 8 and all(re.search(r"\| [\d.e-]+ \([\d.e-]+-", row) for row in rows)


def test_sides_take_turns_and_the_first_turn_does_not_count():
    args, order = bench.Arguments(repeats=2), []
    seconds = bench.turns(args, lambda: order.append("a"), lambda: order.append("b"))
    assert order == ["a", "b"] * 3
    assert [len(times) for times in seconds] == [2, 2]


def test_the_shapes_timed_are_those_of_qwen_7b_and_padding_is_in_no_loss():
    parameters = sum(32 * (d_in + d_out) for d_in, d_out in bench.LINEARS_7B)
    assert (len(bench.LINEARS_7B), parameters) == (196, 80_740_352)  # of PEFT at rank 32
    rows = [(torch.arange(1, n), torch.arange(1, n) > 2) for n in (4, 6)]
    batch = bench.collated(rows, "cpu")
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
    assert batch["labels"].tolist() == [[-100, -100, 3, -100, -100], [-100, -100, 3, 4, 5]]
