"""What a checkpoint keeps of a selection: the order of its epoch and the last scores, each bit for bit.

They lie in a file of their own in the checkpoint's folder; `trainer_state.json`, which is written after it, holds the
file's digest. A checkpoint that was cut off, or put together from two, is told by that. The file's name does not end
in `.safetensors`: programs that load a model take every such file in its folder for weights.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import zlib
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from ..data.atomic import write_atomically
from ..errors import FileAccessError, NotFoundError, UserError
from ..method.number_words import many
from ..method.plain_data import as_text, same, to_data, without_reprs
from ..scoring.losses import Scores
from ..scoring.weights_digest import blocks

logger = logging.getLogger(__name__)

VERSION = 4  # before 4, policies and schedules were kept as their repr; before 3, arrays as text in trainer_state.json
_READ = (2, 3, VERSION)
FILE = "ifd_selection.npz"
_ORDER, _SCORES, _STATUSES = "order/", "scores/", "statuses"


def save_selection(folder: Path, order: Mapping[str, np.ndarray], scores: Scores | None) -> dict[str, str]:
    """Write the file into a checkpoint's folder.

    Returns:
        What `trainer_state.json` has to hold for `load_selection`.
    """
    arrays = {_ORDER + name: _narrow(array) for name, array in order.items()}
    if scores is not None:
        arrays |= {name: _narrow(array) for name, array in arrays_of(scores, _SCORES, _STATUSES).items()}

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(folder / FILE, write)
    return {FILE: _digest(folder / FILE)}


def load_selection(folder: Path, saved: Mapping[str, Any], rows: int) -> tuple[dict[str, np.ndarray], Scores | None]:
    """The order and the scores, if there are any, that a checkpoint keeps.

    Args:
        folder: of the checkpoint.
        saved: what `trainer_state.json` holds: `save_selection`'s result, or all arrays as text (version 2).
        rows: of the pool.

    Raises:
        FileNotFoundError: when the file is not there.
        OSError: when it cannot be read.
        ValueError: when it is not the one that was written with `trainer_state.json`.
    """
    if FILE not in saved:
        return _load_version_2(saved)
    path = folder / FILE
    advice = "Copy the whole checkpoint again, resume from another one, or start training anew."
    try:
        intact = _digest(path) == saved[FILE]
        arrays = _arrays(path) if intact else {}
    except FileNotFoundError as error:
        raise NotFoundError(
            f"The checkpoint {folder} has no {path.name}, which holds the rows that it had selected. {advice}"
        ) from error
    except OSError as error:
        raise FileAccessError(f"{path} cannot be read ({error}). {advice}") from error
    columns = {name.removeprefix(_SCORES): array for name, array in arrays.items() if name.startswith(_SCORES)}
    if not intact or any(len(column) != rows for column in columns.values()):
        raise UserError(
            f"{path} is damaged, or of another checkpoint: it is not the file that was written together with "
            f"trainer_state.json beside it. {advice}"
        )
    order = {name.removeprefix(_ORDER): array for name, array in arrays.items() if name.startswith(_ORDER)}
    return order, scores_of(arrays, _SCORES, _STATUSES)


def arrays_of(scores: Scores, prefix: str, statuses: str | None = None) -> dict[str, np.ndarray]:
    """Scores as arrays of numbers, by their columns' names behind a prefix; the texts of statuses in one more."""
    columns, codes = scores.columns(), {}
    status = [codes.setdefault(text, len(codes)) for text in columns["ifd_status"].tolist()]  # whatever text it is
    columns["ifd_status"] = np.array(status, dtype=np.int64)
    texts = np.frombuffer(json.dumps(list(codes)).encode(), dtype=np.uint8)
    return {prefix + name: array for name, array in columns.items()} | {statuses or f"{prefix}{_STATUSES}": texts}


def scores_of(arrays: Mapping[str, np.ndarray], prefix: str, statuses: str | None = None) -> Scores | None:
    """Scores that `arrays_of` has made arrays of; None where there are none."""
    statuses = statuses or f"{prefix}{_STATUSES}"
    names = [name for name in arrays if name.startswith(prefix) and name != statuses]
    columns = {name.removeprefix(prefix): arrays[name] for name in names}
    if not columns:
        return None
    texts = np.array(json.loads(arrays[statuses].astype(np.uint8).tobytes()), dtype=object)
    columns["ifd_status"] = texts[columns["ifd_status"]]
    return Scores.of(columns)


# What the rows of the epochs to come depend on.
MUST_MATCH = ("policy", "schedule", "every", "warmup_epochs", "freeze_after", "warmup", "start_anew", "scorer", "order")
MUST_MATCH += ("every_steps", "rescore", "rescore_budget")
MUST_MATCH += ("targets",)  # a digest of their tokens: a file may hold others now
MUST_MATCH += ("guard", "score", "on_shortfall", "limit")  # of a policy of one's own, which need not say them otherwise
MUST_MATCH += ("further_scores", "guess", "turns", "without", "row_weights")
MUST_MATCH += ("train_sampling_strategy", "seed", "id_column", "min_answer_tokens", "direct_prefix", "fingerprint")


def check_resumable(saved: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of a selection, in today's form.

    Other epochs than planned may follow on those that have begun; the learning rate schedule then has another end.

    Args:
        saved: what `trainer_state.json` holds.
        settings: of the run that goes on: `MUST_MATCH`, `plan` and `max_steps`.

    Raises:
        UserError: where a run with today's settings would not go on as the one in the checkpoint would have.
    """
    if saved is None or saved.get("version") not in _READ:
        raise UserError(
            "The checkpoint holds no selection state: it was written without this callback, or by another version "
            "of it. Start training anew, or resume without IFDSelectionCallback."
        )
    saved = {"guard": None, "turns": None, "rescore": "all", **without_reprs(saved)}  # earlier releases had none
    differs = [
        f"{key.replace('fingerprint', 'training set')}: {as_text(saved[key])} in the checkpoint, "
        f"{as_text(to_data(settings[key]))} now"
        for key in MUST_MATCH
        if key in saved and not same(saved[key], settings[key])  # checkpoints of earlier releases lack some
    ]
    begun = saved["epoch"] + 1
    then, now = saved["plan"][:begun], settings["plan"][:begun]
    if not differs and then != now:
        old, new = next((a, b) for a, b in zip_longest(then, now) if a != b)
        differs = [
            f"{key} of epoch {old['epoch']}: {value} in the checkpoint, {(new or {}).get(key, 'none')} now"
            for key, value in old.items()
            if value != (new or {}).get(key)
        ]
    if differs:
        raise UserError(
            f"The run cannot be resumed exactly: {'; '.join(differs)}. Resume with the settings (batch size, "
            "gradient accumulation and processes among them) and the data set of the checkpoint, or start anew."
        )
    if saved["max_steps"] != settings["max_steps"]:
        logger.warning(
            "The run was planned with %s and now has %s: the rows of epochs that have begun are as before, "
            "the learning rate schedule is that of the new number from here on.",
            many(saved["max_steps"], "update"),
            f"{settings['max_steps']:,}",
        )
    return saved


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _narrow(array: np.ndarray) -> np.ndarray:
    """Counts and positions in as few bytes as they need; floats as they are."""
    if array.dtype.kind == "f" or array.min(initial=0) < 0:
        return array
    return array.astype(np.min_scalar_type(array.max(initial=0)))


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: array if array.dtype.kind == "f" else array.astype(np.int64) for name, array in file.items()}


# ---- checkpoints of version 2: arrays as text in trainer_state.json ----------------------------------------------

_STATUSES_2 = ("ok", "empty_answer", "too_short", "truncated", "prompt_too_long", "nonfinite", "malformed")


def _load_version_2(saved: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Scores | None]:
    order = {name: _array(saved[name], np.int64) for name in ("positions", "bins") if name in saved}
    if "scores" not in saved:
        return order, None
    stored = saved["scores"]
    status = np.array(_STATUSES_2, dtype=object)[_array(stored["status"], np.int64)]
    losses = [_array(stored[name], np.float64) for name in ("cas", "das")]
    return order, Scores.from_nll(*losses, _array(stored["answer_tokens"], np.int64), status)


def _array(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=dtype)
