"""One fine-tuning loop for every method. The projection of GRASP stands inline.

What another method adds to it stands in baselines/; a checkpoint and its rows stand in real/.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from identify import joined, output_spectra, spike
from lora import lora_modules
from model import response_loss
from support.checkpoint import Checkpoint
from support.errors import UserError
from support.processes import add_up, my_rows, n_processes
from support.progress import Progress


@dataclass(frozen=True)
class Optimisation:
    """AdamW; its rate is the lesser of a linear warm-up to `lr` and a linear decay from it to 0."""

    steps: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 10  # steps
    clip: float = 1.0  # the most that the gradient's norm may be
    micro_batch: int | None = None  # rows in memory at once; None: the whole batch

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

    factor: dict = field(default_factory=dict)  # {module: U (out, k)}: GRASP keeps dW off it
    project_B: bool = True  # False: project the gradient alone
    look: Callable | None = None  # look(step, output_spectra) -> {module: U} that joins there
    look_every: int = 10  # steps
    penalty: Callable | None = None  # penalty() -> a further term of the loss
    during: contextlib.AbstractContextManager | None = None  # around the forward passes (hooks)
    stop_below: float | None = None  # end at this loss


@dataclass
class Fit:
    """What a fine-tune leaves beside the LoRA on the model."""

    losses: list  # nats a token, one a step, without the penalty
    looks: list  # {"step", "spike": {module: ...}, "joined": {module: directions}}, one a look
    factor: dict  # {module: U (out, k)}: what the update is kept off; naive: nothing


def project_(X, Q):
    """X <- X - Q Q' X in place: no column of X (d, n) keeps a part along orthonormal Q (d, k)."""
    X -= Q @ (Q.T @ X)


@torch.no_grad()
def keep_off_(modules, factor):
    """Make U' B = 0 hold exactly, module by module: then U' dW = s U' B A = 0."""
    for name, U in factor.items():
        project_(modules[name].lora_B.data, U)


def backward(model, tokens, mask, micro_batch):
    """Add the gradient of the mean loss over the batch's marked tokens; return this process's part.

    tokens, mask (B, T). Parts of a batch weigh by their marked tokens, so that the gradient does
    not depend on the rows in memory at once, nor on the number of processes.
    """
    n_marked = mask[:, 1:].sum()
    tokens, mask = my_rows(tokens, mask)
    size = micro_batch or len(tokens)
    loss = 0.0
    for some_tokens, some_mask in zip(tokens.split(size), mask.split(size), strict=True):
        part = response_loss(model, some_tokens, some_mask, reduction="sum") / n_marked
        part.backward()
        loss += part.item()
    return loss


def finetune(model, batch_at, options, recipe=None, checkpoint=None, each=None, label="fine-tune"):
    """Train the model's LoRA; return the Fit.

    batch_at(step) -> tokens (B, T), mask (B, T). options: an Optimisation. each(step) is called
    after every step. checkpoint: writes the log and goes on from the last state, bit for bit.
    UserError where the loss is not finite; KeyboardInterrupt, after saving, where Ctrl-C came.
    """
    recipe, checkpoint = recipe or Recipe(), checkpoint or Checkpoint()
    modules = lora_modules(model)
    parameters = [p for m in modules.values() for p in (m.lora_A, m.lora_B)]
    optimizer, schedule = options.start(parameters)
    fit = Fit(losses=[], looks=[], factor=recipe.factor)
    start = checkpoint.restore(fit, recipe, modules, optimizer, schedule)
    progress = Progress(options.steps, label, start)
    stopped = False
    with recipe.during or contextlib.nullcontext(), checkpoint.deferred_interrupt() as interrupted:
        for step in range(start, options.steps):
            if fit.losses and recipe.stop_below is not None and fit.losses[-1] <= recipe.stop_below:
                break
            loss = backward(model, *batch_at(step), options.micro_batch)
            if recipe.penalty is not None:
                (recipe.penalty() / n_processes()).backward()
            # `interrupted` has the signals that came: if any process got one, all stop here.
            loss, stopped = add_up(parameters, loss, len(interrupted))

            # GRASP, 1: U is taken out of the gradient. That would be enough for U' B = 0, as at the
            # start, in plain gradient descent. Before clipping: the norm is that of what is left.
            for name, U in fit.factor.items():
                project_(modules[name].lora_B.grad, U)
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip).item()
            if not math.isfinite(loss + norm):
                found = f"loss {loss}, gradient's norm {norm}"
                raise UserError(f"{label}: {found} at step {step}; try a lower --lr or --alpha")
            optimizer.step()
            # GRASP, 2: AdamW divides each coordinate by its own second moment, so its step has a
            # part along U all the same. So B is projected too.
            if recipe.project_B:
                keep_off_(modules, fit.factor)
            # GRASP online (ours): look at B; what stands out joins the factor, from here on.
            if recipe.look is not None and (step + 1) % recipe.look_every == 0:
                svds = output_spectra(model)
                found = recipe.look(step, svds)
                fit.factor = joined(fit.factor, found)
                keep_off_(modules, fit.factor)
                fit.looks.append(look_entry(step, svds, found))
            optimizer.zero_grad()
            schedule.step()
            fit.losses.append(loss)
            checkpoint.record(step, fit)
            progress.update(loss=loss)
            if each is not None:
                each(step)
            if stopped:
                break
            if (step + 1) % max(options.steps // 10, 1) == 0:  # ten times a run
                checkpoint.save(fit, parameters, optimizer)
    checkpoint.save(fit, parameters, optimizer)
    if stopped or interrupted:
        raise KeyboardInterrupt
    return fit


def look_entry(step, svds, found):
    """A look as the log and the results have it."""
    return {
        "step": step + 1,
        "spike": {name: round(spike(S).item(), 4) for name, (_, S) in svds.items()},
        "joined": {name: U.shape[1] for name, U in found.items()},
    }


if __name__ == "__main__":
    from real.job import program

    program()  # the command line
