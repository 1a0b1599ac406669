"""Random transformers checkpoints of odd shapes: the loaders' oracles.

Every bias and norm is away from its initial value.
"""

import json

import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

GPT2 = {
    "n_embd": 36,
    "n_layer": 3,
    "n_head": 3,
    "vocab_size": 97,
    "n_positions": 128,
    "n_inner": 44,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "layer_norm_epsilon": 3e-5,
    "resid_pdrop": 0,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
}
ROTARY = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}


SHAPES = {
    "gpt2": GPT2,
    "llama": {**ROTARY, "tie_word_embeddings": True},
    "qwen2_tied": {**ROTARY, "tie_word_embeddings": True},
    "qwen2_untied": {**ROTARY, "tie_word_embeddings": False},
    "qwen3": {**ROTARY, "head_dim": 14, "tie_word_embeddings": False},
}
KINDS = tuple(SHAPES)


def make(kind, folder, seed=0, shard="50GB", **changes):
    """Save a checkpoint of `kind` in `folder`; returns the transformers model, in eval mode."""
    torch.manual_seed(seed)
    family = kind.split("_")[0]
    config = transformers.AutoConfig.for_model(family, **{**SHAPES[kind], **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.3))
    model.eval().save_pretrained(folder, max_shard_size=shard)
    return model


def edit_config(folder, **changes):
    """Change fields of config.json; None takes a field out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(path, change):
    """Call `change` on a safetensors file's {name: tensor} and write it back."""
    tensors = load_file(path)
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path)
