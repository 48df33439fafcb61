"""The report: one HTML page about a run or a scored data set, with tables, plots and rows, that needs no other file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..data.atomic import write_atomically
from ..data.definitions import KNOWN_DEFINITIONS
from ..data.format_choice import recorded_format
from ..data.paths import check_folder
from ..data.readable_text import plain
from ..errors import UserError
from ..method.further_scores import FURTHER
from ..method.number_words import many
from ..method.reasons import (
    ABOVE_LIMIT,
    DUPLICATE,
    MEANINGS,
    MISMATCHED,
    NOT_SCORED,
    OTHER_TIER,
    OVER_QUOTA,
    REDUNDANT,
    REFUSAL,
    RELAXED,
    UNFINISHED,
    Status,
)
from ..method.scoring_health import rank_correlation
from ..training.history import History
from .page_parts import Plot, RowTable, rendered, texts_of
from .plots import (
    plot_cas_das,
    plot_further_scores,
    plot_held_out_loss,
    plot_ifd_histogram,
    plot_ifd_length,
    plot_kept_by_label,
    plot_kept_flow,
)
from .report_data import Origin, ReportData, read_report_data
from .score_frames import (
    BESIDE_IFD,
    MISSING,
    SCORE_EQUATIONS,
    SCORE_NAMES,
    count_text,
    cut_of,
    epoch_name,
    further_columns,
    held_out_losses,
    how_kept,
    merged,
    number_text,
    percent_text,
    record_name,
    rows_text,
)
from .share_table import SHARES, share_cells, shares_by
from .summary import cuts, quantiles, select_command, summary_of
from .tables import before_cells, epoch_cells, epoch_notes, guard_cells, label_cells, label_shares, restart_line
from .wording import TURN_WORDS, EpochKinds, column_words, frozen_since, settings_in_words


def write_report(
    source: History | pd.DataFrame | str | os.PathLike | Any,
    folder: str | os.PathLike | None = None,
    *,
    label: str | None = None,
    texts: pd.DataFrame | Any | None = None,
    rows: int = 10,
    origin: Origin | None = None,
) -> Path:
    """Write `report.html`, which needs no other file, and its plots as PNG files in `report_files` beside it.

    Args:
        source: a `History`, the folder of a run or of its history, the folder that `ifd-trainer select` wrote, or a
            data frame or data set with the columns of `IFDScorer` (and `reason` or `ifd_reason`, if rows were
            selected).
        folder: where the report goes; by default the source's folder, or `ifd_report` for a data set.
        label: a column whose values are compared by the share of their rows that was kept; by default `quality` or
            `label`, if there is one.
        texts: a data frame or data set with the rows' texts (prompt and answer or completion; instruction, input and
            output; or messages) and other columns, for sources that have none; rows are matched by `row_id` or `id`.
        rows: most rows in each table of rows.
        origin: where rows that belong to no run come from, as far as it is known.

    Returns:
        The path of `report.html`.

    Raises:
        FileNotFoundError: when a folder holds neither a history nor `train.parquet`.
        ValueError: for rows without IFD columns, an unknown label, or texts that cannot be matched.

    >>> write_report("outputs/run")  # doctest: +SKIP
    PosixPath('outputs/run/ifd_history/report.html')
    """
    if not isinstance(rows, int) or rows < 1:
        raise UserError(f"rows must be a whole number of at least 1, got {rows!r}.")
    if folder is not None:
        check_folder(folder)
    data = read_report_data(source, label, texts, origin)
    folder = Path(folder) if folder is not None else data.folder
    plots = drawn_plots(data) if data.any_score else []
    for plot in plots:
        write_atomically(folder / "report_files" / f"{plot.name}.png", lambda path, png=plot.png: path.write_bytes(png))
    for name in set(_PLOTS) - {plot.name for plot in plots}:
        (folder / "report_files" / f"{name}.png").unlink(missing_ok=True)  # of an earlier report in this place
    page = page_html(data, plots, rows)
    write_atomically(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def page_html(data: ReportData, plots: Sequence[Plot], rows: int) -> str:
    """The page with these plots in it, at most `rows` rows in each table of rows."""
    history = data.history
    content = {
        "title": data.title,
        "summary": summary_of(data),
        "picture": next((name for name in _PLOTS if name in {plot.name for plot in plots}), None),
        "facts": _facts(data),
        "notes": data.notes + _observations(data),
        "scored": data.any_score,
        "any_rows": any(len(rows) for rows in data.epochs.values()),
        "chosen": data.last is not None and "kept" in data.last,
        "score": SCORE_NAMES[data.score],
        "turns": TURN_WORDS.get(data.origin.turns if data.history is None else data.history.settings.get("turns")),
        "limit": " below 1" if data.score in SCORE_EQUATIONS else "",
        "further": [(name, BESIDE_IFD[name]) for name in _listed(data.last)] if data.last is not None else [],
        "epochs": _epoch_grid(history) if history is not None and history.epochs else None,
        "words": column_words,
        "cuts": _cut_lines(data),
        "quantiles": _quantile_cells(data),
        "epoch_notes": " ".join(epoch_notes(history)) if history is not None else "",
        "brief": _brief_section(data, rows),
        "of_history": history is not None,
        "reasons": _reason_cells(data),
        "guards": guard_cells(history) if history is not None else None,
        "shares": share_cells(history) if history is not None else None,
        "shares_by": shares_by(history) if history is not None else "",
        "shares_words": SHARES,
        "plots": {plot.name: plot for plot in plots},
        "label": data.labels.name if data.labels is not None else None,
        "labels": _label_lines(data),
        "sections": _sections(data, rows),
    }
    return rendered(Path(__file__).with_name("report.html.jinja"), content)


def _epoch_grid(history: History) -> tuple[list[str], list[list[str]], dict[int, str]]:
    """Headers and lines of the table of epochs, and what stands between lines, by the line that it precedes."""
    headers, lines = epoch_cells(history)
    kinds, anew = EpochKinds.from_settings(history.settings), restart_line(history)
    for record, line in zip(history.epochs, lines, strict=True):
        kind = kinds.kind(record["epoch"])
        line[0] += f" ({kind})" if kind else ""
    if (before := before_cells(history, headers)) is not None:
        lines, anew = [before, *lines], None if anew is None else anew + 1
    return headers, lines, {} if anew is None else {anew: "Training starts anew from the original weights"}


# ---- what it says ------------------------------------------------------------------------------------------------


def _facts(data: ReportData) -> list[tuple[str, str]]:
    """What this was, in plain words: (name, text)."""
    if data.history is not None:
        return settings_in_words(data.history.settings, data.history.epochs)
    rows, origin = data.last, data.origin
    known = KNOWN_DEFINITIONS.get(origin.definition)
    format = recorded_format(origin.format)
    if format is not None and not isinstance(format, str):
        format = f"{format.name}, of the columns {', '.join(format.columns)}"
    facts = [
        ("File", origin.file),
        ("Scored with", origin.model),
        ("Definition", f"{known.meaning} ({origin.definition})" if known else origin.definition),
        ("Prompt format", format),
        ("Score of several answers", TURN_WORDS.get(origin.turns)),
        ("Program", origin.program),
    ]
    facts = [(name, text) for name, text in facts if text]
    facts += [
        ("Rows", f"{len(rows):,}, of which {rows[data.score].notna().sum():,} have a score"),
        ("Score", SCORE_NAMES[data.score]),
    ]
    if "kept" in rows:
        facts.append(("Kept", f"{rows_text(int(rows['kept'].sum()))}{how_kept(rows, data.score)}"))
    values = rows[data.score]
    if values.notna().any():
        facts.append(("Median and mean score", f"{number_text(values.median())} and {number_text(values.mean())}"))
    return facts


def _observations(data: ReportData) -> list[str]:
    """What a reader should know of these rows before trusting the numbers."""
    notes = []
    records = data.history.epochs if data.history is not None else []
    for record in records:
        budget, kept, shortfall = (record.get(name) or 0 for name in ("budget", "kept", "shortfall"))
        relaxed = (record.get("reasons") or {}).get(RELAXED, 0)
        if shortfall:
            ways = [f"{rows_text(relaxed)} at or above the limit"] if relaxed else []
            ways += [many(budget - kept, "repeat")] if budget > kept else []
            notes.append(
                f"{record_name(record).capitalize()}: {many(budget, 'row was', 'rows were')} planned, "
                f"{many(budget - shortfall, 'was', 'were')} eligible; the rest was filled with "
                f"{' and '.join(ways) or 'other rows'}."
            )
    notes += [_proxy_note(record) for record in records if record.get("proxy_rows")]
    notes += [
        f"From epoch {epoch} on, rows were scored no more: {why}. They were selected by the scores before."
        for epoch, why in frozen_since(records)
    ]
    for epoch, rows in merged(data.epochs, [data.score]).items():
        scores = rows[data.score].dropna()
        if data.score in SCORE_EQUATIONS and len(scores) and (scores >= 1).mean() > 0.5:
            notes.append(
                f"{epoch_name(epoch, 'In this data set').capitalize()}: {percent_text((scores >= 1).mean())} of the "
                "scored rows are at 1 or more: their prompt does not help. Is the prompt format one the model knows?"
            )
    return notes + _duplicate_note(data)


def _proxy_note(record: Mapping[str, Any]) -> str:
    rho, overlap = record.get("proxy_rank_correlation"), record.get("proxy_overlap")
    return (
        f"The scores were held against those of the model in training on {rows_text(record['proxy_rows'])}: rank "
        f"correlation {number_text(rho, 2)}, and {percent_text(overlap)} of the rows that either would keep are the "
        "same."
    )


def _duplicate_note(data: ReportData) -> list[str]:
    if data.details is None or data.last is None or "answer" not in data.details:
        return []
    texts = data.details[["instruction", "input", "answer"]].fillna("")
    double = texts.duplicated(keep=False) & (texts["answer"] != "")
    if not double.any():
        return []
    note = f"{rows_text(int(double.sum()))} have the same prompt and answer as another row"
    if "kept" in data.last:
        kept = set(data.last.loc[data.last["kept"], "key"]) & set(double.index[double])
        last = data.last_epoch
        which = "last epoch" if last == next(reversed(data.epochs)) else "last epoch with scores"
        where = f" in the {which} ({epoch_name(last)})" if data.history else ""
        note += f"; {len(kept):,} of them {'was' if len(kept) == 1 else 'were'} kept{where}"
    return [note + "."]


def _reason_cells(data: ReportData) -> tuple[list[str], list[list[str]]]:
    """Counts by reason, one column for each epoch; of a data set without reasons, counts by status."""
    if data.history is not None:
        name = data.kinds.name
        counts = {
            record_name(record) if record.get("part") else name(record["epoch"]): record.get("reasons") or {}
            for record in data.history.epochs
        }
        for epoch, rows in data.epochs.items():
            if counts.get(name(epoch)) == {}:
                counts[name(epoch)] = _reason_counts(rows)
    else:
        counts = {"rows": _reason_counts(data.last)}
    words = {Status.OK.value: "has a score"} | MEANINGS
    reasons = set().union(*counts.values())
    order = [*(reason for reason in words if reason in reasons), *sorted(reasons - words.keys())]
    lines = [[words.get(name, name), *(count_text(int(of.get(name, 0))) for of in counts.values())] for name in order]
    return ["outcome", *counts], lines


def _reason_counts(rows: pd.DataFrame) -> dict[str, int]:
    return rows["reason" if "reason" in rows else "ifd_status"].value_counts().to_dict()


def _label_lines(data: ReportData) -> tuple[list[str], list[list[str]]] | None:
    """The kept share of each label (the 30 most frequent), with the median score in the last epoch."""
    if data.labels is None or data.last is None or data.labels.empty:
        return None
    shares = _named_shares(data)
    scores = data.last.set_index("key")[data.score].dropna()
    medians = scores.groupby(data.labels.reindex(scores.index).to_numpy()).median()
    medians.loc["all rows"] = scores.median()
    cells = label_cells(shares)
    shown = cells[:30] + cells[-1:] if len(cells) > 31 else cells
    where = f", {epoch_name(data.last_epoch)}" if data.history is not None else ""
    headers = [str(data.labels.name), "rows", f"median {SCORE_NAMES[data.score]}{where}"]
    headers += [f"kept, {name}" if name != "kept" else name for name in shares.columns[1:]]
    headers = [re.sub(r"epoch (\d)", "epoch\N{NO-BREAK SPACE}\\1", header) for header in headers]
    return headers, [[value, row[0], number_text(medians.get(value)), *row[1:]] for value, row in shown]


def _named_shares(data: ReportData) -> pd.DataFrame:
    """`label_shares`, warm-up epochs named as such."""
    shares = label_shares(data.epochs, data.labels)
    return shares.rename(columns={epoch_name(epoch): data.kinds.name(epoch) for epoch in data.epochs})


def _cut_lines(data: ReportData) -> list[list[str]] | None:
    """Where shares of scored rows would cut, with the command line of each; None of rows that were selected."""
    if data.history is not None or data.last is None or "kept" in data.last or not data.any_score:
        return None
    return [
        [f"{100 * share:g} %", count_text(rows), cut, select_command(data, share)] for share, rows, cut in cuts(data)
    ]


def _quantile_cells(data: ReportData) -> tuple[list[str], list[list[str]]] | None:
    if data.history is not None or data.last is None or not data.any_score:
        return None
    scored = data.last[data.last[data.score].notna()]
    names = list(dict.fromkeys([data.score, "cas", "das", "answer_tokens", *further_columns(scored)]))
    return quantiles({name: scored[name] for name in names if scored[name].notna().any()})


# ---- plots ------------------------------------------------------------------------------------------------------

_PLOTS = ("kept_flow", "ifd_histogram", "held_out_loss", "cas_das", "ifd_length", "further_scores", "kept_by_label")


def drawn_plots(data: ReportData) -> list[Plot]:
    """The plots that these rows allow."""
    epochs, score, kinds = data.scored, data.score, data.kinds
    # The default limit is one of IFDs alone.
    no_limit = score not in SCORE_EQUATIONS and data.max_ifd in (None, 1.0)
    limit = float("inf") if no_limit else data.max_ifd
    chosen = all("kept" in rows for rows in data.epochs.values())
    colors = _colors_in_words(epochs) if chosen else ""
    if len(data.epochs) > len(epochs):
        colors += _left_out(data)
    plots = []
    if chosen and len(data.epochs) > 1:
        sample = [epoch for epoch in data.epochs if kinds.is_brief(epoch)]
        figure = plot_kept_flow(data.epochs, sample=sample, restart=kinds.restart)
        caption = _FLOW_CAPTION + (" Nothing is compared with the brief experience." if sample else "")
        plots.append(Plot.of("kept_flow", "What stays and what changes", caption, figure))
    if data.history is not None and not held_out_losses(data.history).empty:
        figure = plot_held_out_loss(data.history)
        plots.append(Plot.of("held_out_loss", "What training changed", _LOSS_CAPTION, figure))
    if len(epochs) > 5:
        colors += f" Five of {len(epochs)} are shown."
    ends = " The first and the last are shown." if len(epochs) > 2 else ""
    figure = plot_ifd_histogram(epochs, score=score, max_ifd=limit)
    plots.append(Plot.of("ifd_histogram", "Distribution", "How many rows have which score." + colors, figure))
    if any((rows["cas"].notna() & rows["das"].notna()).any() for rows in epochs.values()):
        figure = plot_cas_das(epochs, score=score, max_ifd=limit)
        caption = _CAS_DAS_CAPTION + (_NEAR_THE_LINE if score in SCORE_EQUATIONS else "") + "." + ends
        plots.append(Plot.of("cas_das", "With and without the prompt", caption, figure))
    if any((rows["answer_tokens"] > 0).any() for rows in epochs.values()):
        figure = plot_ifd_length(epochs, score=score)
        plots.append(Plot.of("ifd_length", "Score and answer length", _length_caption(epochs, score) + ends, figure))
    if further := further_columns(data.last):
        text = "; ".join(f"{name}: {BESIDE_IFD[name]}" for name in further)
        plots.append(Plot.of("further_scores", "Further scores", f"{text}.", plot_further_scores(data.last)))
    if data.labels is not None and chosen and len(data.labels):
        shares = _named_shares(data)
        figure = plot_kept_by_label(shares)
        plots.append(Plot.of("kept_by_label", f"Kept, by {shares.index.name}", _LABEL_CAPTION, figure))
    return plots


def _colors_in_words(epochs: Mapping[Any, pd.DataFrame]) -> str:
    reasons = set().union(*(rows["reason"] for rows in epochs.values()))
    text = " Blue rows were kept, grey ones not"
    text += "; for light blue ones other rows stand" if REDUNDANT in reasons else ""
    return text + ("; orange ones are at or above the limit." if ABOVE_LIMIT in reasons else ".")


def _left_out(data: ReportData) -> str:
    """Which epochs have no panel of their own, and why."""
    bare = [epoch for epoch, rows in data.epochs.items() if rows[data.score].isna().all()]
    text = " Epochs with the same scores and the same rows kept are drawn once."
    text = text if any(isinstance(epoch, str) for epoch in data.scored) else ""
    if bare:
        listed = " and ".join(filter(None, [", ".join(map(str, bare[:-1])), str(bare[-1])]))
        text += f" Epoch{'s' if len(bare) > 1 else ''} {listed} went without scores."
    return text


_FLOW_CAPTION = (
    "Above the axis, the rows that an epoch trains on; below it, rows that the epoch before trained on and this one "
    "does not. Tall blue parts mean that scoring again changed little."
)
_LOSS_CAPTION = (
    "The mean loss on rows that were never trained on, in nats per token: it falls while training helps, and rises "
    "where the model learns its training rows by heart."
)
_CAS_DAS_CAPTION = (
    "Each point is a row. Further to the right the answer is harder to predict alone, further up it is harder to "
    "predict after its prompt. Above the solid line the prompt does not help"
)
_NEAR_THE_LINE = "; rows near it have the highest scores"
_LABEL_CAPTION = (
    "Of each label's rows, the share that was kept. Bars that pass the dashed line belong to labels that are kept "
    "more often than the pool as a whole."
)


def _length_caption(epochs: Mapping[Any, pd.DataFrame], score: str) -> str:
    ends = dict.fromkeys([next(iter(epochs)), next(reversed(epochs))])
    values = [
        (epoch, number_text(rank_correlation(rows["answer_tokens"].where(rows["answer_tokens"] > 0), rows[score]), 2))
        for epoch, rows in ((epoch, epochs[epoch]) for epoch in ends)
    ]
    text = " and ".join(value + (f" in {epoch_name(epoch)}" if epoch is not None else "") for epoch, value in values)
    return (
        f"Spearman's rank correlation of score and answer length is {text}. Near 1 the highest scores are those of "
        "the longest answers, near -1 those of the shortest, and near 0 length plays no part."
    )


# ---- rows -------------------------------------------------------------------------------------------------------


_ROW_COLUMNS = {
    "times": "Times: how often the epoch trains on the row.",
    "weight": "Weight: what the row's loss is multiplied by in training.",
    "train loss": "Train loss: mean loss of the row's trained tokens, nats, in the forwards that trained on it.",
    "p value": "P value: of the pairing test, high where the answer fits other prompts as well as its own.",
    "eot loss": "Eot loss: of the end-of-turn token behind the answer, in nats; high where it comes unexpected.",
    "duplicate of": "Duplicate of: the row that says the same and stands for this one.",
}


@dataclass(frozen=True)
class _Section:
    title: str
    tables: list[RowTable]


def _sections(data: ReportData, most: int) -> list[_Section]:
    """Tables of rows: of the last epoch with scores, then of the first. The brief experience has its own."""
    epochs = data.scored or {e: rows for e, rows in data.epochs.items() if not data.kinds.is_brief(e)}
    names = list(dict.fromkeys([*reversed(epochs)][:1] + [*epochs][:1]))
    fewer = " with scores" if data.any_score and set(data.epochs) - set(data.with_scores) else ""
    sections = []
    for name in names:
        rows = epochs[name]
        if rows.empty:
            continue
        which = f" (the {['last', 'first'][len(sections)]}{fewer})" if len(names) > 1 else ""
        tables = [
            _row_table(data, title, part, shown, title == _UNSCORABLE, title not in (_CHOSEN, _LEFT))
            for title, part, shown in _parts(rows, data.score, most)
        ]
        sections.append(_Section(f"Rows of {epoch_name(name)}{which}" if name is not None else "Rows", tables))
    return sections


def _brief_section(data: ReportData, most: int) -> dict[str, Any] | None:
    """The sample of the brief experience: a few of its rows, evenly spread over it."""
    brief = [epoch for epoch in data.epochs if data.kinds.is_brief(epoch)]
    if not brief:
        return None
    rows = data.epochs[brief[0]]
    sample = rows[rows["kept"]] if "kept" in rows else rows.iloc[:0]
    count = min(most, len(sample))
    shown = sample.iloc[[i * len(sample) // count for i in range(count)]]
    table = _row_table(data, "Rows of the sample", sample, shown, scored=False)
    after = data.kinds.restart is not None
    return {"table": table, "anew": after}


_UNSCORABLE = "Rows without a score"
_CHOSEN, _LEFT = "Rows trained on", "Rows not trained on"  # of an epoch without scores
_DROPPED = {  # for reasons other than their score
    MISMATCHED: "Dropped by a guard: the answer fits other prompts as well",
    UNFINISHED: "Dropped by a guard: the answer is unfinished",
    DUPLICATE: "Dropped by a guard: another row says the same",
    REDUNDANT: "Dropped, for other rows stand for them",
    OTHER_TIER: "In other tiers, highest scores",
    REFUSAL: "Dropped, answers that look like refusals",
    OVER_QUOTA: "Dropped, the quota of their value is filled",
}


def _parts(rows: pd.DataFrame, score: str, most: int) -> list[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """(title, all rows of that kind, those to show) for each table."""
    ranked = rows[rows[score].notna()].sort_values([score, "key"], ascending=[False, True])
    asked = rows["ifd_status"] != NOT_SCORED
    unscored = rows[rows[score].isna() & asked]
    if not asked.all() and "kept" in rows:
        kept, left = rows[rows["kept"]], rows[~rows["kept"] & ~asked]
        parts = [(_CHOSEN, kept, kept.head(most)), (_LEFT, left, left.head(most))]
    elif ranked.empty:
        parts = []
    elif "kept" not in rows and score not in SCORE_EQUATIONS:  # where 1 means nothing
        low = ranked.iloc[most:].tail(most)[::-1]
        parts = [("Highest scores", ranked, ranked.head(most)), ("Lowest scores", ranked, low)]
    elif "kept" not in rows:
        under = ranked[ranked[score] < 1]
        parts = [("Highest scores below 1", under, under.head(most))]
        low = under.iloc[most:].tail(most)[::-1]
        parts.append(("Lowest scores", under, low))
        over = ranked[ranked[score] >= 1]
        parts.append(("Scores of 1 or more: the prompt does not help", over, over.head(most)))
    else:
        kept, above = ranked[ranked["kept"]], ranked[~ranked["kept"] & (ranked["reason"] == ABOVE_LIMIT)]
        special = [name for name in _DROPPED if (ranked["reason"] == name).any()]
        below = ranked[~ranked["kept"] & ~ranked["reason"].isin([ABOVE_LIMIT, *special])]
        best = "highest scores" if cut_of(rows, score) is None else "just below the cut"
        parts = [
            ("Kept, highest scores", kept, kept.head(most)),
            ("Kept, lowest scores", kept, kept.iloc[most:].tail(most)[::-1]),
            (f"Dropped, {best}", below, below.head(most)),
            ("Dropped, at or above the limit", above, above.head(most)),
        ]
        others = [(_DROPPED[name], ranked[~ranked["kept"] & (ranked["reason"] == name)]) for name in special]
        parts += [(title, part, part.head(most)) for title, part in others]
    return [*parts, (_UNSCORABLE, unscored, unscored.head(most))]


def _row_table(
    data: ReportData,
    title: str,
    part: pd.DataFrame,
    shown: pd.DataFrame,
    reason: bool = False,
    scored: bool = True,
) -> RowTable:
    """A table of the rows `shown` of all those in `part`.

    Args:
        reason: with the reason why there is no score, in the place of scores.
        scored: with scores.
    """
    counted = scored or (part["answer_tokens"] > 0).any()
    values = list(dict.fromkeys([data.score, "cas", "das", *_listed(part)])) if scored and not reason else []
    of_guard = _OF_REASON.get(part["reason"].iloc[0]) if "reason" in part and part["reason"].nunique() == 1 else None
    of_guard = of_guard if of_guard in part else None
    repeated = "times" in part and (part["times"] > 1).any()
    of_training = [name for name in ("weight", "train_loss") if name in part and part[name].notna().any()]
    headers = ["row", *(["why"] if reason else []), *(SCORE_NAMES.get(name, name) for name in values)]
    headers += [*([of_guard.replace("_", " ")] if of_guard else [])]
    headers += [*(["tokens"] if counted else []), *(["times"] if repeated else [])]
    headers += [name.replace("_", " ") for name in of_training]
    headers += [str(data.labels.name)] if data.labels is not None else []
    lines = []
    for row in shown.to_dict("records"):
        words = MEANINGS.get(row["ifd_status"], row["ifd_status"]).removeprefix("no score: ")
        cells = [plain(row["row_id"]) or MISSING]
        cells += [*([words] if reason else []), *(_score_text(row[name]) for name in values)]
        cells += [_shown(row[of_guard])] if of_guard else []
        cells += [number_text(row["answer_tokens"], 0)] if counted else []
        cells += [str(row["times"])] if repeated else []
        cells += [number_text(row[name], 3) for name in of_training]
        cells += [str(data.labels.get(row["key"], "(none)"))] if data.labels is not None else []
        lines.append({"cells": cells, "texts": texts_of(data.details, row["key"])})
    words = " ".join(_ROW_COLUMNS[header] for header in headers if header in _ROW_COLUMNS)
    return RowTable(title, len(part), headers, lines, words)


_OF_REASON = {MISMATCHED: "p_value", UNFINISHED: "eot_loss", DUPLICATE: "duplicate_of"}  # what a guard went by


def _listed(rows: pd.DataFrame) -> list[str]:
    """The further scores that tables of rows list: no losses of which another one is made, to leave room for texts."""
    names = further_columns(rows)
    parts = {part for name in names if name in FURTHER for part in FURTHER[name].brings}
    return [name for name in names if name not in parts]


def _score_text(value: float) -> str:
    return number_text(value, 3 if not abs(value) >= 100 else 0)


def _shown(value: Any) -> str:
    return number_text(value, 2) if isinstance(value, float) else str(value)
