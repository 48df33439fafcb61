"""Scores that are attached when they are asked for by name: what each means, and which losses it follows from.

A further score is an equation (`equations.OF_LOSSES`) of mean losses, in nats per token, of parts of a row:

    cas, das      the answer, given its prompt and alone: measured of every row
    prompt        the prompt's tokens after the first; the prompt begins what `cas` reads, and shares its forward
    rcas, rdas    the instruction, given the answer and a request to guess it, and alone: two forwards more

Where every answer of a conversation is scored, so are its further scores, in columns of lists (`turn_column`). The
prompt and the instruction of an answer are what was said since the answer before it; see `data.further_segments` and
`data.reversed_rows`.

Names and texts alone, so that the command line can show them at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from .columns import IFD_COLUMNS

PROMPT, REVERSED, REVERSED_DIRECT = "prompt", "rcas", "rdas"  # losses that are measured for further scores alone
LOSS_CHANGE = "loss_change"
RECENT_CHANGE = "recent_loss_change"


@dataclass(frozen=True)
class FurtherScore:
    """A score beyond those that are always there.

    Attributes:
        meaning: what it is, in a sentence.
        of: the losses that its equation takes, in their order; none for a score of a run, which no single scoring has.
        brings: scores that are attached with it.
    """

    meaning: str
    of: tuple[str, ...] = ()
    brings: tuple[str, ...] = ()


FURTHER = {
    "ira": FurtherScore(
        "das - cas, what the prompt tells of the answer, nats per token (IRA, arXiv 2410.11540)", ("cas", "das")
    ),
    "answer_ppl": FurtherScore("exp(cas), perplexity of the answer given the prompt", ("cas",)),
    "direct_ppl": FurtherScore("exp(das), perplexity of the answer alone", ("das",)),
    "prompt_ppl": FurtherScore("perplexity of the prompt, its template included, after its first token", (PROMPT,)),
    "rifd": FurtherScore(
        "rcas / rdas, reversed IFD: below 1 the answer tells of its instruction, low is good (arXiv 2402.10110)",
        (REVERSED, REVERSED_DIRECT),
        brings=("rcas", "rdas"),
    ),
    "rcas": FurtherScore(
        "mean loss of the instruction given the answer and a request to guess it, nats per token", (REVERSED,)
    ),
    "rdas": FurtherScore("mean loss of the instruction alone, nats per token", (REVERSED_DIRECT,)),
    LOSS_CHANGE: FurtherScore(
        "cas less the cas of the row's first scoring in the run, nats per token: below 0 the answer became easier; in "
        "training alone"
    ),
    RECENT_CHANGE: FurtherScore(
        "cas less the cas of the run's scoring before, nats per token: above 0 the answer became harder; in training "
        "alone"
    ),
}
OF_A_RUN = (LOSS_CHANGE, RECENT_CHANGE)  # which compare the scorings of a run
SCORED_BY_MODEL = tuple(name for name, score in FURTHER.items() if score.of)  # all that a single scoring can give


def further_names(scores: str | Iterable[str] | None, in_training: bool = False) -> tuple[str, ...]:
    """Further scores by name, each once, in the order of `FURTHER`, with what they bring.

    Columns that are always there may be named, and need no asking.

    Args:
        scores: names; a text of several has commas or spaces between them.
        in_training: whether scores of a run are known too.

    Raises:
        UserError: for a name that is no score's.

    >>> further_names("rifd, ifd ira")
    ('ira', 'rifd', 'rcas', 'rdas')
    """
    names = scores.replace(",", " ").split() if isinstance(scores, str) else list(scores or ())
    known = tuple(FURTHER) if in_training else SCORED_BY_MODEL
    for name in names:
        if name in known or name in IFD_COLUMNS:
            continue
        if name in OF_A_RUN:
            raise UserError(f"scores: {name} compares the scorings of a run, so it is one of the callback's alone.")
        near = difflib.get_close_matches(str(name), [*known, *IFD_COLUMNS], n=1)
        hint = f", did you mean {near[0]!r}?" if near else "."
        raise UserError(
            f"scores: {name!r} is no score{hint} Known are {', '.join(known)}; always there are "
            f"{', '.join(IFD_COLUMNS)}."
        )
    wanted = {one for name in names if name in FURTHER for one in (name, *FURTHER[name].brings)}
    return tuple(name for name in FURTHER if name in wanted)


def losses_read(names: Iterable[str]) -> frozenset[str]:
    """The losses beside `cas` and `das` that further scores follow from.

    >>> sorted(losses_read(["ira", "prompt_ppl", "rcas"]))
    ['prompt', 'rcas']
    """
    return frozenset(loss for name in names for loss in FURTHER[name].of) - {"cas", "das"}


def turn_column(name: str) -> str:
    """The column of lists with a score of each answer of a conversation.

    >>> turn_column("rifd")
    'turn_rifd'
    """
    return f"turn_{name}"


def replaced_columns(present: Iterable[str], further: Iterable[str]) -> list[str]:
    """Further scores among the columns of a data set that a new scoring takes the place of.

    Those that it gives, `further`; and, of rows that were scored before, those of that scoring: without a scoring, a
    column of such a name is the data set's own.

    >>> replaced_columns(["ifd_status", "ira", "text"], []), replaced_columns(["ira", "text"], [])
    (['ira'], [])
    """
    present = list(present)
    of_rows = SCORED_BY_MODEL if "ifd_status" in present else ()
    stale = {*further, *of_rows, *map(turn_column, of_rows)}
    return [name for name in present if name in stale]
