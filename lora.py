"""LoRA by hand: W stays frozen, the update dW = s B A is trained beside it. Attach, merge, save and load in PEFT's format.

Hu et al. 2021 (arXiv 2106.09685); rank-stabilised scaling, Kalajdzievski 2023 (arXiv 2312.03732).
"""
import contextlib
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import nn

from cli import UserError, read_json, whole_file, write_json
from model import open_safetensors

PREFIX, SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


class LoRALinear(nn.Module):
    """y = W x + b + s B A x, with W (out, in) frozen, A (rank, in) random and B (out, rank) zero at the start; A and B in fp32."""

    def __init__(self, linear, rank, alpha, rslora=False, generator=None):
        super().__init__()
        d_out, d_in = linear.weight.shape
        if not 1 <= rank <= min(d_out, d_in):
            raise UserError(f"rank {rank} for a layer of {d_out} x {d_in}, expected 1 to {min(d_out, d_in)}")
        self.linear, self.alpha, self.rslora = linear.requires_grad_(False), alpha, rslora
        self.scaling = alpha / (rank ** 0.5 if rslora else rank)
        uniform = torch.rand(rank, d_in, generator=generator) * 2 - 1  # drawn on the CPU: the same on every device
        self.lora_A = nn.Parameter((uniform / d_in ** 0.5).to(linear.weight.device))  # (rank, in), PEFT's init
        self.lora_B = nn.Parameter(torch.zeros(d_out, rank, device=linear.weight.device))  # (out, rank)
        self.unmerged = None  # W as it was, while the update is merged into it

    def forward(self, x):  # (..., in) -> (..., out); two thin products, dW is never formed
        y = self.linear(x)
        if self.unmerged is not None:
            return y
        return y + F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling, self.lora_B).to(y.dtype)


def lora_modules(model):
    """{name: LoRALinear}, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def matching_linears(model, targets):
    """Names of the blocks' linear layers whose path in transformers ends in one of `targets` ("all-linear": every one)."""
    paths = {name: model.path_in_transformers(name) for name, m in model.layers.named_modules(prefix="layers") if isinstance(m, nn.Linear)}
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        return list(paths)
    for target in targets:
        if not any(path.endswith("." + target) for path in paths.values()):
            raise UserError(f"target '{target}' matches no linear layer; there are {', '.join(sorted({p.split('.')[-1] for p in paths.values()}))}")
    return [name for name, path in paths.items() if path.endswith(tuple("." + target for target in targets))]


def attach(model, name, *args):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, LoRALinear(model.get_submodule(name), *args))


def add_lora(model, rank, alpha, targets, rslora=False, seed=0):
    """Freeze the model and attach a LoRA to each linear layer that `targets` name; returns the model.

    targets: path endings as PEFT takes them (("q_proj", "v_proj"), ("c_attn",)), or "all-linear". UserError where one matches nothing.
    """
    if lora_modules(model):
        raise UserError("the model has a LoRA already; merge or remove it first")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name in matching_linears(model, targets):
        attach(model, name, rank, alpha, rslora, generator)
    return model


def remove_lora(model):
    """Take every LoRA off: the base model again, bit for bit."""
    unmerge_lora(model)
    for name, module in lora_modules(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.linear)
    return model


@torch.no_grad()
def merge_lora(model):
    """W <- W + s B A, computed in fp32, for every LoRA; the old W is kept, so that `unmerge_lora` restores it bit for bit."""
    for module in lora_modules(model).values():
        if module.unmerged is None:
            weight = module.linear.weight
            module.unmerged = weight.data
            weight.data = (weight.float() + module.scaling * module.lora_B.float() @ module.lora_A.float()).to(weight.dtype)
    return model


def unmerge_lora(model):
    for module in lora_modules(model).values():
        if module.unmerged is not None:
            module.linear.weight.data, module.unmerged = module.unmerged, None
    return model


def save_lora(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, as PEFT reads them. All modules share one rank, alpha and scaling rule."""
    modules, tensors = lora_modules(model), {}
    if not modules:
        raise UserError("the model has no LoRA to save")
    for name, module in modules.items():
        for suffix, tensor in zip(SUFFIXES, (module.lora_A, module.lora_B)):
            tensors[PREFIX + model.path_in_transformers(name) + suffix] = tensor.detach().cpu().contiguous()
    first, folder = next(iter(modules.values())), Path(folder)
    targets = sorted({".".join(model.path_in_transformers(name).split(".")[-2:]) for name in modules})  # attn.c_proj is not mlp.c_proj
    layers = sorted({int(name.split(".")[1]) for name in modules})
    with whole_file(folder / "adapter_model.safetensors") as path:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": first.lora_A.shape[0],
        "lora_alpha": first.alpha, "use_rslora": first.rslora, "target_modules": targets, "bias": "none", "lora_dropout": 0.0,
        "fan_in_fan_out": model.config.model_type == "gpt2", "inference_mode": True,
        "layers_to_transform": None if len(layers) == model.config.n_layer else layers})


def read_adapter(folder):
    """A PEFT LoRA folder, without its model -> {path in transformers: (A, B, alpha, rslora)}, A (r, in), B (out, r) in fp32.

    UserError where a file or tensor is missing, misshapen, not finite, or the adapter is more than a plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a PEFT adapter")
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = read_json(config_path, "a PEFT adapter's configuration")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{config_path}: peft_type is {config.get('peft_type') if isinstance(config, dict) else config!r}, expected 'LORA'")
    for name, plain in (("use_dora", False), ("modules_to_save", None), ("bias", "none"), ("lora_bias", False), ("use_qalora", False)):
        if (config.get(name) or plain) != plain:
            raise UserError(f"{config_path}: {name} is {config[name]!r}, supported: {plain!r} (a plain LoRA)")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)):
            raise UserError(f"{config_path}: no number '{name}'")

    def for_module(pattern, module):  # PEFT: the first key of a pattern that ends the module's path
        return next((v for k, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", module)), None)

    with open_safetensors(path) as f:
        tensors = {key: f.get_tensor(key).float() for key in f.keys()}
    adapter = {}
    for key in tensors:
        module = key.removeprefix(PREFIX).removesuffix(SUFFIXES[0]).removesuffix(SUFFIXES[1])
        if not key.startswith(PREFIX) or not key.endswith(SUFFIXES):
            raise UserError(f"{path}: unexpected tensor {key}, expected {PREFIX}<module>.lora_A.weight and .lora_B.weight")
        if not tensors[key].isfinite().all():
            raise UserError(f"{path}: {key} has values that are not finite")
        A, B = (tensors.get(PREFIX + module + suffix) for suffix in SUFFIXES)
        rank = for_module("rank_pattern", module) or config["r"]
        if A is None or B is None:
            raise UserError(f"{path}: {module} has {key.split('.')[-2]} only, expected lora_A and lora_B")
        if A.shape[0] != rank or B.dim() != 2 or B.shape[1] != rank:
            raise UserError(f"{path}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected rank {rank}")
        adapter[module] = A, B, for_module("alpha_pattern", module) or config["lora_alpha"], bool(config.get("use_rslora"))
    if not adapter:
        raise UserError(f"{path}: no LoRA tensors")
    return adapter


def load_lora(model, folder):
    """Attach the PEFT adapter in `folder`; returns the model. UserError where it was made for another one."""
    adapter = read_adapter(folder)
    if lora_modules(model):
        raise UserError("the model has a LoRA already; merge or remove it first")
    names = {model.path_in_transformers(name): name for name in matching_linears(model, "all-linear")}
    for path, (A, B, _, _) in adapter.items():
        if path not in names:
            raise UserError(f"{folder}: adapts {path}, which this {model.config.model_type} model does not have")
        expected = tuple(model.get_submodule(names[path]).weight.shape)
        if (B.shape[0], A.shape[1]) != expected:
            raise UserError(f"{folder}: {path} is {B.shape[0]} x {A.shape[1]} in the adapter, {expected[0]} x {expected[1]} in the model")
    model.requires_grad_(False)
    for path, (A, B, alpha, rslora) in adapter.items():
        attach(model, names[path], A.shape[0], alpha, rslora)
        module = model.get_submodule(names[path])
        module.lora_A.data, module.lora_B.data = A.to(module.lora_A.device), B.to(module.lora_B.device)
    return model


@contextlib.contextmanager
def without_lora(model):
    """The base model, while the context lasts: every LoRA's scaling is 0."""
    modules = list(lora_modules(model).values())
    scalings = [module.scaling for module in modules]
    try:
        for module in modules:
            module.scaling = 0.0
        yield model
    finally:
        for module, scaling in zip(modules, scalings):
            module.scaling = scaling
