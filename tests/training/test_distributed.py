"""Two processes: the same order and the same steps on both, rows dealt out as documented, and exact resuming.

Under DDP, FSDP and DeepSpeed ZeRO-3, on CPUs. One launch of `distributed_run.py` does all runs of a kind; the tests
read what each process wrote. A launch that takes too long is ended with all its processes, and its output shown.
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain, cycle, islice
from pathlib import Path

import distributed_run
import numpy as np
import pytest
import torch
import transformers
from distributed_run import CASES, RESUME_FROM, RESUMES, ROWS, SEES, SHARDED, WEIGHTED
from launching import WORLD, launch
from tiny_runs import PEAK, difference, model_with, select, sft_trainer, weights_of
from trl import SFTConfig
from weighted_steps import descended, losses_of, rows_of

from ifd_trainer.training.history import History

BATCH = 2
# Updates in each epoch, by hand: a global batch holds 4 rows, with split_batches 2.
UPDATES = {
    "base": [4, 3, 5],
    "uneven": [3, 4, 2],
    "accumulation": [3, 2],
    "workers": [3, 2, 2],
    "group_by_length": [4, 3],
    "bf16": [3, 3],
    "split_batches": [5, 4],
    "drop_last": [2, 2],
    "max_steps": [3, 1],
    "in_step": [3, 2],
    "calibrated": [2, 2],
    "guarded": [2, 2],
    "candidates": [2, 2],
    "targets": [2, 2],
    "parts": [4, 2],
    "candidates_in_parts": [4, 2],
    "bad_cases": [2, 2],
    "one_row": [1],
    "cherry": [2, 2, 2],
}
RUNS = [("ddp", case) for case in CASES]
RUNS += [("fsdp", case) for case in (*SHARDED, "bf16", "cherry")] + [("zero3", case) for case in SHARDED]
DDP_RESUMES = pytest.mark.skipif(
    not RESUMES, reason=f"DDP resumes on CPUs since transformers 5.18; this is {transformers.__version__}"
)
each_run = pytest.mark.parametrize(("kind", "case"), RUNS)


# ---- launching --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Says where the runs of a kind are, after launching them once."""
    folders: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind == "zero3" and not find_spec("deepspeed"):
            pytest.skip("needs deepspeed")
        if kind != "ddp" and torch.cuda.is_available():
            pytest.skip("makes accelerate believe that processors are accelerators; there are real ones here")
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            code, text = launch(kind, folders[kind])
            if code:
                pytest.fail(f"The launch failed with exit code {code}:\n{text[-8000:]}")
        if not (folders[kind] / f"rank{WORLD - 1}.json").exists():
            pytest.fail(f"The launch of {kind} had failed.")
        return folders[kind]

    return of


@pytest.fixture(scope="module")
def ranks_of(launched):
    """Says what each process did in the runs of a kind, by case."""
    return lambda kind: [json.loads((launched(kind) / f"rank{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture
def ranks(ranks_of, request):
    """What each process did, by case; under DDP unless the test names a kind."""
    return ranks_of(request.node.callspec.params.get("kind", "ddp") if hasattr(request.node, "callspec") else "ddp")


# ---- what is expected -------------------------------------------------------------------------------------------


def dealt(case: str, order: list[int]) -> list[list[list[int]]]:
    """The batches of each process for an epoch's order: filled up with its first rows, or cut with drop_last."""
    _, settings = CASES[case]
    batch = BATCH // WORLD if "accelerator_config" in settings else BATCH
    whole = batch * WORLD
    full, rest = divmod(len(order), whole)
    up = bool(rest) and not settings.get("dataloader_drop_last")
    rows = list(islice(cycle(order), (full + up) * whole))
    firsts = range(0, len(rows), whole)
    return [[rows[first + rank * batch :][:batch] for first in firsts] for rank in range(WORLD)]


def updates(run: dict) -> list[list[list[int]]]:
    """The batches of each update of a run, in order."""
    return list(chain(*run["batches"]))


# ---- tests ------------------------------------------------------------------------------------------------------


@each_run
def test_both_processes_take_the_same_steps_in_the_same_order(ranks, kind, case):
    one, other = (found[case] for found in ranks)
    assert one["processes"] == other["processes"] == WORLD
    for key in (
        "orders",
        "ifd",
        "limits",
        "shares",
        "global_step",
        "max_steps",
        "epoch",
        "learning_rates",
        "weights",
        "leftovers",
    ):
        assert one[key] == other[key], key
    assert [len(epoch) for epoch in one["batches"]] == UPDATES[case]
    assert len(one["orders"]) == len(UPDATES[case])
    assert one["global_step"] == one["max_steps"] == sum(UPDATES[case])
    assert one["epoch"] == pytest.approx(1.5 if case == "max_steps" else len(UPDATES[case]))
    phases = [UPDATES[case][0], sum(UPDATES[case][1:])] if case == "cherry" else [sum(UPDATES[case])]
    expected = [PEAK * (steps - step) / steps for steps in phases for step in range(steps)]
    assert one["learning_rates"] == pytest.approx([*expected, 0])
    assert one["leftovers"] == []


@each_run
def test_each_process_trains_on_its_part_of_the_order_and_the_documented_repeats(ranks, kind, case):
    step = CASES[case][1].get("gradient_accumulation_steps", 1)
    for epoch, order in enumerate(ranks[0][case]["orders"]):
        assert len(set(order)) == len(order)
        for found, batches in zip(ranks, dealt(case, order), strict=True):
            expected = [batches[start : start + step] for start in range(0, len(batches), step)]
            assert found[case]["batches"][epoch] == expected[: UPDATES[case][epoch]]


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"drop_last", "max_steps"}))
def test_the_order_is_trained_and_only_its_first_rows_are_repeated(ranks, case):
    for epoch, order in enumerate(ranks[0][case]["orders"]):
        trained = Counter(row for found in ranks for update in found[case]["batches"][epoch] for row in chain(*update))
        missing = -len(order) % (BATCH if case == "split_batches" else BATCH * WORLD)
        assert trained == Counter(order) + Counter(islice(cycle(order), missing))


@each_run
def test_scoring_takes_the_same_forwards_on_each_process_and_shares_the_tokens(ranks, kind, case):
    one, other = (found[case] for found in ranks)
    assert one["forwards"] == other["forwards"]
    assert all(count > 0 for count in one["forwards"])
    for chunks in zip(one["tokens"], other["tokens"], strict=True):
        tokens = np.array(chunks)  # (processes, chunks)
        assert tokens.shape[1] == (3 if case == "in_step" else 1)
        assert np.abs(tokens[0] - tokens[1]).max() <= one["longest"]
    if case == "one_row":
        assert [0] in (one["tokens"][0], other["tokens"][0])


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"bf16"}))
def test_the_selection_is_that_of_a_single_process(ranks, case, tmp_path):
    alone = distributed_run.run(case, tmp_path, per_device_train_batch_size=BATCH * WORLD)
    assert alone["processes"] == 1
    found = ranks[0][case]
    # Later epochs start from the same weights only where batches, and what dropout draws, are the same.
    epochs = len(alone["orders"]) if case == "in_step" else 1
    for epoch in range(epochs):
        # The brief experience, in batches of another size, comes before the first scores of that case.
        tolerance = 1e-4 if case == "cherry" else 1e-5
        np.testing.assert_allclose(found["ifd"][epoch], alone["ifd"][epoch], rtol=0, atol=tolerance)
        assert found["orders"][epoch] == alone["orders"][epoch]
        assert (found["limits"][epoch] is None) == (case not in ("calibrated", "guarded"))
        assert found["limits"][epoch] == (alone["limits"][epoch] and pytest.approx(alone["limits"][epoch], abs=1e-5))


def test_in_bf16_scores_differ_from_those_of_a_single_process_by_its_rounding(ranks, tmp_path):
    alone = distributed_run.run("bf16", tmp_path, per_device_train_batch_size=BATCH * WORLD)
    ifd, found = np.array(alone["ifd"][0]), np.array(ranks[0]["bf16"]["ifd"][0])
    # A matrix product of 8 bits depends on what else is in the batch.
    np.testing.assert_allclose(found, ifd, rtol=2**-8, atol=0)
    cut = np.sort(ifd)[-len(alone["orders"][0])]
    clear = {100 + row for row in np.flatnonzero(np.abs(ifd / cut - 1) > 2**-7)}  # row ids count from 100
    assert clear & set(ranks[0]["bf16"]["orders"][0]) == clear & set(alone["orders"][0])
    assert len(clear) > len(ifd) // 2


@pytest.mark.parametrize(("kind", "case"), [run for run in RUNS if run[0] != "ddp"])
def test_sharded_weights_change_neither_scores_nor_rows_nor_losses(ranks, ranks_of, kind, case):
    found, expected = ranks[0][case], ranks_of("ddp")[0][case]
    if case == "bf16":  # FSDP rounds the weights to 8 bits, autocast the products: near ties fall otherwise
        np.testing.assert_allclose(found["ifd"][0], expected["ifd"][0], rtol=2**-5, atol=0)
        return
    np.testing.assert_allclose(found["ifd"][0], expected["ifd"][0], rtol=0, atol=1e-5)
    assert found["orders"] == expected["orders"]
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=DDP_RESUMES), "fsdp", "zero3"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(ranks, kind):
    for found in ranks:
        whole, resumed = found["base"], found["resumed"]
        assert updates(resumed) == updates(whole)[RESUME_FROM:]
        assert resumed["orders"] == whole["orders"][1:]
        assert resumed["ifd"] == whole["ifd"][2:]  # the second epoch goes on, and is not scored again
        assert resumed["learning_rates"] == whole["learning_rates"][RESUME_FROM:]
        for key in ("global_step", "max_steps", "epoch", "weights"):
            assert resumed[key] == whole[key], key


def test_only_the_main_process_writes_the_history(launched, ranks):
    folder = launched("ddp")
    for case, epochs in UPDATES.items():
        if "parts" in case:
            continue
        files = {f"epoch-{epoch:03d}.parquet" for epoch in range(len(epochs))} | {"history.json", "pool.parquet"}
        assert set(ranks[0][case]["written"]) == files
        assert ranks[1][case]["written"] == []
        history = History.load(folder / case)
        assert [record["epoch"] for record in history.epochs] == list(range(len(epochs)))
        for epoch in range(len(epochs)):
            rows = history.rows(epoch)
            trained = {
                row for rank in ranks for update in rank[case]["batches"][epoch] for batch in update for row in batch
            }
            assert set(rows.loc[rows["times"] > 0, "row_id"]) == trained
            if case == "cherry" and not epoch:
                assert rows["ifd"].isna().all()
            elif case == "candidates" and epoch:  # some of its rows alone
                assert 0 < history.record(epoch)["fresh"] == (rows["scored_at"] == epoch).mean() < 1
            else:
                assert rows["ifd"].tolist() == ranks[0][case]["ifd"][epoch - (case == "cherry")]


def test_both_processes_choose_the_rows_of_each_part(launched, ranks):
    history = History.load(launched("ddp") / "parts")
    assert [(record["epoch"], record.get("part")) for record in history.epochs] == [(0, 1), (0, 2), (1, None)]
    trained = [row for rank in ranks for update in rank["parts"]["batches"][0][2:] for row in chain(*update)]
    second = history.rows(0, 2)
    assert sorted(trained) == sorted(second.loc[second["times"] > 0, "row_id"])
    assert (second["reason"] == "earlier_part").sum() == 8
    scored = np.array(ranks[0]["parts"]["ifd"][1], dtype=float)  # of the second part
    assert np.isnan(scored).sum() == 8
    best = second.loc[np.argsort(-np.nan_to_num(scored, nan=-np.inf))[:8], "row_id"]
    assert sorted(best) == sorted(trained)


@pytest.mark.parametrize("case", WEIGHTED)
def test_rows_weigh_as_in_a_single_process(ranks, launched, tmp_path, case):
    updates = [[*one, *other] for one, other in zip(*(found["weighted"][case] for found in ranks), strict=True)]
    alone = sft_trainer(tmp_path, ROWS, **WEIGHTED[case])
    rows, start = rows_of(select(alone)), weights_of(alone.model)
    history = History.load(launched("ddp") / case).rows(0)
    weights = history["weight"].to_numpy()
    assert history["weight"].nunique() == 2
    assert sorted({row for update in updates for row in update}) == np.flatnonzero(history["times"]).tolist()
    found = torch.load(launched("ddp") / case / "weights.pt")
    assert difference(found, descended(start, rows, updates, weights)) < 2e-5
    assert difference(found, descended(start, rows, updates, np.ones(ROWS))) > 1e-3
    assert (history["train_loss"].notna() == (history["times"] > 0)).all()
    first = model_with(start)
    for row in set(updates[0]) - {row for update in updates[1:] for row in update}:  # before anything was trained
        assert history["train_loss"][row] == pytest.approx(losses_of(first, rows[row]).mean().item(), rel=1e-4)


@pytest.mark.skipif(not SEES, reason="rows with images are collated as they are here since trl 1.8")
def test_rows_with_images_are_scored_and_trained_on_by_both(launched, ranks):
    from vision_models import build, by_hand, image_rows

    model, processor = build("llava")
    rows, history = image_rows(9), History.load(launched("ddp") / "seeing")
    for epoch in range(2):
        if epoch:
            model.load_state_dict(torch.load(launched("ddp") / "seeing" / "weights.pt"))
        cas, das = (np.array([by_hand(model, processor, row, given) for row in rows]) for given in ("both", "nothing"))
        found = history.rows(epoch).sort_values("row_id")
        np.testing.assert_allclose(found["cas"], cas, rtol=1e-4)
        np.testing.assert_allclose(found["das"], das, rtol=1e-4)
        best = {rows[i]["row_id"] for i in np.argsort(-cas / das)[:5]}
        one, other = (found["seeing"][epoch] for found in ranks)
        assert len(one) == len(other) == 3
        assert {*one, *other} == best
        assert len({*one} & {*other}) <= 1  # of five rows on two processes, the first is trained on once more


@pytest.fixture(scope="module")
def failed(tmp_path_factory):
    """(folder, exit code, output) of a launch that ends with a process that fails."""
    folder = tmp_path_factory.mktemp("apart")
    return folder, *launch("apart_and_fail", folder)


def test_machines_without_a_shared_disk_begin_anew_from_the_same_weights(ranks, failed):
    folder, _, text = failed
    for rank in range(WORLD):
        assert (folder / f"rank{rank}.json").exists(), text[-8000:]
        found = json.loads((folder / f"rank{rank}.json").read_text())
        assert {key: found[key] for key in ("orders", "weights", "losses")} == {
            key: ranks[0]["cherry"][key] for key in ("orders", "weights", "losses")
        }
        assert not (folder / f"machine{rank}" / "ifd_original").exists()


def test_a_process_that_fails_ends_the_launch(failed):
    _, code, text = failed
    assert code != 0
    assert "OSError: this process has lost its data" in text


def test_uneven_batches_are_refused(tmp_path, monkeypatch):
    trainer = sft_trainer(tmp_path, accelerator_config={"even_batches": False})
    select(trainer)  # harmless with one process
    monkeypatch.setattr(SFTConfig, "world_size", WORLD)
    monkeypatch.setattr(SFTConfig, "main_process_first", lambda self, **_: nullcontext())  # there is no other one
    with pytest.raises(ValueError, match="even_batches=False gives some processes a batch more than others"):
        select(trainer)
    trainer.args.dataloader_drop_last = True
    select(trainer)
