"""Self-guided data selection for instruction tuning: a `datasets.map` transform and a Trainer callback."""

# ruff: noqa: F401  (`__all__` is made of a table, where it does not see the names)
from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # for editors, which do not see what is loaded on use
    from .data.format_choice import FormatOptions
    from .data.formats import ALPACA, WIZARDLM, TemplateFormat
    from .data.gate_measures import gate_rows
    from .method.bad_cases import BadCases
    from .method.brief_experience import Brief
    from .method.calibrated_limit import CalibratedLimit
    from .method.cascade import Cascade
    from .method.columns import IFD_COLUMNS
    from .method.controls import BalancedRandom, LongestAnswers, LowestScores, MiddleBand, RandomRows
    from .method.duplicates import Duplicates
    from .method.facility_location import Diverse
    from .method.gates import CopyGate, LengthGate, NoiseGate
    from .method.guard import Guard
    from .method.hierarchical import Hierarchical
    from .method.infobatch import InfoBatch
    from .method.iterit import IterIT
    from .method.kakurenbo import Kakurenbo
    from .method.knowledge import hard_or_wrong, wilson_interval
    from .method.lead import Lead
    from .method.pairing_test import PairingTest
    from .method.ranking import Ranking
    from .method.reflection import choose_rewritten
    from .method.schedule import Anneal, Constant, Curriculum, PerEpoch, Timing
    from .method.scoring_health import Freeze
    from .method.selection import Cherry, Policy, Selection
    from .method.soft_sampling import SoftSampling
    from .method.spin import MatchedGate
    from .method.stratified import Mixture, Stages, Stratified
    from .method.target_set import TargetSet
    from .method.unfinished import Unfinished
    from .method.weighted import Weighted
    from .recipe.selection import SelectionConfig
    from .report.page import write_report
    from .scoring.image_scorer import ImageIFDScorer
    from .scoring.knowledge import KnowledgeScorer
    from .scoring.own_answers import OwnAnswerScorer
    from .scoring.reflection import ReflectionScorer
    from .scoring.selective_columns import attach_selective_ifd
    from .scoring.target_scorer import TargetScorer
    from .scoring.transform import IFDScorer
    from .training.callback import IFDSelectionCallback
    from .training.later import SelectLater
    from .training.options import Scoring

# Where each public name is.
_HOME = {
    name: module
    for module, names in {
        "data.format_choice": ("FormatOptions",),
        "data.formats": ("ALPACA", "WIZARDLM", "TemplateFormat"),
        "data.gate_measures": ("gate_rows",),
        "method.bad_cases": ("BadCases",),
        "method.brief_experience": ("Brief",),
        "method.calibrated_limit": ("CalibratedLimit",),
        "method.cascade": ("Cascade",),
        "method.columns": ("IFD_COLUMNS",),
        "method.controls": ("BalancedRandom", "LongestAnswers", "LowestScores", "MiddleBand", "RandomRows"),
        "method.duplicates": ("Duplicates",),
        "method.facility_location": ("Diverse",),
        "method.gates": ("CopyGate", "LengthGate", "NoiseGate"),
        "method.guard": ("Guard",),
        "method.hierarchical": ("Hierarchical",),
        "method.infobatch": ("InfoBatch",),
        "method.iterit": ("IterIT",),
        "method.kakurenbo": ("Kakurenbo",),
        "method.lead": ("Lead",),
        "method.knowledge": ("hard_or_wrong", "wilson_interval"),
        "method.pairing_test": ("PairingTest",),
        "method.ranking": ("Ranking",),
        "method.reflection": ("choose_rewritten",),
        "method.schedule": ("Anneal", "Constant", "Curriculum", "PerEpoch", "Timing"),
        "method.scoring_health": ("Freeze",),
        "method.selection": ("Cherry", "Policy", "Selection"),
        "method.soft_sampling": ("SoftSampling",),
        "method.spin": ("MatchedGate",),
        "method.stratified": ("Mixture", "Stages", "Stratified"),
        "method.target_set": ("TargetSet",),
        "method.unfinished": ("Unfinished",),
        "method.weighted": ("Weighted",),
        "report.page": ("write_report",),
        "scoring.image_scorer": ("ImageIFDScorer",),
        "scoring.knowledge": ("KnowledgeScorer",),
        "scoring.own_answers": ("OwnAnswerScorer",),
        "scoring.reflection": ("ReflectionScorer",),
        "scoring.selective_columns": ("attach_selective_ifd",),
        "scoring.target_scorer": ("TargetScorer",),
        "scoring.transform": ("IFDScorer",),
        "training.callback": ("IFDSelectionCallback",),
        "training.later": ("SelectLater",),
        "training.options": ("Scoring",),
        "recipe.selection": ("SelectionConfig",),
    }.items()
    for name in names
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: `ifd-trainer --help` does not wait for them.
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # What was not loaded yet is there too, for completion in a notebook.
    return sorted({*globals(), *__all__})
