"""The command line of identify.py: the spectrum of an adapter on disk, and its subspace file."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from baselines.stream import stream_subspace
from hub.adapter import read_adapter
from identify import gap, thin_svd, top_directions
from support.errors import user_errors
from support.files import writable_file
from support.options import option, parse
from support.program import run
from support.subspace import is_subspace, save_subspace


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
    out: str = option("", "the file to write (default: subspace.safetensors in that folder)")


def main():
    """The command line."""
    args = parse(Arguments)
    svds = {
        path: thin_svd(adapter.A, adapter.B, adapter.scaling)
        for path, adapter in read_adapter(args.adapter).items()
    }
    print_spectra(svds)
    with user_errors(args.adapter):
        factor = top_directions(svds, args.rank)
        for path, (_, S, _) in svds.items():
            if S[args.rank - 1] <= 1e-6 * S[0]:  # any direction would do, and constrain at random
                raise ValueError(f"the update of {path} has not {args.rank} directions above 0")
        stream, S = stream_subspace(svds, args.rank)
    print(f"pooled over the stream: sigma1/sigma2 {gap(S):.2f}")
    out = writable_file(args.out or Path(args.adapter) / "subspace.safetensors", is_subspace)
    save_subspace(out, factor, stream)
    print(f"wrote {out}")


def program():
    """The command line, with its errors in one line each."""
    run(main)
