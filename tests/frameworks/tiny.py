"""What the scripts that train in frameworks share: a tiny model, rows, and a witness of what was trained on.

They are run by hand, each in an environment of its own; pytest does not collect this folder.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Trainer

from ifd_trainer.training.history import History

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
TOKENIZER = CACHE / "ifd_trainer" / "smollm2-135m"  # what `make demo` installs
_WORDS = ("red", "blue", "green", "dog", "cat", "tree", "house", "river", "stone", "seven", "walk", "sing", "slowly")
Tokens = tuple[int, ...]


def write_model(folder: Path) -> None:
    """A random llama of two layers, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, count: int) -> None:
    """Alpaca rows, each unlike any other."""
    words = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            question, answer = (" ".join(words.choices(_WORDS, k=words.randint(3, most))) for most in (9, 20))
            row = {"instruction": f"Say {number}: {question}", "input": "", "output": answer}
            file.write(json.dumps(row) + "\n")


def write_chats(path: Path, count: int) -> None:
    """Chats of two turns for each side."""
    words = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            says = [" ".join(words.choices(_WORDS, k=words.randint(3, 9))) for _ in range(4)]
            turns = [f"{number}: {says[0]}", *says[1:]]
            roles = ("user", "assistant", "user", "assistant")
            chat = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
            file.write(json.dumps({"messages": chat}) + "\n")


@dataclass
class Watched:
    """What a run trained on: the rows of all batches in their order, without padding, and the trainer that did."""

    rows: list[Tokens] = field(default_factory=list)
    trainer: Trainer | None = None

    @property
    def pool(self) -> list[Tokens]:
        """The training set."""
        return [tuple(ids) for ids in self.trainer.train_dataset["input_ids"]]


@contextmanager
def watched() -> Iterator[Watched]:
    """Watch the batches that a Trainer trains on."""
    seen, step = Watched(), Trainer.training_step

    def watching(self: Trainer, model: object, inputs: dict, *args: object, **kwargs: object) -> torch.Tensor:
        seen.trainer = self
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
            seen.rows.append(tuple(ids[mask.bool()].tolist()))
        return step(self, model, inputs, *args, **kwargs)

    with mock.patch.object(Trainer, "training_step", watching):
        yield seen


def check_epochs(seen: Watched, output: Path, rows: Sequence[int]) -> None:
    """Assert that each epoch trained on the rows that the history says were selected, and on so many.

    Args:
        seen: what was trained on.
        output: folder of the run.
        rows: how many rows each epoch is to train on.
    """
    history, place = History.load(output), {row: number for number, row in enumerate(seen.pool)}
    assert len(place) == len(seen.pool)
    assert len(seen.rows) == sum(rows), (len(seen.rows), rows)
    assert [record["trained"] for record in history.epochs] == list(rows), history.epochs
    done = 0
    for epoch, count in enumerate(rows):
        trained = sorted(place[row] for row in seen.rows[done : done + count])
        chosen = history.rows(epoch)
        assert trained == sorted(chosen["row_id"].repeat(chosen["times"])), (epoch, trained)
        if not epoch:  # without guard and limit
            assert trained == sorted(chosen.sort_values("ifd", ascending=False)["row_id"][:count])
        done += count


def check_scores(seen: Watched, model: Path, output: Path) -> None:
    """Assert that the first epoch's scores are those of two plain forward passes of each row."""
    history, network = History.load(output), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    header = tokenizer(history.settings["direct_prefix"], add_special_tokens=False).input_ids
    scores, ends = history.rows(0).set_index("row_id"), {*tokenizer.all_special_ids, tokenizer("\n").input_ids[0]}
    worst = 0.0
    for number, (row, labels) in enumerate(zip(seen.pool, seen.trainer.train_dataset["labels"], strict=True)):
        start = next(place for place, label in enumerate(labels) if label != -100)
        answer = [token for token in row[start:] if token not in ends]
        found = [_nats(network, context, answer) for context in (row[:start], header)]
        wanted = [scores.loc[number, name] for name in ("cas", "das")]
        worst = max(worst, *(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)))
    assert worst < 1e-5, worst
    print(f"scores differ by {worst:.1e} at most", file=sys.stderr)


def check_resumed(again: Watched, seen: Watched, rows: int) -> None:
    """Assert that a resumed run went on after so many rows, and ended with the same rows and weights."""
    assert again.rows == seen.rows[rows:], (len(again.rows), len(seen.rows))
    weights = seen.trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.trainer.model.state_dict().items())


@torch.no_grad()
def _nats(model: torch.nn.Module, context: Sequence[int], answer: Sequence[int]) -> float:
    """Mean negative log-likelihood of the answer's tokens after a context."""
    logits = model(torch.tensor([[*context, *answer]])).logits[0, len(context) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer)).item()


@contextmanager
def refused(sentence: str) -> Iterator[None]:
    """Assert that what is done raises an error with a sentence in it."""
    raised: Exception | None = None
    try:
        yield
    except Exception as error:
        raised = error
    print(f"refused: {raised!r}", file=sys.stderr)
    assert raised is not None, f"nothing was refused; wanted: {sentence}"
    assert sentence in str(raised)
