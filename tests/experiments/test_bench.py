"""The benchmark runs and writes what it measured; no time is asserted, machines are shared."""

import json
import sys

import pytest
import torch

from experiments import bench
from identify import output_spectra
from lora import lora_modules
from support.errors import UserError


def run_bench(monkeypatch, out, *options):
    arguments = ["bench", "--tiny", "--repeats", "1", "--out", str(out), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    bench.main()
    return json.loads(out.read_text())["rows"]


def rows_of(rows, part):
    found = [row for row in rows if row["part"] == part]
    assert all(row["median"] >= 0 for row in found)
    return [row["what"] for row in found]


def test_parts_without_an_oracle_run_and_write_their_rows(tmp_path, monkeypatch):
    rows = run_bench(monkeypatch, tmp_path / "new" / "bench.json", "--only", "b,c,g")
    assert "toy, all-linear: grasp_online / naive (CPU s)" in rows_of(rows, "b")
    assert "GPT-2-small step: grasp_online / naive (s)" in rows_of(rows, "b")
    assert any("peak memory" in what for what in rows_of(rows, "c"))
    assert any("share of a step" in what for what in rows_of(rows, "g"))


def test_generation_beside_transformers_gives_the_very_same_tokens(tmp_path, monkeypatch):
    rows = run_bench(monkeypatch, tmp_path / "bench.json", "--only", "d")
    assert "rows with the very same tokens, of 8" in rows_of(rows, "d")
    assert rows[-1]["median"] == 8


def test_a_look_is_timed_at_the_shapes_of_qwen_7b():
    linears = bench.large_linears(bench.QWEN_7B)
    assert len(linears) == 196 == 28 * 7
    shapes = {path.split(".")[-1]: tuple(linears[path].weight.shape) for path in linears}
    assert shapes["k_proj"] == shapes["v_proj"] == (512, 3584)
    assert shapes["q_proj"] == shapes["o_proj"] == (3584, 3584)
    assert shapes["gate_proj"] == shapes["up_proj"] == (18944, 3584)
    assert shapes["down_proj"] == (3584, 18944)


def test_the_timed_look_takes_a_direction_from_every_module_and_projects_it_away():
    torch.manual_seed(0)
    updates = bench.Updates(bench.TINY_7B, rank=16)
    look = bench.recipe("grasp_online", None, None).look
    n_joined = bench.look_once(updates, look)
    assert n_joined >= len(lora_modules(updates))
    assert all(S[-1] <= 1e-4 * S[0] for _, S in output_spectra(updates).values())


@pytest.mark.parametrize("out", ["a_file/bench.json", "a_folder"])
def test_a_place_where_nothing_can_be_written_is_named_before_anything_is_measured(
    out, tmp_path, monkeypatch
):
    (tmp_path / "a_file").write_text("")
    (tmp_path / "a_folder").mkdir()
    measured = []

    def part(args, folder, report):
        measured.append(folder)

    monkeypatch.setitem(bench.PARTS, "g", part)
    with pytest.raises((UserError, OSError), match=str(tmp_path / out.split("/")[0])):
        run_bench(monkeypatch, tmp_path / out, "--only", "g")
    assert measured == []


def test_an_unknown_part_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="'z'"):
        run_bench(monkeypatch, tmp_path / "bench.json", "--only", "a,z")
