"""The benchmark runs and writes what it measured; no time is asserted, machines are shared."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("part", ["b", "c", "d"])
def test_each_part_runs_at_toy_size_and_writes_its_rows(part, tmp_path):
    out = tmp_path / "bench.json"
    done = subprocess.run([sys.executable, ROOT / "bench.py", "--tiny", "--only", part, "--repeats", "1", "--out", out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert rows and {row["part"] for row in rows} == {part} and all(row["median"] >= 0 for row in rows)
