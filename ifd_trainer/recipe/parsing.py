"""A recipe, read: TRL's flat YAML (`trl sft --config`) with the selection keys of this package added.

`parse_recipe` takes a file and the words of the command line that override it, and gives settings of which all are
known, of their types, in their ranges and in agreement; or one line that says what is wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import Any, NoReturn

import torch
from datasets.exceptions import DatasetsError
from safetensors import SafetensorError
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
from trl.scripts.utils import DatasetConfig

from ..data.paths import check_checkpoint
from ..errors import FileAccessError, NotInstalledError, UserError, one_line
from .file import ALIASES, COMPARED, check_recipe, read_recipe
from .file import overrides as words_of
from .keys import check_keys, check_mappings, check_ranges, typed
from .machine import PlanConfig, missing_trackers
from .selection import SelectionConfig


@dataclass
class Recipe:
    """The parsed recipe: TRL's dataclasses and ours."""

    script: ScriptArguments
    sft: SFTConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig
    selection: SelectionConfig
    folder: Path


class _Parser(TrlParser):
    """TRL's parser; what it refuses is an error of one line, not the usage of some three hundred options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.rstrip('.')}. See ifd-trainer train --help, or --help-all for all keys.")


def make_parser(plan: bool = False) -> TrlParser:
    """The parser of recipes; its options are the keys of TRL's `sft` and of `SelectionConfig`."""
    classes = (ScriptArguments, PlanConfig if plan else SFTConfig, ModelConfig, DatasetMixtureConfig, SelectionConfig)
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
    parser = make_parser(plan)
    given = {key: value for key, value in read_recipe(recipe).items() if key not in COMPARED}
    known = {action.dest for action in parser._actions} - {"help"}
    check_keys(given, known | {"env"}, str(recipe))
    environment = given.pop("env", {})  # TRL's way to set variables
    if not isinstance(environment, dict):
        raise UserError(f"{recipe}: env wants a mapping of variables, got {environment!r}.")
    os.environ.update({key: str(value) for key, value in environment.items()})
    if isinstance(given.get("datasets"), list):
        _check_mixture(given["datasets"], f"{recipe}, datasets")
    given = typed(given, parser.dataclass_types, str(recipe))
    check_mappings(given | words_of(overrides), parser.dataclass_types)
    if not torch.cuda.is_available():
        parser.set_defaults_with_config(bf16=False)  # TRL's default is True, which a CPU refuses
    parser.set_defaults_with_config(**given)
    with translated("The settings do not go together"), _importable(Path(recipe).resolve().parent if recipe else None):
        parsed = parser.parse_args_and_config(arguments, return_remaining_strings=True)
        script, sft, model, mixture, selection, unknown = parsed
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
        if missing := missing_trackers(sft.report_to):
            raise NotInstalledError(
                f"report_to: {missing[0]} is not installed. Install its package, or set report_to: none."
            )
        sft.resume_from_checkpoint = check_checkpoint(sft.resume_from_checkpoint, sft.output_dir)
    return Recipe(script, sft, model, mixture, selection, Path(recipe).resolve().parent if recipe else Path.cwd())


def _check_mixture(entries: list[Any], where: str) -> None:
    """Raise for data sets of a mixture that TRL would stumble over, or read otherwise than they look."""
    for entry in entries:
        if isinstance(entry, dict):
            check_keys(entry, (key.name for key in fields(DatasetConfig)), where)
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f"{where}: each one is named by its path (`- path: rows.jsonl`), got {entry!r}.")
        fraction = entry.get("fraction")
        if fraction is not None and not (isinstance(fraction, Real) and fraction > 0):
            raise UserError(f"{where}: the fraction of {entry['path']} must be a number above 0, got {fraction!r}.")
        if isinstance(entry.get("columns"), str):
            raise UserError(f"{where}: columns of {entry['path']} wants a list, got {entry['columns']!r}.")


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """Modules beside the recipe, and in the working directory, can be imported: a policy may be in one."""
    before = list(sys.path)
    sys.path[:0] = [str(path) for path in (folder, Path.cwd()) if path is not None]
    try:
        yield
    finally:
        sys.path[:] = before


def _check_processes(sft: SFTConfig) -> None:
    """Raise for processes that do not know of one another: each would write over what the others write."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != sft.world_size:
        raise UserError(
            f"{launched} processes were started, but each would train by itself: there is no GPU for them. Set "
            "use_cpu: true to train on processors, or start one process."
        )


@contextmanager
def translated(what: str) -> Iterator[None]:
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
