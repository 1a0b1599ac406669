"""Identify the latent factor from a LoRA's weights alone, and tell when something stands out.

dW = s B A = U S V'. Every training example pushes the spurious correlation the same way: its part
of dW adds up to one large singular value; the task's parts point in many directions and stay small.
The first column of U is what the update says, that of V what it listens to. That the factor can be
identified from the weights of a naive LoRA fine-tune is the abstract's claim; this way to do it is
our reconstruction (docs/theory.md has the proofs). This file needs lora.py alone.
"""

import functools
import math

import torch

from lora import lora_modules

FALSE_POSITIVES = 0.01  # of a look at one module in which nothing is shared


@torch.no_grad()
def thin_svd(A, B, scaling=1.0):
    """The SVD of dW = scaling * B A without dW: QR of both factors, SVD of a rank x rank core.

    A (r, in), B (out, r) -> U (out, r), S (r,) in descending order, V (in, r); dW = U diag(S) V'.
    """
    Q_out, R_out = torch.linalg.qr(B.float())
    Q_in, R_in = torch.linalg.qr(A.float().T)
    U, S, Vh = torch.linalg.svd(scaling * R_out @ R_in.T)
    return Q_out @ U, S, Q_in @ Vh.T


def spectra(model):
    """{module name: (U, S, V)} of every LoRA's dW."""
    loras = lora_modules(model).items()
    return {name: thin_svd(m.lora_A.data, m.lora_B.data, m.scaling) for name, m in loras}


def identify(model, rank=1):
    """The factor that the model's LoRA has picked up: {module name: U (out, rank)}, orthonormal.

    Each module's top `rank` output directions. Unsupervised: nothing but the weights of the naive
    fine-tune is read. ValueError where an update has fewer.
    """
    return top_directions(spectra(model), rank)


def top_directions(svds, rank=1):
    """{module name: U (out, rank)} of {module name: (U, S, V)}; ValueError where it has fewer."""
    for name, (_, S, _) in svds.items():
        if not 1 <= rank <= len(S):
            raise ValueError(f"subspace rank {rank}, but the LoRA on {name} has rank {len(S)}")
    return {name: U[:, :rank] for name, (U, _, _) in svds.items()}


def joined(factor, found):
    """{module name: an orthonormal basis of what either holds under that name}."""
    result = dict(factor)
    for name, U in found.items():
        if name in factor:
            U = torch.linalg.qr(torch.cat((factor[name], U), dim=1))[0]
        result[name] = U
    return result


@torch.no_grad()
def output_spectra(model):
    """{module name: (U (out, r), S (r,))} of every LoRA's B: what a look at a running update sees.

    B and not dW: early in training B is a sum of examples seen through the random A, whose spectrum
    is known where nothing is shared (`null_quantile`); dW would have the spread of A's own in it.
    """
    svds = {}
    for name, m in lora_modules(model).items():
        Q, R = torch.linalg.qr(m.lora_B.data)
        U, S, _ = torch.linalg.svd(R)
        svds[name] = Q @ U, S
    return svds


def spike(S, n=0):
    """How far sigma_{n+1} stands out: over sqrt(sum sigma^4 / sum sigma^2) of those below it.

    That mean weighs each by its energy: singular values near 0, where the rank exceeds the number
    of parts, do not count. Works on S (r,) and on many at once, (draws, r).
    """
    below = S[..., n + 1 :]
    typical = below.square().norm(dim=-1) / below.norm(dim=-1).clamp(min=1e-30)
    return S[..., n] / typical.clamp(min=1e-30)


@functools.cache
def null_quantile(rank, alpha=FALSE_POSITIVES):
    """The spike that a look exceeds with probability alpha where nothing is shared (our rule).

    The null: B is the sum of many orthonormal parts, seen through a random A. Its singular values
    are those of a Gaussian matrix; we draw square ones, the widest in the limit. With few parts, or
    parts that overlap, the rate is higher (measured up to .1: docs/theory.md, section 8).
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(10_000, rank, rank, generator=generator)
    return torch.quantile(spike(torch.linalg.svdvals(draws)), 1 - alpha).item()


def standing_out(svds, nulls=None):
    """{module name: U (out, n)}: the output directions that stand out, for modules that have any.

    svds: from `output_spectra`. One by one from the top, each against those below it. nulls:
    {module name: singular values (r,) of B where nothing but the inputs is shared}, which are to be
    exceeded, too (real/null.py).
    """
    found = {}
    for name, (U, S) in svds.items():
        n, least = 0, null_quantile(len(S))
        null = torch.zeros_like(S) if nulls is None else nulls[name]
        while n < len(S) - 1 and spike(S, n) > max(least, spike(null, n).item()):
            n += 1
        if n > 0:
            found[name] = U[:, :n]
    return found


def gap(S):
    """sigma1 / sigma2; about 1 where nothing is shared."""
    if len(S) == 1:
        return math.inf
    return (S[0] / S[1].clamp(min=1e-30)).item()


@torch.no_grad()
def leak(model, factor):
    """What the constraint let through: the largest ||U' dW|| / ||dW|| (Frobenius) of any module."""
    worst = 0.0
    for name, U in factor.items():
        m = lora_modules(model)[name]
        said = thin_svd(m.lora_A.data, U.T @ m.lora_B.data)[1].norm()
        whole = thin_svd(m.lora_A.data, m.lora_B.data)[1].norm()
        worst = max(worst, (said / whole.clamp(min=1e-30)).item())
    return worst


if __name__ == "__main__":
    from real.spectrum import program

    program()  # the command line
