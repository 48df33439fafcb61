"""Losses of single tokens: against a loop over them, as columns of lists, and S-IFD made of these columns."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROUNDING, build_model
from datasets import Dataset, concatenate_datasets
from datasets.fingerprint import Hasher

from ifd_trainer import IFDScorer, attach_selective_ifd
from ifd_trainer.data.encoding import EncodedPair, Segment
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.method.columns import IFD_COLUMNS, TOKEN_COLUMNS
from ifd_trainer.method.reasons import Status
from ifd_trainer.scoring.token_losses import score_with_tokens

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
TEXTS = [
    ("Name three colours.", "Red, green and blue."),
    ("Add the numbers.", "The sum is 42."),
    ("Add the numbers.", ""),
    ("Who sat on the mat?", "The cat."),
    ("What did he say?", "Yes, the cat sat on the mat and the dog ran in the park with a ball."),
]
TEXT_ROWS = {"instruction": [q for q, _ in TEXTS], "input": [""] * len(TEXTS), "output": [a for _, a in TEXTS]}
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
HEADER = "<|im_start|>assistant\n"
CHATS = [
    ["Name a colour.", "Red."],
    ["Name a colour.", "Red.", "Another.", "Blue and green."],
    ["Name a colour.", ""],
    ["Hello!", "你好, hello."],
]
ROLES = ("user", "assistant")
CHAT_ROWS = {"messages": [[{"role": ROLES[i % 2], "content": text} for i, text in enumerate(chat)] for chat in CHATS]}
FORMATS = {"text": TEXT_ROWS, "chat": CHAT_ROWS}


def segments_of(tokenizer, kind: str) -> list[tuple[list[int], list[int], int] | None]:
    """For each row the tokens with the prompt, those without it, and how many of them are the answer's."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=kind == "text")["input_ids"]

    found = []
    if kind == "text":
        split = [(PROMPT.format(q), "### Response:", a) for q, a in TEXTS]
    else:
        before = ["".join(map(TURN.format, ROLES * 2, chat[:-1])) + HEADER for chat in CHATS]
        split = [(prompt, HEADER, chat[-1]) for prompt, chat in zip(before, CHATS, strict=True)]
    for prompt, header, answer in split:
        whole, direct = ids(prompt + answer), ids(header) + ids(answer)
        assert whole == ids(prompt) + ids(answer)  # no token is of both
        found.append((whole, direct, len(ids(answer))) if answer else None)
    return found


def looped(model: torch.nn.Module, ids: list[int], count: int) -> list[float]:
    """The loss of each of the last tokens, one at a time from full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return [-torch.log_softmax(logits[i - 1], -1)[ids[i]].item() for i in range(len(ids) - count, len(ids))]


@pytest.fixture
def scorer(model, tokenizer) -> IFDScorer:
    return IFDScorer(model, tokenizer, token_losses=True)


def expected_sifd(cas: list, das: list, share: float) -> list[float | None]:
    """By a sort of all tokens and a loop over rows."""
    rows = zip(cas, das, strict=True)
    deltas = [[float(np.float32(d) - np.float32(c)) for c, d in zip(*row, strict=True)] for row in rows]
    largest = sorted((abs(delta) for row in deltas for delta in row), reverse=True)
    threshold = largest[math.ceil(share * len(largest)) - 1]
    chosen = [[delta for delta in row if abs(delta) >= threshold] for row in deltas]
    return [math.exp(-sum(row) / len(row)) if row else None for row in chosen]


# ---- the losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_each_loss_is_that_of_a_loop_over_single_tokens(scorer, model, tokenizer, kind, batch_size):
    rows = Dataset.from_dict(FORMATS[kind]).map(scorer, batched=True, batch_size=batch_size)
    for row, segments in zip(rows, segments_of(tokenizer, kind), strict=True):
        if segments is None:
            assert [row[name] for name in ("ifd_status", *TOKEN_COLUMNS)] == ["empty_answer", None, None]
            continue
        *sides, count = segments
        assert row["answer_tokens"] == count
        for name, ids in zip(TOKEN_COLUMNS, sides, strict=True):
            np.testing.assert_allclose(row[name], looped(model, ids, count), rtol=ROUNDING, atol=1e-5)
            assert np.mean(row[name]) == pytest.approx(row[name[:3]], rel=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_scores_beside_them_are_the_same_to_the_bit_and_from_the_same_forwards(model, tokenizer, kind, monkeypatch):
    forwards = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    found = []
    for options in ({}, {"token_losses": True}):
        IFDScorer(model, tokenizer)(FORMATS[kind])  # what is tried out once is tried out
        forwards.clear()
        columns = IFDScorer(model, tokenizer, **options)(FORMATS[kind])
        found.append(({name: columns[name] for name in IFD_COLUMNS}, len(forwards)))
    assert found[0] == found[1]
    assert found[0][1] > 0


@pytest.mark.parametrize("engine", ["stream", "padded"])
@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_losses_are_of_their_own_row_however_rows_are_put_into_batches(model, tokenizer, scorer, engine, budget):
    pairs = scorer.encode(TEXT_ROWS) + scorer.encode(TEXT_ROWS)[::-1]
    whole = pairs[-1].conditioned, pairs[-1].direct
    pairs.append(EncodedPair(*(Segment(segment.ids[:-1], segment.start) for segment in whole)))  # begins another row
    scores, tokens = score_with_tokens(model, pairs, engine=engine, token_budget=budget)
    for row, pair in enumerate(pairs):
        if pair.conditioned is None:
            assert tokens.cas_tokens[row] is tokens.das_tokens[row] is None
            continue
        for losses, segment in ((tokens.cas_tokens[row], pair.conditioned), (tokens.das_tokens[row], pair.direct)):
            assert losses.dtype == np.float32
            np.testing.assert_allclose(losses, looped(model, segment.ids, segment.scored), rtol=ROUNDING, atol=1e-5)
    assert scores.answer_tokens.tolist() == [0 if row is None else len(row) for row in tokens.cas_tokens]


def test_a_row_whose_loss_is_not_finite_has_no_tokens(tokenizer):
    model = build_model(len(tokenizer))
    with torch.no_grad():
        model.lm_head.weight[tokenizer("!")["input_ids"][0]] = float("nan")
    found = IFDScorer(model, tokenizer, token_losses=True)(TEXT_ROWS)
    assert set(found["ifd_status"]) == {"nonfinite", "empty_answer"}
    assert found["cas_tokens"] == found["das_tokens"] == [None] * len(TEXTS)


@pytest.mark.parametrize(("definition", "words"), [("cherry", "cuts it at another"), ("superfiltering", "first token")])
def test_definitions_that_score_other_tokens_alone_are_refused(model, tokenizer, definition, words):
    with pytest.raises(ValueError, match=f"token_losses go with definition='paper'.*{words}"):
        IFDScorer(model, tokenizer, definition=definition, token_losses=True)


def test_of_a_conversation_whose_answers_all_count_the_tokens_are_those_of_all(model, tokenizer):
    scorer = IFDScorer(model, tokenizer, turns="tokens", token_losses=True)
    rows = Dataset.from_dict(CHAT_ROWS).map(scorer, batched=True, batch_size=2)
    for row, chat in zip(rows, CHATS, strict=True):
        expected = [[], []]
        for end in range(1, len(chat), 2):
            prompt = "".join(map(TURN.format, ROLES * 2, chat[:end])) + HEADER
            answer = tokenizer(chat[end], add_special_tokens=False)["input_ids"]
            for side, before in enumerate((prompt, HEADER)):
                ids = tokenizer(before, add_special_tokens=False)["input_ids"] + answer
                expected[side] += looped(model, ids, len(answer))
        assert (row["ifd_status"] == "ok") == bool(expected[0])
        for name, losses in zip(TOKEN_COLUMNS, expected, strict=True):
            np.testing.assert_allclose(row[name] or [], losses, rtol=ROUNDING, atol=1e-5)
            if losses:
                assert np.mean(row[name]) == pytest.approx(row[name[:3]], rel=1e-6)
    assert attach_selective_ifd(rows, 1.0)["sifd"][:] == [v and pytest.approx(v, rel=1e-6) for v in rows["ifd_ppl"]]
    with pytest.raises(ValueError, match="neighbourhood disturbs rows of one answer"):
        scorer.neighbourhood(rows)


@pytest.mark.parametrize("turns", ["mean", "min", "max", "last"])
def test_rules_whose_score_is_no_mean_over_tokens_are_refused(model, tokenizer, turns):
    with pytest.raises(ValueError, match=f"with turns='tokens' of all its answers. By turns={turns!r} it is of no"):
        IFDScorer(model, tokenizer, turns=turns, token_losses=True)


def test_a_pair_of_segments_with_other_tokens_is_refused(model):
    pairs = [EncodedPair.unscorable(Status.MALFORMED), EncodedPair(Segment([5, 6, 7], 1), Segment([4, 6, 8, 9], 1))]
    with pytest.raises(ValueError, match="Row 1 is scored on 2 tokens given its prompt and on 3 without it"):
        score_with_tokens(model, pairs)


# ---- the columns --------------------------------------------------------------------------------------------------


def test_columns_are_lists_of_floats_at_the_end_also_without_any_score(scorer):
    kinds = []
    for rows in (TEXT_ROWS, {name: values[2:3] for name, values in TEXT_ROWS.items()}):
        scored = Dataset.from_dict(rows).map(scorer, batched=True, batch_size=1)
        assert scored.column_names == [*rows, *IFD_COLUMNS, *TOKEN_COLUMNS]
        kinds.append({name: scored.data.schema.field(name).type for name in TOKEN_COLUMNS})
    assert kinds == [dict.fromkeys(TOKEN_COLUMNS, pa.list_(pa.float32()))] * 2
    table = scorer(pa.table(TEXT_ROWS))
    assert table.column_names == [*TEXT_ROWS, *IFD_COLUMNS, *TOKEN_COLUMNS]
    expected = scorer(TEXT_ROWS)
    assert {name: table[name].to_pylist() for name in TOKEN_COLUMNS} == {name: expected[name] for name in TOKEN_COLUMNS}
    assert scorer(pa.table(TEXT_ROWS)[:0]).schema == table.schema


def test_scored_again_without_tokens_a_row_does_not_keep_those_of_its_old_scores(scorer, model, tokenizer):
    rows = attach_selective_ifd(Dataset.from_dict(TEXT_ROWS).map(scorer, batched=True))
    plain = IFDScorer(model, tokenizer)
    again = rows.map(plain, batched=True)
    assert again.features == rows.features
    assert [set(again[name][:] and map(str, again[name])) for name in (*TOKEN_COLUMNS, "sifd")] == [{"None"}] * 3
    assert plain(rows.data.table.combine_chunks()).column_names == [*TEXT_ROWS, *IFD_COLUMNS]
    with_tokens = rows.map(scorer, batched=True)
    assert with_tokens["cas_tokens"][:] == rows["cas_tokens"][:]
    assert with_tokens["sifd"][:] == [None] * len(rows)


def test_the_cache_tells_scorers_with_tokens_from_those_without(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    plain, off, on = (
        IFDScorer(str(tmp_path / "model"), **o) for o in ({}, {"token_losses": False}, {"token_losses": True})
    )
    assert Hasher.hash(plain) == Hasher.hash(off) != Hasher.hash(on)
    assert "token_losses" not in plain.__getstate__()  # the caches of releases without it are hit
    assert [pickle.loads(pickle.dumps(scorer)).token_losses for scorer in (plain, off, on)] == [False, False, True]


# ---- S-IFD of columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 1.0])
def test_sifd_is_that_of_a_loop_over_single_tokens(scorer, model, tokenizer, kind, share):
    scored = Dataset.from_dict(FORMATS[kind]).map(scorer, batched=True, batch_size=2)
    rows = attach_selective_ifd(scored, share)
    assert rows.column_names == [*scored.column_names, "sifd"]
    assert rows.features["sifd"].dtype == "float64"
    both = [row and [looped(model, ids, row[-1]) for ids in row[:2]] for row in segments_of(tokenizer, kind)]
    expected = expected_sifd(*([row[side] if row else [] for row in both] for side in (0, 1)), share)
    assert rows["sifd"][:] == [value if value is None else pytest.approx(value, rel=1e-4) for value in expected]
    if share == 1.0:
        assert rows["sifd"][:] == [value and pytest.approx(value, rel=1e-6) for value in scored["ifd_ppl"]]


def test_sifd_is_the_same_of_any_file_and_order_and_of_a_data_set_in_pieces(scorer, tmp_path):
    scored = Dataset.from_dict(TEXT_ROWS).map(scorer, batched=True)
    expected = attach_selective_ifd(scored)["sifd"][:]
    for name in ("rows.parquet", "rows.jsonl", "rows.json"):
        write_rows(scored, tmp_path / name)
        assert attach_selective_ifd(load_rows(str(tmp_path / name)))["sifd"][:] == expected
    order = [3, 0, 4, 2, 1]
    moved = scored.select(order)
    assert attach_selective_ifd(moved)["sifd"][:] == [expected[row] for row in order]
    pieces = concatenate_datasets([scored.select([0, 1]), scored.select([2]), scored.select([3, 4])])
    assert attach_selective_ifd(pieces)["sifd"][:] == expected
    # Attached again, with another share, the column is replaced; what a data set shows stays.
    again = attach_selective_ifd(attach_selective_ifd(scored, 0.1).with_format("numpy", columns=["sifd"]))
    assert again.column_names == [*scored.column_names, "sifd"]
    assert (again.format["type"], again.format["columns"]) == ("numpy", ["sifd"])
    np.testing.assert_array_equal(again["sifd"][:], np.array(expected, dtype=np.float32))  # as `datasets` shows them


@pytest.mark.parametrize("kept", [[], [2], [2, 2]])
def test_rows_without_any_token_have_no_sifd_and_no_neighbours(scorer, kept):
    rows = Dataset.from_dict(TEXT_ROWS).map(scorer, batched=True).select(kept)
    found = scorer.neighbourhood(attach_selective_ifd(rows), neighbours=1)
    assert [found[name][:] for name in ("sifd", "sifd_mean", "sifd_std")] == [[None] * len(kept)] * 3
    assert {found.features[name].dtype for name in ("sifd", "sifd_mean", "sifd_std")} == {"float64"}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (Dataset.from_dict({"a": [1]}), {}, "The rows have no cas_tokens and no das_tokens.*token_losses=True"),
        (Dataset.from_dict({"cas_tokens": ["[1.0]"], "das_tokens": ["[1.0]"]}), {}, "'cas_tokens' holds string.*no li"),
        (Dataset.from_dict({"cas_tokens": [[1.0]], "das_tokens": [[1.0, 2.0]]}), {}, "row 0 has 1 of the one and 2"),
        (
            Dataset.from_dict({"cas_tokens": [[1.0]], "das_tokens": [[1.0]]}),
            {"share": 50},
            "above 0 and at most 1, got",
        ),
        ({"train": 1}, {}, "takes a datasets.Dataset, one split of it, got a dict"),
    ],
)
def test_what_sifd_cannot_be_made_of_is_refused(rows, options, words):
    with pytest.raises(ValueError, match=words):
        attach_selective_ifd(rows, **options)
