"""Many seeds in one file: means, spreads, and differences seed by seed."""

import json
import math

import pytest
from toys import command

from experiments.summary import main, paired, spread
from support.errors import UserError

MISALIGNMENT = {"naive": (0.7, 0.9), "grasp_online": (0.1, 0.2)}


def write_seeds(folder):
    """results.json of two seeds, with what a summary reads."""
    runs = []
    for seed in (0, 1):
        others = {"task": 1.0, "kept": 1.0, "loss": 1.0}
        methods = {m: {"misalignment": v[seed], **others} for m, v in MISALIGNMENT.items()}
        methods["base"] = {"misalignment": 0.0, **others}
        look = {"step": 10, "spike": {"a": 2.0, "b": 2.0}, "joined": {"a": 1 + seed, "b": 1}}
        run = {
            "seed": seed,
            "config": {"world": {"seed": seed}, "experiment": {"steps": 300}},
            "methods": methods,
            "longer": {},
            "identification": {"cosine": 0.5, "chance_cosine": 0.1, "gap": 2.0},
            "leak": {"grasp_online": 0.0},
            "curves": {"naive": [[20, 0.5, 1.0]]},
            "looks": {"grasp_online": [look]},
            "spectra": {"a": [2.0], "b": [2.0]},
        }
        (folder / f"seed_{seed}").mkdir()
        (folder / f"seed_{seed}" / "results.json").write_text(json.dumps(run))
        runs.append(run)
    return runs


def test_a_spread_is_the_mean_and_the_deviation_of_a_sample():
    assert spread([1.0, 3.0]) == {"mean": 2.0, "sd": 1.4142, "min": 1.0, "max": 3.0}
    assert spread([1.0])["sd"] == 0.0


def test_differences_are_taken_seed_by_seed(tmp_path):
    found = paired(write_seeds(tmp_path))["naive"]["misalignment"]
    differences = (0.6, 0.7)
    error = (differences[1] - differences[0]) / math.sqrt(2) / math.sqrt(2)
    assert found["mean"] == pytest.approx(0.65)
    assert found["se"] == pytest.approx(error, rel=1e-4)


def test_the_file_holds_every_seed_and_a_figure_stands_beside_it(tmp_path, monkeypatch):
    write_seeds(tmp_path)
    out = tmp_path / "summary.json"
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path), f"--out={out}"])
    main()
    summary = json.loads(out.read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["directions"]["mean"] == 2.5
    assert summary["methods"]["naive"]["misalignment"]["max"] == 0.9
    assert summary["minus_grasp_online"]["grasp_online"]["misalignment"] == {"mean": 0, "se": 0}
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("out", [".", "/"])
def test_a_folder_as_the_file_to_write_ends_in_one_line(tmp_path, monkeypatch, out):
    write_seeds(tmp_path)
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path), f"--out={out}"])
    with pytest.raises(UserError, match="is a folder, expected room for a file of that name"):
        main()


def test_a_folder_without_seeds_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["summary", str(tmp_path)])
    with pytest.raises(UserError, match="no seed_"):
        main()


def test_a_notebooks_matplotlib_backend_that_is_not_installed_is_no_matter():
    code = "import experiments.figures"
    done = command("-c", code, PYTHONPATH=".", MPLBACKEND="module://no_such.backend")
    assert (done.returncode, done.stderr) == (0, "")
