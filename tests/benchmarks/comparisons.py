"""Comparisons whose answer is known: `ifd-trainer compare` on a small task, and what it says of it.

A row is words and, as its answer, the word that a fixed table has for each of them. A small Llama that has half learned
the table is fine-tuned in three cases:

    shuffled   half of the pool has the answers of other rows: leaving them out must lower the held-out loss
    equal      all rows are alike: no way to choose them is better than another
    alike      two arms draw random rows, by other seeds, `--repetitions` times: how many false alarms are there?
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ifd_trainer.commands import compare as command
from ifd_trainer.compare.arm_run import main as arm_run
from ifd_trainer.compare.comparison import Comparison
from ifd_trainer.compare.results import read_results

WORDS, LENGTH = 24, 6  # of the table, and of a row
ARMS = {"shuffled": "dynamic guarded", "equal": "longest guarded", "alike": {"other": {"policy": "other_random.Other"}}}
_OTHER = '''"""Random rows by another seed."""

from dataclasses import dataclass

import numpy as np
from ifd_trainer import RandomRows


@dataclass(frozen=True)
class Other:
    def __call__(self, columns, budget, ids, rng):
        return RandomRows()(columns, budget, ids=ids, rng=np.random.default_rng(rng.integers(2**63)))
'''


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(ARMS), nargs="+", default=list(ARMS))
    parser.add_argument("--repetitions", type=int, default=40, help="of the case alike")
    parser.add_argument("--rows", type=int, default=160, help="of the pool")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    found: dict[str, Any] = {"rows": args.rows, "seeds": args.seeds}
    for case in args.case:
        times = args.repetitions if case == "alike" else 1
        found[case] = [compared(case, args.rows, range(n * args.seeds, (n + 1) * args.seeds)) for n in range(times)]
        for arm in found[case][0]:
            shown = sum(run[arm]["shown"] for run in found[case])
            means = ", ".join(f"{run[arm]['difference']:+.4f}" for run in found[case][:3])
            print(f"{case}, {arm}: a difference shown in {shown} of {times} ({means}{' ...' if times > 3 else ''})")
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "comparisons.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def compared(case: str, rows: int, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What a comparison of a case says at equal steps, by arm."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(case, rows, seeds[0], folder)
        run = Comparison.run
        try:  # in this process: what a process costs to start is more than such a run
            Comparison.run = lambda self, *args, **kwargs: run(
                self, say=lambda text: None, launch=lambda task, device: arm_run(task)
            )
            with contextlib.redirect_stdout(io.StringIO()):
                command.compare([str(folder / "recipe.yaml"), "--seeds", *map(str, seeds)])
        finally:
            Comparison.run = run
        results = read_results(Comparison.load(folder / "out"))
    return {
        outcome.arm: {
            "difference": outcome.against.mean,
            "interval": [outcome.against.low, outcome.against.high],
            "shown": outcome.against.shown,
        }
        for outcome in results.of("steps")
        if outcome.against is not None
    }


def prepare(case: str, rows: int, seed: int, folder: Path) -> None:
    """Model, rows and recipe of a case."""
    draws = random.Random(seed)
    pool = [_row(draws) for _ in range(rows)]
    if case == "shuffled":
        others = [row["output"] for row in pool[: rows // 2]]
        for row, output in zip(pool[: rows // 2], others[1:] + others[:1], strict=True):
            row["output"] = output
    draws.shuffle(pool)
    for name, lines in (("pool", pool), ("held_out", [_row(draws) for _ in range(60)])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder / "model")
    _half_learned(tokenizer, seed).save_pretrained(folder / "model")
    (folder / "other_random.py").write_text(_OTHER, encoding="utf-8")
    recipe = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": "pool.jsonl",
        "eval_dataset": "held_out.jsonl",
        "template": "Q: {instruction} A:",
        "arms": ARMS[case],
        "keep": 0.3,
        "min_answer_tokens": 1,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "output_dir": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def _row(draws: random.Random) -> dict[str, str]:
    asked = [draws.randrange(WORDS) for _ in range(LENGTH)]
    return {"instruction": " ".join(f"q{n}" for n in asked), "output": " ".join(f"a{n}" for n in asked)}


def _tokenizer() -> PreTrainedTokenizerFast:
    names = ["<pad>", "<end>", "Q:", "A:", *(f"{kind}{n}" for n in range(WORDS) for kind in "qa")]
    words = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def _half_learned(tokenizer: PreTrainedTokenizerFast, seed: int, steps: int = 35) -> LlamaForCausalLM:
    """A model that has seen the table for a while, so that a right answer is likelier than a wrong one."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    optimizer, draws = torch.optim.AdamW(model.parameters(), lr=3e-3), random.Random(seed + 1)
    for _ in range(steps):
        texts = ["Q: {instruction} A: {output} <end>".format(**_row(draws)) for _ in range(32)]
        ids = tokenizer(texts, return_tensors="pt").input_ids
        model(ids, labels=torch.where(torch.arange(ids.shape[1]) > LENGTH + 1, ids, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


if __name__ == "__main__":
    main()
