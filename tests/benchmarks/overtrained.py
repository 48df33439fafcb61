"""A scorer that is trained too long: what its scorings still tell, and when `Freeze` has none of it.

Of the rows of a file with short answers, some are trained on, the same ones in each epoch, until the model knows them
by heart. The others are scored before each epoch as in any run, and never trained on, so that what the model says of
them is no memory; a fifth of them have one another's answers, so that it can be seen how well it tells noise:

    area            under the ROC curve, of the IFD of shuffled rows against the others'
    among the best  share of shuffled rows among the fifth of the rows with the highest IFD below 1, and below the
                    calibrated limit of that scoring; a coin keeps a fifth
    with the first  Spearman's correlation with the scoring of the model as it came

Nothing is frozen while this is measured; what `Freeze` says of each scoring stands beside it. Writes overtrained.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from datasets import Dataset
from noise import shuffled
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from ifd_trainer import Freeze, Guard, IFDSelectionCallback
from ifd_trainer.data.files import load_rows
from ifd_trainer.data.format_choice import resolve_format
from ifd_trainer.data.formats import to_prompt_completion
from ifd_trainer.method.scoring_health import WATCHED, rank_correlation, separation
from ifd_trainer.method.selection import Cherry, Selection

SHARE = 0.2  # of the rows that are not trained on: those that are shuffled, and those that would be kept


@dataclass(frozen=True)
class TheSame(Cherry):
    """The first rows in each epoch, whatever their scores: a policy that minds limits itself is shown all rows."""

    def __call__(
        self,
        columns: Mapping[str, np.ndarray],
        budget: int,
        *,
        ids: np.ndarray | None = None,
        rng: np.random.Generator | None = None,
    ) -> Selection:
        return Selection.without_scores(np.argsort(ids)[:budget], len(ids), reason="not_trained")


def pool_of(rows: Dataset, options: argparse.Namespace, tokenizer: Any) -> Dataset:
    """Rows with short answers, by a seed; some that are not trained on have one another's."""
    format, rng = resolve_format(None, rows.column_names), np.random.default_rng(0)
    texts = [to_prompt_completion(row, format) for row in rows]
    able = [text for text in texts if 5 <= len(tokenizer(text["completion"])["input_ids"]) <= options.answer_tokens]
    chosen = [able[i] for i in rng.permutation(len(able))[: options.rows]]
    pool = [{**text, "row_id": row, "wrong": False} for row, text in enumerate(chosen)]
    others = np.arange(options.trained, len(pool))
    for row, other in shuffled(others, rng, round(SHARE * len(others)), None):
        pool[row] |= {"wrong": True, "completion": chosen[other]["completion"]}
    return Dataset.from_list(pool)


def trained_too_long(options: argparse.Namespace, lr: float, folder: str) -> list[dict[str, Any]]:
    """A run, and what each of its scorings tells."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    pool = pool_of(load_rows(options.data), options, tokenizer)
    settings = SFTConfig(
        output_dir=folder,
        num_train_epochs=options.epochs,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        max_length=512,
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype="float32"),
        args=settings,
        train_dataset=pool,
        processing_class=tokenizer,
    )
    callback = IFDSelectionCallback(
        trainer,
        keep=options.trained,
        policy=TheSame(),
        guard=Guard(unfinished=None, duplicates=None, freeze=None, on_misaligned="warn"),
    )
    trainer.add_callback(callback)
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    wrong = np.array(pool["wrong"])
    epochs, found = callback.history.epochs, []
    for record, loss in zip(epochs, [None, *losses], strict=False):
        now, first = (callback.history.rows(e).sort_values("row_id") for e in (record["epoch"], 0))
        reason = Freeze().reason(record, epochs[0]) if found else None
        found.append({"loss": loss, **told(now, first, record, wrong, options.trained), "freeze": reason})
    return found


def told(
    now: pd.DataFrame, first: pd.DataFrame, record: Mapping[str, Any], wrong: np.ndarray, trained: int
) -> dict[str, Any]:
    """What a scoring tells of rows that are not trained on, in the order of their ids."""
    others = np.arange(len(now)) >= trained
    ifd, shuffled = now["ifd"].to_numpy(float)[others], wrong[others]
    budget = round(SHARE * others.sum())

    def noise_below(limit: float | None) -> float | None:
        rows = np.flatnonzero(ifd < (np.inf if limit is None else limit))
        kept = rows[np.argsort(-ifd[rows], kind="stable")][:budget]
        return float(shuffled[kept].mean()) if len(kept) else None

    return {
        **{name: record[name] for name in (*WATCHED, "limit")},
        "with_first": rank_correlation(ifd, first["ifd"].to_numpy(float)[others]),
        "area": separation(ifd[~shuffled], ifd[shuffled]),
        "noise_below_1": noise_below(1.0),
        "noise_below_limit": noise_below(record["limit"]),
        "rows_below_limit": int((ifd < (record["limit"] or np.inf)).sum()),
        "median_ifd": [float(np.nanmedian(ifd[shuffled == kind])) for kind in (False, True)],
    }


def table(title: str, runs: Sequence[Mapping[str, Any]]) -> Table:
    """A run, a line for each scoring."""
    names = [name for name in runs[0] if name != "median_ifd"]
    out = Table("epoch", *(name.replace("_", " ") for name in names), title=title)
    for epoch, run in enumerate(runs):
        values = (run[name] for name in names)
        out.add_row(str(epoch), *("-" if v is None else f"{v:.3f}" if isinstance(v, float) else str(v) for v in values))
    return out


def main(arguments: list[str] | None = None) -> None:
    """Train with each learning rate; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM")
    parser.add_argument("--data", required=True, help="file of prompts and answers")
    parser.add_argument("--rows", type=int, default=180, help="rows of the pool (default 180)")
    parser.add_argument("--trained", type=int, default=60, help="rows that are trained on (default 60)")
    parser.add_argument("--epochs", type=int, default=8, help="(default 8)")
    parser.add_argument("--answer-tokens", type=int, default=80, help="most tokens of an answer (default 80)")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-4], help="learning rates (default 5e-4)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    console, results = Console(width=180), {}
    options.output.mkdir(parents=True, exist_ok=True)
    for lr in options.lr:
        with TemporaryDirectory() as folder:
            results[f"{lr:g}"] = trained_too_long(options, lr, folder)
        text = json.dumps({"model": options.model, "lr": results}, indent=1) + "\n"
        (options.output / "overtrained.json").write_text(text, encoding="utf-8")
        console.print(table(f"learning rate {lr:g}", results[f"{lr:g}"]))


if __name__ == "__main__":
    main()
