"""Adapters against PEFT, both ways; pattern files; what is not plain ends in one line."""

import json

import peft
import pytest
import torch
from checkpoints import edit_tensors, make
from safetensors.torch import load_file, save_file
from toys import TARGETS, basis, random_patterns, tiny

from lora import add_lora, lora_modules
from model import GPT
from real.adapter import adapter_factors, load_lora, load_patterns, save_lora, save_patterns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
PATTERNS = {
    "target_modules": ["q_proj", "up_proj"],
    "rank_pattern": {"layers.[12].self_attn.q_proj": 3, "q_proj": 2, "mlp.up_proj": 5},
    "alpha_pattern": {r"layers\.2\.self_attn\.q_proj": 0, "up_proj|q_proj": 9},
}


def write_peft(folder, kind, **fields):
    """A base in folder/base, PEFT's adapter with a random B in folder/adapter; the PEFT model."""
    defaults = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": kind == "gpt2"}
    config = peft.LoraConfig(**{**defaults, **fields}, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(make(kind, folder / "base"), config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    theirs.save_pretrained(folder / "adapter")
    return theirs


def read_peft(folder, kind):
    return peft.PeftModel.from_pretrained(make(kind, folder / "base"), folder / "adapter").eval()


def load(folder):
    return load_lora(GPT.from_pretrained(folder / "base"), folder / "adapter")


def largest_difference(ours, theirs):
    tokens = torch.randint(97, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (ours(tokens) - theirs(tokens).logits).abs().max().item()


def edit_adapter(folder, **fields):
    path = folder / "adapter" / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
        ("llama", {"target_modules": r".*\.[12]\..*(q|down)_proj"}),
        ("qwen2_untied", {"target_modules": ["k_proj"], "r": 20}),  # above a side of the layer
        ("qwen3", {"target_modules": "all-linear"}),
        ("qwen2_tied", {**PATTERNS, "layers_to_transform": [0, 2], "use_rslora": True}),
    ],
)
def test_an_adapter_of_peft_has_its_logits_here_and_again_in_peft(kind, fields, tmp_path):
    theirs = write_peft(tmp_path, kind, **fields)
    ours = load(tmp_path)
    assert largest_difference(ours, theirs) < 1e-5
    assert largest_difference(GPT.from_pretrained(tmp_path / "base"), theirs) > 1e-2
    save_lora(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["fan_in_fan_out"] == (kind == "gpt2")  # PEFT warns otherwise
    again = read_peft(tmp_path, kind)
    n_adapted = sum(name.endswith("lora_A.default") for name, _ in again.named_modules())
    assert n_adapted == len(lora_modules(ours))
    assert largest_difference(ours, again) < 1e-5


def test_factors_multiply_to_the_update_of_peft(tmp_path):
    theirs = write_peft(tmp_path, "qwen2_tied", use_rslora=True, **PATTERNS)
    factors = adapter_factors(tmp_path / "adapter")
    assert len(factors) == 6
    for path, (A, B) in factors.items():
        expected = theirs.base_model.model.get_submodule(path).get_delta_weight("default")
        assert torch.allclose(B @ A, expected, atol=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj", "model.layers.1.self_attn.q_proj"], "layers_to_transform": 2},
        {"target_modules": ["self_attn.q_proj", "model.layers.1.self_attn.v_proj"]},
        {"target_modules": r".*\.1\..*_proj"},
    ],
)
def test_what_the_config_does_not_name_is_not_applied_as_in_peft(fields, tmp_path):
    whole = write_peft(tmp_path, "llama", target_modules=["q_proj", "v_proj"])
    edit_adapter(tmp_path, **fields)
    with pytest.warns(UserWarning, match="not applied, by its config"):
        ours = load(tmp_path)
    assert largest_difference(ours, read_peft(tmp_path, "llama")) < 1e-5
    assert largest_difference(ours, whole) > 1e-2


def message_of(read, *arguments):
    with pytest.raises(ValueError) as error:
        read(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [1]),
        ("exclude_modules", ["v_proj"]),
    ],
)
def test_what_peft_writes_of_more_than_a_plain_lora_is_named(name, value, tmp_path):
    write_peft(tmp_path, "llama", target_modules=["q_proj"], **{name: value})
    text = message_of(load, tmp_path)
    assert f"{CONFIG}: not a plain LoRA in PEFT's format: '{name}' is {value}" in text


def test_a_field_that_nobody_knows_is_named_if_it_is_active(tmp_path):
    theirs = write_peft(tmp_path, "llama", target_modules=["q_proj"])
    edit_adapter(tmp_path, use_later_kind=False, later_config=None, later_modules=[])
    assert largest_difference(load(tmp_path), theirs) < 1e-5
    edit_adapter(tmp_path, use_later_kind=True)
    assert "'use_later_kind' is True" in message_of(load, tmp_path)
    edit_adapter(tmp_path, use_later_kind=False, peft_type="LOHA")
    assert "'peft_type' is LOHA" in message_of(load, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q_A), f"no '{Q_A}'"),
        (lambda t: t.pop(Q_A.replace("_A", "_B")), "q_proj.lora_B.weight'"),
        (lambda t: t.update({Q_A: torch.ones(3, 36)}), "A [3, 36] and B [36, 4], expected rank 4"),
        (lambda t: t[Q_A].fill_(torch.nan), "q_proj has values that are not finite"),
        (lambda t: t.update({Q_A + "_": torch.ones(1)}), "weight_ is no lora_A or lora_B"),
        (lambda t: t.clear(), "none of a module in 'target_modules'"),
    ],
)
def test_a_tensor_that_is_not_of_a_plain_lora_is_named(change, message, tmp_path):
    write_peft(tmp_path, "llama", target_modules=["q_proj"])
    edit_tensors(tmp_path / "adapter" / WEIGHTS, change)
    text = message_of(load, tmp_path)
    assert text.startswith(str(tmp_path / "adapter" / WEIGHTS)) and message in text


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"num_hidden_layers": 2}, "layers.2.self_attn.q_proj is no linear layer of this model"),
        ({"num_attention_heads": 4}, "layers.0.self_attn.q_proj is (36, 36), expected (24, 36)"),
    ],
)
def test_an_adapter_of_another_model_ends_in_one_line(base, message, tmp_path):
    write_peft(tmp_path, "llama", target_modules=["q_proj"])
    make("llama", tmp_path / "base", head_dim=6, **base)
    assert message in message_of(load, tmp_path)


def test_a_loaded_lora_alone_takes_gradients_and_is_a_copy_and_a_second_is_refused(tmp_path):
    save_lora(add_lora(tiny(), 2, 2, ["q_proj"]), tmp_path)
    model, path = load_lora(tiny(), tmp_path), tmp_path / WEIGHTS
    trained = {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B"}
    assert "has a LoRA already" in message_of(load_lora, model, tmp_path)
    with open(path, "r+b") as file:  # in place, as another program's save may do it
        file.write(bytes(path.stat().st_size))
    assert all(m.lora_A.all() for m in lora_modules(model).values())


@pytest.fixture
def saved(tmp_path):
    """(path of a pattern file, its patterns, its stream): random, of a tiny model."""
    patterns, stream = random_patterns(add_lora(tiny(), 3, 3, TARGETS), 2), basis(16, 2)
    name, (U, V) = next(iter(patterns.items()))
    patterns[name] = U, V[:, :0]  # one side alone
    save_patterns(tmp_path / "s", patterns, stream, tiny().path_in_transformers)
    return tmp_path / "s", patterns, stream


@pytest.mark.parametrize("dtype,atol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("model", [tiny(), add_lora(tiny(), 2, 2, TARGETS)], ids=["bare", "lora"])
def test_patterns_come_back_orthonormal_in_fp32(model, dtype, atol, saved):
    path, patterns, stream = saved
    tensors = load_file(path)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert {name.split(".")[0] for name in tensors} == {"outputs", "inputs", "stream"}
    save_file({name: t.to(dtype) for name, t in tensors.items()}, path)
    found, found_stream = load_patterns(path, model)
    assert list(found) == list(patterns)  # in the model's order
    pairs = [(found_stream, stream)]
    for name in patterns:
        pairs += zip(found[name], patterns[name], strict=True)
    for Q, W in pairs:
        assert Q.dtype == torch.float32 and Q.shape == W.shape
        assert torch.allclose(Q.T @ Q, torch.eye(Q.shape[1]), atol=1e-6)
        assert torch.allclose(Q @ Q.T, W @ W.T, atol=atol)


def only(beginnings):
    def change(tensors):
        for name in list(tensors):
            if not name.startswith(beginnings):
                del tensors[name]

    return change


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ({}, only(("outputs.", "stream")), "no 'inputs.model.layers.0."),
        ({}, only(("outputs.", "inputs.")), "no 'stream'"),
        ({"n_layer": 1}, only(""), "of other modules, ['inputs.model.layers.1."),
        ({"d_mlp": 20}, only(""), "they do not fit model.layers.0.mlp.up_proj, which is [20, 16]"),
        ({"d_model": 20}, only("stream"), "16 wide"),
    ],
)
def test_patterns_of_another_model_or_an_older_file_end_in_one_line(model, change, message, saved):
    edit_tensors(saved[0], change)
    text = message_of(load_patterns, saved[0], tiny(**model))
    assert text.startswith(f"{saved[0]}: not this model's patterns (run identify.py again): ")
    assert message in text
