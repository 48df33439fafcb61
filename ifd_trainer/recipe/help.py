"""The text of `ifd-trainer train --help`: the keys of `selection_keys` as they are described there, and some of
TRL's.

Made without TRL, whose import takes seconds: `--help-all` lists what TRL's own keys say.
"""

from __future__ import annotations

import dataclasses
import textwrap

from .selection_keys import GROUPS, SelectionKeys

_WIDTH = 120
_INDENT = 27  # of what is said about a key
_HELP = """\
usage: ifd-trainer train [RECIPE.yaml] [--plan] [--KEY VALUE ...]

Fine-tune with TRL's SFTTrainer; before each epoch, score all rows with the model as it is and train on the rows with
the highest IFD. RECIPE.yaml is TRL's flat YAML; every key can be given or overridden here.

  --plan                   Print rows and steps of each epoch, and stop: nothing is scored, written or loaded but the
                           rows and the tokenizer, so a laptop can plan what a GPU is to train.
  --debug                  Show the trace of every error.
  --model NAME_OR_PATH     The model to fine-tune.
  --dataset FILE_OR_NAME   Rows to select from (.json, .jsonl, .csv, .parquet, or a hub name); in a recipe also several,
                           as a mixture (datasets:, as for `trl sft`; test_split_size: holds some out).

{keys}

Of TRL's keys:
  --output_dir DIR         Checkpoints, history (ifd_history/) and report.html.
  --num_train_epochs, --learning_rate, --per_device_train_batch_size, --max_length, --use_peft, ...
                           All options of TRL's SFTConfig and ModelConfig: --help-all lists them.
  --resume_from_checkpoint DIR
                           Go on from a checkpoint, exactly where it stopped; true: from the last one in output_dir.

Examples:
  ifd-trainer train recipes/demo.yaml --model HuggingFaceTB/SmolLM2-135M
  ifd-trainer train --model Qwen/Qwen3-0.6B --dataset alpaca.json --keep 0.1 --num_train_epochs 3 --output_dir out
"""


def train_help() -> str:
    """The short help of `train`, with every selection key."""
    lines = []
    for key in dataclasses.fields(SelectionKeys):
        if key.name in GROUPS:
            lines += ["", f"{GROUPS[key.name]}:"]
        lines += _key_lines(key)
    return _HELP.format(keys="\n".join(lines[1:]))


def _key_lines(key: dataclasses.Field) -> list[str]:
    """One key: its name and values, what it says, and its default, where that does something."""
    values = key.metadata.get("metavar") or "|".join(key.metadata["choices"])
    default = key.default
    if default is dataclasses.MISSING:  # a list
        default, values = " ".join(map(str, key.default_factory())), f"{values} [{values} ...]"
    named, text = f"  --{key.name} {values}", key.metadata["help"] + (f" Default: {default}." if default else "")
    said = textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False)
    first = [f"{named:{_INDENT}}{said.pop(0)}"] if len(named) < _INDENT - 1 else [named]
    return first + [" " * _INDENT + line for line in said]
