"""The file of a checkpoint that holds order and scores: bit for bit, or an error that names it."""

from __future__ import annotations

import base64
import json
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_runs import INF, Stop, difference, raw_rows, select, sft_trainer, text_rows, train, weights_of
from transformers import TrainerState

from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.method.plain_data import as_text
from ifd_trainer.method.reasons import Status
from ifd_trainer.scoring.losses import Scores
from ifd_trainer.training.checkpoint_state import FILE, load_selection, save_selection

ROWS = 16
floats = arrays.arrays(np.float64, 5, elements=st.floats(width=64, allow_nan=True))


def same_bits(one, other):
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


@given(
    values=st.tuples(floats, floats, floats, floats, floats, floats),
    statuses=st.lists(st.text(), min_size=5, max_size=5),
    tokens=st.integers(-(2**60), 2**60),
)
@example(values=(np.full(5, np.nan),) * 6, statuses=["ok", "ok\0", "", "\0", "ok"], tokens=64)
def test_scores_and_order_come_back_bit_for_bit_whatever_they_are(tmp_path_factory, values, statuses, tokens):
    folder = tmp_path_factory.mktemp("checkpoint")
    *values, ira = values
    status = np.array(statuses, dtype=object)
    scores = Scores(*values, answer_tokens=np.arange(5) * tokens, ifd_status=status, further={"ira": ira})
    order = {"positions": np.array([4, 0, 4], dtype=np.int64), "bins": np.array([1, 2], dtype=np.int64)}
    saved = json.loads(json.dumps(save_selection(folder, order, scores)))
    found_order, found = load_selection(folder, saved, 5)
    assert found_order.keys() == order.keys()
    assert all(same_bits(found_order[name], order[name]) for name in order)
    assert found.ifd_status.tolist() == statuses
    assert found.columns().keys() == scores.columns().keys() == {*IFD_COLUMNS, "ira"}
    for name, column in scores.columns().items():
        if name != "ifd_status":
            assert same_bits(found.columns()[name], column), name


def test_an_order_without_scores(tmp_path):
    saved = save_selection(tmp_path, {"positions": np.arange(3)}, None)
    order, scores = load_selection(tmp_path, saved, 7)
    assert order["positions"].tolist() == [0, 1, 2]
    assert scores is None


def test_scores_of_another_number_of_rows_are_refused(tmp_path):
    saved = save_selection(tmp_path, {"positions": np.arange(3)}, Scores.unscored(5, "truncated"))
    with pytest.raises(ValueError, match="is damaged, or of another checkpoint"):
        load_selection(tmp_path, saved, 6)


# ---- in a run ---------------------------------------------------------------------------------------------------


def scored_set(columns):
    """Rows with the columns of `IFDScorer`, all `ok` and without the losses unless `columns` says otherwise."""
    rows = text_rows(raw_rows(ROWS))
    given = {
        "cas": [None] * ROWS,
        "das": [None] * ROWS,
        "ifd": [0.05 * (i + 1) for i in range(ROWS)],
        "ifd_ppl": [None] * ROWS,
        "answer_tokens": [3] * ROWS,
        "ifd_status": ["ok"] * ROWS,
    }
    for name, values in (given | columns).items():
        rows = rows.add_column(
            name, np.array(values, dtype=np.float64) if name in ("cas", "das", "ifd_ppl") else values
        )
    return rows


def selecting(folder, rows=ROWS, **options):
    trainer = sft_trainer(folder, rows, num_train_epochs=2, save_strategy="steps", save_steps=1)
    return trainer, select(trainer, **{"keep": 6, "max_ifd": INF, "freeze_after": 0, **options})


COLUMNS = {
    "no losses": {},
    "losses that disagree": {"cas": [1.0 + i for i in range(ROWS)], "das": [2.0] * ROWS},
    "statuses of select": {"ifd_status": ["failed", "above_limit", "below_cut", "kept", "refusal"] + ["ok"] * 11},
    "statuses of others": {"ifd_status": ["ok"] * 14 + ["no answer, she said: \u2013", ""]},
}


# Each kind of columns, and each place in the run.
@pytest.mark.parametrize(
    ("step", "kind"), [*((3, kind) for kind in COLUMNS), (2, "losses that disagree"), (5, "statuses of others")]
)
def test_a_run_on_imported_scores_is_resumed_with_the_same_rows_in_the_same_order(tmp_path, kind, step):
    columns = COLUMNS[kind]
    whole, callback = selecting(tmp_path / "whole", scored_set(columns), scorer="columns", every=1)
    through = train(whole)
    status = columns.get("ifd_status", ["ok"] * ROWS)
    best = [i for i in reversed(range(ROWS)) if status[i] == "ok"][:6]
    assert [set(epoch) for epoch in through.epochs()] == [{100 + i for i in best}] * 2

    cut, _ = selecting(tmp_path / "cut", scored_set(columns), scorer="columns")
    cut.add_callback(Stop(step))
    before = train(cut)
    trainer, resumed = selecting(tmp_path / "cut", scored_set(columns), scorer="columns")
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert before.order() + after.order() == through.order()
    assert difference(weights_of(trainer.model), weights_of(whole.model)) == 0.0
    scores, last = (scores_in(tmp_path / name / "checkpoint-6").columns() for name in ("whole", "cut"))
    for name, column in scores.items():
        found = last[name]
        assert found.tolist() == column.tolist() if name == "ifd_status" else same_bits(found, column), name
    for epoch in range(2):
        assert resumed.history.rows(epoch).equals(callback.history.rows(epoch))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    trainer, callback = selecting(folder)
    seen = train(trainer)
    return SimpleNamespace(folder=folder, seen=seen, callback=callback, weights=weights_of(trainer.model))


def copy_of(whole, folder, step):
    return shutil.copytree(whole.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")


def selection_in(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state, state["stateful_callbacks"]["IFDSelectionCallback"]["attributes"]["selection"]


def scores_in(checkpoint):
    return load_selection(checkpoint, selection_in(checkpoint)[1], ROWS)[1]


def test_trainer_state_holds_nothing_that_grows_with_the_pool(whole):
    _, saved = selection_in(whole.folder / "checkpoint-2")
    assert (len(saved[FILE]), saved["version"], saved["epoch"], saved["scored_at"]) == (32, 4, 0, 0)
    grown = {name: value for name, value in saved.items() if len(str(value)) > 300 and name != "plan"}
    assert grown == {}
    order, scores = load_selection(whole.folder / "checkpoint-2", saved, ROWS)
    assert [100 + row for row in order["positions"]] == whole.seen.epochs()[0]
    assert len(scores) == ROWS


def test_the_file_is_whole_before_trainer_state_is_written(tmp_path, monkeypatch):
    trainer, _ = selecting(tmp_path)
    found, save = [], TrainerState.save_to_json

    def saved(state, path):
        if Path(path).parent.name.startswith("checkpoint-"):
            blob = state.stateful_callbacks["IFDSelectionCallback"]["attributes"]["selection"]
            order, _ = load_selection(Path(path).parent, blob, ROWS)
            found.append(len(order["positions"]))
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", saved)
    trainer.train()
    assert found == [6] * 6


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "missing": (lambda path: path.unlink(), r"checkpoint-4 has no ifd_selection\.npz"),
    "flipped": (flipped, r"checkpoint-4/ifd_selection\.npz is damaged"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-9]), r"ifd_selection\.npz is damaged"),
    "empty": (lambda path: path.write_bytes(b""), r"ifd_selection\.npz is damaged"),
    "of another checkpoint": (
        lambda path: shutil.copy(path.parent.parent / "checkpoint-1" / FILE, path),
        r"ifd_selection\.npz is damaged, or of another checkpoint",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), r"ifd_selection\.npz cannot be read"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_before_anything_is_trained(tmp_path, whole, damage, words):
    checkpoint = copy_of(whole, tmp_path, 4)
    copy_of(whole, tmp_path, 1)
    damage(checkpoint / FILE)
    trainer, callback = selecting(tmp_path)
    with pytest.raises(ValueError, match=f"{words}.*resume from another one, or start training anew"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    assert callback.state()["attributes"] == {}  # nothing that the next checkpoint would keep
    assert not (tmp_path / "ifd_history").exists()


def test_a_checkpoint_that_holds_only_this_file_was_cut_off(tmp_path, whole):
    checkpoint = copy_of(whole, tmp_path, 4)
    for path in checkpoint.iterdir():
        if path.name != FILE:
            path.unlink()
    trainer, _ = selecting(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 has no trainer_state\.json, .*probably cut off"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # transformers 4.57, of files made at once
def test_checkpoints_are_deleted_and_kept_with_their_file(tmp_path):
    trainer, _ = selecting(tmp_path)
    trainer.args.save_total_limit, trainer.args.save_only_model = 2, True
    trainer.train()
    assert sorted(path.parent.name for path in tmp_path.glob(f"checkpoint-*/{FILE}")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
    assert not list(tmp_path.rglob(".ifd_selection*"))


# ---- checkpoints of earlier versions --------------------------------------------------------------------------------

STATUSES_2 = ["ok", "empty_answer", "too_short", "truncated", "prompt_too_long", "nonfinite", "malformed"]


def text_of(array, dtype):
    return base64.b64encode(zlib.compress(np.asarray(array, dtype=dtype).tobytes())).decode("ascii")


def with_reprs(saved):
    """What a checkpoint said of policy, schedule and warm-up before version 4: their repr."""
    return saved | {name: as_text(saved[name]) for name in ("policy", "schedule", "warmup")}


def rewrite(checkpoint, change):
    state, saved = selection_in(checkpoint)
    state["stateful_callbacks"]["IFDSelectionCallback"]["attributes"]["selection"] = change(saved)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))


def to_version_2(checkpoint):
    """All arrays as text in trainer_state.json."""
    _, saved = selection_in(checkpoint)
    order, scores = load_selection(checkpoint, saved, ROWS)
    old = {name: value for name, value in saved.items() if name not in (FILE, "scored_at")}
    old |= {name: text_of(array, np.int64) for name, array in order.items()} | {"version": 2}
    if scores is not None:
        codes = [STATUSES_2.index(status) for status in scores.ifd_status]
        parts = {"cas": text_of(scores.cas, float), "das": text_of(scores.das, float)}
        parts |= {"answer_tokens": text_of(scores.answer_tokens, np.int64), "status": text_of(codes, np.int64)}
        old["scores"] = {"epoch": saved["scored_at"], **parts}
    rewrite(checkpoint, lambda _: with_reprs(old))
    (checkpoint / FILE).unlink()


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: with_reprs(saved) | {"version": 3},
        lambda saved: saved | {"policy": {"type": "Cherry", "max_ifd": "inf"}},  # before it had the other fields
        lambda saved: saved | {"schedule": {"type": "users_own.Constant", "keep": 6}},
    ],
    ids=["version 3", "a field fewer", "another module"],
)
def test_a_checkpoint_that_says_the_same_otherwise_is_resumed_exactly(tmp_path, whole, change):
    checkpoint = copy_of(whole, tmp_path, 3)
    rewrite(checkpoint, change)
    trainer, _ = selecting(tmp_path)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert after.order() == whole.seen.order()[6:]
    assert difference(weights_of(trainer.model), whole.weights) == 0.0


@pytest.mark.parametrize("version", [3, 4])
def test_what_the_version_before_says_is_held_against_today(tmp_path, whole, version):
    checkpoint = copy_of(whole, tmp_path, 3)
    policy = {"type": "Cherry", "max_ifd": 1.5, "score": "ifd", "on_shortfall": "repeat"}
    rewrite(
        checkpoint, lambda saved: saved | {"version": version, "policy": as_text(policy) if version == 3 else policy}
    )
    trainer, _ = selecting(tmp_path)
    words = r"exactly: policy: Cherry\(max_ifd=1.5, .*\) in the checkpoint, Cherry\(max_ifd=inf, score='ifd', .* now\."
    with pytest.raises(ValueError, match=words):
        train(trainer, resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_checkpoint_of_the_version_before_is_resumed_exactly(tmp_path, whole, step):
    checkpoint = copy_of(whole, tmp_path, step)
    to_version_2(checkpoint)
    trainer, _ = selecting(tmp_path)
    after = train(trainer, resume_from_checkpoint=str(checkpoint))
    assert after.order() == whole.seen.order()[2 * step :]
    assert difference(weights_of(trainer.model), whole.weights) == 0.0
    last = tmp_path / "checkpoint-6"
    assert same_bits(scores_in(last).ifd, scores_in(whole.folder / "checkpoint-6").ifd)
    assert selection_in(last)[1]["scored_at"] == 0


def test_the_version_before_lost_imported_scores_so_they_are_read_from_the_set_again(tmp_path):
    rows = scored_set(COLUMNS["losses that disagree"])
    whole, _ = selecting(tmp_path, rows, scorer="columns")
    through = train(whole)
    to_version_2(tmp_path / "checkpoint-2")
    trainer, _ = selecting(tmp_path, rows, scorer="columns")
    after = train(trainer, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert after.order() == through.order()[4:]


def test_statuses_of_the_version_before_are_those_of_today():
    assert set(STATUSES_2) <= {status.value for status in Status}
