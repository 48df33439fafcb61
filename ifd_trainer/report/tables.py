"""A run in numbers: tables by epoch and by label, for the terminal and for the page.

epoch_table                     what each epoch kept and cost
guard_table                     what the guards held back, and what the scorings are worth
label_table, label_rich_table   of which labels rows were kept
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..data.readable_text import plain
from ..errors import UserError
from ..method.guard import GUARD_REASONS
from ..training.history import History
from .score_frames import (
    MISSING,
    SCORE_NAMES,
    WITHOUT_GUARDS,
    count_text,
    epoch_name,
    number_text,
    percent_text,
    read_epochs,
    record_name,
)
from .wording import EpochKinds, column_words, frozen_since, guards_of, scored_at, scoring_sentence


def epoch_table(history: History) -> Table:
    """What each epoch kept and cost, for the terminal.

    Columns: pool and kept rows, repeats (where a budget was larger than the rows kept), rows trained on (where an epoch
    ended before all of them: the last batch dropped, the end of the run; packed rows with packing), with a curriculum
    the tiers trained on (0 is the one that it begins with), the epoch in which the scores were made (where some are
    older than their epoch, and not all of one), where rows were scored anew under a budget the share of rows with a
    score that were (`fresh`) and the epoch of the oldest score (`oldest`; of epochs in parts the updates before it,
    `oldest step`), mean score of the kept and of the dropped rows, share of the kept rows that the epoch before kept
    too (not for the sample of a brief experience), the lowest score kept, the limit (where it is calibrated), seconds,
    held-out loss of each evaluation set; "-" where a number is not known. A line "start" has the held-out loss before
    training, where it was measured. An epoch in parts has a line for each, "0, part 2", with the numbers of the part
    and, as its pool, the rows that the parts before had left. Epochs of the brief experience are called that; a line
    "anew" stands where training starts anew. Below the table stands what its columns mean, and which model scored.

    >>> from rich import print
    >>> print(epoch_table(History.load("outputs/run")))  # doctest: +SKIP
    """
    headers, rows = epoch_cells(history)
    kinds = EpochKinds.from_settings(history.settings)
    table = _narrow_table("Selection by epoch", headers, epoch_notes(history))
    anew = restart_line(history)
    if (before := before_cells(history, headers)) is not None:
        table.add_row(*before)
    for number, (record, row) in enumerate(zip(history.epochs, rows, strict=True)):
        if number == anew:
            table.add_row("anew", *[""] * (len(headers) - 1))
        kind = {"brief experience": "brief"}.get(kinds.kind(record["epoch"]), kinds.kind(record["epoch"]))
        table.add_row(f"{row[0]} {kind}".strip(), *row[1:])
    return table


def guard_table(history: History) -> Table | None:
    """What the guards held back in each epoch, for the terminal; None for a run without guards.

    Columns: rows dropped by each guard that is on; separation (how often a wrong pair scores higher than a row of the
    pool that was not trained on: 50 % says nothing) and rank correlation with the scoring before; rows that the same
    scores would have kept without guards, and were not kept.
    """
    cells = guard_cells(history)
    if cells is None:
        return None
    notes = [f"Scored no more since epoch {epoch}: {why}." for epoch, why in frozen_since(history.epochs)]
    table = _narrow_table("Kept out by guards", cells[0], notes)
    for row in cells[1]:
        table.add_row(*row)
    return table


def _narrow_table(title: str, headers: list[str], notes: list[str]) -> Table:
    """A table that fits in 80 columns, with what its columns mean below it."""
    words = "\n".join(f"{name}: {text}" for name, text in column_words(headers))
    table = Table(title=title, caption=Text("\n".join(filter(None, [words, " ".join(notes)]))), caption_justify="left")
    table.box, table.pad_edge, table.padding = SIMPLE_HEAD, False, 0
    for header in headers:
        table.add_column(header.replace(" ", "\n"), justify="right", overflow="fold")
    return table


def guard_cells(history: History) -> tuple[list[str], list[list[str]]] | None:
    """Headers and lines of `guard_table`, one line for each epoch that selected; None without guards."""
    on = guards_of(history.settings)
    records = [record for record in history.epochs if scored_at(record) is not None]
    if not on or not records:
        return None
    reasons = [reason for name, reason in GUARD_REASONS.items() if name in on]
    watched = [name for name in ("separation", "rank_correlation") if any(r.get(name) is not None for r in records)]
    without = any(record.get("kept_only_without_guards") is not None for record in records)
    headers = ["epoch", *(reason.replace("_", " ") for reason in reasons), *(n.replace("_", " ") for n in watched)]
    headers += ["replaced"] if without else []
    rows = [
        [_place(record), *(count_text(int((record.get("reasons") or {}).get(r, 0))) for r in reasons)]
        + [number_text(record.get(name), 2) for name in watched]
        + ([count_text(record.get("kept_only_without_guards"))] if without else [])
        for record in records
    ]
    return headers, rows


def label_table(history: History, label: str) -> pd.DataFrame:
    """The share of each label's rows that was kept, epoch by epoch.

    Args:
        history: of a run.
        label: a column of `history.pool()`, for example "quality".

    Returns:
        One row for each value of the label, the most frequent first: `rows` (how many rows of the pool have it) and
        for each epoch with rows on disk a column `epoch 0`, `epoch 1`, ... with values in [0, 1]. Rows without a
        label are counted under "(none)". A row that is repeated in an epoch counts once. Of a run with guards, each
        column is followed by `epoch 0, without guards`: what the same scores would have kept.

    Raises:
        ValueError: when there is no `pool.parquet`, or no such column in it.
    """
    pool = history.pool()
    if pool is None:
        raise UserError(f"{history.folder} holds no pool.parquet, so the rows' labels are not known.")
    if label not in pool:
        raise UserError(f"The pool has no column {label!r}; its columns are {sorted(map(str, pool.columns))}.")
    epochs, _ = read_epochs(history)
    return label_shares(epochs, labels_of(pool[label].set_axis(pool["row_id"].map(str))))


def label_rich_table(history: History, label: str) -> Table:
    """`label_table` for the terminal, with a last line for all rows."""
    shares = label_table(history, label)
    table = Table(title=Text(f"Share of rows kept, by {label}"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    if any(column.endswith(WITHOUT_GUARDS) for column in shares):
        table.caption = "no guard: what the same scores would have kept without guards"
    shared = f"per cent: of the rows with this {label}, how many the epoch trained on"
    table.caption = Text("\n".join(filter(None, [shared, table.caption]))) if len(shares.columns) > 1 else None
    table.caption_justify = "left"
    table.add_column(Text(label), no_wrap=True)
    kinds = EpochKinds.from_settings(history.settings)
    for column in shares.columns:
        kind = next((kinds.kind(e) for e in range(kinds.warmup) if column == epoch_name(e)), "")
        name, guarded, _ = column.partition(WITHOUT_GUARDS)
        second = f"({kind})" if kind else "no guard" if guarded else ""
        table.add_column(f"{name}\n{second}" if second else name, justify="right")
    for value, cells in label_cells(shares):
        table.add_row(Text(value), *cells)
    return table


def epoch_notes(history: History) -> list[str]:
    """What the numbers by epoch do not say by themselves."""
    notes = EpochKinds.from_settings(history.settings).sentences() if history.epochs else []
    if history.epochs and history.epochs[0].get("before_training"):
        notes.insert(0, "The line start is the model before training.")
    return notes + [text for text in [scoring_sentence(history.settings, history.epochs)] if text]


def before_cells(history: History, headers: list[str]) -> list[str] | None:
    """The line of the table of epochs for the model before training; None where its held-out loss is not known."""
    losses = history.epochs[0].get("before_training") if history.epochs else None
    if not losses:
        return None
    known = {"held-out loss": losses.get("eval_loss")}
    known |= {f"loss on {name}": loss for name, loss in (losses.get("eval_losses") or {}).items()}
    return ["start", *(number_text(known.get(header), 4) if header in known else "" for header in headers[1:])]


def restart_line(history: History) -> int | None:
    """The line of the table of epochs before which training started anew, if both sides of it are there."""
    restart = EpochKinds.from_settings(history.settings).restart
    lines = [i for i, record in enumerate(history.epochs) if restart is not None and record["epoch"] >= restart]
    return lines[0] if lines and lines[0] else None


def epoch_cells(history: History) -> tuple[list[str], list[list[str]]]:
    """Headers and lines of the table of epochs, one line for each."""
    score = history.settings.get("score") or "ifd"
    score = SCORE_NAMES.get(score, score)
    kinds, max_ifd = EpochKinds.from_settings(history.settings), history.settings.get("max_ifd")
    repeats = any((record.get("budget") or 0) > (record.get("kept") or 0) for record in history.epochs)
    unfinished = any(_left_out(record) for record in history.epochs)
    tiers = any(record.get("tiers") for record in history.epochs)
    made = {record["epoch"]: scored_at(record) for record in history.epochs}
    made = {epoch: at for epoch, at in made.items() if at is not None}
    scored = len(set(made.values())) > 1 and any(epoch != at for epoch, at in made.items())
    headers = ["epoch", "pool", "kept", *(["repeats"] if repeats else [])]
    headers += [*(["trained"] if unfinished else []), *(["tiers"] if tiers else [])]
    aged = any(record.get("rescore_cost") is not None for record in history.epochs)
    oldest = "oldest" if not any(record.get("part") for record in history.epochs) else "oldest step"
    headers += [*(["scored in"] if scored else []), *(["fresh", oldest] if aged else [])]
    headers += [f"{score} kept", f"{score} dropped", "overlap", "cut"]
    limits = any(record.get("limit") is not None for record in history.epochs)
    headers += ["limit"] if limits else []
    measured = [*history.epochs, *([history.epochs[0].get("before_training") or {}] if history.epochs else [])]
    sets = list(dict.fromkeys(name for record in measured for name in record.get("eval_losses") or ()))
    plain_loss = not sets or any(record.get("eval_loss") is not None for record in measured)
    headers += ["scoring s", "training s", *(["held-out loss"] if plain_loss else [])]
    headers += [f"loss on {name}" for name in sets]
    rows = []
    for record in history.epochs:
        epoch, kept, budget = record["epoch"], record.get("kept"), record.get("budget")
        extra = [count_text(max(budget - kept, 0) if None not in (kept, budget) else None)] if repeats else []
        extra += [count_text(record.get("trained"))] if unfinished else []
        extra += [_tiers_text(record.get("tiers"))] if tiers else []
        extra += [count_text(made.get(epoch))] if scored else []
        age = record.get("oldest_scored_at" if oldest == "oldest" else "oldest_scored_step")
        extra += [percent_text(record.get("fresh")), count_text(age)] if aged else []
        overlap = None if kinds.is_brief(epoch - 1) else record.get("overlap")  # a sample was not selected
        rows.append(
            [_place(record), count_text(record.get("left", record.get("pool"))), count_text(kept), *extra]
            + [number_text(record.get("mean_kept")), number_text(record.get("mean_dropped"))]
            + [percent_text(overlap), number_text(record.get("cut"), below=record.get("limit") or max_ifd)]
            + ([number_text(record.get("limit"))] if limits else [])
            + [number_text(record.get(f"seconds_{part}"), 1) for part in ("scoring", "training")]
            + ([number_text(record.get("eval_loss"), 4)] if plain_loss else [])
            + [number_text((record.get("eval_losses") or {}).get(name), 4) for name in sets]
        )
    return headers, rows


def _place(record: Mapping[str, Any]) -> str:
    return record_name(record).removeprefix("epoch ")


def _left_out(record: dict[str, Any]) -> bool:
    """Whether an epoch ended before it had trained on all rows that were planned."""
    planned = record.get("packed_rows") or record.get("budget")
    return None not in (record.get("trained"), planned) and record["trained"] < planned


def _tiers_text(tiers: list[int] | None) -> str:
    """`1`, or `0-2` for the tiers 0, 1 and 2: those of an epoch follow one another."""
    if not tiers:
        return MISSING
    return str(tiers[0]) if len(tiers) == 1 else f"{tiers[0]}-{tiers[-1]}"


def labels_of(series: pd.Series) -> pd.Series:
    """Values of a column as text; "(none)" where there is none."""
    values = [plain(value) or "(none)" for value in series]
    return pd.Series(values, index=series.index, name=series.name, dtype=object)


def label_shares(epochs: Mapping[Any, pd.DataFrame], labels: pd.Series) -> pd.DataFrame:
    """`label_table` of rows by epoch; `labels` is indexed by the rows' keys."""
    counts = labels.value_counts()
    table = pd.DataFrame({"rows": counts.loc[sorted(counts.index, key=lambda value: (-counts[value], value))]})
    table.index.name = labels.name
    for epoch, rows in epochs.items():
        if "kept" in rows:
            columns = {epoch_name(epoch, "kept"): rows["kept"]}
            if "kept_without_guards" in rows:
                columns[epoch_name(epoch, "kept") + WITHOUT_GUARDS] = rows["kept_without_guards"]
            for name, mask in columns.items():
                kept = labels.reindex(rows.loc[mask, "key"]).value_counts()
                table[name] = kept.reindex(table.index, fill_value=0) / table["rows"]
    return table


def label_cells(shares: pd.DataFrame) -> list[tuple[str, list[str]]]:
    """Lines of a table of shares, each a label and its cells; the last one is for all rows."""
    totals = [(shares[column] * shares["rows"]).sum() / shares["rows"].sum() for column in shares.columns[1:]]
    lines = [
        (value, [count_text(int(row.iloc[0])), *map(percent_text, row.iloc[1:])]) for value, row in shares.iterrows()
    ]
    return [*lines, ("all rows", [count_text(int(shares["rows"].sum())), *map(percent_text, totals)])]
