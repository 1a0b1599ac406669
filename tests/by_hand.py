"""Ablation and steering as edits of a model's weights, without a hook: the methods' oracle."""

import copy

import torch
from toys import randomise, tiny

from lora import add_lora

SITES = (0, 1, 2, 3)  # attention and MLP of block 0, of block 1


def some_model(**changes):
    """A model whose every part matters: larger than at init, biases and norms away from theirs."""
    model = tiny(tied=False, out_bias=True, **changes)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(8 * p + 0.3 * torch.randn_like(p))
    return randomise(add_lora(model, 4, 8, ("q_proj", "o_proj", "down_proj")))


def writers(model):
    """The linear layers that add to the residual stream, by site."""
    return [
        part for block in model.layers for part in (block.self_attn.o_proj, block.mlp.down_proj)
    ]


@torch.no_grad()
def ablated(model, Q):
    """A copy that never writes along Q (D, k): I - QQᵀ is in all its weights."""
    model = copy.deepcopy(model)
    P = torch.eye(len(Q)) - Q @ Q.T
    for table in (model.embed_tokens, model.embed_positions):
        if table is not None:
            table.weight.copy_(table.weight @ P)
    for writer in writers(model):
        for p in (writer.linear.weight, writer.linear.bias, writer.lora_B):
            p.copy_(P @ p)
    return model


@torch.no_grad()
def steered(model, site, vector):
    """A copy with the vector (D,) in the bias of the writer at `site`."""
    model = copy.deepcopy(model)
    writers(model)[site].linear.bias += vector
    return model


@torch.no_grad()
def streams(model, tokens):
    """The residual stream before the first and after every sub-layer: (sites + 1, B, T, D)."""
    norms = [m for name, m in model.named_modules() if name.endswith("norm")]
    seen = []
    hooks = [norm.register_forward_pre_hook(lambda _, x: seen.append(x[0])) for norm in norms]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)
