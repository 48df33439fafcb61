"""What a `BadCases` policy needs of a run: the held-out loss of each value when rows are selected, and shares by it.

The losses are those of the model as it is: of an evaluation of the trainer's since the last step, or else of one pass
over the evaluation sets. So they do not depend on when the trainer evaluates, and a run that is resumed between two
epochs has the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate.logging import get_logger

from ..errors import UserError
from ..method.bad_cases import BadCases
from ..method.number_words import listed
from ..method.selection import coded
from ..scoring.losses import Scores
from .held_out_loss import losses_before
from .policy_state import PolicyState
from .pool import Pool
from .pool_scorer import PoolScorer

logger = get_logger(__name__)  # speaks in the main process alone


class BadCaseLosses(PolicyState):
    """The held-out losses of a column's values, and the shares that they give.

    Args:
        given: says how shares follow.
        pool_scorer: its trainer has an evaluation set for each value, `eval_dataset={"code": ..., "chat": ...}`.

    Attributes:
        shares: by value, of the last selection; None before there is one.
        losses: by value, that they came from.

    Raises:
        UserError: for a trainer without evaluation sets by name, or none of whose names is a value of the column.
    """

    reads_held_out = True

    def __init__(self, given: BadCases, pool_scorer: PoolScorer) -> None:
        super().__init__(given, pool_scorer)
        self.trainer = pool_scorer.trainer
        self.forget()
        self._of_pool: tuple[Pool | None, dict[str, int], np.ndarray] = (None, {}, np.empty(0, dtype=np.int64))
        self._check(self.trainer.eval_dataset)

    def _check(self, sets: Any) -> None:
        by = self.policy.by
        if not isinstance(sets, dict) or not sets:
            found = "there is none" if not sets and not isinstance(sets, dict) else f"it is {type(sets).__name__}"
            found = "it is empty" if isinstance(sets, dict) else found
            raise UserError(
                f"BadCases({by!r}) reads a held-out loss for each value of {by!r}, and eval_dataset has to be a "
                f"mapping from these values to held-out rows: {found}. Set eval_dataset={{value: rows, ...}}, in a "
                "recipe eval_dataset: FILE_OR_NAME, whose rows have that column."
            )
        pool = self.pool_rows
        if not (named := [name for name in sets if str(name) in pool]):
            raise UserError(
                f"eval_dataset has sets for {listed(map(str, sets))}, and the column {by!r} of the training set the "
                f"values {listed(list(pool)[:20])}: name held-out sets by these."
            )
        if idle := [str(name) for name in sets if name not in named]:
            logger.warning("No row of the pool has %s %s: its held-out loss says nothing.", by, listed(idle))
        if without := [value for value in pool if value not in map(str, named)]:
            logger.warning(
                "No held-out rows have %s %s: its share of the kept rows is its share of the pool.", by, listed(without)
            )
        self.policy.shares(dict.fromkeys(map(str, named), 1.0), pool)  # refuses floors that ask for too much

    def _values(self) -> tuple[dict[str, int], np.ndarray]:
        """Rows of the pool by value, and for each row which value it has."""
        pool = self.trainer.selection_pool
        if self._of_pool[0] is not pool:
            texts, codes = coded(pool.column(self.policy.by))
            counts = np.bincount(codes, minlength=len(texts)).tolist()
            self._of_pool = pool, dict(zip(texts.tolist(), counts, strict=True)), codes
        return self._of_pool[1:]

    @property
    def pool_rows(self) -> dict[str, int]:
        """Rows of the pool by value."""
        return self._values()[0]

    def evaluated(self, step: int, losses: Mapping[str, Any]) -> None:
        """An evaluation of the trainer's after so many steps; of several sets each is told by itself."""
        known = self._noted[1] if self._noted[0] == step else {}
        self._noted = step, {**known, **{str(name): loss for name, loss in (losses.get("eval_losses") or {}).items()}}

    def prepare(self, scores: Scores, step: int) -> None:
        """Set the shares anew, by the losses of the model as it is after so many steps."""
        if self._noted[0] != step or {*map(str, self.trainer.eval_dataset)} - self._noted[1].keys():
            self.evaluated(step, losses_before(self.trainer, f"after {step} steps"))
        pool = self.pool_rows
        self.losses = {value: loss for value, loss in self._noted[1].items() if value in pool}
        if odd := [value for value, loss in self.losses.items() if not math.isfinite(loss)]:
            logger.warning(
                "The held-out loss of %s %s is not finite: its share of the kept rows is its share of the pool.",
                self.policy.by,
                listed(odd),
            )
        self._share(self.given.shares(self.losses, pool))

    def _share(self, shares: dict[str, float] | None) -> None:
        self.shares = shares
        self.policy = self.given if shares is None else self.given.given(shares)

    def record(self, kept: np.ndarray) -> dict[str, Any]:
        """What a history tells of an epoch that trains on these positions: of each value, losses, shares and rows."""
        names, codes = self._values()
        rows = np.bincount(codes[kept], minlength=len(names)).tolist()
        losses = {value: loss if math.isfinite(loss) else None for value, loss in self.losses.items()}
        told = {
            "by": self.policy.by,
            "losses": losses,
            "shares": self.shares,
            "rows": dict(zip(names, rows, strict=True)),
        }
        return {"bad_cases": told}

    def logged(self) -> dict[str, float]:
        """The shares."""
        return {f"share_{value}": share for value, share in (self.shares or {}).items()}

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint keeps: epochs that train on the same rows again have the same shares."""
        noted = {name: loss if math.isfinite(loss) else str(loss) for name, loss in self._noted[1].items()}
        losses = {name: loss if math.isfinite(loss) else str(loss) for name, loss in self.losses.items()}
        return {"bad_cases": {"shares": self.shares, "losses": losses, "step": self._noted[0], "noted": noted}}

    def from_state(self, saved: Mapping[str, Any], scores: Scores | None) -> None:
        """Take that out of a checkpoint."""
        if (saved := saved.get("bad_cases")) is not None:
            self._share(saved["shares"])
            self.losses = {name: float(loss) for name, loss in saved["losses"].items()}
            self._noted = saved["step"], {name: float(loss) for name, loss in saved["noted"].items()}

    def forget(self) -> None:
        """Begin a run."""
        self._share(None)
        self.losses: dict[str, float] = {}
        self._noted: tuple[int, dict[str, float]] = (-1, {})  # the step of the last evaluation, and its losses
