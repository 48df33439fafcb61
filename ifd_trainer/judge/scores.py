"""What a judge's scores of answers say of two arms: wins, ties and losses, and what is left of them at equal lengths.

A judge reads each pair in both orders (arXiv 2308.12032). An arm wins a document where it has the higher score in both,
or in one with equal scores in the other; it loses in the mirrored cases; all else is a tie. With N documents judged

    winning score = (wins - losses) / N + 1        above 1 where the arm wins more than it loses

Judges favour long answers. The length-controlled score says what is left where both answers are equally long, after
AlpacaEval (arXiv 2404.04475), without its terms for the difficulty of documents:

    x[s, i]   tanh(characters of the arm's answer less those of the other / their standard deviation around 0)
    y[s, i]   1 win, 1/2 tie, 0 loss
    P(win)    sigmoid(a + b x), fitted to all y; a tie is half a win and half a loss
    score     2 sigmoid(a), on the scale of the winning score: 1 is even

A slope b that nothing bounds goes to infinity where the longer answer always wins, so it has a normal prior with the
standard deviation `SLOPE_DEVIATION`; a has none. Where all outcomes are alike, or all lengths, the score is the winning
score. Where an arm's answers are nearly all longer, no data tell length from quality, and the prior puts some of it
down to quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..evaluation.statistics import ALPHA, Difference, bca, difference

SLOPE_DEVIATION = 5.0  # logits; at one deviation the longest of even answers wins with odds of 148 to 1
_STEPS = 100  # of a fit, which takes some 6


@dataclass(frozen=True)
class Judgement:
    """One document, judged.

    Attributes:
        value: 1 where the arm wins, 0 for a tie, -1 where it loses; None where a verdict is missing.
        own, other: mean scores of the arm's answer and of the other one; nan where they are not known.
        contradicts: whether the judge prefers another answer when their order is changed.
        reasons: why verdicts are missing, one for each.
    """

    value: int | None
    own: float = float("nan")
    other: float = float("nan")
    contradicts: bool = False
    reasons: tuple[str, ...] = ()


def paired(orders: Sequence[tuple[float, float]]) -> Judgement:
    """What the scores of all orders say, each the arm's and the other's.

    >>> paired([(8, 7), (7, 7)]).value, paired([(8, 7), (6, 9)]).value, paired([(5, 6), (5, 5)]).value
    (1, 0, -1)
    """
    signs = [int(own > other) - int(own < other) for own, other in orders]
    own, other = np.mean(orders, axis=0).tolist()
    total = sum(signs)
    return Judgement(int(total > 0) - int(total < 0), own, other, contradicts=min(signs) * max(signs) < 0)


def winning_score(values: np.ndarray | Sequence[float]) -> float:
    """(wins - losses) / N + 1, of values 1, 0 and -1; those that are nan are not of the N.

    >>> winning_score([1, 1, 0, -1, float("nan")])
    1.25
    """
    known = np.asarray(values, dtype=float)
    known = known[np.isfinite(known)]
    return float(known.mean() + 1) if known.size else float("nan")


@dataclass(frozen=True)
class JudgedDocuments:
    """The documents that an arm was judged on with all seeds.

    Attributes:
        values: (S, n) 1, 0 or -1.
        longer: (S, n) characters by which the arm's answer is longer than the other one.
        seeds: (S,).
        documents: (n,) names, with the set's before them.
        groups: (n,) what they belong to; None where that is not known of all.
        left_out: how many documents lack a verdict with at least one seed.
    """

    values: np.ndarray
    longer: np.ndarray
    seeds: list[int]
    documents: list[str]
    groups: np.ndarray | None
    left_out: int

    @property
    def wins(self) -> int:
        """Over all seeds."""
        return int((self.values > 0).sum())

    @property
    def losses(self) -> int:
        """Over all seeds."""
        return int((self.values < 0).sum())

    @property
    def winning_score(self) -> float:
        """Of all seeds together."""
        return winning_score(self.values)

    def difference(self, arms: int = 1) -> Difference:
        """The winning score less 1, and how well it is known: above 0 where the arm wins more."""
        return difference(self.values, np.zeros_like(self.values), groups=self.groups, arms=arms)

    def length_controlled(self, arms: int = 1) -> Difference:
        """The same where answers are equally long; see `length_controlled`."""
        return length_controlled(self.values, self.longer, self.groups, arms)


def judged_documents(frame: pd.DataFrame) -> JudgedDocuments:
    """One arm's lines of a frame of `pairs.judge_pairs`, as matrices of the documents with a verdict for each seed.

    Args:
        frame: with the columns set, seed, document, group, value, own_length and other_length; each document once with
            each seed.
    """
    name = ["set", "document"]
    documents = frame.drop_duplicates(name).set_index(name)  # in the order in which they are there

    def matrix(column: pd.Series) -> pd.DataFrame:
        of = frame[[*name, "seed"]].assign(of=column)
        return of.pivot(index=name, columns="seed", values="of").loc[documents.index].sort_index(axis=1)

    values, longer = matrix(frame["value"]), matrix(frame["own_length"] - frame["other_length"])  # (n, S)
    whole = values.notna().all(axis=1).to_numpy()
    groups = documents["group"][whole]
    return JudgedDocuments(
        np.ascontiguousarray(values[whole].T, dtype=float),
        np.ascontiguousarray(longer[whole].T, dtype=float),
        values.columns.tolist(),
        [": ".join(filter(None, map(str, parts))) for parts in documents.index[whole]],
        None if groups.isna().any() else groups.to_numpy(dtype=object),
        int((~whole).sum()),
    )


def length_controlled(
    values: np.ndarray,
    longer: np.ndarray,
    groups: np.ndarray | None = None,
    arms: int = 1,
    seed: int = 0,
    resamples: int = 1000,
) -> Difference:
    """The length-controlled score less 1, and how well it is known.

    The interval of Student's t is that of `statistics.difference`, of the score's linear approximation: what each
    document adds to it. The bootstrap draws seeds and documents (or groups of them) anew, and fits the model to each
    draw; the scale of lengths stays.

    Args:
        values: (S, n) 1 win, 0 tie, -1 loss, of n documents with S seeds; at least two of both.
        longer: (S, n) by how much the arm's answer is longer.
        groups, arms, seed: as of `statistics.difference`.
        resamples: of the bootstrap; each is a fit of some 0.5 ms.

    Raises:
        UserError: as `statistics.difference` does.

    >>> values = np.array([[1.0, 0.0, -1.0, 1.0], [1.0, 1.0, -1.0, 0.0]])
    >>> bool(length_controlled(values, np.zeros((2, 4))).mean == values.mean())
    True
    """
    values = np.asarray(values, dtype=float)
    x, y = _scaled(np.asarray(longer, dtype=float)), (values + 1) / 2
    a, b = _fitted(x.ravel(), y.ravel())
    found = difference(_contributions(x, y, a, b), np.zeros_like(values), groups=groups, arms=arms, seed=seed)
    low, high = _bootstrapped(x, y, groups, 1 - ALPHA / arms, seed, resamples)
    return replace(found, boot_low=low, boot_high=high)


def _scaled(longer: np.ndarray) -> np.ndarray:
    """tanh of differences in length, in units of their root mean square: 0 stays 0."""
    size = np.sqrt((longer**2).mean())
    return np.tanh(longer / size) if size > 0 else np.zeros_like(longer)


def _fitted(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope for outcomes y in {0, 1/2, 1}; the intercept is infinite where all are 0, or all 1."""
    share = y.mean()
    if share in (0, 1):
        return (np.inf if share else -np.inf), 0.0
    at = np.array([np.log(share / (1 - share)), 0.0])
    features, prior = np.stack([np.ones_like(x), x]), np.diag([0, SLOPE_DEVIATION**-2])
    for _ in range(_STEPS if x.any() else 0):  # of Newton's method
        p = 1 / (1 + np.exp(-at @ features))
        step = np.linalg.solve((features * p * (1 - p)) @ features.T + prior, features @ (y - p) - prior @ at)
        size = np.abs(step).max()
        at += step / max(1, size)  # at most a logit at once: the first ones may lead too far
        if size < 1e-9:
            break
    return float(at[0]), float(at[1])


def _score(a: float) -> float:
    return float(2 / (1 + np.exp(-a)))


def _contributions(x: np.ndarray, y: np.ndarray, a: float, b: float) -> np.ndarray:
    """(S, n) values whose mean is the score less 1, and that vary as what each outcome adds to it.

    They are the influence of each outcome on 2 sigmoid(a), of the fit's linear approximation.
    """
    if not np.isfinite(a) or not x.any():
        return 2 * y - 1
    p = 1 / (1 + np.exp(-(a + b * x)))
    spread, features = p * (1 - p), np.stack([np.ones_like(x), x])  # (2, S, n)
    hessian = np.einsum("isn,jsn,sn->ij", features, features, spread) + np.diag([0, SLOPE_DEVIATION**-2])
    row = np.linalg.solve(hessian, [1.0, 0.0])
    even = _score(a) / 2
    influence = 2 * even * (1 - even) * np.einsum("i,isn,sn->sn", row, features, y - p) * x.size
    return _score(a) - 1 + influence - influence.mean()


def _bootstrapped(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray | None, level: float, seed: int, resamples: int
) -> tuple[float, float]:
    """The BCa interval of the score less 1, with seeds and groups of documents drawn anew."""
    if np.ptp(y) == 0:
        return (_score(_fitted(x.ravel(), y.ravel())[0]) - 1,) * 2
    _, of = np.unique(np.arange(x.shape[1]) if groups is None else groups.astype(str), return_inverse=True)
    members = [np.flatnonzero(of == group) for group in range(of.max() + 1)]

    def score(seeds: np.ndarray, drawn: np.ndarray) -> float:
        chosen = np.ix_(seeds.astype(int), np.concatenate([members[int(group)] for group in drawn]))
        return _score(_fitted(x[chosen].ravel(), y[chosen].ravel())[0]) - 1

    return bca(score, (len(x), len(members)), resamples, level, seed, vectorized=False)
