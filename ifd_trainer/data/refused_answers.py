"""Answers in which an assistant refuses, or speaks of itself as a language model: told by a few phrases, no model.

The experiments of arXiv 2308.12032 on WizardLM data leave out rows whose answer holds such boilerplate. The phrases
here are this project's own choice, English only. Whoever needs other ones filters before scoring.
"""

from __future__ import annotations

import re
import sys
from functools import cache

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from .formats import PromptFormat
from .readable_text import answers_of, text_sources
from .table_reader import TableReader

# Anywhere in an answer: a model that speaks of itself.
SELF_REFERENCES = (
    *("as an ai language model", "as an ai model", "as an ai assistant", "as an ai chatbot", "as an ai text-based"),
    *("as an ai, i", "as an artificial intelligence, i", "as an artificial intelligence language model"),
    *("as a language model, i", "as a large language model"),
    *("i am an ai language model", "i'm an ai language model", "i am just an ai", "i'm just an ai"),
    *("with a gpt language model", "for a gpt language model", "<nooutput>"),  # Alpaca's, of tasks without an answer
)
# At the start of an answer only: further on, a story or a letter may say the same.
OPENINGS = (
    *("i'm sorry, but i", "i am sorry, but i", "i'm sorry, i can't", "i'm sorry, i cannot", "i am sorry, i cannot"),
    *("sorry, but i can't", "sorry, but i cannot", "sorry, i can't", "sorry, i cannot", "i apologize, but i"),
    *(f"i {cannot} {do}" for do in ("assist", "help with", "fulfill", "provide") for cannot in ("cannot", "can't")),
    *("i'm unable to", "i am unable to", "i'm not able to", "i am not able to"),
)
_APOSTROPHE = "‘’ʼ＇`´′"
_APOSTROPHES = re.compile(f"[{_APOSTROPHE}]")
_SELF_REFERENCE = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, SELF_REFERENCES))})(?!\w)")
_OPENING = re.compile(rf"(?:{'|'.join(map(re.escape, OPENINGS))})(?!\w)")


def looks_like_refusal(answer: str) -> bool:
    """Whether an answer opens with one of `OPENINGS` or holds one of `SELF_REFERENCES` as whole words.

    Upper and lower case, kinds of apostrophes and of white space do not matter.

    >>> looks_like_refusal("I\N{RIGHT SINGLE QUOTATION MARK}m sorry, but I cannot help with that.")
    True
    >>> looks_like_refusal("As an AI researcher, she wrote: I'm sorry, but I cannot come.")
    False
    """
    text = " ".join(_APOSTROPHES.sub("'", answer).casefold().split())
    return bool(_OPENING.match(text) or _SELF_REFERENCE.search(text))


def may_refuse(answers: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Which of n texts hold one of the phrases at all, (n,) bool, without a Python object for each of them.

    All that `looks_like_refusal`, which says more and takes longer, are among them.

    >>> may_refuse(pa.array(["She said: sorry, but I can't.", "Paris.", None])).tolist()
    [True, False, False]
    """
    matches = pc.match_substring_regex(answers, _superset())
    return pc.fill_null(matches, False).to_numpy(zero_copy_only=False)


def refused_rows(rows: TableReader, format: PromptFormat | None = None) -> np.ndarray:
    """Which of n rows have an answer that looks like a refusal, (n,) bool; see `looks_like_refusal`.

    Args:
        rows: the data set.
        format: how its rows are read; told from the names of its columns by default.

    Raises:
        ValueError: when the rows have no texts of a known kind.
    """
    sources = text_sources(rows.column_names, format)
    if not sources:
        answers_of(pd.DataFrame(columns=rows.column_names))  # raises, and says what is wanted
    refused = [np.zeros(0, dtype=bool)]
    for table in rows.tables(sources):
        doubtful = np.ones(len(table), dtype=bool)
        if pa.types.is_string(table.schema.field(sources[-1]).type):
            doubtful = may_refuse(table[sources[-1]])
        answers = answers_of(table.filter(pa.array(doubtful)).to_pandas(), format)
        doubtful[doubtful] = [looks_like_refusal(answer) for answer in answers]
        refused.append(doubtful)
    return np.concatenate(refused)


@cache
def _superset() -> str:
    """The phrases as one pattern, with any white space and apostrophe; or a character that folds to ASCII ones."""
    codes = range(sys.maxunicode + 1)
    space = "[" + "".join(f"\\x{{{code:x}}}" for code in codes if chr(code).isspace()) + "]+"
    phrases = "|".join(re.escape(phrase) for phrase in SELF_REFERENCES + OPENINGS)
    phrases = phrases.replace("\\ ", space).replace("'", f"['{_APOSTROPHE}]")
    folds = "".join(chr(code) for code in codes[128:] if any(part.isascii() for part in chr(code).casefold()))
    return f"(?i:{phrases})|[{folds}]"
