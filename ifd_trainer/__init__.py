"""Self-guided data selection for instruction tuning: a `datasets.map` transform and a Trainer callback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .brief import Brief
    from .callback import IFDSelectionCallback
    from .columns import IFD_COLUMNS, IFDScorer
    from .diversity import Diverse
    from .formats import ALPACA, WIZARDLM, TemplateFormat
    from .report import write_report
    from .schedule import Anneal, Constant, Curriculum, PerEpoch
    from .selection import Cherry, Selection

_HOME = {
    "ALPACA": "formats",
    "Anneal": "schedule",
    "Brief": "brief",
    "Cherry": "selection",
    "Constant": "schedule",
    "Curriculum": "schedule",
    "Diverse": "diversity",
    "IFDScorer": "columns",
    "IFDSelectionCallback": "callback",
    "IFD_COLUMNS": "columns",
    "PerEpoch": "schedule",
    "Selection": "selection",
    "TemplateFormat": "formats",
    "WIZARDLM": "formats",
    "write_report": "report",
}
__all__ = [
    "ALPACA",
    "IFD_COLUMNS",
    "WIZARDLM",
    "Anneal",
    "Brief",
    "Cherry",
    "Constant",
    "Curriculum",
    "Diverse",
    "IFDScorer",
    "IFDSelectionCallback",
    "PerEpoch",
    "Selection",
    "TemplateFormat",
    "write_report",
]


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: `ifd-trainer --help` does not wait for them.
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # What was not loaded yet is there too, for completion in a notebook.
    return sorted({*globals(), *__all__})
