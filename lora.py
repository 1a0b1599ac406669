"""LoRA by hand: W stays frozen, the update dW = s B A is trained beside it.

Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling, Kalajdzievski 2023 (arXiv 2312.03732).
The model is a GPT of model.py, or any with its `config`, `path_in_transformers` and `layers`.
"""

import contextlib

import torch
import torch.nn.functional as F
from torch import nn


class LoRALinear(nn.Module):
    """y = W x + b + s B A x with W (out, in) frozen; A and B are fp32, whatever W is.

    A (rank, in) starts at random as in PEFT, drawn on the CPU to be the same on every device, and
    B (out, rank) at 0: dW = 0. The scaling s is alpha / rank, with rslora alpha / sqrt(rank).
    """

    def __init__(self, linear, rank, alpha, rslora=False, generator=None):
        super().__init__()
        d_out, d_in = linear.weight.shape
        device = linear.weight.device
        self.linear, self.alpha, self.rslora = linear.requires_grad_(False), alpha, rslora
        self.scaling = alpha / (rank**0.5 if rslora else rank)
        uniform = torch.rand(rank, d_in, generator=generator) * 2 - 1
        self.lora_A = nn.Parameter((uniform / d_in**0.5).to(device))
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=device))

    def forward(self, x):
        """(..., in) -> (..., out) by two thin products: dW is never formed."""
        y = self.linear(x)
        low = F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (..., rank)
        return y + F.linear(low, self.lora_B).to(y.dtype)


def lora_modules(model):
    """{name: LoRALinear}, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_factors(model):
    """{name: (A (r, in), s B (out, r))} of every LoRA: their product is dW."""
    loras = lora_modules(model).items()
    return {name: (m.lora_A.data, m.scaling * m.lora_B.data) for name, m in loras}


def matching_linears(model, targets):
    """Names of the blocks' linear layers whose path in transformers ends in one of `targets`.

    "all-linear", or a tuple of it alone, means every one. ValueError where a target matches none.
    """
    paths = {
        name: model.path_in_transformers(name)
        for name, module in model.named_modules()
        if name.startswith("layers.") and isinstance(module, nn.Linear)
    }
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        return list(paths)
    for target in targets:
        if not any(path.endswith("." + target) for path in paths.values()):
            there = ", ".join(sorted({path.split(".")[-1] for path in paths.values()}))
            raise ValueError(f"target '{target}' matches no linear layer; there are {there}")
    endings = tuple("." + target for target in targets)
    return [name for name, path in paths.items() if path.endswith(endings)]


def add_lora(model, rank, alpha, targets, rslora=False, seed=0):
    """Freeze the model and attach a LoRA to each linear layer that `targets` name; return it.

    targets: path endings as PEFT takes them (("q_proj", "v_proj"), ("c_attn",)), or "all-linear".
    ValueError where a target matches nothing, or the rank is more than a layer can have.
    """
    if lora_modules(model):
        raise ValueError("the model has a LoRA already; remove it first")
    if not targets:
        raise ValueError("no targets; expected path endings such as q_proj, or all-linear")
    linears = {name: model.get_submodule(name) for name in matching_linears(model, targets)}
    for name, linear in linears.items():
        most = min(linear.weight.shape)
        if not 1 <= rank <= most:
            raise ValueError(f"rank {rank}, expected 1 to {most}, the most that {name} can have")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha, rslora, generator))
    return model


def remove_lora(model):
    """Take every LoRA off: the base model again, bit for bit."""
    for name, module in lora_modules(model).items():
        model.set_submodule(name, module.linear)
    return model


@contextlib.contextmanager
def without_lora(model):
    """The base model, while the context lasts: every LoRA's scaling is 0."""
    scalings = {module: module.scaling for module in lora_modules(model).values()}
    try:
        for module in scalings:
            module.scaling = 0.0
        yield model
    finally:
        for module, scaling in scalings.items():
            module.scaling = scaling
