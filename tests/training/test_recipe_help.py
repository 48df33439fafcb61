"""The help of `ifd-trainer train`: made from the keys of recipes, all of them, and there at once."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys

import pytest
from tiny_runs import RECIPES

from ifd_trainer.cli import main
from ifd_trainer.recipe.parsing import make_parser
from ifd_trainer.recipe.selection import SelectionConfig
from ifd_trainer.recipe.selection_keys import GROUPS

KEYS = {key.name: key for key in dataclasses.fields(SelectionConfig)}
HEAVY = {"torch", "transformers", "trl", "datasets", "pandas", "pyarrow", "numpy"}


@pytest.fixture
def entries(capsys) -> dict[str, str]:
    """What the help says about each option, in one line."""
    assert main(["train", "--help"]) == 0
    parts = re.split(r"^  --(\w+)", capsys.readouterr().out, flags=re.MULTILINE)
    return {name: " ".join(said.split()) for name, said in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("name", KEYS)
def test_every_key_of_a_recipe_is_in_the_help_as_its_field_describes_it(name, entries):
    key, said = KEYS[name], entries[name]
    assert key.metadata["help"] in said
    assert said.startswith("|".join(key.metadata.get("choices", ())) or key.metadata["metavar"])
    if key.default not in (None, False, 0, dataclasses.MISSING):
        assert f"Default: {key.default}." in said
    else:
        assert ("Default:" in said) == (name in ("keep", "guards", "stage_epochs"))


def test_the_help_has_titles_for_all_keys():
    assert next(iter(KEYS)) in GROUPS
    assert list(GROUPS) == [name for name in KEYS if name in GROUPS]


@RECIPES
def test_the_parser_of_recipes_says_the_same_of_each_key():
    actions = {action.dest: action for action in make_parser()._actions}
    for name, key in KEYS.items():
        assert actions[name].help == key.metadata["help"]
        assert list(actions[name].choices or ()) == list(key.metadata.get("choices", ()))


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"], ["score", "--help"], ["select", "--help"]])
def test_help_imports_nothing_that_makes_it_wait(words):
    code = (
        "import sys\nfrom ifd_trainer.cli import main\n"
        f"try:\n    main({words})\nexcept SystemExit:\n    pass\nprint('imported', *sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    out, _, imported = done.stdout.rpartition("imported ")
    assert "usage: " in out
    assert HEAVY & set(imported.split()) == set()
