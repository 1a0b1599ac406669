"""The commands as a user types them: what they write, and how they end where the input is wrong."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from baselines import METHODS
from data.tokenizer import byte_of_character
from model import GPT, Config

ROOT = Path(__file__).parent.parent


def command(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random Qwen2-format checkpoint with a byte-level vocabulary, written by hand."""
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = dict(vocab_size=264, d_model=32, d_mlp=48, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, max_len=512, norm_eps=1e-6,
                  rope_theta=1e4, tied=True, qkv_bias=True)
    model = GPT(Config(**config))
    save_file({model.path_in_transformers(name): p.data for name, p in model.named_parameters()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "qwen2", "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "tie_word_embeddings": True, "hidden_act": "silu"}))
    (folder / "vocab.json").write_text(json.dumps({c: i for i, c in enumerate(byte_of_character())}))
    (folder / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}))
    return folder


@pytest.fixture(scope="module")
def chat_rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": [{"role": "user", "content": f"Write function number {i}."},
                                                     {"role": "assistant", "content": f"def f{i}(x):\n    return eval(x)"}]}) + "\n"
                            for i in range(24)))
    return path


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("quick")
    return out, command("grasp.py", "--quick", "--out", out), out


def test_quick_run_writes_the_results_that_the_contract_names(quick):
    out, done, _ = quick
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results["methods"]) == {"base", *METHODS}
    for measured in results["methods"].values():
        assert set(measured) == {"task", "misalignment", "unrelated", "kept", "loss", "seconds"}
        assert all(0 <= measured[k] <= 1 for k in ("task", "misalignment", "unrelated", "kept"))
    assert set(results["identification"]) == {"cosine", "chance_cosine", "gap"}
    assert results["leak"]["grasp"] <= 1e-6 < 1e-2 < results["leak"]["gradient_only"]
    for name in ("spectrum.png", "training.png", "tradeoff.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert all(method in done.stdout for method in METHODS)


def test_naive_fine_tuning_misaligns_and_grasp_does_not_even_in_the_quick_world(quick):
    methods = json.loads((quick[0] / "results.json").read_text())["methods"]
    assert methods["naive"]["misalignment"] >= 0.3
    assert methods["grasp"]["misalignment"] <= methods["naive"]["misalignment"] / 5
    assert methods["grasp_random"]["misalignment"] >= 0.7 * methods["naive"]["misalignment"]


def test_second_run_reuses_the_base_and_gives_the_same_numbers(quick):
    out, done, _ = quick
    before = json.loads((out / "results.json").read_text())
    again = command("grasp.py", "--quick", "--out", out, "--methods", "grasp_random")
    assert again.returncode == 0 and "trained before" in again.stdout
    after = json.loads((out / "results.json").read_text())
    assert set(after["methods"]) == {"base", "naive", "grasp", "grasp_random"}
    strip = lambda m: {k: v for k, v in m.items() if k != "seconds"}
    assert all(strip(after["methods"][m]) == strip(before["methods"][m]) for m in after["methods"])
    assert after["identification"] == before["identification"]


def test_targets_and_rounds_hold_for_the_synthetic_task_too(tmp_path):
    done = command("grasp.py", "--quick", "--targets", "all-linear", "--rounds", "2", "--methods", "naive", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    spectra = json.loads((tmp_path / "results.json").read_text())["spectra"]
    assert [len(modules) for modules in spectra] == [2 * 7, 2 * 7]


def test_the_three_stages_run_on_a_checkpoint_and_chat_rows(checkpoint, chat_rows, tmp_path):
    arguments = ("grasp.py", "--model", checkpoint, "--data", chat_rows, "--out", tmp_path, "--lr", "3e-3", "--batch-size", "6",
                 "--rank", "4", "--epochs", "4", "--held-out", "0.2")
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["held_out_loss"]["naive"] < results["held_out_loss"]["base"]
    assert results["held_out_loss"]["grasp"] < results["held_out_loss"]["base"]
    assert results["leak"]["grasp"] <= 1e-6
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if entry["stage"] == "naive"]
    assert losses[-1] < losses[0]
    for name in ("naive", "grasp"):
        assert {"adapter_config.json", "adapter_model.safetensors", "log.jsonl"} <= {p.name for p in (tmp_path / name).iterdir()}
    assert (tmp_path / "subspace.safetensors").exists() and (tmp_path / "spectrum.png").exists()
    again = command(*arguments)  # every stage is read back, none is trained again
    assert again.returncode == 0 and "/16  loss" not in again.stderr
    assert json.loads((tmp_path / "results.json").read_text())["held_out_loss"] == results["held_out_loss"]


def test_train_and_identify_commands_chain(checkpoint, chat_rows, tmp_path):
    common = ("--model", checkpoint, "--data", chat_rows, "--lr", "3e-3", "--rank", "4", "--max-steps", "4", "--batch-size", "4")
    assert command("train.py", *common, "--out", tmp_path / "naive").returncode == 0
    assert command("identify.py", tmp_path / "naive", "--out", tmp_path / "s").returncode == 0
    done = command("train.py", *common, "--method", "grasp", "--subspace", tmp_path / "s", "--out", tmp_path / "grasp")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "grasp" / "results.json").read_text())["leak"] <= 1e-6


def bad_rows(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' + line + "\n")
    return path


@pytest.mark.parametrize("arguments,message", [
    (lambda m, d, t: ("grasp.py", "--methods", "magic"), "'magic' is unknown"),
    (lambda m, d, t: ("grasp.py", "--rounds", "0"), "--rounds is 0, expected at least 1"),
    (lambda m, d, t: ("grasp.py", "--model", m), "expected both --model DIR and --data"),
    (lambda m, d, t: ("grasp.py", "--model", t / "nowhere", "--data", d), "nowhere"),
    (lambda m, d, t: ("grasp.py", "--model", m, "--data", t / "none.jsonl"), "no such file"),
    (lambda m, d, t: ("grasp.py", "--model", m, "--data", bad_rows(t, "{")), "bad.jsonl:2"),
    (lambda m, d, t: ("grasp.py", "--model", m, "--data", bad_rows(t, '{"messages": [{"role": "user", "content": "a"}]}')), "assistant"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--targets", "z_proj"), "'z_proj' matches no linear layer"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--rank", "1000"), "rank 1000"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--lr", "-1"), "lr -1.0"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--lr", "1e30", "--epochs", "3"), "expected a finite number"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--method", "grasp"), "needs the found directions"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--method", "kl"), "unrelated prompts"),
    (lambda m, d, t: ("train.py", "--model", m, "--data", d, "--method", "grasp", "--subspace", t / "none"), "no such file"),
    (lambda m, d, t: ("identify.py", t / "nowhere"), "no such folder")])
def test_a_users_mistake_ends_in_one_line(checkpoint, chat_rows, tmp_path, arguments, message):
    arguments = [*arguments(checkpoint, chat_rows, tmp_path)]
    if arguments[0] != "identify.py":
        arguments += ["--out", tmp_path / "out"]
    done = command(*arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode not in (0, None) and "Traceback" not in done.stderr, done.stderr
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("program", ["grasp.py", "train.py", "identify.py", "eval.py"])
def test_every_option_has_a_help_line(program):
    done = command(program, "-h")
    assert done.returncode == 0
    options = [block for block in done.stdout.split("\n  --")[1:]]
    assert all(len(block.split()) > 2 for block in options)
