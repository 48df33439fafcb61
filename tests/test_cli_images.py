"""`ifd-trainer score` and `select` on rows with images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from vision_models import build, by_hand, image_rows, saved

from ifd_trainer.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return saved("idefics3", tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Six rows; the image of one is not there."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for row in image_rows(6):
        if row["row_id"] != 102:
            row["images"][0].save(folder / f"{row['row_id']}.png")
        lines.append({"row_id": row["row_id"], "image": f"{row['row_id']}.png", "messages": row["messages"]})
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder / "rows.jsonl")


def test_rows_with_images_are_scored_and_selected(model, data, tmp_path, capsys):
    scored, kept = str(tmp_path / "scored.parquet"), str(tmp_path / "kept.jsonl")
    words = ["score", data, "--model", model, "--without", "image", "--device", "cpu", "--part-rows", "4"]
    assert main([*words, "--output", scored]) == 0
    assert "6 rows: 5 ok, 1 unreadable_image." in capsys.readouterr().out
    rows = {row["row_id"]: row for row in pq.read_table(scored).to_pylist()}
    seen, processor = build("idefics3")
    raw = {row["row_id"]: row for row in image_rows(6)}
    del raw[102]
    losses = {name: [by_hand(seen, processor, row, name) for row in raw.values()] for name in ("both", "question")}
    np.testing.assert_allclose([rows[row]["cas"] for row in raw], losses["both"], rtol=1e-4)
    np.testing.assert_allclose([rows[row]["das"] for row in raw], losses["question"], rtol=1e-4)
    assert "without: image" in Path(f"{scored}.ifd.yaml").read_text()
    assert main(["select", scored, "--keep", "2", "--score", "image_gain", "--max-ifd", "inf", "--output", kept]) == 0
    gains = dict(zip(raw, np.subtract(losses["question"], losses["both"]), strict=True))
    chosen = [json.loads(line)["row_id"] for line in Path(kept).read_text().splitlines()]
    assert set(chosen) == set(sorted(gains, key=gains.get)[-2:])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--definition", "cherry"], "--definition is of rows of text, and the rows have images"),
        (["--calibrate"], "--calibrate is of rows of text"),
        (["--turns", "tokens"], "--turns is of rows of text"),
        (["--without", "text"], "invalid choice: 'text'"),
    ],
)
def test_options_of_rows_of_text_are_refused(options, said, model, data, tmp_path, capsys):
    try:
        status = main(["score", data, "--model", model, "--output", str(tmp_path / "out.parquet"), *options])
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert said in capsys.readouterr().err


def test_an_option_of_images_is_refused_without_any(model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    words = ["score", str(tmp_path / "rows.jsonl"), "--model", model, "--output", str(tmp_path / "out.parquet")]
    assert main([*words, "--without", "image"]) == 2
    assert "--without is of rows with images, and the rows have none" in capsys.readouterr().err
