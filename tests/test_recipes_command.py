"""`ifd-trainer recipes`: all of them in the wheel, listed with a line each, and copied so that they run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile

import pytest
import yaml
from conftest import ROOT

from ifd_trainer.cli import main

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


def test_all_recipes_are_listed_with_a_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES
    for line, name in zip(lines, RECIPES, strict=True):
        title = line.partition(" ")[2].strip()
        assert f"# {title}\n" in (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def test_a_recipe_is_copied_with_the_rows_that_it_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "demo"]) == 0
    out = capsys.readouterr().out
    assert "Copied to demo.yaml, data/demo_train.jsonl, data/demo_heldout.jsonl." in out
    for name in ("demo.yaml", "data/demo_train.jsonl", "data/demo_heldout.jsonl"):
        assert (tmp_path / name).read_bytes() == (ROOT / "recipes" / name).read_bytes()
    assert main(["recipes", "demo.yaml"]) == 0  # the same again
    (tmp_path / "demo.yaml").write_text("keep: 0.2\n")
    assert main(["recipes", "demo"]) == 2
    assert "demo.yaml is there already, and is another file. Name another place" in capsys.readouterr().err
    assert (tmp_path / "demo.yaml").read_text() == "keep: 0.2\n"


@pytest.mark.parametrize(("output", "written"), [("mine/a.yaml", "mine/a.yaml"), (".", "alpaca_dynamic.yaml")])
def test_a_recipe_is_copied_to_a_place_of_the_users(tmp_path, monkeypatch, output, written):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "alpaca_dynamic", "--output", output]) == 0
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.yaml")] == [written]
    assert yaml.safe_load((tmp_path / written).read_text())["num_train_epochs"] == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["alpaca_dynamics"], "There is no recipe 'alpaca_dynamics'. Did you mean alpaca_dynamic?"),
        (["xyz"], "There is no recipe 'xyz'. `ifd-trainer recipes` lists them."),
        (["--output", "x"], "--output goes with the name of a recipe"),
    ],
)
def test_what_is_no_recipe_is_told(words, said, capsys):
    assert main(["recipes", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_wheel_holds_recipes_and_types(tmp_path):
    pytest.importorskip("hatchling")
    checkout = tmp_path / "checkout"
    names = ("pyproject.toml", "README.md", "LICENSE", "recipes", "ifd_trainer")
    for name in names:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copyfile
        (tmp_path / "checkout").mkdir(exist_ok=True)
        copy(source, checkout / name)
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=checkout, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / done.stdout.split()[-1]
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {f"ifd_trainer/recipes/{name}.yaml" for name in RECIPES} | {"ifd_trainer/py.typed"} <= held
    listed = subprocess.run(
        [sys.executable, "-m", "ifd_trainer", "recipes"],
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
        check=True,
    )
    assert [line.split()[0] for line in listed.stdout.splitlines()] == RECIPES
