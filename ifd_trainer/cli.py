"""The command line: `ifd-trainer score | select | train | report`.

Heavy imports wait until a command runs, so that `--help` answers at once. Exit codes: 0 done, 2 wrong input or usage
(one line on standard error), 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import __version__

if TYPE_CHECKING:
    import pandas as pd

    from .columns import IFDScorer

_FORMATS = "alpaca, wizardlm, prompt-completion, messages, sharegpt"
_TRAIN_HELP = """\
usage: ifd-trainer train [RECIPE.yaml] [--plan] [--KEY VALUE ...]

Fine-tune with TRL's SFTTrainer; before each epoch, score all rows with the model as it is and train on the rows with
the highest IFD. RECIPE.yaml is TRL's flat YAML; every key can be given or overridden here.

  --plan                   print rows and steps of each epoch, and stop
  --model NAME_OR_PATH     the model to fine-tune
  --dataset FILE_OR_NAME   rows to select from (.json, .jsonl, .csv, .parquet, or a hub name)
  --eval_dataset FILE      held-out rows; with --eval_strategy epoch their loss is shown for each epoch
  --format NAME            {formats}; told from the columns by default
  --keep N [N ...]         rows per epoch: a fraction (0.1), a number (1000), or one entry for each epoch
  --every K, --warmup_epochs N, --freeze_after N
                           select each K epochs; train on all rows for N epochs first; score nothing from epoch N on
  --curriculum easy_to_hard|hard_to_easy, --tiers N, --tier_mode tiers|growing|shrinking
                           train on tiers of the kept rows, one after the other
  --anneal_share X         train on all rows for the last share X of the epochs
  --max_ifd X              drop rows with a score of X or more (default 1.0; inf for no limit)
  --score ifd|ifd_ppl      what to rank by (default ifd)
  --order shuffle|descending|ascending
  --on_shortfall repeat|relax|error
                           when fewer rows are eligible than planned (default repeat)
  --min_answer_tokens N    do not score rows with shorter answers (default 1)
  --token_budget N         tokens of a scoring batch
  --label COLUMN           labels to show in the report; selection never reads them
  --output_dir DIR         checkpoints, history (ifd_history/) and report.html
  --num_train_epochs, --learning_rate, --per_device_train_batch_size, --max_length, --use_peft, ...
                           all options of TRL's SFTConfig and ModelConfig: --help-all lists them
  --resume_from_checkpoint DIR
                           go on from a checkpoint, exactly where it stopped

Examples:
  ifd-trainer train recipes/demo.yaml --model HuggingFaceTB/SmolLM2-135M
  ifd-trainer train --model Qwen/Qwen3-0.6B --dataset alpaca.json --keep 0.1 --num_train_epochs 3 --output_dir out
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if arguments[:1] == ["train"]:  # its options are TRL's dataclasses, parsed by TRL's parser
            return _train(arguments[1:])
        options = _parser().parse_args(arguments)
        return options.run(options)
    except (ValueError, FileNotFoundError, OSError, ImportError) as error:
        print(f"ifd-trainer: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ifd-trainer: interrupted; what is saved stays: run the same command again to go on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ifd-trainer",
        description="Self-guided data selection for instruction tuning (IFD, arXiv 2308.12032): score rows, select the "
        "ones worth training on, train with selection inside the loop, and report what happened.",
        epilog="Each command has its own help: ifd-trainer score --help.",
    )
    parser.add_argument("--version", action="version", version=f"ifd_trainer {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="score | select | train | report")
    _add_score(commands)
    _add_select(commands)
    commands.add_parser("train", help="fine-tune with selection inside the loop (see: ifd-trainer train --help)")
    _add_report(commands)
    return parser


def _add_score(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "score",
        help="attach IFD columns to a data set",
        description="Attach the columns cas, das, ifd, ifd_ppl, answer_tokens and ifd_status to every row. Can be "
        "interrupted and run again with the same options: rows that are done are not scored twice.",
        epilog="Example: ifd-trainer score alpaca.json --model HuggingFaceTB/SmolLM2-135M --output scored.parquet",
    )
    parser.add_argument("data", help="rows: a .json, .jsonl, .csv or .parquet file, or a hub name")
    parser.add_argument("--model", required=True, help="model that scores: a hub name or a local path")
    parser.add_argument("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--format", help=f"prompt format: {_FORMATS}; told from the columns by default")
    parser.add_argument(
        "--definition",
        default="paper",
        choices=["paper", "cherry", "superfiltering"],
        help="paper: one tokenisation, the same answer tokens in both passes (default); cherry, superfiltering: what "
        "the published programs of these names compute",
    )
    parser.add_argument("--max-length", type=int, help="most tokens of prompt and answer (default: the model's window)")
    parser.add_argument("--min-answer-tokens", type=int, default=1, help="shorter answers are not scored (default 1)")
    parser.add_argument(
        "--score-truncated",
        action="store_true",
        help="score the part of a too long answer that fits, as the paper does",
    )
    parser.add_argument("--split", default="train", help="split of a hub data set (default train)")
    parser.add_argument("--limit", type=int, help="score the first N rows only")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else the model's)")
    parser.add_argument("--token-budget", type=int, help="tokens of a batch (default 2048 on a CPU, else 16384)")
    parser.add_argument("--part-rows", type=int, help="rows saved at a time (default 64 on a CPU, else 2048)")
    parser.set_defaults(run=_score)


def _add_select(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "select",
        help="keep the rows with the highest IFD",
        description="Keep the scored rows with the highest IFD under a limit. All columns stay; ifd_rank (1 is the "
        "highest) and ifd_reason are added.",
        epilog="Example: ifd-trainer select scored.parquet --keep 0.05 --output cherry.jsonl",
    )
    parser.add_argument("data", help="scored rows: what `ifd-trainer score` wrote")
    parser.add_argument("--output", required=True, help="file to write: .json, .jsonl, .csv or .parquet")
    parser.add_argument("--keep", default="0.1", help="a fraction of all rows (0.1) or a number of rows (1000)")
    parser.add_argument(
        "--max-ifd", type=float, default=1.0, help="drop scores of X or more (default 1; inf: no limit)"
    )
    parser.add_argument("--score", choices=["ifd", "ifd_ppl"], default="ifd", help="column to rank by (default ifd)")
    parser.add_argument("--all", action="store_true", help="write all rows, the dropped ones with their reason")
    parser.add_argument("--strict", action="store_true", help="fail when fewer rows are eligible than asked for")
    parser.set_defaults(run=_select)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "report",
        help="an HTML page about a run or a scored data set",
        description="Write report.html and its plots for a training run (its output folder) or for scored rows.",
        epilog="Example: ifd-trainer report scored.parquet --output report/",
    )
    parser.add_argument("source", help="output folder of a run, or a scored .json, .jsonl, .csv or .parquet file")
    parser.add_argument("--output", help="folder to write to (default: beside the source)")
    parser.add_argument("--label", help="column of labels to show")
    parser.add_argument("--rows", type=int, default=10, help="rows in each table (default 10)")
    parser.set_defaults(run=_report)


def _score(options: argparse.Namespace) -> int:
    from datasets.fingerprint import Hasher

    from .columns import IFDScorer, default_device
    from .files import Parts, check_writable, load_rows, source_digest, write_rows

    check_writable(options.output)
    rows = load_rows(options.data, options.split)
    rows = rows.select(range(min(options.limit, len(rows)))) if options.limit else rows
    device = options.device or default_device()
    scorer = IFDScorer(
        options.model,
        format=options.format,
        definition=options.definition,
        max_length=options.max_length,
        min_answer_tokens=options.min_answer_tokens,
        score_truncated=options.score_truncated,
        device=device,
        dtype=options.dtype,
        token_budget=options.token_budget,
    )
    size = options.part_rows or (64 if device == "cpu" else 2048)
    job = {
        "data": source_digest(options.data, rows),
        "rows": len(rows),
        "part_rows": size,
        "scorer": Hasher.hash(scorer),
    }
    parts = Parts(options.output, job)
    scores = _score_parts(rows, scorer, parts, size)
    for name in scores.columns.intersection(rows.column_names):
        rows = rows.remove_columns(name)  # scored again: the new scores take the place of the old ones
    for name in scores.columns:
        rows = rows.add_column(name, scores[name].array.to_numpy(dtype=object, na_value=None).tolist())
    write_rows(rows, options.output)
    parts.remove()
    counts = ", ".join(f"{count} {status}" for status, count in scores["ifd_status"].value_counts().items())
    print(f"{len(rows)} rows: {counts}. Written to {options.output}.")
    return 0


def _score_parts(rows: object, scorer: IFDScorer, parts: object, size: int) -> pd.DataFrame:
    """Score what is not done yet, part by part; the scores of all rows."""
    import pandas as pd
    from tqdm.auto import tqdm

    from .encoding import token_count

    starts = range(0, len(rows), size)
    done = sum(min(size, len(rows) - start) for part, start in enumerate(starts) if parts.done(part))
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}]"
    with tqdm(total=len(rows), initial=done, desc="Scoring", unit="row", bar_format=layout) as bar:
        for part, start in enumerate(starts):
            if parts.done(part):
                continue
            pairs = scorer.encode(rows[start : start + size])
            before, count = bar.n, min(size, len(rows) - start)
            rows_per_token = count / max(token_count(pairs), 1)
            scores = scorer.score(pairs, lambda tokens, rate=rows_per_token: bar.update(tokens * rate))
            bar.update(before + count - bar.n)  # exact again, and the rows without a score
            parts.save(part, pd.DataFrame(scores.columns()))
    return pd.concat(parts.read(len(starts)), ignore_index=True)


def _select(options: argparse.Namespace) -> int:
    import numpy as np

    from .files import check_writable, load_rows, write_rows
    from .schedule import as_schedule, parse_keep
    from .selection import KEPT, Cherry

    check_writable(options.output)
    rows = load_rows(options.data)
    missing = [name for name in (options.score, "ifd_status") if name not in rows.column_names]
    if missing:
        raise ValueError(f"{options.data} has no column {missing}: score it first with `ifd-trainer score`.")
    columns = rows.select_columns([options.score, "ifd_status"]).to_pandas()
    score = columns[options.score].to_numpy(dtype=float, na_value=np.nan)
    status = columns["ifd_status"].to_numpy(dtype=str)
    budget = as_schedule(parse_keep(options.keep)).budget(0, len(rows))
    eligible = int(((status == "ok") & (score < options.max_ifd)).sum())
    if eligible < budget and not options.strict and eligible:
        print(f"ifd-trainer: warning: {budget} rows asked for, only {eligible} are eligible.", file=sys.stderr)
    policy = Cherry(options.max_ifd, options.score, "error")
    asked = budget if options.strict or not eligible else min(budget, eligible)
    selection = policy({options.score: score, "ifd_status": status}, asked)
    rank = np.full(len(rows), None, dtype=object)
    rank[selection.kept] = np.arange(1, len(selection.kept) + 1)
    rows = rows.add_column("ifd_rank", rank.tolist()).add_column("ifd_reason", selection.reasons.tolist())
    kept = np.flatnonzero(selection.reasons == KEPT)
    write_rows(rows if options.all else rows.select(kept), options.output)
    share = f"{100 * len(kept) / len(rows):.2f} % of {len(rows)}"
    print(f"{len(kept)} rows kept ({share}), {options.score} >= {selection.cut:.4f}. Written to {options.output}.")
    return 0


def _train(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_TRAIN_HELP.format(formats=_FORMATS))
        return 0
    recipe = arguments.pop(0) if not arguments[0].startswith("-") else None
    plan = "--plan" in arguments
    arguments = [word for word in arguments if word != "--plan"]

    from rich.console import Console

    from .report import epoch_table, label_rich_table, write_report
    from .train import build_trainer, make_parser, parse_recipe, planned, selection_of

    if "--help-all" in arguments:
        make_parser().print_help()
        return 0
    parsed = parse_recipe(recipe, arguments)
    trainer = build_trainer(parsed)
    if plan:
        print(planned(trainer))
        return 0
    trainer.train(resume_from_checkpoint=parsed.sft.resume_from_checkpoint)
    trainer.save_model(parsed.sft.output_dir)
    if trainer.is_world_process_zero():
        history = selection_of(trainer).history
        console = Console()
        console.print(epoch_table(history))
        if parsed.selection.label:
            console.print(label_rich_table(history, parsed.selection.label))
        path = write_report(history, parsed.sft.output_dir, label=parsed.selection.label)
        console.print(f"Model: {parsed.sft.output_dir}", highlight=False, soft_wrap=True)
        console.print(f"Report: {path}", highlight=False, soft_wrap=True)
    return 0


def _report(options: argparse.Namespace) -> int:
    from pathlib import Path

    from .files import load_rows
    from .history import History
    from .report import write_report

    source = Path(options.source)
    data = History.load(source) if source.is_dir() else load_rows(options.source).to_pandas()
    folder = options.output or (source if source.is_dir() else source.parent)
    print(f"Report: {write_report(data, folder, label=options.label, rows=options.rows)}")
    return 0
