"""Scripts that train on every token: what is trained on stays as it is, what is scored is each row's answer."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, ROUNDING, reference_nll
from datasets import Dataset
from tiny_runs import (
    CHATS_READ,
    INF,
    MERGES_TRAINED,
    TOKENIZER,
    as_trained,
    build_model,
    chat_rows,
    plain_trainer,
    raw_rows,
    select,
    sft_trainer,
    since_trl,
    text_rows,
    tokenised,
    train,
    training_logs,
)
from transformers import DataCollatorForLanguageModeling, Trainer

from ifd_trainer import (
    CalibratedLimit,
    Cherry,
    FormatOptions,
    Guard,
    IFDScorer,
    IFDSelectionCallback,
    LongestAnswers,
    LowestScores,
    PairingTest,
    RandomRows,
)
from ifd_trainer.data.formats import WIZARDLM
from ifd_trainer.errors import UserError
from ifd_trainer.training.pool import Pool


def as_messages(raw: list[dict]) -> Dataset:
    return chat_rows(raw).map(
        lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )


def as_text(raw: list[dict]) -> Dataset:
    """Texts that hold what prompt and completion say."""
    return text_rows(raw).map(
        lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )


def formatted(row: dict) -> str:
    return WIZARDLM.render(row).prompt + row["output"]


def labels_trained_on(trainer) -> list[list[int]]:
    """The labels of each row that a step of the trainer gets, without padding."""
    seen, step = [], trainer.training_step

    def noted(model, inputs, *rest):
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            size = sum(label != -100 for label in labels)
            assert labels[:size] == ids[:size]  # every token
            seen.append(labels[:size])
        return step(model, inputs, *rest)

    trainer.training_step = noted
    return seen


RAW = raw_rows(24, quotes=True)
MASKED = {  # a script that masks prompts, and scripts with the same rows that do not
    "messages": (lambda: (chat_rows(RAW), {}), lambda: (as_messages(RAW), {})),
    "prompt and completion": (lambda: (text_rows(RAW), {}), lambda: (text_rows(RAW), {"completion_only_loss": False})),
    "chat, whole": (lambda: (chat_rows(RAW), {}), lambda: (chat_rows(RAW), {"completion_only_loss": False})),
    "text": (lambda: (text_rows(RAW), {}), lambda: (as_text(RAW), {})),
    "formatting_func": (lambda: (text_rows(RAW), {}), lambda: (Dataset.from_list(RAW), {"formatting_func": formatted})),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=CHATS_READ) if kind in ("messages", "chat, whole") else kind for kind in MASKED]
)
def test_rows_that_are_trained_on_whole_score_as_those_with_masked_prompts(tmp_path, kind):
    masked, whole = (make() for make in MASKED[kind])
    scores = []
    for rows, config in (masked, whole):
        trainer = sft_trainer(tmp_path, rows, **config)
        callback = select(trainer, keep=8, max_ifd=INF)
        trained_on = None if rows is masked[0] else labels_trained_on(trainer)
        seen = train(trainer)
        first = callback.history.rows(0).set_index("row_id")
        scores.append(first)
        assert sorted(seen.epochs()[0]) == sorted(first["ifd"].nlargest(8).index)
    assert trained_on
    for name in ("cas", "das", "ifd", "eot_loss"):
        assert scores[1][name].to_dict() == pytest.approx(scores[0][name].to_dict(), rel=ROUNDING), name
    assert scores[1]["answer_tokens"].to_dict() == scores[0]["answer_tokens"].to_dict()


def test_training_is_what_the_script_says_bit_for_bit(tmp_path):
    """All rows, in the order of the pool: with the callback and without it."""
    runs = []
    for selecting in (True, False):
        trainer = sft_trainer(tmp_path, as_messages(RAW), train_sampling_strategy="sequential", num_train_epochs=2)
        if selecting:
            select(trainer, keep=24, max_ifd=INF)
        trainer.train()
        runs.append([entry["loss"] for entry in training_logs(trainer)])
    assert runs[0] == runs[1]


def test_packed_rows_that_are_trained_on_whole_are_scored_by_example(tmp_path):
    options = {"packing": True, "max_length": 96, "padding_free": False, "num_train_epochs": 1}
    trainer = sft_trainer(tmp_path, as_messages(RAW), **options)
    callback = select(trainer, keep=2, max_ifd=INF)
    trainer.train()
    alone = sft_trainer(tmp_path / "alone", as_messages(RAW), num_train_epochs=1)
    other = select(alone, keep=2, max_ifd=INF)
    alone.train()
    packed, single = (sorted(each.history.rows(0)["ifd"]) for each in (callback, other))
    assert packed == pytest.approx(single, rel=ROUNDING)


def test_a_trainer_whose_collator_makes_the_labels_is_followed(tmp_path):
    rows = TOKENIZER([formatted(row) + TOKENIZER.eos_token for row in RAW])
    dataset = Dataset.from_dict({"input_ids": rows["input_ids"], "row_id": [row["row_id"] for row in RAW]})
    trainer = plain_trainer(tmp_path, dataset)
    trainer = Trainer(
        model=build_model(len(TOKENIZER)),
        args=trainer.args,
        train_dataset=dataset,
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        processing_class=TOKENIZER,
    )
    callback = select(trainer, keep=8, max_ifd=INF)
    train(trainer)
    masked = sft_trainer(tmp_path / "masked", text_rows(RAW))
    expected = select(masked, keep=8, max_ifd=INF)
    train(masked)
    found, wanted = (each.history.rows(0).set_index("row_id")["ifd"].to_dict() for each in (callback, expected))
    assert found == pytest.approx(wanted, rel=ROUNDING)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask", [True, False])
def test_padding_of_the_users_own_is_no_context(tmp_path, side, mask):
    trainer = sft_trainer(tmp_path, text_rows(RAW))
    rows = tokenised(trainer).to_list()
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[int], filler: int) -> list[int]:
        missing = [filler] * (longest - len(values))
        return missing + values if side == "left" else values + missing

    for row in rows:
        row["attention_mask"] = padded([1] * len(row["input_ids"]), 0)
        row["input_ids"], row["labels"] = padded(row["input_ids"], 0), padded(row["labels"], -100)
        if not mask:
            del row["attention_mask"]
    found = []
    for dataset in (tokenised(trainer), Dataset.from_list(rows)):
        plain = plain_trainer(tmp_path, dataset, num_train_epochs=1)
        callback = select(plain, keep=8, max_ifd=INF)
        plain.train()
        found.append(callback.history.rows(0).set_index("row_id"))
    for name in ("cas", "das", "ifd", "eot_loss", "answer_tokens"):
        assert found[1][name].to_dict() == pytest.approx(found[0][name].to_dict(), rel=ROUNDING), name


def test_rows_without_a_header_are_told_from_rows_that_were_cut_before_it(tmp_path):
    raw = [dict(row) for row in RAW]
    texts = [formatted(row) for row in raw]
    texts[3] = "Once upon a time."
    texts[5] = "Add the numbers. " * 40 + texts[5]
    rows = Dataset.from_list([{"text": text, "row_id": i} for i, text in enumerate(texts)])
    trainer = sft_trainer(tmp_path, rows, max_length=96)
    callback = select(trainer, keep=4, max_ifd=INF)
    trainer.train()
    found = callback.history.rows(0).set_index("row_id")["ifd_status"]
    assert found[3] == "no_header"
    assert found[5] == "prompt_too_long"
    assert (found.drop([3, 5]) == "ok").all()
    assert callback.history.epochs[0]["reasons"]["no_header"] == 1


def test_rows_that_were_cut_before_their_header_do_not_hide_it_from_the_others(tmp_path):
    """A third of them: what stands before a direct answer is the header of those that have one."""
    texts = [(f"Add {i} to it. " * 40 if i % 3 == 0 else "") + formatted(row) for i, row in enumerate(RAW)]
    rows = Dataset.from_list([{"text": text, "row_id": i} for i, text in enumerate(texts)])
    trainer = sft_trainer(tmp_path, rows, max_length=96, num_train_epochs=1)
    callback = select(trainer, keep=4, max_ifd=INF)
    trainer.train()
    assert callback.history.settings["direct_prefix"] == "### Response:"
    found, model = callback.history.rows(0).set_index("row_id"), build_model(len(TOKENIZER))
    assert (found["ifd_status"] == "prompt_too_long").sum() == 8
    header = TOKENIZER("### Response:", add_special_tokens=False)["input_ids"]
    for i in (1, 2, 4):  # none of their answers begins with a quote
        answer = TOKENIZER(RAW[i]["output"], add_special_tokens=False)["input_ids"]
        assert found["das"][i] == pytest.approx(reference_nll(model, header + answer, len(header)), rel=ROUNDING)


def test_a_header_of_the_users_own_tells_answers(tmp_path):
    rows = [{"text": f"{row['instruction']} => {row['output']}", "row_id": row["row_id"]} for row in RAW]
    trainer = sft_trainer(tmp_path, Dataset.from_list(rows))
    with pytest.raises(UserError, match="no known response header stands in 50 % of them"):
        select(trainer, keep=4)
    callback = select(trainer, keep=4, max_ifd=INF, header=" =>")
    model = build_model(len(TOKENIZER))
    trainer.train()
    first = callback.history.rows(0).set_index("row_id")
    for row in RAW[:5]:
        prompt, answer = (
            TOKENIZER(text, add_special_tokens=False)["input_ids"]
            for text in (f"{row['instruction']} =>", f" {row['output']}")
        )
        header = TOKENIZER(" =>", add_special_tokens=False)["input_ids"]
        cas, das = (
            reference_nll(model, prompt + answer, len(prompt)),
            reference_nll(model, header + answer, len(header)),
        )
        assert first["ifd"][row["row_id"]] == pytest.approx(cas / das, rel=ROUNDING)


# ---- what a script brings of its own ----------------------------------------------------------------------------


def test_a_loss_and_a_collator_of_ones_own_are_the_ones_that_train(tmp_path):
    """Twice the loss, and batches without their last token: selection and scores are as without them."""
    runs = []
    for own in (False, True):
        trainer = sft_trainer(tmp_path, 24, num_train_epochs=1)
        calls = []
        if own:
            compute, collate = trainer.compute_loss, trainer.data_collator
            trainer.data_collator = lambda rows, of=collate: {name: part[:, :-1] for name, part in of(rows).items()}

            def twice(model, inputs, *rest, of=compute, noted=calls, **more):
                noted.append(inputs["input_ids"].shape[1])
                return 2 * of(model, inputs, *rest, **more)

            trainer.compute_loss = twice
        callback = select(trainer, keep=8, max_ifd=INF)
        trainer.train()
        runs.append((callback.history.rows(0), [entry["loss"] for entry in training_logs(trainer)], calls))
    (plain, losses, none), (own, doubled, calls) = runs
    assert own["ifd"].tolist() == plain["ifd"].tolist()
    assert own["times"].tolist() == plain["times"].tolist()
    assert (len(none), len(calls)) == (0, 4)
    assert doubled[0] > 1.5 * losses[0]


# ---- plain text without answers ---------------------------------------------------------------------------------

STORIES = [{"text": f"{row['output']} {row['instruction']}", "row_id": row["row_id"]} for row in RAW]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": Cherry(score="ifd_ppl")},
        {"policy": LowestScores()},
        {"policy": LowestScores("cas")},
        {"policy": RandomRows(), "guard": Guard(unfinished=None)},
        {"policy": RandomRows(), "guard": Guard(limit=None, pairing=PairingTest())},
        {"max_ifd": CalibratedLimit()},
        {"policy": RandomRows(), "scorer": "gpt2"},
    ],
    ids=["default", "ifd_ppl", "lowest", "cas", "limit", "pairing", "calibrated", "another model"],
)
def test_text_without_answers_is_refused_when_the_callback_is_made(tmp_path, options):
    trainer = sft_trainer(tmp_path, Dataset.from_list(STORIES))
    with pytest.raises(UserError, match=r"nobody can tell which tokens are the answer\. Say what begins an answer"):
        IFDSelectionCallback(trainer, keep=4, **options)
    assert trainer.train().global_step == 36  # as without it


def whole_losses(trainer) -> dict[int, float]:
    """Mean loss of each text behind BOS, without its EOS."""
    model, bos, eos = build_model(len(TOKENIZER)), TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    losses = {}
    for row in trainer.train_dataset:
        ids = row["input_ids"]
        losses[row["row_id"]] = reference_nll(model, [bos, *(ids[:-1] if ids[-1] == eos else ids)], 1)
    return losses


@pytest.mark.parametrize("guard", ["auto", Guard(limit=None, on_misaligned="warn")], ids=["auto", "given"])
def test_the_loss_of_a_whole_text_chooses_rows(tmp_path, guard):
    trainer = sft_trainer(tmp_path, Dataset.from_list(STORIES))
    callback = select(trainer, keep=5, policy=LowestScores("das"), guard=guard)
    seen = train(trainer)
    losses, first = whole_losses(trainer), callback.history.rows(0).set_index("row_id")
    assert first["das"].to_dict() == pytest.approx(losses, rel=ROUNDING)
    assert first[["cas", "ifd", "ifd_ppl"]].isna().all(axis=None)
    assert sorted(seen.epochs()[0]) == sorted(sorted(losses, key=losses.get)[:5])


@pytest.mark.parametrize(
    "policy", [RandomRows(), LongestAnswers(), Cherry(INF, "reward")], ids=["random", "longest", "own"]
)
def test_policies_that_need_no_prompt_take_any_text(tmp_path, policy):
    rows = Dataset.from_list([row | {"reward": float(row["row_id"] % 7)} for row in STORIES])
    trainer = sft_trainer(tmp_path, rows)
    callback = select(trainer, keep=5, policy=policy, guard="auto")
    seen = train(trainer)
    kept = seen.epochs()[0]
    assert len(set(kept)) == 5
    sizes = {row["row_id"]: len(row["input_ids"]) for row in trainer.train_dataset}
    if isinstance(policy, LongestAnswers):
        assert min(sizes[row] for row in kept) >= sorted(sizes.values())[-5]
    if isinstance(policy, Cherry):
        assert sorted(kept) == sorted(sorted(sizes, key=lambda row: (-(row % 7), row))[:5])
    assert callback.history.settings["direct_prefix"] == ""


def test_a_run_on_whole_texts_is_resumed_exactly(tmp_path):
    whole, cut = (
        sft_trainer(tmp_path / name, Dataset.from_list(STORIES), save_strategy="steps", save_steps=4)
        for name in ("whole", "cut")
    )
    for trainer in (whole, cut):
        select(trainer, keep=5, policy=LowestScores("das"))
    whole.train()
    cut.train()
    again = sft_trainer(tmp_path / "cut", Dataset.from_list(STORIES), save_strategy="steps", save_steps=4)
    select(again, keep=5, policy=LowestScores("das"))
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


# ---- what a process's hashes have no part in --------------------------------------------------------------------


def read_of_a_pool(folder):
    trainer = sft_trainer(folder, text_rows(raw_rows(40)))
    prompts, digest = Pool(trainer.train_dataset).read()
    return f"{prompts.lengths.tolist()} {prompts.tails[:, -3:].tolist()} {digest}"


def test_what_is_read_of_a_pool_does_not_depend_on_hashes(tmp_path):
    """This process has hashes of its own."""
    paths = [str(ROOT / "tests" / "training"), str(ROOT / "tests"), *sys.path]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SCRIPT, str(tmp_path / "other")],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.splitlines()[-1] == read_of_a_pool(tmp_path / "here")


_SCRIPT = "import sys; from test_scripts_as_they_are import read_of_a_pool; print(read_of_a_pool(sys.argv[1]))"


BARE = "{% for message in messages %}{{ message['content'] | trim }}\n{% endfor %}"


def test_answers_of_chats_that_a_template_runs_together_are_what_the_messages_say(tmp_path, capsys):
    """Nothing stands between turns: the data set's own messages tell."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = BARE
    raw = raw_rows(12)
    long = "Add the numbers. " * 12
    raw[3]["output"] += f" {long}"  # cut inside its answer
    raw[5]["instruction"] = long * 2  # cut before it
    raw[7]["output"] = ""
    raw[9]["instruction"] = f"{raw[9]['output']} {raw[9]['instruction']}"  # the prompt says it, too
    trainer = sft_trainer(tmp_path, as_messages(raw), tokenizer=tokenizer, max_length=48, num_train_epochs=1)
    expected = {}
    for row, prepared in zip(raw, trainer.train_dataset, strict=True):
        ids = as_trained(trainer, prepared)["input_ids"]  # some releases of TRL cut rows in their collator
        prompt = tokenizer(f"{row['instruction']}\n").input_ids
        answer = tokenizer(row["output"]).input_ids[: len(ids) - len(prompt)] if len(ids) > len(prompt) else []
        assert ids[: len(prompt) + len(answer)] == (prompt + answer)[: len(ids)]
        if answer:
            loss = reference_nll(trainer.model, prompt + answer, len(prompt))
            expected[row["row_id"]] = (pytest.approx(loss, rel=ROUNDING), len(answer))
    assert len(expected) == 10
    callback = select(trainer, keep=2, max_ifd=INF)
    trainer.train()
    assert "a row's answer is what its last message says" in capsys.readouterr().out
    found = callback.history.rows(0).set_index("row_id")
    scored = found[found["ifd_status"] == "ok"]
    assert dict(zip(scored.index, zip(scored["cas"], scored["answer_tokens"], strict=True), strict=True)) == expected


# ---- prompts that are texts ---------------------------------------------------------------------------------------


@MERGES_TRAINED
@pytest.mark.parametrize(
    ("ending", "header"),
    [
        ("### Response:", None),
        ("### Response:\n", None),
        ("### Response: ", None),
        ("Answer:", None),
        ("A: ", None),
        ("### Assistant:\n\n", None),
        ("[/INST]", None),
        ("Reply:", "Reply:"),  # not known: it is named
    ],
)
def test_callback_and_transform_put_the_same_header_before_direct_answers(tmp_path, ending, header):
    rows = [
        {"row_id": i, "prompt": f"{row['instruction']}\n\n{ending}", "completion": row["output"]}
        for i, row in enumerate(raw_rows(12, quotes=True))
    ]
    data = Dataset.from_list(rows)
    trainer = sft_trainer(tmp_path, data, num_train_epochs=1)
    scored = data.map(IFDScorer(trainer.model, TOKENIZER, format=FormatOptions(response_header=header)), batched=True)
    callback = select(trainer, keep=2, max_ifd=INF, header=header)
    trainer.train()
    found = callback.history.rows(0)
    for name in ("cas", "das", "ifd"):
        assert found[name].tolist() == pytest.approx(scored[name][:], rel=ROUNDING)


# ---- what the pool is ---------------------------------------------------------------------------------------------


def pool_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("pool: ")]


LONG = [{**row, "instruction": "Add the numbers. " * 30} if i in (3, 4, 9) else row for i, row in enumerate(RAW)]
DROPS = since_trl("1.9", "rows of whose answers max_length leaves nothing are dropped")
EMPTY = [{**row, "output": ""} if i == 7 else row for i, row in enumerate(LONG)]


@pytest.mark.parametrize(
    ("rows", "config", "expected"),
    [
        (lambda: text_rows(RAW), {}, "pool: 24 of 24 rows"),
        pytest.param(
            lambda: text_rows(LONG),
            {"max_length": 64, "shuffle_dataset": True},
            "pool: 21 of 24 rows, 3 lost to max_length=64 (no token of their answers is left), named in "
            "ifd_history/left_out.jsonl",
            marks=DROPS,
        ),
        pytest.param(
            lambda: text_rows(EMPTY).select(range(2, 24)),
            {"max_length": 64},
            "pool: 19 of 22 rows, 3 lost to max_length=64 (no token of their answers is left), named in "
            "ifd_history/left_out.jsonl",
            marks=DROPS,
        ),
        (
            lambda: as_text(LONG),
            {"max_length": 64},
            "pool: 24 of 24 rows; 3 of them have no answer that can be scored; every token is trained on, and a row's "
            "answer is what stands behind '### Response:'",
        ),
        (
            lambda: as_messages(RAW),
            {},
            "pool: 24 of 24 rows; every token is trained on, and a row's answer is what stands behind its chat "
            "template's header",
        ),
        (
            lambda: text_rows(RAW),
            {"packing": True, "max_length": 96, "padding_free": False},
            "pool: 24 of 24 rows, in ",
        ),
    ],
    ids=["all", "cut", "of some rows", "text", "chats", "packed"],
)
def test_a_run_says_what_it_selects_from(tmp_path, capsys, rows, config, expected):
    trainer = sft_trainer(tmp_path, rows(), num_train_epochs=1, **config)
    callback = select(trainer, keep=2, max_ifd=INF)
    trainer.train()
    (line,) = pool_lines(capsys.readouterr().out)
    if callback.pool.packed:
        assert line == f"{expected}{callback.pool.training_rows} packed rows"
    else:
        assert line == expected


@DROPS
def test_rows_lost_to_max_length_are_named_in_a_file_where_they_have_ids(tmp_path, capsys):
    names, why = tmp_path / "ifd_history" / "left_out.jsonl", "no token of its answer is within max_length=64"
    lost = [{"row_id": LONG[i]["row_id"], "reason": why} for i in (3, 4, 9)]
    for rows, config, expected in (
        (text_rows(LONG), {"max_length": 64}, lost),
        (text_rows(LONG).remove_columns("row_id"), {"max_length": 64}, []),
        (text_rows(LONG), {"max_length": 64}, lost),
        (text_rows(LONG), {}, []),
    ):
        trainer = sft_trainer(tmp_path, rows, num_train_epochs=1, **config)
        select(trainer, keep=2, max_ifd=INF)
        trainer.train()
        found = [json.loads(line) for line in names.read_text().splitlines()] if names.exists() else []
        assert found == expected
        assert ("named in" in capsys.readouterr().out) == bool(expected)


def test_a_run_on_whole_texts_says_so(tmp_path, capsys):
    trainer = sft_trainer(tmp_path, Dataset.from_list(STORIES), num_train_epochs=1)
    select(trainer, keep=2, policy=RandomRows())
    trainer.train()
    assert pool_lines(capsys.readouterr().out) == ["pool: 24 of 24 rows; all of a row is taken for its answer"]
