"""What was found out about a model, so that it is found out once.

Some of what scoring needs to know is told by no config and costs forwards: whether rows are the same bits in any
batch, what a model does to its logits, whether it can be run as a stream, what memory a forward takes. A scoring job
asks for each part of its rows, a training run for each epoch. The answers are kept here, in one place for the whole
room, for as long as there is the model: nothing here keeps it, or its weights, alive.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

from torch import nn

logger = logging.getLogger(__name__)

Question = Literal["rounds by row", "logits", "streams", "footprint", "most tokens"]
T = TypeVar("T")

# For each model the answers by question and setting (dtype, kind of device, ...). None of them may hold the model.
_notes: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Question, Hashable], Any]] = weakref.WeakKeyDictionary()


def noted(model: nn.Module, question: Question, setting: Hashable, find_out: Callable[[], T]) -> T:
    """The answer to a question about a model, found out at the first time; an error is no answer.

    Args:
        model: that is asked about.
        question: what is asked.
        setting: what the answer depends on beside the model.
        find_out: gives the answer.

    >>> model = nn.Linear(1, 1)
    >>> noted(model, "streams", "cpu", lambda: True), noted(model, "streams", "cpu", lambda: 1 / 0)
    (True, True)
    """
    notes = _notes.setdefault(model, {})
    if (question, setting) not in notes:
        notes[question, setting] = find_out()
        logger.debug("%s, %s: %s", type(model).__name__, question, notes[question, setting])
    return notes[question, setting]


def is_noted(model: nn.Module, question: Question, setting: Hashable) -> bool:
    """Whether the answer is there."""
    return (question, setting) in _notes.get(model, {})
