"""The arms of a comparison: what a recipe says, with the keys that one way to choose rows takes in their place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.paths import folder_name
from ..errors import UserError
from ..evaluation.measured import BASELINE
from ..method.further_scores import OF_A_RUN, further_names

# What an arm's own keys stand on. The column of "balanced" is named for all arms, and of no use to the others.
_PLAIN = {"method": "dynamic", "guards": "none", "policy": "cherry", "balance_by": ""}

# By name: what it is in words, and its keys. Keys of an arm that scores once with the model as it is name that model.
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("all rows in each epoch, without selection", {"keep": "1.0", "policy": "random"}),
    "random": ("other random rows in each epoch", {"policy": "random"}),
    "balanced": ("as many random rows of each value of a column", {"policy": "balanced"}),
    "longest": ("the rows with the longest answers", {"policy": "longest"}),
    "lowest": ("the rows with the lowest IFD, scored before training", {"policy": "lowest", "scorer": None}),
    "static": ("the rows with the highest IFD below 1, scored before training", {"scorer": None}),
    "superfiltering": (
        "the rows with the highest ratio of perplexities below 1, by the model that `superfilter` names",
        {"scorer": None, "definition": "superfiltering", "score": "ifd_ppl"},
    ),
    "cherry": (
        "the paper's method: a brief experience, one scoring, then from the original weights",
        {"method": "cherry"},
    ),
    "target": (
        "the rows most like the examples of `target_set`, embedded anew before each epoch",
        {"policy": "target", "max_ifd": "inf"},
    ),
    "dynamic": ("the rows with the highest IFD below 1, scored anew before each epoch", {}),
    "guarded": ("as dynamic, with guards against noise", {"guards": "auto"}),
}
DEFAULT = ("random", "longest", "static", "dynamic", "guarded")


@dataclass(frozen=True)
class Arm:
    """One way to choose rows.

    Attributes:
        name: as tables have it.
        words: what it does.
        keys: keys of a recipe, over those that all arms share.
        selects: whether it selects at all; an arm that does not trains on all rows.
    """

    name: str
    words: str
    keys: Mapping[str, Any] = field(default_factory=dict)
    selects: bool = True

    @property
    def scoring(self) -> tuple[Any, ...]:
        """What the scores before training depend on: arms with the same share them."""
        return tuple(self.keys.get(key) for key in ("scorer", "definition", "min_answer_tokens", "method"))

    def arguments(self) -> list[str]:
        """The keys as words of a command line."""
        words = []
        for key, value in self.keys.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{key}", *(str(each) for each in values)]
        return words


def read_arms(
    chosen: Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None,
    model: str,
    balance_by: str | None = None,
    superfilter: str | None = None,
    target_set: str | None = None,
    scores: str | Sequence[str] | None = None,
    every_steps: Any = None,
) -> list[Arm]:
    """The arms that were asked for, random rows first, since the others are held against them.

    Args:
        chosen: names of known arms, or a mapping from names to keys: of a known arm they come on top of its own, of any
            other name they are all it has. By default those in `DEFAULT`.
        model: the model that is trained, which scores for arms that score once.
        balance_by: the column whose values "balanced" draws evenly.
        superfilter: the model that scores for "superfiltering".
        target_set: the examples that rows are held against for "target".
        scores: further scores of the recipe. An arm that scores once, before training, goes without those that
            compare the scorings of a run.
        every_steps: of the recipe. An arm whose scores do not change within an epoch goes without it.

    Raises:
        UserError: for a name that is not known and has no keys, for an arm whose column or model is not named, and for
            fewer than two arms.

    >>> [arm.name for arm in read_arms(["static", "random"], model="m")]
    ['random', 'static']
    >>> read_arms({"hardest": {"policy": "mine.Hardest"}}, model="m")[1].arguments()
    ['--method', 'dynamic', '--guards', 'none', '--policy', 'mine.Hardest', '--balance_by', '']
    """
    scores = further_names(scores, in_training=True)
    given = dict.fromkeys(DEFAULT if chosen is None else chosen) if not isinstance(chosen, Mapping) else chosen
    given = {BASELINE: None, **given}
    if len(given) < 2:
        raise UserError(
            f"A comparison holds arms against {BASELINE} rows: name at least one other, of {_names(KNOWN)}."
        )
    arms = []
    for name, own in given.items():
        if not (own is None or isinstance(own, Mapping)):
            raise UserError(f"arms: {name} wants a mapping of recipe keys, got {own!r}.")
        own = dict(own or {})
        if name not in KNOWN and not own:
            near = difflib.get_close_matches(str(name), KNOWN, n=1)
            meant = f"Did you mean {near[0]}?" if near else f"Known are {_names(KNOWN)}."
            raise UserError(f"arms: {name!r} is no known arm, and has no keys that say what it is. {meant}")
        keys = {**_PLAIN, **(KNOWN[name][1] if name in KNOWN else {})}
        if name == "balanced":
            keys["balance_by"] = own.get("balance_by") or balance_by
            if not keys["balance_by"]:
                raise UserError("arms: balanced draws as many rows of each value of a column: name it with balance_by.")
        if name == "target":
            keys["target_set"] = own.get("target_set") or target_set
            if not keys["target_set"]:
                raise UserError("arms: target keeps the rows most like some examples: name them with target_set: FILE.")
        elif target_set and own.get("policy") != "target":
            keys["target_set"] = ""  # it is the recipe's, and of no use to this arm
        if "scorer" in keys:
            keys["scorer"] = own.get("scorer") or (superfilter if name == "superfiltering" else model)
            if not keys["scorer"]:
                raise UserError("arms: superfiltering scores with a small model: name it with superfilter: gpt2.")
        keys |= own
        if {*OF_A_RUN} & {*scores} and keys.get("scorer") and "scores" not in own:
            # Without another one a score that is always there: a key of a command line needs a value.
            keys["scores"] = [each for each in scores if each not in OF_A_RUN] or ["ifd"]
        if every_steps and "every_steps" not in own and _scores_by_epoch(keys):
            keys["every_steps"] = 0
        arms.append(arm_of(str(name), keys))
    folders = [folder_name(arm.name) for arm in arms]
    if twice := sorted({folder for folder in folders if folders.count(folder) > 1}):
        raise UserError(f"arms: several of them would be in the folder {twice[0]!r}. Give them other names.")
    return arms


def _scores_by_epoch(keys: Mapping[str, Any]) -> bool:
    """Whether the scores of an arm with these keys stay as they are from the beginning of an epoch to its end."""
    return bool(keys.get("scorer")) or keys["method"] == "cherry" or keys["policy"] == "target"


def arm_of(name: str, keys: Mapping[str, Any]) -> Arm:
    """The arm that has these keys.

    >>> arm_of("hardest", {"method": "dynamic", "policy": "mine.Hardest"}).words
    'of your own: policy mine.Hardest'
    """
    own = ", ".join(f"{key} {value}" for key, value in keys.items() if value not in (_PLAIN.get(key), ""))
    words = KNOWN[name][0] if name in KNOWN else f"of your own: {own or 'as dynamic'}"
    return Arm(name, words, keys, selects=name != "full")


def left_out_of_arms(arms: Iterable[Arm], scores: str | Sequence[str] | None) -> str:
    """What to say of a recipe's further scores that some arms go without; "" where all have them."""
    asked = [name for name in further_names(scores, in_training=True) if name in OF_A_RUN]
    without = [arm.name for arm in arms if arm.keys.get("scorer") and not {*asked} & {*(arm.keys.get("scores") or ())}]
    if not asked or not without:
        return ""
    return (
        f"scores: {' and '.join(asked)} is how the losses of the model in training change; rows are scored once, "
        f"before it, in the arms {_names(without)}, which go without."
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
