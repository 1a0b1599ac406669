"""train.py on a checkpoint and chat rows: what it leaves, how it goes on, what it refuses."""

import json
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import tiny_checkpoint
from toys import ROOT, call, tiny, top_patterns, write_rows

import identify
import train as program
from lora import add_lora, lora_modules
from real import job as job_module
from real.job import Job, Training, input_nulls, nats

OPTIONS = ("--lr", 3e-3, "--rank", 8, "--batch-size", 4, "--held-out", 0.2, "--epochs", 9)
OPTIONS += ("--max-steps", 12, "--look-every", 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, with rows.jsonl beside its files."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("qwen"))
    write_rows(folder / "rows.jsonl")
    return folder


@pytest.fixture(scope="module")
def train(folder):
    """train.py in this process: train(out, *options) -> out."""

    def run(out, *more):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(job_module, "standing_out", top_patterns)  # few rows may share too little
            common = ("--model", folder, "--data", folder / "rows.jsonl", *OPTIONS)
            call(patch, program.main, *common, "--out", out, *more)
        return out

    return run


@pytest.fixture(scope="module")
def naive(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("naive"), "--method", "naive")


@pytest.fixture(scope="module")
def online(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def subspace(naive, tmp_path_factory):
    path = tmp_path_factory.mktemp("identified") / "subspace.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        call(patch, identify.main, naive, "--out", path)
    return path


@pytest.fixture(scope="module")
def job(folder):
    options = {"rank": 8, "lr": 3e-3, "batch_size": 4, "max_steps": 4}
    return Job(Training(model=str(folder), data=str(folder / "rows.jsonl"), **options))


@pytest.fixture
def idle(monkeypatch):
    monkeypatch.setattr(job_module, "finetune", lambda *args, **more: pytest.fail("trained"))


def finished(out):
    return json.loads((out / "run.json").read_text())


def same_weights(a, b):
    a, b = (load_file(out / "adapter_model.safetensors") for out in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_leaves_an_adapter_a_log_and_the_mark_of_its_end(naive):
    names = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "run.json"}
    assert {path.name for path in naive.iterdir()} == names
    losses = finished(naive)["losses"]
    assert len(losses) == 12 and losses[-1] < 0.6 * losses[0]


def test_the_losses_of_rows_are_those_of_transformers_and_peft_one_by_one(job, tmp_path):
    job.finetune("naive", tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(job.args.model)
    model = peft.PeftModel.from_pretrained(base, tmp_path)
    expected, rows = [], job.train[::-1]  # the long ones first
    for ids, mask in rows:
        labels = ids.masked_fill(~mask, -100)[None]
        expected.append(model(ids[None], labels=labels).loss.item() * mask[1:].sum().item())
    for batch_size in (1, 4, 16):
        sums, counts = nats(job.model, rows, batch_size)
        assert sums.tolist() == pytest.approx(expected, rel=1e-5)
    assert counts.tolist() == [mask[1:].sum() for _, mask in rows]


def test_the_chain_naive_identify_grasp_keeps_the_dense_update_off_the_sides_that_are_held(
    train, subspace, tmp_path, capsys
):
    patterns = load_file(subspace)
    for sides in ("both", "output", "input"):
        options = ("--method", "grasp", "--subspace", subspace, "--sides", sides)
        tensors = load_file(train(tmp_path / sides, *options) / "adapter_model.safetensors")
        assert "0 looks, 14 of 14 modules constrained, from step 0 on" in capsys.readouterr().out
        for key in (key for key in tensors if "lora_A" in key):
            dW = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            said = (patterns[f"outputs.{path}"].T @ dW).norm() / dW.norm()
            heard = (dW @ patterns[f"inputs.{path}"]).norm() / dW.norm()
            assert (said < 1e-6, heard < 1e-6) == (sides != "input", sides != "output")


def test_online_says_how_often_it_looked_and_from_which_step_on_it_is_held(train, online, capsys):
    train(online)
    assert "3 looks, 14 of 14 modules constrained, from step 4 on" in capsys.readouterr().out
    log = [json.loads(line) for line in (online / "log.jsonl").read_text().splitlines()]
    assert [line["constrained"] for line in log] == [0] * 3 + [14] * 9
    assert [line["loss"] for line in log] == finished(online)["losses"]


@pytest.mark.parametrize("steps,every", [(12, 1), (100, 3), (300, 10), (5000, 10)])
def test_some_thirty_looks_a_run_follow_from_its_length(job, tmp_path, monkeypatch, steps, every):
    def stops(model, batch_at, options, recipe, *more, **named):
        raise InterruptedError(recipe.look_every)

    monkeypatch.setattr(job_module, "finetune", stops)
    monkeypatch.setattr(job, "batches", job.batches[:1] * steps)
    with pytest.raises(InterruptedError, match=f"^{every}$"):
        job.finetune("grasp_online", tmp_path)


def test_the_control_joins_as_many_at_the_moments_of_the_run_beside_it(train, online, tmp_path):
    looks = ("--looks", online / "run.json", "--look-every", 5)
    out = train(tmp_path, "--method", "grasp_random", *looks)
    moments = [[(x["step"], x["joined"]) for x in finished(run)["looks"]] for run in (out, online)]
    assert moments[0] == moments[1] and not same_weights(out, online)


def test_a_part_of_a_run_has_the_first_steps_and_settings_of_its_own(job, tmp_path):
    losses = job.finetune("naive", tmp_path / "half", part=2).losses
    assert len(losses) == 2 and losses[0] == job.finetune("naive", tmp_path / "all").losses[0]
    with pytest.raises(ValueError, match=r"\(max_steps 2\)"):
        job.finetune("naive", tmp_path / "half")


def test_a_run_of_other_options_rows_weights_or_patterns_is_refused(train, tmp_path):
    rows, other = write_rows(tmp_path / "rows.jsonl", 23), tiny_checkpoint(tmp_path, seed=1)
    stop = ("--method", "early_stop", "--until-loss")
    train(tmp_path, *stop, 99)
    cases = {"lr 0.003": ("--lr", 1), "rows": ("--data", rows), "weights": ("--model", other)}
    for named, more in {**cases, "found": (*stop, 98)}.items():
        with pytest.raises(ValueError, match=f"run.json: has other settings .{named}"):
            train(tmp_path, *stop, 99, *more)


def test_a_killed_program_goes_on_bit_for_bit(train, folder, tmp_path, capsys):
    more = (*OPTIONS, "--method", "naive", "--max-steps", 60, "--epochs", 99)
    out, log = tmp_path / "killed", tmp_path / "killed" / "log.jsonl"
    words = ("train.py", "--model", folder, "--data", folder / "rows.jsonl", *more, "--out", out)
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 15):
        time.sleep(0.01)
    process.kill()
    assert process.wait() != 0
    train(out, *more)
    assert f"{out}: goes on after step" in capsys.readouterr().out
    whole = train(tmp_path / "whole", *more)
    assert same_weights(out, whole) and finished(out)["losses"] == finished(whole)["losses"]
    assert (out / "log.jsonl").read_text() == (whole / "log.jsonl").read_text()
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_mistake_in_the_options_ends_in_one_line(train, tmp_path):
    cases = {
        "expected both --model DIR and --data FILE.jsonl": ("--model", ""),
        "--device gpu: no such device here": ("--device", "gpu"),
        "method 'grasp' needs the patterns found in a naive run": ("--method", "grasp"),
        "try a lower --lr or --alpha$": ("--lr", 1e9, "--method", "naive"),
    }
    for message, more in cases.items():
        with pytest.raises(ValueError, match=message):
            train(tmp_path, *more)


def test_files_of_other_modules_are_refused(train, online, naive, subspace, tmp_path, idle):
    """Else an unconstrained run would call itself GRASP, or the control."""
    part = tmp_path / "part.safetensors"
    save_file({n: t for n, t in load_file(subspace).items() if "q_proj" not in n}, part)
    control = ("--method", "grasp_random", "--looks")
    for more, message in (
        (("--method", "grasp", "--subspace", part), "of modules that --targets names"),
        ((*control, online / "run.json"), "it adapts other modules"),
        ((*control, naive / "run.json"), "not run.json of a grasp_online run"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, "--targets", "q_proj", *more)


def test_rows_that_are_too_few_or_too_large_a_token_are_named(train, folder, tmp_path, idle):
    with pytest.raises(ValueError, match="1 rows, 0.2 of them held out"):
        train(tmp_path, "--data", write_rows(tmp_path / "one.jsonl", 1))
    small = tiny_checkpoint(tmp_path, vocab_size=258, eos_token_id=None)
    with pytest.raises(ValueError, match="rows.jsonl: token 258, but .* ends at 258"):
        train(tmp_path / "out", "--model", small)


def test_the_null_is_the_spectrum_of_b_with_an_answer_of_its_own_for_every_token():
    model = add_lora(tiny(), 4, 4, "all-linear")
    tokens, mask = torch.randint(50, (3, 8)), torch.zeros(3, 8, dtype=torch.bool)
    mask[:, 4:] = True
    inputs, nulls = {}, input_nulls(model, tokens, mask)
    for name, lora in lora_modules(model).items():
        lora.register_forward_hook(lambda m, x, y, name=name: inputs.update({name: x[0]}))
    with torch.no_grad():
        model(tokens[:, :-1])
    for name, lora in lora_modules(model).items():
        X = inputs[name][mask[:, 1:]]
        G = torch.linalg.qr(torch.randn(64, len(X)))[0]  # (64, tokens), orthonormal answers
        S = torch.linalg.svdvals(G @ X @ lora.lora_A.T)
        assert torch.allclose(nulls[name], S, rtol=1e-3, atol=1e-4 * S[0].item())
