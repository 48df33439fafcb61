"""Rows of a recipe on their way to TRL: what is left out and set aside, and that what trains is what was scored."""

from __future__ import annotations

import logging

import pytest
from conftest import build_model, build_tokenizer
from datasets import Dataset
from tiny_runs import INF, RECIPES, select, sft_trainer, train
from tokenizers import AddedToken

from ifd_trainer import IFDScorer
from ifd_trainer.data.token_rows import TokenRows
from ifd_trainer.errors import UserError
from ifd_trainer.recipe.rows import prepare, without_refusals

pytestmark = RECIPES
QWEN3 = pytest.importorskip("trl.chat_template_utils", reason=RECIPES.kwargs["reason"]).qwen3_chat_template

THINK = (  # an empty think block in the last answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def thinker(template: str):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.chat_template = template
    return tokenizer


def chat(question: str | None, answer: str | None, **more: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def conversation(*turns: tuple) -> dict:
    return {"conversations": [{"from": name, "value": text} for name, text in turns]}


def prepared(rows: list[dict], **options) -> Dataset:
    return prepare(Dataset.from_list(rows), None, **options)[0]


# ---- the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "assistant_only"),
    [(QWEN3, False), (QWEN3, True), (THINK, False)],
    ids=["qwen3", "qwen3, assistant_only_loss", "own"],
)
def test_the_loop_scores_as_the_transform_does(tmp_path, template, assistant_only):
    tokenizer = thinker(template)
    model = build_model(len(tokenizer))
    rows = [chat(f"Name number {i}.", f"It is {i}, as I said.") for i in range(5)]
    rows += [chat("Name it.", ""), chat(" ", "Red, it is."), chat("Name it.", "Red.", reasoning_content="Hm, hm.")]
    rows = [dict(row, row_id=i) for i, row in enumerate(rows)]
    expected = IFDScorer(model, tokenizer)({name: [row[name] for row in rows] for name in rows[0]})
    data = Dataset.from_list(rows) if assistant_only else prepare(Dataset.from_list(rows), None)[0]
    trainer = sft_trainer(
        tmp_path, data, model=model, tokenizer=tokenizer, num_train_epochs=1, assistant_only_loss=assistant_only
    )
    callback = select(trainer, keep=2, max_ifd=INF)
    train(trainer)
    found = callback.history.rows(0).set_index("row_id")
    there = found.index.tolist()
    assert set(there) >= {0, 1, 2, 3, 4, 6, 7}  # TRL may drop the row without an answer
    assert found["ifd_status"].tolist() == [expected["ifd_status"][i] for i in there]
    assert found["ifd_status"][6] == "empty_prompt"
    assert expected["ifd_status"][5] == "empty_answer"
    for name in ("cas", "das", "ifd"):
        assert found[name].dropna().tolist() == pytest.approx(
            [expected[name][i] for i in there if expected["ifd_status"][i] == "ok"], rel=1e-5
        )
    assert callback.history.settings["direct_prefix"].startswith("<|im_start|>assistant\n<think>\n\n</think>")


@pytest.mark.parametrize("given", [None, "Said:"])
def test_a_header_that_a_user_chose_stays(tmp_path, given, monkeypatch):
    tokenizer = thinker(THINK)
    rows = prepare(Dataset.from_list([chat(f"Name number {i}.", f"It is {i}.") for i in range(6)]), None)[0]
    trainer = sft_trainer(tmp_path, rows, tokenizer=tokenizer, num_train_epochs=1)
    select(trainer, keep=2, max_ifd=INF, header=given)
    seen, pair = [], TokenRows.pair
    monkeypatch.setattr(TokenRows, "pair", lambda self, *row: seen.append(pair(self, *row)) or seen[-1])
    train(trainer)
    before = {tokenizer.decode(pair.direct.ids[: pair.direct.start]) for pair in seen}
    assert before == {given or "<|im_start|>assistant\n<think>\n\n</think>\n\n"}


# ---- rows that cannot be trained on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (conversation(("narrator", "x"), ("gpt", "y")), "message 0 has the unknown role 'narrator'; known are system"),
        (conversation(("human", "x")), "the chat has no assistant turn"),
        (conversation(("gpt", "y")), "the chat begins with its answer"),
    ],
)
def test_rows_that_cannot_be_rendered_are_left_out_and_named(bad, reason, caplog):
    good = [conversation(("human", f"Name {i}."), ("gpt", f"It is {i}.")) for i in range(3)]
    with caplog.at_level(logging.WARNING):
        rows = prepared([*good[:2], bad, good[2], bad])
    assert rows["row_id"][:] == [0, 1, 3]
    assert rows["completion"][:] == [[{"role": "assistant", "content": f"It is {i}."}] for i in range(3)]
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 of 5 rows cannot be trained on as 'sharegpt': left out of the pool; the first one, ")
    assert f"the first one, row 2: {reason}" in said


def test_null_content_is_left_out_and_parts_are_joined():
    parts = [{"type": "text", "text": "It is "}, {"type": "text", "text": "red."}]
    rows = prepared([chat("a", "b"), chat(None, "c"), chat("d", None)])
    assert rows["row_id"][:] == [0]
    rows = prepared([{"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": parts}]}])
    assert rows["prompt"][:] == [[{"role": "user", "content": "It is red."}]]


def test_a_row_that_the_template_refuses_is_left_out(caplog):
    alternating = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m.role == 'assistant') | int %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    twice = {"messages": [*chat("a", "b")["messages"][:1], *chat("a", "b")["messages"]]}
    with caplog.at_level(logging.WARNING):
        rows = prepared([twice, chat("a", "b")], tokenizer=lambda: thinker(alternating))
    assert rows["row_id"][:] == [1]
    assert "1 of 2 rows cannot be trained on" in caplog.text
    assert "row 0: the chat template cannot render the row: roles must alternate" in caplog.text


def test_none_left_is_an_error():
    with pytest.raises(
        UserError, match=r"None of 2 rows can be trained on as 'messages'; the first one, row 0: message"
    ):
        prepared([chat(None, "a"), chat("b", None)])


def test_tools_and_variables_reach_trl_in_its_forms():
    tools = '[{"type": "function", "function": {"name": "get"}}]'
    rows = [chat("a", "b") | {"tools": "", "chat_template_kwargs": ""}, chat("a", "b") | {"tools": tools}]
    rows = prepared([*rows, chat("c", "d") | {"chat_template_kwargs": '{"enable_thinking": false}'}])
    assert rows["chat_template_kwargs"][:] == [{}, {}, {"enable_thinking": False}]  # no nulls: each row has its own
    assert rows["tools"][:] == ["null", tools, "null"]
    assert set(prepared([chat("a", "b") | {"tools": ""}]).column_names) == {"row_id", "prompt", "completion"}


def test_a_field_that_only_later_rows_have_does_not_end_the_run():
    rows = [chat(f"a {i}", "b") for i in range(1001)]
    rows[1000]["messages"][1]["reasoning_content"] = "Hm."
    rows = prepared(rows)
    assert rows[0]["completion"] == [{"role": "assistant", "content": "b"}]
    assert rows[1000]["completion"] == [{"role": "assistant", "content": "b", "reasoning_content": "Hm."}]


def test_columns_that_trl_would_take_for_its_own_are_set_aside(caplog):
    row = {"instruction": "a", "output": "b", "labels": "good", "input_ids": [1], "attention_mask": 1, "messages": "x"}
    with caplog.at_level(logging.WARNING):
        rows = prepare(Dataset.from_list([row | {"text": "t", "kind": "k"}]), "wizardlm")[0]
    assert sorted(rows.column_names) == ["completion", "kind", "prompt", "row_id"]
    assert [record.getMessage() for record in caplog.records] == [
        "Columns that TRL would take for its own are set aside: attention_mask, input_ids, labels, messages."
    ]


@pytest.mark.parametrize(
    ("columns", "name", "expected"),
    [
        ({"row_id": [None, None]}, "row_id", [0, 1]),
        ({"row_id": ["a", "a"]}, "row_id", [0, 1]),
        ({"row_id": [5, 4]}, "row_id", [5, 4]),
        ({"id": ["a", "b"]}, "id", ["a", "b"]),
        ({"id": [{"a": 1}, {"a": 2}]}, "row_id", [0, 1]),
    ],
)
def test_rows_have_one_column_that_tells_them_apart(columns, name, expected):
    rows = prepare(Dataset.from_dict({"instruction": ["a", "b"], "output": ["c", "d"], **columns}), None)[0]
    assert rows[name][:] == expected
    assert ("row_id" in rows.column_names) == (name == "row_id")


@pytest.mark.parametrize(
    "completions",
    [
        [[], [{"role": "assistant", "content": "I'm sorry, but I can't."}], [{"role": "assistant", "content": None}]],
        ["", "I'm sorry, but I can't.", None],
    ],
)
def test_refusals_are_told_whatever_else_there_is(completions):
    rows = Dataset.from_dict({"completion": completions, "row_id": [0, 1, 2]})
    assert without_refusals(rows)["row_id"][:] == [0, 2]


def test_of_several_messages_the_answer_is_what_is_trained_on_all_of_them():
    sorry, red = ({"role": "assistant", "content": text} for text in ("I'm sorry, but I can't.", "Red."))
    rows = Dataset.from_dict({"completion": [[sorry, red], [red, sorry]], "row_id": [0, 1]})
    assert without_refusals(rows)["row_id"][:] == [1]  # it begins with an answer
