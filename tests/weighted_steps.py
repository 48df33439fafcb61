"""What gradient descent on weighted losses does, by a loop over single rows.

It knows nothing of a trainer's loss: from the rows that a witness saw in each update it computes

    sum_i w_i sum_t l_it / N

one row at a time and without padding, and makes the steps by itself.
"""

from __future__ import annotations

import numpy as np
import torch
from tiny_runs import Witness, model_with, weights_of

RATE = 0.01  # small enough for rounding not to grow from step to step
# Of a trainer: gradient descent.
DESCENT = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def rows_of(callback) -> list[tuple[list[int], list[int]]]:
    """input_ids and trained labels of the pool."""
    pool = callback.pool
    labels = pool.trained_labels(np.arange(len(pool)))
    return [(ids, label) for (ids, _), label in zip(pool.tokens(), labels, strict=True)]


def losses_of(model, row) -> torch.Tensor:
    """The loss of each trained token of a row, by itself."""
    ids, labels = (torch.tensor([part]) for part in row)
    logits = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
    trained = labels[0, 1:] != -100
    return -logits[trained].gather(1, labels[0, 1:][trained, None])[:, 0]


def descended(start, rows, updates, weights) -> dict[str, torch.Tensor]:
    """The weights after these updates (positions of rows).

    Args:
        weights: what rows weigh, by position; or one such for each update.
    """
    model = model_with(start)
    model.train()
    for number, update in enumerate(updates):
        of = weights[number] if np.ndim(weights[0]) else weights
        losses = [losses_of(model, rows[row]) for row in update]
        loss = sum(of[row] * loss.sum() for row, loss in zip(update, losses, strict=True)) / sum(map(len, losses))
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return weights_of(model)


def watched(trainer, callback, **options) -> list[list[int]]:
    """Train; the positions of the rows of each update."""
    witness = Witness(trainer)
    witness.row_of = {tuple(ids): place for place, (ids, _) in enumerate(callback.pool.tokens())}
    try:
        trainer.train(**options)
    finally:
        witness.leave()
    return [update.rows for update in witness.updates]
