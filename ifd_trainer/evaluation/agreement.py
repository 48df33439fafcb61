"""How far answers agree with those of the rows: exact match, and ROUGE-L.

Exact match says whether two answers are the same text but for what does not count (see `normalised`): of use where
answers are short, near 0 for all models where they are long. ROUGE-L (Lin, Text Summarization Branches Out, 2004) is
the F1 of their longest common subsequence of words, as the package rouge_score computes it, without stemming: for an
LCS of l words, of m in the row's answer and n in the model's,

    2 P R / (P + R),    P = l / n,    R = l / m
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from ..errors import NotInstalledError
from ..method.reasons import Status
from .documents import joined, long_form

_QUOTES = {('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"), ("„", "“"), ("„", "”"), ("‘", "’"), ("«", "»"), ("「", "」")}
_ENDS = ".,;:!?。、।۔؟،؛"  # of a sentence or a part of one; what else stands at an end may be what was asked for (5%)
# Scripts that put no space between words: each character counts as one, with the marks on it.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORDS = (
    rf"(?V1)[{_UNSPACED}&&\p{{L}}]\p{{M}}*|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]*"
)


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
    of = _rouge_l(split)
    groups = [None] * len(answers) if groups is None else list(groups)
    answers = answers.assign(group=pd.Series(groups, index=answers.index, dtype=object))
    answers = answers[answers["status"] == Status.OK.value]
    worded = answers[np.array([bool(split(text)) for text in answers["reference"]], dtype=bool)]
    measures = {"exact match": (answers, exact_match), "ROUGE-L": (worded, of)}
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


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same, `normalised`.

    >>> exact_match('"Paris".', "paris"), exact_match("-5", "5")
    (True, False)
    """
    return normalised(answer) == normalised(reference)


def normalised(text: str) -> str:
    """A text without what does not count in an exact match.

    Unicode's compatibility form (NFKC); no upper and lower case; white space as single spaces; no quotation marks
    around the whole, and no full stop, comma, colon, semicolon, exclamation or question mark at its end. Other signs
    stay, as they may be what was asked for (-5, 5%, C++). Articles stay too, which SQuAD's measure drops: they are
    those of English.

    >>> normalised(" “The　ＣＡＴ\\nsat!” ")
    'the cat sat'
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = whole = " ".join(text.split())
    before = None
    while text != before:
        before = text
        text = text.rstrip(_ENDS + " ")
        if len(text) > 1 and (text[0], text[-1]) in _QUOTES:
            text = text[1:-1].strip()
    return text or whole  # nothing but such marks


def word_splitter() -> Callable[[str], list[str]]:
    """A function that splits a text of any language into words, for ROUGE.

    Of ASCII they are those of rouge_score's own tokenizer, which leaves out all else: letters and digits in lower case.
    Of scripts without spaces between words (Chinese, Japanese, Thai and others), each character is one.

    Raises:
        NotInstalledError: without the package regex.
    """
    try:
        import regex
    except ImportError as error:
        raise _missing("regex") from error
    words = regex.compile(_WORDS)

    def split(text: str) -> list[str]:
        return words.findall(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()))

    return split


def _rouge_l(split: Callable[[str], list[str]]) -> Callable[[str, str], float]:
    """ROUGE-L's F1 of an answer and a reference."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("rouge_score") from error

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return split(text)

    scorer = RougeScorer(["rougeL"], tokenizer=Words())
    return lambda answer, reference: scorer.score(target=reference, prediction=answer)["rougeL"].fmeasure


def _missing(package: str) -> NotInstalledError:
    return NotInstalledError(
        f"How far answers agree with those of the rows is measured with the package {package}, which is not installed: "
        "pip install 'ifd_trainer[compare]'."
    )
