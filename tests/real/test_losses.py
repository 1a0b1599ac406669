"""The loss of many rows, whatever their lengths and however they are batched."""

import pytest
import torch
from toys import tiny

from real.losses import nats


def examples():
    """Rows of one to four lengths, in no order."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for length in (9, 3, 30, 3, 17, 9, 25):
        mask = torch.rand(length, generator=g) > 0.5
        mask[-1] = True
        rows.append((torch.randint(50, (length,), generator=g), mask))
    return rows


def one_by_one(model, row):
    ids, mask = row
    ln_p = model(ids[None])[0].log_softmax(-1)
    return -sum(ln_p[t - 1, ids[t]].item() for t in range(1, len(ids)) if mask[t])


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_rows_nats_are_those_that_it_has_alone(batch_size):
    model, rows = tiny(), examples()
    sums, _ = nats(model, rows, batch_size)
    assert sums.tolist() == pytest.approx([one_by_one(model, row) for row in rows], rel=1e-5)


def test_the_counts_are_of_marked_tokens_that_can_be_predicted():
    rows = examples()
    rows[0][1][0] = True  # nothing stands before the first token
    _, counts = nats(tiny(), rows)
    assert counts.tolist() == [int(mask[1:].sum()) for _, mask in rows]
