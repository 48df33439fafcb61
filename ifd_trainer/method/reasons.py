"""Why a row is trained on, is not, or has no score: every reason there is, with its sentence for a reader.

A status says whether a row has a score; a reason says what became of it. Every row has one: a row without a score is
dropped for its status.
"""

from __future__ import annotations

from enum import Enum

from .number_words import many


class Status(str, Enum):
    """Why a row has no score; `OK` if and only if it has one."""

    OK = "ok"
    EMPTY_ANSWER = "empty_answer"  # no answer token, or white space alone
    NO_HEADER = "no_header"  # all of it is trained on, and nothing in it says where an answer begins
    EMPTY_PROMPT = "empty_prompt"  # nothing is asked: neither instruction nor input, or no message before the answer
    TOO_SHORT = "too_short"  # fewer answer tokens than the definition or `min_answer_tokens` wants
    TRUNCATED = "truncated"  # the answer does not fit in max_length
    PROMPT_TOO_LONG = "prompt_too_long"  # no answer token fits in max_length
    NONFINITE = "nonfinite"  # the model gave NaN or infinity, or a direct score of zero
    MALFORMED = "malformed"  # the format cannot render the row
    UNREADABLE_IMAGE = "unreadable_image"  # of a row with images: one of them is not there, or no image
    TOO_MANY_IMAGES = "too_many_images"  # more than are taken, or so many that their tokens fill max_length
    NO_IMAGE = "no_image"  # the direct score leaves out the image alone, and the row has none

    def __str__(self) -> str:
        return self.value


FAILED = "failed"  # status of imported scores: the program that scored the row gave up on it and wrote zeros
NOT_SCORED = "not_scored"  # status in an epoch for which no row is scored, since nothing reads the scores

KEPT = "kept"
RELAXED = "kept_above_limit"  # kept although its score is at or above the limit: on_shortfall="relax"
ABOVE_LIMIT = "above_limit"  # score >= max_ifd: the prompt does not help
BELOW_CUT = "below_cut"  # eligible, but the budget was spent on harder rows
REDUNDANT = "redundant"  # among the candidates of a diverse selection, but others stand for it
OTHER_TIER = "other_tier"  # among the rows of a curriculum, but not in this epoch's tiers
OTHER_STAGE = "other_stage"  # with another value of a column than this epoch trains on
EARLIER_PART = "earlier_part"  # of an epoch in parts: it trained on the row before
NOT_IN_SAMPLE = "not_in_sample"  # in an epoch that trains on a sample drawn without scores: the brief experience
NOT_DRAWN = "not_drawn"  # rows were drawn at random, and this one was not
SHORTER_ANSWER = "shorter_answer"  # the budget was spent on longer answers
HIGHER_SCORE = "higher_score"  # the budget was spent on easier rows
UNSTABLE = "unstable"  # among the candidates, but other scores change less when rows are disturbed
LESS_ALIKE = "less_like_targets"  # the budget was spent on rows that are more like the examples of a target set
OTHER_GROUP = "other_group"  # of a bandit over groups of rows: this one was not drawn
TRAINED_ENOUGH = "trained_enough"  # trained on as often as a policy wants before others are
HIDDEN = "hidden"  # of a policy that trains on all rows but the learnt ones: this one is
LESS_PREFERRED = "less_preferred"  # of a cascade: other rows have higher values in the column that comes first
OUTSIDE_BAND = "outside_band"  # score outside the percentiles that were asked for, or the budget was spent
UNFINISHED = "unfinished"  # of a guard: the answer stops before its end
DUPLICATE = "duplicate"  # of a guard: another row says the same
MISMATCHED = "mismatched"  # of a guard: the answer fits other prompts as well as its own
OVER_QUOTA = "over_quota"  # eligible, but other rows with the same value fill its quota
NO_VALUE = "no_value"  # a column that rows are ranked by holds no number in this row
REFUSAL = "refusal"  # the answer looks like a refusal
LENGTH = "length_outlier"  # of a gate: far from the lengths of the examples
NEAR_EMPTY = "near_empty"  # of a gate: the answer has no letter and no digit
BOILERPLATE = "boilerplate"  # of a gate: a greeting, a refusal, or a piece of a prompt's template
REPETITIVE = "repetitive"  # of a gate: the answer repeats itself
ECHO = "echoes_prompt"  # of a gate: the answer is the prompt again
COPY = "copy_of_example"  # of a gate: an example that rows were generated from says the same
MATCHED = "matched"  # of a gate: the model scores the answer as its own
GATE_REASONS = (LENGTH, NEAR_EMPTY, BOILERPLATE, REPETITIVE, ECHO, COPY, MATCHED)  # and DUPLICATE

# In the order in which tables and plots show them.
MEANINGS = {
    KEPT: "kept",
    RELAXED: "kept, though at or above the limit",
    BELOW_CUT: "dropped: below the cut",
    OVER_QUOTA: "dropped: the quota of its value is filled",
    REDUNDANT: "dropped: other rows stand for it",
    OTHER_TIER: "not in this epoch's tiers",
    OTHER_STAGE: "not of this epoch's values",
    EARLIER_PART: "trained on in an earlier part of the epoch",
    NOT_IN_SAMPLE: "not in the sample of the brief experience",
    ABOVE_LIMIT: "dropped: at or above the limit",
    MISMATCHED: "dropped: the answer fits other prompts as well",
    UNFINISHED: "dropped: the answer is unfinished",
    DUPLICATE: "dropped: another row says the same",
    NOT_DRAWN: "not drawn",
    SHORTER_ANSWER: "dropped: other answers are longer",
    HIGHER_SCORE: "dropped: other rows have lower scores",
    OTHER_GROUP: "of a group of rows that was not drawn",
    TRAINED_ENOUGH: "trained on often enough, and others are not",
    HIDDEN: "hidden: its loss is low, and others are not learnt yet",
    UNSTABLE: "dropped: the scores of other candidates change less among their neighbours",
    OUTSIDE_BAND: "dropped: outside the band of scores",
    LESS_ALIKE: "dropped: other rows are more like the targets",
    LESS_PREFERRED: "dropped: other rows have higher values in the column that comes first",
    REFUSAL: "dropped: the answer looks like a refusal",
    LENGTH: "dropped: its length is far from that of the examples",
    NEAR_EMPTY: "dropped: the answer is next to empty",
    BOILERPLATE: "dropped: the answer is a greeting, a refusal, or holds a piece of a template",
    REPETITIVE: "dropped: the answer repeats itself",
    ECHO: "dropped: the answer is the prompt again",
    COPY: "dropped: an example says the same",
    MATCHED: "dropped: the model scores the answer as its own",
    Status.EMPTY_ANSWER.value: "no score: the answer has no token",
    Status.NO_HEADER.value: "no score: nothing in the row says where an answer begins",
    Status.EMPTY_PROMPT.value: "no score: nothing is asked, the prompt is blank",
    Status.TOO_SHORT.value: "no score: too few answer tokens",
    Status.TRUNCATED.value: "no score: the answer does not fit in max_length",
    Status.PROMPT_TOO_LONG.value: "no score: the prompt fills max_length",
    Status.NONFINITE.value: "no score: the loss is not finite, or the direct score is 0",
    Status.MALFORMED.value: "no score: the format cannot render the row",
    Status.UNREADABLE_IMAGE.value: "no score: an image cannot be read",
    Status.TOO_MANY_IMAGES.value: "no score: more images than are taken, or than fit in max_length",
    Status.NO_IMAGE.value: "no score: it has no image, and the image's part is asked for",
    NO_VALUE: "no score: a column that is ranked by holds no number",
    FAILED: "no score: the program that scored gave up on the row",
    NOT_SCORED: "no score: nothing was scored in this epoch",
}

_NOISE = {ABOVE_LIMIT: "at or above the limit", MISMATCHED: "mismatched", UNFINISHED: "unfinished"}


def counted_noise(reason: str, count: int) -> str:
    """How many rows guards held back for a reason, in a list of such.

    >>> counted_noise(UNFINISHED, 22), counted_noise(DUPLICATE, 1)
    ('22 unfinished', '1 duplicate')
    """
    return many(count, "duplicate") if reason == DUPLICATE else f"{count:,} {_NOISE.get(reason, reason)}"
