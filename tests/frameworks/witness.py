"""A tiny model in a folder, rows, and a witness of what a framework's trainer trains on; for the scripts beside it."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from ifd_trainer.training.history import History

_WORDS = ("cat", "dog", "ball", "park", "red", "blue", "sum", "answer", "maybe", "three", "numbers", "ran", "sat")
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


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


class Witness(TrainerCallback):
    """Reads the rows from the tokens that the model is given while it trains, and counts the optimizer's steps.

    Attributes:
        epochs: the rows (token ids without padding) of each epoch in the order of training.
        steps: optimizer steps of each epoch.
        rates: the learning rate of each step.
        models: copies of the model as it was when an epoch began, before rows were scored.
        begun: the weights that the first batch of an epoch was trained with.
        planned: the number of steps that the trainer planned.
        learning_rate: what it ended at.
        data: the training set as the train loader has it.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.epochs: dict[int, list[tuple[int, ...]]] = {}
        self.steps: dict[int, int] = {}
        self.rates: list[float] = []
        self.models: dict[int, Any] = {}
        self.begun: dict[int, dict[str, torch.Tensor]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.planned, self.pad = state.max_steps, kwargs["processing_class"].pad_token_id
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
                self.begun[self._epoch] = {name: value.clone() for name, value in model.state_dict().items()}
            self.epochs[self._epoch] += _rows_of(kwargs)

    def _stepped(self, optimizer: Any, *_: Any) -> None:
        self.steps[self._epoch] += 1
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.stop_at

    def positions(self, epoch: int) -> list[int]:
        """Of the rows of an epoch, in the order of training."""
        of_tokens = {tuple(row): position for position, row in enumerate(self.data["input_ids"])}
        assert len(of_tokens) == len(self.data), "rows are told apart by their tokens"
        return [of_tokens[row] for row in self.epochs[epoch]]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = kwargs["optimizer"].param_groups[0]["lr"]
        for hook in self._hooks:
            hook.remove()


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


def check_rows(witness: Witness, output: Path, keep: float) -> History:
    """Assert that each epoch trained on the rows that its history names, each of them once, and on the highest."""
    history = History.load(output)
    assert list(witness.epochs) == [record["epoch"] for record in history.epochs]
    for epoch in witness.epochs:
        table = history.rows(epoch)
        chosen = table[table["times"] > 0]
        assert sorted(witness.positions(epoch)) == sorted(chosen["row_id"]), epoch
        assert len(chosen) == round(keep * len(witness.data)), len(chosen)
        left = table[(table["times"] == 0) & (table["ifd"] < 1)]
        assert left.empty or chosen["ifd"].min() >= left["ifd"].max(), "a row was kept below one that was left out"
    return history


def check_scores(witness: Witness, history: History, header: list[int], ends: set[int], atol: float = 1e-4) -> None:
    """Compare scores of the first and the last epoch with two forward passes for each row.

    Args:
        header: token ids before the direct answer.
        ends: tokens that end a turn, which are no part of an answer; nor is what the template writes after them.
    """
    for epoch in {history.epochs[0]["epoch"], history.epochs[-1]["epoch"]}:
        table, model = history.rows(epoch).set_index("row_id"), witness.models[epoch]
        for position in range(0, len(witness.data), 5):
            row = witness.data[position]
            ids = list(row["input_ids"])
            start = _answer_start(ids, row.get("labels"), header)
            end = next(i for i in range(start, len(ids)) if ids[i] in ends)
            conditioned = _loss(model, ids[:end], start)
            direct = _loss(model, header + ids[start:end], len(header))
            found = table.loc[position]
            for name, wanted in (("cas", conditioned), ("das", direct), ("ifd", conditioned / direct)):
                assert abs(found[name] - wanted) < atol, (epoch, position, name, found[name], wanted)


def _answer_start(ids: list[int], labels: list[int] | None, header: list[int]) -> int:
    """The first token of the last answer: by labels, or behind its header where all tokens are trained on."""
    if labels is None or labels[0] != -100:
        size = len(header)
        return next(i for i in range(len(ids), size - 1, -1) if ids[i - size : i] == header)
    start = len(labels) - 1
    while labels[start] == -100:
        start -= 1
    while labels[start - 1] != -100:
        start -= 1
    return start


def changed(history: History) -> int:
    """Rows that the last epoch trained on and the first did not."""
    first, last = (history.rows(history.epochs[i]["epoch"]) for i in (0, -1))
    return int(((last["times"] > 0) & (first["times"] == 0)).sum())


def kept(history: History) -> list[pd.Series]:
    """How often each row is trained on, epoch by epoch."""
    return [history.rows(record["epoch"])["times"] for record in history.epochs]


def _loss(model: Any, ids: list[int], start: int) -> float:
    """Mean loss of ids[start:], in nats."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long)).logits
    losses = torch.nn.functional.cross_entropy(logits[0, start - 1 : -1].double(), torch.tensor(ids[start:]))
    return losses.item()
