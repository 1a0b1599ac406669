"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from hub.weights import check_dtype, check_finite
from support.errors import UserError
from support.files import open_safetensors, read_json, whole_file, write_json
from support.schema import from_json, show, value

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, SUFFIX_A, SUFFIX_B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
MOST_RANK = 2**20
LONGEST_KEY = 1000  # characters of a key in a pattern

# PEFT's options that make another function of A and B, or train more than them.
NOT_PLAIN = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "layer_replication",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "alora_invocation_tokens",
    "kasa_config",
    "monteclora_config",
)
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")  # the others may change W

# What a key of a pattern is made of: one character (an escape, a class, a literal, "." for any)
# and how often it may stand.
ATOM = re.compile(r"(\\[dw.-]|\[\^?[\w.-]+\]|[\w.-])([*+?]?)", re.ASCII)


@dataclass(frozen=True)
class Adapter:
    """One module's LoRA, dW = scaling B A: A (rank, in) and B (out, rank), both fp32."""

    A: torch.Tensor
    B: torch.Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self):
        """The number of directions, as stored."""
        return len(self.A)

    @property
    def scaling(self):
        """alpha / rank, or alpha / sqrt(rank) where the adapter is rank-stabilised."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, kw_only=True)
class _Config:
    peft_type: str = value(choices=("LORA",))
    r: int = value(low=1, high=MOST_RANK)
    lora_alpha: float = value()
    use_rslora: bool = value(False)
    rank_pattern: dict[str, int] = value({}, low=1, high=MOST_RANK)
    alpha_pattern: dict[str, float] = value({})


def read_adapter(folder):
    """A PEFT LoRA folder, without its model: {path in transformers: Adapter}.

    UserError where a file or tensor is missing, misshapen, not finite or no floating point, or
    the adapter is more than a plain LoRA.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, expected a PEFT adapter")
    config, rank_of, alpha_of = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    tensors = _read_tensors(path)
    modules = dict.fromkeys(module for module, _ in tensors)  # in the file's order
    if not modules:
        raise UserError(f"{path}: no LoRA tensors")

    adapters = {}
    for module in modules:
        A, B = tensors.get((module, SUFFIX_A)), tensors.get((module, SUFFIX_B))
        if A is None or B is None:
            there = "lora_B" if A is None else "lora_A"
            raise UserError(f"{path}: {module} has {there} only, expected lora_A and lora_B")
        rank = rank_of.find(module, config.r)
        if (
            A.dim() != 2
            or B.dim() != 2
            or not len(A) == B.shape[1] == rank
            or 0 in A.shape + B.shape
        ):
            raise UserError(
                f"{path}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                f"expected rank {rank}"
            )
        alpha = alpha_of.find(module, config.lora_alpha)
        adapter = Adapter(A, B, alpha, config.use_rslora)
        if not (A.norm() * B.norm() * adapter.scaling).isfinite():
            raise UserError(f"{path}: the update of {module} is not finite in 32 bits")
        adapters[module] = adapter
    return adapters


def write_adapter(folder, adapters, fan_in_fan_out, n_layer):
    """Write {path in transformers: Adapter} as PEFT reads it.

    fan_in_fan_out: whether the base stores its weights as (in, out), as GPT-2 does. n_layer: of the
    base model; an adapter of some of its layers names them.
    """
    if not adapters:
        raise UserError("the model has no LoRA to save")
    folder = Path(folder)
    tensors = {}
    for path, adapter in adapters.items():
        tensors[PREFIX + path + SUFFIX_A] = adapter.A.detach().cpu().contiguous()
        tensors[PREFIX + path + SUFFIX_B] = adapter.B.detach().cpu().contiguous()

    first = next(iter(adapters.values()))
    ranks = {path: a.rank for path, a in adapters.items() if a.rank != first.rank}
    alphas = {path: a.alpha for path, a in adapters.items() if a.alpha != first.alpha}
    layers = sorted({int(path.split(".")[2]) for path in adapters})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "use_rslora": first.rslora,
        "bias": "none",
        "lora_dropout": 0.0,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        # two parts of each path: attn.c_proj is not mlp.c_proj
        "target_modules": sorted({".".join(path.split(".")[-2:]) for path in adapters}),
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "layers_to_transform": None if len(layers) == n_layer else layers,
    }
    with whole_file(folder / WEIGHTS) as path:
        path.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config)


def _read_config(path):
    """(_Config, its rank pattern, its alpha pattern) of an adapter_config.json."""
    found = read_json(path, "a PEFT adapter's configuration")
    config = from_json(_Config, found, path)
    for name in NOT_PLAIN:
        if found.get(name) not in (None, False, "none", [], {}):
            raise UserError(
                f"{path}: '{name}' is {show(found[name])}, supported: a plain LoRA, without it"
            )
    init = found.get("init_lora_weights")
    if init not in PLAIN_INITS:
        raise UserError(
            f"{path}: 'init_lora_weights' is {show(init)}, which may change W; supported: a LoRA "
            "beside W as it is"
        )
    rank_of = _Pattern(config.rank_pattern, path, "rank_pattern")
    alpha_of = _Pattern(config.alpha_pattern, path, "alpha_pattern")
    return config, rank_of, alpha_of


def _read_tensors(path):
    """{(module's path in transformers, suffix): tensor in fp32} of an adapter_model.safetensors."""
    tensors = {}
    with open_safetensors(path) as f:
        for key in f.keys():  # noqa: SIM118 - a safetensors file is no dictionary
            suffix = SUFFIX_A if key.endswith(SUFFIX_A) else SUFFIX_B
            if not key.startswith(PREFIX) or not key.endswith(suffix):
                raise UserError(
                    f"{path}: unexpected tensor {show(key)}, expected "
                    f"{PREFIX}<module>{SUFFIX_A} and {SUFFIX_B}"
                )
            check_dtype(f.get_slice(key).get_dtype(), path, key)
            # a copy, since what is mapped would change with the file
            tensor = f.get_tensor(key).to(torch.float32, copy=True)
            check_finite(tensor, path, key)
            module = key.removeprefix(PREFIX).removesuffix(suffix)
            tensors[module, suffix] = tensor
    return tensors


class _Pattern:
    r"""PEFT's rank_pattern or alpha_pattern: keys that end a module's path, and numbers.

    PEFT matches a key as the regular expression (.*\.)?(key)$; the first that matches counts.
    Python's own matcher can take for ever on an expression from a file, so ours knows a subset
    and is linear in path times key: names, "." for any character, \d, \w, escaped "." and "-",
    classes such as [0-3], each of these with *, + or ?, alternatives by "|", ^ before and $ after.
    Groups, counts and look-arounds are refused by name.
    """

    def __init__(self, numbers, path, name):
        self.rules = []
        for key, number in numbers.items():
            if len(key) > LONGEST_KEY:
                raise UserError(
                    f"{path}: a key of '{name}' is {show(key)}, of {len(key)} characters, "
                    f"expected at most {LONGEST_KEY}"
                )
            try:
                alternatives = [_compile(part) for part in key.split("|")]
            except ValueError as e:
                raise UserError(f"{path}: a key of '{name}' is {show(key)}, {e}") from None
            self.rules.append((alternatives, number))

    def find(self, module, default):
        """The number of the first key that matches the module's path."""
        for alternatives, number in self.rules:
            if any(_ends(module, *alternative) for alternative in alternatives):
                return number
        return default


def _compile(part):
    """One alternative of a key: (whether it stands for the whole path, [(character, times)])."""
    whole = part.startswith("^")
    text = part.removeprefix("^").removesuffix("$")
    atoms, position = [], 0
    while position < len(text):
        atom = ATOM.match(text, position)
        if atom is None:
            raise ValueError(
                f"with {show(text[position])} that is not supported; expected a path's end, made "
                "of names, '.', [...], \\d, \\w, *, +, ? and |"
            )
        character, times = atom.groups()
        try:
            atoms.append((re.compile(character), times))
        except re.error as e:  # such as [z-a]
            raise ValueError(f"no regular expression ({e})") from None
        position = atom.end()
    return whole, atoms


def _ends(path, whole, atoms):
    """Whether `path` ends in what `atoms` match, after its beginning or, unless `whole`, a dot."""
    reached = {0}  # where in `path` the atoms so far may end
    if not whole:
        reached |= {i + 1 for i, c in enumerate(path) if c == "."}
    for character, times in atoms:
        after = {i + 1 for i in reached if i < len(path) and character.fullmatch(path[i])}
        if times in ("*", "+"):
            for i in range(len(path)):
                if i in after and character.fullmatch(path[i]):
                    after.add(i + 1)
        if times in ("*", "?"):
            after |= reached
        if not after:
            return False
        reached = after
    return len(path) in reached
