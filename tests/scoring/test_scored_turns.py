"""Conversations in the transform and the command: every answer against a loop of its own, and read once for all."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from conftest import ROUNDING, build_model, reference_nll
from datasets import Dataset
from tiny_runs import FIVE  # noqa: F401  (threads are set there)

from ifd_trainer import IFDScorer
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.data.formats import MESSAGES
from ifd_trainer.errors import UserError

TURN_LISTS = ["turn_cas", "turn_das", "turn_ifd", "turn_tokens", "turn_status"]


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


CHATS = [
    [user("Name a colour."), said("Red."), user("Another?"), said("Blue or green."), user("Sum?"), said("It is 42.")],
    [user("Name one."), said("The cat."), user("Why?"), said("")],
    [user("Nobody answers.")],
    [{"role": "system", "content": "Be brief."}, user("Add 12 and 30."), said("42")],
    [{"role": "narrator", "content": "It rains."}],
]
ROWS = Dataset.from_dict({"messages": CHATS})


def scorer(model, tokenizer, turns="tokens", **options):
    return IFDScorer(model, tokenizer, turns=turns, **options)


def by_hand(model, tokenizer, messages):
    """(cas, das, tokens) of each answer, from a text and a loop of its own for each; a template of plain markup."""
    found = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"]:
            continue
        before = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:place])
        header = "<|im_start|>assistant\n"
        ids = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before + header, header)}
        answer = tokenizer(message["content"], add_special_tokens=False)["input_ids"]
        losses = [reference_nll(model, before + answer, len(before)) for before in ids.values()]
        found.append((*losses, len(answer)))
    return found


def test_every_answer_is_scored_as_in_a_loop_of_its_own(model, tokenizer):
    rows = ROWS.map(scorer(model, tokenizer), batched=True, batch_size=3)
    assert set(rows.column_names) >= set(TURN_LISTS)
    for row, messages in zip(rows.to_list()[:4], CHATS, strict=False):
        expected = by_hand(model, tokenizer, messages)
        ok = [i for i, status in enumerate(row["turn_status"]) if status == "ok"]
        for name, values in zip(TURN_LISTS, zip(*expected, strict=True), strict=False):
            column = {"turn_ifd": "turn_tokens"}.get(name, name)
            np.testing.assert_allclose([row[column][i] for i in ok], values, rtol=ROUNDING)
        if expected:
            cas, das, tokens = map(np.array, zip(*expected, strict=True))
            np.testing.assert_allclose(row["cas"], (cas * tokens).sum() / tokens.sum(), rtol=ROUNDING)
            np.testing.assert_allclose(row["ifd"], (cas * tokens).sum() / (das * tokens).sum(), rtol=2 * ROUNDING)
            np.testing.assert_allclose([row["turn_ifd"][i] for i in ok], cas / das, rtol=2 * ROUNDING)
            assert row["answer_tokens"] == tokens.sum()
    assert rows["ifd_status"] == ["ok", "ok", "empty_answer", "ok", "malformed"]
    assert rows["turn_status"] == [["ok"] * 3, ["ok", "empty_answer"], [], ["ok"], []]
    assert rows["turn_cas"][1][1] is None


@pytest.mark.parametrize("engine", ["stream", "padded"])
def test_a_conversation_is_read_once(model, tokenizer, monkeypatch, engine):
    monkeypatch.setattr("ifd_trainer.scoring.engine.streams", lambda *_: engine == "stream")
    each = scorer(model, tokenizer)
    each(ROWS[:1])  # what is found out about a model once is found out here
    counts = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: counts.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    columns = each(ROWS[:1])
    hook.remove()
    text = tokenizer.apply_chat_template(CHATS[0], tokenize=False)
    header = len(tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"])
    whole = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    tokens = columns["turn_tokens"][0]
    if engine == "padded":
        assert sum(counts) == (1 + 3) * (whole - 1)  # rows as long as the longest, without the line break at its end
    else:
        assert sum(counts) <= whole + sum(tokens) + 3 * header
        assert sum(counts) >= whole - 1 + sum(tokens)


@pytest.mark.parametrize("rule", ["mean", "min", "max", "last"])
def test_other_rules_choose_among_the_same_answers(model, tokenizer, rule):
    rows, tokens = (ROWS.map(scorer(model, tokenizer, each), batched=True) for each in (rule, "tokens"))
    assert rows["turn_ifd"] == tokens["turn_ifd"]
    of_turns = rows["turn_ifd"][0]
    expected = {"mean": np.mean, "min": min, "max": max, "last": lambda values: values[-1]}[rule](of_turns)
    assert rows["ifd"][0] == pytest.approx(expected)
    assert rows["ifd_status"][1] == ("empty_answer" if rule == "last" else "ok")


def test_the_last_answer_alone_has_the_scores_that_it_has_without_turns(model, tokenizer):
    last = ROWS.map(scorer(model, tokenizer, "last"), batched=True)
    alone = ROWS.map(scorer(model, tokenizer, None), batched=True)
    assert not set(alone.column_names) & set(TURN_LISTS)
    for name in ("cas", "das", "ifd", "eot_loss"):
        for one, other in zip(last[name], alone[name], strict=True):
            assert one == other or one == pytest.approx(other, rel=ROUNDING)
    assert last["ifd_status"] == alone["ifd_status"]
    assert last["answer_tokens"] == alone["answer_tokens"]


def test_answers_that_are_not_scored_are_counted_once(model, tokenizer, caplog):
    each = scorer(model, tokenizer, None)
    each(ROWS[:])
    each(ROWS[:])
    said = [record.getMessage() for record in caplog.records]
    assert [text for text in said if text.startswith("2 rows of the first 5 rows have several answers")] == said[:1]
    assert len(said) == 1
    caplog.clear()
    scorer(model, tokenizer, "last")(ROWS[:])
    scorer(model, tokenizer, None)(ROWS[3:4])
    assert not caplog.records


def test_rows_of_texts_have_one_answer(model, tokenizer):
    rows = Dataset.from_list([{"instruction": "Name one.", "input": "", "output": "Red."}])
    found, alone = (rows.map(scorer(model, tokenizer, each), batched=True)[0] for each in ("mean", None))
    assert found["turn_ifd"] == [found["ifd"]]
    assert {name: found[name] for name in alone} == alone


def test_an_older_scoring_of_turns_does_not_stay(model, tokenizer):
    rows = ROWS.map(scorer(model, tokenizer), batched=True).map(scorer(model, tokenizer, None), batched=True)
    assert all(rows[name] == [None] * len(rows) for name in TURN_LISTS)
    table = ROWS.map(scorer(model, tokenizer), batched=True).with_format("arrow")[:]
    assert not set(scorer(model, tokenizer, None)(table).column_names) & set(TURN_LISTS)


def test_arrow_tables_have_the_same_lists(model, tokenizer):
    each = scorer(model, tokenizer)
    table = each(ROWS.with_format("arrow")[:])
    assert table["turn_status"].to_pylist() == [list(row) for row in each(ROWS[:])["turn_status"]]
    empty = each(ROWS.with_format("arrow")[:].slice(0, 0))
    assert empty.schema.field("turn_cas").type == pa.list_(pa.float64())


def test_turns_go_with_the_papers_definition_alone(model, tokenizer):
    with pytest.raises(UserError, match=r"turns='tokens' scores every answer .* definition='superfiltering'"):
        scorer(model, tokenizer, definition="superfiltering")
    with pytest.raises(UserError, match="turns must be one of"):
        scorer(model, tokenizer, "all")


def test_what_is_measured_of_one_answer_is_refused_for_several(model, tokenizer, tmp_path, capsys):
    rows = ROWS.map(scorer(model, tokenizer), batched=True)
    with pytest.raises(UserError, match=r"calibrate measures what a single .* with turns='tokens' a row's score is of"):
        scorer(model, tokenizer).calibrate(rows)
    with pytest.raises(UserError, match="pairing_p_values measures what a single"):
        scorer(model, tokenizer).pairing_p_values(rows)
    model.save_pretrained(tmp_path / "model")
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": CHATS[0]}), encoding="utf-8")
    command = ["score", str(data), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, "--turns", "min", "--calibrate"]) == 2
    assert "--calibrate measures" in capsys.readouterr().err


def test_further_scores_follow_from_the_losses_of_the_row(model, tokenizer):
    rows = ROWS.map(scorer(model, tokenizer, scores=("ira", "answer_ppl")), batched=True)
    for row in rows.to_list():
        assert (row["ira"] is None) == (row["cas"] is None)
        if row["cas"] is not None:
            assert row["ira"] == pytest.approx(row["das"] - row["cas"])
            assert row["answer_ppl"] == pytest.approx(math.exp(row["cas"]))
        for i, status in enumerate(row["turn_status"]):
            assert (row["turn_ira"][i] is None) == (status != "ok")
            if status == "ok":
                assert row["turn_ira"][i] == pytest.approx(row["turn_das"][i] - row["turn_cas"][i])


def test_what_is_asked_of_each_answer_is_what_was_said_since_the_one_before(model, tokenizer):
    tool = {"role": "tool", "content": "It is red."}
    chats = [
        [
            user("Name one."),
            user("A colour."),
            said("Red."),
            user("Why?"),
            said("Look it up."),
            tool,
            said("So it is."),
        ],
        [user("Sum?"), said("It is 42.")],
    ]
    rows = Dataset.from_dict({"messages": chats})
    ask = "Reply: {answer} Which question was it?"
    found = rows.map(scorer(model, tokenizer, scores=("rifd", "prompt_ppl"), guess=ask), batched=True).to_list()
    header = tokenizer("<|im_start|>assistant\n")["input_ids"]

    def reversed_losses(question, answer):
        asked = f"<|im_start|>user\n{ask.format(answer=answer)}<|im_end|>\n<|im_start|>assistant\n"
        asked, question = tokenizer(asked)["input_ids"], tokenizer(question)["input_ids"]
        losses = [reference_nll(model, before + question, len(before)) for before in (asked, header)]
        return *losses, len(question)

    def prompt_losses(messages):
        """(loss, tokens) of what stands before each answer, behind the one before and its end of turn."""
        found, text, begin = [], "", 1
        for message in messages:
            text += f"<|im_start|>{message['role']}\n"
            if message["role"] == "assistant":
                prompt = tokenizer(text)["input_ids"]
                found.append((reference_nll(model, prompt, begin), len(prompt) - begin))
                begin = len(tokenizer(f"{text}{message['content']}<|im_end|>")["input_ids"])
            text += f"{message['content']}<|im_end|>\n"
        return found

    expected = [
        [reversed_losses("Name one.\nA colour.", "Red."), reversed_losses("Why?", "Look it up."), None],
        [reversed_losses("Sum?", "It is 42.")],
    ]
    for row, messages, of_turns in zip(found, chats, expected, strict=True):
        for i, losses in enumerate(of_turns):
            if losses is None:
                assert (row["turn_rifd"][i], row["turn_rcas"][i], row["turn_rdas"][i]) == (None, None, None)
                continue
            assert (row["turn_rcas"][i], row["turn_rdas"][i]) == pytest.approx(losses[:2], rel=ROUNDING)
            assert row["turn_rifd"][i] == pytest.approx(losses[0] / losses[1], rel=2 * ROUNDING)
        rcas, rdas, tokens = map(np.array, zip(*filter(None, of_turns), strict=True))
        assert row["rcas"] == pytest.approx((rcas * tokens).sum() / tokens.sum(), rel=ROUNDING)
        assert row["rifd"] == pytest.approx((rcas * tokens).sum() / (rdas * tokens).sum(), rel=2 * ROUNDING)
        losses, tokens = map(np.array, zip(*prompt_losses(messages), strict=True))
        np.testing.assert_allclose(row["turn_prompt_ppl"], np.exp(losses), rtol=10 * ROUNDING)
        assert row["prompt_ppl"] == pytest.approx(np.exp((losses * tokens).sum() / tokens.sum()), rel=10 * ROUNDING)


def test_further_scores_of_turns_do_not_outlive_a_scoring_without_them(model, tokenizer):
    rows = ROWS.map(scorer(model, tokenizer, scores="rifd"), batched=True)
    assert rows.data.schema.field("turn_rifd").type == pa.list_(pa.float64())
    again = rows.map(scorer(model, tokenizer), batched=True)
    assert again["turn_rifd"] == [None] * len(rows)
    assert again.data.schema.field("turn_rifd").type == pa.list_(pa.float64())
    found = scorer(model, tokenizer, scores="ira")(rows.with_format("arrow")[:])
    assert {name for name in found.column_names if name.startswith("turn_")} == {*TURN_LISTS, "turn_ira"}


def test_scorers_of_other_turns_are_told_apart(model, tokenizer):
    from datasets.fingerprint import Hasher

    hashes = {Hasher.hash(scorer(model, tokenizer, turns)) for turns in (None, "tokens", "mean")}
    assert len(hashes) == 3


def test_turns_of_public_rows_with_tools(shared, tokenizer):
    model = build_model(len(tokenizer), max_position_embeddings=8192)
    path = shared / "data" / "toolcall_chat_200.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:12]
    rows = Dataset.from_list([{"conversations": json.loads(line)["conversations"]} for line in lines])
    found = rows.map(scorer(model, tokenizer), batched=True)
    for row in found.to_list():
        chat = [*MESSAGES.parts({"messages": row["conversations"]})]
        assert len(row["turn_ifd"]) == sum(turn["from"] in ("gpt", "function_call") for turn in row["conversations"])
        expected = by_hand(model, tokenizer, chat[0] + chat[1])
        assert set(row["turn_status"]) == {"ok"}
        for i in range(len(expected)):
            assert row["turn_cas"][i] == pytest.approx(expected[i][0], rel=ROUNDING)
            assert row["turn_das"][i] == pytest.approx(expected[i][1], rel=ROUNDING)
            assert row["turn_tokens"][i] == expected[i][2]


def test_the_command_writes_them_and_goes_on_where_it_was(tmp_path, model, tokenizer, capsys):
    folder, data, output = tmp_path / "model", tmp_path / "chats.jsonl", tmp_path / "scored.parquet"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    data.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS[:4]), encoding="utf-8")
    command = ["score", str(data), "--model", str(folder), "--output", str(output), "--device", "cpu"]
    assert main([*command, "--turns", "mean"]) == 0
    rows, expected = load_rows(str(output)), ROWS.select(range(4)).map(scorer(model, tokenizer, "mean"), batched=True)
    for one, other in zip(rows["turn_ifd"], expected["turn_ifd"], strict=True):
        np.testing.assert_allclose(np.array(one, float), np.array(other, float), rtol=ROUNDING)
    assert rows["turn_status"][:] == expected["turn_status"][:]
    assert math.isclose(rows["ifd"][0], np.mean(rows["turn_ifd"][0]))
    assert "turns: mean" in (tmp_path / "scored.parquet.ifd.yaml").read_text(encoding="utf-8")
    kept = ["select", str(output), "--keep", "1", "--output", str(tmp_path / "kept.parquet")]
    assert main(kept) == 0
    assert "answers of a conversation: mean" in (tmp_path / "kept.md").read_text(encoding="utf-8")
    assert main([*kept[:-1], str(tmp_path / "other.parquet"), "--drop-mismatched"]) == 2
    assert "measures what a single wrong or cut answer scores" in capsys.readouterr().err
    assert main([*command[:5], str(tmp_path / "scored.csv"), "--turns", "mean"]) == 0
    as_text = [json.loads(text) for text in pd.read_csv(tmp_path / "scored.csv")["turn_status"]]
    assert as_text == expected["turn_status"][:]
