"""Shares of the values of a column that follow their held-out losses: more rows of what the model is bad at.

    share(c) = floor + (R - k floor) w(c),     w(c) = loss(c) / sum of losses,   or   softmax(loss / temperature)(c)

over the k values whose loss is known; R is what the others leave, each of which has its share of the pool. Shares add
up to 1, none is below the floor, and a value with a higher loss has no smaller one.

Source: Adaptive Bad-case Sampling of MLLM-DataEngine (arXiv 2308.13566), which generates new data for each type of
question in proportion to the share of its questions that the model answers wrongly. Here rows are chosen and not
generated, and held-out losses stand in the place of wrong answers: they need no judge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .number_types import is_number
from .selection import Cherry, Policy, Selection, ShortfallError, coded
from .stratified import Columns, Stratified, Within


@dataclass(frozen=True)
class BadCases(Within):
    """More rows of the values of a column on which the held-out loss is high, set anew at each selection of a run.

    In a run the losses are those of the trainer's evaluation sets, `eval_dataset={"code": ..., "chat": ...}`, by the
    names of the values and by the model as it is when rows are selected. A value without an evaluation set, or whose
    loss is not finite, has its share of the pool. How many rows of each value are kept is exact, as in `Stratified`.

    Args:
        by: the column.
        at_least: the floor, a fraction of the kept rows that each value with a loss has at least; rounded down.
        temperature: of a softmax over losses, in nats: low gives nearly all to the highest loss, high the same to all.
            None for shares in proportion to the losses.
        policy: as for `Stratified`.

    Raises:
        UserError: for a floor or a temperature that is none.

    >>> BadCases("source").shares({"code": 3.0, "web": 1.0}, {"code": 50, "web": 50})
    {'code': 0.75, 'web': 0.25}
    >>> BadCases("source", at_least=0.25).shares({"code": 3.0, "web": 1.0}, {"code": 50, "web": 50})
    {'code': 0.625, 'web': 0.375}
    """

    at_least: float = 0.0
    temperature: float | None = None
    policy: Policy = field(default_factory=Cherry)

    def __post_init__(self) -> None:
        self._check()
        if not (is_number(self.at_least) and 0 <= self.at_least <= 1):
            raise UserError(f"at_least is a fraction of the kept rows, from 0 to 1, got {self.at_least!r}.")
        if self.temperature is not None and not (is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise UserError(f"temperature is a positive number of nats, or None, got {self.temperature!r}.")

    def shares(self, losses: Mapping[str, float], pool: Mapping[str, int]) -> dict[str, float]:
        """The share of each value, in the order of the pool's values; together 1.

        Args:
            losses: held-out losses by value, nats per token; of values that the pool does not have, none is used.
            pool: rows of the pool by value.

        Raises:
            UserError: for floors that ask for more than all rows.
        """
        rows = sum(pool.values())
        known = {value: losses[value] for value in pool if math.isfinite(losses.get(value, math.nan))}
        others = {value: count / rows for value, count in pool.items() if value not in known}
        left = 1 - sum(others.values()) if others else 1.0
        if len(known) * self.at_least > left + 1e-9:
            beside = f" beside {left:.4g} of the rows that values without a held-out loss leave" if others else ""
            raise UserError(
                f"at_least={self.at_least:g} for each of {len(known)} values of {self.by!r} is more than all rows"
                f"{beside}: lower it to at most {left / max(len(known), 1):.4g}."
            )
        weights = dict(zip(known, self._shared_out(list(known.values())).tolist(), strict=True))
        free = max(left - len(known) * self.at_least, 0.0)
        return {value: others[value] if value in others else self.at_least + free * weights[value] for value in pool}

    def given(self, shares: Mapping[str, float]) -> Stratified:
        """The policy with these shares."""
        return _Shares(self.by, dict(shares), policy=self.policy)

    def _shared_out(self, losses: Sequence[float]) -> np.ndarray:
        """How what is beyond the floors is shared out, (k,), together 1."""
        values = np.asarray(losses, dtype=np.float64)
        if self.temperature is not None:
            values = np.exp((values - values.max(initial=-math.inf)) / self.temperature)
        return values / values.sum() if values.sum() > 0 else np.full(len(values), 1 / max(len(values), 1))

    def __call__(
        self, columns: Columns, budget: int, *, ids: np.ndarray | None = None, rng: np.random.Generator | None = None
    ) -> Selection:
        """Select `budget` of n rows while no loss is known: each value has its share of the rows; see `Policy`."""
        texts, codes = coded(columns[self.by])
        pool = dict(zip(texts.tolist(), np.bincount(codes, minlength=len(texts)).tolist(), strict=True))
        return self.given(self.shares({}, pool))(columns, budget, ids=ids, rng=rng)


class _Shares(Stratified):
    """Shares that nobody wrote: a value without a row to choose from is a shortfall, and not a mistake of the user."""

    def _bounds(self, values: Sequence[str], there: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
        if missing := sorted(set(self.shares) - set(values)):
            raise ShortfallError(f"No row with {self.by} {missing[0]!r} is left to choose from.")
        return super()._bounds(values, there, budget)
