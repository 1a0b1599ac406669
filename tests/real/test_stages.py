"""grasp.py --model: fine-tunes of a checkpoint that build on one another."""

import json

import pytest
from paper_helpers import read_lines, write_checkpoint
from safetensors.torch import load_file
from toys import call, every_top_direction, write_rows

import grasp
from baselines import methods
from baselines.methods import METHODS
from real.stages import final_loss, in_order
from support.errors import UserError

ALL = [method for method in METHODS if method != "kl"]  # which needs rows of its own


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    data = write_rows(folder / "rows.jsonl")
    train = ("--lr", 3e-3, "--rank", 8, "--batch-size", 6, "--held-out", 0.2, "--epochs", 4)
    return ("--model", write_checkpoint(folder), "--data", data, *train)


def run(options, out, *more):
    with pytest.MonkeyPatch.context() as patch:
        call(patch, grasp.main, *options, "--out", out, *more)
    return out


@pytest.fixture(scope="module")
def out(options, tmp_path_factory):
    """What a run of all methods leaves, each look taking the top pairs of its modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods, "standing_out", every_top_direction)
        return run(options, tmp_path_factory.mktemp("all"), "--methods", ",".join(ALL))


def results(out):
    return json.loads((out / "results.json").read_text())


def test_every_method_leaves_an_adapter_and_a_log(out):
    for method in ALL:
        names = {path.name for path in (out / method).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"} <= names


def test_every_method_learns_the_held_out_rows_too(out):
    losses = results(out)["held_out_loss"]
    assert losses.keys() == {"base", *ALL}
    assert all(losses[method] < losses["base"] for method in ALL)


def test_the_constraint_is_exact_but_for_projecting_the_gradient_alone(out):
    leaks = results(out)["leak"]
    assert leaks.keys() == {"grasp", "grasp_online", "grasp_random", "grasp_gradient_only"}
    assert leaks.pop("grasp_gradient_only") > 1e-3
    assert max(leaks.values()) <= 1e-6


def test_the_control_replays_grasp_online(out):
    looks = results(out)["looks"]
    moments = [
        [(look["step"], look["joined"]) for look in looks[method]]
        for method in ("grasp_online", "grasp_random")
    ]
    assert moments[0] == moments[1]


def test_the_subspaces_that_were_found_are_files(out):
    for method in ("naive", "grasp_online"):
        assert "stream" in load_file(out / method / "subspace.safetensors")


def test_early_stop_ends_at_the_loss_of_grasp_online(out):
    losses = {
        method: [line["loss"] for line in read_lines(out / method / "log.jsonl")]
        for method in ("early_stop", "grasp_online", "naive")
    }
    stopped = losses["early_stop"]
    assert stopped == losses["naive"][: len(stopped)]
    target = final_loss(losses["grasp_online"])
    assert min(stopped[:-1]) > target
    assert stopped[-1] <= target or len(stopped) == len(losses["naive"])


def test_the_same_command_reads_every_fine_tune_back(out, options, monkeypatch, capsys):
    before = results(out)["held_out_loss"]
    monkeypatch.setattr("train.backward", lambda *args: pytest.fail("trained again"))
    run(options, out, "--methods", ",".join(ALL))
    assert results(out)["held_out_loss"] == before


def test_more_methods_may_be_asked_of_the_same_folder(options, tmp_path):
    run(options, tmp_path, "--methods", "naive", "--max-steps", 3)
    first = (tmp_path / "naive" / "adapter_model.safetensors").read_bytes()
    run(options, tmp_path, "--methods", "naive,grasp", "--max-steps", 3)
    assert (tmp_path / "naive" / "adapter_model.safetensors").read_bytes() == first
    assert results(tmp_path)["held_out_loss"].keys() == {"base", "naive", "grasp"}


def test_what_an_earlier_run_measured_stays_in_the_results(options, tmp_path):
    run(options, tmp_path, "--methods", "naive", "--max-steps", 3)
    before = results(tmp_path)["held_out_loss"]
    run(options, tmp_path, "--max-steps", 3)
    after = results(tmp_path)["held_out_loss"]
    assert after.keys() == {"base", "naive", "grasp_online"}
    assert after["naive"] == before["naive"]
    with pytest.raises(UserError, match=r"made with other settings \(max_steps\)"):
        run(options, tmp_path, "--methods", "kl", "--unrelated", options[3], "--max-steps", 2)


def test_by_default_one_fine_tune_is_made_the_recommended_one(options, tmp_path):
    run(options, tmp_path, "--max-steps", 3)
    assert results(tmp_path)["held_out_loss"].keys() == {"base", "grasp_online"}


@pytest.mark.parametrize("rank", [1, 3])
def test_subspace_rank_is_the_number_of_directions_of_each_module(options, tmp_path, rank):
    run(options, tmp_path, "--methods", "grasp", "--max-steps", 3, "--subspace-rank", rank)
    tensors = load_file(tmp_path / "naive" / "subspace.safetensors")
    assert {tensor.shape[1] for tensor in tensors.values()} == {rank}


@pytest.mark.parametrize(
    "chosen,expected",
    [
        (["naive"], ["naive"]),
        (["grasp"], ["naive", "grasp"]),
        (["grasp_online"], ["grasp_online"]),
        (["kl"], ["kl"]),
        (["ablate_inference"], ["naive", "ablate_inference"]),
        (["grasp_random"], ["grasp_online", "grasp_random"]),
        (["early_stop", "naive"], ["naive", "grasp_online", "early_stop"]),
        (METHODS, list(METHODS)),
    ],
)
def test_methods_come_after_what_they_build_on(chosen, expected):
    assert in_order(chosen) == expected


def test_the_final_loss_is_the_mean_of_the_last_twentieth():
    assert final_loss([9.0] * 95 + [1.0, 2.0, 3.0, 2.0, 2.0]) == 2.0
    assert final_loss([9.0, 1.0]) == 1.0


@pytest.mark.parametrize(
    "more,message",
    [
        (("--methods", "magic"), "method 'magic' is unknown"),
        (("--seeds", 2), "--seeds: for the synthetic task alone"),
        (("--quick",), "--quick: for the synthetic task alone"),
        (("--methods", "kl"), "method 'kl' needs --unrelated"),
        (("--methods", "grasp", "--subspace-rank", 9), "--subspace-rank is 9, expected at most"),
        (("--model", ""), "expected both --model DIR and --data FILE.jsonl"),
        (("--data", ""), "expected both --model DIR and --data FILE.jsonl"),
    ],
)
def test_a_mistake_ends_in_one_line(options, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        run(options, tmp_path, "--max-steps", 1, *more)
    assert "\n" not in str(error.value)
