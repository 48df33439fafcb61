"""When to score and select: at the start of each epoch of a Trainer run.

`IFDSelectionCallback` only decides when. The trainer's rows are in `pool`, their scores come from `pool_scorer`, the
choice from `row_chooser`, the plan of steps from `method.schedule`; `trainer_hooks` makes the trainer follow.
"""

from __future__ import annotations

import logging
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
import transformers
from transformers import PreTrainedModel, Trainer
from transformers.trainer_callback import ExportableState

from ..data.distinct_prompts import Prompts
from ..data.encoding import Encoder
from ..data.response_header import response_prefix
from ..data.target_rows import EncodedTargets
from ..data.token_decoding import Decoder
from ..errors import RunError, UserError
from ..method.brief_experience import Brief
from ..method.calibrated_limit import CalibratedLimit
from ..method.choices import BriefRows, Order, TurnRule
from ..method.columns import SCORES
from ..method.facility_location import Diverse
from ..method.further_scores import SCORED_BY_MODEL
from ..method.guard import Guard
from ..method.lead import Lead
from ..method.parts import Part, divide, scored_rows
from ..method.plain_data import to_data
from ..method.reasons import NOT_SCORED, Status
from ..method.rescoring import Rescoring
from ..method.schedule import EpochRows, Schedule, Timing, as_schedule, unlike_epochs
from ..method.scoring_health import WATCHED
from ..method.selection import Policy, Selection, coded
from ..method.stratified import Stages
from ..scoring.losses import Scores
from .candidate_scoring import Candidates, check_candidates
from .checkpoint_state import MUST_MATCH, VERSION, check_resumable, load_selection, save_selection
from .console import end_line, epoch_line, say
from .first_scoring import FirstScoring
from .held_out_loss import evaluates_later, losses_before, losses_of
from .history import FOLDER, History, epoch_record, epoch_rows, place_of
from .image_pool import ImagePool
from .image_pool_scorer import check_image_run, guard_of_images, pool_scorer_of
from .initial_weights import FOLDER as ORIGINAL
from .initial_weights import Snapshot
from .lead_state import check_lead
from .options import (
    Scoring,
    asked_scores,
    check_options,
    check_order,
    check_parts,
    groups_of,
    guard_of,
    needs_answers,
    of_whole_rows,
    reads_scores,
    without_weights,
)
from .pool import Pool, TrainingRow
from .pool_line import RowsBefore, pool_line, rows_before, save_left_out
from .row_chooser import RowChooser
from .row_weights import TrainLosses, check_weighable
from .selection_run import SelectionRun
from .trackers import log_histograms
from .trainer_checks import check_timing, sampling_strategy
from .trainer_hooks import (
    EpochSelector,
    announce_lm_head,
    attach,
    batch_order,
    reshard,
    scoring_model,
    start_anew,
    tokenizer_of,
)

logger = logging.getLogger(__name__)

_TEXTS = 1000  # pool rows decoded at a time for the history


class IFDSelectionCallback(EpochSelector, ExportableState):
    """Before each epoch, score the pool with the model as it is and train on the rows with the highest IFD.

        trainer = SFTTrainer(model=..., args=SFTConfig(...), train_dataset=ds)
        trainer.add_callback(IFDSelectionCallback(trainer, keep=0.10))
        trainer.train()

    The pool is the trainer's prepared training set; an answer is a run of `labels != -100`, without the template's
    end-of-turn tokens, and the score of a row with several is that of all their tokens (see `Scoring`). IFD = cas / das
    (arXiv 2308.12032) with the response header that all prompts share before the direct answer. Rows with IFD >=
    `max_ifd` and unscorable rows are dropped. Steps, `max_steps`, the learning rate schedule and `state.epoch` follow
    the planned budgets. Scoring leaves no trace in the random state or the modules' modes.

    With `packing=True` (strategy "bfd") the pool is the examples inside the packed rows, known by their position
    there, and a row of the plan is a packed row: a fraction `keep` is one of the packed rows of the whole pool (that
    is, of its tokens), an int `keep` a number of packed rows. Examples are taken from the highest score downwards, as
    many as best-fit decreasing packs into exactly that number of rows of at most `max_length` tokens, anew in each
    epoch; only if all eligible ones leave rows empty does `on_shortfall` say what fills them. Examples stay whole, and
    the first token of one is never predicted from the one before it. The tiers of a `Curriculum` are of packed rows,
    each with examples of one tier alone: the tier with the highest scores is filled first, as above, then the next
    from the examples that follow.

    Several processes share the scoring and train on one order. As in any run, accelerate's `even_batches` fills the
    last global batch of an epoch with the first rows of its order: those are trained on twice.

    What was selected is logged through `trainer.log` (keys `ifd/...`), said in a line for each epoch (see
    `training.console`) and written to `<output_dir>/ifd_history`; see `training.history`. Where the trainer evaluates,
    the held-out loss before the first epoch is measured too, unless `eval_delay` says to wait.

    Args:
        trainer: the trainer that this callback is added to.
        keep: rows per epoch: a fraction of the pool (float), a number of rows (int), or a list with one entry per
            epoch. With packing, packed rows.
        max_ifd: rows at or above this score are dropped: 1 by default, float("inf") for no limit. "calibrated", or a
            `CalibratedLimit`, measures it in each scoring, so that a stated share of mismatched rows passes it at most.
            A limit that is set here takes the place of the guard's.
        guard: what keeps noise out of the selection, a `Guard`; see there. By default ("auto") on where rows are
            selected by their scores before each epoch, and off in `cherry`, with `scorer="columns"` but for duplicates,
            and with a policy whose rows have no limit of IFD, as a `Cherry` has; None for none.
        seed: of the shuffle and of repeats; the trainer's `args.seed` by default.
        schedule: a `Constant`, `PerEpoch`, `Curriculum` or `Anneal` in place of `keep`.
        policy: which rows are kept: a `Cherry`, a `Diverse` for rows that stand for others too (facility location over
            prompt embeddings, as Superfiltering.D), a `TargetSet` for rows like some examples (RDS+), or a callable of
            your own, see `Policy`. `score=`, `on_shortfall=` and `diverse=0.2` (for `Diverse(0.2)`) are short for it.
            `score="ira"` ranks by a further score, highest first; `policy=LowestScores("rifd")` keeps the lowest.
        timing: when rows are scored and selected, and what is trained on before; see `Timing`. Its fields may be given
            by name: `every=2, warmup_epochs=1, freeze_after=3`; `every_steps=100` scores again within an epoch.
        scoring: how rows are scored; see `Scoring`. Its fields may be given by name: `min_answer_tokens=4`,
            `scores=("ira", "loss_change")`.
        scorer: None to score with the model in training; a name, a path or a loaded model to score with that one, whose
            scores do not change (`freeze_after=0` makes them once); "columns" for the scores that the training set has
            from `IFDScorer`.
        order: "shuffle" (another one each epoch; the pool's order with train_sampling_strategy="sequential"),
            "descending" or "ascending" score (packed rows go by the mean rank of their examples).
        id_column: column of row ids in the training set; "row_id" or "id" if there is one, else the position.
        push_history: let `push_to_hub` upload `ifd_history` and reports too; they hold texts of the training set.

    Raises:
        TypeError: without a trainer.
        ValueError: for a configuration in which selection cannot be exact.
    """

    def __init__(
        self,
        trainer: Trainer,
        keep: float | int | Sequence[float | int] | Schedule = 0.10,
        max_ifd: float | CalibratedLimit | Literal["calibrated"] | None = None,
        seed: int | None = None,
        *,
        guard: Guard | Literal["auto"] | bool | None = "auto",
        schedule: Schedule | None = None,
        policy: Policy | None = None,
        timing: Timing | None = None,
        scoring: Scoring | None = None,
        scorer: str | PreTrainedModel | None = None,
        order: Order = "shuffle",
        id_column: str | None = None,
        push_history: bool = False,
        **more: Any,
    ) -> None:
        check_options(scorer, seed, order)
        self.policy, self.timing, self.scoring = groups_of(policy, timing, scoring, max_ifd, more)
        self.policy, self.weighted = without_weights(self.policy)
        self.schedule = as_schedule(keep if schedule is None else schedule)
        self.restart = self.timing.restart
        self.guard = guard_of(guard, self.policy, self.timing, scorer, max_ifd is not None)
        self.further = asked_scores(self.policy, self.scoring, scorer)
        needed = needs_answers(self.policy, self.timing, guard, scorer, self.further)
        attach(trainer, self.scoring.header, not needed)
        check_order(order, sampling_strategy(trainer))
        if isinstance(trainer.selection_pool, ImagePool):
            limit = getattr(self.policy, "max_ifd", None)
            check_image_run(trainer, self.policy, self.timing, scorer, self.further, limit)
            self.guard = guard_of_images(self.guard, guard)
        if trainer.selection_pool.whole:
            self.guard = of_whole_rows(self.guard)
        self.reads_scores = reads_scores(self.policy, self.schedule, self.guard, scorer, order, self.further)
        self.run = SelectionRun()
        check_timing(trainer, self.timing)
        check_parts(self.policy, self.timing, self.schedule, scorer)
        if isinstance(self.policy, Lead):
            check_lead(self.policy, self.timing, scorer, trainer.selection_pool.packed)
            self.scoring = replace(self.scoring, train_losses=True)
        if self.weighted is not None or getattr(self.policy, "gives_weights", False):
            check_weighable(trainer, f"policy={self.weighted or self.policy!r}")
        if self.scoring.train_losses:
            check_weighable(trainer, "train_losses=True")
        if self.weighted is not None:
            trainer.selection_pool.column(self.weighted.by)  # if there is none, this is the time to say so
        if isinstance(self.policy, Diverse) and trainer.selection_pool.packed:
            raise UserError(
                "diverse= chooses examples that stand for others, whatever their length: how many of them fill a "
                "packed row is not known before. Set packing=False, or leave diverse out."
            )
        if isinstance(self.policy, Stages) and trainer.selection_pool.packed:
            raise UserError(
                "Stages train on the rows of one value after those of another, and how many packed rows those of a "
                "value fill is not known before. Set packing=False."
            )
        self.trainer = trainer
        self._seed, self.order, self.id_column, self.push_history = seed, order, id_column, push_history
        self.tokenizer = tokenizer_of(trainer)
        # The trainer has cut rows to its max_length already: what is left is what it trains on, and what is scored.
        encoder = Encoder(self.tokenizer, min_answer_tokens=self.scoring.min_answer_tokens)
        scoring = self.scoring
        self.pool_scorer = pool_scorer_of(
            *(trainer, scoring.without, encoder, scorer, scoring.embedder),
            *(scoring.token_budget, self.further, scoring.guess, scoring.turns),
        )
        candidates = None
        if self.timing.rescore == "candidates":
            pool = trainer.selection_pool
            check_candidates(self.policy, scorer, self.further, isinstance(pool, ImagePool), pool.whole)
            limits = (getattr(self.policy, "max_ifd", None), self.guard and self.guard.limit)
            pairs = next((limit.pairs for limit in limits if isinstance(limit, CalibratedLimit)), 0)
            candidates = Candidates(self.pool_scorer, Rescoring(self.timing.rescore_budget), pairs)
        self.chooser = RowChooser(
            self.pool_scorer, self.policy, self.timing.warmup, self.guard, self.further, candidates
        )
        self.history: History | None = None
        self._prefix: list[int] | None = None
        self._fingerprint: str | None = None
        self._epoch: int | None = None  # the epoch that was selected last, and whether it has ended
        self._ended = False
        self._next_epoch = 0
        self._saved: dict[str, Any] | None = None  # what the last checkpoint holds of the selection
        self._restored: dict[str, Any] | None = None
        self._restored_arrays: dict[str, np.ndarray] = {}
        self._training_since: float | None = None
        self._of_stages: tuple[Pool, Any] | None = None  # a column of the pool that says in which stage rows are
        self._before: dict[str, Any] | None = None  # held-out losses before training, once they are known
        self.rows_before: RowsBefore | None = None  # the training set before it was prepared, where more is known of it
        self.in_command = False  # whether a command tells what the pool is, and where its report
        trainer._attached = type(self).__name__

    @classmethod
    def cherry(
        cls,
        trainer: Trainer,
        keep: float | int | Sequence[float | int] = 0.05,
        *,
        brief: Brief | BriefRows | None = "kmeans",
        scorer: str | PreTrainedModel | None = None,
        guard: Guard | bool | None = None,
        **options: Any,
    ) -> IFDSelectionCallback:
        """The whole method of arXiv 2308.12032 in one `trainer.train()`.

            trainer.add_callback(IFDSelectionCallback.cherry(trainer, keep=0.05))

        One epoch on the brief-experience sample; the pool scored once, by the model that this gives; then weights,
        optimizer, learning rate schedule and random state start anew, and the trainer's `num_train_epochs` are trained
        on the rows with the highest IFD. `state.epoch` and the history count the brief experience as epoch 0;
        `max_steps` counts its steps too. Resumable in each part. The original weights wait on disk, in
        `<output_dir>/ifd_original`, as large as the trainable parameters; the folder goes when training ends.

        Args:
            keep: as for the callback; a list has one entry for each epoch after the brief experience.
            brief: "kmeans" or "random" rows, or a `Brief` with other numbers; None to score with the model as it is,
                as version 2 of the authors' method does.
            scorer: score with another model, by name or instance, and without a brief experience (Superfiltering,
                arXiv 2402.00530: `scorer="gpt2"`); "columns" for scores that the training set already has.
            guard: what keeps noise out of the selection; nothing by default, as in the paper.
            options: other arguments of the callback.

        Raises:
            ValueError: for packing together with a brief experience, or under DeepSpeed.
        """
        brief = Brief(brief) if isinstance(brief, str) else brief
        if scorer is not None:
            brief = None
        others = {field.name: options.pop(field.name) for field in fields(Timing) if field.name in options}
        return cls(trainer, keep, timing=Timing.cherry(brief, **others), scorer=scorer, guard=guard, **options)

    # ---- what the loop asks -------------------------------------------------------------------------------------

    @property
    def pool(self) -> Pool:
        """What is selected from."""
        return self.trainer.selection_pool

    @property
    def seed(self) -> int:
        """Of the shuffle and of repeats."""
        return self.trainer.args.seed if self._seed is None else self._seed

    @property
    def scores(self) -> Scores | None:
        """The last scores of the pool's rows; None before there are any."""
        return None if self.chooser.last is None else self.chooser.last.scores

    @property
    def scored_at(self) -> int | None:
        """The epoch at whose start they were made."""
        return None if self.chooser.last is None else self.chooser.last.epoch

    @property
    def targets(self) -> EncodedTargets | None:
        """What rows are held against; None with another policy than a `TargetSet`."""
        return getattr(self.chooser.state, "targets", None)

    @property
    def turns(self) -> TurnRule | None:
        """How the scores of a row's answers become one; None where the run scores none."""
        return self.pool_scorer.rule if self.reads_scores and self.pool_scorer.other != "columns" else None

    def budget(self, epoch: int) -> int:
        return self._rows_of(epoch).budget

    def selects(self, epoch: int) -> bool:
        return self._rows_of(epoch).source in ("selected", "same")

    def part_steps(self, epoch: int) -> int | None:
        return self.timing.part_steps(self._rows_of(epoch)) if self.reads_scores else None

    def rows_scored(self, epoch: int) -> int:
        """Training rows that are scored for an epoch, as planned: all when it begins, what is left by each part; or of
        mean length as many candidates as their budget pays for."""
        wanted = self._rows_of(epoch)
        if not (self.reads_scores and wanted.scored):
            return 0
        parts, pool = self._parts_of(epoch, True), self.pool.training_rows
        if self.chooser.candidates is None:
            return scored_rows(parts, pool)
        for_each = self.chooser.candidates.rows_for_each()
        anew = [int(min(for_each * part.rows, pool - part.first_row)) for part in parts]
        first = epoch == self.timing.warmup_epochs  # which scores all rows when it begins
        return pool + sum(anew[1:]) if first else sum(anew)

    def begin_part(self, part: Part) -> None:
        """Choose the rows of another part of the epoch that runs, by the model as it is."""
        self._end_part()
        self._select(self._epoch, self.run.parts, part.number - 1)
        self._training_since = time.perf_counter()

    def _parts_of(self, epoch: int, divided: bool) -> tuple[Part, ...]:
        """The parts of an epoch, as its plan has them; one where it is not, or no longer, divided."""
        steps = self.part_steps(epoch) if divided else None
        return divide(self.plan.epochs[epoch], steps, self.run.accumulation, self.run.batch)

    def position(self, state: transformers.TrainerState) -> tuple[int, int]:
        saved = self._kept_in(state)
        if not state.global_step or saved is None or "first_step" not in saved:
            # A new run, a checkpoint that is refused later on, or one of an earlier release.
            return super().position(state)
        # Not by the plan alone: another callback may have ended an epoch early.
        epoch, updates = saved["epoch"], state.global_step - saved["first_step"]
        over = saved["ended"] or epoch >= len(self.plan.epochs) or updates >= self.plan.epochs[epoch].updates
        return (epoch + 1, 0) if over else (epoch, updates)

    def _kept_in(self, state: transformers.TrainerState) -> dict[str, Any] | None:
        """What a checkpoint kept for this callback."""
        return (state.stateful_callbacks.get(type(self).__name__) or {}).get("attributes", {}).get("selection")

    def start(self, epoch: int, state: transformers.TrainerState, checkpoint: str | None = None) -> None:
        self._next_epoch, self._epoch, self._restored, self._saved = epoch, None, None, None
        before = self._fingerprint
        prompts, self._fingerprint = self.pool.read()
        # A second call of `train`, or auto_find_batch_size, goes on with weights that know the rows of the first.
        self.chooser.forget(trained=before != self._fingerprint or self.trainer.model_init is not None)
        self.chooser.check_pool()
        self.pool.ids(self.id_column)  # if they are not unique, this is the time to say so, on every process
        self._prefix = [] if self.pool.whole else self._response_prefix(prompts)
        self.history = History(self.run.folder / FOLDER, to_data(self._settings()))
        if state.global_step > 0:
            self._restore(state, Path(checkpoint))
        if self.trainer.args.save_only_model and self.trainer.is_world_process_zero():
            logger.warning(
                "save_only_model=True: checkpoints hold no optimizer and no random state, so a resume from them "
                "trains the same rows but is not exact."
            )
        if (odd := unlike_epochs(self.schedule, len(self.plan.epochs) - (self.restart or 0))) is not None:
            logger.warning(odd)
        logger.info("Selection plan: %s", self.plan)
        logger.info("Guards: %s", ", ".join(self.guard.names) if self.guard else "none")
        if self.timing.every_steps is not None and not self.reads_scores:
            logger.warning(
                "every_steps=%d has no effect: nothing in this run reads a score, so the rows of each epoch are chosen "
                "when it begins.",
                self.timing.every_steps,
            )
        if self.restart is not None and epoch <= self.restart:
            logger.info(
                "The original weights take %.2f GB in %s until training ends.",
                Snapshot.size(self.trainer.model) / 1e9,
                self._original.folder,
            )

    # ---- events -------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state is not self.trainer.state:
            raise UserError(
                "This IFDSelectionCallback was made for another trainer. Make one for each: "
                "trainer.add_callback(IFDSelectionCallback(trainer, ...))."
            )
        announce_lm_head(self.trainer)
        if self.restart is not None and state.global_step == 0:
            self._keep_original()
        if self.run.called:  # auto_find_batch_size begins a run again, with weights that were trained
            self._before = None
        self.run.called = False
        before = self.rows_before or rows_before(self.trainer, self.pool, self.id_column)
        if not self.in_command:
            say(self.trainer, pool_line(self.trainer, self.pool, before, self.turns))
        if state.is_world_process_zero:
            self.history.save()
            save_left_out(self.history.folder, before, getattr(args, "max_length", None))
            self.history.discard_other_epochs()
            self._save_pool()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        losses = self.run.losses.harvested = TrainLosses(len(self.pool)) if self.scoring.train_losses else None
        if (saved := self._restored) is not None and saved["epoch"] == epoch:
            part = saved.get("part")  # of an epoch in parts; earlier releases had none
            self.run.begin(self._parts_of(epoch, part is not None), part or 0)
            self.run.select(*self._restored_order())  # inside an epoch, or a part of one, nothing is scored again
            if losses is not None:
                losses.from_arrays(self._restored_arrays)
        else:
            self._select(epoch, self._parts_of(epoch, self.chooser.frozen is None))
        self._epoch, self._ended, self._training_since = epoch, False, time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run.losses.check_seen(self.trainer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._ended = not control.should_training_stop  # a run that is stopped may go on inside this epoch
        self._end_part()
        left = self.run.next_part
        if left is not None and not (control.should_training_stop or control.should_epoch_stop):
            raise RunError(
                f"Epoch {self._epoch} has ended after part {left.number - 1} of {left.of}: the trainer takes its "
                "batches in another way than transformers' own loop, from get_batch_samples. Leave every_steps out."
            )

    def _end_part(self) -> None:
        """Say what the epoch that runs, or its part that does, has trained on."""
        state = self.trainer.state
        of_epoch, first = self.run.trained(state.global_step), self.run.this_part.first_row  # raises if not as selected
        self.chooser.note_trained(self._times(of_epoch))
        trained, planned = of_epoch[first:], len(self.run.order) - first
        record = self.history.record(self._epoch) or {}
        said = record.get("trained")  # by a run that stopped inside this epoch, and was resumed
        self._note(trained=len(trained), seconds_training=time.perf_counter() - self._training_since)
        times = self._times(trained)
        if record and len(trained) != (planned if said is None else said) and state.is_world_process_zero:
            self.history.add_column(self._epoch, "times", times, record.get("part"))
        self.gather()
        if (losses := self.run.losses.harvested) is None:
            return
        self.chooser.state.trained(means := losses.means())
        if record and state.is_world_process_zero:
            means = np.where(times > 0, means, np.nan)
            self.history.add_column(self._epoch, "train_loss", means, record.get("part"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.restart is not None and state.global_step >= self.plan.max_steps:
            Snapshot(self.run.folder / ORIGINAL).remove()
        if not self.in_command and self.history.epochs:
            say(self.trainer, end_line(self.history.folder, self.run.folder))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict | None = None, **kwargs: Any) -> None:
        if not self.trainer.is_in_train or not metrics:
            return
        losses = losses_of(metrics, self.trainer.eval_dataset)
        self.chooser.state.evaluated(state.global_step, losses)
        if self._epoch is None:  # eval_on_start
            if state.global_step == 0:
                self._before = _joined(losses, self._before or {})
        elif (record := self.history.record(self._epoch)) is not None:
            self._note(**_joined(record, losses))

    # ---- the original weights -----------------------------------------------------------------------------------

    @property
    def _original(self) -> Snapshot:
        """Where the original weights wait: in one place, or with sharded weights each process's own part.

        A machine that does not share the disk of the main process has a copy of its own.
        """
        folder = self.run.folder / ORIGINAL
        if scoring_model(self.trainer)[1]:
            return Snapshot(folder / f"process-{self.trainer.accelerator.process_index:03d}")
        return self._own_original if self._own_original.complete else Snapshot(folder)

    @property
    def _own_original(self) -> Snapshot:
        return Snapshot(self.run.folder / ORIGINAL / f"machine-{platform.node()}")

    def _keep_original(self) -> None:
        """Save the weights at the start of a run, or put them back where auto_find_batch_size begins it again."""
        trainer, model = self.trainer, self.trainer.model
        reshard(model)
        if not self.run.called:
            self._original.restore(model)
        elif scoring_model(trainer)[1]:
            self._original.save(model)
        else:
            if trainer.is_local_process_zero():
                self._own_original.remove()  # of an earlier run
            if trainer.is_world_process_zero():
                self._original.save(model)
            trainer.accelerator.wait_for_everyone()
            if trainer.is_local_process_zero() and not self._original.complete:
                self._own_original.save(model)
        trainer.accelerator.wait_for_everyone()

    # ---- scoring and selecting ----------------------------------------------------------------------------------

    def _rows_of(self, epoch: int) -> EpochRows:
        args = self.trainer.args
        epochs = None if args.max_steps > 0 else math.ceil(args.num_train_epochs)
        try:
            return self.timing.rows_of(epoch, self.schedule, self.pool.training_rows, epochs, self._stage)
        except ValueError as error:
            if not self.pool.packed:
                raise
            raise UserError(f"{error} With packing=True, rows are packed rows.") from error

    @property
    def _stage(self) -> Callable[[int], int] | None:
        """How many rows there are for an epoch, where the policy trains on one value of a column after another."""
        if not isinstance(self.policy, Stages):
            return None
        if self._of_stages is None or self._of_stages[0] is not self.pool:
            self._of_stages = self.pool, coded(self.pool.column(self.policy.by))
        return lambda epoch: self.policy.rows(epoch, *self._of_stages[1])

    def _select(self, epoch: int, parts: tuple[Part, ...], number: int = 0) -> None:
        """Score the pool if this epoch does, choose and order its rows, log and record them.

        Of an epoch in parts those of one part, among the rows that the parts before have not trained on.
        """
        wanted, began, step = self._rows_of(epoch), time.perf_counter(), self.trainer.state.global_step
        part, share = parts[number], wanted.budget / self.pool.training_rows
        earlier = self.run.trained(step) if number else []
        self.run.begin(parts, number)
        if part.of > 1:
            wanted = replace(wanted, budget=part.rows, part=part.number)
        self.chooser.begin(earlier)
        ids, left = self.pool.ids(self.id_column), np.flatnonzero(~self.chooser.used)
        name = f"epoch {epoch}" + (f", part {part.number} of {part.of}" if part.of > 1 else "")
        scored, noted = wanted.scored and self.chooser.frozen is None, {}
        if scored and not self.reads_scores:
            self.chooser.take_unscored(self.pool_scorer.not_run(self._prefix), epoch, step)
        elif scored and self.chooser.candidates is not None and self.chooser.last is not None:
            self.chooser.rescore(wanted, epoch, step, ids, self._prefix, self.seed)
        elif scored:
            first = self._first_scoring(begun=step > 0) if self.chooser.last is None else None
            if first is not None:
                first.try_out()
            scores = self.score_pool(f"IFD, {name}", *([left] if number else []))
            if first is not None:
                noted = first.look_at(scores, share)
            self.chooser.take(scores, epoch, step, ids, self._prefix, self.seed)
        if wanted.source == "selected":
            if step == 0 and self.chooser.state.reads_held_out:
                self.chooser.state.evaluated(step, self._losses_before() or {})
            self.chooser.state.prepare(self.scores, step)
        selection = self.chooser.choose(wanted, ids, self.seed, step > 0, self._prefix)
        self.chooser.note_tiers(wanted, selection)
        if self.weighted is not None:
            selection = self.weighted.weigh(selection, self.pool.column(self.weighted.by), ids)
        if selection.row_weights is not None:
            check_weighable(self.trainer, f"A policy with weights ({self.policy!r})")
        self.pool_scorer.release()
        seconds = time.perf_counter() - began if scored or wanted.source == "brief" else 0.0
        scores = self._recorded(wanted.source)
        if epoch == self.restart and not number:
            start_anew(self.trainer, self._original)
            self.chooser.trained[:] = False  # the weights know no row of the brief experience
        order, weights = self._agree(selection, wanted, epoch)
        self.run.select([*earlier, *order], weights)
        if self.trainer.state.is_world_process_zero:
            self.chooser.warn(selection, name)
        values = self.chooser.values(scores)
        known = np.isfinite(values)
        ages = self.chooser.ages.record(known, selection.kept, step) if known.any() else {}
        record = {
            **epoch_record(values, selection),
            "epoch": epoch,
            "step": step,
            "seed": self.seed,
            **({"part": part.number, "parts": part.of, "left": len(left)} if part.of > 1 else {}),
            "packed_rows": len(order) if self.pool.packed else None,
            "scored_at": self.scored_at if np.isfinite(values).any() else None,
            **(self._watched() if np.isfinite(values).any() else dict.fromkeys(_WATCHED)),
            **ages,
            "frozen": self.chooser.frozen,
            **noted,
            "before_training": self._losses_before() if step == 0 else None,
            "overlap": self.history.overlap(epoch, selection),
            "seconds_scoring": seconds,
        }
        logged = _LOGGED if self.chooser.candidates is None else (*_LOGGED, *_LOGGED_AGES)
        logged = {f"ifd/{key}": record[key] for key in logged if record.get(key) is not None}
        logged |= {f"ifd/dropped_{reason}": record["reasons"].get(reason, 0) for reason in self.chooser.guard_reasons}
        if wanted.source in ("selected", "same"):
            record |= self.chooser.state.record(selection.kept)
            logged |= {f"ifd/{name}": value for name, value in self.chooser.state.logged().items()}
        before = record["before_training"] or {}
        logged |= {"ifd/eval_loss_before": before["eval_loss"]} if "eval_loss" in before else {}
        logged |= {f"ifd/eval_{name}_loss_before": loss for name, loss in before.get("eval_losses", {}).items()}
        self.trainer.log_selection(logged)
        kept = values[selection.rows]
        scored = {"ifd/scores": values[known], "ifd/kept_scores": kept[np.isfinite(kept)]}
        log_histograms(self.trainer, scored)
        say(self.trainer, epoch_line(record, wanted.source, self.chooser.guard_reasons))
        if self.trainer.state.is_world_process_zero:
            added = self.chooser.row_columns(wanted, ids, selection, values, self.seed)
            if "kept_without_guards" in added:
                kept_out = np.setdiff1d(np.flatnonzero(added["kept_without_guards"]), selection.kept)
                record["kept_only_without_guards"] = len(kept_out)
            self.history.add(record, epoch_rows(ids, scores.columns() | added, selection))

    def _recorded(self, source: str) -> Scores:
        """The scores that an epoch's rows were chosen by, as its history has them."""
        if source in ("all", "brief"):
            return Scores.unscored(len(self.pool), NOT_SCORED, self.further)
        if self.reads_scores:
            return self.scores
        status = self.scores.ifd_status
        return replace(self.scores, ifd_status=np.where(status == Status.OK.value, NOT_SCORED, status))

    def _response_prefix(self, prompts: Prompts) -> list[int]:
        found = self.pool.finder.header if self.pool.finder is not None else None
        return response_prefix(self.tokenizer, prompts, self.scoring.header, found)

    def _losses_before(self) -> dict[str, Any] | None:
        if self._before is None and evaluates_later(self.trainer):
            self._before = losses_before(self.trainer)
        return self._before or None

    def _first_scoring(self, begun: bool) -> FirstScoring:
        score = self.chooser.score if self.chooser.score in (*SCORES, *SCORED_BY_MODEL) else None
        stops = self.guard is not None and self.guard.on_misaligned == "error" and not begun
        return FirstScoring(self.pool_scorer, stops, self.scoring, score, self._prefix, self.seed)

    def _watched(self) -> dict[str, float | None]:
        """What was measured of the last scores, and what they are worth."""
        last = self.chooser.last
        unfinished = last.measured.unfinished
        return {
            "limit": last.limit,
            "unfinished": unfinished if unfinished is not None and np.isfinite(unfinished) else None,
            **(last.health or dict.fromkeys(WATCHED)),
        }

    def score_pool(self, description: str = "IFD", rows: np.ndarray | None = None) -> Scores:
        """Scores of all pool rows, or of some and of no others, with the model as it is now, or the other `scorer`."""
        scores = self.pool_scorer.scores(self._prefix, description, rows)
        return scores if rows is None else scores.placed(rows, self.scores.answer_tokens, NOT_SCORED)

    def _agree(
        self, selection: Selection, wanted: EpochRows, epoch: int
    ) -> tuple[list[TrainingRow], np.ndarray | None]:
        """The order of this epoch, or of this part of one, and what its rows weigh (n,), the same on every process."""
        parts = [(selection.kept, wanted.budget)]
        if wanted.tiers:
            parts = [(selection.parts[tier.number], tier.rows) for tier in wanted.tiers if tier.trained]
        rows = self.chooser.again
        if rows is None:
            rows = [row for part, budget in parts for row in self.pool.arrange(part, budget)]
        lengths = self.pool.lengths(selection.kept)
        seed = int(np.random.SeedSequence([self.seed, epoch, *wanted.seeds[1:]]).generate_state(1)[0])
        order, weights = batch_order(self.trainer, rows, lengths, self.order, seed), selection.row_weights
        if self.trainer.accelerator.num_processes > 1:
            shared = [order, weights]
            torch.distributed.broadcast_object_list(shared, src=0)
            order, weights = shared
        return order, weights

    # ---- records ------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """What this run selects, and how: the history's settings, with policies and schedules as they are."""
        limit = self.chooser.max_ifd
        return {
            "policy": self.policy,
            "row_weights": None if self.weighted is None else self.weighted.by,
            "schedule": self.schedule,
            **vars(self.timing),
            "scorer": self.pool_scorer.name,
            "order": self.order,
            "train_sampling_strategy": self.run.strategy,
            "seed": self.seed,
            "id_column": self.id_column,
            "min_answer_tokens": self.pool_scorer.encoder.min_answer_tokens,
            "score": self.chooser.score_name,
            "further_scores": list(self.further),
            "guess": self.pool_scorer.guess,
            "turns": self.pool_scorer.turns,
            "without": self.scoring.without,
            "on_shortfall": self.chooser.on_shortfall,
            "limit": limit,
            "guard": self.guard,
            "targets": None if self.targets is None else self.targets.digest,
            "max_ifd": limit if isinstance(limit, Real) and np.isfinite(limit) else None,
            "direct_prefix": self.tokenizer.decode(self._prefix),
            "model": str(getattr(self.trainer.model.config, "name_or_path", "")),
            "pool": len(self.pool),
            "packed_rows": self.pool.training_rows if self.pool.packed else None,
            "fingerprint": self._fingerprint,
            "plan": [vars(plan) for plan in self.plan.epochs],
            "max_steps": self.plan.max_steps,
        }

    def _times(self, trained: list[TrainingRow]) -> np.ndarray:
        """How often each example is among these training rows, (n,)."""
        flat = np.concatenate([np.ravel(row) for row in trained]) if trained else []
        return np.bincount(np.asarray(flat, dtype=np.int64), minlength=len(self.pool))

    def _note(self, **values: Any) -> None:
        record = self.history.record(self._epoch)
        if record is not None and self.trainer.state.is_world_process_zero:
            record.update(values)
            self.history.save()

    def _save_pool(self) -> None:
        """The pool's texts for reports, unless they are there; a run goes on without them."""
        made_from = [self._fingerprint, self.pool.columns_digest(), str(self.id_column)]
        try:
            self.history.save_pool(self._pool_texts(), " ".join(made_from))
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "The texts of the training set could not be kept in %s: %s. Training goes on; reports of this run "
                "show rows without their texts.",
                self.history.folder / "pool.parquet",
                str(error).rstrip("."),
            )

    def _pool_texts(self) -> Iterator[pa.Table]:
        """The pool's texts and columns for reports, some thousand rows at a time."""
        ids, decode, first = self.pool.ids(self.id_column), Decoder(self.tokenizer), 0
        for tokens, bounds in self.pool.segments(_TEXTS):
            decoded = decode(tokens, bounds)  # prompt, answer and what follows of each row
            part = slice(first, first := first + len(decoded) // 3)
            texts = {"row_id": ids[part], "prompt": decoded[0::3], "answer": decoded[1::3]}
            yield pa.table(texts | self.pool.columns(part.start, part.stop, without=texts))

    # ---- checkpoint state ---------------------------------------------------------------------------------------

    def save(self, checkpoint: Path) -> None:
        if self._epoch is None:
            return
        if not self._ended:  # a checkpoint of an epoch's last step comes before its end
            self.chooser.note_trained(self._times(self.run.trained(self.trainer.state.global_step)))
        arrays = self.pool.to_arrays(self.run.order)
        losses = self.run.losses
        arrays |= {} if losses.weights is None else {"weights": losses.weights[arrays["positions"]]}
        arrays |= {} if losses.harvested is None or self._ended else losses.harvested.to_arrays()
        following = self._epoch + 1
        more = following < len(self.plan.epochs)
        unscored = more and (not self._rows_of(following).scored or self.chooser.frozen is not None)
        unscored = unscored or (self.run.next_part is not None and self.chooser.frozen is not None)
        arrays |= self.chooser.to_arrays(read_again=unscored)
        self._saved = {
            "version": VERSION,
            "epoch": self._epoch,
            "first_step": self.run.first_step,
            "ended": self._ended,
            **({"part": self.run.part} if len(self.run.parts) > 1 else {}),
            **self.chooser.to_state(),
            **save_selection(checkpoint, arrays, self.scores),
            **{key: self.history.settings[key] for key in (*MUST_MATCH, "plan", "max_steps")},
        }

    def gather(self) -> None:
        if self.run.losses.harvested is not None:
            self.run.losses.harvested.gather()

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: the epoch, what it depends on, and the digest of the file beside it."""
        return {"args": {}, "attributes": {} if self._saved is None else {"selection": self._saved}}

    def _restored_order(self) -> tuple[list[TrainingRow], np.ndarray | None]:
        """The order of an epoch that a checkpoint was written in, and what its rows weigh, (n,)."""
        weights = None
        if "weights" in self._restored_arrays:
            weights = np.full(len(self.pool), np.nan)
            weights[self._restored_arrays["positions"]] = self._restored_arrays["weights"]
        return self.pool.from_arrays(self._restored_arrays), weights

    def _restore(self, state: transformers.TrainerState, checkpoint: Path) -> None:
        saved = check_resumable(self._kept_in(state), self._settings())
        if self.trainer.args.ignore_data_skip:
            logger.warning("ignore_data_skip=True: the resumed epoch starts over, so the resume is not exact.")
        self._restored_arrays, scores = load_selection(checkpoint, saved, len(self.pool))
        self._restored = saved
        self.chooser.from_arrays(self._restored_arrays)
        sample = self.timing.warmup if self._rows_of(saved["epoch"]).source == "brief" else None
        if self.chooser.brief is None and sample is not None and sample.method != "random":
            # An earlier release kept the order alone; random rows are drawn again, the same ones.
            self.chooser.brief = np.unique(np.concatenate([np.ravel(row) for row in self._restored_order()[0]]))
        if self.restart is not None and state.global_step <= self.plan.phases[0] and not self._original.complete:
            raise UserError(
                f"The run stopped before training had started anew, but the original weights are not in "
                f"{self._original.folder}. Put the folder back, or start training anew."
            )
        if scores is not None and saved["version"] == 2 and self.pool_scorer.other == "columns":
            scores = self.score_pool()  # only cas and das were kept
        self.chooser.from_state(saved, scores)
        if self.scoring.train_losses and not saved["ended"]:  # and perhaps at the epoch's last step
            losses = TrainLosses(len(self.pool))
            losses.from_arrays(dict(self._restored_arrays))
            self.chooser.state.trained(losses.means())
        if (self.history.folder / "history.json").exists():
            epochs = History.load(self.history.folder).epochs
            last = (saved["epoch"], saved.get("part", 0) + 1)
            self.history.epochs = [record for record in epochs if place_of(record) <= last]


_WATCHED = ("limit", "unfinished", *WATCHED)
_LOGGED = ("pool", "eligible", "kept", "packed_rows", *_WATCHED, "cut", "mean_kept", "mean_dropped", "overlap")
_LOGGED_AGES = ("fresh", "kept_fresh", "oldest_scored_at", "oldest_scored_step", "rescore_cost")
_LOGGED += ("shortfall", "proxy_rank_correlation", "proxy_overlap", "seconds_scoring")


def _joined(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Held-out losses with those of one more evaluation, which of several sets each have by themselves."""
    sets = {**(known.get("eval_losses") or {}), **(found.get("eval_losses") or {})}
    losses = {**known, **found, "eval_losses": sets or None}
    return {name: losses[name] for name in ("eval_loss", "eval_losses") if losses.get(name) is not None}
