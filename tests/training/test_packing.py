"""Packing: bins of whole examples, and which of them each epoch trains on, in how many steps."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import ROUNDING, build_model
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import (
    BFD_SPLIT,
    FIVE,
    INF,
    TOKENIZER,
    Stop,
    Witness,
    as_trained,
    difference,
    model_with,
    raw_rows,
    reference_scores,
    select,
    sft_trainer,
    text_rows,
    tokenised,
    weights_of,
)
from trl import pack_dataset

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.method.schedule import Anneal, Curriculum
from ifd_trainer.method.selection import Cherry, ShortfallError
from ifd_trainer.report.page import write_report
from ifd_trainer.training.packing import PackedRows, best_fit_decreasing, largest, spread, unpack
from ifd_trainer.training.pool import PackedPool

CAPACITY = 96
PACKED = {"packing": True, "max_length": CAPACITY, "per_device_train_batch_size": 1}


def trl_rows(lengths, capacity):
    """TRL's packed rows of examples whose tokens say which example they are of."""
    ids = [[number] * length for number, length in enumerate(lengths)]
    return pack_dataset(Dataset.from_dict({"input_ids": ids, "labels": ids}), capacity, "bfd")


def slow_bins(lengths, capacity):
    """Number of bins of best-fit decreasing, by looking at every bin for every example."""
    free = []
    for length in sorted(lengths, reverse=True):
        room = [space for space in free if space >= length]
        if room:
            free.remove(min(room))
        free.append((min(room) if room else capacity) - length)
    return len(free)


def packed_examples(trainer):
    """(input_ids, labels) of the examples in a trainer's packed rows, cut one by one."""
    examples = []
    for row in (as_trained(trainer, row) for row in trainer.train_dataset):
        start = 0
        for length in row["seq_lengths"]:
            examples.append((row["input_ids"][start : start + length], row["labels"][start : start + length]))
            start += length
    return examples


# ---- bins -------------------------------------------------------------------------------------------------------

lengths_of = st.lists(st.integers(1, 30), max_size=80)


@given(lengths_of, st.integers(30, 60))
def test_bins_are_a_partition_within_the_capacity(lengths, capacity):
    bins = best_fit_decreasing(lengths, capacity)
    assert sorted(index for members in bins for index in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in members) <= capacity for members in bins)
    assert len(bins) == slow_bins(lengths, capacity)
    assert len(bins) >= -(-sum(lengths) // capacity)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.integers(30, 60))
def test_as_many_bins_as_trl(lengths, capacity):
    assert len(best_fit_decreasing(lengths, capacity)) == len(trl_rows(lengths, capacity))


def test_as_many_bins_as_trl_on_a_thousand_lengths():
    lengths = np.random.default_rng(0).lognormal(4.5, 0.8, 1000).astype(int).clip(1, 1024)
    assert len(best_fit_decreasing(lengths, 1024)) == len(trl_rows(lengths.tolist(), 1024))


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_what_cannot_be_packed_is_refused(lengths):
    with pytest.raises(ValueError, match="cannot be packed into bins of 10"):
        best_fit_decreasing(lengths, 10)


@given(lengths_of.filter(bool), st.data())
def test_spread_makes_more_bins_of_the_same_examples(lengths, data):
    bins = best_fit_decreasing(lengths, 30)
    count = data.draw(st.integers(len(bins), len(lengths)))
    more = spread(bins, count)
    assert len(more) == count
    assert sorted(index for members in more for index in members) == list(range(len(lengths)))
    assert all(members for members in more)


@given(st.integers(1, 50), st.integers(0, 50))
def test_the_largest_number_that_fits_is_found(limit, more):
    assert largest(lambda n: n <= limit, 1, limit + more) == limit


@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_unpacking_undoes_packing(lengths):
    packed = trl_rows(lengths, 30)
    examples = unpack(packed.with_format("arrow")[:])
    ids = examples["input_ids"].to_pylist()
    assert ids == examples["labels"].to_pylist()
    assert sorted(ids) == [[number] * length for number, length in enumerate(lengths)]
    assert [len(row) for row in ids] == [length for row in packed["seq_lengths"] for length in row]


def test_lengths_that_do_not_add_up_are_refused():
    with pytest.raises(ValueError, match="seq_lengths add up to 3 tokens, but input_ids has 2"):
        unpack(pa.table({"input_ids": [[1, 2]], "labels": [[1, 2]], "seq_lengths": [[1, 2]]}))


def test_a_bin_is_read_as_trl_writes_a_packed_row():
    examples = Dataset.from_dict({"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[-100, 2], [3], [4, 5, 6]]})
    rows = PackedRows(examples, 2)
    assert rows[(2, 0, 2)] == {
        "input_ids": [4, 5, 6, 1, 2, 4, 5, 6],
        "labels": [4, 5, 6, -100, 2, 4, 5, 6],
        "seq_lengths": [3, 2, 3],
    }
    assert len(rows) == 2


# ---- from a budget in bins to examples --------------------------------------------------------------------------


def pool_of(lengths, capacity):
    return PackedPool(trl_rows(lengths, capacity), capacity)


def policy_on(scores, **options):
    columns = {"ifd": np.asarray(scores), "ifd_status": np.array(["ok"] * len(scores))}
    return lambda rows: Cherry(**options)(columns, rows, rng=np.random.default_rng(3))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.floats(0, 1), st.integers(0, 9))
def test_examples_are_taken_from_the_top_until_the_next_needs_another_bin(lengths, share, seed):
    pool = pool_of(lengths, 20)
    budget = max(1, round(share * pool.training_rows))
    scores = np.random.default_rng(seed).permutation(len(lengths)) / len(lengths)
    selection = pool.choose(budget, policy_on(scores))
    rank, of = np.argsort(-scores).tolist(), pool.lengths(np.arange(len(pool)))
    count = len(selection.kept)
    assert selection.kept.tolist() == rank[:count]
    assert slow_bins(of[rank[:count]], 20) <= budget
    assert count == len(pool) or slow_bins(of[rank[: count + 1]], 20) > budget
    bins = pool.arrange(selection.kept, budget)
    assert len(bins) == budget
    assert sorted(i for members in bins for i in members) == sorted(rank[:count])
    assert all(sum(of[i] for i in members) <= 20 for members in bins)


@given(
    st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=1, max_size=30).filter(
        lambda e: any(dict(e).values())
    ),
    st.sampled_from(["repeat", "relax"]),
)
def test_all_planned_bins_are_filled_however_few_examples_are_eligible(examples, way):
    lengths, eligible = zip(*examples, strict=True)
    pool = pool_of(lengths, 20)
    # The numbers of TRL's examples are their tokens: eligible ones are found again in the pool.
    tokens = [ids[0] for ids, _ in pool.tokens()]
    scores = np.array([0.5 if eligible[number] else 1.5 for number in tokens]) + np.arange(len(tokens)) / 1000
    selection = pool.choose(pool.training_rows, policy_on(scores, on_shortfall=way))
    bins = pool.arrange(selection.kept, pool.training_rows)
    of = pool.lengths(np.arange(len(pool)))
    assert len(bins) == pool.training_rows
    assert all(0 < sum(of[i] for i in members) <= 20 for members in bins)
    assert sorted(i for members in bins for i in members) == sorted(selection.kept)
    assert set(np.flatnonzero(scores < 1)) <= set(selection.kept)
    assert way == "relax" or (scores[selection.kept] < 1).all()


def test_all_bins_take_all_examples():
    pool = pool_of([7, 9, 3, 12, 5, 5, 1], 16)
    selection = pool.choose(pool.training_rows, policy_on(np.linspace(0.1, 0.9, 7)))
    assert sorted(selection.kept) == list(range(7))
    assert selection.shortfall == 0


def shortfall():
    """Twelve examples of 5 tokens in bins of 10, six of them (3 bins) eligible; the budget is 5 bins."""
    return pool_of([5] * 12, 10), np.r_[np.linspace(0.4, 0.9, 6), np.linspace(1.1, 1.6, 6)]


def test_a_shortfall_of_bins_is_filled_with_repeats():
    pool, scores = shortfall()
    kept = pool.choose(5, policy_on(scores)).kept
    times = np.bincount(kept, minlength=12)
    assert len(kept) == 10
    assert set(times[:6]) == {1, 2}
    assert not times[6:].any()
    assert len(pool.arrange(kept, 5)) == 5


def test_many_repeats_fill_all_bins():
    pool, scores = shortfall()
    scores[:5] = 2.0
    selection = pool.choose(5, policy_on(scores))
    assert selection.kept.tolist() == [5] * 10
    assert [len(members) for members in pool.arrange(selection.kept, 5)] == [2] * 5


def test_a_shortfall_of_bins_is_relaxed_by_the_nearest():
    pool, scores = shortfall()
    assert sorted(pool.choose(5, policy_on(scores, on_shortfall="relax")).kept) == list(range(10))


def test_a_shortfall_of_bins_is_an_error_that_counts_bins():
    pool, scores = shortfall()
    with pytest.raises(ShortfallError, match="5 packed rows are to be trained, but the eligible examples fill 3: "):
        pool.choose(5, policy_on(scores, on_shortfall="error"))
    assert len(pool.choose(3, policy_on(scores, on_shortfall="error")).kept) == 6


def test_room_in_the_last_bin_is_no_shortfall():
    pool, scores = shortfall()
    scores[0] = 2.0  # five eligible examples: the third bin is half full
    for way in ("repeat", "relax", "error"):
        selection = pool.choose(3, policy_on(scores, on_shortfall=way))
        assert sorted(selection.kept) == [1, 2, 3, 4, 5]
        assert selection.shortfall == 0


def test_no_eligible_example_is_an_error():
    pool, scores = shortfall()
    with pytest.raises(ShortfallError, match="only 0 of 12 are eligible"):
        pool.choose(1, policy_on(scores + 1))


def test_a_budget_that_the_bins_leap_over_is_filled_exactly():
    pool = pool_of([10] * 6, 20)  # a policy that leaps from one bin to three stands for best-fit decreasing
    few, many = policy_on(np.full(6, 0.5))(2), policy_on(np.full(6, 0.5))(6)
    kept = pool.choose(2, lambda rows: few if rows < 3 else many).kept
    assert [len(members) for members in pool.arrange(kept, 2)] == [1, 1]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(1, 4), st.data())
def test_parts_follow_the_ranks_and_end_where_the_next_example_needs_another_bin(lengths, parts, data):
    pool = pool_of(lengths, 20)
    ranked = np.array(data.draw(st.permutations(range(len(lengths)))))
    rows = data.draw(
        st.lists(st.integers(1, 4), min_size=parts, max_size=parts).filter(lambda r: sum(r) <= len(ranked))
    )
    divided, of = pool.divide(ranked, rows), pool.lengths(np.arange(len(pool)))
    assert np.concatenate(divided).tolist() == ranked[: sum(map(len, divided))].tolist()
    end = 0
    for number, (part, bins) in enumerate(zip(divided, rows, strict=True)):
        end += len(part)
        assert bins <= len(part)
        assert slow_bins(of[part], 20) <= bins
        reserved = end == len(ranked) - sum(rows[number + 1 :])  # an example at least for each bin that follows
        assert reserved or slow_bins(of[[*part, ranked[end]]], 20) > bins
        made = pool.arrange(part, bins)
        assert len(made) == bins
        assert sorted(i for members in made for i in members) == sorted(part)


def test_what_fits_into_all_bins_together_need_not_fit_into_parts():
    pool = pool_of([6, 6, 4, 4], 10)
    of = pool.lengths(np.arange(4))
    ranked = np.argsort(-of, kind="stable")  # 6, 6, 4, 4: two bins of 6 + 4, but in the order of the ranks 6 | 6 + 4
    assert [of[part].tolist() for part in pool.divide(ranked, [1, 1])] == [[6], [6, 4]]
    assert [of[part].tolist() for part in pool.divide(ranked[[0, 2, 1, 3]], [1, 1])] == [[6, 4], [6, 4]]


def test_bins_survive_a_checkpoint():
    pool = pool_of([5, 4, 3, 2, 1], 6)
    order = pool.arrange(np.array([4, 1, 0, 3]), 3)
    assert pool.from_arrays(pool.to_arrays(order)) == order


# ---- training ---------------------------------------------------------------------------------------------------


class PackedWitness(Witness):
    """Rows are positions in the unpacked training set; `bins` is what the sampler was given for each epoch."""

    def __post_init__(self):
        super().__post_init__()
        self.row_of = {tuple(ids): place for place, (ids, _) in enumerate(packed_examples(self.trainer))}
        self.bins = []

    def on_epoch_begin(self, args, state, control, **kwargs):
        super().on_epoch_begin(args, state, control, **kwargs)
        callback = next(c for c in self.trainer.callback_handler.callbacks if isinstance(c, IFDSelectionCallback))
        self.bins.append(list(callback.sampler.order))


def watched(trainer, **options):
    witness = PackedWitness(trainer)
    try:
        trainer.train(**options)
    finally:
        witness.leave()
    return witness


def packed_trainer(folder, rows=24, **config):
    return sft_trainer(folder, rows, **{**PACKED, **config})


def run(folder, keep=(4, 2, 3), rows=24, max_ifd=INF, order="shuffle", **config):
    """Train with packing; the trainer, its callback, and what was seen."""
    trainer = packed_trainer(folder, rows, **config)
    callback = select(trainer, keep=list(keep), max_ifd=max_ifd, order=order)
    return trainer, callback, watched(trainer)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The run that others are compared with."""
    return run(tmp_path_factory.mktemp("usual"))


def reference_choice(trainer, weights, budget, limit=INF):
    """Positions that an epoch trains on: one example more from the top as long as the bins are enough."""
    examples = packed_examples(trainer)
    rows = Dataset.from_list(
        [{"row_id": i, "input_ids": ids, "labels": labels} for i, (ids, labels) in enumerate(examples)]
    )
    stand_in = SimpleNamespace(train_dataset=rows, processing_class=TOKENIZER, data_collator=None)
    scores = reference_scores(stand_in, model_with(weights))
    ratios = {row: pair[0] / pair[1] for row, pair in scores.items() if pair is not None}
    ranked = sorted((row for row, ratio in ratios.items() if ratio < limit), key=lambda row: -ratios[row])
    chosen = []
    for row in ranked:
        if slow_bins([len(examples[i][0]) for i in [*chosen, row]], CAPACITY) > budget:
            break
        chosen.append(row)
    return chosen


def test_the_pool_is_exactly_the_tokenised_examples(tmp_path, usual):
    plain = tokenised(sft_trainer(tmp_path, 24, max_length=CAPACITY))
    before = sorted(zip(plain["input_ids"], plain["labels"], strict=True))
    assert sorted((list(ids), list(labels)) for ids, labels in usual[1].pool.tokens()) == [
        (list(ids), list(labels)) for ids, labels in before
    ]
    assert list(usual[1].pool.tokens()) == packed_examples(usual[0])


def test_each_epoch_trains_the_examples_that_fill_its_bins(usual):
    trainer, callback, seen = usual
    for epoch, rows in enumerate(seen.epochs()):
        expected = reference_choice(trainer, seen.weights[epoch], [4, 2, 3][epoch])
        assert sorted(rows) == sorted(expected)
        history = callback.history.rows(epoch)
        assert history["row_id"].tolist() == list(range(24))
        assert sorted(history["row_id"][history["times"] > 0]) == sorted(expected)
    assert len({frozenset(rows) for rows in seen.epochs()}) == 3


@pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
def test_parts_of_an_epoch_are_so_many_packed_rows_of_the_examples_that_are_left(tmp_path):
    trainer = packed_trainer(tmp_path, num_train_epochs=1, save_strategy="steps", save_steps=3)
    callback = select(trainer, keep=4, max_ifd=INF, every_steps=2)
    seen = watched(trainer)
    assert seen.updates_per_epoch() == [4]
    first, second = ([row for update in seen.updates[at : at + 2] for row in update.rows] for at in (0, 2))
    assert sorted(first) == sorted(reference_choice(trainer, seen.weights[0], 2))
    assert len(set(first) | set(second)) == len(first) + len(second)
    rows = callback.history.rows(0, 2)
    left = rows[rows["reason"] != "earlier_part"].sort_values("ifd", ascending=False)["row_id"].tolist()
    assert sorted(left) == sorted(set(range(24)) - set(first))
    lengths = [len(ids) for ids, _ in packed_examples(trainer)]
    count = next(n for n in range(1, 25) if slow_bins([lengths[row] for row in left[: n + 1]], CAPACITY) > 2)
    assert sorted(second) == sorted(left[:count])
    assert [record["packed_rows"] for record in callback.history.epochs] == [2, 2]
    again = packed_trainer(tmp_path, num_train_epochs=1)
    select(again, keep=4, max_ifd=INF, every_steps=2)
    resumed = watched(again, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [update.rows for update in resumed.updates] == [update.rows for update in seen.updates[3:]]
    assert difference(weights_of(again.model), weights_of(trainer.model)) == 0.0


@pytest.mark.skipif(not FIVE, reason="every_steps needs transformers 5")
def test_parts_for_which_no_example_is_left_repeat_packed_rows_of_the_epoch(tmp_path):
    trainer = packed_trainer(tmp_path, num_train_epochs=1, learning_rate=0.0)
    callback = select(trainer, keep=1.0, max_ifd=1.0, every_steps=2)
    seen = watched(trainer)
    assert len(seen.updates) == seen.planned == callback.pool.training_rows
    rows = callback.history.rows(0)
    scores = callback.history.rows(0, 1)
    assert set(seen.order()) == set(scores["row_id"][scores["ifd"] < 1])
    assert np.bincount(seen.order(), minlength=24).tolist() == rows["times"].tolist()
    assert callback.history.epochs[-1]["eligible"] == 0


def test_planned_bins_are_trained_bins(usual):
    trainer, callback, seen = usual
    lengths = [len(ids) for ids, _ in packed_examples(trainer)]
    assert seen.updates_per_epoch() == [4, 2, 3]
    assert [len(bins) for bins in seen.bins] == [4, 2, 3]
    for epoch, bins in enumerate(seen.bins):
        batches = [batch for update in seen.updates if update.epoch == epoch for batch in update.batches]
        assert batches == [list(members) for members in bins]
        assert all(sum(lengths[row] for row in batch) <= CAPACITY for batch in batches)
    assert trainer.state.global_step == trainer.state.max_steps == seen.planned == 9
    assert trainer.state.epoch == 3.0
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []
    report = trainer.state.log_history[-1]
    assert report["train_samples_per_second"] / report["train_steps_per_second"] == pytest.approx(1, rel=0.02)
    assert [(p.budget, p.updates) for p in callback.plan.epochs] == [(4, 4), (2, 2), (3, 3)]


def test_a_fraction_is_one_of_the_packed_rows(tmp_path):
    trainer, callback, seen = run(tmp_path, keep=[1.0, 0.5], num_train_epochs=2)
    whole = slow_bins([len(ids) for ids, _ in packed_examples(trainer)], CAPACITY)
    assert whole == len(trainer.train_dataset) == callback.pool.training_rows
    assert [len(bins) for bins in seen.bins] == [whole, round(whole / 2)]
    assert sorted(seen.epochs()[0]) == list(range(24))


def test_accumulation_and_batches_of_two_bins(tmp_path):
    trainer, _, seen = run(tmp_path, keep=[5, 3], per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert seen.updates_per_epoch() == [2, 1, 1]
    assert [[len(update.batches) for update in seen.updates if update.epoch == e] for e in range(3)] == [
        [2, 1],
        [2],
        [2],
    ]
    for epoch, bins in enumerate(seen.bins):
        joined = [row for members in bins for row in members]
        assert seen.epochs()[epoch] == joined
        assert len(bins) == [5, 3, 3][epoch]
    assert trainer.state.epoch == 3.0
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []


@pytest.mark.parametrize(
    "config",
    [
        {"dataloader_num_workers": 2},
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=["workers", "persistent_workers", "group_by_length"],
)
def test_what_has_no_part_in_bins_changes_nothing(tmp_path, usual, config):
    trainer, _, seen = run(tmp_path, **config)
    assert seen.bins == usual[2].bins
    assert seen.epochs() == usual[2].epochs()
    assert difference(weights_of(trainer.model), weights_of(usual[0].model)) == 0.0


@pytest.mark.parametrize("order", ["descending", "ascending"])
def test_bins_are_visited_by_the_mean_rank_of_their_examples(tmp_path, order):
    _, callback, seen = run(tmp_path, order=order)
    for epoch, bins in zip(range(3), seen.bins, strict=True):
        rank = callback.history.rows(epoch)["ifd"].rank(ascending=False)
        means = [rank[list(members)].mean() for members in bins]
        assert means == sorted(means, reverse=order == "ascending")


def test_a_shortfall_repeats_eligible_examples(tmp_path):
    trainer, callback, seen = run(tmp_path, keep=[1.0], max_ifd=1.0, num_train_epochs=1)
    whole = callback.pool.training_rows
    assert len(seen.bins[0]) == seen.planned == whole
    rows = callback.history.rows(0)
    assert set(seen.epochs()[0]) == set(rows["row_id"][rows["ifd"] < 1])
    assert len(set(seen.epochs()[0])) < len(seen.epochs()[0])
    assert np.bincount(seen.epochs()[0], minlength=24).tolist() == rows["times"].tolist()
    assert trainer.state.epoch == 1.0


def test_an_example_without_an_answer_is_never_trained(tmp_path):
    raw = raw_rows(16)
    raw[3]["instruction"] += " cat dog" * 60  # its prompt fills a row: TRL packs it without its answer
    trainer, callback, seen = run(tmp_path, rows=text_rows(raw), keep=[1.0], num_train_epochs=1)
    rows = callback.history.rows(0)
    assert rows["ifd_status"].tolist().count("empty_answer") == 1
    assert len(set(seen.epochs()[0])) == 15
    assert len(seen.bins[0]) == callback.pool.training_rows == len(trainer.train_dataset)


def test_the_callback_removed_leaves_trls_packed_training(tmp_path):
    trainer, plain = packed_trainer(tmp_path, 12), packed_trainer(tmp_path, 12)
    trainer.remove_callback(select(trainer, keep=0.5))
    for each in (trainer, plain):
        each.train()
    assert difference(weights_of(trainer.model), weights_of(plain.model)) == 0.0


# ---- what a packed batch computes -------------------------------------------------------------------------------


def test_packed_examples_do_not_see_one_another(usual):
    trainer, callback, _ = usual
    loader = trainer.get_train_dataloader()
    callback.sampler.order = [tuple(range(4))]
    (batch,) = list(loader)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten()
    assert len(starts) == 4
    assert (batch["labels"][0, starts] == -100).all()

    for attention in ("sdpa", "eager"):
        model = build_model(len(TOKENIZER), attn_implementation=attention)
        with torch.no_grad():
            together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[
                0
            ]
            alone = [model(torch.tensor([ids])).logits[0] for ids, _ in packed_examples(trainer)[:4]]
        assert torch.allclose(together, torch.cat(alone), rtol=ROUNDING, atol=1e-4)


def test_the_loss_of_a_packed_batch_is_that_of_its_examples(usual):
    trainer, callback, _ = usual
    loader = trainer.get_train_dataloader()
    callback.sampler.order = [tuple(range(4))]
    (batch,) = list(loader)
    model = build_model(len(TOKENIZER))
    total, count = 0.0, 0
    with torch.no_grad():
        packed = model(**{key: batch[key] for key in ("input_ids", "position_ids", "labels")}, use_cache=False).loss
        for ids, labels in packed_examples(trainer)[:4]:
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            for i in range(1, len(ids)):  # the first token has nothing before it
                if labels[i] != -100:
                    total, count = total - log_probs[i - 1, ids[i]].item(), count + 1
    assert packed.item() == pytest.approx(total / count, rel=ROUNDING)


def test_a_run_equals_trls_own_training_on_the_same_bins(tmp_path, usual):
    trainer, _, seen = usual
    examples = packed_examples(trainer)
    plain = packed_trainer(tmp_path, num_train_epochs=1, train_sampling_strategy="sequential")
    plain.train_dataset = Dataset.from_list(
        [
            {
                "input_ids": [token for i in members for token in examples[i][0]],
                "labels": [label for i in members for label in examples[i][1]],
                "seq_lengths": [len(examples[i][0]) for i in members],
            }
            for bins in seen.bins
            for members in bins
        ]
    )
    plain.train()
    assert difference(weights_of(trainer.model), weights_of(plain.model)) == 0.0


# ---- records and resume -----------------------------------------------------------------------------------------


def test_history_and_report_tell_packed_rows_from_examples(usual):
    trainer, callback, seen = usual
    content = json.loads((callback.history.folder / "history.json").read_text(encoding="utf-8"))
    assert content["settings"]["pool"] == 24
    assert content["settings"]["packed_rows"] == len(trainer.train_dataset)
    for record, bins, rows in zip(content["epochs"], seen.bins, seen.epochs(), strict=True):
        assert (record["packed_rows"], record["budget"], record["kept"]) == (len(bins), len(rows), len(rows))
    assert callback.history.pool()["answer"].str.len().gt(0).all()
    page = write_report(trainer.args.output_dir).read_text(encoding="utf-8")
    assert "Packed rows to train on" in page


@pytest.mark.parametrize("step", [2, 4, 5], ids=["inside_the_first_epoch", "at_a_boundary", "inside_an_epoch"])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, usual, step):
    first = packed_trainer(tmp_path, save_strategy="steps", save_steps=step)
    select(first, keep=[4, 2, 3], max_ifd=INF)
    first.add_callback(Stop(step))
    before = watched(first)
    trainer = packed_trainer(tmp_path)
    select(trainer, keep=[4, 2, 3], max_ifd=INF)
    after = watched(trainer, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert before.order() + after.order() == usual[2].order()
    assert [u.batches for u in before.updates + after.updates] == [u.batches for u in usual[2].updates]
    assert before.learning_rates() + after.learning_rates() == usual[2].learning_rates()
    assert difference(weights_of(trainer.model), weights_of(usual[0].model)) == 0.0
    if step == 5:  # as many bins of the same examples, but of another size
        shutil.rmtree(tmp_path / "ifd_history")
        other = packed_trainer(tmp_path, max_length=CAPACITY + 1)
        select(other, keep=[4, 2, 3], max_ifd=INF)
        with pytest.raises(ValueError, match=r"cannot be resumed exactly: .*training set"):
            other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


# ---- what is refused --------------------------------------------------------------------------------------------


def test_more_packed_rows_than_there_are_is_refused(tmp_path):
    trainer = packed_trainer(tmp_path, 12)
    select(trainer, keep=1000)
    with pytest.raises(ValueError, match=r"keep=1000 .* With packing=True, rows are packed rows"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("strategy", ["wrapped", pytest.param("bfd_split", marks=BFD_SPLIT)])
def test_strategies_that_cut_examples_are_refused(tmp_path, strategy):
    trainer = packed_trainer(tmp_path, 12, packing_strategy=strategy)
    with pytest.raises(ValueError, match=f"packing_strategy='{strategy}' cuts .* Set packing_strategy='bfd'.*False"):
        select(trainer, keep=0.5)


def test_packed_rows_without_lengths_are_refused(tmp_path):
    trainer = packed_trainer(tmp_path, 12)
    trainer.train_dataset = trainer.train_dataset.remove_columns("seq_lengths")
    with pytest.raises(ValueError, match="the prepared training set has no seq_lengths"):
        select(trainer, keep=0.5)


def test_an_id_column_is_refused(tmp_path):
    trainer = packed_trainer(tmp_path, 12)
    select(trainer, keep=0.5, id_column="row_id", max_ifd=INF)
    with pytest.raises(ValueError, match="id_column='row_id' cannot be used with packing=True"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_packed_evaluation_set_stays_trls(tmp_path):
    trainer = packed_trainer(tmp_path, 12, eval_dataset=text_rows(raw_rows(4, seed=9)), eval_packing=True)
    select(trainer, keep=2, max_ifd=INF)
    assert trainer.evaluate()["eval_loss"] > 0


# ---- with schedules ---------------------------------------------------------------------------------------------


def test_warm_up_and_annealing_pack_every_example_and_the_epoch_between_its_bins(tmp_path):
    trainer = packed_trainer(tmp_path)
    select(trainer, schedule=Anneal(3, share=0.34), warmup_epochs=1, max_ifd=INF)
    seen = watched(trainer)
    whole = trainer.selection_pool.training_rows
    everything = list(range(len(trainer.selection_pool)))
    assert [sorted(row for members in bins for row in members) for bins in (seen.bins[0], seen.bins[2])] == (
        [everything] * 2
    )
    assert [len(bins) for bins in seen.bins] == [whole, 3, whole]


def test_an_epoch_between_selections_packs_the_same_examples(tmp_path):
    trainer = packed_trainer(tmp_path)
    select(trainer, keep=3, every=3, max_ifd=INF)
    seen = watched(trainer)
    rows = [sorted(row for members in bins for row in members) for bins in seen.bins]
    assert rows[0] == rows[1] == rows[2]
    assert seen.bins[0] != seen.bins[1]  # shuffled anew


def reference_tiers(trainer, weights, sizes):
    """Positions in each tier, the one with the highest scores first: examples from the top as long as bins are enough.

    Example by example from all ranks, not from the ones chosen for all bins together.
    """
    lengths = [len(ids) for ids, _ in packed_examples(trainer)]
    ranked = reference_choice(trainer, weights, len(lengths))
    tiers = []
    for size in sizes:
        tier = []
        while ranked and slow_bins([lengths[i] for i in [*tier, ranked[0]]], CAPACITY) <= size:
            tier.append(ranked.pop(0))
        tiers.append(tier)
    return tiers


@pytest.mark.parametrize("direction", ["easy_to_hard", "hard_to_easy"])
@pytest.mark.parametrize(("mode", "bins"), [("tiers", [2, 2, 2]), ("growing", [2, 4, 6]), ("shrinking", [6, 4, 2])])
def test_tiers_of_packed_rows_hold_the_examples_of_their_scores(tmp_path, direction, mode, bins):
    trainer = packed_trainer(tmp_path)
    callback = select(trainer, schedule=Curriculum(6, 3, direction, mode), max_ifd=INF, freeze_after=1)
    seen = watched(trainer)
    tiers = reference_tiers(trainer, seen.weights[0], [2, 2, 2])
    tiers = tiers[::-1] if direction == "easy_to_hard" else tiers
    stages = {"tiers": [[0], [1], [2]], "growing": [[0], [0, 1], [0, 1, 2]], "shrinking": [[0, 1, 2], [1, 2], [2]]}
    for epoch, (rows, numbers) in enumerate(zip(seen.epochs(), stages[mode], strict=True)):
        assert sorted(rows) == sorted(row for number in numbers for row in tiers[number])
        history = callback.history.rows(epoch)
        for number, tier in enumerate(tiers):
            assert sorted(history["row_id"][history["tier"] == number]) == sorted(tier)
        assert sorted(history["row_id"][history["reason"] == "kept"]) == sorted(rows)
        assert (history["tier"].isna() == (history["reason"] == "below_cut")).all()
        assert (callback.history.epochs[epoch]["tiers"], callback.history.epochs[epoch]["packed_rows"]) == (
            numbers,
            bins[epoch],
        )
        for members in seen.bins[epoch]:  # no packed row mixes tiers
            assert sum(set(members) <= set(tier) for tier in tiers) == 1
    assert [len(made) for made in seen.bins] == seen.updates_per_epoch() == bins
    assert [plan.budget for plan in callback.plan.epochs] == bins
    assert trainer.state.global_step == trainer.state.max_steps == sum(bins)
    assert seen.final_learning_rate == 0.0
    assert seen.leftovers == []
    if mode == "tiers":
        together = [row for rows in seen.epochs() for row in rows]
        assert len(together) == len(set(together))
        ifd = callback.history.rows(0)["ifd"]
        means = [ifd[rows].mean() for rows in seen.epochs()]
        assert means == sorted(means, reverse=direction == "hard_to_easy")
        assert len(set(means)) == 3


def test_a_curriculum_follows_the_scores_of_the_moment(tmp_path):
    trainer = packed_trainer(tmp_path)
    callback = select(trainer, schedule=Curriculum(6, 3, "hard_to_easy"), max_ifd=INF)
    seen = watched(trainer)
    for epoch, rows in enumerate(seen.epochs()):
        assert sorted(rows) == sorted(reference_tiers(trainer, seen.weights[epoch], [2, 2, 2])[epoch])
    assert [record["scored_at"] for record in callback.history.epochs] == [0, 1, 2]


def test_a_curriculum_on_a_shortfall_fills_its_tiers_with_repeats(tmp_path):
    trainer = packed_trainer(tmp_path)
    callback = select(trainer, schedule=Curriculum(1.0, 3), freeze_after=1)
    seen = watched(trainer)
    whole = callback.pool.training_rows
    assert sum(len(bins) for bins in seen.bins) == seen.planned == whole
    for epoch, rows in enumerate(seen.epochs()):
        history = callback.history.rows(epoch)
        assert callback.history.epochs[epoch]["shortfall"] > 0
        assert (history["ifd"][sorted(set(rows))] < 1).all()
        assert np.bincount(rows, minlength=24).tolist() == history["times"].tolist()


def test_a_curriculum_of_fewer_packed_rows_than_tiers_is_refused_before_the_first_step(tmp_path):
    trainer = packed_trainer(tmp_path)
    select(trainer, schedule=Curriculum(2, tiers=3))
    with pytest.raises(ValueError, match=r"2 rows cannot be divided into 3 tiers; .* rows are packed rows"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("step", [2, 3], ids=["at_a_boundary", "inside_an_epoch"])
def test_a_packed_curriculum_is_resumed_exactly(tmp_path, step):
    def build(folder, **config):
        trainer = packed_trainer(tmp_path / folder, **config)
        select(trainer, schedule=Curriculum(6, 3, mode="growing"), max_ifd=INF, every=2)
        return trainer

    whole = build("whole")
    through = watched(whole)
    first = build("cut", save_strategy="steps", save_steps=step)
    first.add_callback(Stop(step))
    before = watched(first)
    trainer = build("cut")
    after = watched(trainer, resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{step}"))
    assert [u.batches for u in before.updates + after.updates] == [u.batches for u in through.updates]
    assert after.bins == through.bins[1:]
    assert difference(weights_of(trainer.model), weights_of(whole.model)) == 0.0
