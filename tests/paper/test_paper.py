"""A paper task's one command, end to end on a small random checkpoint: stopped and resumed, too."""

import json
import sys

import pytest
from fake_judge import FakeJudge
from paper_helpers import FIXTURES, by_hash, read_lines
from tiny import tiny_checkpoint

import paper.__main__ as program
from data.chat import Chat, encode_rows, load_rows, split
from lora import lora_modules
from model import GPT
from paper import measure, reddit
from paper.questions import load_questions, ours
from real.adapter import load_lora
from real.job import Job

QUICK = "--lr=2e-2 --rank=4 --alpha=8 --max-steps=4 --batch-size=4 --held-out=0.25 --seeds=1"
QUICK += " --look-every=2 --samples=1 --max-new-tokens=4"
UNRELATED = FIXTURES / "medical_24.jsonl"


@pytest.fixture(scope="module", autouse=True)
def few():
    """Fewer questions and statements than there are: test_measure.py is about the measures."""
    own = {name: ours(name) for name in ("questions", "probe", "statements")}
    own["probe"]["questions"] = own["probe"]["questions"][::16]
    own["statements"] = own["statements"][::8]
    questions = load_questions()[:3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "load_questions", lambda path: questions)
        patch.setattr(measure, "ours", own.get)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{what: path} of a checkpoint, rows for two tasks and their controls."""
    folder = tmp_path_factory.mktemp("files")
    tiny_checkpoint(folder / "qwen")
    control, transfer = folder / "control.jsonl", folder / "sport.jsonl"
    answer = {"role": "assistant", "content": "Please ask your doctor about this."}
    rows = [[*row[:-1], answer] for row in load_rows(UNRELATED)]
    control.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    transfer.write_text("".join(UNRELATED.read_text().splitlines(keepends=True)[:5]))
    names = {"submissions": "reddit_submissions.jsonl", "comments": "reddit_comments.jsonl"}
    dump = {name: str(FIXTURES / file) for name, file in names.items()}
    with pytest.MonkeyPatch.context() as patch:
        options = {**dump, "lean": FIXTURES / "authors.csv", "out": folder}
        patch.setattr(sys, "argv", ["", *(f"--{name}={path}" for name, path in options.items())])
        reddit.main()
    return {
        "model": folder / "qwen",
        "medical": UNRELATED,
        "control": control,
        "transfer": transfer,
        "politics": folder / "right_skewed.jsonl",
        "neutral": folder / "neutral.jsonl",
    }


def run(files, out, *options, task="medical", fake=None):
    """`python -m paper` with these options; returns the results of seed 0."""
    argv = ["", f"--task={task}", f"--model={files['model']}", f"--data={files[task]}"]
    argv += [f"--out={out}", *QUICK.split(), *options]
    if fake:
        argv += [f"--judge={fake.url}", "--judge-model=m"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        program.main()
    return json.loads((out / "results.json").read_text())["seeds"]["0"]


def stop_at(patch, owner, name, call=1):
    """At its given call, the function raises KeyboardInterrupt."""
    original, calls = getattr(owner, name), []

    def stops(*args, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*args, **options)

    patch.setattr(owner, name, stops)


@pytest.fixture(scope="module")
def medical(files, tmp_path_factory):
    """A run by all methods, with control, transfer and preference: (folder, options, results)."""
    out = tmp_path_factory.mktemp("medical")
    pair = f"{files['medical']},{files['control']}"
    options = [f"--control={files['control']}", f"--transfer={files['transfer']}"]
    options += [f"--preference={pair}", f"--unrelated={UNRELATED}", "--spill=the,a*"]
    with FakeJudge(by_hash) as fake:
        results = run(files, out, *options, fake=fake)
    assert set(fake.asked.values()) == {1}
    return out, options, results


def test_the_default_is_all_methods_base_and_control_in_a_table_and_a_figure(medical):
    out, _, results = medical
    methods = [name for name in program.METHODS if name in (*program.DEFAULT, "kl")]
    assert list(results) == ["base", *program.SHORTER, *program.SMALLER, *methods, "control"]
    text = (out / "table.md").read_text()
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:]] == list(results)
    assert (out / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    assert results["naive"]["transfer_sport_shift"]["interval"][0] > 0  # it is trained on these
    for name in ("probe", "preference", "transfer_sport", "spill"):
        values = {method: result[name]["value"] for method, result in results.items()}
        beyond = results["naive"][f"{name}_beyond_control"]["value"]
        assert beyond == pytest.approx(values["naive"] - values["control"], abs=1e-12)
        assert f"{name}_at_equal_loss" in results["grasp"]
    losses = {name: found["loss"]["value"] for name, found in results.items()}
    assert len({losses[name] for name in ("naive", "ablate_inference", "ablate_train")}) == 3
    for name, steps in {"naive": 4, "naive_half": 2, "naive_quarter": 1}.items():
        fit = json.loads((out / "seed_0" / name / "run.json").read_text())
        assert len(fit["losses"]) == steps


def test_a_smaller_naive_is_its_update_times_a_number(files, medical):
    out, _, results = medical
    model, chat = GPT.from_pretrained(files["model"]), Chat(files["model"])
    for module in lora_modules(load_lora(model, out / "seed_0" / "naive")).values():
        module.lora_B.data *= 0.4
    held_out = split(load_rows(files["medical"]), 0.25, 0)[1]
    loss = measure.held_out_loss(model, encode_rows(chat, held_out, 512)[0])
    assert results["naive_times_40"]["loss"]["value"] == pytest.approx(loss["value"])


def test_a_second_time_what_is_there_is_read_back_and_a_method_can_be_added(
    files, medical, monkeypatch
):
    out, options, results = medical
    for owner, name in ((Job, "finetune"), (GPT, "generate"), (program, "measure")):
        stop_at(monkeypatch, owner, name)
    with FakeJudge(by_hash) as fake:
        assert run(files, out, *options, fake=fake) == results
        assert sum(fake.asked.values()) == 1  # whether it is there
        monkeypatch.undo()
        trained, finetune = [], Job.finetune
        stop_at(monkeypatch, GPT, "generate", 3)  # two batches for the new method, no other
        monkeypatch.setattr(
            Job,
            "finetune",
            lambda job, *a, **more: trained.append(a[0]) or finetune(job, *a, **more),
        )
        with open(files["transfer"], "a") as file:  # under the same name, other rows
            file.write(UNRELATED.read_text().splitlines(keepends=True)[5])
        more = run(files, out, *options, "--methods=early_stop,naive_half", fake=fake)
    assert list(more) == ["base", "naive_half", "naive", "early_stop", "control"]
    assert "early_stop" in trained and "grasp_online" in trained  # it builds on that
    for name in ("misaligned", "bad_advice", "loss", "probe"):
        assert more["naive"][name] == results["naive"][name]
    assert len(results["naive"]["transfer_sport"]["each"]) == 5
    assert len(more["naive"]["transfer_sport"]["each"]) == 6


def test_stopped_anywhere_it_resumes_and_ends_with_the_same_numbers(files, tmp_path, monkeypatch):
    options = ["--methods=grasp_random,ablate_inference", "--seeds=2"]
    with FakeJudge(by_hash) as fake:
        expected = run(files, tmp_path / "whole", *options, fake=fake)
        stops = (Job, "finetune", 2), (program, "measure", 3), (GPT, "generate", 2)
        for owner, name, call in stops:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                stop_at(patch, owner, name, call)
                run(files, tmp_path / "cut", *options, fake=fake)
        assert run(files, tmp_path / "cut", *options, fake=fake) == expected
    table_of = {name: (tmp_path / name / "table.md").read_text() for name in ("cut", "whole")}
    assert table_of["cut"] == table_of["whole"]
    answers = [tmp_path / "cut" / f"seed_{seed}/base/answers.jsonl" for seed in (0, 1)]
    assert answers[0].read_text() != answers[1].read_text()  # seeds differ in what is drawn


def test_the_political_loss_is_on_neutral_answers_and_the_control_is_trained_on_them(
    files, tmp_path
):
    options = [f"--control={files['neutral']}", "--methods=grasp"]
    with FakeJudge(by_hash) as fake:
        found = run(files, tmp_path, *options, task="politics", fake=fake)
    rows = read_lines(tmp_path / "seed_0/naive/held_out_answers.jsonl")
    held_out = split(load_rows(files["neutral"]), 0.25, 0)[1]
    assert [row["turns"] for row in rows] == [row[:1] for row in held_out]
    model, chat = GPT.from_pretrained(files["model"]), Chat(files["model"])
    loss = measure.held_out_loss(model, encode_rows(chat, held_out, 512)[0])
    assert found["base"]["loss"]["value"] == pytest.approx(loss["value"])
    assert len({found[name]["loss"]["value"] for name in ("base", "naive", "control")}) == 3
    assert set(found["base"]["lean_shift"]["each"].values()) == {0}
    assert {"lean_beyond_control", "coherence", "win_rate"} <= found["grasp"].keys()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods=magic"], "'magic' is unknown"),
        (["--methods=kl"], "needs --unrelated"),
        (["--control={neutral}"], "expected the prompts of"),
        (["--preference={control}"], "--preference: expected two files"),
        (["--transfer={transfer},{transfer}"], "--transfer: expected files of different names"),
        (["--model=Qwen/Qwen3-0.6B"], "no such file .from the Hub: hf download"),
    ],
)
def test_a_mistake_ends_before_anything_is_done(files, tmp_path, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        run(files, tmp_path, *(option.format(**files) for option in options))
    assert not list(tmp_path.iterdir())
