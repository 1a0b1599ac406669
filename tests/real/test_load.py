"""Checkpoint folders: the logits of transformers, or one line that says what is there."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from checkpoints import KINDS, edit_config, edit_tensors, make

from model import GPT

SMOLLM2 = Path(os.environ.get("GRASP_SMOLLM2", "absent"))
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, EMBEDDING, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
Q_BIAS, C_FC = "model.layers.0.self_attn.q_proj.bias", "transformer.h.0.mlp.c_fc.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"
OLD_ROPE = {"rope_parameters": None, "rope_theta": 5e4}


def reference(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def largest_difference(folder, theirs, **options):
    tokens = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = GPT.from_pretrained(folder, **options)(tokens)
        return (ours - theirs(tokens).logits).abs().max().item()


@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, shard, tmp_path):
    theirs = make(kind, tmp_path, shard=shard)
    assert (tmp_path / INDEX).exists() == (shard == "20KB")
    assert largest_difference(tmp_path, theirs) < 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_a_bf16_file_stays_bf16_unless_another_dtype_is_given(kind, tmp_path):
    make(kind, tmp_path).to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in GPT.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    assert largest_difference(tmp_path, reference(tmp_path), dtype=torch.float32) < 1e-5


def test_what_needs_no_conversion_stays_mapped(tmp_path):
    """The file's own bytes, so that loading takes no memory: seen by writing into the file."""
    make("llama", tmp_path)
    model, path = GPT.from_pretrained(tmp_path), tmp_path / WHOLE
    assert model.norm.weight.any()
    with open(path, "r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        file.write(bytes(path.stat().st_size - header))
    assert not model.norm.weight.any()


def config(**changes):
    return lambda folder: edit_config(folder, **changes)


def edited(change):
    return lambda folder: edit_tensors(folder / WHOLE, change)


def put(added):
    return edited(lambda tensors: tensors.update(added))


def renamed(rename):
    def change(tensors):
        for name in list(tensors):
            tensors[rename(name)] = tensors.pop(name)

    return edited(change)


def hub_gpt2(folder):
    """As the Hub's own GPT-2 is: no prefix, and the causal masks as buffers."""
    renamed(lambda name: name.removeprefix("transformer."))(folder)
    put({"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.ones(())})(folder)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("gpt2", hub_gpt2),
        ("gpt2", renamed(lambda name: "module._orig_mod." + name)),  # torch.compile in DDP
        ("llama", renamed(lambda name: "_orig_mod." + name)),
        ("qwen3", renamed(lambda name: name.replace("layers.1.", "layers.1._orig_mod."))),
        ("qwen2_tied", edited(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))),
        ("llama", renamed(lambda name: HEAD if name == EMBEDDING else name)),
        ("llama", put({INV_FREQ: torch.ones(3)})),
        ("llama", edited(lambda t: t.update({NORM: t[NORM].double()}))),  # all in the wider
        ("llama", config(**OLD_ROPE)),
        ("llama", config(**OLD_ROPE, rope_scaling={"rope_type": "default"})),
        ("qwen3", config(**OLD_ROPE, rope_scaling={"type": "default"})),
        ("qwen2_tied", config(partial_rotary_factor=1.0, is_causal=True)),
    ],
)
def test_another_form_of_the_same_function_is_loaded(kind, change, tmp_path):
    theirs = make(kind, tmp_path)
    change(tmp_path)
    assert largest_difference(tmp_path, theirs) < 1e-5


def message_of(folder):
    with pytest.raises(ValueError) as error:
        GPT.from_pretrained(folder)
    text = str(error.value)
    assert text.startswith(str(folder)) and "\n" not in text
    return text


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "'attention_bias' is True, supported: False"),
        ("llama", {"hidden_act": "gelu"}, "'hidden_act' is gelu, supported: silu"),
        ("llama", {"is_causal": False}, "'is_causal' is False"),
        ("llama", {"layer_types": ["sliding_attention"] * 3}, "'layer_types' is"),
        ("llama", {"model_type": "mistral"}, "'model_type' is mistral, supported: gpt2, llama"),
        ("llama", {"quantization_config": {"bits": 4}}, "'quantization_config' is {'bits': 4}"),
        ("llama", {"rope_parameters": None}, "no 'rope_theta'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3"}, **OLD_ROPE}, "'rope_type' is llama3"),
        ("llama", {"rope_scaling": {"type": "linear"}, **OLD_ROPE}, "'type' is linear"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_fac"),
        ("llama", {"num_hidden_layers": "three"}, "invalid literal for int()"),
        ("qwen2_tied", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("gpt2", {"activation_function": "gelu"}, "'activation_function' is gelu"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is"),
        ("gpt2", {"scale_attn_weights": False}, "'scale_attn_weights' is False"),
    ],
)
def test_a_field_that_asks_for_another_function_is_named(kind, changes, message, tmp_path):
    make(kind, tmp_path)
    edit_config(tmp_path, **changes)
    assert f"config.json: not a model that model.py computes: {message}" in message_of(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3", edited(lambda t: t.pop(HEAD)), f"1 tensors are missing, the first {HEAD}"),
        ("llama", put({Q_BIAS: torch.ones(36)}), f"{Q_BIAS} is (36,), expected no such tensor"),
        ("gpt2", put({C_FC: torch.ones(44, 36)}), f"{C_FC} is (36, 44), expected (44, 36)"),
        ("llama", put({NORM: torch.tensor([1.0] * 35 + [torch.nan])}), f"{NORM} has values"),
        ("llama", put({NORM: torch.tensor([-torch.inf] + [1.0] * 35)}), "not finite"),
        ("gpt2", put({HEAD: torch.ones(97, 36)}), "wte.weight is there twice"),
        ("llama", lambda f: os.truncate(f / WHOLE, 5000), f"{WHOLE}: not a checkpoint of"),
        ("llama", lambda f: os.remove(f / WHOLE), "no model.safetensors or index, but config.js"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_named(kind, change, message, tmp_path):
    make(kind, tmp_path)
    change(tmp_path)
    assert message in message_of(tmp_path)


def test_bin_weights_are_named_with_the_command_that_rewrites_them(tmp_path):
    theirs = make("qwen2_tied", tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / WHOLE).rename(tmp_path / "1.safetensors")  # a shard without its index
    text = message_of(tmp_path)
    assert "but 1.safetensors, config.json, generation_config.json, pytorch_model.bin; from" in text
    exec(shlex.split(re.search("python -c .*", text)[0])[2])
    assert largest_difference(tmp_path, theirs) < 1e-5


def test_a_name_on_the_hub_is_answered_with_the_command_that_downloads_it():
    text = message_of("Qwen/Qwen2.5-0.5B-Instruct")
    command = "hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir Qwen2.5-0.5B-Instruct"
    assert text.endswith(f"no such folder; to get it from the Hub: {command}")
    assert message_of("/absent/folder") == "/absent/folder: no such folder"


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="GRASP_SMOLLM2 names no SmolLM2-135M folder")
def test_the_real_smollm2_has_the_logits_of_transformers():
    assert largest_difference(SMOLLM2, reference(SMOLLM2), dtype=torch.float32) < 1e-4
