"""Everything that touches Trainer internals.

A Trainer builds its train loader once and fixes steps, learning rate schedule and progress bar before the first
epoch. `attach` gives a trainer small overrides with which each epoch may train on rows of its own:

- `_get_train_sampler` hands out a `SelectionSampler`, an explicit list of row indices; whoever asks for another train
  loader while training runs (for its length, say) gets one with the same rows;
- `_get_dataloader` reads, with packing, bins of examples instead of the rows that TRL packed, and gives persistent
  workers a generator for their seed;
- `set_initial_training_values` takes the number of steps from the plan of all epochs;
- `create_scheduler` begins the learning rate schedule anew where training starts anew, after the brief experience;
- `_init_training_state` finds epoch and step of a checkpoint in that plan;
- `_run_epoch` runs the planned number of steps of its epoch, on the loader that was made for this pool;
- `get_batch_samples` and `_load_rng_state` go from one part of an epoch to the next (see `epoch_parts`);
- `training_step` weighs the losses of rows and keeps them, where that is asked for; `compute_loss` makes sure of it;
- `_save_checkpoint` writes the selection's order and scores beside `trainer_state.json`, before it;
- `train` refuses a checkpoint that was cut off while it was written, and a callback that was never added;
- `_load_callback_state` keeps `restore_callback_states_from_checkpoint` from rebuilding a callback without its trainer;
- `log` puts what is said of the first epoch with the script's own first entry;
- `push_to_hub` and `_push_from_checkpoint` leave the training texts at home.

What trainer and callback share is one object, a `SelectionRun`; what is refused is in `trainer_checks`, and whether the
installed transformers has these hooks is found out in `trainer_version`. `one_loop` has those of transformers 4.57.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SchedulerType, get_last_checkpoint

from ..data.answer_finder import answer_finder
from ..data.chat_template import last_answer
from ..data.paths import check_checkpoint
from ..errors import RunError, UserError
from ..method.number_words import many
from ..method.parts import Part
from ..method.schedule import EpochPlan, TrainingPlan, plan_epoch, plan_training
from ..scoring.model_parts import lm_head
from .collated_labels import check_collated, trained_tokens
from .epoch_parts import InParts
from .history import FOLDER as HISTORY
from .image_pool import ImagePool, collates_images
from .initial_weights import FOLDER as ORIGINAL
from .initial_weights import Snapshot
from .one_loop import OneLoop, follow_events
from .pool import PackedPool, Pool, TrainingRow
from .renamed_weights import load_renamed
from .row_tokens import Padding
from .selection_run import SelectionRun, SelectionSampler
from .trainer_checks import check_complete, check_kind, check_supported, sampling_strategy
from .trainer_version import ONE_LOOP, check_hooks

# Positions in the tuple that `set_initial_training_values` returns.
_EPOCHS, _UPDATES_PER_EPOCH, _TRAIN_SAMPLES, _STEPS_IN_EPOCH, _MAX_STEPS = 0, 1, 3, 5, 6


class EpochSelector(TrainerCallback):
    """A callback that chooses the rows of each epoch; `attach` lets the trainer follow it.

    Attributes:
        run: what it shares with the trainer.
        restart: the epoch before which weights, optimizer and learning rate schedule start anew; it and the epochs
            after it are the `num_train_epochs` that the user asked for.
        push_history: whether a push to a hub takes what selection wrote along, training texts among it.
    """

    run: SelectionRun
    restart: int | None = None
    push_history: bool = False

    @property
    def plan(self) -> TrainingPlan:
        """The steps of all epochs."""
        return self.run.plan

    @property
    def sampler(self) -> SelectionSampler:
        """What yields the rows of the epoch that runs."""
        return self.run.sampler

    def budget(self, epoch: int) -> int:
        """Training rows of an epoch, as `Pool.training_rows` counts them."""
        raise NotImplementedError

    def selects(self, epoch: int) -> bool:
        """Whether the rows of an epoch are chosen by a score, now or in an epoch before."""
        raise NotImplementedError

    def part_steps(self, epoch: int) -> int | None:
        """Updates of each part of an epoch, but perhaps the last; None where it is not divided."""
        return None

    def begin_part(self, part: Part) -> None:
        """Choose the rows of another part of the epoch that runs; `run.order` has them behind those before."""
        raise NotImplementedError

    def position(self, state: transformers.TrainerState) -> tuple[int, int]:
        """Epoch and updates done in it where a run is that starts, or resumes, with this state."""
        return self.plan.position(state.global_step)

    def gather(self) -> None:
        """Bring together what the processes hold of an epoch, before a checkpoint; all of them call it."""

    def start(self, epoch: int, state: transformers.TrainerState, checkpoint: str | None = None) -> None:
        """Training starts (or resumes) at `epoch`; `state` is the trainer's, from the checkpoint on a resume."""
        raise NotImplementedError

    def save(self, checkpoint: Path) -> None:
        """Write what is too large for `trainer_state.json` into the folder of a checkpoint, on the main process."""
        raise NotImplementedError


class SelectiveTrainer(InParts):
    """Overrides, mixed in before the trainer's own class by `attach`."""

    _header: str | None = None  # the text that begins an answer, where a user knows it
    _held_logs: dict[str, float] = {}  # noqa: RUF012 (replaced, never changed)
    _whole_rows = False  # whether rows of which nobody can tell the answer are taken as they are
    _attached: str | None = None  # the class of a callback that was made for this trainer, which is to be added

    @property
    def _selector(self) -> EpochSelector | None:
        selectors = [c for c in self.callback_handler.callbacks if isinstance(c, EpochSelector)]
        if len(selectors) > 1:
            raise UserError(f"A trainer follows one selection callback, found {len(selectors)}: remove the others.")
        return selectors[0] if selectors else None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as before; a checkpoint that was cut off while it was written is refused by name."""
        self.check_before_training(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_before_training(self, resume_from_checkpoint: Any = None) -> None:
        """Refuse a checkpoint that was cut off while it was written, and a callback that was never added."""
        selector = self._selector
        if selector is None and self._attached:
            raise UserError(
                f"The {self._attached} that was made for this trainer is not among its callbacks, so the run would "
                "train on all rows. Add it: trainer.add_callback(callback). To train without selection, call "
                "trainer.remove_callback(callback)."
            )
        if selector is not None and resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True and Path(self.args.output_dir).is_dir():
                checkpoint = get_last_checkpoint(self.args.output_dir)
            else:
                checkpoint = check_checkpoint(checkpoint, self.args.output_dir)
            if checkpoint is not None:
                check_complete(Path(checkpoint))
        if selector is not None:
            selector.run.called, selector.run.order, self._held_logs = True, [], {}

    @property
    def selection_pool(self) -> Pool:
        """What is selected from: the training set as it is now, unpacked if it is packed."""
        pool = self.__dict__.get("_selection_pool")
        if pool is None or pool.source is not self.train_dataset:
            self._selection_pool = pool = _pool_of(self)
            try:
                pool.finder  # noqa: B018
            except UserError:
                if not self._whole_rows:
                    self._selection_pool = None
                    raise
                pool.whole = True
        return pool

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any) -> Any:
        selecting = self._selector is not None
        if is_training and selecting and getattr(self.args, "packing", False):
            check_supported(self)
            dataset = self.selection_pool.dataset
        loader = super()._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        if selecting and self.args.dataloader_persistent_workers:
            # Workers are seeded when they start: once in a whole run, once more in a resumed one. Drawn from the global
            # random state, as is usual, that seed would shift all that a resumed run draws after it, as for dropout.
            inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps it
            inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        selector = self._selector
        if selector is None:
            return super()._get_train_sampler(train_dataset)
        check_supported(self)  # again: arguments may have changed since `attach`
        selector.run.strategy = sampling_strategy(self)
        selector.run.order = selector.run.order or list(range(selector.budget(0)))
        return selector.run.new_sampler(self.selection_pool)

    def set_initial_training_values(self, args: Any, dataloader: Any, *batch: int) -> tuple:
        selector = self._selector
        if selector is None:
            return super().set_initial_training_values(args, dataloader, *batch)
        plan = self._plan(selector, args, dataloader)  # before the trainer's own errors, which speak of other things
        values = list(super().set_initial_training_values(args, dataloader, *batch))
        cut = sum(epoch.updates for epoch in plan.epochs) - plan.max_steps  # of a last epoch that is not finished
        values[_EPOCHS] = len(plan.epochs)
        values[_TRAIN_SAMPLES] = plan.rows - cut * self.get_total_train_batch_size(args)
        values[_UPDATES_PER_EPOCH] = plan.epochs[0].updates
        values[_STEPS_IN_EPOCH], values[_MAX_STEPS] = plan.epochs[0].batches, plan.max_steps
        return tuple(values)

    def _plan(self, selector: EpochSelector, args: Any, dataloader: Any) -> TrainingPlan:
        """The plan of a run on this loader, which its selector and this trainer share from now on."""
        run = selector.run
        run.begin(())
        run.sampler = sampler = run.sampler_of(dataloader)
        if sampler is None:
            raise UserError(
                "The train data loader does not use the selection's sampler: it comes from a streaming data set, or "
                "from a get_train_dataloader of your own. Let the trainer build it from trainer.train_dataset."
            )

        def of_epoch(epoch: int) -> EpochPlan:
            budget = selector.budget(epoch)
            batches = sampler.batches(dataloader, budget)
            if not batches:
                raise UserError(
                    f"Epoch {epoch} is planned with {many(budget, 'row')}, fewer than one global batch, and "
                    "dataloader_drop_last=True would drop them all. Raise keep, lower the batch size, or set "
                    "dataloader_drop_last=False."
                )
            return plan_epoch(epoch, budget, batches, args.gradient_accumulation_steps)

        before = selector.restart or 0
        plan = plan_training(of_epoch, before + args.num_train_epochs, args.max_steps, selector.restart)
        steps = tuple(selector.part_steps(epoch.epoch) for epoch in plan.epochs)
        run.plan = plan = replace(plan, every_steps=steps) if any(steps) else plan
        run.batch = getattr(dataloader, "total_batch_size", args.train_batch_size * args.world_size)
        run.accumulation = args.gradient_accumulation_steps
        run.folder = Path(self._get_output_dir(getattr(self, "_trial", None)))
        if selector.restart is not None and len(plan.phases) < 2:
            raise UserError(
                f"max_steps={args.max_steps} ends in the brief experience, which takes {plan.phases[0]} updates; the "
                "training on the selected rows comes after it. Raise max_steps, or go without the brief experience."
            )
        if not any(selector.selects(epoch.epoch) for epoch in plan.epochs):
            raise UserError(
                f"None of {many(len(plan.epochs), 'planned epoch')} selects rows: all of them are warm-up epochs, or "
                "train on the whole pool. Lower warmup_epochs (or the share of Anneal), raise the number of epochs, or "
                "train without the callback."
            )
        return plan

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        selector = self._selector
        if selector is not None and self.lr_scheduler is None:
            self._check_polynomial(selector.plan.phases)
        if selector is None or selector.restart is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        phases, parts, given = selector.plan.phases, [], self.args.lr_scheduler_kwargs
        for steps in phases:
            self.lr_scheduler = None
            self.args.lr_scheduler_kwargs = copy.deepcopy(given)  # LLaMA-Factory fills in those of the steps
            parts.append(getattr(super().create_scheduler(steps, optimizer), "lr_lambdas", None))
        if None in parts:
            raise UserError(
                f"lr_scheduler_type={SchedulerType(self.args.lr_scheduler_type).value!r} is no function of the step "
                "alone, so it cannot begin anew after the brief experience. Use linear, cosine or another one that is."
            )
        factors = [_in_turn(group, phases) for group in zip(*parts, strict=True)]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.lr_scheduler.optimizer, factors)
        return self.lr_scheduler

    def _check_polynomial(self, phases: Sequence[int]) -> None:
        """Raise where the polynomial schedule would divide by its updates after the warm-up, and there are none."""
        if self.args.lr_scheduler_type != SchedulerType.POLYNOMIAL:
            return
        for steps in phases:
            if self.args.get_warmup_steps(steps) >= steps:
                raise UserError(
                    f"lr_scheduler_type='polynomial' needs updates after its warm-up, but all {steps} are warm-up. "
                    "Lower warmup_steps, raise keep or the number of epochs, or use another schedule, such as linear."
                )

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: Any, trial
    ) -> tuple[int, int]:
        result = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if self._selector is None:
            return result
        epoch, updates = self.start_run(resume_from_checkpoint)
        skip = 0 if self.args.ignore_data_skip else updates * self.args.gradient_accumulation_steps
        return epoch, skip

    def resumed_position(self) -> tuple[int, int]:
        """Epoch and updates done in it where the run is, by the trainer's state."""
        plan = self._selector.plan
        if self.state.global_step >= plan.max_steps:
            return len(plan.epochs), 0  # finished: without this, one more step would be made
        return self._selector.position(self.state)

    def start_run(self, checkpoint: str | None) -> tuple[int, int]:
        """Let the selector start, or resume; where, as `resumed_position`."""
        selector, position = self._selector, self.resumed_position()
        if checkpoint and isinstance(self.selection_pool, ImagePool):
            load_renamed(self.model, checkpoint)
        selector.start(position[0], self.state, checkpoint)
        # The trainer stores states of the callbacks that it found here.
        self.state.stateful_callbacks.setdefault(type(selector).__name__, selector.state())
        return position

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if (selector := self._selector) is None:
            return super().training_step(model, inputs, *args, **kwargs)
        with selector.run.losses.of_batch(self, model, inputs):
            return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if (selector := self._selector) is not None:
            selector.run.losses.check(loss, self, kwargs.get("num_items_in_batch"))
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        selector = self._selector
        if selector is not None:
            selector.gather()
        if selector is not None and self.args.should_save:  # before trainer_state.json, which holds its digest
            folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            selector.save(folder)
        super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        selector, stored = self._selector, self.state.stateful_callbacks
        name = type(selector).__name__
        mine = stored.pop(name, None) if selector is not None else None
        super()._load_callback_state()
        if mine is not None:
            stored[name] = mine

    def _run_epoch(self, **kwargs: Any) -> Any:
        if self._selector is not None:
            resumed = kwargs["epoch"] == kwargs["epochs_trained"] and kwargs["resume_from_checkpoint"] is not None
            done = kwargs["steps_trained_in_current_epoch"] // self._selector.run.accumulation if resumed else 0
            plan = self.begin_epoch(kwargs["epoch"], kwargs["train_dataloader"], done)
            self.begin_parts(kwargs["train_dataloader"], kwargs["resume_from_checkpoint"] if done else None)
            kwargs["steps_in_epoch"], kwargs["num_update_steps_per_epoch"] = plan.batches, plan.updates
            if self._selector.run.starts_anew:
                kwargs["resume_from_checkpoint"] = None
        try:
            return super()._run_epoch(**kwargs)
        finally:
            self.end_parts()

    def begin_epoch(self, epoch: int, loader: Any, done: int) -> EpochPlan:
        """What is planned for an epoch whose rows are selected, and of which `done` updates were made before.

        Raises:
            RunError: where the loader is another one, or reads something else, than what was planned.
        """
        run = self._selector.run
        plan = run.plan.epochs[epoch]
        run.epoch, run.sampler = plan.epoch, run.sampler_of(loader)
        run.first_step = self.state.global_step - done
        run.starts_anew = plan.epoch == self._selector.restart and not done
        self.check_batches(loader)
        if run.sampler.pool is not self.selection_pool:
            raise RunError(
                f"trainer.train_dataset was exchanged before epoch {plan.epoch}, but the train data loader reads the "
                "one that was there when training began. With a selection callback it has to stay."
            )
        run.losses.begin(loader, done * run.accumulation, self.selection_pool)
        run.sampler.watch()
        return plan

    def check_batches(self, loader: Any) -> None:
        """Raise where a loader has other batches for the rows of the part that begins than were planned."""
        run = self._selector.run
        planned, rows = run.this_part.batches, len(run.order) - run.this_part.first_row
        batches = run.sampler.batches(loader, rows) if run.sampler is not None else None
        if batches != planned:
            raise RunError(
                f"Epoch {run.epoch} has {many(batches, 'batch', 'batches')}, but {planned} were planned. The "
                "train data loader was changed after training began; with a selection callback it has to stay."
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as before; the first entry of a run has what was held back for it."""
        held, self._held_logs = self._held_logs, {}
        together = {**logs, **held} if held else logs
        super().log(together, *args, **kwargs)
        logs.update({name: value for name, value in together.items() if name not in held})  # such as the epoch

    def log_selection(self, logs: dict[str, float]) -> None:
        """Log what was selected: by itself, or with the first entry of a run, which stays the script's own."""
        if self.state.log_history:
            with metrics_set_aside(self):
                self.log(logs)
        else:
            self._held_logs = {**self._held_logs, **logs}

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Upload as before, but for what selection wrote: it holds texts of the training set."""
        with _kept_at_home(self._selector):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with _kept_at_home(self._selector):
            super()._push_from_checkpoint(checkpoint_folder)


def tokenizer_of(trainer: Trainer) -> Any:
    """The trainer's tokenizer.

    Raises:
        UserError: where it has none.
    """
    tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
    if tokenizer is None or not hasattr(tokenizer, "all_special_ids"):
        raise UserError("The trainer has no tokenizer: pass processing_class=tokenizer to the trainer.")
    return tokenizer


def attach(trainer: Trainer, header: str | None = None, whole_rows: bool = False) -> None:
    """Let `trainer` follow an `EpochSelector` among its callbacks; without one it behaves as before.

    Args:
        header: the text that begins an answer, where a user knows it.
        whole_rows: whether rows of which nobody can tell the answer are taken as they are.

    Raises:
        TypeError: when `trainer` is no Trainer.
        ImportError: when this version of transformers has other hooks.
        ValueError: for a configuration in which a selection could not be exact; the message has the fix.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"The callback needs the trainer it selects for: IFDSelectionCallback(trainer, ...), got {trainer!r}."
        )
    check_kind(trainer)
    check_supported(trainer)
    check_hooks(trainer)
    if not isinstance(trainer, SelectiveTrainer):
        cls = type(trainer)
        ours = (OneLoop, SelectiveTrainer) if ONE_LOOP else (SelectiveTrainer,)
        trainer.__class__ = type(cls.__name__, (*ours, cls), {"__module__": cls.__module__})
        _notice_removal(trainer)
        _follow_assigned_train(trainer)
        if ONE_LOOP:
            follow_events(trainer)
    trainer._header, trainer._whole_rows, trainer._selection_pool = header, whole_rows, None


def _follow_assigned_train(trainer: Trainer) -> None:
    """Let a `train` that was assigned on the instance, as Unsloth does, be checked as the class's own is.

    It goes on with the `train` that the class had before.
    """
    if (assigned := vars(trainer).get("train")) is None:
        return

    @wraps(assigned)
    def train(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        trainer.check_before_training(resume_from_checkpoint)
        return assigned(resume_from_checkpoint, *args, **kwargs)

    trainer.train = train


def _notice_removal(trainer: Trainer) -> None:
    """Let a trainer whose selection callback was removed on purpose train as before."""
    handler = trainer.callback_handler  # whose methods are asked for in each call, also by a method bound before

    def noticing(remove: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def removed(callback: Any) -> Any:
            if issubclass(callback if isinstance(callback, type) else type(callback), EpochSelector):
                trainer._attached = None
            return remove(callback)

        return removed

    handler.remove_callback = noticing(handler.remove_callback)
    handler.pop_callback = noticing(handler.pop_callback)


def start_anew(trainer: Trainer, snapshot: Snapshot) -> None:
    """Put back the original weights, and let optimizer, random state and best checkpoint begin as in a new run.

    The learning rate schedule begins anew by itself (`create_scheduler`). The random state becomes the one that
    `Trainer` sets when it is made, `set_seed(args.seed)`.
    """
    reshard(trainer.model)
    snapshot.restore(trainer.model)
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    optimizer.state.clear()
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    set_seed(trainer.args.seed)


def reshard(model: nn.Module) -> None:
    """Let each process hold nothing but its own part of the weights: FSDP leaves some whole after a forward."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def _in_turn(factors: Sequence[Callable[[int], float]], phases: Sequence[int]) -> Callable[[int], float]:
    """The factor of the learning rate at a step of all phases; each phase counts its steps from 0."""

    def factor(step: int) -> float:  # a function, not an object: those would be written into checkpoints
        phase = 0
        while phase < len(phases) - 1 and step >= phases[phase]:
            step, phase = step - phases[phase], phase + 1
        return factors[phase](step)

    return factor


def scoring_model(trainer: Trainer) -> tuple[nn.Module, bool]:
    """The model that scores, and whether the processes hold parts of its weights (FSDP, DeepSpeed ZeRO-3).

    Such a model gathers its weights in every forward of the wrapped module, so all processes have to run the same
    number of forwards. Otherwise it is the model itself: DDP's wrapper would only add its bookkeeping.
    """
    by_transformers = getattr(trainer, "is_distributed_loading_by_transformers", False)  # since transformers 5.22
    sharded = bool(trainer.is_fsdp_enabled or _by_zero3(trainer) or by_transformers)
    return (trainer.model_wrapped if sharded else trainer.model), sharded


def _by_zero3(trainer: Trainer) -> bool:
    return trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3


def announce_lm_head(trainer: Trainer) -> None:
    """Tell ZeRO-3 that TRL's loss reads the weight of the LM head in the model's own forward, before the first one.

    ZeRO-3 finds such a read by itself, unless the weight happens to be there at the first one. After scoring, which
    calls the head as a module, it is: ZeRO-3 fetches ahead by the order of the forward before. The weight would then
    be missing in the backward pass (measured with deepspeed 0.19.8 and trl 1.16). Once a forward has set that order,
    as that of a run which is resumed inside an epoch, it is too late: the next one would be an error where the loss
    reads no weight (trl 0.24).
    """
    if not (_by_zero3(trainer) and any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)):
        return
    import deepspeed

    head, modules = lm_head(trainer.model), trainer.model.modules()
    parent = next((module for module in modules if head in module.children()), None) if head else None
    if parent is not None:
        deepspeed.zero.register_external_parameter(parent, head.weight)


def template_of(trainer: Trainer) -> str | None:
    """The chat template that a trainer writes its rows with, where that is not its tokenizer's own."""
    given, processor = getattr(trainer, "chat_template", None), trainer.processing_class
    if given is not None or getattr(tokenizer_of(trainer), "chat_template", None):
        return given
    own = getattr(processor, "chat_template", None)
    return own.get("default") if isinstance(own, dict) else own


def _pool_of(trainer: Trainer) -> Pool:
    tokenizer, args, dataset = tokenizer_of(trainer), trainer.args, trainer.train_dataset
    images = collates_images(trainer)
    template, tokens = template_of(trainer), None if images else trained_tokens(trainer)
    chats = "messages" in (getattr(dataset, "column_names", None) or [])
    said = (lambda row: last_answer(dataset[row]["messages"])) if chats and not images else None
    answers = partial(answer_finder, tokenizer, template=template, header=trainer._header, said=said)
    token, cut_at_start = tokenizer.pad_token_id, getattr(args, "truncation_mode", None) == "keep_end"
    padding = Padding(token, token == tokenizer.bos_token_id, cut_at_start)
    if images:
        return ImagePool(trainer, answers, padding)
    if getattr(args, "packing", False):
        # The first process writes the unpacked examples to the cache of `datasets`, the others read them there.
        with args.main_process_first(desc="unpacking the training set"):
            pool = PackedPool(dataset, args.max_length, answers, tokens)
    else:
        pool = Pool(dataset, answers, padding, tokens)
    check_collated(trainer, pool)
    return pool


def batch_order(
    trainer: Trainer, rows: list[TrainingRow], lengths: np.ndarray, order: str, seed: int
) -> list[TrainingRow]:
    """The order in which an epoch visits its training rows.

    Args:
        rows: training rows, highest score first.
        lengths: tokens of each row, for `group_by_length`; bins are about equally long and are not grouped.
        order: "shuffle" (in the pool's order with train_sampling_strategy="sequential"), "descending" or "ascending"
            score.
        seed: of the shuffle and of the grouping by length; another one for each epoch.
    """
    args, strategy = trainer.args, trainer._selector.run.strategy
    generator = torch.Generator().manual_seed(seed)
    if strategy == "sequential" and order == "shuffle":
        return sorted(rows)
    if strategy == "group_by_length" and not trainer.selection_pool.packed:
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return [rows[i] for i in get_length_grouped_indices(lengths.tolist(), batch, generator=generator)]
    if order == "shuffle":
        return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
    return list(rows if order == "descending" else reversed(rows))


# Of an output folder, what selection and its report wrote there: texts of the training set, and the original weights.
_AT_HOME = (f"*{HISTORY}/*", f"*{ORIGINAL}/*", "*report.html", "*report_files/*")


@contextlib.contextmanager
def _kept_at_home(selector: EpochSelector | None) -> Iterator[None]:
    """Leave training texts out of what is uploaded from the output folder, unless the user asked for them."""
    if selector is not None and selector.push_history:
        yield
        return
    with contextlib.ExitStack() as stack:
        for owner in (HfApi, transformers.trainer):
            if (upload := getattr(owner, "upload_folder", None)) is not None:
                stack.enter_context(mock.patch.object(owner, "upload_folder", _without(upload, _AT_HOME)))
        yield


def _without(upload: Callable[..., Any], patterns: Sequence[str]) -> Callable[..., Any]:
    @wraps(upload)
    def uploaded(*args: Any, ignore_patterns: Sequence[str] | str | None = None, **kwargs: Any) -> Any:
        given = [ignore_patterns] if isinstance(ignore_patterns, str) else list(ignore_patterns or [])
        return upload(*args, ignore_patterns=[*given, *patterns], **kwargs)

    return uploaded


@contextlib.contextmanager
def metrics_set_aside(trainer: Trainer) -> Iterator[None]:
    """Let `trainer.log` be called without it averaging and clearing the metrics that TRL or ms-swift has gathered."""
    gathered = {name: getattr(trainer, name, None) for name in ("_metrics", "custom_metrics")}
    gathered = {name: metrics for name, metrics in gathered.items() if isinstance(metrics, dict)}
    for name, metrics in gathered.items():
        empty = {mode: copy.copy(values) for mode, values in metrics.items()}
        for values in empty.values():
            values.clear()
        setattr(trainer, name, empty)
    try:
        yield
    finally:
        for name, metrics in gathered.items():
            setattr(trainer, name, metrics)
