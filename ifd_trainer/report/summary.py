"""What a page opens with: how it went in a sentence, what to know, and what to do next, with the command lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..data.definitions import DEFINITIONS, KNOWN_DEFINITIONS
from ..method.guard import GUARD_REASONS
from ..method.number_words import listed, many
from ..method.reasons import MEANINGS, counted_noise
from ..method.scoring_health import Freeze, rank_correlation
from ..training.history import FOLDER
from .report_data import ReportData
from .score_frames import (
    SCORE_EQUATIONS,
    SCORE_NAMES,
    held_out_losses,
    how_kept,
    number_text,
    percent_text,
    record_name,
    rows_text,
)
from .wording import frozen_since, guards_of, scored_at

SHARES = (0.01, 0.05, 0.10)  # of all rows, of which it is said where they would cut


@dataclass
class Summary:
    """The beginning of a page.

    Attributes:
        fine: whether nothing is there to worry about; None where that is not known.
        verdict: how it went.
        points: what to know.
        steps: what to do next, (words, command line or "").
    """

    fine: bool | None
    verdict: str
    points: list[str] = field(default_factory=list)
    steps: list[tuple[str, str]] = field(default_factory=list)


def summary_of(data: ReportData) -> Summary | None:
    """The summary of a run, or of scored rows; None where there is nothing to say yet."""
    if data.history is not None:
        return _of_run(data) if data.history.epochs else None
    return _of_scores(data) if data.last is not None and len(data.last) else None


# ---- of a run ---------------------------------------------------------------------------------------------------


def _of_run(data: ReportData) -> Summary:
    records, settings = data.history.epochs, data.history.settings
    by_score = [record for record in records if scored_at(record) is not None]
    loss, rose = _loss_point(data)
    worries = _worries(data, by_score, rose)
    planned = len(settings.get("plan") or records)
    recorded = len({record["epoch"] for record in records})
    if recorded < planned:
        fine, verdict = None, f"The run is not at its end: {recorded} of {planned} epochs are recorded."
    elif worries:
        fine, verdict = False, f"Look closer before you use this model: {listed(worries)}."
    else:
        fine, verdict = True, "The run went as planned; nothing here speaks against it."
    points = [_rows_point(data), *_guard_points(data, by_score), _score_point(by_score, records), loss]
    return Summary(fine, verdict, list(filter(None, points)), _steps_of_run(data, by_score))


def _worries(data: ReportData, by_score: list[dict[str, Any]], rose: bool) -> list[str]:
    """What speaks against the selection, as parts of a sentence."""
    found = []
    if frozen := frozen_since(data.history.epochs):
        found.append(f"from epoch {frozen[0][0]} on the scores carried no information")
    elif by_score and (separation := by_score[-1].get("separation")) is not None and separation < Freeze().separation:
        found.append("at the end the scores hardly tell a row from a mismatched one")
    last = data.last[data.score].dropna() if data.last is not None else pd.Series(dtype=float)
    if data.score in SCORE_EQUATIONS and len(last) and (last >= 1).mean() > 0.5:
        found.append("for most rows the prompt does not help")
    short = list(dict.fromkeys(str(record["epoch"]) for record in data.history.epochs if record.get("shortfall")))
    if short:
        found.append(f"too few rows were eligible in epoch{'s' if len(short) > 1 else ''} {listed(short)}")
    if by_score and "guard" in data.history.settings and not guards_of(data.history.settings):
        found.append("no guard kept noise out")
    if rose:
        found.append("the held-out loss is higher than before training")
    return found


def _rows_point(data: ReportData) -> str:
    records = [record for record in data.history.epochs if not data.kinds.is_brief(record["epoch"])]
    counts, pool = [record.get("kept") for record in records], data.history.settings.get("pool")
    if None not in counts:  # an epoch in parts has a record for each
        by_epoch = {record["epoch"]: 0 for record in records}
        for record in records:
            by_epoch[record["epoch"]] += record["kept"]
        counts = list(by_epoch.values())
    pool = pool or (records[0].get("pool") if records else None)
    if not records or None in counts or not pool:
        return ""
    rows = "examples" if data.history.settings.get("packed_rows") else "rows"
    if len(set(counts)) == 1:
        epochs = "One epoch" if len(counts) == 1 else f"Each of {len(counts)} epochs"
        text = f"{epochs} trained on {counts[0]:,} of {pool:,} {rows} ({percent_text(counts[0] / pool)})"
    else:
        shown = listed([f"{count:,}" for count in counts]) if len(counts) < 7 else f"{counts[0]:,} to {counts[-1]:,}"
        text = f"{len(counts)} epochs trained on {shown} of {pool:,} {rows}"
    frames = [rows for epoch, rows in data.epochs.items() if not data.kinds.is_brief(epoch) and "kept" in rows]
    if len(frames) > 1:
        different = set().union(*(frame.loc[frame["kept"], "key"] for frame in frames))
        text += f"; {len(different):,} different ones in all"
    return text + "."


def _guard_points(data: ReportData, by_score: list[dict[str, Any]]) -> list[str]:
    on = guards_of(data.history.settings)
    if not by_score or "guard" not in data.history.settings:
        return []
    if not on:
        hard = "rows with a high score are hard ones, and mismatched or unfinished ones"
        other = "mismatched and unfinished rows may be among those that were kept"
        return [f"No guard was on: {hard if data.score in SCORE_EQUATIONS else other}."]
    last, reasons = by_score[-1], [reason for name, reason in GUARD_REASONS.items() if name in on]
    counts = {reason: int((last.get("reasons") or {}).get(reason, 0)) for reason in reasons}
    named = [counted_noise(reason, count) for reason, count in counts.items()]
    if not named:
        return []
    text = f"In {record_name(last)}, guards kept out {rows_text(sum(counts.values()))}: {listed(named)}"
    if (replaced := last.get("kept_only_without_guards")) is not None:
        text += f". Without them {replaced:,} of these would have been trained on, by the same scores"
    return [text + "."]


def _score_point(by_score: list[dict[str, Any]], records: list[dict[str, Any]]) -> str:
    if frozen := frozen_since(records):
        return f"Since epoch {frozen[0][0]} rows are scored no more: {frozen[0][1]}."
    if not by_score:
        return "No row was chosen by a score."
    last = by_score[-1]
    separated, agreed = last.get("separation"), last.get("rank_correlation")
    parts = []
    if separated is not None:
        parts.append(
            f"a mismatched pair scores higher than a row of the pool in {percent_text(separated)} of cases (a coin: "
            "50 %)"
        )
    if agreed is not None:
        parts.append(f"rows rank as in the scoring before with a correlation of {number_text(agreed, 2)} (1: the same)")
    if not parts:
        return "Whether the scores still carry information was not measured; the guard limit does that."
    good = separated is None or separated >= Freeze().separation
    return (
        f"The scores of {record_name(last)} {'carry' if good else 'hardly carry'} information: {' and '.join(parts)}."
    )


def _loss_point(data: ReportData) -> tuple[str, bool]:
    """What became of the held-out loss, and whether it rose."""
    losses = held_out_losses(data.history)
    texts, rose = [], False
    for name in losses:
        known = losses[name].dropna()
        before, after = known.get("before"), known[known.index != "before"]
        of = "" if name == "held-out loss" else f" on {name}"
        if after.empty:
            continue
        last = f"{number_text(after.iloc[-1], 4)} after {after.index[-1]}"
        if before is None:
            texts.append(f"Held-out loss{of}: {last}; that before training was not measured.")
            continue
        rose = rose or after.iloc[-1] > before
        best = (
            f", lowest after {after.idxmin()} ({number_text(after.min(), 4)})"
            if after.idxmin() != after.index[-1]
            else ""
        )
        texts.append(
            f"Held-out loss{of}: {number_text(before, 4)} before training, {last}{best}; nats per token, low is good."
        )
    return " ".join(texts) or "No held-out loss was measured, so it is not known what training changed.", rose


def _steps_of_run(data: ReportData, by_score: list[dict[str, Any]]) -> list[tuple[str, str]]:
    settings = data.history.settings
    folder = data.folder.parent if data.folder.name == FOLDER else data.folder
    steps = []
    if by_score:
        gathers = " with the highest scores, below: noise gathers there" if data.score in SCORE_EQUATIONS else ", below"
        read = f"Read the kept rows{gathers}. More of them:"
        steps.append((read, f"ifd-trainer report {shlex.quote(str(folder))} --rows 50"))
        if "guard" in settings and not guards_of(settings):
            guard = "Let guards keep noise out, in a script by guard=True, with a recipe by:"
            steps.append((guard, _train("--guards auto")))
        random = "Hold the run against as many random rows, in a script by policy=RandomRows(), with a recipe by:"
        steps.append((random, _train("--policy random --output_dir runs/random")))
    if held_out_losses(data.history).empty:
        loss = "See what training changes: give the trainer an eval_dataset and eval_strategy='epoch', a recipe:"
        steps.append((loss, _train("--eval_dataset HELD_OUT.jsonl --eval_strategy epoch")))
    return steps


def _train(options: str) -> str:
    return f"ifd-trainer train RECIPE.yaml {options}"


# ---- of scored rows ---------------------------------------------------------------------------------------------


def _of_scores(data: ReportData) -> Summary:
    rows, score = data.last, data.score
    values, name = rows[score].dropna(), SCORE_NAMES[score]
    if values.empty:
        return Summary(False, f"No row of {len(rows):,} has a score.", [_unscored(rows)])
    limited = score in SCORE_EQUATIONS
    over = int((values >= 1).sum()) if limited else 0
    worries = ["for most rows the prompt does not help"] if over > len(values) / 2 else []
    worries += ["most rows have no score"] if len(values) < len(rows) / 2 else []
    verdict = f"{len(values):,} of {rows_text(len(rows))} {_have(len(values))} a score"
    if "kept" in rows:
        kept, how = int(rows["kept"].sum()), how_kept(rows, score)
        verdict = f"{kept:,} of {rows_text(len(rows))} {_are(kept)} kept{how}"
    verdict += f", but {listed(worries)}." if worries else "."
    share = percent_text(over / len(values))
    middle = f"The median {name} is {number_text(values.median())}."
    rho = rank_correlation(rows["answer_tokens"].where(rows["answer_tokens"] > 0), rows[score])
    if rho is not None and abs(rho) > 0.3:
        longer = "higher" if rho > 0 else "lower"
        middle += f" Longer answers have {longer} scores: rank correlation {number_text(rho, 2)} (0 would be none)."
    above = (
        f"{rows_text(over)} ({share} of those with a score) {_are(over)} at 1 or more: the prompt does not help, and a "
        "selection leaves them out."
    )
    points = [_unscored(rows), *([above] if limited else []), middle]
    return Summary(not worries, verdict, points, _steps_of_scores(data))


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _unscored(rows: pd.DataFrame) -> str:
    counts = rows.loc[rows["ifd_status"] != "ok", "ifd_status"].value_counts()
    if counts.empty:
        return "Every row has a score."
    why = listed(
        [f"{count:,} ({MEANINGS.get(status, status).removeprefix('no score: ')})" for status, count in counts.items()]
    )
    return f"{rows_text(int(counts.sum()))} without a score: {why}."


def _steps_of_scores(data: ReportData) -> list[tuple[str, str]]:
    file, measured = data.origin.file, data.origin.measured
    if "kept" in data.last:
        gathers = " with the highest scores, below: noise gathers there" if data.score in SCORE_EQUATIONS else ", below"
        steps = [(f"Read the kept rows{gathers}.", "")]
        return [
            *steps,
            ("Train on them, with any trainer, or:", "ifd-trainer train RECIPE.yaml --dataset_name SELECTED"),
        ]
    limited = data.score in SCORE_EQUATIONS
    gathers = "the highest scores below 1, below: noise gathers there." if limited else "the highest scores, below."
    steps = [(f"Read the rows with {gathers}", "")]
    if file and limited and not measured and data.origin.single:
        steps.append(("Measure how noise scores, for a limit that keeps it out:", _score_again(data, file)))
    steps.append(
        (
            f"Select, by a share of all rows (5 % here){', without noise' if measured and limited else ''}:",
            select_command(data, 0.05, guarded=measured and limited),
        )
    )
    return steps


def _score_again(data: ReportData, file: str) -> str:
    model = data.origin.model or "MODEL"
    source = data.origin.source or "ROWS"
    known = data.origin.definition if data.origin.definition in DEFINITIONS else "paper"
    options = data.origin.options
    if options is None:
        options = [] if known == "paper" else ["--definition", known]
    words = ["ifd-trainer", "score", source, "--model", model, *options, "--output", file, "--calibrate"]
    return shlex.join(words)


def select_command(data: ReportData, share: float, guarded: bool = False) -> str:
    """The command line that keeps a share of these rows, or of what guards leave of them."""
    file = shlex.quote(data.origin.file or "SCORED.parquet")
    known = KNOWN_DEFINITIONS.get(data.origin.definition)
    score = "" if data.score == (known.ranked_by if known else "ifd") else f" --score {data.score}"
    ends = " --drop-unfinished" if data.origin.definition in (None, "paper") else ""  # others have no end of turn
    noise = f" --max-ifd calibrated{ends} --drop-duplicates" if guarded else ""
    return f"ifd-trainer select {file} --keep {share:g}{score}{noise} --output cherry.jsonl"


def cuts(data: ReportData) -> list[tuple[float, int, str]]:
    """For shares of all rows: (share, rows, where they cut), of an IFD below 1; "only N rows" where there are fewer."""
    values, limited = data.last[data.score], data.score in SCORE_EQUATIONS
    eligible = (values[values < 1] if limited else values.dropna()).sort_values(ascending=False)
    lines: list[tuple[float, int, str]] = []
    for share in SHARES:
        wanted = max(1, round(share * len(values)))
        enough = wanted <= len(eligible)
        cut = (
            number_text(eligible.iloc[wanted - 1], 4, below=1.0 if limited else None)
            if enough
            else f"only {many(len(eligible), 'row')}{' below 1' if limited else ''}"
        )
        lines.append((share, wanted, cut))
    return lines


def quantiles(frame: Mapping[str, pd.Series]) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of a table: at how many per cent of the rows each number is at most what."""
    levels = (0.0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
    names = {0.0: " (lowest)", 0.5: " (median)", 1.0: " (highest)"}
    digits = {name: 0 if name == "answer_tokens" else 3 for name in frame}
    headers = ["of the rows", *(SCORE_NAMES.get(name, name.replace("_", " ")) for name in frame)]
    lines = [
        [f"{100 * level:g} %{names.get(level, '')}"]
        + [number_text(values.quantile(level), digits[name]) for name, values in frame.items()]
        for level in levels
    ]
    return headers, lines
