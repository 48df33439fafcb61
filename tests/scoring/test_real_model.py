"""The 135M model on the demo's rows: the numbers, what they tell, and a run with selection inside."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import ROOT, ROUNDING, reference_nll
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ifd_trainer import IFDScorer, IFDSelectionCallback
from ifd_trainer.data.formats import ALPACA, to_prompt_completion
from ifd_trainer.scoring.engine import streams
from ifd_trainer.scoring.losses import score_pairs

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def demo():
    return load_dataset("json", data_files=str(ROOT / "recipes" / "data" / "demo_train.jsonl"), split="train")


@pytest.fixture(scope="module")
def loaded(real_model_path):
    model = AutoModelForCausalLM.from_pretrained(real_model_path, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(real_model_path)


def test_both_engines_give_the_losses_of_a_loop_over_tokens(loaded, demo):
    model, tokenizer = loaded
    rows = [row for row in demo if row["quality"] == "clean"][:4]
    scorer = IFDScorer(model, tokenizer)
    pairs = scorer.encode({name: [row[name] for row in rows] for name in ("instruction", "input", "output")})
    expected = []
    for row in rows:
        prompt, header = ALPACA.render(row).prompt, "### Response:"
        whole, before = tokenizer(prompt + row["output"])["input_ids"], tokenizer(prompt)["input_ids"]
        assert whole[: len(before)] == before  # none of these answers merges with the prompt
        direct = tokenizer(header)["input_ids"] + whole[len(before) :]
        cas = reference_nll(model, whole, len(before))
        expected.append((cas, reference_nll(model, direct, len(direct) - len(whole) + len(before))))
    assert streams(model)
    for engine in ("stream", "padded"):
        scores = score_pairs(model, pairs, engine=engine)
        np.testing.assert_allclose(np.stack([scores.cas, scores.das], axis=1), expected, rtol=ROUNDING)


@pytest.mark.timeout(1200)  # a processor without products in bfloat16 takes over ten times as long
def test_bfloat16_is_near_float32_and_keeps_the_ranking(loaded, demo):
    model, tokenizer = loaded
    pairs = [pair for pair in IFDScorer(model, tokenizer).encode(demo[:64]) if pair.conditioned]
    pairs = sorted(pairs, key=lambda pair: len(pair.conditioned.ids))[:8]
    whole = score_pairs(model, pairs)
    rounded = score_pairs(model := copy.deepcopy(model).bfloat16(), pairs)
    assert streams(model)
    np.testing.assert_allclose(rounded.ifd, whole.ifd, rtol=0.03)
    assert np.median(np.abs(rounded.ifd / whole.ifd - 1)) < 0.01
    for name in ("cas", "das", "ifd"):
        found, expected = (np.log(getattr(scores, name)) for scores in (rounded, whole))
        differences = np.subtract.outer(expected, expected)
        apart = np.abs(differences) > 0.03
        assert apart.mean() > 0.7
        assert (np.sign(np.subtract.outer(found, found)) == np.sign(differences))[apart].all()


def test_answers_of_other_rows_score_higher_than_their_own(loaded, demo):
    shuffled, clean = (
        demo.filter(lambda row, quality=quality: row["quality"] == quality).select(range(8))
        for quality in ("shuffled", "clean")
    )
    scorer = IFDScorer(*loaded)
    ifd = {name: scorer(rows[:])["ifd"] for name, rows in (("shuffled", shuffled), ("clean", clean))}
    assert np.mean(ifd["shuffled"]) > np.mean(ifd["clean"]) + 0.1


def test_a_run_trains_on_the_rows_that_the_transform_ranks_highest(loaded, demo, tmp_path):
    model, tokenizer = loaded
    rows = demo.filter(lambda row: row["quality"] in ("clean", "empty")).select(range(12))
    scored = rows.map(IFDScorer(model, tokenizer), batched=True).to_pandas()
    eligible = scored[(scored["ifd_status"] == "ok") & (scored["ifd"] < 1)]
    trainer = SFTTrainer(
        model=copy.deepcopy(model),
        args=SFTConfig(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=rows.map(
            lambda row: to_prompt_completion(row, ALPACA), remove_columns=["instruction", "input", "output"]
        ),
        processing_class=tokenizer,
    )
    callback = IFDSelectionCallback(trainer, keep=4)
    trainer.add_callback(callback)
    trainer.train()
    history = callback.history.rows(0)
    kept = set(history.loc[history["times"] > 0, "row_id"])
    assert kept == set(eligible.nlargest(4, "ifd")["row_id"])
    assert trainer.state.global_step == 1
    both = history.set_index("row_id")["ifd"].reindex(scored["row_id"]).to_numpy()
    np.testing.assert_allclose(both, scored["ifd"], rtol=ROUNDING)
