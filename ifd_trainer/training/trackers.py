"""How scores are distributed, for trackers that take histograms: TensorBoard, Weights & Biases and Trackio.

Numbers go to all trackers through `trainer.log`; of histograms the trainer knows nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

_PREFIX = "train/"  # which the trainer's own callbacks put before the names of numbers


def log_histograms(trainer: Trainer, values: Mapping[str, np.ndarray]) -> None:
    """Log the distribution of finite values, by name, at the step where training is; on the main process alone."""
    if not trainer.is_world_process_zero():
        return
    values = {f"{_PREFIX}{name}": some for name, some in values.items() if len(some)}
    step, callbacks = trainer.state.global_step, trainer.callback_handler.callbacks
    for writer in [c.tb_writer for c in callbacks if isinstance(c, TensorBoardCallback)]:
        for name, some in values.items() if writer is not None else ():
            writer.add_histogram(name, some, step)
    for kind, module in ((WandbCallback, "wandb"), (TrackioCallback, "trackio")):
        if values and any(isinstance(c, kind) for c in callbacks):
            tracker = sys.modules[module]  # the callback has imported it, and begun its run
            tracker.log({name: tracker.Histogram(some) for name, some in values.items()} | {"train/global_step": step})
