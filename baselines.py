"""Every method as what it adds to the one fine-tuning loop: a few lines each in `recipe`, on the same found directions."""
import contextlib
import itertools

import torch
import torch.nn.functional as F

from cli import UserError
from identify import Factor
from lora import lora_modules, without_lora
from model import response_loss

METHODS = ("naive", "grasp", "grasp_random", "grasp_gradient_only", "grasp_inputs", "ablate_train", "ablate_inference", "steer_train",
           "kl", "early_stop")


@contextlib.contextmanager
def hooked(modules, change):
    """Replace the output of each module by change(output, index) while the context lasts."""
    hooks = [m.register_forward_hook(lambda _, args, out, i=i: change(out, i)) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        [hook.remove() for hook in hooks]


def stream_writers(model):
    """The modules whose outputs add up to the residual stream: embeddings, then attention and MLP of each block."""
    embeddings = [m for m in (model.embed_tokens, model.embed_positions) if m is not None]
    return embeddings, [m for block in model.layers for m in (block.self_attn, block.mlp)]


def ablation(model, Q):
    """h <- h - (h Q) Q' wherever the residual stream h is written, at every token; gradients flow through. Q (D, k) orthonormal.

    Taking Q out of all that is added up takes it out of the sum: after every sub-layer, h has no component along Q."""
    return hooked(itertools.chain(*stream_writers(model)), lambda out, i: out - (out @ Q.to(out.dtype)) @ Q.T.to(out.dtype))


def steering(model, site, vector):
    """h <- h + vector after sub-layer `site` (2 x block, +1 for its MLP), at every token."""
    return hooked([stream_writers(model)[1][site]], lambda out, i: out + vector.to(out.dtype))


def steering_vector(model, q, tokens, mask, length=0.3):
    """(site, vector) along +-q: preventative steering supplies what the training wants of the factor, so that it need not be learned.

    Site and sign: where the loss falls fastest along q, by one backward pass; no label is asked. `length` is in units of the mean
    norm of what that sub-layer writes: the largest that kept the synthetic task, to the baseline's advantage (README)."""
    sites = stream_writers(model)[1]
    nudges = [torch.zeros(len(q), device=q.device, requires_grad=True) for _ in sites]
    norms = [0.0] * len(sites)

    def nudge(out, i):
        norms[i] = out.detach().float().norm(dim=-1).mean()
        return out + nudges[i].to(out.dtype)
    with hooked(sites, nudge):
        slopes = torch.stack(torch.autograd.grad(response_loss(model, tokens, mask), nudges)) @ q  # (sites,)
    site = slopes.abs().argmax().item()
    return site, -slopes[site].sign() * length * norms[site] * q


def kl_to_base(model, tokens, mask):
    """KL(base || model) in nats, the mean over the marked positions of unrelated rows. Kaczer et al. 2025, arXiv 2508.06249."""
    with torch.no_grad(), without_lora(model):
        base = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    new = model(tokens[:, :-1], keep=mask[:, 1:]).float().log_softmax(-1)
    return F.kl_div(new, base, reduction="batchmean", log_target=True)


def random_like(factor, seed):
    """Random orthonormal bases of the same shapes: the control that must change nothing."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda bases: {n: torch.linalg.qr(torch.randn(q.shape, generator=generator))[0].to(q.device) for n, q in bases.items()}
    return Factor(draw(factor.hears), draw(factor.says))


@torch.no_grad()
def mean_inputs(model, tokens, mask):
    """A Factor from activations rather than weights: the span of each adapted module's mean input, position by position.

    tokens, mask (N, T): rows of one length. Only positions that predict a marked token count.
    """
    inputs, positions = {}, mask[:, 1:].any(0)
    hooks = [module.register_forward_hook(lambda m, args, out, name=name: inputs.update({name: args[0][:, positions].mean(0)}))
             for name, module in lora_modules(model).items()]
    try:
        model(tokens[:, :-1])
    finally:
        [hook.remove() for hook in hooks]
    return Factor({name: torch.linalg.qr(mean.T)[0] for name, mean in inputs.items()}, {})


def check(methods):
    """UserError for the first of `methods` that is none."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"method '{method}' is unknown, expected one of {', '.join(METHODS)}")


def recipe(method, model, batch, factor=None, stream=None, unrelated=None, stop_below=None, seed=0):
    """What `method` adds to the loop, as keyword arguments of `finetune`. A method of your own: one more branch here.

    factor, stream: the found directions, the same for every method. unrelated: rows that only `kl` needs."""
    needs = {"kl": unrelated, "early_stop": stop_below, "naive": 0, "ablate_inference": 0, "grasp_inputs": 0}.get(method, factor)
    check([method])
    if needs is None:
        what = {"kl": "rows of unrelated prompts (--unrelated)", "early_stop": "a loss to stop at (--until-loss)"}
        raise UserError(f"method '{method}' needs {what.get(method, 'the found directions (--subspace)')}")
    if method == "grasp":
        return {"factor": factor}
    if method == "grasp_random":
        return {"factor": random_like(factor, seed)}
    if method == "grasp_gradient_only":  # no projection of A's init and none after the step: what leaks, and does it matter?
        return {"factor": factor, "hold": False}
    if method == "grasp_inputs":
        return {"factor": mean_inputs(model, *batch)}
    if method == "ablate_train":
        return {"during": ablation(model, stream)}
    if method == "steer_train":
        return {"during": steering(model, *steering_vector(model, stream[:, 0], *batch))}
    if method == "kl":
        return {"penalty": lambda: kl_to_base(model, *unrelated)}
    if method == "early_stop":
        return {"stop_below": stop_below}
    return {}  # naive; ablate_inference trains as naive does
