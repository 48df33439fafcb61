"""What each of several processes does in `test_distributed.py`: small runs with the callback, one after another.

Under DDP, and under FSDP and DeepSpeed ZeRO-3, where each process holds half of every weight. Launched by
`torch.distributed.run`; writes what every run did to `<folder>/rank<r>.json`. Imported by the tests too, so that a run
in a single process is built by the same code.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import trl
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import build_model
from packaging.version import Version
from tiny_runs import (
    DEVICE,
    FIVE,
    INF,
    TOKENIZER,
    raw_rows,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    train,
    training_logs,
    weights_of,
)
from transformers import Trainer, TrainerCallback
from weighted_steps import DESCENT, watched

import ifd_trainer.training.pool_scorer as pool_scorer_module
from ifd_trainer import (
    BadCases,
    Brief,
    Cherry,
    Guard,
    IFDSelectionCallback,
    InfoBatch,
    PairingTest,
    TargetSet,
    Unfinished,
)
from ifd_trainer.data.encoding import token_count
from ifd_trainer.method.calibrated_limit import CalibratedLimit
from ifd_trainer.scoring.processes import run_shares
from ifd_trainer.training.history import FOLDER as HISTORY

ROWS = 24
CASE_LIMIT = 60  # seconds; a case takes one or two
RESUME_FROM = 5  # inside the second epoch: a global batch is 4 rows, so epochs of 16, 12 and 20 rows have 4, 3, 5 steps

GUARD = Guard(
    CalibratedLimit(alpha=0.9, pairs=13),
    PairingTest(alpha=0.5, anchors=3, tokens=2),
    Unfinished(alpha=0.5, cuts=12),
    freeze=None,
    on_misaligned="warn",
)

# Arguments of the callback, and of the trainer.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({"keep": [16, 12, 20]}, {"save_strategy": "steps", "save_steps": RESUME_FROM}),
    "uneven": ({"keep": [9, 14, 7], "order": "descending"}, {}),
    "accumulation": ({"keep": [18, 11]}, {"gradient_accumulation_steps": 2, "num_train_epochs": 2}),
    "workers": ({"keep": [12, 7]}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}),
    "group_by_length": ({"keep": [14, 10]}, {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2}),
    "bf16": ({"keep": [12, 9]}, {"bf16": True, "num_train_epochs": 2}),
    "split_batches": ({"keep": [10, 7]}, {"accelerator_config": {"split_batches": True}, "num_train_epochs": 2}),
    "drop_last": ({"keep": [11, 9]}, {"dataloader_drop_last": True, "num_train_epochs": 2}),
    "max_steps": ({"keep": [9, 6]}, {"max_steps": 4}),
    "in_step": ({"keep": [12, 8], "token_budget": 64}, {"num_train_epochs": 2}),
    "calibrated": ({"keep": [6, 5], "max_ifd": CalibratedLimit(alpha=0.5, pairs=13)}, {"num_train_epochs": 2}),
    "guarded": ({"keep": [6, 5], "guard": GUARD}, {"num_train_epochs": 2}),
    "candidates": ({"keep": [6, 5], "rescore": "candidates", "rescore_budget": 1.0}, {"num_train_epochs": 2}),
    "targets": (
        {"keep": [6, 5], "policy": TargetSet(raw_rows(3, seed=7), max_ifd=50.0), "max_ifd": None},
        {"num_train_epochs": 2},
    ),
    "parts": ({"keep": [16, 8], "every_steps": 2}, {"num_train_epochs": 2}),
    "candidates_in_parts": (
        {"keep": [16, 8], "every_steps": 2, "rescore": "candidates", "rescore_budget": 1.0},
        {"num_train_epochs": 2},
    ),
    "bad_cases": (
        {"keep": [8, 6], "policy": BadCases("half", policy=Cherry(INF)), "max_ifd": None},
        {
            "num_train_epochs": 2,
            "eval_dataset": {half: text_rows(raw_rows(3, seed=9 + i)) for i, half in enumerate(("first", "second"))},
            "eval_strategy": "epoch",
            "per_device_eval_batch_size": 1,  # so that the mean of means is the same for any number of processes
        },
    ),
    "one_row": ({"keep": 1.0}, {"num_train_epochs": 1}),
    "cherry": (
        {"keep": 6, "warmup_epochs": 1, "warmup": Brief(clusters=4, per_cluster=2, max_share=0.4), "start_anew": True},
        {"num_train_epochs": 2},
    ),
}

# Rows that weigh differently, and losses of rows, under DDP; of these the weights are written down too.
WEIGHTED: dict[str, dict[str, Any]] = {
    "weighted": {"gradient_accumulation_steps": 2},
    "weighted_packed": {"packing": True, "max_length": 96, "per_device_train_batch_size": 1},
}

# Cases that run with sharded weights too; in the last one the processes have unequal numbers of batches.
SHARDED = ("base", "uneven", "accumulation", "in_step", "calibrated", "guarded", "candidates", "targets", "parts")
FSDP = {
    "fsdp": True if FIVE else "full_shard auto_wrap",
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}
ZERO3 = {
    "deepspeed": {
        # Every weight is split, however small.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    },
    "use_cpu": False,
    "dataloader_pin_memory": False,
}


SEES = Version(trl.__version__) >= Version("1.8")  # rows with images are collated as they are here

# Before transformers 5.18 an optimizer's state is not loaded into several processes on CPUs, but for sharded ones.
RESUMES = DEVICE != "cpu" or Version(transformers.__version__) >= Version("5.18")


def fsdp_on_cpu() -> None:
    """Let accelerate use FSDP on CPUs: it asks for several GPUs where several processes are all that FSDP needs."""
    initialise = AcceleratorState.__init__

    def patched(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
        if PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        initialise(self, *arguments, **options)

    AcceleratorState.__init__ = patched


def deepspeed_on_cpu() -> None:
    """Let accelerate use DeepSpeed on CPUs, which it starts for accelerators only; and without compiling anything."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # sums through shared memory, in C++
    PartialState._prepare_backend = lambda self, *arguments: ("gloo", DistributedType.MULTI_CPU)


def build(case: str, folder: Path, **config: Any) -> tuple[Trainer, IFDSelectionCallback]:
    """The trainer of a case with its callback; the same rows, weights and seeds in every process."""
    options, settings = CASES[case]
    dropout = 0.1 if case == "base" else 0.0
    rows = text_rows(raw_rows(1 if case == "one_row" else ROWS))
    if case == "bad_cases":
        rows = rows.add_column("half", ["first", "second"] * (ROWS // 2))
    trainer = sft_trainer(
        folder,
        rows,
        model=build_model(len(TOKENIZER), attention_dropout=dropout),
        **{**settings, **config},
    )
    return trainer, select(trainer, **{"max_ifd": INF, **options})


class Watch(TrainerCallback):
    """Counts what scoring does on this process, and keeps the scores and the order of each epoch."""

    def __init__(self, trainer: Trainer, callback: IFDSelectionCallback, in_step: bool = False) -> None:
        self.forwards: list[int] = []
        self.tokens: list[list[int]] = []  # in each chunk of each epoch
        self.longest = 0  # tokens of a row's two segments
        self.ifd: list[list[float]] = []
        self.orders: list[list[int]] = []
        self.limits: list[float | None] = []
        self.selection, self.ids = callback, tokenised(trainer)["row_id"]
        scoring = False
        score_pool, score_pairs = callback.score_pool, pool_scorer_module.score_pairs

        def forward(module: torch.nn.Module, inputs: Any) -> None:
            if scoring:
                self.forwards[-1] += 1
                if in_step:  # as a sharded model gathers its weights: every process has to be in the same forward
                    torch.distributed.all_reduce(torch.ones(1))

        def counted_pairs(pairs: Any, **options: Any) -> Any:
            if not scoring:
                return score_pairs(pairs=pairs, **options)
            self.tokens[-1].append(token_count(pairs))
            self.longest = max([self.longest, *(token_count([pair]) for pair in pairs)])
            return score_pairs(pairs=pairs, **options)

        def counted_pool(*arguments: Any) -> Any:
            nonlocal scoring
            self.forwards.append(0)
            self.tokens.append([])
            scoring, pool_scorer_module.score_pairs = True, counted_pairs
            try:
                scores = score_pool(*arguments)
            finally:
                scoring, pool_scorer_module.score_pairs = False, score_pairs
            self.ifd.append(scores.ifd.tolist())
            return scores

        trainer.model.register_forward_pre_hook(forward)
        callback.score_pool = counted_pool
        trainer.add_callback(self)

    def on_epoch_begin(self, *arguments: Any, **options: Any) -> None:
        last = self.selection.chooser.last
        self.limits.append(last.limit if last else None)

    def on_epoch_end(self, *arguments: Any, **options: Any) -> None:
        self.orders.append([self.ids[position] for position in self.selection.sampler.order])


def in_fives(run: Any, tokens: np.ndarray, rank: int, world_size: int, chunk: int) -> dict[str, np.ndarray]:
    """`run_shares` with five rows in each call of `run`, so that a tiny pool takes several."""
    return run_shares(run, tokens, rank, world_size, 5)


def run(case: str, folder: Path, resume: Path | None = None, **config: Any) -> dict[str, Any]:
    """Train one case; what happened on this process."""
    trainer, callback = build(case, folder, **config)
    pool_scorer_module.run_shares = in_fives if case == "in_step" else run_shares
    watch = Watch(trainer, callback, in_step=case == "in_step" and trainer.accelerator.num_processes > 1)
    try:
        seen = train(trainer, resume_from_checkpoint=str(resume) if resume else None)
    finally:
        pool_scorer_module.run_shares = run_shares
    digest = hashlib.sha256()
    for tensor in whole_weights(trainer).values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    state = trainer.state
    epochs = sorted({update.epoch for update in seen.updates})
    return {
        "processes": trainer.accelerator.num_processes,
        "orders": watch.orders,
        "forwards": watch.forwards,
        "tokens": watch.tokens,
        "longest": watch.longest,
        "ifd": watch.ifd,
        "limits": watch.limits,
        "shares": callback.chooser.state.logged(),
        # For each epoch, each update, each batch: the row ids that were in it.
        "batches": [[update.batches for update in seen.updates if update.epoch == epoch] for epoch in epochs],
        "leftovers": seen.leftovers,
        "global_step": state.global_step,
        "max_steps": state.max_steps,
        "epoch": state.epoch,
        "learning_rates": [*seen.learning_rates(), seen.final_learning_rate],
        "losses": [entry["loss"] for entry in training_logs(trainer)],
        "weights": digest.hexdigest(),
    }


def weighted(case: str, folder: Path) -> list[list[int]]:
    """Train on rows that weigh differently; the positions of the rows of each update on this process."""
    trainer = sft_trainer(folder, ROWS, num_train_epochs=1, **DESCENT, **WEIGHTED[case])
    callback = select(trainer, keep=0.75, policy=InfoBatch(), train_losses=True)
    updates = watched(trainer, callback)
    if trainer.is_world_process_zero():
        torch.save(weights_of(trainer.model), folder / "weights.pt")
    return updates


def seeing(folder: Path) -> list[list[int]]:
    """Train a model that sees, on rows with images; the row ids of the updates of each epoch on this process."""
    from vision_models import build as build_seeing  # needs a newer transformers than other runs
    from vision_models import image_rows, stored_rows

    model, processor = build_seeing("llava")
    given = {"num_train_epochs": 2, "max_length": None, "per_device_train_batch_size": 1}
    trainer = sft_trainer(folder, stored_rows(image_rows(9)), model=model, tokenizer=processor, **given)
    select(trainer, keep=5, max_ifd=INF)
    seen = train(trainer)
    if trainer.is_world_process_zero():
        torch.save(seen.weights[1], folder / "weights.pt")
    return seen.epochs()


def whole_weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The trained weights, gathered where each process holds a part of them."""
    if not trainer.is_deepspeed_enabled:
        return weights_of(trainer.model)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(trainer.model.parameters())):
        return weights_of(trainer.model)


def main(folder: Path, cases: Iterable[str] = tuple(CASES), kind: dict[str, Any] | None = None) -> None:
    """The cases, and the first one again from its checkpoint; `kind` is how the weights are sharded."""
    rank = int(os.environ["RANK"])
    written: list[str] = []  # into histories, by this process

    def noted(event: str, arguments: tuple) -> None:
        if event == "os.rename" and Path(arguments[1]).parent.name == HISTORY:
            written.append(Path(arguments[1]).name)

    sys.addaudithook(noted)
    checkpoint = folder / "base" / f"checkpoint-{RESUME_FROM}"
    runs = {case: (case, dict(kind or {})) for case in cases}
    if RESUMES or kind:
        runs["resumed"] = ("base", {"resume": checkpoint, **(kind or {}), "save_strategy": "no"})
    found: dict[str, Any] = {}
    for name, (case, options) in runs.items():
        print(f"rank {rank}: {name}", flush=True)
        faulthandler.dump_traceback_later(CASE_LIMIT, exit=True)  # says where a case hangs, and ends the launch
        found[name] = {**run(case, folder / case, **options), "written": sorted(set(written))}
        faulthandler.cancel_dump_traceback_later()
        written.clear()
    if kind is None:
        found["weighted"] = {case: weighted(case, folder / case) for case in WEIGHTED}
        found["seeing"] = seeing(folder / "seeing") if SEES else []
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


def fail(folder: Path) -> None:
    """One process fails while the others are about to score."""
    trainer, callback = build("base", folder)
    if int(os.environ["RANK"]) == 1:

        def broken(*arguments: Any) -> None:
            raise OSError("this process has lost its data")

        callback.score_pool = broken
    trainer.train()


def fsdp(folder: Path) -> None:
    """The sharded cases under FSDP."""
    if DEVICE == "cpu":
        fsdp_on_cpu()
    os.environ["FSDP_VERSION"] = "2"  # of transformers 4.57, which leaves it to `accelerate launch`
    main(folder, [*SHARDED, "bf16", "cherry"], FSDP)


def zero3(folder: Path) -> None:
    """The sharded cases under DeepSpeed ZeRO-3."""
    if DEVICE == "cpu":
        deepspeed_on_cpu()
    main(folder, SHARDED, ZERO3)


def apart_and_fail(folder: Path) -> None:
    """The Cherry method on two machines of one process each, whose disks are not shared; then one process fails."""
    rank, os.environ["LOCAL_RANK"] = os.environ["RANK"], "0"
    found = run("cherry", folder / f"machine{rank}")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    fail(folder)


if __name__ == "__main__":
    {"ddp": main, "apart_and_fail": apart_and_fail, "fsdp": fsdp, "zero3": zero3}[sys.argv[1]](Path(sys.argv[2]))
    torch.distributed.destroy_process_group()  # a process that ends with its connections open may be aborted
    # Sharded weights keep their process groups, whose threads abort an interpreter that ends beneath them
    # (pytorch#179291): all there is to check is written by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
