"""One SFT run with selection inside, from a recipe: what `ifd-trainer train` does.

A recipe is TRL's flat YAML (`trl sft --config`) with the keys of `SelectionConfig` added.

A plan is made by the same trainer as the run, so that it is the same: TRL prepares the rows, and the train loader says
how many batches they are. But its model has no weights (PyTorch's meta device), nothing is scored or written, and what
this machine lacks for the run is set aside and noted.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from datasets import Dataset, Features, Json, List, Value
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

from ..data.chat_template import reads_as_text
from ..data.encoding import DEFINITIONS, check_positive
from ..data.files import load_rows
from ..data.formats import (
    FORMATS,
    ChatFormat,
    MalformedRow,
    PromptCompletionFormat,
    PromptFormat,
    resolve_format,
    to_training_row,
)
from ..data.paths import check_checkpoint, check_model
from ..data.refusals import looks_like_refusal
from ..data.row_ids import find_ids
from ..errors import FileAccessError, NotInstalledError, UserError, one_line
from ..method.brief_experience import Brief
from ..method.facility_location import Diverse
from ..method.schedule import Anneal, Curriculum, Rhythm, Schedule, as_schedule, parse_keep
from ..method.selection import Cherry
from ..scoring.engine import check_causal_config
from ..scoring.transform import IFD_COLUMNS, IFDScorer
from .callback import IFDSelectionCallback
from .initial_weights import Snapshot
from .recipe_file import ALIASES, beside, check_recipe, read_recipe
from .recipe_file import overrides as words_of
from .recipe_keys import check_keys, check_mappings, check_ranges, typed

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
    push_history: bool = field(
        default=False,
        metadata={
            "help": "Let a push to a hub take ifd_history and reports along; they hold texts of the training set."
        },
    )
    label: str | None = field(
        default=None, metadata={"help": "A column of labels to show in the report; selection never reads it."}
    )

    def __post_init__(self) -> None:
        for values in dataclasses.fields(self):  # argparse looks at those of the command line only
            choices, value = values.metadata.get("choices"), getattr(self, values.name)
            if choices is not None and value is not None and value not in choices:
                raise UserError(f"{values.name} must be one of {', '.join(choices)}, got {value!r}.")
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
        if not 0 <= self.anneal_share <= 1:
            raise UserError(f"anneal_share must be in [0, 1], got {self.anneal_share}.")
        if self.format is not None and self.format not in FORMATS:
            resolve_format(self.format, ())  # says which there are
        check_positive(min_answer_tokens=self.min_answer_tokens, token_budget=self.token_budget, tiers=self.tiers)
        # What these refuse is told before a model is loaded.
        Rhythm(self.schedule(), self.every, self.warmup_epochs, self.freeze_after)
        Cherry(self.max_ifd, self.score, self.on_shortfall)
        if self.diverse is not None:
            Diverse(self.share())
        if self.brief != "none":
            Brief(self.brief, self.brief_clusters, self.brief_per_cluster)
        self._warn_of_idle_keys()

    def _warn_of_idle_keys(self) -> None:
        """Say which keys have no effect with the others as they are."""
        idle = {"method: cherry": ("brief", "brief_clusters", "brief_per_cluster")} if self.method != "cherry" else {}
        idle |= {"curriculum": ("tiers", "tier_mode")} if self.curriculum is None else {}
        idle |= {"diverse": ("embedder",)} if self.diverse is None else {}
        defaults = {values.name: values.default for values in dataclasses.fields(self)}
        for needed, names in idle.items():
            given = [name for name in names if getattr(self, name) not in (defaults[name], "")]
            if given:
                logger.warning("%s: no effect without %s.", ", ".join(given), needed)

    def share(self) -> float | int | None:
        """`diverse` as the callback takes it."""
        try:
            return None if self.diverse is None else parse_keep(self.diverse)
        except UserError as error:
            raise UserError(
                f"diverse: {self.diverse!r} is not a number; use a share (0.2) or a count (1000)."
            ) from error

    def sample(self) -> Brief | None:
        """The brief experience of the method cherry, if there is one."""
        if self.method != "cherry" or self.brief == "none":
            return None
        return Brief(self.brief, self.brief_clusters, self.brief_per_cluster)

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
class PlanConfig(SFTConfig):
    """TRL's settings for a plan: nothing is written, and what this machine lacks is set aside and noted.

    Attributes:
        lacking: what the run needs and is not here, in words.
        parallel: a way to share the model over processes that was set aside: "deepspeed", or None.
    """

    def __post_init__(self) -> None:
        self.lacking = _set_aside(self)
        self.parallel, self.deepspeed = "deepspeed" if self.deepspeed else None, None
        self.push_to_hub, self.report_to = False, "none"
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # several processes are one run then too
        super().__post_init__()

    @property
    def should_save(self) -> bool:
        """No: the trainer makes no folder."""
        return False

    @property
    def place_model_on_device(self) -> bool:
        """No: a model without weights cannot be moved."""
        return False


def _set_aside(sft: SFTConfig) -> list[str]:
    """Take out of the settings what this machine cannot do, and say what that is."""
    accelerated = not sft.use_cpu and torch.accelerator.is_available()
    lacking = []
    if (sft.bf16 or sft.bf16_full_eval) and not sft.use_cpu and not is_torch_bf16_gpu_available():
        lacking.append("GPU with bfloat16 (bf16: true)")
        sft.bf16 = sft.bf16_full_eval = False
    if (sft.fp16 or sft.fp16_full_eval) and not accelerated:
        lacking.append("GPU for float16 (fp16: true)")
        sft.fp16 = sft.fp16_full_eval = False
        sft.bf16 = bool(sft.bf16)  # None would become true
    if sft.tf32 and not is_torch_tf32_available():
        lacking.append("GPU with TF32 (tf32: true)")
        sft.tf32 = None
    if sft.fsdp and int(os.environ.get("WORLD_SIZE", 1)) < 2:
        lacking.append("second process (fsdp: start it with torchrun or accelerate launch)")
        sft.fsdp = sft.fsdp_config = None
    if sft.deepspeed and not _installed("deepspeed"):
        lacking.append("package deepspeed")
    if sft.use_liger_kernel and not _installed("liger_kernel"):
        lacking.append("package liger-kernel (use_liger_kernel: true)")
        sft.use_liger_kernel = False
    return [*lacking, *(f"package {name} (report_to)" for name in _missing_trackers(sft.report_to))]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _missing_trackers(report_to: str | list[str] | None) -> list[str]:
    """Trackers that are asked for and not installed.

    Raises:
        ValueError: for a name that transformers does not know.
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in ("none", "all")]
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        raise UserError(
            f"report_to must be none, all or among {', '.join(INTEGRATION_TO_CALLBACK)}, got {unknown[0]!r}."
        )
    there = get_available_reporting_integrations() if names else []
    return [name for name in names if name not in [*there, "flyte"]]  # that one looks for itself


@dataclass
class Recipe:
    """The parsed recipe: TRL's dataclasses and ours."""

    script: ScriptArguments
    sft: SFTConfig
    model: ModelConfig
    selection: SelectionConfig
    folder: Path


@dataclass(frozen=True)
class Run:
    """A trainer with its selection callback, and what is said before it trains.

    Attributes:
        rows: rows of the data set.
        unread: how many of them cannot be rendered and were left out.
        refusals: how many were left out as refusals.
        lacking: what training needs and this machine has not, in words; of a plan.
    """

    trainer: SFTTrainer
    rows: int
    unread: int
    refusals: int
    lacking: tuple[str, ...] = ()


class _Parser(TrlParser):
    """TRL's parser; what it refuses is an error of one line, not the usage of some three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. See ifd-trainer train --help, or --help-all for all keys.")


def make_parser(plan: bool = False) -> TrlParser:
    """The parser of recipes; its options are the keys of TRL's `sft` and of `SelectionConfig`."""
    classes = (ScriptArguments, PlanConfig if plan else SFTConfig, ModelConfig, SelectionConfig)
    # Options that are cut short are not understood: a recipe's key that they override would go unnoticed.
    return _Parser(classes, prog="ifd-trainer train", allow_abbrev=False)


def parse_recipe(recipe: str | None, overrides: Sequence[str], plan: bool = False) -> Recipe:
    """Read a recipe file, let `overrides` (`--key value ...`) take precedence.

    Args:
        plan: whether the run is only planned: see `PlanConfig`.

    Raises:
        FileNotFoundError: when the recipe file does not exist, or a file or folder that it names.
        ValueError: for keys that no dataclass knows, values that they do not take, or without model or data set.
    """
    check_recipe(recipe, overrides, plan)
    arguments = []
    for word in overrides:
        key, equals, value = word.partition("=")
        alias = ALIASES.get(key.removeprefix("--")) if key.startswith("--") else None
        arguments.append((f"--{alias}" if alias else key) + equals + value)
    parser, given = make_parser(plan), read_recipe(recipe)
    known = {action.dest for action in parser._actions} - {"help"}
    check_keys(given, known | {"env"}, str(recipe))
    environment = given.pop("env", {})  # TRL's way to set variables
    if not isinstance(environment, dict):
        raise UserError(f"{recipe}: env wants a mapping of variables, got {environment!r}.")
    os.environ.update({key: str(value) for key, value in environment.items()})
    given = typed(given, parser.dataclass_types, str(recipe))
    check_mappings(given | words_of(overrides), parser.dataclass_types)
    if not torch.cuda.is_available():
        parser.set_defaults_with_config(bf16=False)  # TRL's default is True, which a CPU refuses
    parser.set_defaults_with_config(**given)
    with _translated("The settings do not go together"):
        script, sft, model, selection, unknown = parser.parse_args_and_config(arguments, return_remaining_strings=True)
    if unknown:
        known = {option for action in parser._actions for option in action.option_strings}
        named = [word.partition("=")[0] for word in unknown]
        check_keys([word for word in named if word.startswith("--")], {*known, "--plan", "--debug"}, "The command line")
        raise UserError(f"The command line has words that belong to no option: {' '.join(unknown)}.")
    check_ranges((sft, selection))
    if sft.max_steps == 0 or (sft.max_steps < 0 and not sft.num_train_epochs > 0):
        raise UserError(
            f"There is nothing to train: num_train_epochs is {sft.num_train_epochs:g}, max_steps {sft.max_steps}. Give "
            "more than no epochs, or max_steps of at least 1 (-1 leaves it to the epochs)."
        )
    if selection.scorer and sft.packing:
        raise UserError(
            f"scorer={selection.scorer!r} scores the rows before TRL packs them, and packing drops the scores. Set "
            "packing: false, or leave scorer out."
        )
    _check_processes(sft)
    if not plan:
        if missing := _missing_trackers(sft.report_to):
            raise NotInstalledError(
                f"report_to: {missing[0]} is not installed. Install its package, or set report_to: none."
            )
        sft.resume_from_checkpoint = check_checkpoint(sft.resume_from_checkpoint, sft.output_dir)
    return Recipe(script, sft, model, selection, Path(recipe).resolve().parent if recipe else Path.cwd())


def _check_processes(sft: SFTConfig) -> None:
    """Raise for processes that do not know of one another: each would write over what the others write."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != sft.world_size:
        raise UserError(
            f"{launched} processes were started, but each would train by itself: there is no GPU for them. Set "
            "use_cpu: true to train on processors, or start one process."
        )


def build_run(recipe: Recipe) -> Run:
    """The trainer of a recipe, with its selection callback added; without weights where it is only planned."""
    script, sft, model, selection = recipe.script, recipe.sft, recipe.model, recipe.selection
    plan = isinstance(sft, PlanConfig)
    config = _model_config(model, sft)
    source = beside(script.dataset_name, recipe.folder)
    rows = load_rows(source, script.dataset_train_split, script.dataset_config)
    if not len(rows):
        raise UserError(f"{source} has no rows to train on.")
    count = len(rows)
    scorer = _scorer(selection, sft) if selection.scorer else None
    with sft.main_process_first(desc="preparing the rows"):  # the others read what it put into the cache
        if scorer is not None and not plan:
            rows = rows.map(scorer, batched=True, batch_size=_SCORED_AT_ONCE, desc=f"Scoring with {selection.scorer}")
        train = _prepare(rows, selection.format, lambda: _tokenizer(recipe))
        whole = len(train)
        if selection.drop_refusals:
            train = _without_refusals(train)
    refusals, unread = whole - len(train), count - whole
    if not len(train):
        raise UserError(f"All {count} rows of {source} were left out. Set drop_refusals: false, or look at the rows.")
    labels = {*train.column_names, *(IFD_COLUMNS if scorer is not None else ())}
    if selection.label and selection.label not in labels:
        raise UserError(f"label={selection.label!r} is not among the data set's columns {sorted(labels)}.")
    held_out = None
    if selection.eval_dataset:
        held_out = beside(selection.eval_dataset, recipe.folder)
        held_out = load_rows(held_out, script.dataset_test_split)
        held_out = _prepare(held_out, selection.format, lambda: _tokenizer(recipe))
    with _translated("The trainer cannot be made"):
        trainer = _trainer(config, model, sft, train, held_out)
    if not len(trainer.train_dataset):
        raise UserError(
            f"None of {count} rows has an answer within max_length={sft.max_length} tokens: raise max_length, or "
            "shorten the prompts."
        )
    lacking = (*sft.lacking, *_lacking_for(model)) if plan else ()
    if plan and sft.parallel:
        trainer.is_deepspeed_enabled = True  # what cannot be done under it is refused here too
    callback = _callback(trainer, selection, scorer)
    if plan and sft.parallel:
        trainer.is_deepspeed_enabled = False
    trainer.add_callback(callback)
    return Run(trainer, count, unread, refusals, lacking)


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
    check_causal_config(name, config)
    return config


def _trainer(
    config: PretrainedConfig, model: ModelConfig, sft: SFTConfig, train: Dataset, held_out: Dataset | None
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
    if not plan and model.use_peft and not _installed("peft"):
        raise NotInstalledError("use_peft needs the package peft: pip install peft, or set use_peft: false.")
    tokenizer = None
    if plan:
        hub = {"revision": init["revision"], "trust_remote_code": sft.trust_remote_code}
        tokenizer = AutoProcessor.from_pretrained(model.model_name_or_path, **hub)
    return SFTTrainer(
        model=_outline(config, init["dtype"], model, sft) if plan else model.model_name_or_path,
        args=sft,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        quantization_config=None if plan else get_quantization_config(model),
        peft_config=get_peft_config(model) if _installed("peft") else None,
    )


def _outline(config: PretrainedConfig, dtype: Any, model: ModelConfig, sft: SFTConfig) -> PreTrainedModel:
    """The model as TRL would load it, on the meta device."""
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise UserError(f"dtype must be auto, float32, bfloat16 or float16, got {model.dtype!r}.")
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    cls = getattr(transformers, config.architectures[0], None)
    with torch.device("meta"):
        if cls is None:
            made = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=sft.trust_remote_code)
        else:
            made = cls._from_config(config, dtype=dtype)
    made.is_loaded_in_4bit, made.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit  # TRL asks for these
    return made


def _lacking_for(model: ModelConfig) -> Iterator[str]:
    """What this machine lacks to load the model as the recipe says."""
    attention = model.attn_implementation or ""
    if "flash" in attention and not torch.accelerator.is_available():
        yield f"GPU for attn_implementation: {attention}"
    elif attention.startswith("flash_attention_2") and not _installed("flash_attn"):
        yield "package flash-attn (attn_implementation)"
    if (model.load_in_4bit or model.load_in_8bit) and not _installed("bitsandbytes"):
        yield "package bitsandbytes (load_in_4bit, load_in_8bit)"
    if model.use_peft and not _installed("peft"):
        yield "package peft (use_peft: true)"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """What TRL, transformers and their like refuse while a run is set up is the user's to mend."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        raise FileAccessError(
            f"The model's weights cannot be read ({one_line(error)}): a file is damaged or was cut short. Download or "
            "copy it again."
        ) from error
    except ImportError as error:
        raise NotInstalledError(f"{what}: {one_line(error)}") from error
    except (ValueError, TypeError, OSError, RuntimeError, DatasetsError) as error:
        if "can't allocate memory" in str(error):
            raise
        raise UserError(f"{what}: {one_line(error) or type(error).__name__} (--debug shows where).") from error


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
        "push_history": selection.push_history,
        "scorer": None if scorer is None else "columns",
        "diverse": selection.share(),
        "embedder": selection.embedder or scorer,
    }
    rhythm = {
        name: getattr(selection, name)
        for name in ("every", "warmup_epochs", "freeze_after")
        if getattr(selection, name) != getattr(SelectionConfig, name)
    }
    if selection.method == "dynamic":
        return IFDSelectionCallback(trainer, **options, **rhythm)
    return IFDSelectionCallback.cherry(trainer, brief=selection.sample(), **options, **rhythm)


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


def planned(run: Run) -> str:
    """What will be trained on: budgets and steps, the rows that are there, and the disk that it needs."""
    trainer, callback = run.trainer, selection_of(run.trainer)
    trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    lines = [str(callback.plan), _pool_line(run), _batch_line(trainer)]
    if callback.restart is not None:
        size = f"{Snapshot.size(trainer.model) / 1e9:.2f} GB"
        if any("peft" in what for what in run.lacking):
            size = "those of the adapters,"
        lines.append(f"original weights: {size} in {trainer.args.output_dir} until training ends")
    if run.lacking:
        lines.append(f"this machine has no {', no '.join(run.lacking)}; training needs it")
    return "\n".join(lines)


def _pool_line(run: Run) -> str:
    """How many rows are selected from, and what became of the others."""
    pool = run.trainer.selection_pool
    text = f"pool: {len(pool)} of {run.rows} rows"
    if run.unread:
        text += f", {run.unread} that cannot be rendered"
    if run.refusals:
        text += f", {run.refusals} left out as refusals"
    if lost := run.rows - run.unread - run.refusals - len(pool):
        text += f", {lost} lost to max_length={run.trainer.args.max_length} (no token of their answers is left)"
    return text + (f", in {pool.training_rows} packed rows" if pool.packed else "")


def _batch_line(trainer: SFTTrainer) -> str:
    """Rows of an update, which depend on how the run is launched."""
    args = trainer.args
    rows = "packed rows" if trainer.selection_pool.packed else "rows"
    parts = [f"{args.train_batch_size} {rows}", f"{args.gradient_accumulation_steps} batches"]
    parts.append(f"{args.world_size} process{'es' if args.world_size > 1 else ''}")
    return f"update: {' x '.join(parts)} = {trainer.get_total_train_batch_size(args)} {rows}"


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
