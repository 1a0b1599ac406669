"""Subspace files: the directions that were found, as one safetensors file."""

import torch
from safetensors.torch import save

from support.errors import UserError
from support.files import open_safetensors, whole_file
from support.schema import readable

SIDE, STREAM = "outputs.", "stream"
TOLERANCE = 1e-2  # of Q'Q against the identity, entry by entry: a file in bfloat16 passes


def save_subspace(path, factor, stream, rename=lambda name: name):
    """Write outputs.<module> for each module's U (out, k), and the stream's basis (D, k).

    rename(name): the module's path in transformers, as the file has it.
    """
    tensors = {STREAM: stream.cpu().contiguous()}
    for name, U in factor.items():
        tensors[SIDE + rename(name)] = U.cpu().contiguous()
    with whole_file(path) as temporary:
        temporary.write_bytes(save(tensors))


def check_orthonormal(path, key, Q):
    """UserError unless the columns of Q (d, k) are orthonormal, to what bfloat16 can tell."""
    off = (Q.T @ Q - torch.eye(Q.shape[1])).abs().max().item()
    if not off <= TOLERANCE:  # so that NaN fails
        raise UserError(f"{path}: {key} is not orthonormal, Q'Q is off by {off:.2g}")


def orthonormal(path, key, tensor):
    """`tensor` (d, k) in fp32; UserError unless it is finite and orthonormal."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise UserError(f"{path}: {key} is {tensor.dtype}, expected floating point of 16 bits on")
    if tensor.dim() != 2 or not 1 <= tensor.shape[1] <= tensor.shape[0]:
        raise UserError(f"{path}: {key} is {tuple(tensor.shape)}, expected (width, directions)")
    basis = tensor.float()
    if not basis.isfinite().all():
        raise UserError(f"{path}: {key} has values that are not finite")
    check_orthonormal(path, key, basis)
    return torch.linalg.qr(basis)[0]  # exact to fp32, whatever the file's precision


def is_subspace(path):
    """Whether the file at `path` is one that `save_subspace` may replace."""
    try:
        with open_safetensors(path) as f:
            return STREAM in f.keys()  # noqa: SIM118 - a safetensors file is no dictionary
    except UserError:
        return False


def read_subspace(path):
    """({path in transformers: U (out, k)}, the stream's basis (D, k)) in fp32, checked."""
    with open_safetensors(path) as f:
        names = list(f.keys())
        tensors = {name: orthonormal(path, name, f.get_tensor(name)) for name in names}
    stream = tensors.pop(STREAM, None)
    if stream is None or not tensors:
        raise UserError(f"{path}: no subspace file, expected '{STREAM}' and '{SIDE}<module>'")
    for name in tensors:
        if not name.startswith(SIDE):
            raise UserError(f"{path}: unexpected {readable(name)}, expected '{SIDE}<module>'")
    return {name.removeprefix(SIDE): U for name, U in tensors.items()}, stream


def load_subspace(path, model):
    """The same by the model's own module names and on its device, checked against its widths."""
    found, stream = read_subspace(path)
    device = model.embed_tokens.weight.device
    if len(stream) != model.config.d_model:
        raise UserError(f"{path}: stream is {len(stream)} wide, expected {model.config.d_model}")
    names = {model.path_in_transformers(name): name for name, _ in model.named_modules() if name}
    factor = {}
    for module, U in found.items():
        if module not in names:
            kind = model.config.model_type
            raise UserError(f"{path}: {readable(module)} is not a module of this {kind} model")
        layer = model.get_submodule(names[module])
        linear = getattr(layer, "linear", layer)
        width = getattr(linear, "out_features", None)
        if width != len(U):
            raise UserError(f"{path}: {SIDE}{module} is {len(U)} wide, expected {width}")
        factor[names[module]] = U.to(device)
    return factor, stream.to(device)
