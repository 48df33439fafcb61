"""Losses of held-out rows while an arm trains: row by row, so that arms can be paired, and with what they have cost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from transformers import Trainer, TrainerCallback

from ..data.atomic import write_atomically
from ..scoring.eval_guard import eval_mode
from ..scoring.transform import IFDScorer
from ..training.trainer_hooks import tokenizer_of
from .held_out_sets import HeldOutSet, rows_frame

_COLUMNS = ("cas", "das", "ifd", "answer_tokens", "ifd_status")


@dataclass(frozen=True)
class Point:
    """Where a run was when its held-out rows were scored.

    Attributes:
        step: updates since training began, or began anew after a brief experience.
        updates: all updates, the brief experience among them.
        tokens: that were trained on, without padding.
        seconds: of the processor (all threads) on a CPU, of the clock on an accelerator, for training and scoring; the
            scoring of held-out rows and the start of the program are not in it.
    """

    step: int
    updates: int
    tokens: int
    seconds: float


class HeldOutRows(TrainerCallback):
    """Scores the held-out rows at the end of each epoch and at given steps, into files in the run's folder.

    Args:
        trainer: the trainer.
        sets: the sets of held-out rows, the recipe's own first.
        folder: where the files go; points that a run before a resume has measured are there.
        steps: further steps after which to score.
        brief: updates of the brief experience, after which steps count anew.
        at_start: whether the model is scored before its first step, too.
    """

    def __init__(
        self,
        trainer: Trainer,
        sets: Sequence[HeldOutSet],
        folder: Path,
        steps: Sequence[int] = (),
        brief: int = 0,
        at_start: bool = False,
    ) -> None:
        self.trainer, self.sets, self.folder, self.steps = trainer, sets, folder, frozenset(steps)
        self.brief, self.at_start = brief, at_start
        tokenizer = tokenizer_of(trainer)
        self._scorers = [IFDScorer(trainer.model, tokenizer, format=each.format) for each in sets]
        self._rows = rows_frame(sets)
        self._clock = time.process_time if trainer.args.device.type == "cpu" else _device_clock
        self._began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = [point for point in read_points(self.folder) if point.updates <= state.global_step]
        self._keep(before)
        self._began = self._clock() - (before[-1].seconds if before else 0.0)
        if self.at_start and state.global_step == 0:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step - self.brief in self.steps:
            self._measure(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > self.brief:
            self._measure(state)

    def _measure(self, state: Any) -> None:
        points = read_points(self.folder)
        if any(point.updates == state.global_step for point in points):
            return
        seconds, began = self._clock() - self._began, self._clock()
        step = max(state.global_step - self.brief, 0)
        point = Point(step, state.global_step, int(state.num_input_tokens_seen), seconds)
        with eval_mode(self.trainer.model, self.trainer.args.device):
            scored = [scorer(each.rows[:]) for scorer, each in zip(self._scorers, self.sets, strict=True)]
        columns = {name: [value for each in scored for value in each[name]] for name in _COLUMNS}
        frame = pd.concat([self._rows, pd.DataFrame(columns)], axis=1)
        write_atomically(rows_path(self.folder, point), lambda path: frame.to_parquet(path, index=False))
        self._keep([*points, point])
        self._began += self._clock() - began

    def _keep(self, points: Sequence[Point]) -> None:
        lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
        write_atomically(self.folder / "points.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))


def read_points(folder: Path) -> list[Point]:
    """What was measured of a run so far, in order."""
    path = folder / "points.jsonl"
    if not path.exists():
        return []
    return [Point(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def rows_path(folder: Path, point: Point) -> Path:
    """Where the scores of the held-out rows at a point are."""
    return folder / f"held_out-{point.updates:06d}.parquet"


def _device_clock() -> float:
    """Seconds of the clock, once the device has done what was asked of it."""
    torch.accelerator.synchronize()
    return time.perf_counter()
