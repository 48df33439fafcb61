"""Tiny training runs, and a witness that reads from the batches what they trained on."""

from __future__ import annotations

import gc
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import trl
from conftest import DEVICE, build_model, build_tokenizer, reference_nll
from datasets import Dataset
from packaging.version import Version
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from ifd_trainer import IFDSelectionCallback
from ifd_trainer.data.formats import ALPACA, WIZARDLM, to_prompt_completion

if DEVICE == "cuda":  # a resumed run can equal the uninterrupted one only if sums are taken in one order
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
torch.set_num_threads(1)  # the models are tiny: threads that wait for one another make them slower
gc.freeze()  # accelerate collects garbage before each run: what was imported by now need not be looked at

TOKENIZER = build_tokenizer()
INF = float("inf")
PEAK = 1e-2  # the learning rate: large enough that scores change from epoch to epoch
_WORDS = ("cat", "dog", "ball", "park", "red", "blue", "sum", "answer", "maybe", "three", "numbers", "ran", "sat")
_SETTINGS = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 3,
    "learning_rate": PEAK,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": DEVICE == "cpu",
    "bf16": False,  # TRL's default is True: scores have an error of 0.3 % then
}


FIVE = Version(transformers.__version__).major >= 5


def since_trl(version: str, what: str) -> pytest.MarkDecorator:
    """Skips a test where TRL is older, with the reason."""
    reason = f"{what} since trl {version}; this is {trl.__version__}"
    return pytest.mark.skipif(Version(trl.__version__) < Version(version), reason=reason)


MERGES_TRAINED = since_trl("1.14.2", "a token that is partly the prompt's is trained on")
CHATS_READ = since_trl("0.27" if FIVE else "0.24", "chats are read as transformers 5 tokenises them")
BFD_SPLIT = since_trl("1.0", "there is a packing strategy 'bfd_split'")
PREFERENCES = since_trl("1.0", "trainers on preferences do without mergekit")
RECIPES = since_trl("1.8", "recipes run")


# ---- rows -------------------------------------------------------------------------------------------------------


def raw_rows(count: int, *, with_input: bool = False, quotes: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Rows as Alpaca has them, each unlike any other; every third answer begins with a quote if asked to."""
    words = random.Random(seed)
    rows = []
    for i in range(count):
        answer = " ".join(words.choices(_WORDS, k=words.randint(2, 7))) + f" {words.randint(0, 99)}"
        row = {
            "row_id": 100 + i,
            "instruction": f"Task {i}: {' '.join(words.choices(_WORDS, k=words.randint(1, 5)))}.",
            "input": " ".join(words.choices(_WORDS, k=2)) if with_input and i % 2 else "",
            "output": f'"{answer}"' if quotes and i % 3 == 0 else answer,
        }
        rows.append(row)
    return rows


def text_rows(raw: list[dict[str, Any]], format: Any = WIZARDLM) -> Dataset:
    """TRL's prompt-completion texts, with the row ids."""
    return Dataset.from_list([{"row_id": row["row_id"], **to_prompt_completion(row, format)} for row in raw])


def chat_rows(raw: list[dict[str, Any]]) -> Dataset:
    """TRL's prompt-completion messages, with the row ids."""
    return Dataset.from_list(
        [
            {
                "row_id": row["row_id"],
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in raw
        ]
    )


def alpaca_rows(raw: list[dict[str, Any]]) -> Dataset:
    """The same with Alpaca's prompts, with and without an input."""
    return text_rows(raw, ALPACA)


# ---- trainers ---------------------------------------------------------------------------------------------------


def known(config: dict[str, Any]) -> dict[str, Any]:
    """Settings in the words of the installed transformers; a test of what 4.57 does not have is skipped."""
    if FIVE:
        return config
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # a run in bf16 leaves it to those after it
    config = dict(config)
    strategy, steps = config.pop("train_sampling_strategy", "random"), config.get("warmup_steps", 0)
    if strategy not in ("random", "group_by_length"):
        pytest.skip(f"train_sampling_strategy={strategy!r} came with transformers 5; {transformers.__version__}")
    if isinstance(steps, float):  # a share
        config["warmup_ratio"] = config.pop("warmup_steps")
    return {**config, "group_by_length": strategy == "group_by_length"}


def sft_trainer(
    folder: Path,
    rows: int | Dataset = 24,
    *,
    model: torch.nn.Module | None = None,
    tokenizer: Any = None,
    eval_dataset: Dataset | None = None,
    peft_config: Any = None,
    formatting_func: Any = None,
    **config: Any,
) -> SFTTrainer:
    """An SFTTrainer on a tiny model: 3 epochs, 2 rows a batch, whatever else `config` says."""
    tokenizer = tokenizer or TOKENIZER
    settings = {"output_dir": str(folder), **_SETTINGS, "gradient_checkpointing": False, **known(config)}
    return SFTTrainer(
        model=model if model is not None else build_model(len(tokenizer)),
        args=SFTConfig(**settings),
        train_dataset=text_rows(raw_rows(rows)) if isinstance(rows, int) else rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=peft_config,
        formatting_func=formatting_func,
    )


def as_trained(trainer: Trainer, row: dict[str, Any]) -> dict[str, Any]:
    """A prepared row with the tokens and labels that are trained on: older TRL makes or cuts them in its collator."""
    if "labels" in row and getattr(trainer.data_collator, "max_length", None) is None:
        return row
    batch = trainer.data_collator([row])
    size = int(batch["attention_mask"].sum()) if "attention_mask" in batch else None
    return {**row, **{name: batch[name][0, :size].tolist() for name in ("input_ids", "labels")}}


def tokenised(trainer: SFTTrainer) -> Dataset:
    """The rows as they are trained on."""
    rows = (as_trained(trainer, row) for row in trainer.train_dataset)
    return Dataset.from_list([{name: row[name] for name in ("row_id", "input_ids", "labels")} for row in rows])


def plain_trainer(folder: Path, dataset: Any, **config: Any) -> Trainer:
    """A `transformers.Trainer` on tokenised rows."""
    return Trainer(
        model=build_model(len(TOKENIZER)),
        args=TrainingArguments(output_dir=str(folder), **{**_SETTINGS, **known(config)}),
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(TOKENIZER),
        processing_class=TOKENIZER,
    )


def select(trainer: Trainer, **options: Any) -> IFDSelectionCallback:
    """Add the callback to a trainer, as a user does; without guards, for which the models here know too little."""
    callback = IFDSelectionCallback(trainer, **{"guard": None, **options})
    trainer.add_callback(callback)
    return callback


# ---- the witness ------------------------------------------------------------------------------------------------


@dataclass
class Update:
    """One optimizer step: the row ids of each of its batches, and the learning rate it was made with."""

    epoch: int
    batches: list[list[Any]]
    learning_rate: float

    @property
    def rows(self) -> list[Any]:
        return [row for batch in self.batches for row in batch]


@dataclass
class Witness(TrainerCallback):
    """Watches a trainer: rows come from the token ids of the batches, steps from the optimizer itself."""

    trainer: Trainer
    updates: list[Update] = field(default_factory=list)
    weights: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # at the start of each epoch
    leftovers: list[str] = field(default_factory=list)  # gradients that were there when none may be
    evaluations: list[int] = field(default_factory=list)  # at which global step
    saves: list[int] = field(default_factory=list)
    planned: int | None = None
    final_learning_rate: float | None = None

    def __post_init__(self) -> None:
        pool = self.trainer.train_dataset
        self.row_of = {}
        for position in range(len(pool)):
            row = as_trained(self.trainer, pool[position])
            self.row_of[tuple(row["input_ids"])] = row.get("row_id", position)
        assert len(self.row_of) == len(pool), "the witness tells rows apart by their tokens"
        self._step = self.trainer.training_step
        self.trainer.training_step = self._training_step
        self.trainer.add_callback(self)
        self._waiting: list[list[Any]] = []
        self._epoch = 0

    def leave(self) -> None:
        """Watch no longer: the trainer is as before."""
        self.trainer.remove_callback(self)
        del self.trainer.training_step

    def _training_step(self, model: Any, inputs: dict[str, Any], *rest: Any) -> torch.Tensor:
        self._waiting.append([self.row_of[tuple(ids)] for ids in _sequences(inputs)])
        return self._step(model, inputs, *rest)

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self.planned = state.max_steps
        while hasattr(optimizer, "optimizer"):  # accelerate wraps it, and so does DeepSpeed
            optimizer = optimizer.optimizer
        self._hook = optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._waiting and self.trainer.is_deepspeed_enabled:
            return  # ZeRO-3 makes an update in several steps, one for each group of parameters
        self.updates.append(Update(self._epoch, self._waiting, optimizer.param_groups[0]["lr"]))
        self._waiting = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = int(state.epoch)
        self.weights[self._epoch] = weights_of(self.trainer.model)
        self._look_for_leftovers(f"before epoch {self._epoch}")

    def on_train_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        self._look_for_leftovers("at the end")
        self.final_learning_rate = optimizer.param_groups[0]["lr"]
        self._hook.remove()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations.append(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saves.append(state.global_step)

    def _look_for_leftovers(self, when: str) -> None:
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None and p.grad.any()]
        if gradients or self._waiting:
            self.leftovers.append(f"{when}: {len(gradients)} gradients, rows without an update: {self._waiting}")

    def epochs(self) -> list[list[Any]]:
        """Row ids of each epoch in the order of training."""
        assert self.weights, "no epoch has begun"  # else a loop over the epochs would assert nothing
        return [[row for u in self.updates if u.epoch == epoch for row in u.rows] for epoch in sorted(self.weights)]

    def updates_per_epoch(self) -> list[int]:
        return [sum(update.epoch == epoch for update in self.updates) for epoch in sorted(self.weights)]

    def order(self) -> list[Any]:
        """Row ids of the whole run in the order of training."""
        return [row for update in self.updates for row in update.rows]

    def learning_rates(self) -> list[float]:
        return [update.learning_rate for update in self.updates]


def _sequences(inputs: dict[str, Any]) -> list[list[int]]:
    """The rows of a batch without padding; a padding-free batch is cut where positions begin anew."""
    ids = inputs["input_ids"].tolist()
    if "attention_mask" in inputs:
        return [row[: sum(mask)] for row, mask in zip(ids, inputs["attention_mask"].tolist(), strict=True)]
    starts = [i for i, position in enumerate(inputs["position_ids"][0].tolist()) if position == 0]
    return [ids[0][start:end] for start, end in zip(starts, [*starts[1:], len(ids[0])], strict=True)]


def train(trainer: Trainer, **options: Any) -> Witness:
    """Train, and say what happened."""
    witness = Witness(trainer)
    try:
        trainer.train(**options)
    finally:
        witness.leave()
    return witness


class WeightsAt(TrainerCallback):
    """Keeps the weights after each update, and before the first one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.after = trainer, {0: weights_of(trainer.model)}
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after[state.global_step] = weights_of(self.trainer.model)


class Stop(TrainerCallback):
    """Ends training once a checkpoint was written at a step, as if the machine went away."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


# ---- what is compared -------------------------------------------------------------------------------------------


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights; of an FSDP model the whole ones."""
    whole = {name: getattr(tensor, "full_tensor", lambda t=tensor: t)() for name, tensor in model.state_dict().items()}
    return {name: tensor.detach().clone() for name, tensor in whole.items()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest absolute difference of two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def training_logs(trainer: Trainer) -> list[dict[str, float]]:
    """Entries of the log that report a training loss."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def selection_logs(trainer: Trainer) -> list[dict[str, float]]:
    """Entries of the log that report a selection."""
    return [entry for entry in trainer.state.log_history if "ifd/kept" in entry]


def reference_scores(trainer: Trainer, model: torch.nn.Module) -> dict[Any, tuple[float, float] | None]:
    """(cas, das) by row id, or None for an empty answer; computed token by token from full logits.

    For rows whose prompt ends with "### Response:": the direct answer is preceded by the prompt's tokens from the
    last "###" on. Where a quote merged with the colon, the merged token is the answer's, so one header token is less.
    """
    tokenizer = trainer.processing_class
    hashes = tokenizer.convert_tokens_to_ids("###")
    scores = {}
    for row in tokenised(trainer):
        ids, labels = row["input_ids"], row["labels"]
        start = next((i for i, label in enumerate(labels) if label != -100), None)
        if start is None:  # the prompt alone fills max_length
            scores[row["row_id"]] = None
            continue
        answer = ids[start:]
        if answer[-1] == tokenizer.eos_token_id:  # TRL's, not part of the answer; a truncated row has none
            answer = answer[:-1]
        prompt = ids[:start]
        header = prompt[len(prompt) - 1 - prompt[::-1].index(hashes) :]
        scores[row["row_id"]] = (
            (
                reference_nll(model, prompt + answer, len(prompt)),
                reference_nll(model, header + answer, len(header)),
            )
            if answer
            else None
        )
    return scores


def ratios(scores: dict[Any, tuple[float, float] | None]) -> dict[Any, float]:
    """IFD by row id, of the rows that have one."""
    return {row: cas / das for row, (cas, das) in scores.items()}


def reference_top(scores: dict[Any, tuple[float, float] | None], budget: int, limit: float = 1.0) -> list[Any]:
    """Row ids of the `budget` highest IFD under the limit, highest first."""
    ratios = {row: pair[0] / pair[1] for row, pair in scores.items() if pair is not None}
    eligible = [row for row, ratio in ratios.items() if ratio < limit]
    return sorted(eligible, key=lambda row: -ratios[row])[:budget]


def model_with(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A model of its own with these weights."""
    model = build_model(len(TOKENIZER))
    model.load_state_dict(weights)
    return model


def random_states() -> tuple[Any, ...]:
    """The states of the three global generators, in a form that can be compared."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 (the global one is what is looked at)
    return random.getstate(), (name, keys.tolist(), *rest), torch.get_rng_state().tolist()
