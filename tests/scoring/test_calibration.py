"""What a scorer measures of a data set: answers under wrong prompts, and the end of turn behind cut answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import ROUNDING, build_model, reference_nll
from datasets import Dataset, DatasetDict
from scipy.stats import chisquare
from tiny_runs import TOKENIZER, raw_rows, select, sft_trainer, text_rows, train

from ifd_trainer import CalibratedLimit, IFDScorer, PairingTest
from ifd_trainer.data.formats import ALPACA, SUPERFILTERING, WIZARDLM
from ifd_trainer.errors import UserError
from ifd_trainer.method.guard import Guard
from ifd_trainer.method.unfinished import Unfinished

SEED = 42  # that of a training run by default
LIMIT = CalibratedLimit(alpha=0.3, pairs=12)


def scored(scorer: IFDScorer, raw: list[dict]) -> Dataset:
    return Dataset.from_list(raw).map(scorer, batched=True)


def tokens_of(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def model():
    return build_model(len(TOKENIZER))


@pytest.fixture
def scorer(model) -> IFDScorer:
    return IFDScorer(model, TOKENIZER, format="wizardlm")


def parts_of(row: dict, definition: str, format=WIZARDLM) -> tuple[list[int], list[int], list[int]]:
    """Prompt, what precedes the direct answer, and answer of a row whose answer merges with nothing before it."""
    example = format.render(row)
    prompt, answer = tokens_of(example.prompt), tokens_of(example.answer)
    return prompt, ([] if definition == "superfiltering" else tokens_of("### Response:")), answer


@pytest.mark.parametrize("definition", ["paper", "cherry", "superfiltering"])
def test_wrong_pairs_are_scored_as_one_loss_at_a_time_says(model, definition):
    raw, format = raw_rows(20), SUPERFILTERING if definition == "superfiltering" else WIZARDLM
    scorer = IFDScorer(model, TOKENIZER, format=format, definition=definition)
    found = scorer.calibrate(scored(scorer, raw), pairs=12, seed=SEED).wrong
    rows = [parts_of(row, definition, format) for row in raw]
    expected = []
    for row, other in LIMIT.draw(np.array([row["row_id"] for row in raw]), np.ones(20, bool), SEED)[:12]:
        (_, header, answer), (prompt, *_) = rows[row], rows[other]
        # Superfiltering's direct answer has nothing before it, so that its first token is not scored.
        das = reference_nll(model, header + answer, max(len(header), 1))
        expected.append((reference_nll(model, prompt + answer, len(prompt)), das))
    assert found.cas == pytest.approx([cas for cas, _ in expected], rel=ROUNDING)
    assert found.das == pytest.approx([das for _, das in expected], rel=ROUNDING)
    assert found.ifd == pytest.approx([cas / das for cas, das in expected], rel=ROUNDING)
    assert found.ifd_ppl == pytest.approx([math.exp(cas - das) for cas, das in expected], rel=ROUNDING)
    assert LIMIT.limit(found.ifd) == sorted(found.ifd)[math.floor(0.3 * 13) - 1]


def test_the_end_of_cut_answers_is_scored_as_one_loss_at_a_time_says(model, scorer):
    raw = raw_rows(20)
    raw[4] |= {"output": ""}
    found = scorer.calibrate(scored(scorer, raw), cuts=9, seed=SEED).cut
    rows = [parts_of(row, "paper") for row in raw]
    counts = np.array([len(answer) for *_, answer in rows])
    cut, left = Unfinished(cuts=9).draw(np.array([row["row_id"] for row in raw]), counts, SEED)
    ids = [rows[row][0] + rows[row][2][:kept] + [TOKENIZER.eos_token_id] for row, kept in zip(cut, left, strict=True)]
    assert len(ids) == 9
    assert found == pytest.approx([reference_nll(model, each, len(each) - 1) for each in ids], rel=ROUNDING)


def test_a_training_run_measures_the_same_of_the_same_rows_and_weights(tmp_path, model):
    raw = raw_rows(24, seed=3)
    trainer = sft_trainer(tmp_path, text_rows(raw), num_train_epochs=1)
    longest = max(map(len, trainer.train_dataset["input_ids"]))
    guard = Guard(limit=None, unfinished=Unfinished(cuts=12), duplicates=None, freeze=None, on_misaligned="warn")
    callback = select(trainer, keep=3, max_ifd=LIMIT, guard=guard)
    measured = {}
    for name in ("mismatched_scores", "cut_losses"):
        method = getattr(callback.pool_scorer, name)
        note = lambda *values, of=method, to=name: measured.setdefault(to, of(*values))  # noqa: E731
        setattr(callback.pool_scorer, name, note)
    train(trainer)
    assert len(measured["mismatched_scores"]) == len(measured["cut_losses"]) == 12
    scorer = IFDScorer(model, TOKENIZER, format="wizardlm", max_length=longest)
    for order in (raw, raw[::-1]):  # rows are drawn by their ids
        found = scorer.calibrate(scored(scorer, order), pairs=12, cuts=12, seed=SEED)
        assert found.wrong.ifd == pytest.approx(measured["mismatched_scores"].ifd, rel=ROUNDING)
        assert found.cut == pytest.approx(measured["cut_losses"], rel=ROUNDING)
    assert callback.history.epochs[0]["limit"] == pytest.approx(LIMIT.limit(found.wrong.ifd), rel=ROUNDING)


def test_ids_that_are_texts_draw_the_rows_that_numbers_of_their_order_draw(scorer):
    raw = [row | {"row_id": f"row {row['row_id']}"} for row in raw_rows(20)]
    texts, numbers = (scorer.calibrate(scored(scorer, rows), pairs=12, cuts=12) for rows in (raw, raw_rows(20)))
    assert texts.wrong.ifd.tolist() == numbers.wrong.ifd.tolist()
    assert texts.cut.tolist() == numbers.cut.tolist()


def test_another_seed_measures_other_pairs_and_the_same_one_the_same(scorer):
    rows = scored(scorer, raw_rows(20))
    first, again, other = (scorer.calibrate(rows.with_format("torch"), 12, 12, seed) for seed in (0, 0, 1))
    assert first.wrong.ifd.tolist() == again.wrong.ifd.tolist() != other.wrong.ifd.tolist()
    assert first.cut.tolist() == again.cut.tolist() != other.cut.tolist()


def test_near_prompts_are_those_that_read_most_alike(model):
    """Each row has one twin, whose prompt differs in a number: its answer is scored under that one's prompt."""
    subjects = ["boil an egg", "prove Fermat's theorem", "paint the kitchen wall", "sing a lullaby", "tax an estate"]
    raw = [
        {"instruction": f"How do I {subject}, part {n}?", "output": f"It is {i} {n} of these.", "id": 2 * i + n}
        for i, subject in enumerate(subjects)
        for n in range(2)
    ]
    scorer = IFDScorer(model, TOKENIZER, format="alpaca")
    found = scorer.calibrate(scored(scorer, raw), prompts="near", seed=SEED).wrong
    rows = [parts_of(row, "paper", ALPACA) for row in raw]
    expected = [reference_nll(model, rows[i ^ 1][0] + rows[i][2], len(rows[i ^ 1][0])) for i in range(10)]
    assert sorted(found.cas) == pytest.approx(sorted(expected), rel=ROUNDING)


@pytest.mark.parametrize("definition", ["cherry", "superfiltering"])
def test_definitions_without_an_end_of_turn_measure_no_cut_answers(model, definition):
    scorer = IFDScorer(model, TOKENIZER, format="wizardlm", definition=definition)
    found = scorer.calibrate(scored(scorer, raw_rows(6)))
    assert (len(found.wrong), len(found.cut)) == (6, 0)


def test_rows_of_which_nothing_can_be_measured_give_nothing(scorer):
    raw = [row | {"output": ""} for row in raw_rows(3)]
    found = scorer.calibrate(scored(scorer, [*raw[:2], raw_rows(3)[2] | {"output": "a"}]))
    assert (len(found.wrong), len(found.cut)) == (0, 0)


def test_a_rows_own_format_is_that_of_the_scorer(model):
    scorer = IFDScorer(model, TOKENIZER)
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n} it is."}]}
        for n in range(8)
    ]
    assert len(scorer.calibrate(scored(scorer, rows)).cut) == 8


def test_rows_without_scores_and_scores_of_another_reading_are_told(model, scorer):
    with pytest.raises(UserError, match=r"The rows have no ifd and no answer_tokens and no das: score them first"):
        scorer.calibrate(Dataset.from_list(raw_rows(3)))
    shorter = IFDScorer(model, TOKENIZER, format="wizardlm", max_length=20)
    with pytest.raises(UserError, match=r"answer tokens, and this scorer reads 0 there: the scores are those of ano"):
        shorter.calibrate(scored(scorer, raw_rows(20)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pairs": 0}, "pairs must be a whole number of at least 1, got 0"),
        ({"cuts": 1.5}, "cuts must be a whole number of at least 1, got 1.5"),
        ({"prompts": "far"}, "prompts must be 'random' or 'near', got 'far'"),
    ],
)
def test_wrong_options_are_refused(scorer, options, words):
    with pytest.raises(UserError, match=words):
        scorer.calibrate(Dataset.from_list(raw_rows(3)), **options)


def test_a_set_of_splits_is_refused(scorer):
    with pytest.raises(UserError, match=r"rows of a datasets.Dataset, got a DatasetDict: pass one split of it"):
        scorer.calibrate(DatasetDict(train=Dataset.from_list(raw_rows(3))))


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_shown_unless_bars_are_switched_off(scorer, monkeypatch, capfd, shown):
    rows = scored(scorer, raw_rows(4))
    monkeypatch.setattr("ifd_trainer.scoring.transform.are_progress_bars_disabled", lambda: not shown)
    scorer.calibrate(rows)
    assert ("Calibrating" in capfd.readouterr().err) == shown


# ---- does this answer belong to this prompt? --------------------------------------------------------------------

TEST = PairingTest(alpha=0.5, anchors=3, tokens=2)


def p_value_of(model, rows: list, row: int, anchors: list[int]) -> float:
    """By one loss at a time: how many of the first anchors that are no row of the same prompt or answer do as well."""
    prompt, _, answer = rows[row]

    def loss(of: list[int]) -> float:
        return reference_nll(model, of + answer[: TEST.tokens], len(of))

    others = [rows[i] for i in anchors if rows[i][0] != prompt and rows[i][2] != answer][: TEST.anchors]
    return (1 + sum(loss(other) <= loss(prompt) for other, *_ in others)) / (1 + len(others))


def test_p_values_are_what_one_loss_at_a_time_says_whatever_the_order_of_the_rows(model, scorer):
    raw = raw_rows(40)
    rows, order = [parts_of(row, "paper") for row in raw], np.argsort([row["row_id"] for row in raw], kind="stable")
    found = scorer.pairing_p_values(scored(scorer, raw), test=TEST, seed=SEED)
    anchors = TEST.draw(order, order, SEED)
    expected = {row: p_value_of(model, rows, row, tried) for row, tried in zip(order.tolist(), anchors, strict=True)}
    assert found.tolist() == pytest.approx([expected[row] for row in range(40)])
    assert set(found) == {0.25, 0.5, 0.75, 1.0}  # of random weights, which know no prompt
    again = scorer.pairing_p_values(scored(scorer, raw[::-1]), test=TEST, seed=SEED)
    assert again.tolist() == found[::-1].tolist()


@pytest.mark.parametrize("tokens", [2, PairingTest.tokens])
def test_p_values_of_answers_that_belong_to_no_prompt_are_uniform_whatever_is_read_of_them(scorer, tokens):
    raw = raw_rows(256)  # answers are drawn by themselves: each of four prompts is as likely as any to be the best
    found = scorer.pairing_p_values(scored(scorer, raw), test=PairingTest(0.25, 3, tokens), seed=SEED)
    counts = np.bincount(np.round(4 * found).astype(int), minlength=5)[1:]
    assert counts.sum() == 256
    assert chisquare(counts).pvalue > 1e-3
    assert PairingTest(0.25, 3).passes(found).mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 256))


def test_rows_that_are_not_asked_for_or_have_no_score_are_not_tested(scorer):
    raw = raw_rows(12)
    raw[5] |= {"output": ""}
    rows = scored(scorer, raw)
    found = scorer.pairing_p_values(rows, [3, 5, 8], TEST, SEED)
    assert np.flatnonzero(np.isfinite(found)).tolist() == [3, 8]
    assert np.isnan(scorer.pairing_p_values(rows, [], TEST)).all()
    none = scored(scorer, [row | {"output": ""} for row in raw])
    assert np.isnan(scorer.pairing_p_values(none, test=TEST)).all()


def test_a_mask_is_not_taken_for_positions(scorer):
    rows = scored(scorer, raw_rows(4))
    with pytest.raises(UserError, match=r"got values of type bool. Of a mask, they are np.flatnonzero\(mask\)"):
        scorer.pairing_p_values(rows, np.array([False, False, True, True]), TEST)


def test_a_large_set_is_tested_in_parts_as_in_one(scorer, monkeypatch):
    rows = scored(scorer, raw_rows(20))
    whole = scorer.pairing_p_values(rows, test=TEST)
    monkeypatch.setattr("ifd_trainer.scoring.calibration.CHUNK", 7)
    assert scorer.pairing_p_values(rows, test=TEST).tolist() == whole.tolist()


def test_near_anchors_are_the_prompts_that_read_most_alike(model):
    subjects = ["boil an egg", "prove a theorem of Fermat", "paint the kitchen wall", "sing a lullaby"]
    raw = [
        {"instruction": f"How do I {subject}, part {n}?", "output": f"It is {i} {n} of these.", "id": 4 * i + n}
        for i, subject in enumerate(subjects)
        for n in range(4)
    ]
    scorer = IFDScorer(model, TOKENIZER, format="alpaca")
    test = PairingTest(alpha=0.5, anchors=3, tokens=2, prompts="near")
    found = scorer.pairing_p_values(scored(scorer, raw), test=test)
    rows = [parts_of(row, "paper", ALPACA) for row in raw]
    twins = [[j for j in range(16) if j // 4 == i // 4 and j != i] for i in range(16)]
    assert found.tolist() == pytest.approx([p_value_of(model, rows, i, twins[i]) for i in range(16)])


def test_p_values_are_refused_where_rows_were_not_scored_so(model, scorer):
    with pytest.raises(UserError, match=r"The rows have no ifd and no answer_tokens: score them first"):
        scorer.pairing_p_values(Dataset.from_list(raw_rows(3)))
    shorter = IFDScorer(model, TOKENIZER, format="wizardlm", max_length=20)
    with pytest.raises(UserError, match=r"answer tokens, and this scorer reads 0 there: the scores are those of ano"):
        shorter.pairing_p_values(scored(scorer, raw_rows(20)))
    with pytest.raises(UserError, match=r"pairing_p_values reads rows of a datasets.Dataset, got a DatasetDict"):
        scorer.pairing_p_values(DatasetDict(train=Dataset.from_list(raw_rows(3))))
