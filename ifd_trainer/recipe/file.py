"""A recipe file and the words that override it, as far as they can be told right or wrong without importing torch."""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.paths import check_checkpoint, check_folder, check_model, check_readable, check_rows, model_name
from ..errors import FileAccessError, NotFoundError, UserError

ALIASES = {"model": "model_name_or_path", "dataset": "dataset_name"}
# Keys that `ifd-trainer compare` reads, and no run.
COMPARED = (
    *("arms", "seeds", "superfilter", "judge", "held_out_sets", "category_column", "group_column", "answers"),
    *("max_new_tokens", "prompts", "tasks", "task_limit", "task_folder", "confirm_run_unsafe_code"),
)
# Keys that TRL and transformers read a file for, if it ends like this.
FILES = {
    "deepspeed": (".json",),
    "fsdp_config": (".json",),
    "accelerator_config": (".json",),
    "chat_template_path": (".jinja", ".j2"),
}


def read_recipe(path: str | None) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one without a file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a file that is no YAML, or holds no mapping.
    """
    if path is None:
        return {}
    file = Path(path)
    if file.is_dir():
        raise NotFoundError(f"{path} is a folder. Name a recipe in it, a YAML file.")
    if not file.exists():
        raise NotFoundError(f"No such recipe: {path}.")
    check_readable(file)
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        why = getattr(error, "problem", None) or " ".join(str(error).split())
        raise FileAccessError(f"{path} is not YAML ({where}{why}). Write one `key: value` a line.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise FileAccessError(f"{path} holds no YAML mapping. Write one `key: value` a line.")
    return content


def recipes_folder() -> Path:
    """Where the recipes of this package are: in it, or, of a checkout, beside it.

    Raises:
        NotFoundError: when they are in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "recipes", package.parent / "recipes"):
        if (folder / "demo.yaml").is_file():
            return folder
    raise NotFoundError(f"The recipes are neither in {package} nor beside it. Install the package again.")


def recipe_titles() -> dict[str, str]:
    """The recipes of this package by name, each with the first line of its header.

    >>> recipe_titles()["alpaca_dynamic"][:29]
    'Dynamic selection on Alpaca: '
    """
    titles = {}
    for path in sorted(recipes_folder().glob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            titles[path.stem] = file.readline().lstrip("# ").strip()
    return titles


def copy_recipe(name: str, target: str | None = None) -> list[Path]:
    """Copy a recipe of this package, and the files of rows that it names, to a place of the user's.

    Args:
        name: of the recipe, with or without .yaml.
        target: the file to write, or a folder that is there; by default the recipe's name in the working directory.

    Returns:
        The files that were written, the recipe first.

    Raises:
        UserError: for a recipe that there is not, and for a file that is there already.
    """
    name = name.removesuffix(".yaml")
    if name not in recipe_titles():
        near = difflib.get_close_matches(name, recipe_titles(), n=1)
        meant = f"Did you mean {near[0]}?" if near else "`ifd-trainer recipes` lists them."
        raise NotFoundError(f"There is no recipe {name!r}. {meant}")
    folder = recipes_folder()
    recipe = Path(f"{name}.yaml" if target is None else target)
    recipe = recipe / f"{name}.yaml" if recipe.is_dir() else recipe
    values = read_recipe(str(folder / f"{name}.yaml"))
    rows = [value for value in values.values() if isinstance(value, str) and (folder / value).is_file()]
    copies = {folder / f"{name}.yaml": recipe, **{folder / value: recipe.parent / value for value in rows}}
    for source, place in copies.items():
        if place.exists() and place.read_bytes() != source.read_bytes():
            raise UserError(f"{place} is there already, and is another file. Name another place with --output.")
    for source, place in copies.items():
        check_folder(place.parent)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, place)
    return list(copies.values())


def overrides(words: Sequence[str]) -> dict[str, str]:
    """Values of `--key value` and `--key=value` by key, the last one of each; a key without value is "true".

    >>> overrides(["--model", "m", "--keep", "0.1", "0.2", "--max-length=9", "--packing"])
    {'model_name_or_path': 'm', 'keep': '0.1', 'max_length': '9', 'packing': 'true'}
    """
    values = {}
    for position, word in enumerate(words):
        if not word.startswith("--"):
            continue
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = next(iter(words[position + 1 : position + 2]), "--")
            value = "true" if following.startswith("--") else following
        key = key.replace("-", "_")
        values[ALIASES.get(key, key)] = value
    return values


def check_recipe(recipe: str | None, words: Sequence[str], plan: bool = False) -> None:
    """Raise ValueError for a path that is wrong, and for a run without a model or a data set.

    Args:
        plan: whether nothing is to be written, scored or resumed, so that these paths do not matter.
    """
    given = read_recipe(recipe)
    for short, key in ALIASES.items():
        if short in given and key not in given:
            raise UserError(f"{recipe}: there is no key {short!r}. Did you mean {key}?")
    settings: Mapping[str, Any] = {**given, **overrides(words)}
    folder = Path(recipe).resolve().parent if recipe is not None else Path()
    model, rows = settings.get("model_name_or_path"), settings.get("dataset_name")
    rows = None if settings.get("datasets") else rows  # a mixture, each of which is read for itself
    if model is None or (rows is None and not settings.get("datasets")):
        raise UserError("A run needs a model and a data set: --model NAME_OR_PATH --dataset FILE_OR_NAME.")
    # What is no text at all is told where types are.
    for source in (rows, settings.get("eval_dataset"), settings.get("target_set") or None):
        if isinstance(source, str):
            check_rows(beside(source, folder))
    for name in (model, settings.get("scorer")):
        if isinstance(name, str):
            check_model(name)
    # What is asked for would be ignored without a word.
    file = rows is not None and Path(beside(str(rows), folder)).is_file()
    of_file = ("dataset_train_split", "dataset_config") if file else ()
    for key in (*of_file, *(("model_revision",) if Path(str(model)).is_dir() else ())):
        if settings.get(key) not in (None, "", "train", "main"):
            what = "the data set is a file" if key in of_file else "the model is a folder"
            raise UserError(f"{key} is {settings[key]!r}, but {what}, which has none. Leave {key} out.")
    if isinstance(settings.get("embedder"), str) and settings["embedder"]:
        model_name(settings["embedder"])
    for key, endings in FILES.items():
        value = settings.get(key)
        if isinstance(value, str) and value.endswith(endings) and not Path(value).is_file():
            raise NotFoundError(f"{key}: no such file: {value}.")
    if not plan:
        output = str(settings.get("output_dir") or "trainer_output")
        check_folder(output)
        check_checkpoint(settings.get("resume_from_checkpoint"), output)


def beside(source: str, folder: Path) -> str:
    """The path of a file or folder as given, or relative to the recipe's folder; hub names pass unchanged."""
    there = folder / source
    return str(there) if source and not Path(source).exists() and there.exists() else source
