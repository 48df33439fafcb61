"""Further scores against a loop over single tokens, on texts and token ids put together here."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from conftest import ROUNDING, build_model, build_tokenizer, reference_nll
from datasets import Dataset
from datasets.fingerprint import Hasher

from ifd_trainer.data.encoding import Encoder, Segment, token_count, with_ending
from ifd_trainer.data.formats import ALPACA, WIZARDLM
from ifd_trainer.data.reversed_rows import GUESS
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.scoring.losses import Scores, nll_with_tails, score_pairs
from ifd_trainer.scoring.transform import IFDScorer

ALL = ("ira", "answer_ppl", "direct_ppl", "prompt_ppl", "rifd", "rcas", "rdas")
ROWS = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
    {"instruction": "Add the numbers.", "input": "12 and 30", "output": "The sum is 42."},
    {"instruction": "Who sat on the mat?", "input": "", "output": "The cat."},
]
CHATS = [
    [("user", "Name a colour."), ("assistant", "Red."), ("user", "Another."), ("assistant", "Blue.")],
    [("system", "Be brief."), ("user", "Who sat on the mat?"), ("assistant", "The cat.")],
]
OF_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
ASSISTANT = "<|im_start|>assistant\n"
MALFORMED = {"instruction": ["a list"], "input": "", "output": "x"}


@pytest.fixture(scope="module")
def model():
    return build_model(400)


def messages(turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def scored(scorer: IFDScorer, rows: list[dict]) -> dict[str, list]:
    return Dataset.from_list(rows).map(scorer, batched=True).to_dict()


def chat_text(turns) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def perplexity(model, ids: list[int]) -> float:
    return math.exp(reference_nll(model, ids, 1))


def test_reversed_ifd_and_the_prompts_perplexity_of_text_rows(model, tokenizer):
    found = scored(IFDScorer(model, tokenizer, scores=("rifd", "prompt_ppl")), ROWS)
    for i, row in enumerate(ROWS):
        prompt = tokenizer(ALPACA.render(row).prompt)["input_ids"]
        asked = tokenizer(OF_ALPACA.format(GUESS.format(answer=row["output"])))["input_ids"]
        instruction = "\n".join(filter(None, [row["instruction"], row["input"]]))
        header = tokenizer("### Response:")["input_ids"]
        answer = tokenizer(instruction)["input_ids"]
        rcas = reference_nll(model, asked + answer, len(asked))
        rdas = reference_nll(model, header + answer, len(header))
        assert found["prompt_ppl"][i] == pytest.approx(perplexity(model, prompt), rel=10 * ROUNDING)
        assert found["rcas"][i] == pytest.approx(rcas, rel=ROUNDING)
        assert found["rdas"][i] == pytest.approx(rdas, rel=ROUNDING)
        assert found["rifd"][i] == pytest.approx(rcas / rdas, rel=ROUNDING)


def test_reversed_ifd_and_the_prompts_perplexity_of_chats(model, tokenizer):
    ask = "Reply: {answer} Which question was it?"
    scorer = IFDScorer(model, tokenizer, scores=("rifd", "prompt_ppl"), guess=ask)
    found = scored(scorer, [messages(turns) for turns in CHATS])
    for i, turns in enumerate(CHATS):
        prompt = tokenizer(chat_text(turns[:-1]) + ASSISTANT)["input_ids"]
        asked = chat_text([("user", ask.format(answer=turns[-1][1]))]) + ASSISTANT
        ids, header = tokenizer(asked)["input_ids"], tokenizer(ASSISTANT)["input_ids"]
        answer = tokenizer(turns[-2][1])["input_ids"]  # the last thing that the user says
        rcas = reference_nll(model, ids + answer, len(ids))
        rdas = reference_nll(model, header + answer, len(header))
        assert found["prompt_ppl"][i] == pytest.approx(perplexity(model, prompt), rel=10 * ROUNDING)
        assert found["rcas"][i] == pytest.approx(rcas, rel=ROUNDING)
        assert found["rdas"][i] == pytest.approx(rdas, rel=ROUNDING)
        assert found["rifd"][i] == pytest.approx(rcas / rdas, rel=ROUNDING)


def test_scores_of_the_two_losses_need_no_forward(model, tokenizer, monkeypatch):
    plain = scored(IFDScorer(model, tokenizer), ROWS)
    found = scored(IFDScorer(model, tokenizer, scores=("ira", "answer_ppl", "direct_ppl")), ROWS)
    assert {name: found[name] for name in plain} == plain  # to the last bit: nothing else was run
    cas, das = np.array(plain["cas"]), np.array(plain["das"])
    assert found["ira"] == (das - cas).tolist()
    assert found["answer_ppl"] == np.exp(cas).tolist()
    assert found["direct_ppl"] == np.exp(das).tolist()


@pytest.mark.parametrize("engine", ["auto", "padded"])
def test_without_further_scores_the_forwards_are_those_of_two_segments_a_row(model, tokenizer, engine):
    pairs = Encoder(tokenizer)([ALPACA.render(row) for row in ROWS])
    segments = [segment for pair in pairs for segment in (with_ending(pair), pair.direct)]
    nll, tails = nll_with_tails(model, segments, engine=engine)
    for given in (pairs, [replace(pair, more={"prompt": Segment([5, 6, 7], 1)}) for pair in pairs]):
        scores = score_pairs(model, given, engine=engine)
        assert scores.further == {}
        assert (scores.cas.tolist(), scores.das.tolist()) == (nll[0::2].tolist(), nll[1::2].tolist())
        assert scores.eot_loss.tolist() == tails[0::2].tolist()


def test_what_is_always_there_may_be_named_and_changes_nothing(model, tokenizer):
    plain, named = IFDScorer(model, tokenizer), IFDScorer(model, tokenizer, scores=("ifd", "cas"))
    assert Hasher.hash(named) == Hasher.hash(plain)
    assert list(scored(named, ROWS)) == [*ROWS[0], *IFD_COLUMNS]


def test_scores_that_are_always_there_stay_as_they_are_beside_others(model, tokenizer):
    plain = scored(IFDScorer(model, tokenizer), ROWS)
    found = scored(IFDScorer(model, tokenizer, scores=ALL), ROWS)
    assert list(found) == [*ROWS[0], *IFD_COLUMNS, *ALL]
    for name in IFD_COLUMNS[:-2]:
        np.testing.assert_allclose(found[name], plain[name], rtol=ROUNDING)
    assert (found["answer_tokens"], found["ifd_status"]) == (plain["answer_tokens"], plain["ifd_status"])


@pytest.mark.parametrize(
    ("bad", "status"),
    [
        ({**ROWS[0], "output": ""}, "empty_answer"),
        ({**ROWS[0], "instruction": " "}, "empty_prompt"),
        ({**ROWS[0], "output": "blue " * 600}, "truncated"),
    ],
)
def test_a_row_without_a_score_has_no_further_ones_and_leaves_the_others_alone(model, tokenizer, bad, status):
    scorer = IFDScorer(model, tokenizer, scores=ALL)
    found, alone = scored(scorer, [ROWS[0], bad, ROWS[1]]), scored(scorer, ROWS[:2])
    assert found["ifd_status"] == ["ok", status, "ok"]
    for name in ALL:
        assert found[name][1] is None
        np.testing.assert_allclose([found[name][0], found[name][2]], alone[name], rtol=10 * ROUNDING)


def test_a_malformed_row_has_no_further_scores(model, tokenizer):
    scorer = IFDScorer(model, tokenizer, scores=ALL)
    batch = {name: [MALFORMED[name], ROWS[0][name]] for name in MALFORMED}
    found = scorer(batch)
    assert found["ifd_status"] == ["malformed", "ok"]
    assert [found[name][0] for name in ALL] == [None] * len(ALL)
    assert all(isinstance(found[name][1], float) for name in ALL)


def test_a_prompt_of_one_token_has_no_perplexity_and_the_row_keeps_its_scores(model, tokenizer):
    row = {"prompt": "The", "completion": " cat sat."}
    assert len(tokenizer("The")["input_ids"]) == 1
    found = scored(IFDScorer(model, tokenizer, scores=ALL), [row])
    assert found["ifd_status"] == ["ok"]
    assert [name for name in (*IFD_COLUMNS, *ALL) if found[name] == [None]] == ["prompt_ppl"]


def test_a_chat_that_no_user_begins_has_no_reversed_ifd_and_keeps_its_scores(model, tokenizer):
    turns = [("system", "Say hello."), ("assistant", "Hello.")]
    found = scored(IFDScorer(model, tokenizer, scores=ALL), [messages(turns), messages(CHATS[0])])
    assert found["ifd_status"] == ["ok", "ok"]
    assert [name for name in ALL if found[name][0] is None] == ["rifd", "rcas", "rdas"]
    assert [name for name in ALL if found[name][1] is None] == []


def test_nothing_but_the_reversed_losses_that_were_asked_for_is_read(model, tokenizer):
    scorer = IFDScorer(model, tokenizer, scores=("rdas",))
    pairs = scorer.encode({name: [row[name] for row in ROWS] for name in ROWS[0]})
    assert [pair.more.keys() for pair in pairs] == [{"rdas"}] * 3
    plain = [replace(pair, more={}) for pair in pairs]
    assert token_count(pairs) == token_count(plain) + sum(len(pair.more["rdas"].ids) for pair in pairs)


@pytest.mark.parametrize("definition", ["cherry", "superfiltering"])
def test_other_definitions_have_them_too(model, tokenizer, definition):
    format = WIZARDLM if definition == "cherry" else None
    scorer = IFDScorer(model, tokenizer, definition=definition, format=format, scores=ALL)
    found = scored(scorer, ROWS)
    assert found["ifd_status"] == ["ok"] * 3
    np.testing.assert_array_equal(found["ira"], np.array(found["das"]) - np.array(found["cas"]))
    prompts = [scorer.encode({name: [row[name]] for name in row})[0].more["prompt"].ids for row in ROWS]
    expected = [perplexity(model, ids) for ids in prompts]
    np.testing.assert_allclose(found["prompt_ppl"], expected, rtol=10 * ROUNDING)
    np.testing.assert_allclose(found["rifd"], np.array(found["rcas"]) / np.array(found["rdas"]), rtol=1e-12)


# ---- columns ----------------------------------------------------------------------------------------------------


def test_their_type_holds_when_a_whole_batch_has_none(model, tokenizer):
    rows = [{**ROWS[0], "output": ""}, ROWS[0]]
    found = Dataset.from_list(rows).map(IFDScorer(model, tokenizer, scores=ALL), batched=True, batch_size=1)
    assert {found.data.schema.field(name).type for name in ALL} == {pa.float64()}


def test_an_arrow_table_and_an_empty_one_have_the_same_columns(model, tokenizer):
    scorer = IFDScorer(model, tokenizer, scores=("rifd",))
    table = pa.Table.from_pylist(ROWS)
    found, empty = scorer(table), scorer(table.slice(0, 0))
    assert found.column_names == empty.column_names == [*ROWS[0], *IFD_COLUMNS, "rifd", "rcas", "rdas"]
    assert empty.schema.field("rifd").type == pa.float64()
    assert found["rifd"].to_pylist() == scored(scorer, ROWS)["rifd"]


def test_scored_again_without_them_they_are_not_left_to_look_new(model, tokenizer):
    rows = Dataset.from_list(ROWS).map(IFDScorer(model, tokenizer, scores=("ira", "prompt_ppl")), batched=True)
    again = IFDScorer(model, tokenizer, scores=("prompt_ppl",))
    found = rows.map(again, batched=True)
    assert found["ira"][:] == [None] * 3
    assert found["prompt_ppl"][:] == rows["prompt_ppl"][:]
    assert "ira" not in again(rows.data.table).column_names


def test_a_column_of_the_data_sets_own_stays_unless_the_score_was_asked_for(model, tokenizer):
    rows = [row | {"ira": "mine"} for row in ROWS]
    assert scored(IFDScorer(model, tokenizer), rows)["ira"] == ["mine"] * 3
    assert all(isinstance(value, float) for value in scored(IFDScorer(model, tokenizer, scores="ira"), rows)["ira"])


def test_scores_by_column_hold_the_further_ones_apart():
    columns = {name: np.zeros(2) for name in IFD_COLUMNS} | {"ira": np.ones(2)}
    scores = Scores.of(columns)
    assert scores.further.keys() == {"ira"}
    assert list(scores.columns()) == [*IFD_COLUMNS, "ira"]
    blank = Scores.unscored(2, "malformed", ["ira"])
    assert np.isnan(blank.columns()["ira"]).all()


# ---- the scorer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scores": ("rfid",)}, r"'rfid' is no score, did you mean 'rifd'\?"),
        ({"scores": "loss_change"}, "loss_change compares the scorings of a run"),
        ({"scores": "rifd", "guess": "What was it?"}, r"with \{answer\} where the answer stands"),
        ({"scores": "ira", "guess": "What has {answer}?"}, "guess is the request of the score rifd"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(options, words):
    with pytest.raises(UserError, match=words):
        IFDScorer("no/such-model", **options)


def test_other_scores_and_another_request_miss_the_cache_and_the_order_of_names_does_not(model, tokenizer):
    made = [
        {},
        {"scores": ("ira",)},
        {"scores": ("ira", "rifd")},
        {"scores": ("rifd",)},
        {"scores": ("rifd",), "guess": "What has {answer}?"},
    ]
    hashes = [Hasher.hash(IFDScorer(model, tokenizer, **options)) for options in made]
    assert len(set(hashes)) == len(made)
    assert Hasher.hash(IFDScorer(model, tokenizer, scores="rifd,ira")) == hashes[2]
    assert Hasher.hash(IFDScorer(model, tokenizer, scores="rifd", guess=GUESS)) == hashes[3]


def test_a_pickle_without_further_scores_holds_what_it_held_before_there_were_any(model, tokenizer):
    state = IFDScorer(model, tokenizer).__getstate__()
    assert state.keys() == {
        *("name", "format", "options", "device", "dtype", "token_budget", "hub", "tokenizer", "_weights", "_version"),
    }
    again = IFDScorer.__new__(IFDScorer)
    again.__setstate__(state)
    assert (again.scores, again.guess) == ((), None)


def test_settings_tell_a_job_with_other_scores_apart(model, tokenizer):
    plain = IFDScorer(model, tokenizer).settings(["instruction", "output"])
    found = IFDScorer(model, tokenizer, scores="rifd ira").settings(["instruction", "output"])
    assert "scores" not in plain
    assert found == plain | {"scores": "ira rifd rcas rdas", "guess": GUESS}


def test_the_scorer_names_what_it_was_asked_for(model, tokenizer):
    assert repr(IFDScorer("m", scores=("ira",))).endswith("definition='paper', scores=('ira',))")


def test_calibration_reads_rows_as_without_them(model, tokenizer):
    rows = Dataset.from_list([{**row, "id": i} for i, row in enumerate(ROWS * 4)])
    found = []
    for scores in ((), ALL):
        scorer = IFDScorer(model, tokenizer, scores=scores)
        found.append(scorer.calibrate(rows.map(scorer, batched=True), pairs=8, cuts=4))
    np.testing.assert_allclose(found[1].wrong.ifd, found[0].wrong.ifd, rtol=ROUNDING)
    np.testing.assert_array_equal(found[1].cut, found[0].cut)


def test_a_tokenizer_that_adds_bos_reads_it_before_a_row_turned_round(model):
    tokenizer = build_tokenizer(add_bos=True)
    scorer = IFDScorer(model, tokenizer, format=WIZARDLM, scores="rifd prompt_ppl")
    pair = scorer.encode({name: [ROWS[2][name]] for name in ROWS[2]})[0]
    assert [pair.more[name].ids[0] for name in ("prompt", "rcas", "rdas")] == [tokenizer.bos_token_id] * 3
