"""IFD through `evaluate.load` from a path, without a hub."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest
from conftest import ROUNDING, reference_nll

from ifd_trainer.compare import ifd_measurement

PROMPTS = ["Add 1 and 2.\nAnswer:", "Name a cat.\nAnswer:", "Say no more.\nAnswer:"]
ANSWERS = [" the sum is 3", " a red cat", " "]


@pytest.fixture
def measured(tmp_path, model, tokenizer):
    ifd = evaluate.load(ifd_measurement.__file__, module_type="measurement", cache_dir=str(tmp_path))
    return ifd.compute(prompts=PROMPTS, predictions=ANSWERS, model=model, tokenizer=tokenizer, header="Answer:")


def test_losses_are_those_of_one_token_at_a_time(measured, model, tokenizer):
    for i, (prompt, answer) in enumerate(zip(PROMPTS[:2], ANSWERS, strict=False)):
        for name, before in (("cas", prompt), ("das", "Answer:")):
            start = len(tokenizer(before).input_ids)
            loss = reference_nll(model, tokenizer(before + answer).input_ids, start)
            assert measured[name][i] == pytest.approx(loss, rel=ROUNDING)
    assert measured["ifds"][:2] == pytest.approx([measured["cas"][i] / measured["das"][i] for i in (0, 1)])


def test_an_answer_without_a_score_is_none_and_left_out_of_the_mean(measured):
    assert measured["ifds"][2] is None
    assert measured["scored"] == 2
    assert measured["ifd"] == pytest.approx(np.mean(measured["ifds"][:2]))


def test_it_is_a_measurement_that_says_what_it_takes():
    ifd = evaluate.load(ifd_measurement.__file__, module_type="measurement")
    assert isinstance(ifd, evaluate.Measurement)
    assert set(ifd.features) == {"prompts", "predictions"}
    assert "Above 1 the prompt does not help" in ifd.description
    assert "header" in ifd.inputs_description
