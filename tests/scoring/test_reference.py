"""The published programs' own numbers, for real rows and the 135M model."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from ifd_trainer.scoring.transform import IFDScorer

pytestmark = pytest.mark.real_model
THERE = 100  # rows of which the programs' numbers are known
RANKED = 24  # of them, the ones with the shortest answers
ROWS = 8


@pytest.fixture(scope="module")
def published(shared) -> list[dict]:
    known = read(shared / "reference" / "smollm2_135m_alpaca_cherry_first100.jsonl", THERE)
    return sorted(known, key=lambda row: row["cherry"]["n_cond"])[:RANKED]


@pytest.fixture(scope="module")
def rows(shared, published) -> list[dict]:
    rows = read(shared / "data" / "alpaca_cherry_5pct.jsonl", THERE)
    return [rows[row["row"]] for row in published]


@pytest.fixture(scope="module")
def loaded(real_model_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(real_model_path), AutoTokenizer.from_pretrained(real_model_path)


def read(path, count: int) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def score(loaded, rows: list[dict], **options) -> dict[str, list]:
    batch = {name: [row[name] for row in rows] for name in ("instruction", "input", "output")}
    return IFDScorer(*loaded, **options)(batch)


def test_cherry_values_are_those_of_its_program(loaded, rows, published):
    found = score(loaded, rows[:ROWS], format="alpaca", definition="cherry")
    expected = [row["cherry"] for row in published[:ROWS]]
    # That program writes down no row that it skips; one that it skips for IFD > 1 does have a score.
    skipped = [row["status"] not in ("ok", "skip:ifd>1") for row in expected]
    assert [status != "ok" for status in found["ifd_status"]] == skipped
    assert [value > 1 for value in found["ifd"]] == [row["status"] == "skip:ifd>1" for row in expected]
    assert found["answer_tokens"] == [row["n_cond"] for row in expected]
    np.testing.assert_allclose(found["cas"], [row["loss_cond"] for row in expected], rtol=1e-4)
    np.testing.assert_allclose(found["das"], [row["loss_alone"] for row in expected], rtol=1e-4)
    np.testing.assert_allclose(found["ifd"], [row["ifd"] for row in expected], rtol=1e-4)


def test_superfiltering_values_are_those_of_its_program(loaded, rows, published):
    found = score(loaded, rows[:ROWS], definition="superfiltering")
    expected = [row["superfiltering"] for row in published[:ROWS]]
    assert found["ifd_status"] == ["ok"] * ROWS
    np.testing.assert_allclose(found["cas"], [row["loss_cond"] for row in expected], rtol=1e-4)
    np.testing.assert_allclose(found["das"], [row["loss_alone"] for row in expected], rtol=1e-4)
    np.testing.assert_allclose(found["ifd_ppl"], [row["ifd_ppl"] for row in expected], rtol=1e-4)


def test_the_default_ranks_alpaca_rows_like_the_cherry_program(loaded, rows, published):
    found = score(loaded, rows, format="alpaca")
    assert found["ifd_status"] == ["ok"] * RANKED
    assert spearmanr(found["ifd"], [row["cherry"]["ifd"] for row in published]).statistic >= 0.98
