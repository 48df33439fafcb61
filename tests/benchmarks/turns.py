"""What it costs to score every answer of a conversation, against its last answer alone, and against each by itself.

    all turns     IFDScorer(turns="tokens"): one forward of the conversation, and a direct one of each answer
    last answer   the same conversations, of each the last answer alone
    one by one    each answer as the last one of a conversation that ends with it, one after another

Conversations of --turns answers are made of a file's rows, put one behind another: a row's instruction is a user's
turn, its output the answer. All three read the same rows in turn, several times; ratios are of seconds within one turn,
median and range. One by one does not share beginnings, and does not batch: it stands for a loop over turns. Writes
turns.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from measuring import machine
from rich.console import Console
from rich.table import Table

from ifd_trainer import IFDScorer
from ifd_trainer.data.files import load_rows

ROOT = Path(__file__).resolve().parents[2]
ALL, LAST, ONE_BY_ONE = "all turns", "last answer", "one by one"


def conversations(data: str, turns: int, count: int) -> list[list[dict[str, str]]]:
    """Chats of so many answers, of a file's rows one behind another; rows with long or empty texts are passed over."""
    rows = [
        row
        for row in load_rows(data).select_columns(["instruction", "output"])
        if 0 < len(row["output"] or "") <= 400 and len(row["instruction"] or "") <= 400
    ]
    chats = []
    for start in range(0, min(len(rows), turns * count) - turns + 1, turns):
        part = rows[start : start + turns]
        texts = [(("user", row["instruction"]), ("assistant", row["output"])) for row in part]
        chats.append([{"role": role, "content": text} for pair in texts for role, text in pair])
    return chats


def main(arguments: list[str] | None = None) -> None:
    """Measure; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="name or path of a causal LM with a chat template")
    parser.add_argument("--data", default=str(ROOT / "recipes" / "data" / "demo_train.jsonl"), help="file (the demo's)")
    parser.add_argument("--turns", type=int, default=8, help="answers of a conversation (default 8)")
    parser.add_argument("--rows", type=int, default=16, help="conversations (default 16)")
    parser.add_argument("--runs", type=int, default=3, help="times that all are measured (default 3)")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    disable_progress_bars()
    chats = conversations(options.data, options.turns, options.rows)
    scorers = {ALL: IFDScorer(options.model, turns="tokens")}
    scorers[LAST] = scorers[ONE_BY_ONE] = IFDScorer(scorers[ALL].model, turns=None, tokenizer=options.model)
    cut = [chat[: 2 * turn] for chat in chats for turn in range(1, options.turns + 1)]
    work = {ALL: [chats], LAST: [chats], ONE_BY_ONE: [[chat] for chat in cut]}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    found = {}
    for run in range(options.runs + 1):
        for name, batches in work.items():
            began = time.perf_counter()
            columns = [scorers[name]({"messages": batch}) for batch in batches]
            if run:  # the first time, engines are tried out
                seconds[name].append(time.perf_counter() - began)
            found[name] = columns
    own = [value for row in found[ALL][0]["turn_ifd"] for value in row]
    alone = [columns["ifd"][0] for columns in found[ONE_BY_ONE]]
    differs = max(abs(one - other) for one, other in zip(own, alone, strict=True))
    tokens = [sum(row) for row in found[ALL][0]["turn_tokens"]]
    result = {
        "machine": machine(torch.device("cpu")) if not torch.cuda.is_available() else machine(torch.device("cuda")),
        "conversations": len(chats),
        "turns": options.turns,
        "answer_tokens": sum(tokens),
        "largest_difference": differs,
        "seconds": seconds,
    }
    table = Table("", "seconds", "times the last answer")
    for name, values in seconds.items():
        ratios = sorted(value / last for value, last in zip(values, seconds[LAST], strict=True))
        result.setdefault("ratios", {})[name] = ratios
        shown = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        table.add_row(name, f"{statistics.median(values):.2f}", shown)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "turns.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(f"{len(chats)} conversations of {options.turns} answers; IFDs differ by {differs:.1e} at most.")
    console.print(table)


if __name__ == "__main__":
    main()
