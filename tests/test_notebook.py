"""The notebook: its cells run in their order, on a tiny model and a part of its rows."""

from __future__ import annotations

import ast
import json
import re

import matplotlib
import pandas as pd
from conftest import ROOT
from tiny_runs import RECIPES, TOKENIZER, build_model

CELLS = json.loads((ROOT / "recipes" / "selection.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# A random model's prompts help it little, which guards would refuse.
SMALLER = {
    'split="train")': 'split="train[:30]")',
    "keep=0.12": "keep=0.25, guard=None",
    "num_train_epochs=3": "num_train_epochs=2, use_cpu=True",
}


def shown(source: str, names: dict) -> object:
    """The value of a cell's last line, as a notebook shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


@RECIPES
def test_the_cells_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_model(len(TOKENIZER)).save_pretrained("model")
    TOKENIZER.save_pretrained("model")
    first, *cells = CODE
    assert "%pip install" in first  # where the package is not there
    names, values = {}, []
    for source in cells:
        for here, there in SMALLER.items():
            source = source.replace(here, there)
        values.append(shown(source.replace("main([", 'MODEL = "model"\nmain(['), names))
    assert [type(value) for value in values if isinstance(value, pd.DataFrame)] == [pd.DataFrame] * 4
    assert sum(isinstance(value, matplotlib.figure.Figure) for value in values) == 2
    for run, kept in ((names["selected"], 8), (names["random_rows"], 8)):
        assert [record["kept"] for record in run.epochs] == [kept] * 2
        assert all(record["eval_loss"] > 0 for record in run.epochs)
    assert (tmp_path / "runs" / "selected" / "ifd_history").is_dir()


def test_it_holds_no_output_and_names_no_machine():
    for cell in CELLS:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert re.search(r"/(home|root|tmp)/", json.dumps(CELLS)) is None
