"""The command line of identify.py: the spectrum of an adapter on disk, and its subspace file.

--less is ours, and needs a second adapter, such as one trained on unobjectionable answers to the
same prompts: what both say is no factor (docs/real_models.md has what it gives).
"""

from dataclasses import MISSING, dataclass
from pathlib import Path

from baselines.stream import stream_subspace
from hub.adapter import read_adapter
from identify import gap, thin_svd, top_directions
from support.errors import UserError, user_errors
from support.files import writable_file
from support.options import option, parse
from support.program import run
from support.subspace import is_subspace, save_subspace
from train import project_


def spectra_of(folder):
    """{path: (U, S, V)} of an adapter's updates."""
    adapters = read_adapter(folder).items()
    return {path: thin_svd(adapter.A, adapter.B, adapter.scaling) for path, adapter in adapters}


def found_in(folder, svds, rank):
    """{path: U (out, rank)}; UserError where an update has not so many directions."""
    with user_errors(folder):
        factor = top_directions(svds, rank)
        for path, (_, S, _) in svds.items():
            if S[rank - 1] <= 1e-6 * S[0]:  # any direction would do, and constrain at random
                raise ValueError(f"the update of {path} has not {rank} directions above 0")
    return factor


def spectra_beyond(folder, other, rank):
    """{path: (U, S, V)} of what an adapter says beyond the first `rank` directions of another.

    UserError where the two do not fit, or where nothing is left.
    """
    known = found_in(other, spectra_of(other), rank)
    svds = {}
    for path, adapter in read_adapter(folder).items():
        if path not in known or len(known[path]) != len(adapter.B):
            width = len(adapter.B)
            raise UserError(f"{other}: no update of {path} of width {width}, as {folder} has")
        B = adapter.B.clone()
        project_(B, known[path])
        if B.norm() <= 1e-6 * adapter.B.norm():  # rounding, which has a spectrum as well
            raise UserError(f"{folder}: the update of {path} says nothing that {other} does not")
        svds[path] = thin_svd(adapter.A, B, adapter.scaling)
    return svds


def print_spectra(svds):
    """One line a module: sigma1/sigma2, the top pair's share, the first singular values."""
    width = max(len(name) for name in svds)
    print(f"{'module':{width}}  sigma1/sigma2  share of |dW|^2  singular values")
    for name, (_, S, _) in svds.items():
        share = (S[0] ** 2 / S.square().sum().clamp(min=1e-30)).item()
        first = " ".join(f"{s:.3g}" for s in S[:6].tolist())
        print(f"{name:{width}}  {gap(S):13.2f}  {share:15.2f}  {first}")


@dataclass(frozen=True)
class Arguments:
    """Print the spectrum of a LoRA adapter in PEFT's format; write the subspace for GRASP."""

    adapter: str = option(MISSING, "folder with adapter_config.json and adapter_model.safetensors")
    rank: int = option(1, "directions of each module", low=1)
    less: str = option(
        "",
        "another adapter, such as a control's: its first --rank output directions are taken out of "
        "the update before it is looked at (of the stream's basis, for ablation, they are not)",
    )
    out: str = option(
        "", "the file to write (default: subspace.safetensors in that folder; with --less: none)"
    )


def main():
    """The command line."""
    args = parse(Arguments)
    svds = whole = spectra_of(args.adapter)
    if args.less:
        if not args.out:
            raise UserError("--less needs --out FILE: the default is that of the whole update")
        svds = spectra_beyond(args.adapter, args.less, args.rank)
    print_spectra(svds)
    factor = found_in(args.adapter, svds, args.rank)
    with user_errors(args.adapter):
        stream, S = stream_subspace(whole, args.rank)
    print(f"pooled over the stream: sigma1/sigma2 {gap(S):.2f}")
    out = writable_file(args.out or Path(args.adapter) / "subspace.safetensors", is_subspace)
    save_subspace(out, factor, stream)
    print(f"wrote {out}")


def program():
    """The command line, with its errors in one line each."""
    run(main)
