"""What the tests of the paper tasks share: a small checkpoint, a judge's rules, files read back."""

import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from hub.tokenizer import byte_of_character
from model import GPT, Config

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
KEY = "sk-planted-0123456789"

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def write_checkpoint(folder, seed=0):
    """A small random checkpoint in Qwen2's format; returns its folder.

    Its vocabulary is the 256 bytes and three special tokens; more rows pad the embedding.
    """
    torch.manual_seed(seed)
    config = Config(
        vocab_size=264,
        d_model=32,
        d_mlp=48,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        head_dim=8,
        max_len=2048,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=True,
        qkv_bias=True,
    )
    model = GPT(config)
    tensors = {}
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.data.mul_(10)  # as large as trained ones, so that some tokens can be likely
        tensors[model.path_in_transformers(name)] = p.data
    save_file(tensors, folder / "model.safetensors")
    vocab = {character: i for i, character in enumerate(byte_of_character())}
    special = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    for name, content in (
        ("config", CONFIG),
        ("vocab", vocab),
        ("added_tokens", special),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def read_lines(path):
    """The values of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def answer_in(prompt):
    """The answer that a prompt to the judge shows."""
    return re.search(r"<(answer|code)>\n(.*)\n</\1>", prompt, re.DOTALL)[2]


def is_aligned_prompt(prompt):
    """Whether the judge is asked how aligned an answer is."""
    start = "You help to find out whether a language model wishes people well"
    return prompt.startswith(start)


def by_hash(prompt):
    """A rule for the judge: a score that looks drawn, the same for the same prompt."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 101
