"""How far one text agrees with another, between 0 and 1: exact match, ROUGE-L, and the F1 of their words.

- `exact_match` says whether two texts are the same but for what does not count (see `normalised`): of use where answers
  are short, near 0 for all models where they are long.
- `rouge_l` (Lin, Text Summarization Branches Out, 2004) is the F1 of their longest common subsequence of words, as the
  package rouge_score computes it, without stemming.
- `token_f1` (SQuAD, arXiv 1606.05250) is the F1 of their words whatever their order; punctuation and the articles of
  English do not count.

For c words in common (of the subsequence, or counted), of m in the reference and n in the answer, an F1 is

    2 P R / (P + R),    P = c / n,    R = c / m

All take any script: of one without spaces between words (Chinese, Japanese, Thai and others), each character is a word.
"""

from __future__ import annotations

import functools
import string
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeAlias

from ..errors import NotInstalledError, UserError

Agreement: TypeAlias = Callable[[str, str], float]  # of an answer and a reference, in [0, 1]

_QUOTES = {('"', '"'), ("'", "'"), ("`", "`"), ("“", "”"), ("„", "“"), ("„", "”"), ("‘", "’"), ("«", "»"), ("「", "」")}
_ENDS = ".,;:!?。、।۔؟،؛"  # of a sentence or a part of one; what else stands at an end may be what was asked for (5%)
# Scripts that put no space between words: each character counts as one, with the marks on it.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORDS = (
    rf"(?V1)[{_UNSPACED}&&\p{{L}}]\p{{M}}*|[[\p{{L}}\p{{N}}]--[{_UNSPACED}]][[\p{{L}}\p{{N}}\p{{M}}]--[{_UNSPACED}]]*"
)
_ARTICLES = {"a", "an", "the"}
# Inside a word SQuAD's measure drops these (don't is dont, 3.5 is 35); an apostrophe may be a curly one.
_DROPPED = str.maketrans("", "", string.punctuation + "’‘")
# Of what is left, words: other punctuation parts them, signs such as an emoji or a currency's are of them.
_BETWEEN = rf"(?V1)[{_UNSPACED}&&\p{{L}}]\p{{M}}*|[^\s\p{{P}}[{_UNSPACED}&&\p{{L}}]]+"


def token_f1(answer: str, reference: str) -> float:
    """The F1 of the words that two texts have in common, each as often as both have it.

    Words are those of SQuAD's measure: lower case, without punctuation and without English articles. On texts in ASCII
    the value is that measure's. Beyond it, Unicode's compatibility form (NFKC) and case folding come first. Where one
    of the texts has no such word (a sign, an article alone, nothing), it is that of `exact_match`, 0 or 1.

    >>> round(token_f1("The cat sat.", "a cat slept"), 3), token_f1("-", "+"), token_f1("A", "A.")
    (0.5, 0.0, 1.0)
    """
    given, wanted = _f1_words(answer), _f1_words(reference)
    if not given or not wanted:
        return float(exact_match(answer, reference))
    common = (Counter(given) & Counter(wanted)).total()
    return 2 * common / (len(given) + len(wanted))


def exact_match(answer: str, reference: str) -> bool:
    """Whether two answers are the same, `normalised`.

    >>> exact_match('"Paris".', "paris"), exact_match("-5", "5")
    (True, False)
    """
    return normalised(answer) == normalised(reference)


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F1 of an answer and a reference; 0 where one of them has no word.

    Raises:
        NotInstalledError: without the packages rouge_score and regex.

    >>> round(rouge_l("a red dog", "A red cat."), 3)                                                # doctest: +SKIP
    0.667
    """
    return _rouge_scorer().score(target=reference, prediction=answer)["rougeL"].fmeasure


AGREEMENTS: dict[str, Agreement] = {"f1": token_f1, "exact": exact_match, "rouge_l": rouge_l}


def as_agreement(agreement: str | Agreement) -> Agreement:
    """An agreement by its name in `AGREEMENTS`, or one of your own, whose values are checked.

    Raises:
        UserError: for another name, and for what is no callable; on use, for a value outside of [0, 1].

    >>> as_agreement("exact")("Paris.", "paris"), as_agreement(lambda answer, reference: 0.25)("", "")
    (1.0, 0.25)
    """
    if not callable(agreement) and agreement not in AGREEMENTS:
        raise UserError(
            f"agreement must be one of {', '.join(AGREEMENTS)}, or a callable of an answer and a reference with values "
            f"between 0 and 1, got {agreement!r}."
        )
    return functools.partial(_checked, agreement if callable(agreement) else AGREEMENTS[agreement])


def _checked(agreement: Agreement, answer: str, reference: str) -> float:
    value: Any = agreement(answer, reference)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not 0 <= number <= 1:
        raise UserError(f"An agreement is a number between 0 and 1; {agreement!r} returned {value!r}.")
    return number


def normalised(text: str) -> str:
    """A text without what does not count in an exact match.

    Unicode's compatibility form (NFKC); no upper and lower case; white space as single spaces; no quotation marks
    around the whole, and no full stop, comma, colon, semicolon, exclamation or question mark at its end. Other signs
    stay, as they may be what was asked for (-5, 5%, C++). Articles stay too, which SQuAD's measure drops: they are
    those of English.

    >>> normalised(" “The　ＣＡＴ\\nsat!” ")
    'the cat sat'
    """
    text = whole = " ".join(_folded(text).split())
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
    words = _compiled(_WORDS)
    return lambda text: words.findall(_folded(text))


def _f1_words(text: str) -> list[str]:
    words = _compiled(_BETWEEN).findall(_folded(text).translate(_DROPPED))
    return [word for word in words if word not in _ARTICLES]


def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def _compiled(pattern: str) -> Any:
    try:
        import regex
    except ImportError as error:
        raise _missing("regex") from error
    return regex.compile(pattern)  # which remembers it


def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import Tokenizer
    except ImportError as error:
        raise _missing("rouge_score") from error
    split = word_splitter()

    class Words(Tokenizer):
        def tokenize(self, text: str) -> list[str]:
            return split(text)

    return RougeScorer(["rougeL"], tokenizer=Words())


def _missing(package: str) -> NotInstalledError:
    return NotInstalledError(
        f"How far answers agree with those of the rows is measured with the package {package}, which is not installed: "
        "pip install 'ifd_trainer[compare]'."
    )
