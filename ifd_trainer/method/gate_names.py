"""Gates by the names that the command line has for them, some with a number behind a colon."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..errors import UserError
from .choices import GATES
from .gates import CopyGate, Gate, LengthGate, NoiseGate
from .spin import MatchedGate

_KINDS: dict[str, Callable[..., Gate]] = dict(zip(GATES, (LengthGate, NoiseGate, CopyGate, MatchedGate), strict=True))


def parse_gates(words: Sequence[str]) -> list[Gate]:
    """Gates from `NAME` or `NAME:NUMBER`: deviations of `length`, similarity of `copies`, margin of `matched`.

    Raises:
        UserError: for another name, one that is given twice, and a number that is none.

    >>> parse_gates(["length:3", "copies"])
    [LengthGate(deviations=3.0, of='answer'), CopyGate(similarity=0.85, of='row')]
    """
    gates: dict[str, Gate] = {}
    for word in words:
        name, colon, number = word.partition(":")
        if name not in _KINDS:
            raise UserError(f"{word!r} is no gate: they are {', '.join(GATES)}.")
        if name in gates:
            raise UserError(f"the gate {name} is named twice.")
        if colon and name == NoiseGate.name:
            raise UserError(f"{word!r}: the gate {name} takes no number.")
        try:
            gates[name] = _KINDS[name](*([float(number)] if colon else []))
        except UserError as error:
            raise UserError(f"{word!r}: {error}") from error
        except ValueError as error:
            raise UserError(f"{word!r}: wants a number behind the colon.") from error
    return list(gates.values())
