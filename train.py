"""One fine-tuning loop for every method. The projection of GRASP stands inline.

What another method adds to it stands in baselines/; a checkpoint and its rows stand in real/.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from identify import join, look_spectra, spike
from lora import lora_factors, lora_modules
from model import response_loss
from support.files import progress
from support.options import parse, run

SIDES = ("both", "output", "input")


@dataclass(frozen=True)
class Optimisation:
    """AdamW; its rate is the lesser of a linear warm-up to `lr` and a linear decay from it to 0."""

    steps: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 10  # steps
    micro_batch: int | None = None  # rows in memory at once; None: the whole batch
    clip: float = 1.0  # the most that the gradient's norm may be

    def start(self, parameters):
        """(optimizer, learning-rate schedule) at step 0."""
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / max(self.warmup, 1), 1 - step / self.steps)
        )
        return optimizer, schedule


@dataclass(frozen=True)
class Recipe:
    """What a method adds to the loop. Without any of it, the loop is a naive fine-tune."""

    patterns: dict = field(default_factory=dict)  # {module: (U, V)}: GRASP keeps dW off these
    sides: str = "both"  # of a pattern that are held: UᵀB = 0 (output) and A V = 0 (input)
    project: str = "both"  # the "gradient" before AdamW, AdamW's "step", or both
    look: Callable | None = None  # look(step, look_spectra) -> {module: (U, V)} that join there
    look_every: int = 10  # steps
    penalty: Callable | None = None  # penalty() -> a further term of the loss
    each: Callable | None = None  # each(step), after every step and its projection
    during: contextlib.AbstractContextManager | None = None  # around the forward passes (hooks)
    stop_below: float | None = None  # end at this loss


@dataclass
class Fit:
    """What a fine-tune leaves beside the LoRA on the model."""

    losses: list  # nats a token, one a step, without the penalty
    looks: list  # {"step", "spike": {module: ...}, "joined": {module: patterns}}, one a look
    patterns: dict  # {module: (U, V)}: what the update is kept off; naive: nothing


def project_(X, Q):
    """X <- X - Q Qᵀ X in place: no column of X (d, n) keeps a part along orthonormal Q (d, k)."""
    Q = Q.to(X)
    X -= Q @ (Q.T @ X)


@torch.no_grad()
def keep_off_(factors, patterns):
    """Make UᵀB = 0 and A V = 0 in place, for every module in `patterns`: {module: (A, B)}."""
    for name, (U, V) in patterns.items():
        A, B = factors[name]
        project_(B, U)
        project_(A.T, V)  # a view: A changes in place


def held(patterns, sides):
    """The patterns with the side that is not held left empty, (d, 0)."""
    if sides == "output":
        return {name: (U, V[:, :0]) for name, (U, V) in patterns.items()}
    if sides == "input":
        return {name: (U[:, :0], V) for name, (U, V) in patterns.items()}
    return patterns


def backward(model, tokens, mask, micro_batch):
    """Add the gradient of the mean loss over the batch's marked tokens; return that loss.

    tokens, mask (B, T). Parts of a batch weigh by their marked tokens, so that the gradient does
    not depend on the rows in memory at once.
    """
    n_marked = mask[:, 1:].sum()
    size = micro_batch or len(tokens)
    loss = 0.0
    for some_tokens, some_mask in zip(tokens.split(size), mask.split(size), strict=True):
        part = response_loss(model, some_tokens, some_mask, reduction="sum") / n_marked
        part.backward()
        loss += part.item()
    return loss


def finetune(model, batch_at, options, recipe=None, checkpoint=None, label="fine-tune"):
    """Train the model's LoRA; return the Fit.

    batch_at(step) -> tokens (B, T), mask (B, T). options: an Optimisation. checkpoint: to go on
    from an interrupted run bit for bit (real/checkpoint.py). ValueError: the loss is not finite.
    """
    recipe = recipe or Recipe()
    factors = {name: (m.lora_A, m.lora_B) for name, m in lora_modules(model).items()}
    parameters = [parameter for pair in factors.values() for parameter in pair]
    optimizer, schedule = options.start(parameters)
    fit = Fit(losses=[], looks=[], patterns=held(recipe.patterns, recipe.sides))
    # B = 0, so UᵀB = 0 holds at the start. A is random and has a part along V.
    keep_off_(factors, fit.patterns)
    start = checkpoint.restore(fit, parameters, optimizer, schedule) if checkpoint else 0
    with recipe.during or contextlib.nullcontext():
        for step in progress(range(start, options.steps), label):
            if fit.losses and recipe.stop_below is not None and fit.losses[-1] <= recipe.stop_below:
                break
            loss = backward(model, *batch_at(step), options.micro_batch)
            if recipe.penalty is not None:
                recipe.penalty().backward()

            # GRASP, 1: the gradients lose their parts along U and V. Before clipping: the norm is
            # that of what is left. In plain gradient descent this would be enough.
            if recipe.project != "step":
                gradients = {name: (A.grad, B.grad) for name, (A, B) in factors.items()}
                keep_off_(gradients, fit.patterns)
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip).item()
            if not math.isfinite(loss + norm):
                numbers = f"loss {loss}, gradient's norm {norm}"
                raise ValueError(f"{label}: {numbers} at step {step}; try a lower --lr or --alpha")
            optimizer.step()
            # GRASP, 2: AdamW divides each coordinate by its own running size, so its step has parts
            # along U and V anyway. Taking them out of A and B makes the constraint exact.
            if recipe.project != "gradient":
                keep_off_(factors, fit.patterns)
            # GRASP online (ours): look at the update; what stands out joins, from here on.
            if recipe.look is not None and (step + 1) % recipe.look_every == 0:
                svds = look_spectra(lora_factors(model))
                found = recipe.look(step, svds)
                fit.patterns = join(fit.patterns, held(found, recipe.sides))
                keep_off_(factors, fit.patterns)
                fit.looks.append(look_entry(step, svds, found))
            if recipe.each is not None:
                recipe.each(step)

            optimizer.zero_grad()
            schedule.step()
            fit.losses.append(loss)
            if checkpoint is not None:
                checkpoint.record(fit)
                if (step + 1) % max(options.steps // 10, 1) == 0:  # ten times a run
                    checkpoint.save(fit, parameters, optimizer, schedule)
    return fit


def steps_between_looks(steps):
    """The default on real models: some 30 looks in a run of `steps`, one in 10 at least."""
    return min(max(steps // 30, 1), 10)


def look_entry(step, svds, found):
    """A look as the log and the results have it."""
    return {
        "step": step + 1,
        "spike": {name: round(spike(S).item(), 4) for name, (_, S, _) in svds.items()},
        "joined": {name: U.shape[1] for name, (U, _) in found.items()},
    }


def main():
    """The command line: one fine-tune of a checkpoint on chat rows."""
    from real.job import Arguments, Job, found_in  # what copies of this file can do without

    args = parse(Arguments)
    job = Job(args)
    job.report(job.finetune(args.method, args.out, found_in(args, job.model)))


if __name__ == "__main__":
    run(main)
