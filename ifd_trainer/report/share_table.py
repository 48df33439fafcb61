"""The shares of a column's values that followed their held-out losses, epoch by epoch; see `method.bad_cases`."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from ..training.history import History
from .score_frames import MISSING, count_text, number_text, percent_text


def share_cells(history: History) -> tuple[list[str], list[list[str]]] | None:
    """Headers and lines of `share_table`; None for a run whose shares followed no loss."""
    told = {record["epoch"]: record["bad_cases"] for record in history.epochs if record.get("bad_cases")}
    if not told:
        return None
    values = sorted({value for each in told.values() for value in each["shares"]})
    lines = [
        [
            str(epoch),
            *(
                f"{percent_text(each['shares'].get(value))} ({count_text(each['rows'].get(value, 0))}), loss "
                f"{number_text(each['losses'].get(value), 3)}"
                for value in values
            ),
        ]
        for epoch, each in told.items()
    ]
    return ["epoch", *values], lines


def shares_by(history: History) -> str:
    """The column whose values have these shares."""
    return next((record["bad_cases"]["by"] for record in history.epochs if record.get("bad_cases")), MISSING)


def share_table(history: History) -> Table | None:
    """The share of the kept rows of each value, its rows, and the held-out loss that the share came from.

    None for a run whose shares followed no loss.

    >>> from rich import print
    >>> print(share_table(History.load("outputs/run")))  # doctest: +SKIP
    """
    if (cells := share_cells(history)) is None:
        return None
    table = Table(title=Text(f"Shares by {shares_by(history)}"), box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.caption, table.caption_justify = Text(SHARES), "left"
    for header in cells[0]:
        table.add_column(Text(header), justify="right")
    for line in cells[1]:
        table.add_row(*map(Text, line))
    return table


SHARES = (
    "The share of the kept rows, how many that are, and the held-out loss when they were selected, nats per token: the "
    "higher, the more rows. Without a loss, a value has its share of the pool."
)
