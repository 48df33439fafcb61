"""One SFT run with selection inside, from a recipe: what `ifd-trainer train` does.

A recipe is TRL's flat YAML (`trl sft --config`) with the keys of `SelectionConfig` added.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Json, List, Value
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from .brief import Brief
from .callback import IFDSelectionCallback
from .chat import reads_as_text
from .columns import IFDScorer
from .encoding import DEFINITIONS
from .errors import NotFoundError, UserError
from .files import load_rows
from .formats import (
    FORMATS,
    ChatFormat,
    MalformedRow,
    PromptCompletionFormat,
    PromptFormat,
    resolve_format,
    to_training_row,
)
from .refusals import looks_like_refusal
from .row_ids import find_ids
from .schedule import Anneal, Curriculum, Schedule, as_schedule, parse_keep
from .snapshot import Snapshot

logger = logging.getLogger(__name__)

_SCORED_AT_ONCE = 1000  # rows that `scorer` scores before they are put into the cache


@dataclass
class SelectionConfig:
    """What a recipe says about data and selection, beside TRL's own keys."""

    format: str | None = field(
        default=None,
        metadata={"help": f"Prompt format of the rows: {', '.join(FORMATS)}. Told from the columns by default."},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows: a file or a hub name; its loss is shown for each epoch."}
    )
    keep: list[str] = field(
        default_factory=lambda: ["0.1"],
        metadata={
            "help": "Rows per epoch: a fraction of the pool (0.1, 1.0), a number of rows (1000), or one entry for each "
            "epoch (1.0 0.5 0.1). With packing, of packed rows."
        },
    )
    every: int = field(default=1, metadata={"help": "Select in each so many epochs; between, train on the same rows."})
    warmup_epochs: int = field(default=0, metadata={"help": "Train on all rows for so many epochs first."})
    freeze_after: int | None = field(default=None, metadata={"help": "From this epoch on, score nothing again."})
    method: str = field(
        default="dynamic",
        metadata={
            "help": "dynamic: score and select before each epoch. cherry: brief experience, one scoring, then all "
            "epochs from the original weights on the rows that were kept (arXiv 2308.12032).",
            "choices": ["dynamic", "cherry"],
        },
    )
    brief: str = field(
        default="kmeans",
        metadata={
            "help": "Rows of the brief experience: k-means over prompts, random, or none to score without it.",
            "choices": ["kmeans", "random", "none"],
        },
    )
    brief_clusters: int = field(default=100, metadata={"help": "Clusters of the brief experience in a large pool."})
    brief_per_cluster: int = field(default=10, metadata={"help": "Rows of each of these clusters."})
    scorer: str | None = field(
        default=None,
        metadata={"help": "Score with this model, once, instead of the one in training (Superfiltering: gpt2)."},
    )
    definition: str = field(
        default="paper",
        metadata={
            "help": "What `scorer` computes; see `ifd-trainer score --help`.",
            "choices": list(DEFINITIONS),
        },
    )
    diverse: str | None = field(
        default=None,
        metadata={
            "help": "Choose the rows among this share of the eligible ones with the highest scores, so that they stand "
            "for all of it (facility location; Superfiltering.D: 0.2)."
        },
    )
    embedder: str | None = field(
        default=None, metadata={"help": "A sentence-transformers model for that; by default the model that scores."}
    )
    drop_refusals: bool = field(
        default=False, metadata={"help": "Leave rows out of the pool whose answer looks like a refusal (English)."}
    )
    curriculum: str | None = field(
        default=None,
        metadata={
            "help": "Train on tiers of the kept rows, one after the other.",
            "choices": ["easy_to_hard", "hard_to_easy"],
        },
    )
    tiers: int = field(default=3, metadata={"help": "Tiers of the curriculum."})
    tier_mode: str = field(
        default="tiers",
        metadata={
            "help": "One tier at a time, growing from the first, or shrinking to the last.",
            "choices": ["tiers", "growing", "shrinking"],
        },
    )
    anneal_share: float = field(default=0.0, metadata={"help": "Train on all rows for this last share of the epochs."})
    max_ifd: float = field(
        default=1.0, metadata={"help": "Rows with a score at or above this are dropped; inf for no limit."}
    )
    score: str = field(default="ifd", metadata={"help": "Rank by ifd or ifd_ppl.", "choices": ["ifd", "ifd_ppl"]})
    order: str = field(
        default="shuffle",
        metadata={"help": "Order within an epoch.", "choices": ["shuffle", "descending", "ascending"]},
    )
    on_shortfall: str = field(
        default="repeat",
        metadata={
            "help": "When fewer rows are eligible than planned: repeat eligible rows, relax the limit, or stop.",
            "choices": ["repeat", "relax", "error"],
        },
    )
    min_answer_tokens: int = field(default=1, metadata={"help": "Rows with shorter answers are not scored."})
    token_budget: int | None = field(default=None, metadata={"help": "Tokens of a scoring batch."})
    label: str | None = field(
        default=None, metadata={"help": "A column of labels to show in the report; selection never reads it."}
    )

    def __post_init__(self) -> None:
        if self.method == "cherry" and self.brief != "none" and self.scorer is not None:
            raise UserError(
                f"scorer={self.scorer!r} scores without a brief experience, but brief is {self.brief!r}: set brief: "
                "none, or leave scorer out."
            )
        if self.definition != "paper" and self.scorer is None:
            raise UserError(
                f"definition={self.definition!r} is computed from the raw rows by a scorer; the model in training "
                "scores the tokens that it trains on (definition: paper). Set scorer, or leave definition out."
            )

    def budgets(self) -> float | int | list[float | int]:
        """`keep` as the callback takes it: text with a point is a fraction, without one a number of rows."""
        entries = self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]
        numbers = [parse_keep(entry) for entry in entries]
        return numbers[0] if len(numbers) == 1 else numbers

    def schedule(self) -> Schedule:
        """The schedule that `keep`, `curriculum` and `anneal_share` describe together."""
        keep = self.budgets()
        if self.curriculum and isinstance(keep, list):
            raise UserError("A curriculum takes one `keep`, which it divides into tiers; a list was given.")
        schedule = (
            Curriculum(keep, self.tiers, self.curriculum, self.tier_mode) if self.curriculum else as_schedule(keep)
        )
        return Anneal(schedule, self.anneal_share) if self.anneal_share else schedule


@dataclass
class Recipe:
    """The parsed recipe: TRL's dataclasses and ours."""

    script: ScriptArguments
    sft: SFTConfig
    model: ModelConfig
    selection: SelectionConfig
    folder: Path


def make_parser() -> TrlParser:
    """The parser of recipes; its options are the keys of TRL's `sft` and of `SelectionConfig`."""
    return TrlParser((ScriptArguments, SFTConfig, ModelConfig, SelectionConfig), prog="ifd-trainer train")


def parse_recipe(recipe: str | None, overrides: Sequence[str]) -> Recipe:
    """Read a recipe file, let `overrides` (`--key value ...`) take precedence.

    Raises:
        FileNotFoundError: when the recipe file does not exist.
        ValueError: for keys that no dataclass knows, or without model or data set.
    """
    if recipe is not None and not os.path.isfile(recipe):
        raise NotFoundError(f"No such recipe: {recipe}.")
    aliases = {"--model": "--model_name_or_path", "--dataset": "--dataset_name"}
    arguments = []
    for word in overrides:
        key, equals, value = word.partition("=")
        arguments.append(aliases.get(key, key) + equals + value)
    config = ["--config", recipe] if recipe is not None else []
    parser = make_parser()
    if not torch.cuda.is_available():
        parser.set_defaults_with_config(bf16=False)  # TRL's default is True, which a CPU refuses
    script, sft, model, selection = parser.parse_args_and_config([*config, *arguments])
    if not script.dataset_name or not model.model_name_or_path:
        raise UserError("A run needs a model and a data set: --model NAME_OR_PATH --dataset FILE_OR_NAME.")
    return Recipe(script, sft, model, selection, Path(recipe).resolve().parent if recipe else Path.cwd())


def build_trainer(recipe: Recipe) -> SFTTrainer:
    """The trainer of a recipe, with its selection callback added."""
    script, sft, model, selection = recipe.script, recipe.sft, recipe.model, recipe.selection
    source = _find(script.dataset_name, recipe.folder)
    rows = load_rows(source, script.dataset_train_split, script.dataset_config)
    scorer = _scorer(selection, sft) if selection.scorer else None
    with sft.main_process_first(desc="preparing the rows"):  # the others read what it put into the cache
        if scorer is not None:
            rows = rows.map(scorer, batched=True, batch_size=_SCORED_AT_ONCE, desc=f"Scoring with {selection.scorer}")
        train = _prepare(rows, selection.format, lambda: _tokenizer(recipe))
        if selection.drop_refusals:
            train = _without_refusals(train)
    if selection.label and selection.label not in train.column_names:
        raise UserError(f"label={selection.label!r} is not among the data set's columns {sorted(train.column_names)}.")
    held_out = None
    if selection.eval_dataset:
        held_out = _find(selection.eval_dataset, recipe.folder)
        held_out = load_rows(held_out, script.dataset_test_split)
        held_out = _prepare(held_out, selection.format, lambda: _tokenizer(recipe))
    sft.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(sft.model_init_kwargs or {}),
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=sft,
        train_dataset=train,
        eval_dataset=held_out,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    callback = _callback(trainer, selection, scorer)
    trainer.add_callback(callback)
    return trainer


def _callback(trainer: SFTTrainer, selection: SelectionConfig, scorer: IFDScorer | None) -> IFDSelectionCallback:
    """The callback that a recipe describes."""
    options = {
        "schedule": selection.schedule(),
        "max_ifd": selection.max_ifd,
        "score": selection.score,
        "order": selection.order,
        "on_shortfall": selection.on_shortfall,
        "min_answer_tokens": selection.min_answer_tokens,
        "token_budget": selection.token_budget,
        "scorer": None if scorer is None else "columns",
        "diverse": None if selection.diverse is None else parse_keep(selection.diverse),
        "embedder": selection.embedder or scorer,
    }
    rhythm = {
        name: getattr(selection, name)
        for name in ("every", "warmup_epochs", "freeze_after")
        if getattr(selection, name) != getattr(SelectionConfig, name)
    }
    if selection.method == "dynamic":
        return IFDSelectionCallback(trainer, **options, **rhythm)
    brief = None
    if selection.brief != "none":
        brief = Brief(selection.brief, selection.brief_clusters, selection.brief_per_cluster)
    return IFDSelectionCallback.cherry(trainer, brief=brief, **options, **rhythm)


def _scorer(selection: SelectionConfig, sft: SFTConfig) -> IFDScorer:
    """The transform that scores the raw rows with another model than the one in training."""
    return IFDScorer(
        selection.scorer,
        format=selection.format if selection.definition != "superfiltering" else None,
        definition=selection.definition,
        score_truncated=selection.definition == "paper",
        min_answer_tokens=selection.min_answer_tokens,
        token_budget=selection.token_budget,
        device=str(sft.device),
        trust_remote_code=sft.trust_remote_code,
    )


def _without_refusals(rows: Dataset) -> Dataset:
    """Rows whose answer does not look like a refusal; says how many were left out."""

    def keeps(completion: str | list[dict[str, Any]] | None) -> bool:
        if isinstance(completion, list):
            completion = completion[-1].get("content") if completion else None
        return not looks_like_refusal(completion or "")

    kept = rows.filter(keeps, input_columns="completion", desc="Leaving out refusals")
    logger.warning(
        "drop_refusals: %d of %d rows were left out, their answers look like refusals; the pool is the other %d.",
        len(rows) - len(kept),
        len(rows),
        len(kept),
    )
    return kept


def selection_of(trainer: SFTTrainer) -> IFDSelectionCallback:
    """The trainer's selection callback."""
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, IFDSelectionCallback))


def planned(trainer: SFTTrainer) -> str:
    """The plan of budgets and steps, and the disk that it needs, without training."""
    trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    callback = selection_of(trainer)
    lines = [str(callback.plan)]
    if callback.restart is not None:
        size = Snapshot.size(trainer.model) / 1e9
        lines.append(f"original weights: {size:.2f} GB in {trainer.args.output_dir} until training ends")
    return "\n".join(lines)


# Columns that TRL reads as its own work, whatever they hold: tokens, masks, texts of other forms.
_TRLS = {"input_ids", "labels", "attention_mask", "completion_mask", "assistant_masks", "position_ids", "seq_lengths"}
_TRLS |= {"token_type_ids", "mm_token_type_ids", "text", "messages", "conversations", "tools", "chat_template_kwargs"}


def _prepare(rows: Dataset, format: str | None, tokenizer: Callable[[], Any] | None = None) -> Dataset:
    """Rows as TRL's SFTTrainer reads them, with an id and all columns that neither the format nor TRL reads.

    Rows that cannot be rendered are left out, with one warning.

    Args:
        rows: rows in any known format.
        format: its name; told from the columns by default.
        tokenizer: gives the tokenizer whose chat template is to write the rows; asked for chats alone.

    Raises:
        ValueError: when no row can be rendered.
    """
    resolved = resolve_format(format, rows.column_names)
    rows = _with_ids(rows)
    consumed = {"instruction", "input", "output", *resolved.columns} & set(rows.column_names)
    aside = sorted((_TRLS - {"text", "tools", "chat_template_kwargs"} - consumed) & set(rows.column_names))
    if aside:
        logger.warning("Columns that TRL would take for its own are set aside: %s.", ", ".join(aside))
    chats = isinstance(resolved, ChatFormat) or _holds_messages(rows, resolved)
    convert = _Convert(resolved, tokenizer() if chats and tokenizer is not None else None)
    read = [name for name in rows.column_names if name in {*consumed, "tools", "chat_template_kwargs"}]
    checked = rows.select_columns(read).map(convert.check, remove_columns=read, desc="Checking rows")
    bad = np.flatnonzero([problem != "" for problem in checked["problem"]])
    if len(bad):
        first = f"row {bad[0]}: {checked[int(bad[0])]['problem']}"
        if len(bad) == len(rows):
            raise UserError(f"None of {len(rows)} rows can be trained on as {resolved.name!r}; the first one, {first}.")
        left_out = "%d of %d rows cannot be trained on as %r and are left out of the pool; the first one, %s."
        logger.warning(left_out, len(bad), len(rows), resolved.name, first)
        rows = rows.select(np.setdiff1d(np.arange(len(rows)), bad))
    removed = sorted((consumed | _TRLS) & set(rows.column_names) - {"prompt", "completion"})
    features = {name: kind for name, kind in rows.features.items() if name not in removed}
    # As JSON each message and row has its own names; Arrow would give all of them the names of all, with nulls.
    kind = List(Json()) if chats else Value("string")
    features |= {"prompt": kind, "completion": kind}
    extra = {"tools": Value("string"), "chat_template_kwargs": Json()}
    features |= {name: kind for name, kind in extra.items() if any(checked[name])}
    return rows.map(
        partial(convert, names=sorted(features)),
        remove_columns=removed,
        features=Features(features),
        desc="Formatting rows",
    )


@dataclass(frozen=True)
class _Convert:
    """A row of a format as TRL reads it, and what is wrong with one that cannot be."""

    format: PromptFormat
    tokenizer: Any

    def __call__(self, row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
        found = to_training_row(row, self.format, self.tokenizer)
        return {name: value for name, value in found.items() if name in names}

    def check(self, row: dict[str, Any]) -> dict[str, Any]:
        """What is wrong with a row, "" for nothing; and whether it has tools, and variables of a template."""
        found, problem = {}, ""
        try:
            found = to_training_row(row, self.format, self.tokenizer)
        except MalformedRow as error:
            problem = str(error) or "malformed"
        tools = found.get("tools", "null") != "null"
        return {"problem": problem, "tools": tools, "chat_template_kwargs": bool(found.get("chat_template_kwargs"))}


def _tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that TRL will load, with the chat template that it will use."""
    name, path, code = recipe.model.model_name_or_path, recipe.sft.chat_template_path, recipe.sft.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(name, revision=recipe.model.model_revision, trust_remote_code=code)
    if path is not None and os.path.isfile(path):
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path is not None:
        tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    return tokenizer


def _with_ids(rows: Dataset) -> Dataset:
    """Rows with a column that tells them apart: their own, or `row_id` with their positions."""

    def read(name: str) -> Any:
        return rows.select_columns([name]).with_format("arrow")[:][name]

    if find_ids(rows.column_names, read)[0] is not None:
        return rows
    if "row_id" in rows.column_names:
        rows = rows.remove_columns("row_id")
    return rows.add_column("row_id", list(range(len(rows))))


def _holds_messages(rows: Dataset, format: PromptFormat) -> bool:
    """Whether the prompts of prompt-completion rows are messages."""
    return isinstance(format, PromptCompletionFormat) and any(
        not reads_as_text(row[format.prompt]) for row in rows.take(1)
    )


def _find(source: str, folder: Path) -> str:
    """A path as given, or relative to the recipe's folder; hub names pass unchanged."""
    beside = folder / source
    return str(beside) if not Path(source).exists() and beside.is_file() else source
