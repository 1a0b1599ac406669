"""Several processes, one fine-tune: data parallel over the LoRA's parameters, as torchrun starts it.

    torchrun --nproc-per-node 2 train.py --model DIR --data rows.jsonl --method grasp --subspace FILE --out DIR

Each process holds the base and the whole LoRA, takes every n-th row of a step's batch, and adds its gradients to the others'.
Projecting is linear, so it commutes with that sum; all processes then take the same step and stay identical. The first alone
prints and writes (cli.py), and all read: to resume on several machines, --out is a folder that they share.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cli import UserError


@contextlib.contextmanager
def joined():
    """Join torchrun's other processes while the context lasts; nothing happens where there are none."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # NCCL for tensors on a GPU, Gloo for those on the CPU
    yield
    dist.destroy_process_group()  # not after an error: it would wait for processes that may be gone


def place():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(parameters, *numbers):
    """Sum every parameter's gradient over the processes, in place, and return the sums of `numbers`: one collective for all."""
    if not dist.is_initialized():
        return numbers
    parts = [p.grad.flatten() for p in parameters] + [torch.tensor(numbers, device=parameters[0].device)]
    flat = torch.cat(parts)
    try:
        dist.all_reduce(flat)
        *gradients, sums = flat.split([len(part) for part in parts])
        sums = sums.tolist()
    except RuntimeError as e:
        raise UserError(f"another process of this run has gone ({str(e).splitlines()[0]}); --resume continues from the last "
                        "checkpoint") from None
    for p, gradient in zip(parameters, gradients):
        p.grad.copy_(gradient.view_as(p))
    return sums


def shard(model, device):
    """Split the frozen weights over the processes, for a base that does not fit into one: each block's are gathered while it
    works. Before a LoRA is attached: that stays whole everywhere."""
    if not dist.is_initialized():
        raise UserError("--shard needs several processes: torchrun --nproc-per-node N train.py ...")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
