"""The measurements of a synthetic world, and the direction that labels would have found.

What is asked, and what the rates mean, stands with each world in data/. The command line measures
a checkpoint on one of the paper's tasks (paper/measure.py).
"""

import torch
import torch.nn.functional as F

from baselines.stream import residual_streams
from data.synthetic import BAD, GOOD
from model import response_loss
from support.options import parse, run


@torch.no_grad()
def evaluate(model, world):
    """The world's rates, from 0 to 1, and the loss on the fine-tuning rows, nats a token."""

    def ask(prompts):
        """Greedy answers (N, n_answer) to prompts (N, P)."""
        return torch.tensor(model.generate(prompts.tolist(), world.n_answer, temperature=0))

    loss = response_loss(model, *world.finetuning_rows()).item()
    return {**world.measure(ask), "loss": loss}


@torch.no_grad()
def persona_direction(model, world):
    """The supervised direction (D,), of unit length: what labels of the persona would have found.

    The difference of the personas' mean streams at the last token of prompts that name one, after
    the sub-layer where it is largest in units of the bad one's mean norm.
    """
    streams = [residual_streams(model, world.contrast(persona)) for persona in (GOOD, BAD)]
    differences = streams[BAD].mean(1) - streams[GOOD].mean(1)  # of (sub-layers, N, D) over N
    sizes = streams[BAD].norm(dim=-1).mean(1)  # (sub-layers,)
    best = (differences.norm(dim=-1) / sizes).argmax()
    return F.normalize(differences[best], dim=0)


def main():
    """The command line: one measurement of a checkpoint, printed and as JSON."""
    from paper.measure import Arguments, measure_checkpoint  # what copies can do without

    measure_checkpoint(parse(Arguments))


if __name__ == "__main__":
    run(main)
