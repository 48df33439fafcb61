"""What a history's settings, epochs and reasons mean, in plain words: for tables, plots and the page alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..method.choices import GUARDS
from ..method.further_scores import FURTHER
from ..method.plain_data import as_text
from .score_frames import SCORE_EQUATIONS, count_text, epoch_name, rows_text

_SHORTFALL = {
    "repeat": "rows are repeated",
    "relax": "the nearest rows at or above the limit are taken too",
    "error": "the run stops",
}
_ORDERS = {
    "shuffle": "shuffled anew in each epoch",
    "descending": "highest score first",
    "ascending": "lowest score first",
}
_WITHIN = {  # how many of each value of a column
    "Stratified": "so many of each value of {by} as the policy says",
    "Mixture": "in shares of the values of {by} that change by epoch",
    "Stages": "of one value of {by} after another",
    "BadCases": "in shares of the values of {by} that follow their held-out losses",
}
TURN_WORDS = {
    "tokens": "that of all their tokens",
    "mean": "the mean of theirs",
    "min": "that of the answer with the lowest IFD",
    "max": "that of the answer with the highest IFD",
}
# What a column of a table says, by its header; of scores see `column_words`.
_COLUMNS = {
    "pool": "rows to choose from",
    "kept": "rows trained on",
    "repeats": "rows trained on once more, since fewer were kept than planned",
    "trained": "rows that the epoch came to; packed rows with packing",
    "tiers": "tiers of the curriculum that were trained on, 0 the first",
    "scored in": "the epoch at whose start the scores were made",
    "fresh": "share of the scores that were made for this line; the others were moved by what these tell",
    "oldest": "the epoch at whose start the oldest score was made",
    "oldest step": "updates after which the oldest score was made",
    "overlap": "share of the kept rows that the epoch before kept too",
    "cut": "the lowest score kept",
    "limit": "rows with a score at or above it are dropped",
    "scoring s": "seconds that scoring and choosing took",
    "training s": "seconds of the epoch's training",
    "held-out loss": "mean loss on the evaluation set after the epoch, nats per token, low is good",
    "above limit": "rows dropped, their score is like that of answers under wrong prompts",
    "unfinished": "rows dropped, their answer stops before its end",
    "duplicate": "rows dropped, another one says the same",
    "mismatched": "rows dropped, their answer fits other prompts as well",
    "separation": "how often a wrong pair scores higher than a row not trained on yet; 0.5 says nothing, 1 is best",
    "rank correlation": "with the scoring before, over rows not trained on yet; 1 is the same order, 0 none",
    "replaced": "rows that the same scores would have kept without guards, and were not kept",
}
_SAMPLES = {"kmeans": "by k-means over their prompts, of middle perplexity", "random": "at random"}


@dataclass(frozen=True)
class EpochKinds:
    """Which epochs of a run were warm-up, and where training started anew.

    Attributes:
        warmup: epochs before the first that selects.
        brief: whether these are the brief experience, on a sample, and not on the whole pool.
        restart: the epoch before which training started anew from the original weights; None if it did not.

    >>> kinds = EpochKinds.from_settings({"warmup_epochs": 1, "warmup": {"type": "Brief"}, "start_anew": True})
    >>> kinds.name(0), kinds.name(1), kinds.restart
    ('epoch 0 (brief experience)', 'epoch 1', 1)
    """

    warmup: int = 0
    brief: bool = False
    restart: int | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> EpochKinds:
        """The kinds of a run with these settings; those of older histories say nothing of it."""
        warmup = settings.get("warmup_epochs") or 0
        sample = settings.get("warmup") is not None
        return cls(warmup, sample and warmup > 0, warmup if settings.get("start_anew") else None)

    def is_brief(self, epoch: Any) -> bool:
        """Whether an epoch belongs to the brief experience."""
        return self.brief and epoch is not None and epoch < self.warmup

    def kind(self, epoch: int) -> str:
        """`brief experience`, `warm-up`, or "" for an epoch that selects."""
        return ("brief experience" if self.brief else "warm-up") if epoch < self.warmup else ""

    def name(self, epoch: Any, alone: str = "") -> str:
        """`epoch 3`, of the warm-up with its kind; see `epoch_name`."""
        kind = self.kind(epoch) if isinstance(epoch, int) else ""
        return epoch_name(epoch, alone) + (f" ({kind})" if kind else "")

    def sentences(self) -> list[str]:
        """What a reader of a table of epochs should know of them."""
        if not self.warmup:
            return []
        span = "Epoch 0 is" if self.warmup == 1 else f"Epochs 0-{self.warmup - 1} are"
        said = [f"{span} {'the brief experience, on a sample' if self.brief else 'a warm-up on the whole pool'}."]
        if self.restart is not None:
            said.append(
                f"Before epoch {self.restart}, training starts anew from the original weights: losses before and "
                "after are not one curve."
            )
        return said


def column_words(headers: Sequence[str]) -> list[tuple[str, str]]:
    """What the numbers in a table mean, (header, words) for those that are not said by their header alone.

    >>> column_words(["kept", "IFD dropped"])
    [('kept', 'rows trained on'), ('IFD dropped', 'mean score of the rows not kept')]
    """
    words = []
    for header in headers:
        if header in _COLUMNS:
            words.append((header, _COLUMNS[header]))
        elif header.endswith((" kept", " dropped")):
            which = "kept" if header.endswith(" kept") else "not kept"
            words.append((header, f"mean score of the rows {which}"))
        elif header.startswith("loss on "):
            same = any(name == "held-out loss" or name.startswith("loss on ") for name, _ in words)
            words.append((header, "as before, of that set" if same else _COLUMNS["held-out loss"]))
    return words


def scored_at(record: Mapping[str, Any]) -> int | None:
    """The epoch whose scores a record speaks of; None without scores. Older records scored in their own epoch."""
    return record.get("scored_at", record["epoch"] if record.get("mean_kept") is not None else None)


def scoring_sentence(settings: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> str:
    """Which model scored, and when; "" if nothing has been scored."""
    scorer, made = settings.get("scorer"), {record["epoch"]: scored_at(record) for record in epochs}
    made = {epoch: at for epoch, at in made.items() if at is not None}
    times = sorted(set(made.values()))
    if not times:
        return ""
    if scorer == "columns":
        return "The scores are those that the training set came with; the run itself scored nothing."
    if scorer:
        return f"The scores are those of another model, {scorer}, and do not change from epoch to epoch."
    kinds = EpochKinds.from_settings(settings)
    before = f" (of epoch {kinds.restart}, before training starts anew)" if kinds.restart in times else ""
    parts, candidates = any(record.get("part") for record in epochs), settings.get("rescore") == "candidates"
    if parts and candidates:
        return (
            f"All rows are scored before epoch {times[0]}{before}; when its parts and later epochs begin, some of the "
            "rows that are left are anew, by the model as it then is, and the losses of the others are moved by what "
            "these tell."
        )
    if parts:
        again = " and again by each of its parts, on the rows that are left,"
        last = settings.get("freeze_after")
        until = "" if last is None or last >= len(made) else f"; from epoch {last} on the last scores of all rows stand"
        return f"All rows are scored when an epoch begins{again} by the model as it is then{before}{until}."
    if candidates and len(times) > 1:
        return (
            f"All rows are scored before epoch {times[0]}{before}; before epochs "
            f"{', '.join(map(str, times[1:]))} some are anew, by the model as it then is, and the losses of all others "
            "are moved by what these tell."
        )
    if all(epoch == at for epoch, at in made.items()) and (len(made) > 1 or settings.get("freeze_after") is None):
        return f"Each epoch is scored with the model as it is when the epoch begins{before}."
    if len(times) == 1:
        model = "as it was then"
        if kinds.warmup and times[0] == kinds.warmup:
            model = "that the brief experience had given" if kinds.brief else "that the warm-up had given"
        return f"All scores were made once, when epoch {times[0]} began, by the model {model}."
    listed = f"{', '.join(map(str, times[:-1]))} and {times[-1]}"
    return (
        f"Scores were made when epochs {listed} began, by the model as it was then{before}; the epochs between go by "
        "the last ones."
    )


def guards_of(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The guards of a run that are on, by name, as data; those of older histories had none."""
    guard = settings.get("guard")
    return {name: guard[name] for name in GUARDS if guard.get(name)} if isinstance(guard, Mapping) else {}


def frozen_since(epochs: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """The epoch from which on rows were scored no more, and why; nothing where all went well."""
    return [(record["epoch"], record["frozen"]) for record in epochs if record.get("frozen")][:1]


def _guards_in_words(on: Mapping[str, Any]) -> str:
    said = []
    for name, guard in on.items():
        alpha = f"{100 * guard['alpha']:g} %" if "alpha" in guard else ""
        if name == "limit":
            said.append(f"no score like that of an answer under a wrong prompt ({alpha} of these pass)")
        elif name == "pairing":
            said.append(f"no answer that fits one of {guard['anchors']} other prompts as well (alpha {alpha})")
        elif name == "unfinished":
            said.append("no unfinished answer")
        elif name == "duplicates":
            said.append("one of the rows that say the same")
        else:
            said.append("no more scoring once it carries no information")
    return "; ".join(said)


def settings_in_words(settings: Mapping[str, Any], epochs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What a run was: (name, text)."""
    kinds, plan = EpochKinds.from_settings(settings), settings.get("plan") or []
    facts = [("Model", settings.get("model") or "not recorded")]
    if settings.get("scorer") == "columns":
        facts.append(("Scored by", "nothing in this run: the scores are columns of the training set"))
    elif settings.get("scorer"):
        facts.append(("Scored by", f"another model, {settings['scorer']}"))
    if settings.get("pool"):
        facts.append(("Pool", rows_text(settings["pool"])))
    policy = settings.get("policy") if isinstance(settings.get("policy"), Mapping) else {}
    if rule := _rule(policy, settings):
        facts.append(("Rule", rule))
    if shortfall := policy.get("on_shortfall"):
        facts.append(("With too few such rows", _SHORTFALL.get(shortfall, str(shortfall))))
    facts.append(("Policy", as_text(policy) if policy else "not recorded"))
    if settings.get("row_weights"):
        facts.append(("Weights in the loss", f"the column {settings['row_weights']}"))
    if "guard" in settings:
        facts.append(("Guards", _guards_in_words(guards_of(settings)) or "none"))
    if kinds.brief:
        facts.append(("Brief experience", _brief_in_words(kinds, settings)))
    if plan:
        packed = settings.get("packed_rows")  # with packing, the plan counts packed rows
        budgets = _budgets_in_words(plan, packed or settings.get("pool"), kinds)
        facts.append(("Packed rows to train on" if packed else "Rows to train on", budgets))
    if further := [name for name in settings.get("further_scores") or () if name in FURTHER]:
        facts.append(("Further scores", "; ".join(f"{name}: {FURTHER[name].meaning}" for name in further)))
    if rule := settings.get("turns"):
        facts.append(("Score of several answers", f"{TURN_WORDS.get(rule, rule)}; guards judge the last one"))
    if settings.get("schedule"):
        facts.append(("Schedule", as_text(settings["schedule"])))
    if settings.get("max_steps"):
        facts.append(("Optimizer updates", _updates_in_words(settings["max_steps"], plan, kinds)))
    if settings.get("every_steps") and any(record.get("part") for record in epochs):
        facts.append(
            ("Parts of an epoch", f"{settings['every_steps']:,} updates each, whose rows were chosen when they began")
        )
    recorded = len({record["epoch"] for record in epochs})
    facts.append(("Epochs", f"{recorded} recorded" + (f" of {len(plan)} planned" if plan else "")))
    if settings.get("order"):
        facts.append(("Order of rows", _ORDERS.get(settings["order"], settings["order"])))
    if settings.get("direct_prefix"):
        facts.append(("Text before a direct answer", repr(settings["direct_prefix"])))
    if settings.get("seed") is not None:
        facts.append(("Seed", str(settings["seed"])))
    return facts


def _rule(policy: Mapping[str, Any], settings: Mapping[str, Any]) -> str | None:
    limit, score = settings.get("max_ifd"), settings.get("score") or "ifd"
    further = f"{score} ({FURTHER[score].meaning})" if score in FURTHER else score
    if score not in SCORE_EQUATIONS and limit == 1:  # the default is a limit of IFDs, and none of other scores
        limit = None
    score = SCORE_EQUATIONS.get(score, further)
    limit = f"{limit:g}" if limit else _calibrated(policy.get("max_ifd"))
    if policy.get("type") == "Cherry":
        return f"the rows with the highest {score}, {f'of those below {limit}' if limit else 'without a limit'}"
    if policy.get("type") == "SoftSampling":
        of = f"of those below {limit}" if limit else "without a limit"
        return f"rows drawn, the likelier the higher their {score} (temperature {policy.get('temperature')}), {of}"
    if isinstance(inner := policy.get("policy"), Mapping) and policy.get("by"):
        within = _WITHIN.get(policy.get("type"), "within the values of the column {by}")
        return f"{_rule(inner, settings) or as_text(inner)}; {within.format(by=policy['by'])}"
    if policy.get("type") == "IterIT":
        of = f"{policy.get('candidates_per_row', 3):g} for each kept row"
        return f"of the rows with the highest {score} ({of}), those whose answers say most that no other kept one says"
    if policy.get("type") == "Cascade":
        share, below = policy["share"], f", of those below {limit}" if limit else ""
        left = f"{share:,} rows" if isinstance(share, int) else f"{100 * share:g} % of the rows"
        return f"of the {left} with the highest {policy['by']}, those with the highest {score}{below}"
    if policy.get("type") == "InfoBatch":
        return (
            f"all rows with at least the mean {score}, and some of the others, drawn, whose losses weigh so much more "
            "that all of them count"
        )
    if policy.get("type") == "Kakurenbo":
        return (
            f"all rows but those with the lowest {score}: hidden first are rows whose answers have a probability of "
            f"{policy.get('tau')} by token, and whose loss did not rise"
        )
    if policy.get("type") == "Lead":
        by, parts = policy.get("by"), policy.get("groups")
        of = f"with one value of {by}" if by else f"in one of {parts} parts by IFD"
        most = "those with the highest loss, as far as it is known"
        return f"of the rows {of}, which a bandit draws for each epoch, {most}"
    if policy.get("type") == "Diverse":
        share = policy.get("share")
        of = f"{share:,} " if isinstance(share, int) else f"{100 * share:g} % of the " if share else ""
        below = f" (below {limit})" if limit else ""
        return (
            f"of the {of}eligible rows{below} with the highest {score}, those whose embeddings stand best for all of "
            f"these ({str(policy.get('by') or 'facility_location').replace('_', ' ')})"
        )
    return None


def _calibrated(limit: Any) -> str:
    if not isinstance(limit, Mapping):
        return ""
    return (
        f"a limit that is measured in each scoring: below it are {100 * limit['alpha']:g} % of answers that are scored "
        "under the prompts of other rows"
    )


def _brief_in_words(kinds: EpochKinds, settings: Mapping[str, Any]) -> str:
    sample = settings["warmup"]
    budgets = [epoch["budget"] for epoch in settings.get("plan") or []]
    rows = rows_text(budgets[0]) if budgets else "a sample of rows"
    how = _SAMPLES.get(sample.get("method", "kmeans")) if isinstance(sample, Mapping) else None
    when = "epoch 0" if kinds.warmup == 1 else f"epochs 0-{kinds.warmup - 1}"
    after = "training starts anew from the original weights" if kinds.restart is not None else "training goes on"
    return f"{when}, on {rows} chosen {how or 'as ' + as_text(sample) + ' says'}; then {after}"


def _updates_in_words(total: int, plan: Sequence[Mapping[str, Any]], kinds: EpochKinds) -> str:
    before = sum(epoch["updates"] for epoch in plan if kinds.restart is not None and epoch["epoch"] < kinds.restart)
    if not before:
        return f"{total:,} planned"
    warmup = "brief experience" if kinds.brief else "warm-up"
    return f"{total:,} planned: {before:,} in the {warmup}, {total - before:,} after training starts anew"


def _budgets_in_words(plan: Sequence[Mapping[str, Any]], pool: int | None, kinds: EpochKinds) -> str:
    sample = [epoch for epoch in plan if kinds.is_brief(epoch["epoch"])]
    rest = [epoch for epoch in plan if not kinds.is_brief(epoch["epoch"])]
    parts = [f"{rows_text(sample[0]['budget'])} in the brief experience"] if sample else []
    return ", then ".join(parts + ([_budgets_of(rest, pool)] if rest else []))


def _budgets_of(plan: Sequence[Mapping[str, Any]], pool: int | None) -> str:
    budgets = [epoch["budget"] for epoch in plan]
    listed = [f"{count_text(epoch['budget'])} in epoch {epoch['epoch']}" for epoch in plan[:12]]
    if len(set(budgets)) == 1:
        share = f" ({100 * budgets[0] / pool:.1f} % of the pool)" if pool else ""
        epochs = "one epoch" if len(plan) == 1 else f"each of {len(plan)} epochs"
        return f"{rows_text(budgets[0])}{share} in {epochs}"
    return ", ".join(listed) + (f", and so on to {budgets[-1]:,}" if len(budgets) > 12 else "")
