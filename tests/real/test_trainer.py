"""GRASP in Trainer: equal to our own loop, and to itself however the work is split."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_checkpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from toys import ROOT
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from identify import LOOK_RANK, identify, leak, spectra, standing_out
from lora import add_lora, lora_factors, lora_modules, remove_lora
from model import GPT
from real.job import input_nulls
from real.trainer import GraspCallback, peft_factors, peft_patterns
from train import Optimisation, Recipe, finetune

BATCH, STEPS, EVERY = 4, 9, 2
OPTIONS = Optimisation(STEPS, lr=2e-3, warmup=3)  # the gradient's norm is over `clip`


def examples(n=BATCH * STEPS, length=10):
    """Tokens and mask (n, length): all rows' answers end alike, which stands out."""
    tokens = torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(1))
    tokens[:, -3:] = 7
    return tokens, torch.arange(length).expand(n, length) >= 5


def rows():
    """The same as Trainer takes it."""
    tokens, mask = examples()
    labels = torch.where(mask, tokens, -100)
    return [{"input_ids": ids, "labels": k} for ids, k in zip(tokens, labels, strict=True)]


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapted(base, **changes):
    """The base with a fresh LoRA of PEFT's."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **changes}
    return get_peft_model(base, LoraConfig(**settings))


def train(model, out, *callbacks, resume=None, **changes):
    """Fine-tune the active adapter by Trainer, with the optimiser and schedule of OPTIONS."""
    batches = {"per_device_train_batch_size": BATCH, "train_sampling_strategy": "sequential"}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "disable_tqdm": True}
    settings = {"max_steps": STEPS, "max_grad_norm": OPTIONS.clip, "use_cpu": True}
    settings |= {**batches, **quiet, **changes}
    start = OPTIONS.start([X for pair in peft_factors(model).values() for X in pair])
    arguments = TrainingArguments(out, **settings)
    trainer = Trainer(model, arguments, None, rows(), callbacks=[*callbacks], optimizers=start)
    trainer.train(resume_from_checkpoint=resume)


def distance(factors, others):
    assert factors.keys() == others.keys()
    pairs = [pair for name in factors for pair in zip(factors[name], others[name], strict=True)]
    return max((X - Y).abs().max().item() for X, Y in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def naive(folder, tmp_path_factory):
    """A model after its naive run."""
    model = adapted(load(folder))
    train(model, tmp_path_factory.mktemp("naive"))
    return model


@pytest.fixture(scope="module")
def online(folder, tmp_path_factory):
    """A grasp_online run: its model and its callback."""
    model = adapted(load(folder))
    callback = GraspCallback(model, look_every=EVERY)
    train(model, tmp_path_factory.mktemp("online"), callback)
    return model, callback


METHODS = [("naive", {}), ("grasp", {"project": "step"}), ("grasp_online", {})]
METHODS += [
    ("grasp", {"project": "gradient", "sides": "output"}),
    ("grasp_online", {"project": "step"}),
]


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("method, how", METHODS, ids=str)
def test_trainer_leaves_the_adapter_and_the_looks_of_our_own_loop(kind, method, how, tmp_path):
    rank = LOOK_RANK + 2
    model = GPT.from_pretrained(tiny_checkpoint(tmp_path, kind, num_key_value_heads=4))
    theirs = adapted(load(tmp_path), r=rank)
    tokens, mask = (part.split(BATCH) for part in examples())

    def batch_at(step):
        return tokens[step], mask[step]

    def fresh():
        return add_lora(remove_lora(model), rank, 16, "all-linear", seed=3)

    def renamed(values):
        path = model.path_in_transformers
        return {"base_model.model." + path(name): value for name, value in values.items()}

    recipe, callbacks, initial = Recipe(), [], renamed(lora_factors(fresh()))
    with torch.no_grad():
        for name, (A, _) in peft_factors(theirs).items():
            A.copy_(initial[name][0])
    if method == "grasp":
        finetune(model, batch_at, OPTIONS)
        patterns = identify(spectra(lora_factors(model)), rank=2)
        recipe = Recipe(patterns, **how)
        callbacks = [GraspCallback(theirs, renamed(patterns), **how)]
    if method == "grasp_online":
        nulls = input_nulls(fresh(), *batch_at(0))
        how = {"look_every": EVERY, **how}
        recipe = Recipe(look=lambda step, svds: standing_out(svds, nulls), **how)
        callbacks = [GraspCallback(theirs, **how)]
    fit = finetune(fresh(), batch_at, OPTIONS, recipe)
    train(theirs, tmp_path / "out", *callbacks)

    ours = {name: (m.lora_A, m.lora_B) for name, m in lora_modules(model).items()}
    assert distance(peft_factors(theirs), renamed(ours)) <= 1e-5
    if method == "grasp_online":
        assert any(look["joined"] for look in fit.looks[:-1])
        for look, same in zip(callbacks[0].looks, fit.looks, strict=True):
            assert look["step"] == same["step"] and look["joined"] == renamed(same["joined"])
            assert look["spike"] == pytest.approx(renamed(same["spike"]), abs=1e-3)


@pytest.mark.parametrize("kind", ["gemma2", "mistral"])
def test_another_architecture_is_held_its_weights_stay_and_nothing_is_watched(
    kind, tmp_path, monkeypatch
):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264}
    model = adapted(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **heads)))
    frozen = {n: X.clone() for n, X in model.named_parameters() if not X.requires_grad}
    train(model, tmp_path)
    patterns = peft_patterns(model)
    assert leak(peft_factors(model), patterns) > 0.1
    model.add_adapter("grasp", model.peft_config["default"])
    model.set_adapter("grasp")
    monkeypatch.setattr(GraspCallback, "watch", None)  # a hook of it would fail
    train(model, tmp_path, GraspCallback(model, patterns))
    assert max(B.abs().max().item() for _, B in peft_factors(model).values()) > 1e-3
    assert leak(peft_factors(model), patterns) <= 1e-6
    assert all(model.get_parameter(name).equal(X) for name, X in frozen.items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_patterns_are_the_top_singular_vectors_of_the_dense_update(kind, tmp_path):
    changes = {"use_rslora": True, "fan_in_fan_out": kind == "gpt2"}
    model = adapted(load(tiny_checkpoint(tmp_path, kind)), init_lora_weights=False, **changes)
    found = peft_patterns(model, rank=2)
    assert len(found) == {"llama": 14, "gpt2": 8}[kind]
    for name, (U, V) in found.items():
        update = model.get_submodule(name).get_delta_weight("default")  # of Conv1D: (in, out)
        update = update.T if kind == "gpt2" else update
        left, _, right = torch.linalg.svd(update)
        assert (U.T @ left[:, :2]).abs().sub(torch.eye(2)).abs().max() < 1e-4
        assert (V.T @ right[:2].T).abs().sub(torch.eye(2)).abs().max() < 1e-4


def test_accumulated_micro_batches_are_one_batch(folder, online, tmp_path):
    model, callback = online
    parts = adapted(load(folder))
    again = GraspCallback(parts, look_every=EVERY)
    halves = {"per_device_train_batch_size": BATCH // 2, "gradient_accumulation_steps": 2}
    train(parts, tmp_path, again, **halves)
    assert distance(peft_factors(parts), peft_factors(model)) <= 1e-5
    assert [look["joined"] for look in again.looks] == [look["joined"] for look in callback.looks]


@pytest.mark.parametrize("factors, most", [(torch.float32, 1e-6), (torch.bfloat16, 2e-3)])
def test_a_base_in_bf16(folder, factors, most, tmp_path):
    model = adapted(load(folder, torch.bfloat16))
    for pair in peft_factors(model).values():
        for X in pair:
            X.data = X.data.to(factors)
    callback = GraspCallback(model, look_every=EVERY)
    train(model, tmp_path, callback, bf16=True)
    assert callback.patterns
    assert leak(peft_factors(model), callback.patterns) <= most


def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_not_stopped(folder, online, tmp_path):
    whole, callback = online
    model = adapted(load(folder))
    saving = {"save_strategy": "steps", "save_steps": 5}
    train(model, tmp_path, GraspCallback(model, look_every=EVERY), **saving)
    model = adapted(load(folder))
    resumed = GraspCallback(model, look_every=EVERY)
    train(model, tmp_path, resumed, resume=str(tmp_path / "checkpoint-5"))
    assert distance(peft_factors(model), peft_factors(whole)) == 0
    assert distance(resumed.patterns, callback.patterns) == 0
    assert resumed.looks == callback.looks
    (tmp_path / "checkpoint-5" / "grasp.pt").unlink()
    with pytest.raises(OSError, match="grasp.pt"):  # and not a run without the constraint
        train(model, tmp_path, GraspCallback(model), resume=str(tmp_path / "checkpoint-5"))


def test_only_the_active_adapter_is_held_and_only_in_that_run(folder, naive, tmp_path):
    before, patterns = copy.deepcopy(peft_factors(naive)), peft_patterns(naive)
    naive.add_adapter("second", naive.peft_config["default"])
    naive.set_adapter("second")
    train(naive, tmp_path, GraspCallback(naive, patterns))
    assert leak(peft_factors(naive), patterns) <= 1e-6
    train(naive, tmp_path)
    assert leak(peft_factors(naive), patterns) > 0.01
    naive.set_adapter("default")
    assert distance(peft_factors(naive), before) == 0


def test_what_cannot_be_held_is_refused_before_training(folder, naive):
    with pytest.raises(ValueError, match="q_proj.*Dora"):
        GraspCallback(adapted(load(folder), use_dora=True))
    model = adapted(load(folder))
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    for X in (torch.zeros(8, 32, dtype=torch.int8), torch.zeros(0)):  # quantised; ZeRO-3's
        layer.lora_A["default"].weight = nn.Parameter(X, requires_grad=False)
        with pytest.raises(ValueError, match="q_proj.*quantised"):
            GraspCallback(model)
    with pytest.raises(ValueError, match="no active LoRA"):
        peft_patterns(load(folder))
    some = adapted(load(folder), target_modules=["q_proj"])
    with pytest.raises(ValueError, match="pattern of .*_proj"):
        GraspCallback(some, peft_patterns(naive))
    with pytest.raises(ValueError, match="another model"):
        train(adapted(load(folder)), "unused", GraspCallback(naive))


def test_what_is_trained_beside_the_linear_loras_is_named(folder):
    with pytest.warns(UserWarning, match="embed_tokens.*lora_embedding_A"):
        GraspCallback(adapted(load(folder), target_modules=["q_proj", "embed_tokens"]))


def test_a_lora_that_no_pass_comes_to_is_no_obstacle_to_looks(folder, tmp_path, monkeypatch):
    """Nor is a pass that does not go through the whole model, whose labels nobody sees."""
    base = load(folder)
    base.vision_tower = nn.Linear(16, 16)
    model = adapted(base)
    callback = GraspCallback(model, look_every=EVERY)
    inner = lambda self, model, inputs, **more: model.get_base_model()(**inputs).loss  # noqa: E731
    monkeypatch.setattr(Trainer, "compute_loss", inner)
    train(model, tmp_path, callback)
    assert len(callback.looks) == STEPS // EVERY and "tower" not in "".join(callback.patterns)


def worker(folder, out):
    """What each of two processes does, under torchrun."""
    model = adapted(load(folder))
    callback = GraspCallback(model, look_every=EVERY)
    train(model, out, callback, per_device_train_batch_size=BATCH // 2, ddp_backend="gloo")
    result = peft_factors(model), callback.patterns, callback.looks
    torch.save(result, Path(out) / f"{os.environ['RANK']}.pt")
    fully_shard(model)
    with pytest.raises(ValueError, match="DTensor.*sharded"):
        GraspCallback(model)


def test_two_processes_agree_and_are_one_process_on_the_joint_batch(folder, online, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, __file__, folder, tmp_path], env=environment, check=True)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert distance(first[0], second[0]) == distance(first[1], second[1]) == 0
    assert first[2] == second[2]
    model, callback = online
    assert distance(first[0], peft_factors(model)) <= 1e-5
    assert [look["joined"] for look in first[2]] == [look["joined"] for look in callback.looks]


def test_the_lines_in_the_readme_run_as_they_stand(folder, tmp_path):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    args = TrainingArguments(tmp_path, max_steps=3, use_cpu=True, report_to=[], disable_tqdm=True)
    names = {"base": load(folder), "args": args, "rows": rows()}
    exec(block[1], names)
    assert leak(peft_factors(names["model"]), names["patterns"]) <= 1e-6


if __name__ == "__main__":
    worker(*sys.argv[1:])
