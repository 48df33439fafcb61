"""What keeps noise out of a selection: the guards, one dataclass for all of them.

High IFD collects noise (arXiv 2503.01807 and 2410.09335 find it below random at scale): answers that belong to another
prompt, answers that stop in the middle, the same row twice. Each guard tells one kind, and drops it before a policy
chooses; the next best rows take the places. What each does, and what its numbers mean, stands with its class.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UserError
from .calibrated_limit import CalibratedLimit
from .choices import GUARDS, MEASURING_GUARDS, MISALIGNED, Misaligned
from .duplicates import Duplicates
from .pairing_test import PairingTest
from .reasons import ABOVE_LIMIT, DUPLICATE, MISMATCHED, UNFINISHED
from .scoring_health import Freeze
from .unfinished import Unfinished


@dataclass(frozen=True)
class Guard:
    """The guards of a run. Each may be given as an object of its own, as True (as it is by default) or as None (off).

    Args:
        limit: rows whose score is like that of answers under wrong prompts are dropped, `above_limit`.
        pairing: rows whose answer fits other prompts as well are dropped, `mismatched`. Off by default: what the limit
            leaves of such rows is little, and it costs K forwards of each row that would be kept.
        unfinished: rows whose answer stops before its end are dropped, `unfinished`.
        duplicates: of rows that say the same one is kept, the others are dropped, `duplicate`.
        freeze: when a scoring carries no information any more, and the one before stands.
        on_misaligned: what to do where most prompts do not help: "error" before the first step, or "warn".

    >>> Guard(pairing=True, duplicates=None).pairing
    PairingTest(alpha=0.1, anchors=9, tokens=24, prompts='random')
    """

    limit: CalibratedLimit | None = CalibratedLimit()
    pairing: PairingTest | None = None
    unfinished: Unfinished | None = Unfinished()
    duplicates: Duplicates | None = Duplicates()
    freeze: Freeze | None = Freeze()
    on_misaligned: Misaligned = "error"

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is True or value is False:
                value = kind() if value else None
                object.__setattr__(self, name, value)
            if value is not None and not isinstance(value, kind):
                raise UserError(f"{name} of a Guard must be a {kind.__name__}, True or None, got {value!r}.")
        if self.on_misaligned not in MISALIGNED:
            raise UserError(f"on_misaligned must be 'error' or 'warn', got {self.on_misaligned!r}.")

    @property
    def names(self) -> list[str]:
        """The guards that are on, by the names of their fields."""
        return [name for name in GUARDS if getattr(self, name) is not None]

    @property
    def measuring(self) -> list[str]:
        """Those of them for which a model has to measure something."""
        return [name for name in self.names if name in MEASURING_GUARDS]


# The reason for which each guard drops rows, by the guard's name.
GUARD_REASONS = {"limit": ABOVE_LIMIT, "pairing": MISMATCHED, "unfinished": UNFINISHED, "duplicates": DUPLICATE}
_KINDS = dict(zip(GUARDS, (CalibratedLimit, PairingTest, Unfinished, Duplicates, Freeze), strict=True))
