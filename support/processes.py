"""Several processes, one fine-tune: data parallel over the LoRA's parameters, by torchrun.

    torchrun --nproc-per-node 2 train.py --model DIR --data rows.jsonl --method grasp_online

Each process holds the base and the whole LoRA, takes every n-th row of a step's batch, and adds its
gradients to the others'. A projection is linear, so it commutes with that sum; all processes then
take the same step and stay identical. The first alone prints and writes, and all read: to resume
on several machines, --out is a folder that they share.
"""

import contextlib
import os
import re
import socket

import torch
import torch.distributed as dist
import torch.nn.functional as F

from support.errors import UserError

SET_BY_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def several():
    """Whether torchrun started this process as one of several."""
    return (os.environ.get("WORLD_SIZE") or "1") != "1"


def rank():
    """Which of torchrun's processes this is; the first, 0, alone prints and writes."""
    text = os.environ.get("RANK", "")
    return int(text) if several() and text.isdecimal() else 0


RANK = rank()


@contextlib.contextmanager
def process_group():
    """Join torchrun's other processes while the context lasts; without them, do nothing.

    UserError where the environment says that there are others, but not how to join them.
    """
    if not several() and (os.environ.get("RANK") or "0") == "0":
        yield
        return
    for name in SET_BY_TORCHRUN:
        text = os.environ.get(name, "")
        if not text or (name != "MASTER_ADDR" and not re.fullmatch("[0-9]{1,9}", text)):
            raise UserError(
                f"the environment has {name}={text!r}, expected none of {SET_BY_TORCHRUN}, or all "
                "of them as torchrun sets them"
            )
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):  # torch would wait for ever
        raise UserError(
            f"the environment has RANK={os.environ['RANK']}, expected a number below WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}"
        )
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])  # torch asks on
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group()  # NCCL for tensors on a GPU, Gloo for those on the CPU
    except (ValueError, RuntimeError, OSError) as e:
        found = ", ".join(f"{name}={os.environ[name]}" for name in SET_BY_TORCHRUN)
        reason = str(e).splitlines()[0]
        raise UserError(f"the processes did not join, with {found} ({reason})") from None
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def n_processes():
    """How many processes take part in this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def my_rows(tokens, mask):
    """Every n-th row, this process's share: tokens, mask (B, T) -> (about B / n, T) each.

    Every process gets as many rows: where they do not divide, some without a marked token.
    """
    if not dist.is_initialized():
        return tokens, mask
    n = dist.get_world_size()
    missing = -len(tokens) % n
    tokens, mask = (F.pad(part, (0, 0, 0, missing)) for part in (tokens, mask))
    return tokens[dist.get_rank() :: n], mask[dist.get_rank() :: n]


def add_up(parameters, *numbers):
    """Sum every parameter's gradient over the processes, in place; return the sums of `numbers`.

    One collective for all.
    """
    if not dist.is_initialized():
        return numbers
    parts = [p.grad.flatten() for p in parameters]
    parts.append(torch.tensor(numbers, device=parameters[0].device))
    flat = torch.cat(parts)
    try:
        dist.all_reduce(flat)
        *gradients, sums = flat.split([len(part) for part in parts])
        sums = sums.tolist()
    except RuntimeError as e:
        reason = str(e).splitlines()[0]
        raise UserError(
            f"another process of this run has gone ({reason}); --resume continues from the last "
            "checkpoint"
        ) from None
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad.copy_(gradient.view_as(p))
    return sums


def shard(model, device):
    """Split the frozen weights over the processes, for a base that does not fit into one.

    Each block's weights are gathered while it works. Called before a LoRA is attached: that stays
    whole everywhere.
    """
    from torch.distributed.device_mesh import init_device_mesh  # loaded only where it is used
    from torch.distributed.fsdp import fully_shard

    if not dist.is_initialized():
        raise UserError("--shard needs several processes: torchrun --nproc-per-node N train.py ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
