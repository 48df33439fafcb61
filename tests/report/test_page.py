"""What the report says: tables against independent counts, which rows stand in which table, and what is drawn."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import subprocess
import sys
from html import unescape
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from scipy.stats import spearmanr

from ifd_trainer.errors import FileAccessError
from ifd_trainer.method.plain_data import to_data
from ifd_trainer.method.schedule import Constant
from ifd_trainer.method.scoring_health import rank_correlation
from ifd_trainer.method.selection import Cherry
from ifd_trainer.report.page import page_html, write_report
from ifd_trainer.report.plots import (
    plot_cas_das,
    plot_ifd_histogram,
    plot_ifd_length,
    plot_kept_by_label,
    plot_kept_flow,
)
from ifd_trainer.report.report_data import read_report_data
from ifd_trainer.report.score_frames import normalised
from ifd_trainer.report.tables import epoch_table, label_rich_table, label_table
from ifd_trainer.training.history import History

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n"
)
SCORES = ("cas", "das", "ifd", "ifd_ppl")
PLOTS = {"kept_flow", "ifd_histogram", "held_out_loss", "cas_das", "ifd_length", "kept_by_label"}


def scores(n: int = 80, seed: int = 0, drift: float = 0.8) -> pd.DataFrame:
    """Rows r00, r01, ...: every tenth has an empty answer and no score; some are above 1."""
    rng = np.random.default_rng(seed)
    das = rng.uniform(1.0, 5.0, n)
    cas = das * (drift + rng.normal(0, 0.15, n)).clip(0.1)
    frame = pd.DataFrame({"row_id": [f"r{i:02d}" for i in range(n)], "cas": cas, "das": das})
    frame["ifd"], frame["ifd_ppl"] = cas / das, np.exp(cas - das)
    frame["answer_tokens"] = rng.integers(1, 200, n)
    frame["ifd_status"] = np.where(np.arange(n) % 10 == 9, "empty_answer", "ok")
    frame.loc[frame["ifd_status"] != "ok", list(SCORES)] = np.nan
    return frame


def selected(frame: pd.DataFrame, budget: int, **policy: object) -> pd.DataFrame:
    columns = {name: frame[name].to_numpy() for name in frame}
    selection = Cherry(**policy)(columns, budget, ids=frame["row_id"].to_numpy())
    times = np.bincount(selection.kept, minlength=len(frame))
    return frame.assign(reason=selection.reasons.astype(str), times=times)


def pool_of(frame: pd.DataFrame) -> pd.DataFrame:
    n = len(frame)
    return pd.DataFrame(
        {
            "row_id": frame["row_id"],
            "prompt": [f"{PREAMBLE}Question {i} <b>bold</b> & more\n\n### Response:" for i in range(n)],
            "answer": ["" if i % 10 == 9 else f"Answer {i}<|im_end|>" for i in range(n)],
            "quality": [("clean", "shuffled", None, "clean")[i % 4] for i in range(n)],
        }
    )


def make_history(folder, epochs: int = 3, budget: int = 20, pool: bool = True, **policy) -> History:
    """A history as the callback writes it, of three epochs with scores that fall."""
    frames = [scores(drift=0.85 - 0.1 * epoch, seed=epoch) for epoch in range(epochs)]
    settings = {
        "policy": to_data(Cherry(**policy)),
        "schedule": to_data(Constant(0.25)),
        "order": "shuffle",
        "seed": 7,
        "score": policy.get("score", "ifd"),
        "max_ifd": policy.get("max_ifd", 1.0),
        "direct_prefix": "### Response:",
        "model": "tiny/model",
        "pool": len(frames[0]),
        "plan": [{"epoch": i, "budget": budget, "batches": 5, "updates": 5} for i in range(epochs)],
        "max_steps": 5 * epochs,
    }
    history = History(folder / "ifd_history", settings)
    if pool:
        history.save_pool(pool_of(frames[0]))
    before = None
    for epoch, frame in enumerate(frames):
        rows = selected(frame, budget, **policy)
        value, kept = rows[settings["score"]], rows["times"] > 0
        record = {
            "epoch": epoch,
            "pool": len(rows),
            "budget": budget,
            "kept": int(kept.sum()),
            "shortfall": 0,
            "cut": float(value[kept].min()),
            "mean_kept": float(value[kept].mean()),
            "mean_dropped": float(value[~kept].mean()),
            "overlap": None if before is None else float((before & kept).sum() / kept.sum()),
            "reasons": rows["reason"].value_counts().to_dict(),
            "seconds_scoring": 12.34,
            "seconds_training": None,
            "eval_loss": None if epoch == 0 else 2.5 - epoch,
        }
        history.add(record, rows)
        before = kept
    return history


@pytest.fixture
def history(tmp_path) -> History:
    return make_history(tmp_path)


# ---- reading a page -------------------------------------------------------------------------------------------------


def page_of(path) -> str:
    """The page's markup without plots, style sheet and script."""
    return markup_of(path.read_text(encoding="utf-8"))


def page_without_plots(source, *, label=None, texts=None, rows: int = 10) -> str:
    """The markup of the page that `write_report` writes, but for its plots, which take a second to draw."""
    return markup_of(page_html(read_report_data(source, label, texts), [], rows))


def markup_of(page: str) -> str:
    """What a page says: of its script, the only one, it is looked up that the page's policy knows it."""
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in page
    page = page.replace(f"<script>{script}</script>", "")
    return re.sub(r"<style>.*?</style>|<svg.*?</svg>", "", page, flags=re.DOTALL)


def visible(markup: str) -> str:
    return unescape(re.sub(r"<[^>]+>", " ", markup))


def row_tables(page: str) -> dict[str, list[str]]:
    """Row ids of each table of rows in the first section, by the table's title."""
    page = page.split("<details>")[0]
    parts = re.split(r"<h3>(.*?)</h3>", page)
    tables = zip(parts[1::2], parts[2::2], strict=True)
    return {
        unescape(title): re.findall(r'<tr><th scope="row">(.*?)</th>', body)
        for title, body in tables
        if 'class="rows"' in body or "No such rows" in body or "listed above" in body
    }


def grid(page: str, title: str) -> dict[str, list[str]]:
    """Cells of the first table of numbers behind a heading, by the first cell of a line."""
    body = page.split(f">{title}</h")[1].split("</table>")[0]
    lines = re.findall(r'<tr><th scope="row"[^>]*>(.*?)</th>(.*?)</tr>', body)
    return {unescape(name): re.findall(r"<td>(.*?)</td>", cells) for name, cells in lines}


def assert_no_holes(page: str) -> None:
    assert not re.search(r"\b(nan|NaN|None|NaT|inf)\b", visible(page))


def assert_plots(path, names: set[str]) -> None:
    """The plots are in the page, no others, as drawings that take their colours from it, and sharp PNG files beside."""
    files = {file.stem: file.read_bytes() for file in (path.parent / "report_files").glob("*.png")}
    assert files.keys() == names
    drawings = re.findall(r"<svg.*?</svg>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert len(drawings) == len(names)
    for drawing in drawings:
        ElementTree.fromstring(drawing)
        assert "var(--ink)" in drawing
        assert not re.search(r"#[0-9a-f]{6}\b", drawing)  # a colour of its own would not follow the page into the dark
        ids, used = (set(re.findall(pattern, drawing)) for pattern in (r' id="([^"]+)', r'(?:href="#|url\(#)([^")]+)'))
        assert ids == used
    every = re.findall(r' id="([^"]+)', "".join(drawings))
    assert len(every) == len(set(every))
    for content in files.values():
        image = Image.open(io.BytesIO(content))
        image.load()
        assert image.size[0] == 1536
        assert 300 < image.size[1] < 3000


def printed(table) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_epoch_table_has_a_line_for_each_epoch(history):
    lines = [line.split() for line in printed(epoch_table(history)).splitlines()]
    first = next(line for line in lines if line[:1] == ["0"])
    last = next(line for line in lines if line[:1] == ["2"])
    record = history.record(2)
    assert first[:3] == ["0", "80", "20"]
    assert first[5] == "-"
    assert first[-1] == "-"  # no held-out loss
    assert last[3:5] == [f"{record['mean_kept']:.3f}", f"{record['mean_dropped']:.3f}"]
    assert last[5:7] == [f"{100 * record['overlap']:.0f}", "%"]
    assert last[-3:] == ["12.3", "-", "0.5000"]
    assert "repeats" not in printed(epoch_table(history))


def test_epoch_table_fits_in_a_terminal_and_shows_repeats(tmp_path):
    history = make_history(tmp_path, epochs=1)
    console = Console(width=80, file=io.StringIO())
    console.print(epoch_table(history))
    assert "…" not in console.file.getvalue()
    history.epochs[0]["budget"] = 26
    text = printed(epoch_table(history))
    assert "repeats" in text
    assert "6" in next(line for line in text.splitlines() if line.split()[:1] == ["0"]).split()


def test_epoch_table_of_a_record_that_lacks_everything(tmp_path):
    text = printed(epoch_table(History(tmp_path, {}, [{"epoch": 0}])))
    assert next(line for line in text.splitlines() if line.split()[:1] == ["0"]).split() == ["0", *["-"] * 9]


def test_epoch_table_names_the_tiers_of_a_curriculum_and_only_of_one(history):
    assert "tiers" not in [column.header for column in epoch_table(history).columns]
    assert "tiers" not in visible(page_without_plots(history))
    for record, tiers in zip(history.epochs, ([0], [0, 1, 2], None), strict=True):  # the last epoch trains on all rows
        record["tiers"] = tiers
    table = epoch_table(history)
    column = next(column for column in table.columns if column.header == "tiers")
    assert list(column.cells) == ["0", "0-2", "-"]
    console = Console(width=80, file=io.StringIO())
    console.print(table)
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    assert "0-2" in console.file.getvalue()
    assert "<td>0-2</td>" in page_without_plots(history)


def test_label_shares_equal_a_count_by_hand(history):
    table = label_table(history, "quality")
    labels = {row["row_id"]: row["quality"] for row in pool_of(scores()).fillna("(none)").to_dict("records")}
    assert table["rows"].to_dict() == {"clean": 40, "(none)": 20, "shuffled": 20}
    assert list(table.index) == ["clean", "(none)", "shuffled"]  # by size, then by name
    for epoch in range(3):
        kept = [row["row_id"] for row in history.rows(epoch).to_dict("records") if row["times"] > 0]
        for value in table.index:
            expected = sum(labels[row] == value for row in kept) / sum(label == value for label in labels.values())
            assert table.loc[value, f"epoch {epoch}"] == pytest.approx(expected)
    assert table.index.name == "quality"


def test_label_table_counts_a_repeated_row_once(tmp_path):
    history = make_history(tmp_path, epochs=1, budget=75)
    assert history.rows(0)["times"].max() == 2
    share = label_table(history, "quality")["epoch 0"]
    assert share.between(0, 1).all()
    assert (share * label_table(history, "quality")["rows"]).sum() == history.record(0)["kept"]


def test_label_table_says_what_is_missing(history):
    with pytest.raises(ValueError, match=r"no column 'kind'.*quality"):
        label_table(history, "kind")
    (history.folder / "pool.parquet").unlink()
    with pytest.raises(ValueError, match=r"no pool\.parquet"):
        label_table(history, "quality")


def test_labels_in_the_terminal_are_no_markup(history):
    history.save_pool(history.pool().assign(quality="[bold]x[/]"))
    text = printed(label_rich_table(history, "quality"))
    assert "[bold]x[/]" in text
    assert "all rows" in text
    assert "25 %" in text


# ---- the page of a history ------------------------------------------------------------------------------------------


def test_rows_stand_in_the_table_they_belong_to(history):
    path = write_report(history, rows=5)
    assert path == history.folder / "report.html"
    tables = row_tables(page_of(path))
    rows = history.rows(2).dropna(subset=["ifd"]).sort_values("ifd", ascending=False)
    ids = {reason: rows.loc[rows["reason"] == reason, "row_id"].tolist() for reason in rows["reason"].unique()}
    assert tables["Kept, highest scores"] == ids["kept"][:5]
    assert tables["Kept, lowest scores"] == ids["kept"][::-1][:5]
    assert tables["Dropped, just below the cut"] == ids["below_cut"][:5]
    assert tables["Dropped, at or above the limit"] == ids.get("above_limit", [])[:5]
    assert tables["Rows without a score"] == ["r09", "r19", "r29", "r39", "r49"]
    shown = [row for table in tables.values() for row in table]
    assert len(shown) == len(set(shown))


def test_no_row_is_listed_as_both_highest_and_lowest(tmp_path):
    tables = row_tables(page_without_plots(make_history(tmp_path, budget=7), rows=5))
    assert len(tables["Kept, highest scores"]) == 5
    assert len(tables["Kept, lowest scores"]) == 2
    assert not set(tables["Kept, highest scores"]) & set(tables["Kept, lowest scores"])


def test_texts_are_cut_and_escaped(history):
    pool = history.pool()
    kept = history.rows(2).sort_values("ifd", ascending=False).query("reason == 'kept'")["row_id"].tolist()
    hostile = pool["row_id"] == kept[0]
    pool.loc[hostile, "answer"] = "<script>alert('x')</script>" + " word" * 400 + " THE END<|im_end|>"
    history.save_pool(pool)
    page = page_without_plots(history, rows=3)
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; word" in page
    shown, whole = page.split("word…</div>", 1)  # what is left out opens below it
    assert "THE END" not in shown
    assert re.match(r'\s*<details class="whole"><summary>whole text</summary>\s*<div class="answer-whole"', whole)
    assert whole.count("THE END</div></details>") == 1
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more</div>" in page
    assert "Below is an instruction" not in page
    assert "### Response" not in page.replace("<dd>&#39;### Response:&#39;</dd>", "")
    assert "im_end" not in page
    assert "empty answer" in page
    for row in kept[:3]:
        assert f'dir="auto">Question {int(row[1:])} ' in page
    below = history.rows(2).query("reason == 'below_cut'").sort_values("ifd")["row_id"].iloc[0]
    assert f">Question {int(below[1:])} " not in page.split("<details>")[0]


def test_page_tells_settings_epochs_and_counts(history):
    page = page_without_plots(history.folder.parent)
    text = re.sub(r"\s+", " ", visible(page))
    for expected in (
        "tiny/model",
        "the rows with the highest IFD = cas / das, of those below 1",
        "20 rows (25.0 % of the pool) in each of 3 epochs",
        "3 recorded of 3 planned",
        "15 planned",
        "rows are repeated",
        "Cherry(max_ifd=1.0, score='ifd', on_shortfall='repeat')",
        "What IFD can and cannot tell",
    ):
        assert expected in text
    counts = grid(page, "Rows by what became of them")
    for epoch in range(3):
        reasons = history.rows(epoch)["reason"].value_counts()
        assert counts["kept"][epoch] == str(reasons["kept"])
        assert counts["dropped: below the cut"][epoch] == str(reasons["below_cut"])
        assert counts["dropped: at or above the limit"][epoch] == str(reasons.get("above_limit", 0))
        assert counts["no score: the answer has no token"][epoch] == str(reasons["empty_answer"])
    assert grid(page, "Epochs")["1"][:2] == ["80", "20"]
    assert_no_holes(page)


def test_page_shows_label_shares_and_medians(history):
    lines = grid(page_without_plots(history), "By quality")
    table = label_table(history, "quality")
    rows = history.rows(2).merge(history.pool(), on="row_id")
    for value in ("clean", "shuffled"):
        shares = [f"{100 * table.loc[value, f'epoch {epoch}']:.0f} %" for epoch in range(3)]
        median = rows.loc[rows["quality"] == value, "ifd"].median()
        assert lines[value] == [str(table.loc[value, "rows"]), f"{median:.3f}", *shares]
    assert lines["all rows"] == ["80", f"{rows['ifd'].median():.3f}", "25 %", "25 %", "25 %"]


def test_page_needs_no_other_file_and_plots_lie_beside_it(history):
    path = write_report(history)
    assert_plots(path, PLOTS)
    page = page_of(path)
    names = r'xmlns(:xlink)?="http://www.w3.org/[^"]*"'  # of XML, which nobody asks for
    whole = re.sub(names, "", path.read_text(encoding="utf-8"))
    assert not re.search(r"<link|@import|https?://|\bsrc=|fetch\(|XMLHttpRequest", whole)
    alts = re.findall(r'role="img" aria-label="(.*?)"', page)
    assert len(alts) == 6
    assert all(len(alt) > 40 for alt in alts)


def test_one_epoch_has_no_flow_and_no_second_section(tmp_path):
    folder = tmp_path / "page"
    write_report(make_history(tmp_path / "three"), folder)
    path = write_report(make_history(tmp_path / "one", epochs=1), folder)
    assert_plots(path, PLOTS - {"kept_flow", "held_out_loss"})  # those of the report before are gone too
    page = page_of(path)
    assert "<details>" not in page
    assert "20 rows (25.0 % of the pool) in one epoch" in page
    assert_no_holes(page)


def test_first_epoch_is_in_a_section_of_its_own(history):
    page = page_without_plots(history, rows=3)
    assert "Rows of epoch 2 (the last)" in page.split("<details>")[0]
    first = page.split("<details>")[1]
    assert "Rows of epoch 0 (the first)" in first
    best = history.rows(0).query("reason == 'kept'").sort_values("ifd", ascending=False)["row_id"].iloc[0]
    assert re.findall(r'<tr><th scope="row">(.*?)</th>', first)[0] == best


def test_page_without_pool(tmp_path):
    history = make_history(tmp_path, pool=False)
    page = page_without_plots(history)
    assert "pool.parquet is missing" in page
    assert "no text known" in page
    assert "By quality" not in page
    assert row_tables(page)["Kept, highest scores"][0].startswith("r")
    assert_no_holes(page)
    with pytest.raises(ValueError, match="no column 'quality'"):
        write_report(history, label="quality")


@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_epoch_whose_rows_cannot_be_read_is_left_out_with_a_note(history, damage):
    file = history.rows_path(2)
    file.unlink() if damage == "missing" else file.write_bytes(file.read_bytes()[:100])
    path = write_report(history, rows=3)
    assert_plots(path, PLOTS)
    page = page_of(path)
    assert "Epoch 2: epoch-002.parquet " + ("is missing" if damage == "missing" else "cannot be read") in page
    assert "Rows of epoch 1 (the last)" in page
    assert grid(page, "Epochs").keys() == {"0", "1", "2"}
    assert list(label_table(history, "quality").columns) == ["rows", "epoch 0", "epoch 1"]
    assert_no_holes(page)


def test_records_that_lack_entries_and_runs_that_recorded_nothing(history, tmp_path):
    for record in history.epochs:
        for name in ("overlap", "reasons", "cut", "eval_loss", "seconds_scoring", "mean_dropped"):
            record.pop(name)
    history.settings = {}
    page = page_of(write_report(history))
    assert grid(page, "Rows by what became of them")["kept"] == ["20", "20", "20"]
    assert "not recorded" in page
    assert_no_holes(page)
    empty = History(tmp_path / "empty", {"model": "m"})
    empty.save()
    page = page_of(write_report(tmp_path / "empty"))
    assert "No epoch has been recorded yet." in page
    assert "There are no rows to plot." in page
    assert_no_holes(page)


def test_page_tells_of_shortfall_duplicates_and_prompts_that_do_not_help(tmp_path):
    history = make_history(tmp_path, epochs=1, budget=75)
    pool = history.pool()
    pool.loc[pool["row_id"].isin(["r01", "r02"]), ["prompt", "answer"]] = ["Same?", "Same."]
    history.save_pool(pool)
    rows = history.rows(0)
    history.epochs[0]["shortfall"] = 75 - history.epochs[0]["kept"]
    repeats = 75 - int((rows["times"] > 0).sum())
    twice = int(rows.set_index("row_id").loc[["r01", "r02"], "times"].gt(0).sum())
    page = page_of(write_report(history))
    assert f"the rest was filled with {repeats} repeats." in page
    assert "2 rows have the same prompt and answer as another row" in page
    assert f"{twice} of them {'was' if twice == 1 else 'were'} kept in the last epoch (epoch 0)" in page
    assert '<th scope="col">times</th>' in page
    frame = scores(drift=1.2)
    assert "of the scored rows are at 1 or more" in page_of(write_report(frame, tmp_path / "high"))


def test_scores_by_perplexity_ratio_are_named_and_ranked_as_such(tmp_path):
    history = make_history(tmp_path, epochs=1, score="ifd_ppl")
    page = page_of(write_report(history, rows=4))
    rows = history.rows(0).query("reason == 'kept'").sort_values("ifd_ppl", ascending=False)
    assert row_tables(page)["Kept, highest scores"] == rows["row_id"].tolist()[:4]
    assert '<th scope="col">IFD (ppl)</th>' in page
    assert "perplexity ratio exp(cas - das)" in page


# ---- the page of a data set -----------------------------------------------------------------------------------------


def test_scores_alone(tmp_path):
    frame = scores().assign(instruction="Sing.", input=[f"tune {i}" for i in range(80)], output="La<la>")
    path = write_report(frame, tmp_path, rows=4)
    page = page_of(path)
    ranked = frame.dropna(subset=["ifd"]).sort_values("ifd", ascending=False)
    under, over = ranked[ranked["ifd"] < 1], ranked[ranked["ifd"] >= 1]
    tables = row_tables(page)
    assert tables["Highest scores below 1"] == under["row_id"].tolist()[:4]
    assert tables["Lowest scores"] == under["row_id"].tolist()[::-1][:4]
    assert tables["Scores of 1 or more: the prompt does not help"] == over["row_id"].tolist()[:4]
    assert tables["Rows without a score"] == ["r09", "r19", "r29", "r39"]
    assert grid(page, "Rows by status") == {"has a score": ["72"], "no score: the answer has no token": ["8"]}
    assert f"tune {int(tables['Lowest scores'][0][1:])}</div>" in page
    assert "La&lt;la&gt;" in page
    assert "Epochs" not in page
    assert_plots(path, {"ifd_histogram", "cas_das", "ifd_length"})
    assert_no_holes(page)


def test_rows_with_scores_show_how_alike_they_are_to_targets(tmp_path):
    likeness = np.linspace(-0.2, 0.9, 80)
    frame = scores().assign(target_similarity=np.where(np.arange(80) == 3, np.nan, likeness))
    path = write_report(frame, tmp_path, rows=4)
    page = page_of(path)
    assert "target_similarity: cosine with the target most like the row, from -1 to 1." in page
    assert f"{frame.loc[frame['ifd_status'] == 'ok', 'target_similarity'].median():.3f}" in page
    assert_plots(path, {"ifd_histogram", "cas_das", "ifd_length", "further_scores"})
    assert_no_holes(page)


def test_rows_that_were_held_against_targets_alone(tmp_path):
    frame = pd.DataFrame({"row_id": range(40), "target_similarity": np.linspace(0.1, 1.0, 40), "target_status": "ok"})
    frame.loc[5, ["target_similarity", "target_status"]] = np.nan, "empty_answer"
    path = write_report(frame, tmp_path, rows=2)
    page = page_of(path)
    assert row_tables(page) == {
        "Highest scores": ["39", "38"],
        "Lowest scores": ["0", "1"],
        "Rows without a score": ["5"],
    }
    assert "39 of 40 rows have a score." in page
    assert "ifd-trainer select SCORED.parquet --keep 0.05 --score target_similarity" in page
    assert "below 1" not in page
    assert "--calibrate" not in page
    assert_plots(path, {"ifd_histogram", "further_scores"})
    assert_no_holes(page)
    chosen = frame.drop(columns="target_status").assign(ifd_reason="less_like_targets", ifd_rank=np.nan)
    chosen.loc[[39, 38], "ifd_reason"], chosen.loc[[39, 38], "ifd_rank"] = "kept", [1, 2]
    chosen.loc[5, "ifd_reason"] = "empty_answer"
    page = page_of(write_report(chosen, tmp_path / "chosen", rows=2))
    assert row_tables(page)["Kept, highest scores"] == ["39", "38"]
    assert row_tables(page)["Rows without a score"] == ["5"]
    assert "the answer has no token" in page


@pytest.mark.parametrize("column", ["reason", "ifd_reason"])
def test_selected_data_set(tmp_path, column):
    frame = selected(scores(), 15).drop(columns="times").rename(columns={"reason": column})
    frame["quality"] = np.where(np.arange(80) % 2, "odd", "even")
    path = write_report(Dataset.from_pandas(frame), tmp_path, rows=6)
    page = page_of(path)
    kept = frame[frame[column] == "kept"].sort_values("ifd", ascending=False)
    assert row_tables(page)["Kept, highest scores"] == kept["row_id"].tolist()[:6]
    assert f"15 rows, cut at {kept['ifd'].min():.3f}" in page
    share = (kept["quality"] == "odd").sum() / 40
    assert grid(page, "By quality")["odd"][-1] == f"{100 * share:.0f} %"
    assert_plots(path, PLOTS - {"kept_flow", "held_out_loss"})


def test_a_selection_by_perplexity_ratio_is_recognised(tmp_path):
    frame = selected(scores(), 15, score="ifd_ppl")
    by_ratio = set(frame.nlargest(15, "ifd")["row_id"])
    assert by_ratio != set(frame.loc[frame["reason"] == "kept", "row_id"])
    page = page_of(write_report(frame, tmp_path))
    assert "<dt>Score</dt><dd>IFD (ppl)</dd>" in page


def test_a_reason_column_of_the_data_set_itself_is_no_selection():
    page = page_without_plots(scores().assign(reason="because"))
    assert "Rows by status" in page
    assert "because" not in page


def test_no_row_has_a_score(tmp_path):
    frame = scores().assign(**dict.fromkeys(SCORES, np.nan), ifd_status="malformed", prompt="Why?", completion="So.")
    path = write_report(frame, tmp_path, rows=3)
    page = page_of(path)
    assert "No row has a score" in page
    assert grid(page, "Rows by status") == {"no score: the format cannot render the row": ["80"]}
    assert row_tables(page) == {"Rows without a score": ["r00", "r01", "r02"]}
    assert_plots(path, set())
    assert_no_holes(page)
    page = page_of(write_report(frame.iloc[:0], tmp_path))
    assert "There are no rows." in page
    assert_no_holes(page)


def test_scores_that_are_not_finite_and_columns_of_other_makers(tmp_path):
    frame = pd.DataFrame({"id": [7, 8, 9, 10], "cas": [1.0, 2.0, np.inf, None], "das": [2.0, 2.5, 1.0, 1.0]})
    page = page_of(write_report(frame, tmp_path))
    assert row_tables(page)["Highest scores below 1"] == ["8", "7"]
    assert row_tables(page)["Rows without a score"] == ["9", "10"]
    assert "0.800" in page
    assert_no_holes(page)


def test_what_cannot_be_reported_is_a_clear_error(tmp_path, history):
    with pytest.raises(ValueError, match=r"no IFD columns.*\['text'\].*ifd-trainer score"):
        write_report(pd.DataFrame({"text": ["x"]}), tmp_path)
    with pytest.raises(TypeError, match="DatasetDict, pass one of its splits"):
        write_report(DatasetDict({"train": Dataset.from_pandas(scores())}), tmp_path)
    with pytest.raises(FileNotFoundError, match="No selection history"):
        write_report(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no column 'kind'"):
        write_report(history, label="kind")
    with pytest.raises(ValueError, match="at least 1"):
        write_report(history, rows=0)
    with pytest.raises(ValueError, match="rows do not say what was kept"):
        plot_kept_flow({0: scores(), 1: scores()})


# ---- texts ----------------------------------------------------------------------------------------------------------


def first_texts(page: str) -> list[str]:
    """Prompt, input and answer of the first row with a score."""
    cell = page.split('<td class="text">')[1].split("</td>")[0]
    return [unescape(text) for text in re.findall(r'<div class="\w+" dir="auto">(.*?)</div>', cell, re.DOTALL)]


def test_texts_given_apart_are_matched_by_id(tmp_path):
    history = make_history(tmp_path, epochs=1, pool=False)
    best = history.rows(0).query("reason == 'kept'").sort_values("ifd", ascending=False)["row_id"].iloc[0]
    texts = pd.DataFrame({"id": [f"r{i:02d}" for i in range(80)][::-1], "kind": "song"})
    texts["instruction"], texts["output"] = "Ask " + texts["id"], "Say " + texts["id"]
    page = page_without_plots(history, texts=texts, label="kind")
    assert first_texts(page) == [f"Ask {best}", f"Say {best}"]
    assert grid(page, "By kind")["song"][0] == "80"
    assert "pool.parquet is missing" not in page
    with pytest.raises(ValueError, match="no column `row_id` or `id`"):
        write_report(history, texts=texts.drop(columns="id"))
    with pytest.raises(ValueError, match="same id twice"):
        write_report(history, texts=pd.concat([texts, texts]))
    frame = scores().drop(columns="row_id")
    assert first_texts(page_without_plots(frame, texts=texts))[0].startswith("Ask r")
    with pytest.raises(ValueError, match="80 rows and 79 texts"):
        write_report(frame, tmp_path, texts=texts.iloc[1:])


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "First?"},
    {"role": "assistant", "content": "One."},
    {"role": "user", "content": [{"type": "text", "text": "Second?"}]},
    {"role": "assistant", "content": "Two."},
]
CHAT = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
WITH_INPUT = "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:"


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction": "Do it.", "input": None, "output": "Done."}, ["Do it.", "Done."]),
        ({"prompt": "Do it.\n\n### Response:", "completion": "Done."}, ["Do it.", "Done."]),
        ({"prompt": TURNS[:4], "completion": TURNS[4:]}, ["[after 2 earlier turns] Second?", "Two."]),
        ({"messages": TURNS}, ["[after 2 earlier turns] Second?", "Two."]),
        ({"messages": None}, []),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, ["Hi", "Ho"]),
        ({"prompt": CHAT, "answer": "Yes.<|im_end|>\n"}, ["Question 0", "Yes."]),
        ({"prompt": WITH_INPUT, "answer": "3"}, ["Add.", "1 and 2", "3"]),
        ({"prompt": WITH_INPUT[:-1], "answer": ':"3"'}, ["Add.", "1 and 2", '"3"']),
        ({"prompt": "اكتب قصيدة", "completion": "写一首诗"}, ["اكتب قصيدة", "写一首诗"]),
    ],
)
def test_texts_of_every_format(columns, expected):
    frame = scores(4).sort_values("ifd", ascending=False)
    for name, value in columns.items():
        same = value.replace("{}", "Question {}") if isinstance(value, str) else value
        frame[name] = [same.replace("{}", str(i)) if isinstance(same, str) else same for i in range(4)]
    frame["ifd"] = [0.9, 0.8, 0.7, 0.6]
    assert first_texts(page_without_plots(frame)) == expected


def test_long_texts_end_with_an_ellipsis():
    frame = scores(3).assign(instruction="长" * 2000, output="\n".join(f"line {i}" for i in range(30)))
    prompt, answer = first_texts(page_without_plots(frame))
    assert prompt == "长" * 400 + "…"
    assert answer.splitlines()[-1] == "line 7…"


# ---- plots ----------------------------------------------------------------------------------------------------------


def texts_in(figure) -> list[str]:
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    titles = [ax.get_title(loc=place) for ax in figure.axes for place in ("center", "left")]
    return [text.strip() for text in [*texts, *titles]]


def test_histogram_holds_every_row_and_the_cut_of_every_epoch(history):
    epochs = {epoch: history.rows(epoch) for epoch in range(3)}
    figure = plot_ifd_histogram(epochs, max_ifd=1.0)
    assert len(figure.axes) == 3
    for ax, rows in zip(figure.axes, epochs.values(), strict=True):
        heights = [sum(patch.get_height() for patch in bars) for bars in ax.containers]
        counts = [rows["ifd"].notna() & (rows["reason"] == name) for name in ("below_cut", "kept", "above_limit")]
        beyond = int((rows["ifd"] > ax.get_xlim()[1]).sum())
        assert sum(heights) + beyond == sum(count.sum() for count in counts)
        assert heights[1] == 20
        cut = rows.loc[rows["reason"] == "kept", "ifd"].min()
        assert f"cut {cut:.3f}" in texts_in(figure)
        assert any(line.get_xdata()[0] == pytest.approx(cut) for line in ax.lines)
        assert ax.get_ylabel().endswith("rows")
    assert "no unit" in figure.axes[-1].get_xlabel()


def test_histogram_says_how_many_values_lie_beyond_its_end():
    frame = scores()
    frame.loc[:2, ["ifd", "ifd_ppl"]] = [[4.0, 32000.0], [5.0, 40.0], [700.0, 9.0]]
    for score in ("ifd", "ifd_ppl"):
        figure = plot_ifd_histogram(frame, score=score)
        end = figure.axes[0].get_xlim()[1]
        assert 1 < end <= 3
        assert f"3 rows beyond {end:g}" in texts_in(figure)
    few = plot_ifd_histogram(frame.iloc[:2])
    assert few.axes[0].get_xlim()[1] == 3
    assert "2 rows beyond 3" in texts_in(few)


@given(
    st.lists(
        st.tuples(
            st.none() | st.sampled_from([1, 2, 3, 40, 1000]) | st.integers(0, 9),
            st.none() | st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 1e300]) | st.floats(-2, 2),
        ),
        max_size=12,
    )
)
def test_the_rank_correlation_is_that_of_another_library(pairs):
    x, y = (pd.Series(values, dtype=float) for values in ([a for a, _ in pairs], [b for _, b in pairs]))
    known = pd.DataFrame({"x": x, "y": y}).dropna()
    found = rank_correlation(x, y)
    if len(known) < 3 or (known.nunique() < 2).any():
        assert found is None
    else:
        assert found == pytest.approx(spearmanr(known["x"], known["y"]).statistic, abs=1e-12)


def test_length_plot_gives_the_rank_correlation(tmp_path):
    frame = scores()
    known = frame.dropna(subset=["ifd"])
    expected = spearmanr(known["answer_tokens"], known["ifd"]).statistic
    assert f"72 rows   Spearman {expected:.2f}" in texts_in(plot_ifd_length(frame))
    assert f"rank correlation of score and answer length is {expected:.2f}." in page_of(write_report(frame, tmp_path))
    assert "72 rows   Spearman -" in texts_in(plot_ifd_length(frame.assign(answer_tokens=5)))


def test_scatter_draws_every_row_and_labels_its_axes(history):
    figure = plot_cas_das({epoch: history.rows(epoch) for epoch in range(3)}, max_ifd=1.0)
    assert len(figure.axes) == 2  # the first and the last
    for ax, epoch in zip(figure.axes, (0, 2), strict=True):
        drawn = np.concatenate([points.get_offsets() for points in ax.collections])
        rows = history.rows(epoch).dropna(subset=["cas"])
        np.testing.assert_allclose(sorted(drawn[:, 0]), sorted(rows["das"]))
        assert "nats per token" in ax.get_xlabel()
    assert "nats per token" in figure.axes[0].get_ylabel()


def test_large_pools_are_sampled_without_touching_global_random_state():
    frame = scores(25_000)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = plot_cas_das(frame), plot_cas_das(frame)
    assert "20,000 of 22,500 rows drawn" in texts_in(first)
    points = [figure.axes[0].collections[0].get_offsets() for figure in (first, second)]
    assert len(points[0]) == 20_000
    np.testing.assert_array_equal(*points)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


def test_flow_counts_rows_that_stay_return_come_and_go():
    def frame(kept: str) -> pd.DataFrame:
        rows = pd.DataFrame({"row_id": list("abcdef"), "ifd": 0.5})
        return rows.assign(reason=np.where(rows["row_id"].isin(list(kept)), "kept", "below_cut"))

    figure = plot_kept_flow({0: frame("abc"), 1: frame("bcd"), 2: frame("ade")})
    again, back, new, gone = ([bar.get_height() for bar in bars] for bars in figure.axes[0].containers)
    assert again == [0, 2, 1]
    assert back == [0, 0, 1]
    assert new == [3, 1, 1]
    assert gone == [0, -1, -2]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0", "1", "2"]


def test_label_plot_draws_the_shares(history):
    table = label_table(history, "quality")
    figure = plot_kept_by_label(table)
    for epoch, bars in enumerate(figure.axes[0].containers):
        assert [bar.get_width() / 100 for bar in bars] == pytest.approx(table[f"epoch {epoch}"].tolist())
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == ["clean (40)", "(none) (20)", "shuffled (20)"]


def test_labels_in_any_script_are_plotted_without_a_warning(tmp_path):
    frame = selected(scores(), 20).assign(label=["正しい", "$x_", "عربي", "ok"] * 20)
    page = page_of(write_report(frame, tmp_path))
    assert grid(page, "By label")["正しい"][0] == "20"


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("scored", [True, False])
def test_plots_of_hardly_any_rows(rows, scored):
    frame = scores(max(rows, 1)).iloc[:rows]
    frame = frame if scored else frame.assign(**dict.fromkeys(SCORES, np.nan))
    for plot in (plot_ifd_histogram, plot_cas_das, plot_ifd_length):
        figure = plot(frame)
        figure.savefig(io.BytesIO())
        assert ("No row has a score." in texts_in(figure)) == (rows == 0 or not scored)


def test_plots_of_epochs_that_kept_nothing():
    nothing = scores(2).assign(reason="below_cut", times=0)
    flow = plot_kept_flow({0: nothing})
    assert [bar.get_height() for bars in flow.axes[0].containers for bar in bars] == [0, 0, 0, 0]
    labels = plot_kept_by_label(pd.DataFrame({"rows": [1], "epoch 0": [0.0]}, index=["x"]))
    assert [bar.get_width() for bar in labels.axes[0].containers[0]] == [0]
    for figure in (flow, labels):
        figure.savefig(io.BytesIO())


def test_no_pyplot_and_no_global_state(tmp_path):
    make_history(tmp_path)
    code = (
        "import sys, matplotlib; before = matplotlib.rcParams.copy()\n"
        "from ifd_trainer.report.page import write_report\n"
        f"write_report({str(tmp_path)!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
        "assert matplotlib.rcParams.copy() == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- what cannot be read or written ------------------------------------------------------------------------------


def test_a_row_without_a_status_counts_as_not_scored(tmp_path):
    frame = scores(8).assign(ifd_reason=["kept"] * 3 + ["below_cut"] * 5)
    frame[["ifd_status", "ifd_reason"]] = frame[["ifd_status", "ifd_reason"]].astype(object)
    frame.loc[2, ["ifd_status", "ifd_reason"]] = None
    rows = normalised(frame)
    before = normalised(frame.assign(ifd_status=frame["ifd_status"].fillna("ok")))
    assert rows["ifd_status"][2] == "nonfinite"
    assert rows["reason"].tolist() == ["kept"] * 2 + ["(none)"] + ["below_cut"] * 5
    assert rows["ifd"].isna().tolist() == [value or i == 2 for i, value in enumerate(before["ifd"].isna())]
    page = visible(page_of(write_report(frame, tmp_path)))
    assert "r02 the loss is not finite" in " ".join(page.split())
    assert normalised(frame.assign(ifd_status=None))["ifd"].isna().all()
    assert write_report(frame.assign(ifd_status=None), tmp_path).is_file()


def test_a_file_in_the_place_of_a_folder_is_told_before_anything_is_read(tmp_path):
    (tmp_path / "page").write_text("text")
    for folder in (tmp_path / "page", tmp_path / "page" / "more"):
        with pytest.raises(ValueError, match="is a file"):
            write_report(tmp_path / "nothing to read", folder)
    with pytest.raises(ValueError, match=r"rows must be a whole number of at least 1, got 1\.5"):
        write_report(scores(5), rows=1.5)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("history.json", "[1]"),
        ("history.json", '{"version": 1}'),
        ("history.json", '{"version": 1, "settings": null, "epochs": []}'),
        ("history.json", '{"version": 1, "settings": {}, "epochs": 3}'),
        ("history.json", '{"version": 1, "settings": {}, "epochs": [{"epoch": null}]}'),
        ("history.json", "\xff"),
        ("train.parquet", "no parquet"),
    ],
)
def test_files_that_are_damaged_are_told_in_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(FileAccessError, match=re.escape(f"The files in {tmp_path} cannot be read")):
        write_report(tmp_path, tmp_path / "page")


def test_a_pool_that_cannot_be_read_leaves_out_the_texts(history):
    (history.folder / "pool.parquet").write_bytes(b"no parquet")
    page = visible(page_of(write_report(history.folder)))
    assert "pool.parquet cannot be read: rows are listed without their texts and labels." in page
