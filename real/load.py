"""A Hugging Face folder of GPT-2, Llama, Qwen2 or Qwen3: its config.json and its safetensors."""

import json
import re
from pathlib import Path

from safetensors.torch import load_file

from support.files import reading

# What model.py computes; another value asks for another function, and is refused by name.
COMPUTED = {
    "activation_function": "gelu_new",
    "attention_bias": False,
    "hidden_act": "silu",
    "is_causal": True,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "rope_type": "default",
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "type": "default",  # the older name of rope_type
    "use_sliding_window": False,
}
GPT2 = {"norm": "layernorm", "mlp": "gelu", "fused_qkv": True, "qkv_bias": True, "out_bias": True}
GPT2_NAMES = {  # what model.py calls as Llama and Qwen do, in GPT-2's own files
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "layers": "h",
    "self_attn": "attn",
    "o_proj": "c_proj",
    "up_proj": "c_fc",
    "down_proj": "c_proj",
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "norm": "ln_f",
}


def existing(folder):
    """The folder as a Path; ValueError where there is none, as for a name on the Hub."""
    if Path(folder).is_dir():
        return Path(folder)
    hub = re.fullmatch(r"[\w.-]+/([\w.-]+)", str(folder))
    advice = f"; to get it from the Hub: hf download {folder} --local-dir {hub[1]}" if hub else ""
    raise ValueError(f"{folder}: no such folder{advice}")


def read_config(folder):
    """The keyword arguments of model.Config; ValueError for what model.py does not compute."""
    path = existing(folder) / "config.json"
    with reading(path, "a model that model.py computes"):
        c = json.loads(path.read_text(encoding="utf-8"))
        kind = c["model_type"]
        if kind not in ("gpt2", "llama", "qwen2", "qwen3"):
            raise ValueError(f"'model_type' is {kind}, supported: gpt2, llama, qwen2, qwen3")
        c |= (c.get("rope_scaling") or {}) | (c.get("rope_parameters") or {})
        for name, value in COMPUTED.items():
            if c.get(name) not in (None, value):
                raise ValueError(f"'{name}' is {c[name]}, supported: {value}")
        if set(c.get("layer_types") or []) - {"full_attention"}:
            raise ValueError(f"'layer_types' is {c['layer_types']}, supported: full_attention")
        heads = int(c.get("n_head") or c["num_attention_heads"])
        width = int(c.get("n_embd") or c["hidden_size"])
        return {
            "model_type": kind,
            "vocab_size": int(c["vocab_size"]),
            "n_layer": int(c.get("n_layer") or c["num_hidden_layers"]),
            "n_head": heads,
            "n_kv_head": int(c.get("num_key_value_heads") or heads),
            "head_dim": int(c.get("head_dim") or width // heads),
            "d_model": width,
            "d_mlp": int(c.get("n_inner") or c.get("intermediate_size") or 4 * width),
            "max_len": int(c.get("n_positions") or c["max_position_embeddings"]),
            "norm_eps": float(c.get("layer_norm_epsilon") or c["rms_norm_eps"]),
            "rope_theta": None if kind == "gpt2" else float(c["rope_theta"]),
            "tied": kind == "gpt2" or c.get("tie_word_embeddings", False),  # transformers' default
            "qkv_bias": kind == "qwen2",
            "qk_norm": kind == "qwen3",
            **(GPT2 if kind == "gpt2" else {}),
        }


def gpt2_path(name):
    """`layers.0.self_attn.o_proj` -> `transformer.h.0.attn.c_proj`."""
    return ".".join(["transformer", *(GPT2_NAMES.get(part, part) for part in name.split("."))])


def weight_files(folder):
    """The safetensors files of a checkpoint: one, or the shards that its index lists."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if not index.exists():
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        code = f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}')"
        command = f'python -c "from transformers import AutoModelForCausalLM as M; {code}"'
        raise ValueError(f"{folder}: no {whole.name} or index, but {found}; from .bin: {command}")
    with reading(index, "an index of shards"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]


def read_state(model, folder, device="cpu", dtype=None):
    """{name in `model`: tensor}, mapped where nothing is converted; dtype None: the stored one."""
    shapes = {model.path_in_transformers(n): tuple(p.shape) for n, p in model.named_parameters()}
    state = {}
    for file in weight_files(Path(folder)):
        with reading(file, "a checkpoint of this model"):
            for key, tensor in load_file(file).items():
                path = re.sub(r"_orig_mod\.|_fsdp_wrapped_module\.|^module\.", "", key)  # wrappers
                path = re.sub(r"^(wte|wpe|h|ln_f)\.", r"transformer.\1.", path)  # the Hub's GPT-2
                if path.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")):
                    continue  # buffers, which follow from the config
                if path == "lm_head.weight" and model.lm_head is None:
                    path = model.path_in_transformers("embed_tokens.weight")  # a copy of it
                if path.startswith("transformer.h.") and tensor.dim() == 2:
                    tensor = tensor.t().contiguous()  # GPT-2's Conv1D stores W as (in, out)
                expected = shapes.get(path, "no such tensor")
                if tuple(tensor.shape) != expected:
                    raise ValueError(f"{path} is {tuple(tensor.shape)}, expected {expected}")
                dtype = dtype or tensor.dtype  # one for all, as in transformers
                tensor = tensor.to(device, dtype)
                if path in state and (state[path] != tensor).any():
                    raise ValueError(f"{path} is there twice (as a tied lm_head, too) and differs")
                if not all(bound.isfinite() for bound in tensor.aminmax()):
                    raise ValueError(f"{path} has values that are not finite")
                state[path] = tensor
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"{folder}: {len(missing)} tensors are missing, the first {missing[0]}")
    return {n: state[model.path_in_transformers(n)] for n, _ in model.named_parameters()}
