"""The columns that scoring and selecting add to a data set: each name with a sentence on what it holds.

Names and texts alone, so that the command line can show them at once. The equations are in `equations`, the values of
`ifd_status` and `ifd_reason` in `reasons`.
"""

from __future__ import annotations

EOT_LOSS = "eot_loss"  # scores of an earlier release lack it
_SCORED = {
    "cas": "conditioned answer score s(A|Q): mean loss of the answer's tokens given the prompt, nats per token",
    "das": "direct answer score s(A): their mean loss without the prompt, nats per token",
    "ifd": "cas / das",
    "ifd_ppl": "exp(cas - das), the ratio of perplexities",
    EOT_LOSS: "loss of the end-of-turn token right behind the answer, nats; null where the answer was cut off",
    "answer_tokens": "number of scored tokens",
    "ifd_status": "`ok`, or why there is no score",
}
_SELECTED = {
    "ifd_definition": "how the scores are defined; those of two definitions cannot be compared",
    "ifd_rank": "1 is the highest score kept",
    "ifd_reason": "`kept`, or why not",
}
COLUMN_MEANINGS = _SCORED | _SELECTED
IFD_COLUMNS = tuple(_SCORED)  # of a scored data set
SCORES = tuple(name for name in IFD_COLUMNS if name not in ("answer_tokens", "ifd_status"))  # null without a score
SELECTION_COLUMNS = tuple(_SELECTED)  # what `ifd-trainer select` adds
OWN_COLUMNS = tuple(COLUMN_MEANINGS)
TARGET_MEANINGS = {
    "target_similarity": "cosine with the target most like the row, from -1 to 1",
    "target_row": "the id of that target, else its position",
    "target_status": "`ok`, or why the row was not embedded",
}
TARGET_COLUMNS = tuple(TARGET_MEANINGS)  # what `TargetScorer` adds
