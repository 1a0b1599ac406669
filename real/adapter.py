"""LoRA adapters in PEFT's format, and the pattern files of identify.py."""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from lora import LoRALinear, lora_modules, matching_linears
from real.load import existing
from support.files import reading, whole_file, write_json

# Fields that are read here or do not matter after training; any other is refused if it is active.
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
PLACE = ("target_modules", "layers_to_transform", "fan_in_fan_out", "task_type", "auto_mapping")
ORIGIN = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "lora_dropout")
KNOWN = {*SCALE, *PLACE, *ORIGIN, "megatron_core", "qalora_group_size", "eva_config"}
PLAIN = {"peft_type": ["LORA"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}
KEY = "base_model.model.{}.lora_{}.weight"


def by_pattern(pattern, path, default):
    """PEFT's rank_pattern or alpha_pattern: the first key that ends the path, as an expression."""
    keys = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", path))
    return (pattern or {}).get(next(keys, None), default)


def adapted(path, config):
    """Whether the config puts a LoRA on the module at `path`, by PEFT's rules."""
    targets, layers = config["target_modules"], config.get("layers_to_transform")
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, path) is not None
    if path in targets or not path.endswith(tuple(f".{target}" for target in targets)):
        return path in targets
    layers = [layers] if isinstance(layers, int) else layers
    return not layers or int(re.search(r"\.(\d+)\.", path)[1]) in layers


def read_adapter(folder):
    """{path in transformers: (A (r, in), B (out, r), alpha, rslora)} in fp32, without a model.

    As PEFT does, leaves out what the config does not name. ValueError if it is no plain LoRA.
    """
    path, adapters = existing(folder) / "adapter_config.json", {}
    with reading(path, "a plain LoRA in PEFT's format"):
        config = json.loads(path.read_text(encoding="utf-8"))
        for name, value in config.items():
            if name not in KNOWN and value and value not in PLAIN.get(name, ["none"]):
                raise ValueError(f"'{name}' is {value}")  # another initialisation may change W
    path = path.with_name("adapter_model.safetensors")
    with reading(path, "the weights of a plain LoRA"):
        tensors = load_file(path)
        for key in tensors:
            if not (match := re.fullmatch(KEY.format("(.+)", "[AB]"), key)):
                raise ValueError(f"{key} is no lora_A or lora_B of a module")
            name = match[1]
            if not adapted(name, config):
                warnings.warn(f"{folder}: not applied, by its config: {name}", stacklevel=2)
                continue
            A, B = (tensors[KEY.format(name, side)].to(torch.float32, copy=True) for side in "AB")
            rank = by_pattern(config.get("rank_pattern"), name, config["r"])
            alpha = float(by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]))
            if not A.shape[0] == B.shape[1] == rank:
                raise ValueError(f"{name}: A {[*A.shape]} and B {[*B.shape]}, expected rank {rank}")
            if not (A.norm() * B.norm() * alpha).isfinite():
                raise ValueError(f"{name} has values that are not finite")
            adapters[name] = A, B, alpha, bool(config.get("use_rslora"))
        if not adapters:
            raise ValueError(f"none of a module in 'target_modules' {config['target_modules']}")
    return adapters


def adapter_factors(folder):
    """{path in transformers: (A (r, in), s B (out, r))} of an adapter: their product is dW."""
    return {
        path: (A, B * (alpha / len(A) ** (0.5 if rslora else 1)))
        for path, (A, B, alpha, rslora) in read_adapter(folder).items()
    }


def load_lora(model, folder):
    """Attach the PEFT adapter in `folder`; return the model. ValueError if made for another one."""
    if lora_modules(model):
        raise ValueError("the model has a LoRA already; remove it first")
    names = {model.path_in_transformers(n): n for n in matching_linears(model, "all-linear")}
    model.requires_grad_(False)
    for path, (A, B, alpha, rslora) in read_adapter(folder).items():
        if path not in names:
            raise ValueError(f"{folder}: {path} is no linear layer of this model's blocks")
        linear, shape = model.get_submodule(names[path]), (len(B), A.shape[1])
        if linear.weight.shape != shape:
            raise ValueError(f"{folder}: {path} is {shape}, expected {tuple(linear.weight.shape)}")
        lora = LoRALinear(linear, len(A), alpha, rslora)
        lora.lora_A.data, lora.lora_B.data = A.to(linear.weight.device), B.to(linear.weight.device)
        model.set_submodule(names[path], lora)
    return model


def save_lora(model, folder):
    """Write adapter_model.safetensors and adapter_config.json, as PEFT reads them."""
    modules = {model.path_in_transformers(n): m for n, m in lora_modules(model).items()}
    first, tensors = next(iter(modules.values())), {}
    for path, m in modules.items():
        tensors[KEY.format(path, "A")] = m.lora_A.data.cpu().contiguous()
        tensors[KEY.format(path, "B")] = m.lora_B.data.cpu().contiguous()
    rank = len(first.lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": first.alpha,
        "use_rslora": first.rslora,
        "bias": "none",
        "rank_pattern": {p: len(m.lora_A) for p, m in modules.items() if len(m.lora_A) != rank},
        "alpha_pattern": {p: m.alpha for p, m in modules.items() if m.alpha != first.alpha},
        "target_modules": list(modules),
        "fan_in_fan_out": model.config.model_type == "gpt2",  # its Conv1D stores W as (in, out)
    }
    with whole_file(Path(folder) / "adapter_model.safetensors") as path:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(Path(folder) / "adapter_config.json", config)


def save_patterns(path, patterns, stream, rename=lambda name: name):
    """Write outputs.<module> = U (out, k), inputs.<module> = V (in, k), stream (D, k), in fp32."""
    tensors = {"stream": stream}
    for name, (U, V) in patterns.items():
        tensors |= {f"outputs.{rename(name)}": U, f"inputs.{rename(name)}": V}
    with whole_file(path) as temporary:
        temporary.write_bytes(save({k: t.float().cpu().contiguous() for k, t in tensors.items()}))


def load_patterns(path, model):
    """({module: (U (out, k), V (in, k))}, stream (D, k)), fp32; ValueError if of another model."""
    device, patterns = model.embed_tokens.weight.device, {}
    with reading(path, "this model's patterns (run identify.py again)"):
        bases = {k: torch.linalg.qr(t.float())[0].to(device) for k, t in load_file(path).items()}
        stream = bases.pop("stream")
        for name, module in model.named_modules():
            key = model.path_in_transformers(name)
            if f"outputs.{key}" in bases:
                patterns[name] = bases.pop(f"outputs.{key}"), bases.pop(f"inputs.{key}")
                shape = getattr(module, "linear", module).weight.shape
                if tuple(len(basis) for basis in patterns[name]) != shape:
                    raise ValueError(f"they do not fit {key}, which is {[*shape]}")
        if bases or len(stream) != model.config.d_model:
            raise ValueError(f"a stream {len(stream)} wide and, of other modules, {list(bases)}")
    return patterns, stream
