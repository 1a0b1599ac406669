"""A checkpoint's safetensors -> its tensors, every name, shape, dtype and value checked."""

import re
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path

import torch

from support.errors import UserError
from support.files import open_safetensors
from support.schema import read_file, show, value

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEAD = "lm_head.weight"
FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that hold weights
PLAIN_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,255}")  # a file of the checkpoint's own folder


@dataclass(frozen=True, kw_only=True)
class _Index:
    weight_map: dict[str, str] = value()


def read_tensors(folder, shapes, model_type, tied, device="cpu", dtype=None):
    """The checkpoint's parameters, read one at a time: {path in transformers: tensor}.

    shapes: {path in transformers: torch.Size}, all parameters of the model and nothing else; where
    the head is the embedding (`tied`), without "lm_head.weight". dtype: None keeps the stored one.
    UserError names the tensor that is missing, unexpected, misshapen, no floating point of at
    least 16 bits, or not finite, and with dtype None one whose dtype is not the embedding's.
    What needs no conversion stays mapped: replace the file under a loaded model, never write into
    it.
    """
    folder = Path(folder)
    stored = _stored_names(folder, model_type)
    embedding = "transformer.wte.weight" if model_type == "gpt2" else "model.embed_tokens.weight"
    expected = dict(shapes)
    if tied and HEAD in stored:  # some files carry a copy of the embedding
        expected[HEAD] = shapes[embedding]
    _check_names(folder, "missing", expected.keys() - stored.keys())
    _check_names(folder, "unexpected", stored.keys() - expected.keys())

    tensors = {}
    for path, shape in expected.items():
        file, name = stored[path]
        conv1d = model_type == "gpt2" and ".h." in path and len(shape) == 2  # stored as (in, out)
        stored_shape = tuple(reversed(shape)) if conv1d else tuple(shape)
        tensor = _read_tensor(file, name, stored_shape)
        if conv1d:
            tensor = tensor.t().contiguous()
        tensors[path] = tensor.to(device, dtype)
        check_finite(tensors[path], file, name)

    expected = tensors[embedding].dtype
    for path, tensor in tensors.items():
        if tensor.dtype != expected:
            raise UserError(
                f"{folder}: {path} is {tensor.dtype}, expected {expected} as {embedding}, or a "
                "dtype to convert to"
            )
    if tied and HEAD in tensors:
        copy = tensors.pop(HEAD)
        if not torch.equal(copy, tensors[embedding]):
            raise UserError(
                f"{folder}: {HEAD} differs from the embedding, though the config ties them"
            )
    return tensors


def _stored_names(folder, model_type):
    """What the folder's files hold: {path in transformers: (file, name in that file)}."""
    stored = {}
    for file in _files(folder):
        with open_safetensors(file) as f:
            names = list(f.keys())
        for name in names:
            path = name
            if model_type == "gpt2":
                if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, a buffer
                    continue
                if not name.startswith(("transformer.", "lm_head.")):  # the Hub's own GPT-2
                    path = "transformer." + name
            if path in stored:
                other_file, _ = stored[path]
                raise UserError(
                    f"{file}: {show(name)} is in {other_file.name} too, expected each tensor once"
                )
            stored[path] = file, name
    return stored


def _files(folder):
    """The checkpoint's safetensors files: one, or the shards that its index lists."""
    if lexists(folder / WHOLE):
        return [folder / WHOLE]
    index = folder / INDEX
    listing = read_file(_Index, index, f"an index of shards, since there is no {WHOLE}")
    names = sorted(set(listing.weight_map.values()))
    if not names:
        raise UserError(f"{index}: 'weight_map' is empty, expected tensor names and their files")
    for name in names:
        if not PLAIN_NAME.fullmatch(name) or name in (".", ".."):
            raise UserError(
                f"{index}: names the file {show(name)}, expected files of this folder alone"
            )
    return [folder / name for name in names]


def _check_names(folder, problem, names):
    if names:
        raise UserError(f"{folder}: {len(names)} {problem} tensors, the first {show(min(names))}")


def _read_tensor(file, name, shape):
    """One tensor of a safetensors file, of the shape that is expected."""
    # The file is opened anew for each tensor: what is mapped for one goes when it has been copied.
    with open_safetensors(file) as f:
        stored = f.get_slice(name)
        found = tuple(stored.get_shape())
        if found != shape:
            raise UserError(f"{file}: {name} is {found}, expected {shape}")
        check_dtype(stored.get_dtype(), file, name)
        return f.get_tensor(name)


def check_dtype(dtype, file, name):
    """Refuse numbers that are no plain weights: integers, bools, and floats of 8 bits or less."""
    if dtype not in FLOATS:
        raise UserError(
            f"{file}: {name} is of the dtype {dtype}, expected one of {', '.join(FLOATS)}"
        )


def check_finite(tensor, file, name):
    """Refuse NaN and infinity, without a temporary of the tensor's size."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        raise UserError(f"{file}: {name} has values that are not finite")
