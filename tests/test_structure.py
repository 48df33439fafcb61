"""The package's shape: data flows one way, and everything public says what it is."""

from __future__ import annotations

import ast

import pytest
from conftest import ROOT

PACKAGE = ROOT / "ifd_trainer"
# A module imports only from modules before it.
ORDER = [
    "errors",
    "paths",
    "atomic",
    "chat",
    "recipe",
    "settings",
    "formats",
    "refusals",
    "encoding",
    "decoding",
    "prompts",
    "headers",
    "token_rows",
    "ifd",
    "positions",
    "transfer",
    "stream",
    "attention",
    "onednn",
    "head",
    "memory",
    "forward",
    "borrow",
    "engine",
    "scorer",
    "devices",
    "digests",
    "columns",
    "row_ids",
    "selection",
    "diversity",
    "brief",
    "schedule",
    "packing",
    "pool",
    "history",
    "checkpoint",
    "snapshot",
    "loop",
    "pool_scorer",
    "callback",
    "arrow_files",
    "files",
    "job",
    "train",
    "foreign",
    "texts",
    "scan",
    "subset",
    "frames",
    "words",
    "tables",
    "subject",
    "provenance",
    "plots",
    "card",
    "hub",
    "report",
    "cli",
    "__main__",
]
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def tree_of(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imported_modules(tree: ast.Module) -> set[str]:
    """Modules of this package that a module imports, at its top or inside a function, in whatever spelling."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {name[1] for name in names if name[0] == PACKAGE.name and len(name) > 1}
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if not node.level:
                if path[:1] != [PACKAGE.name]:
                    continue
                path = path[1:]
            found |= {path[0]} if path else {alias.name for alias in node.names}
    return found - {"__version__"}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from .ifd import ifd", {"ifd"}),
        ("from . import ifd as equations, loop", {"ifd", "loop"}),
        ("from ifd_trainer.loop import attach", {"loop"}),
        ("import ifd_trainer.loop as l", {"loop"}),
        ("from ifd_trainer import report", {"report"}),
        ("def f():\n    from .cli import main", {"cli"}),
        ("from . import __version__", set()),
        ("import torch\nfrom transformers import Trainer", set()),
    ],
)
def test_imports_are_found_in_every_spelling(source, found):
    assert imported_modules(ast.parse(source)) == found


def test_every_module_has_its_place():
    assert [module for module in MODULES if module not in ORDER] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_modules_before_it(module):
    before = ORDER[: ORDER.index(module)]
    assert sorted(imported_modules(tree_of(module)) - set(before)) == []


PURE = ["refusals", "ifd", "selection", "diversity", "brief", "schedule", "packing", "pool", "row_ids", "subset"]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_do_without_torch_and_trainers(module):
    names = {
        alias.name.split(".")[0]
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {
        node.module.split(".")[0]
        for node in ast.walk(tree_of(module))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    assert not names & {"torch", "transformers", "trl", "datasets", "accelerate"}


@pytest.mark.parametrize("module", ["__init__", *MODULES])
def test_everything_public_has_a_docstring(module):
    tree = tree_of(module)
    missing = [] if ast.get_docstring(tree) else ["the module"]
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            missing += [] if ast.get_docstring(node) else [node.name]
    assert missing == []


def test_every_exported_name_is_there():
    import ifd_trainer

    for name in ifd_trainer.__all__:
        assert getattr(ifd_trainer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ifd_trainer.nothing
