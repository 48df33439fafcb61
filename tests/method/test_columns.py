"""Columns and definitions have one home: what names them elsewhere says the same."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from conftest import ROOT

from ifd_trainer.cli import main
from ifd_trainer.data.definitions import DEFINITIONS, KNOWN_DEFINITIONS, SCORE_KINDS
from ifd_trainer.method.choices import RANKED_BY
from ifd_trainer.method.columns import (
    IFD_COLUMNS,
    OWN_COLUMNS,
    SCORES,
    SELECTION_COLUMNS,
    SELECTIVE_COLUMNS,
    TOKEN_COLUMNS,
    TURN_COLUMNS,
)
from ifd_trainer.method.further_scores import FURTHER
from ifd_trainer.scoring.losses import Scores


def test_scores_are_arrays_of_these_columns():
    assert tuple(field.name for field in fields(Scores)) == (*IFD_COLUMNS, "further", "losses")
    assert SCORES == ("cas", "das", "ifd", "ifd_ppl", "eot_loss")
    assert SELECTION_COLUMNS == ("ifd_definition", "ifd_rank", "ifd_reason")
    assert TOKEN_COLUMNS == ("cas_tokens", "das_tokens")
    assert SELECTIVE_COLUMNS == ("sifd", "sifd_mean", "sifd_std")
    assert OWN_COLUMNS == IFD_COLUMNS + TURN_COLUMNS + TOKEN_COLUMNS + SELECTIVE_COLUMNS + SELECTION_COLUMNS
    assert set(RANKED_BY) < set(SCORES)


def test_the_readme_and_the_help_name_every_column_and_definition(capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("| column | meaning |")[1].split("\n\n")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == IFD_COLUMNS
    table = readme.split("| further column | meaning |")[1].split("\n\n")[0]
    further = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split(" | ")[0])]
    assert set(further) == set(FURTHER)
    assert set(DEFINITIONS) <= set(re.findall(r'definition="(\w+)"', readme))
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Attach the columns {', '.join(IFD_COLUMNS[:-1])} and {IFD_COLUMNS[-1]} to every row." in shown
    assert [f"{name}: {each.meaning}" in shown for name, each in DEFINITIONS.items()] == [True, True, True]


def test_what_tells_definitions_apart():
    assert SCORE_KINDS == ("cherry", "superfiltering", "data-juicer", "ifd-trainer")
    assert {name: each.ranked_by for name, each in KNOWN_DEFINITIONS.items() if each.ranked_by != "ifd"} == {
        "superfiltering": "ifd_ppl"
    }
