"""Speed, memory and recall of `duplicate_groups`: synthetic pools of several sizes, and small edits of real rows.

The words of the pools are random, with frequencies as Zipf's law has them; prompts have 11 and answers 118 words in the
middle, about 70 and 700 characters, as the long answers of `alpaca_cherry_5pct`. A twentieth of the rows are copies of
others with one word more. Each size runs in a process of its own. Writes duplicates.json.

    base               a hundred rows: what the interpreter and the imports take
    rows               seconds of CPU of `duplicate_groups`, how many of them normalisation takes, the peak of memory
                       over base and what of it are the given texts, the share of the copies that it finds, and how
                       many rows it groups that are no copies
    recall             with --data: real rows, each with a copy edited in its prompt, its answer or both; of each kind
                       of edit, the share of the copies that are found
    near               with --data: the groups among the rows as they are; of those that are not equal, every pair
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from selection import measured

from ifd_trainer.data.duplicates import duplicate_groups, normalised

Rows = list[tuple[str, str]]
FILES = ("alpaca_cherry_5pct", "alpaca_mixed_1k", "code_instruct_2k")
EDITED = FILES[1:]
COPIES = 20  # one row of so many
_WORD = re.compile(r"[^\W\d_]{3,}")


# ---- speed and memory -------------------------------------------------------------------------------------------


def pool_of(rows: int, seed: int = 0) -> Rows:
    """A pool whose last twentieth are copies of its first rows, with one word more in the answer."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwygpbvk"))
    weights = 1 / np.arange(3, 25)
    words = ["".join(rng.choice(letters, n, p=weights / weights.sum())) for n in rng.integers(2, 9, 20_000)]
    frequencies = 1 / np.arange(5, 20_005)
    numbers = rng.choice(20_000, 1_000_000, p=frequencies / frequencies.sum())

    def text(length: float) -> str:
        start = int(rng.integers(0, len(numbers) - 2000))
        return " ".join(words[i] for i in numbers[start : start + min(max(1, round(length)), 2000)])

    copies = rows // COPIES
    lengths = zip(rng.lognormal(np.log(11), 0.4, rows - copies), rng.lognormal(np.log(118), 0.5, rows), strict=False)
    pool = [(text(prompt), text(answer)) for prompt, answer in lengths]
    return pool + [(prompt, f"{answer} {words[i % 5000]}") for i, (prompt, answer) in enumerate(pool[:copies])]


def worker(path: Path, rows: int) -> None:
    """What runs in a process of its own: groups of a pool, and what they took, into a file."""
    pool = pool_of(rows)
    began = time.process_time()
    for prompt, answer in pool:
        normalised(prompt), normalised(answer)
    normalising = time.process_time() - began
    began = time.process_time()
    groups = duplicate_groups(pool)
    seconds = time.process_time() - began
    copies = rows // COPIES
    found = groups[rows - copies :] == np.arange(copies)
    others = int((groups[: rows - copies] != np.arange(rows - copies)).sum())
    result = {
        "seconds": seconds,
        "normalising": normalising,
        "text_bytes": sum(len(prompt) + len(answer) for prompt, answer in pool),  # ASCII
        "copies_found": float(found.mean()),
        "others": others,
    }
    path.write_text(json.dumps(result), encoding="utf-8")


# ---- recall -----------------------------------------------------------------------------------------------------


def edits_of(rng: np.random.Generator, rows: Rows) -> dict[str, Callable[[str], str]]:
    """Small edits of a text, by name; a text without words stays as it is."""
    words = [word for _, answer in rows for word in _WORD.findall(answer)]

    def at_a_word(change: Callable[[str], str]) -> Callable[[str], str]:
        def edit(text: str) -> str:
            found = list(_WORD.finditer(text))
            if not found:
                return text
            word = found[rng.integers(len(found))]
            return text[: word.start()] + change(word[0]) + text[word.end() :]

        return edit

    def typo(word: str) -> str:
        place = int(rng.integers(len(word) - 1))
        return word[:place] + word[place + 1] + word[place] + word[place + 2 :]

    return {
        "two letters of a word swapped": at_a_word(typo),
        "a word replaced by any other": at_a_word(lambda word: words[rng.integers(len(words))]),
        "a word dropped": at_a_word(lambda word: ""),
        "a word written twice": at_a_word(lambda word: f"{word} {word}"),
        "upper case": str.upper,
        "white space": lambda text: "  " + re.sub(r"\s+", "\n", text) + "\n",
        "stops at the end": lambda text: text.rstrip(".!?") + "!!",
        "a courtesy added": lambda text: text + " Thank you very much!",
    }


def recalls(rows: Rows, chosen: np.ndarray, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each kind of edit and of what is edited, the share of copies that are grouped with their originals."""
    out: dict[str, dict[str, float]] = {}
    for name, edit in edits_of(np.random.default_rng(seed), rows).items():
        out[name] = {}
        for what in ("prompt", "answer", "both"):
            copies = [
                (edit(p) if what != "answer" else p, edit(a) if what != "prompt" else a)
                for p, a in (rows[i] for i in chosen)
            ]
            groups = duplicate_groups([*rows, *copies])
            out[name][what] = float((groups[len(rows) :] == groups[chosen]).mean())
    return out


def read_rows(path: Path) -> Rows:
    """Prompts, with their inputs, and answers of a file; rows without an answer are left out."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rows = [(f"{line['instruction']}\n{line.get('input') or ''}", line["output"]) for line in lines]
    return [row for row in rows if row[1].strip()]


def of_real_rows(folder: Path, number: int = 300) -> dict[str, Any]:
    """Recall per kind of edit in each file, and the groups among all rows as they are."""
    edits = {}
    for name in EDITED:
        rows = read_rows(folder / f"{name}.jsonl")
        edits[name] = recalls(rows, np.random.default_rng(0).choice(len(rows), number, replace=False))
    pool = [row for name in FILES for row in read_rows(folder / f"{name}.jsonl")]
    groups, equal = duplicate_groups(pool), duplicate_groups(pool, None)
    positions = np.arange(len(pool))
    near = np.flatnonzero((groups != positions) & (equal == positions))
    pairs = [[pool[groups[i]], pool[i]] for i in near]
    return {"edits": edits, "rows": len(pool), "equal": int((equal != positions).sum()), "near": pairs}


def print_real(found: dict[str, Any]) -> None:
    """Recall as a table, and every pair of rows that are near and not equal, to be looked at."""
    for name, edits in found["edits"].items():
        print(f"\n{name + ', recall':44s} prompt  answer    both")
        for edit, recall in edits.items():
            print(f"{edit:43s} " + "  ".join(f"{recall[what]:6.1%}" for what in ("prompt", "answer", "both")))
    print(f"\n{found['rows']:,} rows: {found['equal']} equal to an earlier one, {len(found['near'])} more near one")
    for pair in found["near"]:
        print("", *(f"{prompt!r} -> {answer!r}" for prompt, answer in pair), sep="\n")


def main(arguments: list[str] | None = None) -> None:
    """Measure all cases; write and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 52_000], help="sizes (default 10,000 and 52,000)"
    )
    parser.add_argument("--data", type=Path, help="folder of the real rows (default: none are read)")
    parser.add_argument("--tiny", action="store_true", help="400 synthetic rows: a dry run")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder (default runs/bench)")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {"load": psutil.getloadavg()[0], "cases": []}
    for rows in [100, 400] if options.tiny else [100, *options.rows]:
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            _, peak = measured([__file__, "--worker", str(result), str(rows)])
            case = {"rows": rows, "peak_bytes": peak, **json.loads(result.read_text(encoding="utf-8"))}
        results["cases"].append(case)
        over = (peak - results["cases"][0]["peak_bytes"]) / 2**20
        seconds = f"{case['seconds']:7.1f} s of CPU ({case['normalising']:.1f} normalising)"
        memory = f"{over:6.0f} MiB over base ({case['text_bytes'] / 2**20:.0f} the texts)"
        found = f"{case['copies_found']:.1%} of the copies found, {case['others']} others"
        print(f"{rows:9,} rows {seconds}, {memory}; {found}", flush=True)
    if options.data:
        results["real"] = of_real_rows(options.data)
        print_real(results["real"])
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (options.output / "duplicates.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main()
