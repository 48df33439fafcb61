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


def descended(start, rows, updates, weights, items=None) -> dict[str, torch.Tensor]:
    """The weights after these updates (positions of rows).

    Args:
        weights: what rows weigh, by position.
        items: N of each update, where it is not the number of trained tokens: older transformers count the first one of
            a row, which no other predicts.
    """
    model = model_with(start)
    model.train()
    for number, update in enumerate(updates):
        losses = [losses_of(model, rows[row]) for row in update]
        count = sum(map(len, losses)) if items is None else items[number]
        assert 0 <= count - sum(map(len, losses)) <= len(update)
        loss = sum(weights[row] * loss.sum() for row, loss in zip(update, losses, strict=True)) / count
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= RATE * parameter.grad
    return weights_of(model)


class Counting(Witness):
    """Sees what the trainer divides losses by, too."""

    items = 0

    def on_train_begin(self, *arguments, **options):
        super().on_train_begin(*arguments, **options)
        self.counts = []

    def _training_step(self, model, inputs, *rest):
        self.items = int(rest[0])
        return super()._training_step(model, inputs, *rest)

    def _stepped(self, *arguments):
        super()._stepped(*arguments)
        self.counts.append(self.items)


def watched(trainer, callback, items=None, **options) -> list[list[int]]:
    """Train; the positions of the rows of each update. A list `items` is filled with the N of each."""
    witness = Counting(trainer)
    witness.row_of = {tuple(ids): place for place, (ids, _) in enumerate(callback.pool.tokens())}
    try:
        trainer.train(**options)
    finally:
        witness.leave()
    if items is not None:
        items[:] = witness.counts
    return [update.rows for update in witness.updates]
