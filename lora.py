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

from cli import UserError, open_safetensors, read_json, whole_file, write_json

PREFIX, SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
NOT_PLAIN = ("bias", "lora_bias", "modules_to_save", "layer_replication", "use_dora", "use_qalora", "use_bdlora", "arrow_config",
             "alora_invocation_tokens", "kasa_config", "monteclora_config")  # PEFT's options that make another function of A, B


class LoRALinear(nn.Module):
    """y = W x + b + s B A x, W (out, in) frozen, A (rank, in) random and B (out, rank) zero at the start; A and B in fp32."""

    def __init__(self, linear, rank, alpha, rslora=False, generator=None):
        super().__init__()
        d_out, d_in = linear.weight.shape
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
    paths = {name: model.path_in_transformers(name) for name, module in model.named_modules()
             if name.startswith("layers.") and isinstance(module, nn.Linear)}
    if targets == "all-linear" or list(targets) == ["all-linear"]:
        return list(paths)
    for target in targets or [""]:
        if not any(path.endswith("." + target) for path in paths.values()):
            there = ", ".join(sorted({path.split(".")[-1] for path in paths.values()}))
            raise UserError(f"target '{target}' matches no linear layer; there are {there}")
    return [name for name, path in paths.items() if path.endswith(tuple("." + target for target in targets))]


def add_lora(model, rank, alpha, targets, rslora=False, seed=0):
    """Freeze the model and attach a LoRA to each linear layer that `targets` name; returns the model.

    targets: path endings as PEFT takes them (("q_proj", "v_proj"), ("c_attn",)), or "all-linear"; each must match something.
    """
    if lora_modules(model):
        raise UserError("the model has a LoRA already; remove it first")
    linears = {name: model.get_submodule(name) for name in matching_linears(model, targets)}
    most, narrowest = min((min(linear.weight.shape), name) for name, linear in linears.items())
    if not 1 <= rank <= most:
        raise UserError(f"rank {rank}, expected 1 to {most}, the most that {narrowest} can have")
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in linears.items():
        model.set_submodule(name, LoRALinear(linear, rank, alpha, rslora, generator))
    return model


def remove_lora(model):
    """Take every LoRA off: the base model again, bit for bit."""
    unmerge_lora(model)
    for name, module in lora_modules(model).items():
        model.set_submodule(name, module.linear)
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
    """Write adapter_config.json and adapter_model.safetensors, as PEFT reads them."""
    modules, tensors = {model.path_in_transformers(name): module for name, module in lora_modules(model).items()}, {}
    if not modules:
        raise UserError("the model has no LoRA to save")
    for path, module in modules.items():
        for suffix, tensor in zip(SUFFIXES, (module.lora_A, module.lora_B)):
            tensors[PREFIX + path + suffix] = tensor.detach().cpu().contiguous()
    first, folder, layers = next(iter(modules.values())), Path(folder), sorted({int(path.split(".")[2]) for path in modules})
    r = len(first.lora_A)
    with whole_file(folder / "adapter_model.safetensors") as path:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "r": r, "lora_alpha": first.alpha,
        "use_rslora": first.rslora, "bias": "none", "lora_dropout": 0.0,
        "rank_pattern": {path: len(m.lora_A) for path, m in modules.items() if len(m.lora_A) != r},
        "alpha_pattern": {path: m.alpha for path, m in modules.items() if m.alpha != first.alpha},
        "target_modules": sorted({".".join(path.split(".")[-2:]) for path in modules}),  # attn.c_proj is not mlp.c_proj
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
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{config_path}: peft_type is {kind!r}, expected 'LORA'")
    for name in NOT_PLAIN:
        if config.get(name) not in (None, False, "none", [], {}):
            raise UserError(f"{config_path}: {name} is {config[name]!r}, supported: a plain LoRA, without it")
    init = config.get("init_lora_weights")
    if init not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise UserError(f"{config_path}: init_lora_weights is {init!r}, which may change W; supported: a LoRA beside W as it is")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)):
            raise UserError(f"{config_path}: no number '{name}'")

    def for_module(pattern, module):  # PEFT: the first key of a pattern that ends the module's path
        return next((v for k, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({k})$", module)), None)

    with open_safetensors(path) as f:
        tensors = {key: f.get_tensor(key).to(torch.float32, copy=True) for key in f.keys()}
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
        if A.dim() != 2 or B.dim() != 2 or not A.shape[0] == B.shape[1] == rank:
            raise UserError(f"{path}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, expected rank {rank}")
        adapter[module] = A, B, for_module("alpha_pattern", module) or config["lora_alpha"], bool(config.get("use_rslora"))
    if not adapter:
        raise UserError(f"{path}: no LoRA tensors")
    return adapter


def load_lora(model, folder):
    """Attach the PEFT adapter in `folder`; returns the model. UserError where it was made for another one."""
    adapter = read_adapter(folder)
    if lora_modules(model):
        raise UserError("the model has a LoRA already; remove it first")
    names = {model.path_in_transformers(name): name for name in matching_linears(model, "all-linear")}
    for path, (A, B, _, _) in adapter.items():
        if path not in names:
            raise UserError(f"{folder}: adapts {path}, which is no linear layer of this {model.config.model_type} model's blocks")
        expected = tuple(model.get_submodule(names[path]).weight.shape)
        if (B.shape[0], A.shape[1]) != expected:
            raise UserError(f"{folder}: {path} is {B.shape[0]} x {A.shape[1]} in the adapter, "
                            f"{expected[0]} x {expected[1]} in the model")
    model.requires_grad_(False)
    for path, (A, B, alpha, rslora) in adapter.items():
        module = LoRALinear(model.get_submodule(names[path]), len(A), alpha, rslora)
        module.lora_A.data, module.lora_B.data = A.to(module.lora_A.device), B.to(module.lora_B.device)
        model.set_submodule(names[path], module)
    return model


@contextlib.contextmanager
def without_lora(model):
    """The base model, while the context lasts: every LoRA's scaling is 0."""
    scalings = {module: module.scaling for module in lora_modules(model).values()}
    if any(module.unmerged is not None for module in scalings):
        raise UserError("the LoRA is merged; unmerge it first")
    try:
        for module in scalings:
            module.scaling = 0.0
        yield model
    finally:
        for module, scaling in scalings.items():
            module.scaling = scaling
