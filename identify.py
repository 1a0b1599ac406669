"""Identify the latent factor from a naive LoRA's weights alone: the top singular pair of each module's own update.

dW = U S V'. Every training example pushes the spurious correlation the same way, so its part of dW adds up to one large singular
value; the task's parts point in many directions and stay small (the claim is the abstract's, the formulation
ours). The first columns of U are what the update says, those of V what it listens to. GRASP keeps both away.
"""
import math
from dataclasses import MISSING, dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from cli import UserError, open_safetensors, option, parse, run, whole_file
from lora import lora_modules, read_adapter

WRITERS = ("o_proj", "down_proj", "c_proj")  # modules that add their output to the residual stream; the others read it


@torch.no_grad()
def thin_svd(A, B, scaling=1.0):
    """The SVD of dW = scaling * B A without forming dW: QR of both factors, then the SVD of a rank x rank core.

    A (r, in), B (out, r) -> U (out, r), S (r,) in descending order, V (in, r); dW = U diag(S) V'.
    """
    Q_out, R_out = torch.linalg.qr(B.float())
    Q_in, R_in = torch.linalg.qr(A.float().T)
    U, S, Vh = torch.linalg.svd(scaling * R_out @ R_in.T)
    return Q_out @ U, S, Q_in @ Vh.T


def spectra(model):
    """{module name: (U, S, V)} of every LoRA in the model."""
    return {name: thin_svd(m.lora_A.data, m.lora_B.data, m.scaling) for name, m in lora_modules(model).items()}


@dataclass(frozen=True)
class Factor:
    """Orthonormal bases by module name: `hears` (in, k) on the input side, `says` (out, k) on the output side."""
    hears: dict
    says: dict

    def joined(self, other):
        """Both factors' directions. They are orthogonal where `other` was found in an update that this one constrained."""
        join = lambda a, b: {name: torch.linalg.qr(torch.cat([d[name] for d in (a, b) if name in d], 1))[0] for name in a | b}
        return Factor(join(self.hears, other.hears), join(self.says, other.says))


def top_pairs(svds, rank=1):
    """The Factor of the top `rank` singular pairs of each module. UserError where the rank is larger than a module's update."""
    for name, (_, S, _) in svds.items():
        if not 1 <= rank <= len(S):
            raise UserError(f"rank {rank} of the subspace, but the LoRA on {name} has rank {len(S)}")
    return Factor({name: V[:, :rank] for name, (_, _, V) in svds.items()}, {name: U[:, :rank] for name, (U, _, _) in svds.items()})


def in_rounds(train, rounds, steps, pick=top_pairs):
    """Identify, constrain, look again: (the Factor of all rounds, [each round's {module: (U, S, V)}]).

    train(i, factor, steps) fine-tunes a fresh LoRA kept off `factor` (None in round 0, the naive run) and returns its spectra. A
    later round shows the route that the update takes once the first is closed, which the naive run had no need of; half the steps
    show it as well (README)."""
    factor, found = None, []
    for i in range(rounds):
        found.append(train(i, factor, max(steps // 2, 1) if i else steps))
        print(f"round {i + 1}: the largest sigma1/sigma2 of a module is {max(gap(S) for _, S, _ in found[-1].values()):.2f}")
        factor = factor.joined(pick(found[-1])) if factor else pick(found[-1])
    return factor, found


def identify(model, rank=1):
    """{module name: orthonormal basis (d, rank)} on each module's residual side: what a reader listens to, what a writer says."""
    factor = top_pairs(spectra(model), rank)
    return {name: (factor.says if name.endswith(WRITERS) else factor.hears)[name] for name in factor.says}


def stream_subspace(svds, rank=1):
    """One basis Q (D, rank) of the residual stream for the whole model, and the pooled singular values, in descending order.

    The writers' left singular vectors, scaled by their singular values and set side by side (where none is adapted: the readers'
    right ones), then the SVD of that. For methods that act on activations; the first column is the found direction.
    """
    sides = [U * S for name, (U, S, _) in svds.items() if name.endswith(WRITERS)] or [V * S for _, S, V in svds.values()]
    if len({side.shape[0] for side in sides}) > 1:
        raise UserError("the adapted modules do not share a residual stream: their widths differ")
    Q, S, _ = torch.linalg.svd(torch.cat(sides, 1), full_matrices=False)
    return Q[:, :rank], S


def gap(S):
    """sigma1 / sigma2: how far the spike stands out. About 1 where there is no single shared direction."""
    return (S[0] / S[1].clamp(min=1e-30)).item() if len(S) > 1 else math.inf


@torch.no_grad()
def leak(model, factor):
    """The largest over modules of ||dW V|| / ||dW|| and ||U' dW|| / ||dW|| (Frobenius): what the constraint let through."""
    worst = 0.0
    for name, m in lora_modules(model).items():
        A, B = m.lora_A.data, m.lora_B.data
        size = thin_svd(A, B)[1].norm().clamp(min=1e-30)
        if name in factor.hears:
            worst = max(worst, ((B @ (A @ factor.hears[name])).norm() / size).item())
        if name in factor.says:
            worst = max(worst, (((factor.says[name].T @ B) @ A).norm() / size).item())
    return worst


def save_factor(factor, stream, path, rename=lambda name: name):
    """One safetensors file: hears.<module>, says.<module> (paths as in transformers) and the stream's basis."""
    tensors = {f"{side}.{rename(name)}": basis.cpu().contiguous()
               for side, bases in (("hears", factor.hears), ("says", factor.says)) for name, basis in bases.items()}
    with whole_file(path) as temporary:
        temporary.write_bytes(save({"stream": stream.cpu().contiguous(), **tensors}))


def load_factor(path, model=None):
    """(Factor, stream basis) from `path`; with a model, under its module names and checked against its shapes."""
    bases = {"hears": {}, "says": {}}
    with open_safetensors(path) as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    stream = tensors.pop("stream", None)
    if stream is None or not all(key.split(".")[0] in bases for key in tensors):
        raise UserError(f"{path}: not a subspace file, expected 'stream' and 'hears.<module>', 'says.<module>'")
    names = None if model is None else {model.path_in_transformers(n): n for n, _ in model.named_modules() if n}
    for key, basis in tensors.items():
        side, _, module = key.partition(".")
        if names is not None:
            if module not in names:
                raise UserError(f"{path}: {module} is not a module of this {model.config.model_type} model")
            module = names[module]
            layer = model.get_submodule(module)
            expected = getattr(layer, "linear", layer).weight.shape[1 if side == "hears" else 0]
            if basis.shape[0] != expected:
                raise UserError(f"{path}: {key} has {basis.shape[0]} rows, expected {expected}")
            basis = basis.to(model.embed_tokens.weight.device)
        bases[side][module] = basis
    return Factor(**bases), stream if model is None else stream.to(model.embed_tokens.weight.device)


def print_spectra(svds):
    width = max(map(len, svds))
    print(f"{'module':{width}}  sigma1/sigma2  share of |dW|^2  singular values")
    for name, (_, S, _) in svds.items():
        share = (S[0] ** 2 / S.square().sum().clamp(min=1e-30)).item()
        print(f"{name:{width}}  {gap(S):13.2f}  {share:15.2f}  {' '.join(f'{s:.3g}' for s in S[:6].tolist())}")


@dataclass(frozen=True)
class Arguments:
    """Print the spectrum of a LoRA adapter (PEFT's format), module by module, and write the subspace that GRASP keeps clear of."""
    adapter: str = option(MISSING, "folder with adapter_config.json and adapter_model.safetensors")
    rank: int = option(1, "singular pairs of each module")
    join: str = option("", "a subspace file whose directions are kept too (the one under which this adapter was trained)")
    out: str = option("", "the file to write; without it, subspace.safetensors in the adapter's folder")


def main():
    args = parse(Arguments)
    adapter = read_adapter(args.adapter)
    svds = {path: thin_svd(A, B, alpha / (len(A) ** 0.5 if rslora else len(A))) for path, (A, B, alpha, rslora) in adapter.items()}
    print_spectra(svds)
    factor, (stream, S) = top_pairs(svds, args.rank), stream_subspace(svds, args.rank)
    if args.join:
        factor = load_factor(args.join)[0].joined(factor)
    print(f"pooled over the stream: sigma1/sigma2 {gap(S):.2f}")
    out = Path(args.out or Path(args.adapter) / "subspace.safetensors")
    save_factor(factor, stream, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run(main)
