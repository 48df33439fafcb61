"""The `datasets.map` transform: columns and their types, bad rows, the cache, several processes."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import dill
import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROOT, ROUNDING, build_model, build_tokenizer, reference_nll
from datasets import Dataset, load_from_disk
from datasets.fingerprint import Hasher
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from ifd_trainer.data.formats import ALPACA, TemplateFormat
from ifd_trainer.errors import UserError
from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.scoring import transform as columns
from ifd_trainer.scoring import weights_digest as digests
from ifd_trainer.scoring.devices import default_device, default_dtype
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.scoring.weights_digest import weights_digest

NAN = float("nan")
BERT = {
    "vocab_size": 400,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
GOOD = {
    "instruction": ["Name three colours.", "Add the numbers.", "Who sat on the mat?"],
    "output": ["Red, green and blue.", "The sum is 42.", "The cat."],
}
ARROW = {
    "cas": pa.float64(),
    "das": pa.float64(),
    "ifd": pa.float64(),
    "ifd_ppl": pa.float64(),
    "eot_loss": pa.float64(),
    "answer_tokens": pa.int64(),
    "ifd_status": pa.string(),
}


@pytest.fixture
def scorer(model, tokenizer) -> IFDScorer:
    return IFDScorer(model, tokenizer)


@pytest.fixture
def forwards(monkeypatch) -> list[int]:
    """Rows of each batch that was scored, appended as it happens."""
    sizes, score_pairs = [], columns.score_pairs

    def counting(model, pairs, **options):
        sizes.append(len(pairs))
        return score_pairs(model, pairs, **options)

    monkeypatch.setattr(columns, "score_pairs", counting)
    return sizes


@pytest.fixture
def on_disk(tmp_path) -> Dataset:
    """A data set with a cache folder of its own: one in memory is never cached."""
    Dataset.from_dict(GOOD).save_to_disk(tmp_path / "rows")
    return load_from_disk(tmp_path / "rows")


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer) -> Path:
    return save(tmp_path / "model", model, tokenizer)


def save(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def batch_of(outputs: list, instructions: list | None = None) -> dict[str, list]:
    return {"instruction": instructions or ["Name three colours."] * len(outputs), "output": outputs}


# ---- columns ----------------------------------------------------------------------------------------------------


def test_map_appends_the_columns_with_their_types(scorer):
    rows = Dataset.from_dict(GOOD | {"id": [7, 8, 9], "tags": [["a"], [], ["b"]]})
    scored = rows.map(scorer, batched=True)
    assert scored.column_names == [*rows.column_names, *IFD_COLUMNS]
    assert {name: scored.data.schema.field(name).type for name in IFD_COLUMNS} == ARROW
    assert scored.select_columns(rows.column_names).to_dict() == rows.to_dict()


def test_values_are_those_of_the_definition(scorer, model, tokenizer):
    row = Dataset.from_dict(GOOD).map(scorer, batched=True)[0]
    prompt = tokenizer("Name three colours.\n\n### Response:")["input_ids"]
    header = tokenizer("### Response:")["input_ids"]
    answer = tokenizer("Red, green and blue.")["input_ids"]
    cas = reference_nll(model, prompt + answer, len(prompt))
    das = reference_nll(model, header + answer, len(header))
    assert row["cas"] == pytest.approx(cas, rel=ROUNDING)
    assert row["das"] == pytest.approx(das, rel=ROUNDING)
    assert row["ifd"] == pytest.approx(cas / das, rel=ROUNDING)
    assert row["ifd_ppl"] == pytest.approx(math.exp(cas - das), rel=ROUNDING)
    assert (row["answer_tokens"], row["ifd_status"]) == (len(answer), "ok")


@pytest.mark.parametrize("bad", [["", None], ["", ""]])
@pytest.mark.parametrize("first", [True, False])
def test_types_hold_when_a_whole_batch_has_no_scores(scorer, bad, first):
    good = ["Red.", "Green."]
    outputs = bad + good if first else good + bad
    scored = Dataset.from_dict(batch_of(outputs)).map(scorer, batched=True, batch_size=2)
    assert {name: scored.data.schema.field(name).type for name in IFD_COLUMNS} == ARROW
    empty = [not output for output in outputs]
    assert scored["ifd_status"] == ["empty_answer" if e else "ok" for e in empty]
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        assert [value is None for value in scored[name]] == empty
    assert [tokens == 0 for tokens in scored["answer_tokens"]] == empty


def test_types_hold_when_no_row_of_the_data_set_has_a_score(scorer):
    scored = Dataset.from_dict(batch_of(["", ""])).map(scorer, batched=True, batch_size=1)
    assert {name: scored.data.schema.field(name).type for name in IFD_COLUMNS} == ARROW


def test_scored_again_the_columns_are_replaced(scorer):
    once = Dataset.from_dict(GOOD).map(scorer, batched=True)
    twice = once.map(scorer, batched=True)
    assert twice.column_names == once.column_names
    assert twice["ifd"] == once["ifd"]


def test_scored_again_a_row_does_not_keep_what_was_selected_by_its_old_scores(scorer):
    old = {"ifd_definition": ["cherry"] * 3, "ifd_rank": [1, 2, 3], "ifd_reason": ["kept"] * 3}
    rows = Dataset.from_dict(GOOD | old)
    found = rows.map(scorer, batched=True)
    assert found["ifd_definition"] == ["paper"] * 3
    assert found["ifd_rank"] == found["ifd_reason"] == [None] * 3
    assert [found.features[name] for name in old] == [rows.features[name] for name in old]
    assert scorer(rows.data.table).column_names == [*GOOD, *IFD_COLUMNS]


def test_an_empty_data_set_stays_empty(scorer):
    assert len(Dataset.from_dict({"instruction": [], "output": []}).map(scorer, batched=True)) == 0


@pytest.mark.parametrize("format", ["numpy", "torch", "pandas", "arrow"])
def test_the_output_format_of_a_data_set_survives(scorer, format):
    rows = Dataset.from_dict(GOOD | {"number": [1, 2, 3]})
    if format == "pandas":  # the transform says what it wants
        with pytest.raises(ValueError, match=r"with_format\(None\)"):
            rows.with_format(format).map(scorer, batched=True)
    else:
        scored = rows.with_format(format).map(scorer, batched=True)
        assert scored.format["type"] == format
        assert scored.with_format(None)["ifd"] == rows.map(scorer, batched=True)["ifd"]


def test_an_arrow_table_comes_back_whole_with_the_columns_at_its_end(scorer):
    table = pa.table(GOOD | {"ifd": ["old"] * 3, "parts": [[1], None, []], "small": pa.array([1, 2, 3], pa.int8())})
    found = scorer(table)
    kept = ["instruction", "output", "parts", "small"]
    assert found.column_names == [*kept, *IFD_COLUMNS]
    assert found.select(kept).equals(table.select(kept))
    assert {field.name: field.type for field in found.schema if field.name in IFD_COLUMNS} == ARROW
    assert found["ifd"].to_pylist() == scorer(GOOD)["ifd"]
    assert scorer(table[:0]).schema == found.schema


@pytest.mark.parametrize(
    ("started", "actor", "task", "refused"),
    [(True, "01", None, True), (True, None, "02", True), (True, None, None, False), (False, "01", "02", False)],
    ids=["actor", "task", "driver", "not started"],
)
def test_arrays_of_ray_are_refused_with_the_way_to_do_it(scorer, monkeypatch, started, actor, task, refused):
    worker = types.SimpleNamespace(get_actor_id=lambda: actor, get_task_id=lambda: task)
    ray = types.SimpleNamespace(is_initialized=lambda: started, get_runtime_context=lambda: worker)
    monkeypatch.setitem(sys.modules, "ray", ray)  # `test_ray.py` has real workers
    batch = {name: np.array(values) for name, values in GOOD.items()}
    if not refused:
        assert scorer(batch)["ifd_status"] == ["ok"] * 3
        return
    with pytest.raises(ValueError, match='batch_format="pyarrow"'):
        scorer(batch)


# ---- bad rows ---------------------------------------------------------------------------------------------------


def status_of(scorer: IFDScorer, batch: dict[str, list]) -> list[str]:
    return scorer(batch)["ifd_status"]


@pytest.mark.parametrize(
    ("output", "options", "status", "tokens"),
    [
        (None, {}, "empty_answer", 0),
        (NAN, {}, "empty_answer", 0),
        ("", {}, "empty_answer", 0),
        ("<|im_end|>\n", {}, "empty_answer", 0),
        (77, {}, "ok", 2),
        (7.5, {}, "ok", 3),
        (["Red."], {}, "malformed", 0),
        ("7", {"min_answer_tokens": 2}, "too_short", 0),
        ("7" * 60, {"max_length": 50}, "truncated", 0),
        ("7" * 60, {"max_length": 50, "score_truncated": True}, "ok", None),
        ("7" * 600, {}, "truncated", 0),  # the model's context is 512 tokens
    ],
)
def test_status_of_an_output(model, tokenizer, output, options, status, tokens):
    scorer = IFDScorer(model, tokenizer, **options)
    scored = scorer(batch_of(["Red.", "The cat sat.", output]))
    assert scored["ifd_status"][2] == status
    assert (scored["ifd"][2] is None) == (status != "ok")
    assert tokens is None or scored["answer_tokens"][2] == tokens


def test_status_of_a_prompt_without_room_for_an_answer(model, tokenizer):
    scorer = IFDScorer(model, tokenizer, max_length=30)
    assert status_of(scorer, batch_of(["Red.", "Red."], ["Add.", "7" * 40])) == ["ok", "prompt_too_long"]


@pytest.mark.parametrize("instruction", [None, NAN, "", " \n"])
def test_a_row_that_asks_nothing_has_no_score(scorer, instruction):
    batch = batch_of(["Red.", "Red.", " \n"], [instruction, "Name one.", instruction])
    assert status_of(scorer, batch) == ["empty_prompt", "ok", "empty_answer"]
    assert status_of(scorer, batch | {"input": ["12 and 30", "", ""]}) == ["ok", "ok", "empty_answer"]


@pytest.mark.parametrize(
    "bad",
    [None, "hello", 5, {"role": "user"}, ["hello"], [{"content": "x"}], [{"role": "assistant"}], [{"role": None}]],
)
def test_malformed_chats(scorer, bad):
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert status_of(scorer, {"messages": [good, bad]}) == ["ok", "malformed"]


def test_a_chat_without_an_assistant_turn_is_empty(scorer):
    good = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    assert status_of(scorer, {"messages": [good, good[:1], []]}) == ["ok", "empty_answer", "empty_answer"]


def test_a_template_that_raises_makes_that_row_malformed(model):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    good = [{"role": "user", "content": "Hi "}, {"role": "assistant", "content": "Hello."}]
    bad = [{"role": "system", "content": "Be brief."}, *good]
    assert status_of(IFDScorer(model, tokenizer), {"messages": [good, bad]}) == ["ok", "malformed"]


@pytest.mark.parametrize("bad", [None, "", ["x"], "7" * 600])
@pytest.mark.parametrize("position", [0, 1, 3])
def test_a_bad_row_leaves_the_others_exactly_as_they_are(scorer, bad, position):
    outputs = list(GOOD["output"])
    expected = scorer(batch_of(outputs))
    outputs.insert(position, bad)
    found = scorer(batch_of(outputs))
    for name in IFD_COLUMNS:
        assert found[name][:position] + found[name][position + 1 :] == expected[name]


def test_a_batch_of_malformed_rows_only_names_format_and_columns(scorer, caplog):
    rows = Dataset.from_dict({"messages": ["hello", "you"], "id": [1, 2]})
    words = r"None of 2 rows can be rendered as 'messages'.*got str.*columns"
    with pytest.raises(ValueError, match=words):
        scorer.check(rows[:])
    assert rows.map(scorer, batched=True)["ifd_status"] == ["malformed"] * 2
    assert re.search(words, caplog.text)
    table = scorer(pa.table(rows.data.table.slice(1)))
    assert table["ifd_status"].to_pylist() == ["malformed"]


def test_a_tokenizer_of_another_model_is_told(tokenizer):
    scorer = IFDScorer(build_model(len(tokenizer) - 1), tokenizer)
    rows = {"prompt": ["Name a cat."], "completion": [" It sat."]}
    assert scorer(rows)["ifd_status"] == ["ok"]
    rows["completion"] = [tokenizer.decode([len(tokenizer) - 1])]
    for call in (scorer.check, scorer):
        with pytest.raises(ValueError, match=r"gives token \d+, and the model has \d+ tokens: they do not belong"):
            call(rows)


def test_a_bos_that_the_model_does_not_have_is_told(tokenizer):
    beyond = build_tokenizer()
    beyond.add_special_tokens({"bos_token": "<begin>"})
    scorer = IFDScorer(build_model(len(beyond) - 1), beyond)  # the BOS stands before the direct answer alone
    with pytest.raises(ValueError, match=rf"gives token {len(beyond) - 1}, and the model has {len(beyond) - 1} tokens"):
        scorer({"prompt": ["Name a cat."], "completion": [" It sat."]})


def test_weights_are_read_once_for_a_cache_and_its_workers(on_disk, model, tokenizer, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    read, digest = [], digests.hashlib.blake2b
    monkeypatch.setattr(digests.hashlib, "blake2b", lambda **options: read.append(1) or digest(**options))
    on_disk.map(IFDScorer(tmp_path / "model"), batched=True, num_proc=2, with_rank=True)
    assert len(read) == 1


def test_columns_that_fit_no_format_are_named(scorer):
    with pytest.raises(ValueError, match=r"Cannot tell the format from the columns \['question', 'reply'\]"):
        Dataset.from_dict({"question": ["a"], "reply": ["b"]}).map(scorer, batched=True)


# ---- wrong use --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        GOOD,
        {"messages": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]},
        {
            "prompt": [[{"role": "user", "content": "Hi"}]],
            "completion": [[{"role": "assistant", "content": "Hello."}]],
        },
    ],
    ids=["texts", "messages", "prompt-completion"],
)
def test_map_without_batched_says_so(scorer, rows):
    with pytest.raises(ValueError, match="batched=True"):
        Dataset.from_dict(rows).map(scorer)


@pytest.mark.parametrize("model", [None, ["org/model"], 7])
def test_what_is_no_model_is_refused(model):
    with pytest.raises(ValueError, match="model must be a hub name, a path or a loaded causal LM, got"):
        IFDScorer(model)


@pytest.mark.parametrize("name", ["./nothing", "/nothing", "../a/b", "out/run/checkpoint-1", ""])
def test_a_path_without_a_folder_is_said_to_be_none(name):
    with pytest.raises(FileNotFoundError, match=f"No such folder: '{name}'"):
        IFDScorer(name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token_budget": 0}, "token_budget must be a whole number of at least 1, got 0"),
        ({"max_length": -1}, "max_length must be a whole number of at least 1, got -1"),
        ({"dtype": "foo"}, "dtype must be .* got 'foo'"),
        ({"dtype": torch.int8}, "dtype must be .* got torch.int8"),
        ({"device": "gpu"}, "Unknown device 'gpu'"),
    ],
)
def test_wrong_options_are_refused_at_once(options, words):
    with pytest.raises(ValueError, match=words):
        IFDScorer("org/model", **options)


def test_a_device_that_is_not_there_is_refused_before_weights_are_read(checkpoint, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(ValueError, match=r"The device 'cuda:99' cannot be used here: .*Leave device out"):
        IFDScorer(checkpoint, device="cuda:99")(GOOD)


def test_a_length_above_the_window_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="max_length=513 is more than the model's window of 512"):
        IFDScorer(model, tokenizer, max_length=513)(GOOD)


def test_weights_that_are_cut_short_are_said_to_be(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"The weights in .* cannot be read .*cut short"):
        IFDScorer(checkpoint)(GOOD)


@pytest.mark.parametrize(
    "options",
    [
        {"input_columns": ["instruction"]},
        {"input_columns": ["instruction", "output"]},
        {"input_columns": ["instruction", "output", "instruction"]},
        {"with_indices": True},
        {"with_indices": True, "with_rank": True},
    ],
)
def test_map_with_parts_of_the_rows_says_how_to_call_it(scorer, options):
    with pytest.raises(ValueError, match="without input_columns and with_indices"):
        Dataset.from_dict(GOOD).map(scorer, batched=True, **options)


def test_unknown_definition_is_refused_before_a_model_loads():
    with pytest.raises(ValueError, match="Unknown definition 'ifd'"):
        IFDScorer("no/such-model", definition="ifd")


def test_a_loaded_model_without_a_tokenizer_needs_one(model):
    model.config.name_or_path = ""
    with pytest.raises(ValueError, match="Pass the tokenizer too"):
        IFDScorer(model)(batch_of(["Red."]))


def test_a_loaded_model_finds_its_tokenizer_where_it_came_from(checkpoint, model):
    model.config.name_or_path = str(checkpoint)
    found, expected = IFDScorer(model)(batch_of(["Red."])), IFDScorer(model, build_tokenizer())(batch_of(["Red."]))
    assert found["ifd"][0] == expected["ifd"][0]


def test_a_tokenizer_by_its_path(model, tokenizer, checkpoint):
    assert IFDScorer(model, str(checkpoint))(GOOD)["ifd"] == IFDScorer(model, tokenizer)(GOOD)["ifd"]


# ---- options ----------------------------------------------------------------------------------------------------


def test_a_path_scores_as_the_loaded_model(scorer, checkpoint):
    found, expected = IFDScorer(checkpoint)(GOOD), scorer(GOOD)
    np.testing.assert_allclose(found["ifd"], expected["ifd"], rtol=ROUNDING)


def test_superfiltering_uses_its_own_prompt_unless_told_otherwise(model, tokenizer):
    bare = IFDScorer(model, tokenizer, definition="superfiltering")(GOOD)
    named = IFDScorer(model, tokenizer, definition="superfiltering", format="superfiltering")(GOOD)
    alpaca = IFDScorer(model, tokenizer, definition="superfiltering", format="alpaca")(GOOD)
    assert bare["cas"] == named["cas"] != alpaca["cas"]


def test_a_format_with_other_column_names(model, tokenizer):
    format = TemplateFormat("qa", ALPACA.prompt, ALPACA.prompt_with_input, "### Response:", "q", "context", "a")
    renamed = {"q": GOOD["instruction"], "a": GOOD["output"], "instruction": ["x"] * 3}
    found = IFDScorer(model, tokenizer, format=format)(renamed)
    assert found["ifd"] == IFDScorer(model, tokenizer, format="alpaca")(GOOD)["ifd"]


def test_settings_are_those_in_force_and_load_no_model(checkpoint, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    scorer = IFDScorer(checkpoint, definition="superfiltering", device="cpu", dtype=torch.float32)
    assert scorer.settings(GOOD) == {
        "definition": "superfiltering",
        "max_length": 512,  # the window
        "min_answer_tokens": 1,
        "score_truncated": False,
        "format": "superfiltering",
        "device": "cpu",
        "dtype": "float32",
        "token_budget": None,
        "turns": None,
    }


def test_default_device_and_dtype(model):
    assert default_device() in ("cpu", "mps") or default_device().startswith("cuda:")
    assert default_dtype(model.config, "cpu") is torch.float32


# ---- the cache --------------------------------------------------------------------------------------------------


def test_the_same_scorer_hits_the_cache(on_disk, scorer, forwards):
    first = on_disk.map(scorer, batched=True)
    second = on_disk.map(scorer, batched=True)
    assert forwards == [3]
    assert second._fingerprint == first._fingerprint
    assert second["ifd"] == first["ifd"]


def test_a_new_scorer_with_equal_weights_hits_the_cache(on_disk, tokenizer, forwards):
    for _ in range(2):
        on_disk.map(IFDScorer(build_model(len(tokenizer)), build_tokenizer()), batched=True)
    assert forwards == [3]


def test_changed_weights_miss_the_cache(on_disk, model, tokenizer, forwards):
    before = on_disk.map(IFDScorer(model, tokenizer), batched=True)
    with torch.no_grad():
        weight = model.lm_head.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
    after = on_disk.map(IFDScorer(model, tokenizer), batched=True)
    assert forwards == [3, 3]
    assert after._fingerprint != before._fingerprint


def test_weights_changed_under_the_same_scorer_miss_the_cache(on_disk, model, scorer, forwards):
    before = on_disk.map(scorer, batched=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    after = on_disk.map(scorer, batched=True)
    assert forwards == [3, 3]
    assert after["cas"] != before["cas"]


def test_the_same_weights_in_another_architecture_miss_the_cache(model, tokenizer):
    other = build_model(len(tokenizer), rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    other.load_state_dict(model.state_dict())
    assert Hasher.hash(IFDScorer(other, tokenizer)) != Hasher.hash(IFDScorer(model, tokenizer))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "alpaca"},
        {"definition": "cherry"},
        {"max_length": 100},
        {"min_answer_tokens": 2},
        {"score_truncated": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_changed_options_miss_the_cache(on_disk, model, tokenizer, forwards, options):
    on_disk.map(IFDScorer(model, tokenizer), batched=True)
    on_disk.map(IFDScorer(model, tokenizer, **options), batched=True)
    assert forwards == [3, 3]


def test_another_chat_template_misses_the_cache(model, tokenizer):
    other = build_tokenizer()
    other.chat_template = "{{ messages }}"
    assert Hasher.hash(IFDScorer(model, other)) != Hasher.hash(IFDScorer(model, tokenizer))


def test_a_path_hits_the_cache_until_its_files_change(on_disk, checkpoint, tokenizer, forwards):
    for _ in range(2):
        on_disk.map(IFDScorer(str(checkpoint)), batched=True)
    assert forwards == [3]
    save(checkpoint, build_model(len(tokenizer), seed=1), tokenizer)
    on_disk.map(IFDScorer(str(checkpoint)), batched=True)
    assert forwards == [3, 3]


def test_all_spellings_of_a_folder_hit_the_cache(on_disk, checkpoint, forwards, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint.parent / "link").symlink_to(checkpoint)
    for spelling in ("model", "./model", "model/", "link", checkpoint):
        on_disk.map(IFDScorer(spelling), batched=True)
    assert forwards == [3]
    copy = shutil.copytree(checkpoint, checkpoint.parent / "copy")
    assert IFDScorer(copy).digest() == IFDScorer(checkpoint).digest()


def test_a_relative_path_reaches_the_workers(on_disk, checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    scorer = IFDScorer("model")
    monkeypatch.chdir("/")
    one = on_disk.map(scorer, batched=True, num_proc=2)
    assert one["ifd_status"] == ["ok"] * 3


@pytest.mark.parametrize("loaded", [True, False])
def test_use_does_not_change_the_hash(model, tokenizer, checkpoint, loaded):
    scorer = IFDScorer(model, tokenizer) if loaded else IFDScorer(checkpoint)
    before = Hasher.hash(scorer)
    scorer(GOOD)
    scorer({"messages": [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]]})
    assert Hasher.hash(scorer) == before


def test_the_pickle_holds_no_weights(tokenizer):
    model = build_model(len(tokenizer), hidden_size=256, intermediate_size=512)
    assert sum(p.numel() for p in model.parameters()) > 1_000_000
    assert len(dill.dumps(IFDScorer(model, tokenizer))) < 100_000


def test_an_unpickled_scorer_has_the_hash_of_the_first(scorer):
    assert Hasher.hash(pickle.loads(pickle.dumps(scorer))) == Hasher.hash(scorer)


def test_weights_digest_reads_names_shapes_dtypes_and_values():
    def digest(**buffers):
        module = torch.nn.Module()
        for name, value in buffers.items():
            module.register_buffer(name, value)
        return weights_digest(module)

    zeros = torch.zeros(2, 3)
    others = [
        digest(a=zeros),
        digest(b=zeros),
        digest(a=zeros.T.contiguous()),
        digest(a=zeros.int()),
        digest(a=-zeros),
        digest(a=zeros, b=zeros),
        digest(a=torch.tensor(0.0)),
    ]
    assert len(set(others)) == len(others)
    assert digest(a=zeros.T) == digest(a=zeros.T.contiguous())
    assert digest(a=zeros.bfloat16()) == digest(a=zeros.bfloat16().clone())


# ---- what a model computes with beside its weights ---------------------------------------------------------------


def adapted(vocabulary: int, order: tuple[str, ...] = ("first", "second"), alpha: int = 16) -> Any:
    """A model with two adapters of random weights, added in that order; `first` is active."""
    peft = pytest.importorskip("peft")
    model = build_model(vocabulary)
    for name in order:
        modules = {"first": ["q_proj", "v_proj"], "second": ["q_proj", "up_proj"]}[name]
        config = peft.LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=modules)
        with torch.random.fork_rng():
            torch.manual_seed(len(name))
            if isinstance(model, peft.PeftModel):
                model.add_adapter(name, config)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name)
    model.set_adapter("first")
    return model.eval()


def test_the_active_adapter_is_part_of_the_cache(on_disk, tokenizer, forwards):
    model = adapted(len(tokenizer))
    first = on_disk.map(IFDScorer(model, tokenizer), batched=True)
    model.set_adapter("second")
    second = on_disk.map(IFDScorer(model, tokenizer), batched=True)
    with model.disable_adapter():
        none = on_disk.map(IFDScorer(model, tokenizer), batched=True)
    assert forwards == [3, 3, 3]
    assert len({tuple(found["cas"]) for found in (first, second, none)}) == 3
    for name, expected in (("second", second), ("first", first)):
        model.set_adapter(name)
        assert on_disk.map(IFDScorer(model, tokenizer), batched=True)["cas"] == expected["cas"]
    assert forwards == [3, 3, 3]


def test_the_scale_of_an_adapter_is_part_of_the_cache(on_disk, tokenizer, forwards):
    once = on_disk.map(IFDScorer(adapted(len(tokenizer)), tokenizer), batched=True)
    twice = on_disk.map(IFDScorer(adapted(len(tokenizer), alpha=32), tokenizer), batched=True)
    assert forwards == [3, 3]
    assert once["cas"] != twice["cas"]


def test_a_merged_adapter_misses_the_cache_and_one_that_is_not_so_again_hits_it(tokenizer):
    model = adapted(len(tokenizer), order=("first",))
    with torch.no_grad():  # weights that merging and its undoing give back bit for bit
        for name, weight in model.named_parameters():
            if "lora" in name:
                weight.zero_()
    before = weights_digest(model)
    model.merge_adapter()
    merged = weights_digest(model)
    model.unmerge_adapter()
    assert weights_digest(model) == before != merged


def test_adapters_in_another_order_are_the_same_model(on_disk, tokenizer, forwards):
    for order in (("first", "second"), ("second", "first")):
        on_disk.map(IFDScorer(adapted(len(tokenizer), order), tokenizer), batched=True)
    assert forwards == [3]


def test_an_adapter_that_is_saved_and_loaded_is_the_same_model(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(len(tokenizer))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build_model(len(tokenizer)), tmp_path / "first", adapter_name="first")
    again.load_adapter(tmp_path / "second", "second")
    assert weights_digest(again.eval()) == weights_digest(model)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_use_saving_and_loading_of_virtual_tokens_does_not_change_the_digest(tokenizer, tmp_path, kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(build_model(len(tokenizer)), config).train()
    before = weights_digest(model)
    IFDScorer(model, tokenizer, format="alpaca")(GOOD)
    assert weights_digest(model) == before == weights_digest(model.eval())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build_model(len(tokenizer)), tmp_path)
    assert weights_digest(again) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
        lambda model: setattr(model.model.layers[1].mlp, "act_fn", torch.nn.ReLU()),
        lambda model: setattr(model.model.norm, "forward", torch.tanh),
        lambda model: model.model.rotary_emb.inv_freq.mul_(2),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.bfloat16(),
        lambda model: model.model.norm.register_forward_hook(lambda module, args, output: 2 * output),
    ],
    ids=["a setting", "a module", "a function", "a buffer that is not saved", "attention", "dtype", "a hook"],
)
def test_changes_of_what_a_model_computes_with_change_its_digest(tokenizer, change):
    model = build_model(len(tokenizer))
    before = weights_digest(model)
    with torch.no_grad():
        change(model)
    assert weights_digest(model) != before


def test_functions_and_vectors_of_hooks_are_told_apart(tokenizer):
    def steered(scale: float, offset: float) -> str:
        model, vector = build_model(len(tokenizer)), torch.full((32,), offset)
        model.model.norm.register_forward_hook(lambda module, args, output: output * scale + vector)
        return weights_digest(model)

    assert steered(2, 0.0) == steered(2, 0.0)
    assert len({steered(2, 0.0), steered(3, 0.0), steered(2, 1.0)}) == 3


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "max_position_embeddings": 32},
        {"attention_dropout": 0.5},
    ],
    ids=["plain", "with frequencies of the longest row", "with dropout"],
)
def test_use_and_mode_do_not_change_the_digest(tokenizer, overrides):
    model = build_model(len(tokenizer), **overrides)
    before = weights_digest(model)
    model(torch.arange(50)[None])
    assert weights_digest(model) == before
    assert weights_digest(model.train()) == before
    model.gradient_checkpointing_enable()
    assert weights_digest(model) == before


def test_a_saved_and_loaded_model_is_the_same(tokenizer, checkpoint):
    again = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert weights_digest(again) == weights_digest(build_model(len(tokenizer)))


DIGESTS = """
import sys
sys.path[:0] = {paths}
from test_transform import adapted, code_of_its_own
from ifd_trainer.scoring.weights_digest import weights_digest
print("digests", weights_digest(adapted(400)), weights_digest(code_of_its_own("2.0")))
"""


def test_another_process_has_the_same_digests():
    code = DIGESTS.format(paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "scoring")])
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # which changes the order of sets
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, env=environment, check=True
    )
    found = next(line for line in done.stdout.splitlines() if line.startswith("digests"))
    assert found == f"digests {weights_digest(adapted(400))} {weights_digest(code_of_its_own('2.0'))}"


CODE = """
import torch
from transformers import LlamaForCausalLM

SCALE = {scale}

def scaled(logits):
    return logits * SCALE

class Own(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = scaled(out.logits)
        return out
"""


def code_of_its_own(scale: str) -> Any:
    """A model of a class that is in no package, and whose code calls a function that reads a constant."""
    module = types.ModuleType("modeling_own")
    sys.modules["modeling_own"] = module
    exec(CODE.format(scale=scale), vars(module))
    plain = build_model(400)
    model = module.Own(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    return model


def test_code_of_no_package_is_part_of_the_cache(on_disk, tokenizer, forwards):
    found = []
    for scale in ("2.0", "3.0", "2.0"):
        found.append(on_disk.map(IFDScorer(code_of_its_own(scale), tokenizer), batched=True)["cas"])
    assert forwards == [3, 3]
    assert found[0] == found[2] != found[1]


def test_the_code_in_a_folder_is_part_of_the_cache(on_disk, checkpoint, forwards, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = json.loads((checkpoint / "config.json").read_text())
    own = {"AutoModelForCausalLM": "modeling_own.Own"}
    (checkpoint / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    found = []
    for scale in ("2.0", "3.0", "3.0"):
        (checkpoint / "modeling_own.py").write_text(CODE.format(scale=scale))
        found.append(on_disk.map(IFDScorer(checkpoint, trust_remote_code=True), batched=True)["cas"])
    assert forwards == [3, 3]
    assert found[0] != found[1] == found[2]


# ---- what is no causal language model ----------------------------------------------------------------------------


def test_a_loaded_model_of_another_kind_is_refused_at_once(tokenizer):
    model = LlamaForSequenceClassification(build_model(len(tokenizer)).config)
    with pytest.raises(UserError, match=r"^LlamaForSequenceClassification is a classifier.*decoder-only"):
        IFDScorer(model, tokenizer)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
            ),
            r"\(T5ForConditionalGeneration\) is an encoder-decoder",
        ),
        (lambda: BertForMaskedLM(BertConfig(**BERT)), r"\(BertForMaskedLM\) lets tokens see those that follow them"),
        (lambda: BertForSequenceClassification(BertConfig(**BERT)), r"\(BertForSequenceClassification\) is a class"),
        (lambda: LlamaForSequenceClassification(build_model(400).config), r"is a classifier"),
        (
            lambda: ViTModel(
                ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
            ),
            "is a model of the type 'vit', which transformers does not load as a causal language model",
        ),
    ],
    ids=["encoder-decoder", "masked", "classifier", "classifier of a causal type", "pictures"],
)
def test_a_folder_of_another_kind_is_refused_before_weights_are_read(tmp_path, tokenizer, monkeypatch, build, words):
    save(tmp_path, build(), tokenizer)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    with pytest.raises(UserError, match=f"{words}.*decoder-only"):
        IFDScorer(tmp_path).check(GOOD)


def test_weights_that_a_checkpoint_lacks_are_not_made_up(tmp_path, model, tokenizer):
    """transformers fills them with random numbers, and says so in a table."""
    save(tmp_path, model.model, tokenizer)
    with pytest.raises(UserError, match=r"lacks 1 of the weights of a LlamaForCausalLM \(lm_head\.weight\)"):
        IFDScorer(tmp_path)(GOOD)


# ---- several processes ------------------------------------------------------------------------------------------


def test_two_processes_give_the_scores_of_one(on_disk, checkpoint):
    # Threads of this process are busy first: forked workers hang if they wait for threads that were not copied.
    torch.randn(600, 600) @ torch.randn(600, 600)
    torch.randn(300_000).exp()
    one = on_disk.map(IFDScorer(str(checkpoint)), batched=True, load_from_cache_file=False)
    two = on_disk.map(IFDScorer(str(checkpoint)), batched=True, num_proc=2, with_rank=True)
    assert two.column_names == one.column_names
    assert (two["ifd_status"], two["answer_tokens"]) == (one["ifd_status"], one["answer_tokens"])
    for name in ("cas", "das", "ifd", "ifd_ppl"):
        np.testing.assert_allclose(two[name], one[name], rtol=ROUNDING)


def test_a_loaded_model_in_several_processes_is_refused(on_disk, scorer, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(ValueError, match=r"a loaded model does not travel.*num_proc"):
        on_disk.map(scorer, batched=True, num_proc=2)


def test_repr_names_what_was_asked_for(scorer):
    assert repr(IFDScorer("org/model", format="alpaca")) == (
        "IFDScorer('org/model', format='alpaca', definition='paper')"
    )
    assert repr(scorer) == "IFDScorer('LlamaForCausalLM', format=None, definition='paper')"


@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_moves_inside_a_batch_unless_bars_are_switched_off(model, tokenizer, monkeypatch, capfd, shown):
    monkeypatch.setattr("ifd_trainer.scoring.transform.are_progress_bars_disabled", lambda: not shown)
    IFDScorer(model, tokenizer)({"prompt": ["Name a cat."], "completion": [" The cat sat."]})
    assert ("Scoring a batch" in capfd.readouterr().err) is shown
