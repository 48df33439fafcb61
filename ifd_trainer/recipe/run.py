"""One SFT run with selection inside, from a recipe: TRL's trainer with the selection callback, ready to train.

This is what `ifd-trainer train` runs, and, without the weights of the model, what `--plan` looks at.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PretrainedConfig
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)
from trl.chat_template_utils import get_training_chat_template

from ..data.files import load_rows
from ..data.format_choice import resolve_format
from ..data.formats import PromptFormat
from ..data.histogram_files import threshold_of
from ..data.image_rows import hold_images
from ..data.message_trees import as_chats
from ..data.paths import check_model, check_rows, data_ending
from ..errors import FileAccessError, NotInstalledError, UserError, one_line
from ..method.columns import IFD_COLUMNS
from ..method.number_words import many
from ..method.selection import Policy
from ..method.target_set import TargetSet
from ..scoring.engine import check_causal_config
from ..scoring.image_forwards import need_image_processor, not_installed
from ..scoring.image_scorer import ImageIFDScorer
from ..scoring.transform import IFDScorer
from ..training.callback import IFDSelectionCallback
from ..training.pool_line import RowsBefore, column_of, ids_lost
from .file import beside
from .images import prepare_images, sees_images
from .machine import PlanConfig, installed, lacking_for, outline
from .parsing import Recipe, translated
from .rows import at_or_above, by_value, prepare, with_answer_masks, without_refusals
from .selection import SelectionConfig

logger = logging.getLogger(__name__)
_SCORED_AT_ONCE = 1000  # rows that `scorer` scores before they are put into the cache


@dataclass(frozen=True)
class Run:
    """A trainer with its selection callback, and what is said before it trains.

    Attributes:
        lacking: what training needs and this machine has not, in words; of a plan.
        format: in which the rows were read.
        held_out: the held-out rows as they were read.
        seconds_scoring: of the processor, that scoring beforehand with `scorer` took; rows whose scores were in the
            cache took next to none.
    """

    trainer: SFTTrainer
    lacking: tuple[str, ...] = ()
    format: PromptFormat | None = None
    held_out: Dataset | None = None
    seconds_scoring: float = 0.0


def build_run(recipe: Recipe) -> Run:
    """The trainer of a recipe, with its selection callback added; without weights where it is only planned."""
    sft, model, selection = recipe.sft, recipe.model, recipe.selection
    plan = isinstance(sft, PlanConfig)
    config = _model_config(model, sft)
    source, rows, held_out = _rows(recipe)
    read, seconds = held_out, 0.0
    clock = time.process_time if sft.device.type == "cpu" else time.perf_counter
    if not len(rows):
        raise UserError(f"{source} has no rows to train on.")
    count = len(rows)
    format = resolve_format(selection.rows_format(), rows.column_names)
    every_answer = bool(sft.assistant_only_loss)
    images = hold_images(rows)
    if not images and sees_images(config):
        check_causal_config(str(model.model_name_or_path), config)  # which says what is wanted for rows of text
    folder = Path(source).resolve().parent if images and Path(source).is_file() else None
    tokenizer = cache(partial(_tokenizer, recipe))
    prepared = _preparing(recipe, images, folder, every_answer, tokenizer)
    scorer = None
    if selection.scorer:
        scorer = _image_scorer(selection, sft, format, folder) if images else _scorer(selection, sft, format)
    with sft.main_process_first(desc="preparing the rows"):  # the others read what it put into the cache
        if scorer is not None and not plan and not selection.only_embeds:
            began = clock()
            rows = rows.map(scorer, batched=True, batch_size=_SCORED_AT_ONCE, desc=f"Scoring with {selection.scorer}")
            seconds = clock() - began
        train, unread = prepared(rows, format)
        readable = train
        if selection.drop_refusals:
            train = without_refusals(train)
        answered = train
        if selection.threshold is not None:
            train = at_or_above(train, threshold_of(beside(selection.threshold, recipe.folder)), selection.score)
    if not len(train):
        raise UserError(
            f"No row of {source} is left of {many(count, 'row')}. Set drop_refusals: false, or look at the rows."
        )
    if finds_answers := "messages" in train.column_names and not _marks_answers(tokenizer()):
        logger.info("TRL has no template that marks this chat template's answers: they are found by rendering.")
        sft.assistant_only_loss = False  # TRL would look for the marks
        train = with_answer_masks(train, tokenizer())
    labels = {*train.column_names, *((*IFD_COLUMNS, *scorer.scores) if scorer is not None else ())}
    if selection.label and selection.label not in labels:
        raise UserError(f"label={selection.label!r} is not among the data set's columns {sorted(labels)}.")
    if held_out is not None:
        there = set(format.columns) <= set(held_out.column_names)
        held_out, _ = prepared(held_out, format if there else selection.rows_format())
        if finds_answers and "messages" in held_out.column_names:
            held_out = with_answer_masks(held_out, tokenizer())
        if (column := selection.eval_by or (selection.per if selection.bad_cases else None)) is not None:
            held_out = by_value(held_out, column)
    elif selection.eval_by is not None:
        raise UserError("eval_by parts held-out rows, and there are none: name some with eval_dataset.")
    with translated("The trainer cannot be made"):
        trainer = _trainer(config, model, sft, train, held_out)
    if not len(trainer.train_dataset):
        raise UserError(
            f"None of {many(count, 'row')} has an answer within max_length={sft.max_length} tokens: raise "
            "max_length, or shorten the prompts."
        )
    lacking = (*sft.lacking, *lacking_for(model)) if plan else ()
    if plan and sft.parallel:
        trainer.is_deepspeed_enabled = True  # what cannot be done under it is refused here too
    callback = selection.callback(trainer, scorer, _placed(selection.chosen_policy(), recipe.folder, format))
    if plan and sft.parallel:
        trainer.is_deepspeed_enabled = False
    callback.in_command = True  # `ifd-trainer train` tells what the pool is, writes the report and says where
    trainer.add_callback(callback)
    name = callback.pool.id_name(callback.id_column)
    cut = [] if callback.pool.packed else ids_lost(column_of(train), trainer.train_dataset, name)
    refused, below = (
        ids_lost(column_of(before), after, name) for before, after in ((readable, answered), (answered, train))
    )
    callback.rows_before = RowsBefore(count, unread, refused, cut, below)
    return Run(trainer, lacking, format, read, seconds)


def _preparing(
    recipe: Recipe, images: bool, folder: Path | None, every_answer: bool, tokenizer: Callable[[], Any]
) -> Callable[..., tuple[Dataset, dict[Any, str]]]:
    """What makes rows of a format what TRL reads; see `prepare` and `prepare_images`."""
    if not images:
        return partial(prepare, tokenizer=tokenizer, every_answer=every_answer)

    def prepared(rows: Dataset, format: Any) -> tuple[Dataset, dict[Any, str]]:
        return prepare_images(rows, resolve_format(format, rows.column_names), lambda: _processor(recipe), folder)

    return prepared


def _placed(policy: Policy, folder: Path, format: PromptFormat) -> Policy:
    """A policy that names a file beside the recipe by its path, and reads it as the recipe's rows are read."""
    if not isinstance(policy, TargetSet):
        return policy
    return replace(policy, targets=beside(policy.targets, folder), format=format)


def _rows(recipe: Recipe) -> tuple[str, Dataset, Dataset | None]:
    """The rows to train on, where they come from, and the held-out ones, as `trl sft` reads them; None for none."""
    script, mixture, selection = recipe.script, recipe.mixture, recipe.selection
    if script.dataset_streaming or mixture.streaming:
        key = "dataset_streaming" if script.dataset_streaming else "streaming"
        raise UserError(f"{key} is true, and selection scores all rows of a data set: set {key}: false.")
    evaluated = recipe.sft.eval_strategy != "no"
    held_out = None
    if mixture.datasets:
        if script.dataset_name:
            logger.warning("datasets is given, and dataset_name (%s) is not read.", script.dataset_name)
        source = ", ".join(each.path for each in mixture.datasets)
        with translated(f"datasets: {source} cannot be read as one data set"):
            rows = get_dataset(replace(_of_files(recipe), test_split_size=None))["train"]
            if mixture.test_split_size is not None:  # by a seed: a run that goes on has to have the same rows
                seed = recipe.sft.seed if selection.split_seed is None else selection.split_seed
                parts = rows.train_test_split(mixture.test_split_size, seed=seed)
                rows, held_out = parts["train"], parts["test"]
    else:
        source = beside(script.dataset_name, recipe.folder)
        rows = load_rows(source, script.dataset_train_split, script.dataset_config)
        if evaluated and not selection.eval_dataset and not Path(source).is_file():
            held_out = load_rows(source, script.dataset_test_split, script.dataset_config)
    if selection.eval_dataset:
        held_out = load_rows(beside(selection.eval_dataset, recipe.folder), script.dataset_test_split)
    elif held_out is None and evaluated:
        raise UserError(
            f"eval_strategy is {recipe.sft.eval_strategy.value}, and there are no held-out rows: name some with "
            "eval_dataset, or set eval_strategy: 'no'."
        )
    return source, as_chats(rows), None if held_out is None else as_chats(held_out)


def _of_files(recipe: Recipe) -> DatasetMixtureConfig:
    """The mixture with files by their readers, so that `path` may name a file, as `dataset_name` may."""
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
    configs = []
    for config in recipe.mixture.datasets:
        path = beside(config.path, recipe.folder)
        if config.data_files is None and Path(path).is_file():
            check_rows(path)
            config = replace(config, path=kinds[data_ending(Path(path))], data_files=path)
        configs.append(config)
    return replace(recipe.mixture, datasets=configs)


def _model_config(model: ModelConfig, sft: SFTConfig) -> PretrainedConfig:
    """The config of the model to train.

    Raises:
        ValueError: for a model that is not there, or is no causal language model.
    """
    name = check_model(model.model_name_or_path)
    try:
        config = AutoConfig.from_pretrained(
            name, revision=model.model_revision, trust_remote_code=sft.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise FileAccessError(f"The model {name} cannot be read: {one_line(error)}") from error
    if not config.architectures:
        raise UserError(f"{name} does not say which model it is: its config.json has no architectures. Add them there.")
    if not sees_images(config):  # else it depends on the rows
        check_causal_config(name, config)
    return config


def _trainer(
    config: PretrainedConfig,
    model: ModelConfig,
    sft: SFTConfig,
    train: Dataset,
    held_out: Dataset | dict[str, Dataset] | None,
) -> SFTTrainer:
    """TRL's trainer; of a plan, one whose model has shapes but no weights."""
    plan = isinstance(sft, PlanConfig)
    init = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(sft.model_init_kwargs or {}),
    }
    sft.model_init_kwargs = None if plan else init
    if not plan and model.use_peft and not installed("peft"):
        raise NotInstalledError("use_peft needs the package peft: pip install peft, or set use_peft: false.")
    tokenizer = None
    if plan:
        hub = {"revision": init["revision"], "trust_remote_code": sft.trust_remote_code}
        tokenizer = AutoProcessor.from_pretrained(model.model_name_or_path, **hub)
    return SFTTrainer(
        model=outline(config, init["dtype"], model, sft) if plan else model.model_name_or_path,
        args=sft,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=None if plan else get_quantization_config(model),
        peft_config=get_peft_config(model) if installed("peft") else None,
    )


def _tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that TRL will load, with the chat template that it will use."""
    name, path, code = recipe.model.model_name_or_path, recipe.sft.chat_template_path, recipe.sft.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.model.model_revision, trust_remote_code=code)
    if path is not None and os.path.isfile(path):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    return tokenizer


def _marks_answers(tokenizer: Any) -> bool:
    """Whether the chat template marks answers, or TRL has one that does and writes the same."""
    if re.search(r"\{%-?\s*generation\b", str(tokenizer.chat_template)):
        return True
    try:
        return bool(get_training_chat_template(tokenizer))
    except ValueError:
        return False


def _processor(recipe: Recipe) -> Any:
    """The processor that TRL will load, with the chat template that it will use."""
    name, path, code = recipe.model.model_name_or_path, recipe.sft.chat_template_path, recipe.sft.trust_remote_code
    try:
        processor = AutoProcessor.from_pretrained(name, revision=recipe.model.model_revision, trust_remote_code=code)
    except ImportError as error:
        raise not_installed(str(name), error) from error
    if path is not None and os.path.isfile(path):
        processor.chat_template = Path(path).read_text(encoding="utf-8")
    return need_image_processor(processor)


def _image_scorer(
    selection: SelectionConfig, sft: SFTConfig, format: PromptFormat, folder: Path | None
) -> ImageIFDScorer:
    """The transform that scores raw rows with images with another model than the one in training."""
    if selection.definition != "paper":
        raise UserError(
            f"definition={selection.definition!r} is of rows of text, and the rows have images: leave definition out."
        )
    return ImageIFDScorer(
        selection.scorer,
        without=selection.without,
        format=format,
        min_answer_tokens=selection.min_answer_tokens,
        image_folder=folder,
        token_budget=selection.token_budget,
        device=str(sft.device),
        trust_remote_code=sft.trust_remote_code,
        scores=selection.further(),
    )


def _scorer(selection: SelectionConfig, sft: SFTConfig, format: PromptFormat) -> IFDScorer:
    """The transform that scores the raw rows with another model than the one in training."""
    bare = selection.definition == "superfiltering"  # without the template that is trained on
    return IFDScorer(
        selection.scorer,
        format=replace(selection.rows_format(), format=None) if bare else format,
        definition=selection.definition,
        score_truncated=selection.definition == "paper",
        min_answer_tokens=selection.min_answer_tokens,
        token_budget=selection.token_budget,
        device=str(sft.device),
        trust_remote_code=sft.trust_remote_code,
        scores=selection.further(),
        guess=selection.guess,
        turns=selection.turns if sft.assistant_only_loss and selection.definition == "paper" else None,
    )


def selection_of(trainer: SFTTrainer) -> IFDSelectionCallback:
    """The trainer's selection callback."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, IFDSelectionCallback))
