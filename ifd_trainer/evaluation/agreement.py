"""How far answers agree with those of the rows, in the long form of measures: exact match, and ROUGE-L.

What the two are, and of what texts, is in `method.text_agreement`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..method.reasons import Status
from ..method.text_agreement import exact_match, rouge_l, word_splitter
from .documents import joined, long_form


def agreement(
    answers: pd.DataFrame, set: str = "held-out rows", groups: Sequence[str | None] | None = None
) -> pd.DataFrame:
    """Exact match and ROUGE-L of answers, in the long form of `documents`; both between 0 and 1, higher is better.

    Answers count as they are, also where they were cut off. Rows without an answer, whose `status` is not "ok", are
    left out, and of ROUGE-L those whose own answer has no word (an emoji, a formula of signs).

    Args:
        answers: what `answers_to` returns.
        set: what the rows are called.
        groups: of each line of `answers`, what it belongs to; see `long_form`.

    Raises:
        NotInstalledError: without the package rouge_score.

    >>> said = pd.DataFrame({"document": ["0"], "reference": ["A red cat."], "answer": ["a red dog"], "status": ["ok"]})
    >>> agreement(said).set_index("measure").value.round(3).to_dict()
    {'exact match': 0.0, 'ROUGE-L': 0.667}
    """
    split = word_splitter()
    groups = [None] * len(answers) if groups is None else list(groups)
    answers = answers.assign(group=pd.Series(groups, index=answers.index, dtype=object))
    answers = answers[answers["status"] == Status.OK.value]
    worded = answers[np.array([bool(split(text)) for text in answers["reference"]], dtype=bool)]
    measures = {"exact match": (answers, exact_match), "ROUGE-L": (worded, rouge_l)}
    return joined(
        [
            long_form(
                set,
                name,
                list(lines["document"]),
                list(map(measure, lines["answer"], lines["reference"])),
                groups=list(lines["group"]),
            )
            for name, (lines, measure) in measures.items()
        ]
    )
