"""The columns that scoring and selecting add to a data set: each name with a sentence on what it holds.

Names and texts alone, so that the command line can show them at once. The equations are in `equations`, the values of
`ifd_status` and `ifd_reason` in `reasons`.
"""

from __future__ import annotations

EOT_LOSS = "eot_loss"  # scores of an earlier release lack it
SIFD = "sifd"  # made of losses of tokens, not of the two losses
_SCORED = {
    "cas": "conditioned answer score s(A|Q): mean loss of the answer's tokens given the prompt, nats per token",
    "das": "direct answer score s(A): their mean loss without the prompt, nats per token",
    "ifd": "cas / das",
    "ifd_ppl": "exp(cas - das), the ratio of perplexities",
    EOT_LOSS: "loss of the end-of-turn token right behind the answer, nats; null where the answer was cut off",
    "answer_tokens": "number of scored tokens",
    "ifd_status": "`ok`, or why there is no score",
}
_OF_TURNS = {  # lists, an entry for each answer of a conversation
    "turn_cas": "cas of each answer of a conversation, in nats per token; null without a score",
    "turn_das": "das of each",
    "turn_ifd": "ifd of each",
    "turn_tokens": "answer_tokens of each",
    "turn_status": "ifd_status of each",
}
_OF_LAST = {  # what guards judge
    "last_cas": "cas of a row's last answer, where the row's score is of several",
    "last_das": "das of it",
    "last_answer_tokens": "its answer_tokens",
}
_KNOWN = {
    "known": "share of the model's sampled answers that agree with the row's, at least as far as a threshold",
    "known_agreement": "how far they agree with it, on average, between 0 and 1",
    "known_consistency": "how far they agree with one another, on average, between 0 and 1",
    "known_samples": "how many were sampled; 0 for a row that was not asked",
    "known_status": "`ok`, or why the row was not asked",
}
SPIN_GAP, OWN_AGREEMENT = "spin_gap", "own_agreement"
_OWN_ANSWER = {
    SPIN_GAP: "cas - own_cas, how much more the row's answer surprises the model than its own, nats per token",
    "own_cas": "cas of the model's own answer, the mean of several, nats per token",
    OWN_AGREEMENT: "how far its own answer agrees with the row's, between 0 and 1",
    "own_answer": "what the model answers, the first of several",
    "spin_status": "`ok`, or why there is no gap",
}
_REFLECTED = {
    "original_ifd": "ifd of the row as it was",
    "original_rifd": "rifd of the row as it was",
    "instruction_ifd": "ifd of the version with the rewritten instruction and the answer that came with it",
    "instruction_rifd": "rifd of it",
    "answer_ifd": "ifd of the version with the row's instruction and the rewritten answer; null where not asked for",
    "answer_rifd": "rifd of it",
    "reflect_reason": "`rewritten_instruction`, `rewritten_answer`, `kept_original`, or why there was no choice",
}
_SELECTED = {
    "ifd_definition": "how the scores are defined; those of two definitions cannot be compared",
    "ifd_rank": "1 is the highest score kept",
    "ifd_reason": "`kept`, or why not",
}
_OF_TOKENS = {
    "cas_tokens": "loss of each of the answer's tokens given the prompt, nats",
    "das_tokens": "loss of each of the same tokens without the prompt, nats",
}
_SELECTIVE = {
    SIFD: "S-IFD: exp(cas - das) over the tokens of which the prompt tells most, alone",
    "sifd_mean": "its mean over neighbours of the row, whose embeddings have noise added",
    "sifd_std": "its standard deviation over them",
}
COLUMN_MEANINGS = _SCORED | _OF_TURNS | _OF_TOKENS | _SELECTIVE | _KNOWN | _SELECTED
IFD_COLUMNS = tuple(_SCORED)  # of a scored data set
SCORES = tuple(name for name in IFD_COLUMNS if name not in ("answer_tokens", "ifd_status"))  # null without a score
TURN_COLUMNS = tuple(_OF_TURNS)  # with `turns=...` alone
LAST_COLUMNS = tuple(_OF_LAST)  # of a run's history, where rows have several answers
SELECTION_COLUMNS = tuple(_SELECTED)  # what `ifd-trainer select` adds
TOKEN_COLUMNS = tuple(_OF_TOKENS)  # lists, of a data set scored with its tokens
SELECTIVE_COLUMNS = tuple(_SELECTIVE)  # what is made of those
KNOWN_COLUMNS = tuple(_KNOWN)  # of rows whose prompts a model has answered
SPIN_COLUMNS = tuple(_OWN_ANSWER)  # of rows whose answers were held against the model's own
OWN_ANSWER_MEANINGS = _OWN_ANSWER
REFLECTED_COLUMNS = tuple(_REFLECTED)  # of rows of which a version was chosen
REFLECTED_MEANINGS = _REFLECTED
# Replaced when rows are scored again; what a model has answered stays.
OWN_COLUMNS = tuple(name for name in COLUMN_MEANINGS if name not in KNOWN_COLUMNS)
IMAGE_MEANINGS = {
    "qas": "mean loss of the answer's tokens given the question without its image, nats per token",
    "image_gain": "qas - cas, what the image tells of the answer beyond the question; null for a row without an image",
}
IMAGE_COLUMNS = tuple(IMAGE_MEANINGS)  # what `ImageIFDScorer` adds beside the others
LIKENESS = "target_similarity"
TARGET_MEANINGS = {
    LIKENESS: "cosine with the target most like the row, from -1 to 1",
    "target_row": "the id of that target, else its position",
    "target_status": "`ok`, or why the row was not embedded",
}
TARGET_COLUMNS = tuple(TARGET_MEANINGS)  # what `TargetScorer` adds
