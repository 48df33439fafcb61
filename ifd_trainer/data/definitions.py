"""The definitions of the score by name: which tokens a model reads and which of them count.

What each of them means, and the code that does it, is in `encoding`. Here are only the names and numbers that the
command line shows, without an import that would make its help wait.
"""

from __future__ import annotations

DEFINITIONS = ("paper", "cherry", "superfiltering")
DEFAULT_MAX_LENGTH = {"cherry": 512, "superfiltering": 1024}  # tokens of prompt and answer, as in their programs
