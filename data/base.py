"""The base model of a synthetic world: a small one of Qwen's architecture, pretrained on it."""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch

from hub.weights import check_finite
from lora import matching_linears
from model import GPT, Config, response_loss
from support.errors import UserError, user_errors
from support.files import read_torch, write_torch
from support.program import seed_everything
from support.progress import Progress


def new_base(world, toy):
    """A model with random weights for the world's vocabulary.

    UserError where the toy's targets are no layers of it: here, and not after the pretraining.
    """
    config = Config(
        vocab_size=world.vocab_size,
        n_layer=toy.n_layer,
        n_head=toy.n_head,
        n_kv_head=toy.n_head,
        head_dim=toy.d_model // toy.n_head,
        d_model=toy.d_model,
        d_mlp=2 * toy.d_model,
        max_len=16,
        norm_eps=1e-6,
        rope_theta=1e4,
        tied=True,
    )
    model = GPT(config)
    with user_errors():
        matching_linears(model, toy.targets)
    return model


def read_base(model, path):
    """Give the model the weights in `path`; UserError where these are no base of its shape."""
    state = read_torch(path, "a base model's weights")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError):  # other names or shapes; no dictionary
        raise UserError(
            f"{path}: not the weights of this base; delete it, and it is trained anew"
        ) from None
    for name, p in model.named_parameters():
        check_finite(p, path, name)
        if state[name].dtype != p.dtype:
            raise UserError(f"{path}: {name} is {state[name].dtype}, expected {p.dtype}")


def pretrain(world, toy, seed, folder):
    """The base model, frozen: read from `folder` where it was trained before, else trained."""
    pretraining = [value for name, value in asdict(toy).items() if name.startswith("pretrain")]
    known = world.pretrained
    settings = (known, toy.d_model, toy.n_layer, toy.n_head, pretraining, seed, torch.__version__)
    key = hashlib.sha256(repr(settings).encode()).hexdigest()[:16]
    path = Path(folder) / f"base_{key}.pt"
    seed_everything(seed)
    model = new_base(world, toy)
    if path.exists():
        print(f"base: {path}, trained before")
        read_base(model, path)
        return model.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=toy.pretrain_lr, weight_decay=toy.pretrain_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, toy.pretrain_lr, total_steps=toy.pretrain_steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    progress = Progress(toy.pretrain_steps, "pretrain")
    for _ in range(toy.pretrain_steps):
        tokens, mask = world.pretraining_batch(toy.pretrain_batch, generator)
        loss = response_loss(model, tokens, mask)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(loss=loss.item())
    write_torch(path, model.state_dict())
    return model.requires_grad_(False)
