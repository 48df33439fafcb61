"""Rows with several answers in training: which are scored, what the score of a row is, and what guards judge."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROUNDING, build_model, build_tokenizer, reference_nll
from datasets import Dataset
from tiny_runs import INF, RECIPES, Stop, difference, raw_rows, select, sft_trainer, train, weights_of

from ifd_trainer import CalibratedLimit, Guard, IFDScorer, LongestAnswers, RandomRows
from ifd_trainer.errors import UserError
from ifd_trainer.method.unfinished import Unfinished
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.recipe.rows import prepare, with_answer_masks, without_refusals
from ifd_trainer.recipe.run import build_run
from ifd_trainer.training.history import History
from ifd_trainer.training.options import Scoring

# A turn and its end of turn are inside the mark, the line break after it is not.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENIZER = build_tokenizer()
TOKENIZER.chat_template = MARKED
RAW = raw_rows(36)
HEADER = "<|im_start|>assistant\n"


def chats(rows: int = 18) -> Dataset:
    """Conversations of one, two and three answers; in each fourth row of several the last but one is empty."""
    made, texts = [], iter(RAW)
    for i in range(rows):
        messages = []
        for _ in range(i % 3 + 1):
            raw = next(texts)
            messages += [
                {"role": "user", "content": raw["instruction"]},
                {"role": "assistant", "content": raw["output"]},
            ]
        if i % 4 == 1 and len(messages) > 2:
            messages[-3]["content"] = ""
        made.append({"row_id": 100 + i, "messages": messages})
    return Dataset.from_list(made)


CHATS = chats()
COUNTS = np.array([len(messages) // 2 for messages in CHATS["messages"]])


def chat_trainer(folder, rows=CHATS, masked=True, **config):
    model = build_model(len(TOKENIZER))
    settings = {"num_train_epochs": 1, "assistant_only_loss": masked, **config}
    return sft_trainer(folder, rows, model=model, tokenizer=TOKENIZER, **settings)


def history_rows(callback, epoch=0):
    return callback.history.rows(epoch).set_index("row_id").sort_index()


def transformed(turns, **options):
    """What the transform says of the same rows."""
    scorer = IFDScorer(build_model(len(TOKENIZER)), TOKENIZER, turns=turns, **options)
    return CHATS.map(scorer, batched=True).to_pandas().set_index("row_id")


def by_hand(messages, without=()):
    """(cas, das, tokens) of each answer that is not empty, by a loop over tokens of its own.

    `without`: texts that another model's tokenizer would not know, and does not read.
    """
    model, found = build_model(len(TOKENIZER)), []
    for place, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"]:
            before = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[:place]) + HEADER
            texts = [before, HEADER]
            for text in without:
                texts = [each.replace(text, "") for each in texts]
            ids = [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]
            answer = TOKENIZER(message["content"], add_special_tokens=False)["input_ids"]
            found.append((*(reference_nll(model, each + answer, len(each)) for each in ids), len(answer)))
    return np.array(found)


def test_a_row_is_scored_by_all_answers_that_are_trained_on(tmp_path):
    trainer = chat_trainer(tmp_path)
    callback = select(trainer, keep=6, max_ifd=INF)
    kept = train(trainer).order()
    found = history_rows(callback)
    for row, messages in zip(CHATS["row_id"], CHATS["messages"], strict=True):
        losses = by_hand(messages)
        cas, das = np.average(losses[:, :2], axis=0, weights=losses[:, 2])
        told = found.loc[row, ["cas", "das", "ifd", "answer_tokens"]].astype(float).tolist()
        assert told == pytest.approx([cas, das, cas / das, losses[:, 2].sum()], rel=ROUNDING)
        last = found.loc[row, ["last_cas", "last_das", "last_answer_tokens"]].astype(float).tolist()
        assert last == pytest.approx(losses[-1].tolist(), rel=ROUNDING)
    assert sorted(kept) == sorted(found["ifd"].nlargest(6).index)
    assert callback.history.settings["turns"] == "tokens"


@pytest.mark.parametrize("rule", ["tokens", "mean", "min", "max"])
def test_each_rule_is_that_of_the_transform(tmp_path, rule):
    further = ("ira", "rifd", "prompt_ppl")
    trainer = chat_trainer(tmp_path)
    callback = select(trainer, keep=6, max_ifd=INF, turns=rule, scores=further)
    train(trainer)
    found, expected = history_rows(callback), transformed(rule, scores=further)
    for name in ("cas", "das", "ifd", "ifd_ppl", "eot_loss", "answer_tokens", *further):
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=ROUNDING)


def test_the_last_answer_alone_is_scored_where_that_is_asked_for(tmp_path):
    trainer = chat_trainer(tmp_path)
    callback = select(trainer, keep=6, max_ifd=INF, turns="last")
    train(trainer)
    found, expected = history_rows(callback), transformed("last")
    assert found["ifd"].tolist() == pytest.approx(expected["ifd"].tolist(), rel=ROUNDING)
    assert "last_cas" not in found
    assert callback.history.settings["turns"] is None


@pytest.mark.parametrize("how", ["whole", "packed"])
def test_the_scores_are_the_same_however_rows_are_read(tmp_path, how):
    """By marks of the template; found in rows that are trained on whole; in packed rows."""
    expected = transformed("tokens")
    config = {"packing": True, "max_length": 512} if how == "packed" else {}
    trainer = chat_trainer(tmp_path, masked=how != "whole", **config)
    callback = select(trainer, keep=1 if how == "packed" else 6, max_ifd=INF)
    trainer.train()
    found = callback.history.rows(0)
    if how == "packed":  # known by their places; packing may order them anew
        assert sorted(found["ifd"]) == pytest.approx(sorted(expected["ifd"]), rel=ROUNDING)
        return
    found = found.set_index("row_id").loc[expected.index]
    for name in ("cas", "das", "ifd"):
        assert found[name].tolist() == pytest.approx(expected[name].tolist(), rel=ROUNDING)


def test_another_model_reads_every_answer(tmp_path):
    build_model(len(TOKENIZER)).save_pretrained(tmp_path / "other")
    TOKENIZER.save_pretrained(tmp_path / "other")
    trainer = chat_trainer(tmp_path / "run")
    callback = select(trainer, keep=6, max_ifd=INF, scorer=str(tmp_path / "other"), turns="mean")
    train(trainer)
    found = history_rows(callback)
    for row, messages in zip(CHATS["row_id"], CHATS["messages"], strict=True):
        losses = by_hand(messages, without=TOKENIZER.all_special_tokens)
        assert found.loc[row, ["cas", "das"]].tolist() == pytest.approx(losses[:, :2].mean(axis=0), rel=ROUNDING)
        assert found.loc[row, "ifd"] == pytest.approx((losses[:, 0] / losses[:, 1]).mean(), rel=ROUNDING)


def test_rows_of_one_answer_are_scored_as_ever(tmp_path):
    rows = CHATS.filter(lambda row: len(row["messages"]) == 2)
    trainer = chat_trainer(tmp_path, rows)
    callback = select(trainer, keep=2, max_ifd=INF)
    train(trainer)
    assert "last_cas" not in history_rows(callback)
    assert callback.history.settings["turns"] is None


def test_guards_judge_the_last_answer(tmp_path):
    """The limits and verdicts of a run that scores all answers are those of one that scores the last alone."""
    judged = []
    guard = Guard(CalibratedLimit(0.3), unfinished=Unfinished(0.3), duplicates=None, freeze=None, on_misaligned="warn")
    for rule in ("tokens", "last"):
        trainer = chat_trainer(tmp_path / rule)
        callback = select(trainer, keep=4, turns=rule, guard=guard, on_shortfall="relax")
        train(trainer)
        judged.append((callback.chooser.last, callback.chooser.guards.verdicts))
    (of_all, verdicts), (of_last, expected) = judged
    assert of_all.limit == pytest.approx(of_last.limit, rel=ROUNDING)
    assert {reason: each.tolist() for reason, each in verdicts.items()} == {
        reason: each.tolist() for reason, each in expected.items()
    }
    assert (verdicts["above_limit"] == 1).sum() > 0
    assert not np.allclose(of_all.scores.ifd, of_last.scores.ifd)
    assert of_all.scores.of_last_answers.ifd == pytest.approx(of_last.scores.ifd, rel=ROUNDING)


def test_a_last_answer_without_a_score_fails_no_guard(tmp_path):
    """A row whose last answer is empty has a score by its others, and nothing that a guard could hold against it."""
    messages = [[dict(m) for m in row] for row in CHATS["messages"]]
    emptied = [i for i in range(len(messages)) if i % 6 == 2]
    for i in emptied:
        messages[i][-1]["content"] = ""
        messages[i][-3]["content"] = messages[i][-3]["content"] or "Blue."
    rows = Dataset.from_dict({"row_id": CHATS["row_id"], "messages": messages})
    trainer = chat_trainer(tmp_path, rows)
    guard = Guard(CalibratedLimit(0.3), unfinished=None, duplicates=None, freeze=None, on_misaligned="warn")
    callback = select(trainer, keep=4, guard=guard, on_shortfall="relax")
    train(trainer)
    found = history_rows(callback)
    rows = found.iloc[emptied]
    assert (rows["ifd_status"] == "ok").all()
    assert rows["last_cas"].isna().all()
    assert rows["eot_loss"].isna().all()
    assert (callback.chooser.guards.verdicts["above_limit"][emptied] == 1).all()


def test_a_resume_goes_on_as_it_would_have(tmp_path):
    config = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    whole = chat_trainer(tmp_path / "whole", **config)
    select(whole, keep=4, max_ifd=INF, every=2)
    expected = train(whole)
    cut = chat_trainer(tmp_path / "cut", **config)
    cut.add_callback(Stop(4))
    select(cut, keep=4, max_ifd=INF, every=2)
    train(cut)
    going_on = chat_trainer(tmp_path / "cut", **config)
    select(going_on, keep=4, max_ifd=INF, every=2)
    rest = train(going_on, resume_from_checkpoint=True)
    assert rest.order() == expected.order()[-len(rest.order()) :]
    assert difference(weights_of(going_on.model), weights_of(whole.model)) == 0
    histories = [History.load(folder).rows(1) for folder in (tmp_path / "whole", tmp_path / "cut")]
    assert histories[0].equals(histories[1])
    otherwise = chat_trainer(tmp_path / "cut", **config)
    select(otherwise, keep=4, max_ifd=INF, every=2, turns="mean")
    with pytest.raises(UserError, match="turns: 'tokens' in the checkpoint, 'mean' now"):
        otherwise.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "12 of them have several answers, all of which are scored (turns='tokens')"),
        ({"turns": "last"}, "12 of them have several answers, the last one alone is scored"),
        ({"policy": RandomRows()}, None),
    ],
)
def test_it_is_said_which_answers_are_scored(tmp_path, capsys, options, said):
    trainer = chat_trainer(tmp_path, max_steps=1)
    select(trainer, keep=4, **({"max_ifd": INF} if "policy" not in options else {}), **options)
    trainer.train()
    printed = " ".join(capsys.readouterr().out.split())
    assert (said in printed) if said else ("several answers" not in printed)


def test_the_longest_answers_are_those_of_the_whole_row(tmp_path):
    trainer = chat_trainer(tmp_path)
    select(trainer, keep=5, policy=LongestAnswers())
    kept = train(trainer).order()
    tokens = {
        row: sum(len(TOKENIZER(m["content"])["input_ids"]) for m in messages if m["role"] == "assistant")
        for row, messages in zip(CHATS["row_id"], CHATS["messages"], strict=True)
    }
    assert min(tokens[row] for row in kept) >= sorted(tokens.values())[-5]


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match="turns must be one of tokens, mean, min, max, last, got None"):
        Scoring(turns=None)


@RECIPES
def test_chats_of_a_recipe_stay_whole_where_every_answer_is_trained_on(tmp_path):
    rows, left_out = prepare(CHATS, None, lambda: TOKENIZER, every_answer=True)
    assert not left_out
    assert rows["messages"] == [[dict(m) for m in row] for row in CHATS["messages"]]
    trainer = chat_trainer(tmp_path, rows)
    runs = [
        (np.diff(np.array([-100, *row["labels"]]) != -100) & (np.array(row["labels"]) != -100)).sum()
        for row in trainer.train_dataset
    ]
    assert runs == COUNTS.tolist()
    refused = [*CHATS["messages"][0][:-1], {"role": "assistant", "content": "I'm sorry, but I cannot help with that."}]
    more = prepare(Dataset.from_list([{"messages": refused}, *CHATS.to_list()[:3]]), None, None, every_answer=True)[0]
    assert len(without_refusals(more)) == 3


@RECIPES
def test_answers_are_marked_where_the_template_does_not(tmp_path):
    """The labels of a template without marks are those that TRL gives of the same one with marks."""
    plain = build_tokenizer()
    plain.chat_template = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    build_model(len(plain)).save_pretrained(tmp_path / "model")
    found = {}
    for name, tokenizer in (("plain", plain), ("marked", TOKENIZER)):
        tokenizer.save_pretrained(tmp_path / "model")
        CHATS.to_json(tmp_path / "chats.jsonl")
        recipe = parse_recipe(None, [*options_of(tmp_path), "--assistant_only_loss", "true"])
        trainer = build_run(recipe).trainer
        found[name] = [(row["row_id"], row["input_ids"], row["labels"]) for row in trainer.train_dataset]
        losses = trainer.evaluate()
        assert np.isfinite(losses["eval_loss"])
    assert found["plain"] == found["marked"]


@RECIPES
def test_a_template_that_hides_its_answers_is_named(tmp_path):
    hiding = build_tokenizer()
    hiding.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | length }} {% endfor %}"
    rows, _ = prepare(CHATS, None, every_answer=True)
    with pytest.raises(UserError, match="does not tell where answers begin and end"):
        with_answer_masks(rows, hiding)


def options_of(folder):
    return [
        *("--model_name_or_path", str(folder / "model"), "--dataset_name", str(folder / "chats.jsonl")),
        *("--eval_dataset", str(folder / "chats.jsonl"), "--eval_strategy", "epoch"),
        *("--output_dir", str(folder / "run"), "--max_length", "512", "--report_to", "none"),
    ]


def test_candidates_are_rows_of_one_answer(tmp_path):
    options = {"keep": 6, "max_ifd": INF, "rescore": "candidates", "rescore_budget": 0.5}
    trainer = chat_trainer(tmp_path / "all", num_train_epochs=2)
    select(trainer, **options)
    with pytest.raises(UserError, match=r"rows of the training set have several: set turns='last', or rescore='all'"):
        trainer.train()
    trainer = chat_trainer(tmp_path / "last", num_train_epochs=2)
    callback = select(trainer, turns="last", **options)
    trainer.train()
    assert 0 < callback.history.record(1)["fresh"] < 1
