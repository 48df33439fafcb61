"""What a selection run is told, in groups: recipes, the callback and its documentation share these dataclasses.

Which rows are kept is a policy (`method.selection`, `method.facility_location`), how many a schedule and when a
`Timing` (`method.schedule`); how a pool is scored is a `Scoring`. A field of a group may be given to the callback by
its own name too: `every=2` is `timing=Timing(every=2)`.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeVar

import torch

from ..data.encoding import check_positive
from ..errors import UserError
from ..method.calibrated_limit import CalibratedLimit
from ..method.choices import ORDERS, WITHOUT, TurnRule, Without
from ..method.facility_location import Diverse
from ..method.further_scores import FURTHER, OF_A_RUN, further_names
from ..method.guard import Guard
from ..method.number_types import is_whole
from ..method.schedule import Anneal, Curriculum, Schedule, Timing
from ..method.selection import Cherry, Policy, eligibility
from ..method.stratified import Mixture, Stratified
from ..method.target_set import TargetSet
from ..method.turns import check_turns
from ..method.weighted import Weighted
from ..scoring.transform import IFDScorer

_Group = TypeVar("_Group")


@dataclass(frozen=True)
class Scoring:
    """How the rows of a pool are scored.

    Args:
        header: text that precedes a direct answer, if it is not to be found from the prompts.
        min_answer_tokens: rows with fewer answer tokens are not scored.
        token_budget: tokens of a scoring batch; see `scoring.losses.Options`.
        embedder: what embeds prompts for a diverse selection, and rows for a target set: by default the model that
            scores; an `IFDScorer`; or, of prompts, the name of a sentence-transformers model.
        warn_share: a larger share of rows with a score of 1 or more is odd: an error or a warning (`Guard`).
        tried_rows: rows that are scored before all others, to see whether prompts help; and by the model in training,
            where another one scores, to see whether the two agree.
        scores: names of further scores that the history and the report are to have; what a policy ranks by is computed
            without being named here. See `method.further_scores`.
        guess: the request that the score `rifd` makes, with `{answer}` where the answer stands.
        turns: what the score of a row with several answers is, of which all are scored that are trained on: "tokens",
            the loss that is trained on, "mean", "min" or "max"; see `method.turns`. "last" scores the last answer of
            each row alone. Guards judge the last answer in any case.
        without: of rows with images, what the direct score leaves out: "both", image and question, or "image" alone.
        train_losses: whether the history is to have the mean loss of each row in the forwards that trained on it, nats
            per trained token (the end of a turn among them), as `train_loss`: NaN for rows that were not trained on. It
            costs no forward, and is no score: weights change from step to step while these losses are made.
    """

    header: str | None = None
    min_answer_tokens: int = 1
    token_budget: int | None = None
    embedder: str | IFDScorer | None = None
    warn_share: float = 0.5
    tried_rows: int = 200
    scores: tuple[str, ...] = ()
    guess: str | None = None
    turns: TurnRule = "tokens"
    without: Without = "both"
    train_losses: bool = False

    def __post_init__(self) -> None:
        check_turns(self.turns, none=False)
        if self.without not in WITHOUT:
            raise UserError(f"without must be one of {', '.join(WITHOUT)}, got {self.without!r}.")
        object.__setattr__(self, "scores", further_names(self.scores, in_training=True))
        if not (self.embedder is None or isinstance(self.embedder, (str, IFDScorer))):
            raise UserError(f"embedder must be the name of a model, an IFDScorer or None, got {self.embedder!r}.")
        if not (self.header is None or isinstance(self.header, str)):
            raise UserError(f"header must be the text that precedes an answer, or None, got {self.header!r}.")
        if not (isinstance(self.warn_share, Real) and 0 <= self.warn_share <= 1):
            raise UserError(f"warn_share must be a share from 0 to 1, got {self.warn_share!r}.")
        check_positive(
            token_budget=self.token_budget, min_answer_tokens=self.min_answer_tokens, tried_rows=self.tried_rows
        )


def asked_scores(policy: Policy, scoring: Scoring, scorer: Any) -> tuple[str, ...]:
    """The further scores of a run: what its policy ranks by and reads, and what was asked for besides.

    Raises:
        UserError: for how losses change where the model that scores is not trained.
    """
    ranked_by = getattr(policy, "score", None)
    ranked_by = [ranked_by] if isinstance(ranked_by, str) and ranked_by in FURTHER else []
    names = further_names([*ranked_by, *getattr(policy, "reads", ()), *scoring.scores], in_training=True)
    of_a_run = [name for name in OF_A_RUN if name in names]
    if of_a_run and scorer is not None:
        raise UserError(
            f"{of_a_run[0]} is how the model in training changes, and scorer={scorer!r} is not trained: leave one out."
        )
    return names


def without_weights(policy: Policy) -> tuple[Policy, Weighted | None]:
    """What chooses the rows, and what weighs the chosen ones by a column, if a policy does."""
    return (policy.policy, policy) if isinstance(policy, Weighted) else (policy, None)


def needs_answers(
    policy: Policy, timing: Timing, guard: Guard | str | bool | None, scorer: Any, further: Iterable[str] = ()
) -> bool:
    """Whether a run needs to know which tokens of a row are its answer.

    What is said of prompts does: IFD, a guard that was asked for, a brief experience, another model, which reads prompt
    and answer, and further scores but for the perplexity of a text alone. The loss of a whole text, its length, and
    columns of the data set do not.
    """
    of_prompts = getattr(policy, "score", None) in ("ifd", "ifd_ppl", "cas") or set(further) - {"direct_ppl"}
    of_prompts = of_prompts or (isinstance(policy, TargetSet) and policy.reads_scores)
    asked = Guard() if guard is True else guard if isinstance(guard, Guard) else None
    measured = {"limit", "pairing"}.intersection(asked.measuring if asked else ())
    other = scorer is not None and scorer != "columns"
    return bool(of_prompts or measured) or timing.warmup is not None or other


def reads_scores(
    policy: Policy, schedule: Schedule, guard: Guard | None, scorer: Any, order: str, further: Iterable[str] = ()
) -> bool:
    """Whether anything in a run reads the scores of its pool; else none are computed.

    Another model, or columns, that the user names for scoring does score, and so do further scores: they are asked for
    by name; but where rows are held against a target set, what another model does is to embed them, and their order is
    that in which the targets took them.
    """
    if isinstance(policy, TargetSet) and scorer != "columns":
        scorer = None
    ranked = isinstance(schedule, Curriculum) or (order != "shuffle" and not isinstance(policy, TargetSet))
    return getattr(policy, "reads_scores", True) or bool(guard or tuple(further)) or scorer is not None or ranked


def check_parts(policy: Policy, timing: Timing, schedule: Schedule, scorer: Any) -> None:
    """Raise for what has no meaning where the rows of an epoch are chosen part by part (`every_steps`)."""
    problem = None
    if timing.every_steps is None:
        return
    if scorer is not None:
        problem = f"the scores of scorer={scorer!r} stay as they are: each part would be the next best rows by them"
    elif isinstance(schedule.schedule if isinstance(schedule, Anneal) else schedule, Curriculum):
        problem = "a Curriculum divides the rows of a whole epoch into tiers when it begins"
    elif isinstance(policy, TargetSet):
        problem = "a TargetSet holds rows against its targets when an epoch begins"
    elif isinstance(policy, (Stratified, Mixture)) and _has_counts(policy):
        problem = f"the numbers of rows that {type(policy).__name__} has are of whole epochs: give fractions"
    if problem is not None:
        raise UserError(
            f"every_steps={timing.every_steps} chooses the rows of an epoch part by part, and {problem}. Leave one of "
            "them out."
        )


def _has_counts(policy: Stratified | Mixture) -> bool:
    """Whether some of a policy's amounts are numbers of rows, and not fractions of those that are kept."""
    given = policy.shares if isinstance(policy, Mixture) else (policy.shares, policy.at_least, policy.at_most)
    amounts = [amount for each in given if isinstance(each, Mapping) for amount in each.values()]
    return any(isinstance(amount, Integral) and amount > 0 for amount in amounts)


def of_whole_rows(guard: Guard | None) -> Guard | None:
    """The guards that need no prompt."""
    return guard and dataclasses.replace(guard, limit=None, pairing=None)


def guard_of(
    guard: Guard | str | bool | None, policy: Policy, timing: Timing, scorer: Any, limit_given: bool = False
) -> Guard | None:
    """The guards of a run.

    By default ("auto"), all but the pairing test where rows are selected by their scores before each epoch. None of
    them: in a run that starts anew (the paper's method), and with a policy whose rows have no limit of IFD, as a
    `Cherry` among others has (a control is to be one). A limit that the user gives (or one of a policy other than 1)
    takes the place of the guard's; where scores are columns of the training set, no model measures, and what is left is
    duplicates.

    Raises:
        UserError: for anything that is no guard.
    """
    if guard is None or guard is False:
        return None
    if guard is True:
        return Guard()
    if isinstance(guard, Guard):
        return guard
    if guard != "auto":
        raise UserError(f"guard must be a Guard, True for the default ones or None, got {guard!r}.")
    limited = eligibility(policy)
    if timing.start_anew or limited is None or isinstance(policy, TargetSet):
        return None
    measures = not (isinstance(scorer, str) and scorer == "columns")
    limit = measures and not limit_given and limited.max_ifd == 1.0
    return Guard(limit=limit, unfinished=measures, freeze=measures)


def check_names(names: Iterable[str]) -> None:
    """Raise a TypeError for a name that is neither short for a part of the policy nor a field of a group."""
    known = ["score", "on_shortfall", "diverse", *_names(Timing), *_names(Scoring)]
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, [*known, "keep", "max_ifd", "schedule", "scorer", "order", "seed"])
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"IFDSelectionCallback got an unexpected keyword argument {name!r}{hint}")


def groups_of(
    policy: Policy | None,
    timing: Timing | None,
    scoring: Scoring | None,
    max_ifd: float | CalibratedLimit | str | None,
    fields: dict[str, Any],
) -> tuple[Policy, Timing, Scoring]:
    """The groups that were given, or made of what was given by the names of their fields.

    Raises:
        TypeError: for a name that is no field of a group.
        UserError: for a group and one of its fields together, or a group of another type.
    """
    limits = {name: fields[name] for name in ("score", "on_shortfall") if name in fields}
    share = fields.get("diverse")
    check_names(fields)
    if policy is None:
        max_ifd = 1.0 if max_ifd is None else max_ifd
        policy = Cherry(max_ifd, **limits) if share is None else Diverse(share, max_ifd, **limits)
    elif named := [*limits, *(["diverse"] if share is not None else []), *(["max_ifd"] if max_ifd is not None else [])]:
        raise _twice("policy", named)
    elif not callable(policy) or isinstance(policy, type):
        raise UserError(
            "policy must be a Cherry, a Diverse, a TargetSet or a callable of your own (no class, but one of it), got "
            f"{policy!r}."
        )
    return policy, _group("timing", Timing, timing, fields), _group("scoring", Scoring, scoring, fields)


def _group(name: str, kind: type[_Group], given: _Group | None, fields: dict[str, Any]) -> _Group:
    mine = {field: fields[field] for field in _names(kind) if field in fields}
    if given is None:
        return kind(**mine)
    if not isinstance(given, kind):
        raise UserError(f"{name} must be a {kind.__name__}, got {given!r}.")
    if mine:
        raise _twice(name, mine)
    return given


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _twice(group: str, names: Iterable[str]) -> UserError:
    return UserError(f"{', '.join(names)} is a part of `{group}`, which was given too: say it there, or leave it out.")


def check_order(order: str, strategy: str) -> None:
    """Raise where rows would be ordered by their scores and by their lengths."""
    if order != "shuffle" and strategy == "group_by_length":
        raise UserError(
            f"order={order!r} orders rows by score, train_sampling_strategy='group_by_length' by length. Set one "
            "of them: order='shuffle', or train_sampling_strategy='random'."
        )


def check_options(scorer: Any, seed: Any, order: Any) -> None:
    """Raise for options of a type that would be told by something far inside, or not at all."""
    if order not in ORDERS:
        raise UserError(f"order must be 'shuffle', 'descending' or 'ascending', got {order!r}.")
    model = isinstance(scorer, torch.nn.Module) and hasattr(scorer, "config")
    if not (scorer is None or isinstance(scorer, str) or model):
        raise UserError(f"scorer must be a model's name or path, a loaded model, 'columns' or None, got {scorer!r}.")
    if not (seed is None or (is_whole(seed) and seed >= 0)):
        raise UserError(f"seed must be a whole number of at least 0, or None for the trainer's, got {seed!r}.")
