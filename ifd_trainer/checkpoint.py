"""Arrays and scores as text, in the form in which a checkpoint's `trainer_state.json` keeps them."""

from __future__ import annotations

import base64
import zlib

import numpy as np

from .encoding import Status
from .scorer import Scores

_STATUSES = [status.value for status in Status]


def encode_array(array: np.ndarray) -> str:
    """An array's bytes as text, compressed."""
    return base64.b64encode(zlib.compress(array.tobytes())).decode("ascii")


def decode_array(text: str, dtype: type = np.int64) -> np.ndarray:
    """The array, of one dimension, that `encode_array` made text of."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)


def encode_scores(scores: Scores) -> dict[str, str]:
    """What `decode_scores` needs: the ratios follow from the two losses."""
    codes = np.array([_STATUSES.index(status) for status in scores.ifd_status], dtype=np.int64)
    return {
        "cas": encode_array(scores.cas),
        "das": encode_array(scores.das),
        "answer_tokens": encode_array(scores.answer_tokens),
        "status": encode_array(codes),
    }


def decode_scores(saved: dict[str, str]) -> Scores:
    """The scores that `encode_scores` made text of, bit for bit."""
    status = np.array(_STATUSES, dtype=object)[decode_array(saved["status"])]
    cas, das = decode_array(saved["cas"], np.float64), decode_array(saved["das"], np.float64)
    return Scores.from_nll(cas, das, decode_array(saved["answer_tokens"]), status)
