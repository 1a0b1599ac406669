"""PEFT's adapters: what is written is read back, PEFT's own patterns count, bad files are named."""

import json
import re
import time

import peft
import pytest
import torch
from checkpoints import edit_tensors, make
from safetensors.torch import load_file, save_file

from hub.adapter import Adapter, read_adapter, write_adapter
from support.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PATH = "model.layers.{}.self_attn.{}_proj"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def adapters_of(n_layer=2, names="qv", rank=2, alpha=6.0, rslora=False):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        PATH.format(i, name): Adapter(random(rank, 16), random(8, rank), alpha, rslora)
        for i in range(n_layer)
        for name in names
    }


def write(folder, adapters=None, **changes):
    """An adapter folder, with fields of its configuration changed."""
    write_adapter(folder, adapters or adapters_of(), fan_in_fan_out=False, n_layer=2)
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def test_scaling():
    A, B = torch.ones(4, 8), torch.ones(8, 4)
    assert Adapter(A, B, 6.0).scaling == 1.5 and Adapter(A, B, 6.0).rank == 4
    assert Adapter(A, B, 6.0, rslora=True).scaling == 3.0


@pytest.mark.parametrize("rslora", [False, True])
def test_what_is_written_is_read(rslora, tmp_path):
    adapters = adapters_of(rslora=rslora)
    path = PATH.format(1, "v")
    adapters[path] = Adapter(torch.randn(3, 16), torch.randn(8, 3), 0.0, rslora)
    read = read_adapter(write(tmp_path, adapters))
    assert read.keys() == adapters.keys()
    for path, adapter in adapters.items():
        assert torch.equal(read[path].A, adapter.A) and torch.equal(read[path].B, adapter.B)
        assert (read[path].alpha, read[path].rslora) == (adapter.alpha, rslora)


def test_an_adapter_of_some_layers_names_them_and_one_of_all_does_not(tmp_path):
    write_adapter(tmp_path / "all", adapters_of(), False, n_layer=2)
    write_adapter(tmp_path / "some", adapters_of(), False, n_layer=3)
    layers = {
        name: json.loads((tmp_path / name / CONFIG).read_text())["layers_to_transform"]
        for name in ("all", "some")
    }
    assert layers == {"all": None, "some": [0, 1]}
    with pytest.raises(UserError, match="no LoRA to save"):
        write_adapter(tmp_path / "none", {}, False, n_layer=2)


def test_what_is_read_does_not_change_with_its_file(tmp_path):
    read = read_adapter(write(tmp_path))
    path = tmp_path / WEIGHTS
    with open(path, "r+b") as f:  # in place, as another program's save may do it
        f.write(bytes(path.stat().st_size))
    assert all(adapter.A.all() for adapter in read.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_points_become_fp32(dtype, tmp_path):
    write(tmp_path)
    tensors = {name: t.to(dtype) for name, t in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    assert {a.A.dtype for a in read_adapter(tmp_path).values()} == {torch.float32}


# ---- patterns ----

PATHS = [
    *(f"model.layers.{i}.{name}" for i in (0, 1, 2, 11, 21) for name in (
        "self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")),
    *("transformer.h.2.attn.c_attn", "transformer.h.12.attn.c_attn", "q_proj", "xq_proj"),
]  # fmt: skip
PATTERNS = [
    "q_proj", "_proj", "proj", "self_attn.q_proj", "model.layers.1.self_attn.q_proj",
    "layers.1.self_attn.q_proj", "h.[01].attn.c_attn", "h.2.attn.c_attn", "up_proj|q_proj",
    "q_proj|", r"layers\.1\.mlp\.up_proj", r"layers\.\d+\.mlp\.up_proj", r"layers\.\d\.mlp.*",
    ".*q_proj", ".*", ".+", "", "^q_proj", "^model.*q_proj", "q_proj$", "^.*1.*_proj$", "[qv]_proj",
    "[^q]_proj", "1*.self_attn.q_proj", "2?1.self_attn.q_proj", r"\w+.q_proj", "x?q_proj", "q.proj",
    "layers.[0-2].*", "layers.1?1.mlp.[a-z]+_proj", "^layers.1.self_attn.q_proj", "a*.*b*q_proj",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_pefts_expression_matches(pattern, tmp_path):
    """PEFT: the first key of a pattern for which re.match(rf"(.*\\.)?({key})$", path) holds."""
    tensors = {}
    for path in PATHS:
        tensors[f"base_model.model.{path}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"base_model.model.{path}.lora_B.weight"] = torch.ones(4, 2)
    save_file(tensors, tmp_path / WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "alpha_pattern": {pattern: 0}}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    for path, adapter in read_adapter(tmp_path).items():
        matches = re.match(rf"(.*\.)?({pattern})$", path) is not None
        assert adapter.alpha == (0.0 if matches else 1.0), path


def test_the_first_matching_key_counts_and_zero_is_zero(tmp_path):
    patterns = {"layers.1.self_attn.q_proj": 0, "q_proj": 9.5, ".*q_proj": 7}
    read = read_adapter(write(tmp_path, alpha_pattern=patterns))
    alphas = [read[PATH.format(i, name)].alpha for i in (0, 1) for name in "qv"]
    assert alphas == [9.5, 6.0, 0.0, 6.0] and read[PATH.format(1, "q")].scaling == 0


def test_patterns_of_peft_have_pefts_scaling(tmp_path):
    base = make("qwen2_tied", tmp_path / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "up_proj"],
        task_type="CAUSAL_LM",
        rank_pattern={"model.layers.2.self_attn.q_proj": 3, "q_proj": 2, "up_proj": 5},
        alpha_pattern={"layers.2.self_attn.q_proj": 0, r"layers\.[01]\..*": 9},
    )
    theirs = peft.get_peft_model(base, config)
    theirs.save_pretrained(tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert len(read) == 6
    for path, adapter in read.items():
        module = base.get_submodule(path)
        assert adapter.scaling == module.scaling["default"], path
        assert torch.equal(adapter.A, module.lora_A["default"].weight)


@pytest.mark.parametrize(
    "key",
    [
        "(q_proj",
        "(q_proj)",
        "q_proj)",
        "*q_proj",
        "q**",
        "q_proj{2}",
        "[z-a]",
        "[",
        "[]",
        "\\",
        "\\Z",
        "(a*)*b",
        "(a|a)*b",
        "(.*.*.*)*x",
        "(?=q)",
        "é(",
        "q proj",
        "q\nproj",
        "x" * 10**6 + "(",
    ],
)
def test_another_expression_is_refused_in_one_line(key, tmp_path):
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError) as e:
            read_adapter(write(tmp_path, **{name: {key: 4}}))
        assert f"{CONFIG}: a key of '{name}' is " in str(e.value)
        assert "\n" not in str(e.value) and len(str(e.value)) < len(str(tmp_path)) + 400


@pytest.mark.parametrize("key", [".*" * 200 + "x", "a*" * 400 + "b", "|".join(["a*.*b"] * 150)])
def test_an_expression_that_would_take_for_ever_takes_no_time(key, tmp_path):
    began = time.monotonic()
    read = read_adapter(write(tmp_path, alpha_pattern={key: 4}))
    assert time.monotonic() - began < 5
    assert {adapter.alpha for adapter in read.values()} == {6.0}


# ---- bad files ----


def edited(change):
    return lambda folder: edit_tensors(folder / WEIGHTS, change)


def configured(**changes):
    return lambda folder: write(folder, **changes)


def text(content):
    return lambda folder: (folder / CONFIG).write_text(content)


def put(name, tensor):
    return edited(lambda tensors: tensors.update({KEY + name: tensor}))


def retyped(dtype):
    return edited(lambda t: t.update({KEY + "A.weight": t[KEY + "A.weight"].to(dtype)}))


BAD = [
    (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: no such file"),
    (lambda f: (f / WEIGHTS).write_bytes(b"short"), "not a whole safetensors file"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-4]), "not a whole"),
    (lambda f: (f / CONFIG).unlink(), f"{CONFIG}: no such file"),
    (text("[]"), f"{CONFIG}: found [], expected an object"),
    (text("null"), f"{CONFIG}: found None, expected an object"),
    (text("{}"), "no 'peft_type', expected 'LORA'"),
    (text("[" * 10**5), f"{CONFIG}: not valid JSON"),
    (text('{"r": ' + "7" * 5000 + "}"), f"{CONFIG}: not valid JSON"),
    (configured(peft_type="LOHA"), "'peft_type' is 'LOHA', expected 'LORA'"),
    (configured(use_dora=True), "'use_dora' is True"),
    (configured(bias="all"), "'bias' is 'all'"),
    (configured(lora_bias=True), "'lora_bias' is True"),
    (configured(alora_invocation_tokens=[1]), "'alora_invocation_tokens' is [1]"),
    (configured(layer_replication=[[0, 1], [0, 1]]), "'layer_replication' is"),
    (configured(kasa_config={"a": 1}), "'kasa_config' is"),
    (configured(modules_to_save=["lm_head"]), "'modules_to_save' is"),
    (configured(target_parameters=["attn.c_proj.weight"]), "'target_parameters' is"),
    (configured(init_lora_weights="pissa_niter_4"), "'init_lora_weights' is 'pissa_niter_4', wh"),
    (configured(init_lora_weights=[1]), "'init_lora_weights' is [1], which may change W"),
    (configured(r=3), "expected rank 3"),
    (configured(r=0), "'r' is 0, expected a whole number from 1 to"),
    (configured(r="2"), "'r' is '2'"),
    (configured(r=2.0), "'r' is 2.0"),
    (configured(r=True), "'r' is True"),
    (configured(r=None), "no 'r', expected a whole number"),
    (configured(lora_alpha=None), "no 'lora_alpha', expected a finite number"),
    (configured(lora_alpha="16"), "'lora_alpha' is '16'"),
    (configured(lora_alpha=float("nan")), "'lora_alpha' is nan, expected a finite number"),
    (configured(lora_alpha=float("inf")), "'lora_alpha' is inf, expected a finite number"),
    (configured(lora_alpha=True), "'lora_alpha' is True"),
    (configured(lora_alpha=10**400), "'lora_alpha' is 1000"),
    (configured(use_rslora="false"), "'use_rslora' is 'false', expected true or false"),
    (configured(use_rslora=1), "'use_rslora' is 1"),
    (configured(alpha_pattern=[4]), "'alpha_pattern' is [4], expected an object"),
    (configured(alpha_pattern={"q_proj": "4"}), "'alpha_pattern.q_proj' is '4'"),
    (configured(alpha_pattern={"q_proj": float("inf")}), "'alpha_pattern.q_proj' is inf"),
    (configured(alpha_pattern={"q_proj": None}), "'alpha_pattern.q_proj' is None"),
    (configured(alpha_pattern={"q_proj": True}), "'alpha_pattern.q_proj' is True"),
    (configured(rank_pattern={"q_proj": 0}), "'rank_pattern.q_proj' is 0"),
    (configured(rank_pattern={"q_proj": 2.0}), "'rank_pattern.q_proj' is 2.0"),
    (configured(rank_pattern={"q_proj": 3}), "expected rank 3"),
    (configured(rank_pattern="q_proj"), "'rank_pattern' is 'q_proj', expected an object"),
    (put("A.weight", torch.ones(2)), "A (2,) and B (8, 2), expected rank 2"),
    (put("A.weight", torch.tensor(1.0)), "A () and B (8, 2), expected rank 2"),
    (put("B.weight", torch.ones(8, 3)), "A (2, 16) and B (8, 3), expected rank 2"),
    (edited(lambda t: t.pop(KEY + "B.weight")), "has lora_A only, expected lora_A and lora_B"),
    (edited(lambda t: t.pop(KEY + "A.weight")), "has lora_B only, expected lora_A and lora_B"),
    (edited(lambda t: t[KEY + "A.weight"].fill_(float("inf"))), "not finite"),
    (put("A.weight", torch.full((2, 16), 1e300, dtype=torch.float64)), "not finite"),
    (retyped(torch.int8), "lora_A.weight is of the dtype I8, expected one of F64"),
    (retyped(torch.bool), "lora_A.weight is of the dtype BOOL"),
    (retyped(torch.float8_e4m3fn), "lora_A.weight is of the dtype F8_E4M3"),
    (put("magnitude", torch.ones(1)), "unexpected tensor 'base_model.model.model.layers."),
    (edited(lambda t: t.clear()), "no LoRA tensors"),
]


@pytest.mark.parametrize(("break_it", "message"), BAD)
def test_a_bad_adapter_ends_in_one_line(break_it, message, tmp_path):
    write(tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as e:
        read_adapter(tmp_path)
    assert message in str(e.value) and str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)


def test_no_folder_says_so(tmp_path):
    with pytest.raises(UserError, match="absent: no such folder, expected a PEFT adapter"):
        read_adapter(tmp_path / "absent")
