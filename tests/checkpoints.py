"""Random transformers checkpoints of odd shapes, with every bias and norm away from its initial value: the loaders' oracles."""
import json

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
KINDS = ("gpt2", "qwen2_tied", "qwen2_untied", "qwen3")


def make(kind, folder, seed=0, shard="50GB", **changes):
    """Save a checkpoint of `kind` in `folder`; returns the transformers model, in eval mode."""
    torch.manual_seed(seed)
    qwen = dict(hidden_size=36, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2, intermediate_size=52, vocab_size=97,
                max_position_embeddings=128, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, rms_norm_eps=1e-5,
                bos_token_id=None, eos_token_id=None)
    if kind == "gpt2":
        config = transformers.GPT2Config(**{**dict(n_embd=36, n_layer=3, n_head=3, vocab_size=97, n_positions=128, n_inner=44, bos_token_id=0,
                                                   eos_token_id=0, layer_norm_epsilon=3e-5, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0), **changes})
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**{**qwen, "head_dim": 14, "tie_word_embeddings": False, **changes}))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**qwen, "tie_word_embeddings": kind.endswith("_tied"), **changes}))
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
