"""The loss of many rows, batched by length."""

import torch
from torch import nn

from model import response_loss
from support.errors import UserError


@torch.no_grad()
def nats(model, examples, batch_size=16):
    """-ln P of each example's marked tokens (N,) in double precision, and their number (N,).

    examples: [(ids (T,), mask (T,))]. Rows of like length share a batch; padding stands on the
    right, where causal attention never looks, and is not marked.
    """
    device = model.embed_tokens.weight.device
    sums = torch.zeros(len(examples), dtype=torch.double)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        ids, masks = zip(*(examples[i] for i in chosen), strict=True)
        tokens = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)
        mask = nn.utils.rnn.pad_sequence(masks, batch_first=True).to(device)
        losses = response_loss(model, tokens, mask, reduction="none")  # (marked tokens,)
        row_of = mask[:, 1:].nonzero()[:, 0].cpu()
        per_row = torch.zeros(len(chosen), dtype=torch.double)
        sums[chosen] = per_row.index_add(0, row_of, losses.double().cpu())
    if not sums.isfinite().all():
        raise UserError(
            "the loss of the model's answers is not finite; try a lower --lr or --alpha"
        )
    counts = torch.tensor([mask[1:].sum() for _, mask in examples])
    return sums, counts
