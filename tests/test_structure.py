"""The package's shape: rooms that import one way, and everything public says what it is."""

from __future__ import annotations

import ast
from functools import cache

import pytest
from conftest import ROOT
from transformers import Trainer

PACKAGE = ROOT / "ifd_trainer"
# A room imports from itself and from the rooms before it; `errors` is everybody's, the top may import all.
ROOMS = [
    *("method", "data", "scoring", "training", "recipe", "frameworks", "report", "publish", "evaluation", "judge"),
    *("compare", "commands"),
]
MODULES = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))


@cache
def tree_of(module) -> ast.Module:
    return ast.parse((PACKAGE / module).with_suffix(".py").read_text(encoding="utf-8"))


def imported(tree: ast.Module, room: str | None) -> set[tuple[str, ...]]:
    """(room, module) or (module,) of this package that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {tuple(name[1:3]) for name in names if name[0] == PACKAGE.name and len(name) > 1}
        elif isinstance(node, ast.ImportFrom):
            path = node.module.split(".") if node.module else []
            if not node.level:
                if path[:1] != [PACKAGE.name]:
                    continue
                path = path[1:]
            elif node.level == 1 and room is not None:
                path = [room, *path]
            whole = len(path) > 1 or (path and path[0] not in ROOMS)
            found |= {tuple(path[:2])} if whole else {(*path, alias.name) for alias in node.names}
    return found - {("__version__",)}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .page import write_report", {("report", "page")}),
        ("from . import page as one, plots", {("report", "page"), ("report", "plots")}),
        ("from ..method.equations import ifd", {("method", "equations")}),
        ("from ..method import equations", {("method", "equations")}),
        ("from ..errors import UserError", {("errors",)}),
        ("from ifd_trainer.training.callback import IFDSelectionCallback", {("training", "callback")}),
        ("import ifd_trainer.training.callback as c", {("training", "callback")}),
        ("def f():\n    from ..cli import main", {("cli",)}),
        ("from .. import __version__", set()),
        ("import torch\nfrom transformers import Trainer", set()),
    ],
)
def test_imports_are_found_in_every_spelling(source, found):
    assert imported(ast.parse(source), "report") == found


@pytest.mark.parametrize("module", [module for module in MODULES if len(module.parts) > 1], ids=str)
def test_a_room_imports_only_from_rooms_before_it(module):
    room = module.parts[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    others = {name for name in imported(tree_of(module), room) if name != ("errors",)}
    assert {name for name in others if name[0] not in allowed} == set()


def test_no_two_modules_import_each_other():
    imports = {module.parts: imported(tree_of(module), module.parts[0]) for module in MODULES if len(module.parts) > 1}
    waiting = {name: {other for other in needs if other in imports} for name, needs in imports.items()}
    while ready := [name for name, needs in waiting.items() if not needs]:
        waiting = {name: needs - set(ready) for name, needs in waiting.items() if name not in ready}
    assert waiting == {}


def third_party(tree: ast.Module) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", [module for module in MODULES if module.parts[0] == "method"], ids=str)
def test_the_method_does_without_torch_and_trainers(module):
    assert not third_party(tree_of(module)) & {"torch", "transformers", "trl", "datasets", "accelerate"}


@pytest.mark.parametrize("module", [module for module in MODULES if len(module.parts) > 1], ids=str)
def test_only_training_and_recipes_know_trl(module):
    assert "trl" not in third_party(tree_of(module)) or module.parts[0] in ("training", "recipe")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_everything_public_has_a_docstring(module):
    tree = tree_of(module)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [node.name]
    assert missing == []


@cache
def private_names() -> set[str]:
    """Functions, classes, methods and module constants of ours with a leading underscore; not what `Trainer` calls."""
    found = set()
    for module in MODULES:
        tree = tree_of(module)
        defined = [node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        assigned = [name for node in tree.body if isinstance(node, ast.Assign) for name in node.targets]
        stored = [name for target in assigned for name in ast.walk(target)]
        stored += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
        defined += [name.id for name in stored if isinstance(name, ast.Name)]
        found |= {name for name in defined if name.startswith("_") and not name.startswith("__")}
    return found - set(dir(Trainer))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_know_no_private_names(path):
    """They hold what is seen from outside, so that what is inside can change."""
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            used.add(node.value.rpartition(".")[2])  # of `monkeypatch.setattr`
    assert used & private_names() == set()


def test_every_exported_name_is_there():
    import ifd_trainer

    for name in ifd_trainer.__all__:
        assert getattr(ifd_trainer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ifd_trainer.nothing
