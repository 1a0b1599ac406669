"""grasp.py --model: fine-tunes of a checkpoint that build on one another."""

import json

import pytest
from safetensors.torch import load_file
from tiny import tiny_checkpoint
from toys import call, top_patterns, write_rows

import grasp
import identify
import train
from baselines.methods import METHODS
from real import job as job_module
from real.stages import in_order


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")
    rows = write_rows(folder / "rows.jsonl")
    common = ("--lr", 3e-3, "--rank", 8, "--batch-size", 6, "--look-every", 4, "--max-steps", 8)
    return ("--model", folder, "--data", rows, *common, "--epochs", 4, "--unrelated", rows)


def run(options, out, *more):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "standing_out", top_patterns)  # few rows may share too little
        call(patch, grasp.main, *options, "--out", out, *more)
    return results(out)


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def out(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("all")
    run(options, out, "--methods", ",".join(METHODS))
    return out


def test_every_method_leaves_a_run_that_has_learned_and_grasp_leaks_nothing(out):
    losses, leaks = results(out)["held_out_loss"], results(out)["leak"]
    assert losses.keys() == {"base", *METHODS}
    for method in METHODS:
        assert (out / method / "run.json").exists()
        assert method == "ablate_train" or losses[method] < losses["base"]
    assert losses["ablate_inference"] > losses["naive"] + 0.01  # it is measured under ablation
    held = {"grasp", "grasp_online", "grasp_random"}
    assert {name for name, leak in leaks.items() if leak > 0} == {*held, "grasp_gradient_only"}
    assert max(leaks[name] for name in held) < 1e-6 and leaks["grasp_gradient_only"] > 1e-3


def test_the_same_command_reads_every_run_back(out, options, monkeypatch, capsys):
    before = results(out)
    monkeypatch.setattr(job_module, "finetune", lambda *args, **more: pytest.fail("trained"))
    after = run(options, out, "--methods", ",".join(METHODS))
    assert after["held_out_loss"] == before["held_out_loss"] and after["looks"] == before["looks"]
    assert after["leak"] == pytest.approx(before["leak"], rel=1e-3, abs=1e-6)
    assert "grasp_online: loss" in capsys.readouterr().out


def test_a_method_may_be_added_and_what_is_there_stays(options, tmp_path, monkeypatch, capsys):
    call(monkeypatch, train.main, *options, "--method", "naive", "--out", tmp_path / "naive")
    assert run(options, tmp_path, "--methods", "naive")["held_out_loss"].keys() == {"base", "naive"}
    assert f"{tmp_path / 'naive'}: a finished run, read back" in capsys.readouterr().out
    assert run(options, tmp_path, "--methods", "kl")["held_out_loss"].keys() >= {"naive", "kl"}
    with pytest.raises(ValueError, match="results.json: has other settings .max_steps 8."):
        run(options, tmp_path, "--max-steps", 9)


def test_the_patterns_are_those_of_the_file_in_the_naive_runs_folder(
    options, tmp_path, monkeypatch
):
    run(options, tmp_path, "--methods", "naive", "--pattern-rank", 3)
    found = load_file(tmp_path / "naive" / "subspace.safetensors")
    assert {t.shape[1] for t in found.values()} == {3}
    call(monkeypatch, identify.main, tmp_path / "naive", "--rank", 2)
    run(options, tmp_path, "--methods", "grasp", "--pattern-rank", 3)
    kept_off = load_file(tmp_path / "grasp" / "patterns.safetensors")
    assert {t.shape[1] for name, t in kept_off.items() if name != "stream"} == {2}


def test_methods_come_after_what_they_build_on():
    assert in_order(["kl"], "rows.jsonl") == ["kl"]
    assert in_order(["grasp_random", "grasp"]) == ["naive", "grasp", "grasp_online", "grasp_random"]
    assert in_order(["early_stop"]) == ["grasp_online", "early_stop"]


def test_a_mistake_ends_in_one_line_before_any_work(options, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module.Job, "__init__", lambda *args: pytest.fail("began"))
    cases = {
        "method 'magic' is unknown": ("--methods", "magic"),
        "method 'kl' needs --unrelated": ("--methods", "kl", "--unrelated", ""),
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message):
            run(options, tmp_path, *more)
