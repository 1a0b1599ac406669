"""GPT-2's own names of the modules, which elsewhere are called as in Llama and Qwen."""

GPT2_NAMES = {
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


def gpt2_path(name):
    """`layers.0.self_attn.o_proj` -> `transformer.h.0.attn.c_proj`."""
    return ".".join(["transformer", *(GPT2_NAMES.get(part, part) for part in name.split("."))])
