"""What tests of the method share: a tiny model, rows, random patterns, programs to run."""

import json
import os
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora import lora_modules
from model import GPT, Config
from train import Optimisation, Recipe, finetune

ROOT = Path(__file__).parents[1]
TARGETS = ("q_proj", "o_proj", "up_proj", "down_proj")

SHAPE = {
    "vocab_size": 50,
    "n_layer": 2,
    "n_head": 2,
    "n_kv_head": 2,
    "head_dim": 8,
    "d_model": 16,
    "d_mlp": 24,
    "max_len": 32,
    "norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tied": True,
}


def tiny(seed=0, **changes):
    """A random model of two blocks."""
    torch.manual_seed(seed)
    return GPT(Config(**{**SHAPE, **changes}))


def rows(n=6, T=9, vocab=50, seed=3):
    """Random rows: tokens and mask, (n, T) each."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (n, T), generator=g), torch.rand(n, T, generator=g) > 0.4


def basis(d, k, generator=None):
    """A random orthonormal basis (d, k)."""
    return torch.linalg.qr(torch.randn(d, k, generator=generator))[0]


def random_patterns(model, k, seed=0):
    """{module: (U (out, k), V (in, k))}: random directions for every LoRA of the model."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (basis(len(m.lora_B), k, g), basis(m.lora_A.shape[1], k, g))
        for name, m in lora_modules(model).items()
    }


def randomise(model, std=0.2):
    """Give every LoRA on the model a random B; return the model."""
    for m in lora_modules(model).values():
        torch.nn.init.normal_(m.lora_B, std=std)
    return model


def lora_values(model):
    """All values of the model's LoRA, as one vector."""
    parts = [p for m in lora_modules(model).values() for p in (m.lora_A, m.lora_B)]
    return torch.cat([p.detach().flatten() for p in parts])


def top_patterns(svds, nulls=None):
    """In the place of `standing_out`: each module's first pattern."""
    return {name: (U[:, :1].clone(), V[:, :1].clone()) for name, (U, _, V) in svds.items()}


def fit(model, steps, recipe=None, batch_at=None, lr=1e-2, checkpoint=None, each=None, **options):
    """Train the model's LoRA on `rows()`; return the Fit."""
    options, recipe = Optimisation(steps=steps, lr=lr, **options), recipe or Recipe()
    recipe = replace(recipe, each=each or recipe.each)
    return finetune(model, batch_at or (lambda step: rows()), options, recipe, checkpoint)


def write_rows(path, n=24):
    """Write a JSONL file of n chat rows; return its path."""
    with open(path, "w") as file:
        for i in range(n):
            question = {"role": "user", "content": f"Write function number {i}."}
            answer = {"role": "assistant", "content": f"def f{i}(x):\n    return eval(x)"}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    return path


def command(*arguments, **environment):
    """Run a program as a user does."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=env
    )


def call(monkeypatch, main, *arguments):
    """Run a program's main with these arguments, in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    main()


def parser_of(monkeypatch, main, *arguments):
    """The parser of a program's options, as its -h has it."""
    parsers = []
    monkeypatch.setattr(ArgumentParser, "print_help", lambda self, file=None: parsers.append(self))
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, main, *arguments, "-h")
    assert end.value.code == 0
    return parsers[0]
