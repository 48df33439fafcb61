"""Who may have written a file of scores that `select` reads: this program, and the published ones it understands.

Only names, for the command line to show at once; `imported_scores` reads the files.
"""

from __future__ import annotations

PROGRAMS = {"cherry": "Cherry_LLM", "superfiltering": "Superfiltering", "data-juicer": "data-juicer"}
KINDS = (*PROGRAMS, "ifd-trainer")
