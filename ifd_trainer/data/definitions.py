"""The definitions of the score by name: which tokens a model reads, which of them count, and whose program does it so.

`encoding` computes them; here is what tells them apart, for the command line, the data card and the checks.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..method.choices import Score


@dataclass(frozen=True)
class Definition:
    """What tells a definition from the others.

    Attributes:
        meaning: what it computes, in a sentence.
        program: the published program that scores by it; None for this one.
        max_length: most tokens of prompt and answer by default, as in that program; None for the model's window.
        ranked_by: the score that its program selects by.
    """

    meaning: str
    program: str | None = None
    max_length: int | None = None
    ranked_by: Score = "ifd"


DEFINITIONS = {  # what `encoding` computes
    "paper": Definition("prompt and answer tokenised together, the same answer tokens in both passes"),
    "cherry": Definition("as the program Cherry_LLM computes it (arXiv 2308.12032)", "Cherry_LLM", 512),
    "superfiltering": Definition(
        "as the program Superfiltering computes it (arXiv 2402.00530)", "Superfiltering", 1024, "ifd_ppl"
    ),
}
KNOWN_DEFINITIONS = DEFINITIONS | {  # and what scores made elsewhere may have
    "data-juicer": Definition("as data-juicer's instruction_following_difficulty_filter computes it", "data-juicer"),
}
DEFAULT_MAX_LENGTH = {name: each.max_length for name, each in DEFINITIONS.items() if each.max_length}
# What may have written a file of scores that `ifd-trainer select` reads: a definition's program, or this one.
SCORE_KINDS = (*(name for name, each in KNOWN_DEFINITIONS.items() if each.program), "ifd-trainer")
