"""A run that is interrupted anywhere goes on bit for bit, and a state of another run is refused."""

from functools import partial

import pytest
import torch
from toys import TARGETS, fit, lora_values, random_patterns, rows, tiny, top_patterns

from baselines.methods import Found, baseline
from lora import add_lora, lora_factors
from real.checkpoint import Checkpoint
from train import Recipe

STEPS = 25  # a state is saved after every second one
CONFIG = {"lr": 0.01, "targets": TARGETS, "model": "here", "device": "cpu"}


def recipes(model):
    """{name: what it adds}."""
    look = {"spike": {}, "joined": dict.fromkeys(lora_factors(model), 1)}
    looks = [{"step": step, **look} for step in range(3, STEPS + 1, 3)]
    found = Found(looks=looks, unrelated=rows(seed=8))
    return {
        "naive": Recipe(),
        "grasp": Recipe(patterns=random_patterns(model, 1)),
        "grasp_online": Recipe(look=lambda step, svds: top_patterns(svds) if step < 9 else {}),
        "grasp_random": baseline("grasp_random", model, rows(), found),
        "kl": baseline("kl", model, rows(), found),
    }


def run(folder, name, each=None, config=CONFIG):
    """(Fit, LoRA's values, log) of a run that goes on in the folder, if there is one."""
    model = add_lora(tiny(), 4, 4, TARGETS)
    recipe = Recipe(**{**vars(recipes(model)[name]), "look_every": 3})
    batch_at = lambda step: rows(seed=step)  # noqa: E731
    checkpoint = Checkpoint(folder, config)
    fitted = fit(model, STEPS, recipe, batch_at, checkpoint=checkpoint, each=each, micro_batch=2)
    return fitted, lora_values(model), (folder / "log.jsonl").read_bytes()


def interrupt(after, step):
    if step == after:
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["naive", "grasp", "grasp_online", "grasp_random", "kl"])
def test_a_run_that_is_interrupted_at_several_steps_goes_on_bit_for_bit(tmp_path, name):
    expected, values, log = run(tmp_path / "whole", name)
    for after in (0, 5, 8, 22):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", name, partial(interrupt, after))
    fitted, resumed, log_of_resumed = run(tmp_path / "cut", name)
    assert torch.equal(resumed, values) and log_of_resumed == log
    assert (fitted.losses, fitted.looks) == (expected.losses, expected.looks)
    assert fitted.patterns.keys() == expected.patterns.keys()
    for module, pattern in expected.patterns.items():
        assert all(map(torch.equal, fitted.patterns[module], pattern))


def test_what_is_lost_is_at_most_a_tenth_of_a_run(tmp_path):
    last = 0
    for after in (1, 2, 13, 20, 23):
        steps = []

        def each(step, after=after, steps=steps):
            steps.append(step)
            interrupt(after, step)

        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "naive", each)
        assert steps[0] > last - STEPS / 10
        last = after


@pytest.mark.parametrize("changed", [{"lr": 0.1}, {"targets": ("q_proj",)}, {"method": "kl"}])
def test_a_state_of_other_settings_is_refused_by_their_names_and_stays(tmp_path, changed):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "naive", partial(interrupt, 4))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"checkpoint.pt: has other settings .{min(changed)}"):
        run(tmp_path, "naive", config={**CONFIG, **changed})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    moved = {**CONFIG, "model": "there", "device": "cuda"}  # the same run
    run(tmp_path, "naive", config=moved)


def test_a_finished_run_leaves_no_state_and_nothing_of_a_kill(tmp_path):
    fitted, _, _ = run(tmp_path, "grasp_online")
    (tmp_path / ".checkpoint.pt.123").write_bytes(b"half")
    checkpoint = Checkpoint(tmp_path, CONFIG)
    checkpoint.finish(fitted)
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "run.json"}
    found = checkpoint.read("run.json")
    assert (found["losses"], found["looks"]) == (fitted.losses, fitted.looks)
    with pytest.raises(ValueError, match="has other settings .lr 0.01.; expected another --out"):
        Checkpoint(tmp_path, {**CONFIG, "lr": 1}).read("run.json")
