"""What the selection keys of a recipe mean together: the schedule and the policies they describe, checked.

A setting that contradicts another one is an error here, before a model is loaded; one that has no effect is warned of.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ..data.encoding import check_positive
from ..data.format_choice import FormatOptions
from ..data.reversed_rows import request
from ..errors import UserError, one_line
from ..method import controls
from ..method.bad_cases import BadCases
from ..method.brief_experience import Brief
from ..method.calibrated_limit import CALIBRATED, CalibratedLimit
from ..method.cascade import Cascade
from ..method.choices import BY_LOSS, CASCADE, CONTROLS, GUARDS, MEASURING_GUARDS, TARGET
from ..method.duplicates import Duplicates
from ..method.facility_location import Diverse
from ..method.further_scores import further_names
from ..method.guard import Guard
from ..method.infobatch import InfoBatch
from ..method.kakurenbo import Kakurenbo
from ..method.lead import Lead
from ..method.pairing_test import PairingTest
from ..method.quotas import REST, parse_amounts
from ..method.ranking import Ranking
from ..method.schedule import Anneal, Curriculum, Schedule, Timing, as_schedule, parse_keep
from ..method.scoring_health import Freeze
from ..method.selection import Cherry, OwnScore, Policy
from ..method.soft_sampling import SoftSampling
from ..method.stratified import Mixture, Stages, Stratified
from ..method.target_set import TargetSet
from ..method.unfinished import Unfinished
from ..method.weighted import Weighted
from ..training.callback import IFDSelectionCallback
from ..training.candidate_scoring import check_candidates
from ..training.options import Scoring, asked_scores, check_parts, guard_of, reads_scores
from .selection_keys import SelectionKeys

if TYPE_CHECKING:
    from transformers import Trainer

    from ..scoring.transform import IFDScorer

logger = logging.getLogger(__name__)


@dataclass
class SelectionConfig(SelectionKeys):
    """The selection keys of a recipe as a dataclass beside TRL's, for a script with a parser of its own.

    `ifd-trainer train --help` says what each key means. Those of the group "Rows" are for that command: a script of
    your own reads and prepares its rows itself.

    Raises:
        UserError: for values that are none of a key's, or contradict one another.

    >>> parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, SelectionConfig))     # doctest: +SKIP
    >>> script, sft, model, selection = parser.parse_args_and_config()                     # doctest: +SKIP
    >>> rows = load_dataset(script.dataset_name, split=script.dataset_train_split)         # doctest: +SKIP
    >>> trainer = SFTTrainer(model.model_name_or_path, args=sft, train_dataset=rows)       # doctest: +SKIP
    >>> trainer.add_callback(selection.callback(trainer))                                  # doctest: +SKIP
    >>> trainer.train()                                                                    # doctest: +SKIP
    """

    def __post_init__(self) -> None:
        for name in ("guards", "shares", "floors", "caps", "stages"):  # in YAML one, or several, need no brackets
            if isinstance(given := getattr(self, name), str):
                setattr(self, name, given.replace(",", " ").split())
        self.mixture = [self.mixture] if isinstance(self.mixture, str) else self.mixture
        self.stage_epochs = [self.stage_epochs] if isinstance(self.stage_epochs, int) else self.stage_epochs
        self.scores = list(further_names(self.scores, in_training=True))
        for values in dataclasses.fields(self):  # argparse looks at those of the command line only
            choices, value = values.metadata.get("choices"), getattr(self, values.name)
            if choices is not None and value is not None and value not in choices:
                raise UserError(f"{values.name} must be one of {', '.join(choices)}, got {value!r}.")
        if self.max_ifd == "auto":
            self.max_ifd = math.inf if self.policy == TARGET else 1.0
        if self.max_ifd != CALIBRATED:
            try:
                self.max_ifd = float(self.max_ifd)
            except (ValueError, TypeError) as error:
                raise UserError(f"max_ifd: {self.max_ifd!r} is no number, and not {CALIBRATED}.") from error
        elif self.scorer is not None:
            raise UserError(
                f"scorer={self.scorer!r} scores the rows before the run, so nothing measures a limit in it: set a "
                "number, such as max_ifd: 1.0, or leave scorer out."
            )
        if self.method == "cherry" and self.brief != "none" and self.scorer is not None:
            raise UserError(
                f"scorer={self.scorer!r} scores without a brief experience, but brief is {self.brief!r}: set brief: "
                "none, or leave scorer out."
            )
        if self.definition != "paper" and self.scorer is None:
            raise UserError(
                f"definition={self.definition!r} is computed from the raw rows by a scorer; the model in training "
                "scores the tokens that it trains on (definition: paper). Set scorer, or leave definition out."
            )
        if not 0 <= self.anneal_share <= 1:
            raise UserError(f"anneal_share must be in [0, 1], got {self.anneal_share}.")
        self.rows_format()
        check_positive(min_answer_tokens=self.min_answer_tokens, token_budget=self.token_budget, tiers=self.tiers)
        # What these refuse is told before a model is loaded.
        self.schedule(), self.chosen_policy(), self.timing(), self.scoring(), self.guard(), self.further()
        check_parts(self.chosen_policy(), self.timing(), self.schedule(), self.scorer)
        if self.rescore == "candidates":
            check_candidates(self.chosen_policy(), self.scorer, self.further())
        if self.brief != "none":
            Brief(self.brief, self.brief_clusters, self.brief_per_cluster)
        for needed, keys in self.idle_keys().items():
            logger.warning("%s: no effect without %s.", ", ".join(keys), needed)

    def rows_format(self) -> FormatOptions:
        """What is said of the rows' format.

        Raises:
            UserError: for an unknown name, and for keys that contradict each other.
        """
        return FormatOptions(**{key.name: getattr(self, key.name) for key in dataclasses.fields(FormatOptions)})

    def given_keys(self) -> set[str]:
        """Keys with another value than the default, or none."""
        defaults = {
            key.name: key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
            for key in dataclasses.fields(self)
        }
        defaults["max_ifd"] = 1.0
        return {name for name, default in defaults.items() if str(getattr(self, name)) not in (str(default), "")}

    def idle_keys(self) -> dict[str, list[str]]:
        """Given keys that have no effect with the others as they are, by what they would need.

        >>> SelectionConfig(tiers=4).idle_keys()
        {'curriculum': ['tiers']}
        """
        idle = {"method: cherry": ("brief", "brief_clusters", "brief_per_cluster")} if self.method != "cherry" else {}
        idle |= {"curriculum": ("tiers", "tier_mode")} if self.curriculum is None else {}
        idle |= self._idle_guards()
        by_score = getattr(self.chosen_policy(), "reads_scores", True) and self.policy != TARGET
        limited = self.policy in (TARGET, CASCADE)
        limits = () if limited else ("max_ifd", "on_shortfall")
        limits += ("score",) if not by_score or self.policy in BY_LOSS else ()
        idle |= {"rescore: candidates": ("rescore_budget",)} if self.rescore != "candidates" else {}
        idle |= {"policy: balanced": ("balance_by",)} if self.policy != "balanced" else {}
        idle |= {"policy: lead": ("lead_by", "lead_groups")} if self.policy != "lead" else {}
        idle |= {"policy: lead without lead_by": ("lead_groups",)} if self.lead_by else {}
        idle |= {f"policy: {TARGET}": ("target_set",)} if self.policy != TARGET else {}
        idle |= {"policy: cherry": (*limits, "temperature")} if self.policy != "cherry" else {}
        idle |= {"stages": ("stage_epochs", "growing")} if not self.stages else {}
        idle |= {"bad_cases": ("bad_cases_floor", "bad_cases_temperature")} if not self.bad_cases else {}
        idle |= {"shares, floors or caps": ("buckets",)} if not (self.shares or self.floors or self.caps) else {}
        of_diverse = ("diverse_by",) if self.policy == TARGET else ("diverse_by", "embedder")
        idle |= {"diverse": of_diverse} if self.diverse is None else {}
        idle |= {f"policy: {CASCADE}": ("cascade_by", "cascade_share")} if self.policy != CASCADE else {}
        given = self.given_keys()
        return {needed: keys for needed, names in idle.items() if (keys := [name for name in names if name in given])}

    def _idle_guards(self) -> dict[str, tuple[str, ...]]:
        """Keys of guards that are off, by what they would need."""
        guard = self.guard()
        on = () if guard is None else guard.names
        measured = [name for name in ("limit", "pairing") if name in on]
        idle = {} if "limit" in on or self.max_ifd == CALIBRATED else {"a calibrated limit": ("alpha", "wrong_pairs")}
        idle |= {} if "pairing" in on else {"the guard pairing": ("anchors",)}
        idle |= {} if "duplicates" in on else {"the guard duplicates": ("similarity",)}
        idle |= {} if measured or self.max_ifd == CALIBRATED else {"the guards limit or pairing": ("wrong_prompts",)}
        return idle | ({} if guard is not None else {"guards": ("on_misaligned",)})

    def guard(self) -> Guard | None:
        """What keeps noise out.

        Raises:
            UserError: for a name that is no guard's, and for numbers that they do not take.
        """
        return self._guard

    @cached_property
    def _guard(self) -> Guard | None:
        unknown = [name for name in self.guards if name not in (*GUARDS, "auto", "none")]
        if unknown or not self.guards or ("none" in self.guards and len(self.guards) > 1):
            raise UserError(
                f"guards must be some of {', '.join(GUARDS)}, auto with or without others, or none alone, got "
                f"{', '.join(self.guards) or 'nothing'}."
            )
        scorer = None if self.scorer is None else "columns"
        usual = None
        if "auto" in self.guards and self.method == "dynamic":  # the paper's method goes without
            usual = guard_of("auto", self.chosen_policy(), self.timing(), scorer)
        on = {*(usual.names if usual else ()), *self.guards} & {*GUARDS}
        if not on:
            return None
        made = {
            "limit": self._limit,
            "pairing": self._pairing,
            "duplicates": partial(Duplicates, self.similarity),
            "unfinished": Unfinished,
            "freeze": Freeze,
        }
        measuring = [name for name in MEASURING_GUARDS if name in on]
        if self.scorer is not None and measuring:
            raise UserError(
                f"scorer={self.scorer!r} scores the rows before the run, so nothing in it measures "
                f"{', '.join(measuring)}: leave these guards out, or scorer."
            )
        guards = {name: made[name]() if name in on else None for name in GUARDS}
        return Guard(**guards, on_misaligned=self.on_misaligned)

    def _pairing(self) -> PairingTest:
        """With the smallest alpha that so many anchors allow, but not below the usual one."""
        check_positive(anchors=self.anchors)
        return PairingTest(max(PairingTest.alpha, 1 / (self.anchors + 1)), self.anchors, prompts=self.wrong_prompts)

    def _limit(self) -> CalibratedLimit:
        usual = CalibratedLimit.of(self.alpha)
        pairs = usual.pairs if self.wrong_pairs is None else self.wrong_pairs
        return replace(usual, pairs=pairs, prompts=self.wrong_prompts)

    def chosen_policy(self) -> Policy:
        """Which rows are kept; the same object each time, since one of a user's own may be costly to make.

        Raises:
            UserError: for a name that leads to no policy, and for one beside keys of another.
        """
        return self._policy

    @cached_property
    def _policy(self) -> Policy:
        return self._within(self._ranks())

    def _within(self, policy: Policy) -> Policy:
        """A policy within the values of a column, where the recipe names one."""
        kinds = {
            "bad_cases": self.bad_cases,
            "stages": bool(self.stages),
            "mixture": bool(self.mixture),
            "shares, floors or caps": bool(self.shares or self.floors or self.caps),
        }
        given = [name for name, is_given in kinds.items() if is_given]
        if self.per is None:
            if given:
                raise UserError(f"{given[0]} are for the values of a column: name it with per.")
            return policy
        if len(given) != 1:
            raise UserError(
                f"per: {self.per} goes with one of {', '.join(kinds)}; given were {' and '.join(given) or 'none'}."
            )
        if self.bad_cases:
            return BadCases(self.per, self.bad_cases_floor, self.bad_cases_temperature, policy)
        if self.stages:
            epochs = self.stage_epochs if len(self.stage_epochs) > 1 else self.stage_epochs[0]
            return Stages(self.per, self.stages, epochs, self.growing, policy)
        if self.mixture:
            return Mixture(self.per, [_named_amounts(entry.split(), "mixture") for entry in self.mixture], policy)
        amounts = (_named_amounts(getattr(self, name), name) for name in ("shares", "floors", "caps"))
        return Stratified(self.per, *amounts, self.buckets, policy)

    def _ranks(self) -> Policy:
        if self.policy == "cherry":
            return self._cherry()
        if self.diverse is not None:
            raise UserError(f"diverse chooses rows by itself, but policy is {self.policy!r}: leave one of them out.")
        if self.policy == "balanced" and not self.balance_by:
            raise UserError("policy: balanced draws as many rows of each value of a column: name it with balance_by.")
        if self.policy == TARGET:
            if not self.target_set:
                raise UserError(
                    f"policy: {TARGET} keeps the rows most like some examples of what the model is to be good at: name "
                    "a file of them with target_set."
                )
            limit = self._limit() if self.max_ifd == CALIBRATED else self.max_ifd
            return TargetSet(self.target_set, max_ifd=limit, on_shortfall=self.on_shortfall)
        if self.policy == CASCADE:
            if not self.cascade_by:
                raise UserError(
                    f"policy: {CASCADE} leaves the rows with the highest values of a column to be chosen from: name it "
                    "with cascade_by."
                )
            limit = self._limit() if self.max_ifd == CALIBRATED else self.max_ifd
            share = _share("cascade_share", self.cascade_share)
            return Cascade(self.cascade_by, share, limit, self._score(), self.on_shortfall)
        if self.policy in BY_LOSS:
            if self.policy == "lead":
                return Lead(self.lead_by, self.lead_groups)
            return {"infobatch": InfoBatch, "kakurenbo": Kakurenbo}[self.policy]()
        if self.policy in CONTROLS:
            control = getattr(controls, CONTROLS[self.policy])
            if self.policy == "balanced":
                return control(self.balance_by)
            return control(score=self._score()) if hasattr(control, "score") else control()
        return _own_policy(self.policy)

    def _score(self) -> str | OwnScore:
        """What rows are ranked by: weighted ranks, where weights are given; a function, where the name has a dot."""
        entries = self.score.split()
        if entries and Ranking.parse(entries).plain is None:
            return Ranking.parse(entries)
        return _imported("score", self.score) if "." in self.score else self.score

    def _cherry(self) -> Cherry | Diverse:
        limit = self._limit() if self.max_ifd == CALIBRATED else self.max_ifd
        limits = limit, self._score(), self.on_shortfall
        if self.temperature is not None:
            if self.diverse is not None:
                raise UserError("diverse and temperature both say which of the eligible rows are kept: leave one out.")
            return SoftSampling(self.temperature, *limits)
        if self.diverse is None:
            return Cherry(*limits)
        return Diverse(_share("diverse", self.diverse), *limits, self.diverse_by)

    def timing(self) -> Timing:
        """When rows are scored, and what is trained on before; with the method cherry, the brief experience."""
        given = {
            key: getattr(self, key)
            for key in ("every", "every_steps", "warmup_epochs", "freeze_after", "rescore", "rescore_budget")
            if getattr(self, key) != getattr(SelectionKeys, key)
        }
        if self.every_steps == 0:
            del given["every_steps"]
        if self.method != "cherry":
            return Timing(**given)
        brief = None if self.brief == "none" else Brief(self.brief, self.brief_clusters, self.brief_per_cluster)
        return Timing.cherry(brief, **given)

    def scoring(self, embedder: Any = None) -> Scoring:
        """How the rows are scored; prompts are embedded by `embedder`, unless the recipe names another."""
        given = {"scores": tuple(self.scores), "guess": self.guess, "turns": self.turns, "without": self.without}
        given["train_losses"] = self.train_losses
        return Scoring(None, self.min_answer_tokens, self.token_budget, self.embedder or embedder, **given)

    def further(self) -> tuple[str, ...]:
        """The further scores of the run: those of `scores`, and the one that its policy ranks by.

        Raises:
            UserError: for how losses change where `scorer` is set, and for a `guess` that no score makes use of.
        """
        names = asked_scores(self.chosen_policy(), self.scoring(), self.scorer)
        request(self.guess, names)
        return names

    def budgets(self) -> float | int | list[float | int]:
        """`keep` as the callback takes it: text with a point is a fraction, without one a number of rows."""
        entries = self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]
        numbers = [parse_keep(entry) for entry in entries]
        return numbers[0] if len(numbers) == 1 else numbers

    @property
    def only_embeds(self) -> bool:
        """Whether a model named by `scorer` is to embed rows for a target set, and to score none."""
        policy = self.chosen_policy()
        asked = reads_scores(policy, self.schedule(), self.guard(), None, self.order)
        return isinstance(policy, TargetSet) and not asked

    def callback(
        self, trainer: Trainer, scorer: IFDScorer | None = None, policy: Policy | None = None
    ) -> IFDSelectionCallback:
        """The callback that the keys describe, to be added to its trainer.

        Args:
            trainer: the trainer.
            scorer: what has scored the trainer's rows already, by the key `scorer`; None where nothing has.
            policy: in the place of the chosen one: with paths as they are from here.

        Raises:
            UserError: for a definition that is computed from raw rows, which a trainer does not have any more.
        """
        if scorer is None and self.definition != "paper":
            raise UserError(
                f"definition={self.definition!r} is computed from raw rows: map them with IFDScorer({self.scorer!r}, "
                f"definition={self.definition!r}) before they go to the trainer, and pass that as scorer=."
            )
        scored = self.scorer if scorer is None else None if self.only_embeds else "columns"
        policy = self.chosen_policy() if policy is None else policy
        return IFDSelectionCallback(
            trainer,
            schedule=self.schedule(),
            policy=Weighted(self.row_weights, policy) if self.row_weights else policy,
            timing=self.timing(),
            guard=self.guard(),
            scoring=self.scoring(embedder=scorer),
            scorer=scored,
            order=self.order,
            push_history=self.push_history,
        )

    def schedule(self) -> Schedule:
        """The schedule that `keep`, `curriculum` and `anneal_share` describe together."""
        keep = self.budgets()
        if self.curriculum and isinstance(keep, list):
            raise UserError("A curriculum takes one `keep`, which it divides into tiers; a list was given.")
        schedule = (
            Curriculum(keep, self.tiers, self.curriculum, self.tier_mode) if self.curriculum else as_schedule(keep)
        )
        return Anneal(schedule, self.anneal_share) if self.anneal_share else schedule


def _named_amounts(entries: list[str], key: str) -> dict[str, float | int] | str:
    """Amounts by value; or the one word that stands for all of them."""
    if entries == ["equal"]:
        return "equal"
    amounts = parse_amounts(entries, key)
    if REST in amounts:
        raise UserError(f"{key} wants VALUE=NUMBER, such as code=0.1; got {' '.join(entries)}.")
    return amounts


@contextmanager
def idle_keys_unsaid() -> Iterator[None]:
    """No settings that are made here warn of their idle keys: those of a comparison's recipe are for several arms."""
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _share(key: str, value: str) -> float | int:
    """A share or a count, as text has it."""
    try:
        return parse_keep(value)
    except UserError as error:
        raise UserError(f"{key}: {value!r} is not a number; use a share (0.2) or a count (1000).") from error


def _imported(key: str, path: str) -> Any:
    """What a dotted path stands for."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{key}: {path!r} cannot be imported: {one_line(error)}.") from error


def _own_policy(path: str) -> Policy:
    """The policy with a dotted path: what the name stands for, or, of a class, one made without arguments."""
    if "." not in path:
        known = ", ".join(("cherry", TARGET, *BY_LOSS, *CONTROLS))
        raise UserError(f"policy: {path!r} is none of {known}; one of your own is written as module.Name.")
    policy = _imported("policy", path)
    if isinstance(policy, type):
        try:
            policy = policy()
        except TypeError as error:
            raise UserError(f"policy: {path!r} cannot be made without arguments: {one_line(error)}.") from error
    if not callable(policy):
        raise UserError(f"policy: {path!r} is a {type(policy).__name__}, which is no callable.")
    return policy
