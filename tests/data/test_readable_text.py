"""What is shown as a row's answer, and searched for refusals, is what is scored."""

from __future__ import annotations

import pandas as pd
import pytest
from datasets import Dataset

from ifd_trainer.data.format_choice import resolve_format
from ifd_trainer.data.formats import FORMATS, answer_of
from ifd_trainer.data.readable_text import answers_of, text_columns
from ifd_trainer.data.refused_answers import refused_rows
from ifd_trainer.data.table_reader import TableReader
from ifd_trainer.recipe.rows import without_refusals

ASKED = {"role": "user", "content": "Ask."}
SAID = [{"role": "assistant", "content": "As an AI language model, I wait."}, {"role": "assistant", "content": "Done."}]
COLUMNS = {
    "messages": [ASKED, {"role": "assistant", "content": "of messages"}],
    "conversations": [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "of conversations"}],
    "prompt": "Ask.",
    "completion": "of completion",
    "instruction": "Ask.",
    "input": "",
    "output": "of output",
}


@pytest.mark.parametrize("without", range(len(COLUMNS)))
def test_the_answer_is_the_one_of_the_format_that_is_scored(without):
    row = dict(list(COLUMNS.items())[without:]) | {"instruction": "Ask.", "output": "of output"}
    assert answers_of(pd.DataFrame([row])) == [answer_of(row, resolve_format(None, row))]
    assert answers_of(pd.DataFrame([row]))[0].startswith("of ")


def test_texts_that_a_run_keeps_come_first():
    row = COLUMNS | {"prompt": "Asked.", "answer": "Answered."}
    assert text_columns(pd.DataFrame([row])).loc[0].tolist() == ["Asked.", "", "Answered."]


def test_an_answer_of_several_messages_is_all_that_they_say():
    rows = Dataset.from_dict({"prompt": [[ASKED], [ASKED]], "completion": [SAID, SAID[1:]]})
    assert answers_of(rows.to_pandas()) == ["As an AI language model, I wait.\nDone.", "Done."]
    assert refused_rows(TableReader(rows)).tolist() == [True, False]
    assert without_refusals(rows)["completion"][:] == [SAID[1:]]


def test_of_a_row_that_cannot_be_scored_is_shown_what_can_be_read():
    rows = pd.DataFrame({"messages": [[ASKED, {"role": "narrator", "content": "Meanwhile."}], None, "none"]})
    assert text_columns(rows)["instruction"].tolist() == ["[after 1 earlier turns] Meanwhile.", "", "none"]
    assert text_columns(rows)["answer"].tolist() == ["", "", ""]


def test_every_known_format_has_an_answer():
    rows = {name: {column: COLUMNS.get(column) for column in format.columns} for name, format in FORMATS.items()}
    assert {name: answer_of(row, FORMATS[name]) for name, row in rows.items()} == {
        "alpaca": "of output",
        "wizardlm": "of output",
        "superfiltering": "of output",
        "prompt-completion": "of completion",
        "messages": "of messages",
        "sharegpt": "of conversations",
    }
