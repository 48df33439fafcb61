"""What the scripts beside it share: a tiny model, rows, a witness of what was trained on, and what is asserted of it.

They are run by hand, each in an environment of its own; pytest does not collect this folder. A script is called as
`with_x.py [FOLDER [CHECK ...]]`: FOLDER has to be new, by default it is a temporary one; CHECK is a function that its
last line names, by default all of them run.

Asserted of every run (`check_run`): the optimizer's steps, and that they are as many as were planned;
that each epoch trained on the rows that the history names, by the tokens that the model was given; that no row was left
out that scores above a kept one; and the scores, against two forward passes for each row with that epoch's weights.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback

from ifd_trainer.training.history import History

ROUNDING = 2e-5  # largest relative difference of losses that are computed in float32 in two ways
_WORDS = ("cat", "dog", "ball", "park", "red", "blue", "sum", "answer", "maybe", "three", "numbers", "ran", "sat")
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- what is trained --------------------------------------------------------------------------------------------


def rows(count: int) -> list[dict[str, str]]:
    """Alpaca rows, each unlike any other."""
    words = random.Random(0)
    return [
        {
            "instruction": f"Task {i}: {' '.join(words.choices(_WORDS, k=words.randint(1, 5)))}.",
            "input": " ".join(words.choices(_WORDS, k=2)) if i % 2 else "",
            "output": " ".join(words.choices(_WORDS, k=words.randint(2, 9))) + f" {words.randint(0, 99)}",
        }
        for i in range(count)
    ]


def chats(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Chats of two turns for each side, each unlike any other."""
    alpaca = rows(count)
    return [
        {
            "messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": alpaca[-i]["output"]},
                {"role": "user", "content": row["input"] or "And then?"},
                {"role": "assistant", "content": row["output"]},
            ]
        }
        for i, row in enumerate(alpaca)
    ]


def save_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def save_model(folder: Path) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer with the special tokens of SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["### Instruction:\n### Input:\n### Response:\n", *(" ".join(row.values()) for row in rows(100))]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_CHATML,
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.4,  # so that losses differ from row to row
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


# ---- the witness ------------------------------------------------------------------------------------------------


class Witness(TrainerCallback):
    """Reads the rows from the tokens that the model is given while it trains, and counts the optimizer's steps.

    Args:
        stop_at: the step whose checkpoint is the run's last, as if the machine went away.

    Attributes:
        epochs: the rows (token ids without padding) of each epoch in the order of training.
        steps: optimizer steps of each epoch.
        rates: the learning rate of each step.
        done: how many rows had been trained on at each step.
        models: copies of the model as it was when an epoch began.
        begun: the weights that the first batch of an epoch was trained with.
        weights: those at the end.
        planned: the number of steps that the trainer planned.
        data: the training set as the train loader has it.
        args: the trainer's arguments.
        state: the trainer's state.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.epochs: dict[int, list[tuple[int, ...]]] = {}
        self.steps: dict[int, int] = {}
        self.rates: list[float] = []
        self.done: list[int] = []
        self.models: dict[int, Any] = {}
        self.begun: dict[int, dict[str, torch.Tensor]] = {}

    @property
    def rows(self) -> list[tuple[int, ...]]:
        """The rows of all epochs in the order of training."""
        return [row for epoch in self.epochs.values() for row in epoch]

    def positions(self, epoch: int) -> list[int]:
        """Of the rows of an epoch in the training set, in the order of training."""
        of_tokens = {tuple(row): position for position, row in enumerate(self.data["input_ids"])}
        assert len(of_tokens) == len(self.data), "rows are told apart by their tokens"
        return [of_tokens[row] for row in self.epochs[epoch]]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.args, self.state, self.planned = args, state, state.max_steps
        self.tokenizer = kwargs["processing_class"]
        optimizer = kwargs["optimizer"]
        optimizer = getattr(optimizer, "optimizer", optimizer)
        self._hooks = [
            kwargs["model"].register_forward_pre_hook(self._seen, with_kwargs=True),
            optimizer.register_step_post_hook(self._stepped),
        ]

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = int(state.epoch + 1e-6)
        self.epochs[self._epoch], self.steps[self._epoch] = [], 0
        self.data = kwargs["train_dataloader"].dataset
        self._hooks[0].remove()  # no copy of this witness
        self.models[self._epoch] = model = copy.deepcopy(kwargs["model"]).eval()
        for module in model.modules():  # Unsloth's forward of the copy would be that of the model in training
            vars(module).pop("forward", None)
        self._hooks[0] = kwargs["model"].register_forward_pre_hook(self._seen, with_kwargs=True)

    def _seen(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if model.training:
            if self._epoch not in self.begun:
                self.begun[self._epoch] = _weights(model)
            self.epochs[self._epoch] += _rows_of(kwargs)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        self.steps[self._epoch] += 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.done.append(len(self.rows))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = _weights(kwargs["model"])
        for hook in self._hooks:
            hook.remove()


@contextmanager
def watched(stop_at: int | None = None) -> Iterator[Witness]:
    """A witness of the run that is begun inside, for a framework that makes its trainer out of reach."""
    witness, train = Witness(stop_at), Trainer.train

    def watching(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(witness)
        return train(self, *args, **kwargs)

    with mock.patch.object(Trainer, "train", watching):
        yield witness


def _weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _rows_of(batch: dict[str, Any]) -> list[tuple[int, ...]]:
    """The rows of a batch without padding; a padding-free batch is cut where positions begin anew."""
    ids = batch["input_ids"].tolist()
    if batch.get("attention_mask") is not None:
        masks = batch["attention_mask"].tolist()
        return [
            tuple(token for token, read in zip(row, mask, strict=True) if read)
            for row, mask in zip(ids, masks, strict=True)
        ]
    starts = [i for i, position in enumerate(batch["position_ids"][0].tolist()) if position == 0]
    return [tuple(ids[0][start:end]) for start, end in zip(starts, [*starts[1:], len(ids[0])], strict=True)]


# ---- what is asserted -------------------------------------------------------------------------------------------


def check_run(witness: Witness, output: Path, counts: Sequence[int], *, batch: int, accumulation: int) -> History:
    """Assert that each epoch trained on so many rows, on those that its history names, on the highest, by true scores.

    Args:
        output: folder of the run.
        counts: how many rows each epoch is to train on.
        batch: rows of a batch.
        accumulation: batches of a step.
    """
    history = History.load(output)
    steps = [math.ceil(count / batch / accumulation) for count in counts]
    assert list(witness.steps.values()) == steps, (witness.steps, steps)
    assert witness.planned == sum(steps), (witness.planned, steps)
    assert [record["trained"] for record in history.epochs] == list(counts), history.epochs
    limit = history.settings["max_ifd"] or math.inf
    for epoch, count in enumerate(counts):
        table, trained = history.rows(epoch), witness.positions(epoch)
        assert sorted(trained) == sorted(table["row_id"].repeat(table["times"])), epoch
        assert len(trained) == count, (epoch, len(trained), count)
        kept = table["reason"] == "kept"  # more than were trained on, where the run's last step was inside the epoch
        assert set(trained) <= set(table["row_id"][kept]), epoch
        left = table["ifd"][~kept & (table["ifd"] < limit)]
        assert left.empty or table["ifd"][kept].min() >= left.max(), "a row was kept below one that was left out"
    _check_scores(witness, history)
    header = history.settings["direct_prefix"]
    print(f"{output.name}: {sum(steps)} steps, {changed(history)} rows exchanged, header {header!r}", flush=True)
    return history


def _check_scores(witness: Witness, history: History) -> None:
    """Compare scores of the first and the last epoch with two forward passes for each row, by that epoch's weights."""
    header = witness.tokenizer.encode(history.settings["direct_prefix"], add_special_tokens=False)
    worst = 0.0
    for epoch in {history.epochs[0]["epoch"], history.epochs[-1]["epoch"]}:
        table, model = history.rows(epoch).set_index("row_id"), witness.models[epoch]
        for position in range(0, len(witness.data), 5):
            row = witness.data[position]
            ids = list(row["input_ids"])
            sums, tokens = np.zeros(2), 0  # of all answers
            for start in _answer_starts(ids, row.get("labels"), header):
                end = ids.index(witness.tokenizer.eos_token_id, start)  # it ends the turn, and is no part of the answer
                losses = _nats(model, ids[:end], start), _nats(model, header + ids[start:end], len(header))
                sums, tokens = sums + (end - start) * np.array(losses), tokens + end - start
            conditioned, direct = sums / tokens
            for name, wanted in (("cas", conditioned), ("das", direct), ("ifd", conditioned / direct)):
                worst = max(worst, abs(table.loc[position, name] / wanted - 1))
    assert worst < ROUNDING, worst


def _answer_starts(ids: list[int], labels: list[int] | None, header: list[int]) -> list[int]:
    """The first token of each answer: by labels, or behind its header where all tokens are trained on."""
    if labels is None or labels[0] != -100:
        size = len(header)
        return [i for i in range(size, len(ids)) if ids[i - size : i] == header]
    return [i for i in range(1, len(labels)) if labels[i] != -100 and labels[i - 1] == -100]


@torch.no_grad()
def _nats(model: Any, ids: list[int], start: int) -> float:
    """Mean loss of ids[start:]."""
    logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    return torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].double(), torch.tensor(ids[start:])).item()


def check_linear(witness: Witness, peak: float) -> None:
    """Assert that the learning rate fell from its peak to what is left of it in the last of the planned steps."""
    wanted = [peak * (1 - step / witness.planned) for step in range(witness.planned)]
    assert all(math.isclose(*rates) for rates in zip(witness.rates, wanted, strict=True)), witness.rates


def changed(history: History) -> int:
    """Rows that the last epoch trained on and the first did not."""
    first, last = (history.rows(history.epochs[i]["epoch"]) for i in (0, -1))
    return int(((last["times"] > 0) & (first["times"] == 0)).sum())


def times(history: History) -> list[list[int]]:
    """How often each row was trained on, epoch by epoch."""
    return [history.rows(record["epoch"])["times"].tolist() for record in history.epochs]


def check_resumed(again: Witness, whole: Witness, step: int) -> None:
    """Assert that a run which went on after a step trained on the rest of the whole run's rows, to the same weights."""
    assert again.rows == whole.rows[whole.done[step - 1] :], (len(again.rows), len(whole.rows))
    assert again.weights.keys() == whole.weights.keys()
    assert all(torch.equal(value, whole.weights[name]) for name, value in again.weights.items())


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """Assert that what is done raises an error with a sentence in it, before the first batch is trained on."""
    raised: Exception | None = None
    with watched() as witness:
        try:
            yield
        except Exception as error:
            raised = error
    print(f"refused: {type(raised).__name__}: {raised}", file=sys.stderr)
    assert raised is not None, f"nothing was refused; wanted: {sentence}"
    assert sentence in str(raised)
    assert not witness.rows, "it trained before it was refused"


# ---- the scripts ------------------------------------------------------------------------------------------------


def new_folder() -> Path:
    """The folder that a script was called with, or a temporary one."""
    return Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())


def run_checks(checks: Sequence[Callable[[], None]]) -> None:
    """Run those that a script was called with, or all, in their order."""
    wanted = set(sys.argv[2:]) or {check.__name__ for check in checks}
    assert not (unknown := wanted - {check.__name__ for check in checks}), f"no such check: {unknown}"
    for check in checks:
        if check.__name__ in wanted:
            check()
            print(f"passed: {check.__name__}", flush=True)
