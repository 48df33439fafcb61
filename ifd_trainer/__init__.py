"""Self-guided data selection for instruction tuning: a `datasets.map` transform and a Trainer callback."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .data.formats import ALPACA, WIZARDLM, TemplateFormat
    from .method.brief_experience import Brief
    from .method.calibrated_limit import CalibratedLimit
    from .method.columns import IFD_COLUMNS
    from .method.controls import BalancedRandom, LongestAnswers, LowestScores, MiddleBand, RandomRows
    from .method.facility_location import Diverse
    from .method.schedule import Anneal, Constant, Curriculum, PerEpoch, Timing
    from .method.selection import Cherry, Policy, Selection
    from .report.page import write_report
    from .scoring.transform import IFDScorer
    from .training.callback import IFDSelectionCallback
    from .training.options import Scoring

_HOME = {
    "ALPACA": "data.formats",
    "Anneal": "method.schedule",
    "BalancedRandom": "method.controls",
    "Brief": "method.brief_experience",
    "CalibratedLimit": "method.calibrated_limit",
    "Cherry": "method.selection",
    "Constant": "method.schedule",
    "Curriculum": "method.schedule",
    "Diverse": "method.facility_location",
    "IFDScorer": "scoring.transform",
    "IFDSelectionCallback": "training.callback",
    "IFD_COLUMNS": "method.columns",
    "LongestAnswers": "method.controls",
    "LowestScores": "method.controls",
    "MiddleBand": "method.controls",
    "PerEpoch": "method.schedule",
    "Policy": "method.selection",
    "RandomRows": "method.controls",
    "Scoring": "training.options",
    "Selection": "method.selection",
    "TemplateFormat": "data.formats",
    "Timing": "method.schedule",
    "WIZARDLM": "data.formats",
    "write_report": "report.page",
}
__all__ = [
    "ALPACA",
    "IFD_COLUMNS",
    "WIZARDLM",
    "Anneal",
    "BalancedRandom",
    "Brief",
    "CalibratedLimit",
    "Cherry",
    "Constant",
    "Curriculum",
    "Diverse",
    "IFDScorer",
    "IFDSelectionCallback",
    "LongestAnswers",
    "LowestScores",
    "MiddleBand",
    "PerEpoch",
    "Policy",
    "RandomRows",
    "Scoring",
    "Selection",
    "TemplateFormat",
    "Timing",
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
