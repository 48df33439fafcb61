"""Numbers to tables, plots and pages.

The plots, of a run's history or of scored rows, are matplotlib figures; `savefig` writes PNG, SVG or PDF:

    from ifd_trainer.report import History, plot_kept_flow

    plot_kept_flow(History.load("runs/demo")).savefig("kept.pdf")
"""

# ruff: noqa: F401  (`__all__` is made of a table, where it does not see the names)
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors, which do not see what is loaded on use
    from ..training.history import History
    from .page import write_report
    from .plots import (
        plot_cas_das,
        plot_further_scores,
        plot_held_out_loss,
        plot_ifd_histogram,
        plot_ifd_length,
        plot_kept_by_label,
        plot_kept_flow,
    )
    from .tables import epoch_table, guard_table, label_table

_PLOTS = ("cas_das", "further_scores", "held_out_loss", "ifd_histogram", "ifd_length", "kept_by_label", "kept_flow")
_HOME = {f"plot_{name}": ".plots" for name in _PLOTS}
_HOME |= {"write_report": ".page", "History": "..training.history"}
_HOME |= dict.fromkeys(("epoch_table", "guard_table", "label_table"), ".tables")
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    # On use: whoever wants one module of this room need not load the others, and matplotlib with them.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
