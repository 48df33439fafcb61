"""What a page opens with, what can be done with its tables, where a selection would cut, and figures as files."""

from __future__ import annotations

import re
from html import unescape

import numpy as np
import pandas as pd
import pytest
from test_page import (
    assert_no_holes,
    make_history,
    page_of,
    page_without_plots,
    printed,
    scores,
    texts_in,
    visible,
)

from ifd_trainer.cli import main
from ifd_trainer.method.guard import Guard
from ifd_trainer.method.plain_data import to_data
from ifd_trainer.publish.provenance import Provenance, provenance_path, write_provenance
from ifd_trainer.report import (
    History,
    epoch_table,
    plot_held_out_loss,
    plot_ifd_histogram,
    plot_kept_by_label,
    plot_kept_flow,
    write_report,
)
from ifd_trainer.report.report_data import Origin, read_report_data
from ifd_trainer.report.summary import summary_of


def summary(source, **options):
    return summary_of(read_report_data(source, None, None, **options))


def guarded(folder, **records) -> History:
    """A run with guards, a held-out loss before training, and whatever `records` say of its last epoch."""
    history = make_history(folder)
    history.settings["guard"] = to_data(Guard())
    history.epochs[0] |= {"before_training": {"eval_loss": 2.75}, "eval_loss": 2.0}
    history.epochs[2] |= {"separation": 0.96, "rank_correlation": 0.931, "kept_only_without_guards": 3, **records}
    history.epochs[2]["reasons"] |= {"unfinished": 2, "duplicate": 1}
    return history


# ---- the verdict ----------------------------------------------------------------------------------------------------


def test_a_run_that_went_well_says_so_with_its_numbers(tmp_path):
    history = guarded(tmp_path / "my run")
    said = summary(history)
    kept = set().union(*(rows.loc[rows["times"] > 0, "row_id"] for rows in map(history.rows, range(3))))
    above = history.epochs[2]["reasons"].get("above_limit", 0)
    assert said.fine is True
    assert said.verdict == "The run went as planned; nothing here speaks against it."
    assert said.points == [
        f"Each of 3 epochs trained on 20 of 80 rows (25 %); {len(kept)} different ones in all.",
        f"In epoch 2, guards kept out {above + 3} rows: {above} at or above the limit, 2 unfinished and 1 duplicate. "
        "Without them 3 of these would have been trained on, by the same scores.",
        "The scores of epoch 2 carry information: a mismatched pair scores higher than a row of the pool in 96 % of "
        "cases (a coin: 50 %) and rows rank as in the scoring before with a correlation of 0.93 (1: the same).",
        "Held-out loss: 2.7500 before training, 0.5000 after epoch 2; nats per token, low is good.",
    ]
    commands = [command for _, command in said.steps]
    assert commands == [
        f"ifd-trainer report '{tmp_path}/my run' --rows 50",
        "ifd-trainer train RECIPE.yaml --policy random --output_dir runs/random",
    ]


@pytest.mark.parametrize(
    ("change", "worry"),
    [
        ({"frozen": "scores hardly differ any more"}, "from epoch 2 on the scores carried no information"),
        ({"separation": 0.55}, "at the end the scores hardly tell a row from a mismatched one"),
        ({"shortfall": 4}, "too few rows were eligible in epoch 2"),
        ({"eval_loss": 3.5}, "the held-out loss is higher than before training"),
    ],
    ids=str,
)
def test_what_speaks_against_a_run_stands_first(tmp_path, change, worry):
    said = summary(guarded(tmp_path, **change))
    assert said.fine is False
    assert said.verdict == f"Look closer before you use this model: {worry}."


def test_a_run_without_guards_and_without_held_out_rows_is_told_how_to_have_them(tmp_path):
    history = make_history(tmp_path)
    history.settings["guard"] = None
    for record in history.epochs:
        record["eval_loss"] = None
    said = summary(history)
    assert said.verdict == "Look closer before you use this model: no guard kept noise out."
    assert "No guard was on: rows with a high score are hard ones, and mismatched or unfinished ones." in said.points
    assert "No held-out loss was measured, so it is not known what training changed." in said.points
    commands = [command for _, command in said.steps]
    assert "ifd-trainer train RECIPE.yaml --guards auto" in commands
    assert "ifd-trainer train RECIPE.yaml --eval_dataset HELD_OUT.jsonl --eval_strategy epoch" in commands


def test_a_run_that_is_not_at_its_end_says_so(tmp_path):
    history = guarded(tmp_path)
    history.epochs.pop()
    said = summary(history)
    assert (said.fine, said.verdict) == (None, "The run is not at its end: 2 of 3 epochs are recorded.")
    assert summary(History(tmp_path / "none", {"model": "m"})) is None


def test_the_page_begins_with_it(tmp_path):
    page = page_of(write_report(guarded(tmp_path)))
    assert page.index("The run went as planned") < page.index("What stays and what changes") < page.index("Epochs</h2>")
    assert '<section class="verdict good"' in page
    assert_no_holes(page)


# ---- the held-out loss before training ------------------------------------------------------------------------------


def test_the_table_and_the_plot_begin_before_training(tmp_path):
    history = guarded(tmp_path)
    lines = [line.split() for line in printed(epoch_table(history)).splitlines()]
    assert ["start", "2.7500"] in lines
    assert "The line start is the model before training." in printed(epoch_table(history))
    line = plot_held_out_loss(history).axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [2.75, 2.0, 1.5, 0.5])
    labels = [tick.get_text() for tick in plot_held_out_loss(history).axes[0].get_xticklabels()]
    assert labels == ["before", "epoch 0", "epoch 1", "epoch 2"]


def test_of_a_run_that_starts_anew_the_epochs_before_are_left_out(tmp_path):
    history = guarded(tmp_path)
    history.settings |= {"warmup_epochs": 1, "warmup": {"type": "Brief"}, "start_anew": True}
    np.testing.assert_allclose(plot_held_out_loss(history).axes[0].lines[0].get_ydata(), [2.75, 1.5, 0.5])


def test_several_sets_have_a_line_and_a_column_each(tmp_path):
    history = make_history(tmp_path, epochs=1)
    sets = {"code": 1.5, "chat": 2.5}
    history.epochs[0] |= {"before_training": {"eval_losses": sets}, "eval_losses": {"code": 1.25, "chat": 2.0}}
    lines = [line.split() for line in printed(epoch_table(history)).splitlines()]
    assert ["start", "1.5000", "2.5000"] in lines
    lines = {line.get_label(): list(line.get_ydata()) for line in plot_held_out_loss(history).axes[0].lines}
    assert lines == {"code": [1.5, 1.25], "chat": [2.5, 2.0]}


# ---- scored files ---------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path):
    frame = scores(drift=0.7).assign(instruction="Sing.", output="La.")
    file = tmp_path / "my scores.parquet"
    frame.to_parquet(file)
    made = {"model": "tiny/model", "definition": "paper", "format": "alpaca", "source": "rows.jsonl"}
    write_provenance(file, Provenance(**made, program="ifd_trainer 0.1.0"), frame)
    return file, frame


def cut_lines(page: str) -> list[list[str]]:
    body = page.split(">Where a selection would cut</h2>")[1].split("</table>")[0]
    return [
        [unescape(re.sub(r"<[^>]+>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line)]
        for line in re.findall(r"<tr>(<th scope=\"row\".*?)</tr>", body)
    ]


def test_a_scored_file_says_where_it_comes_from_and_where_a_selection_would_cut(scored, tmp_path, capsys):
    file, frame = scored
    assert main(["report", str(file), "--output", str(tmp_path / "page")]) == 0
    page = page_of(tmp_path / "page" / "report.html")
    text = re.sub(r"\s+", " ", visible(page))
    for said in (
        f"File {file}",
        "Scored with tiny/model",
        "tokenised together, the same answer tokens in both passes (paper)",
        "Prompt format alpaca",
        "Program ifd_trainer 0.1.0",
        "72 of 80 rows have a score.",
        "8 rows without a score: 8 (the answer has no token).",
        f"ifd-trainer score rows.jsonl --model tiny/model --output '{file}' --calibrate",
    ):
        assert said in text
    under = frame.loc[frame["ifd"] < 1, "ifd"].sort_values(ascending=False).tolist()
    assert cut_lines(page) == [
        [f"{share:g} %", str(rows), f"{under[rows - 1]:.4f}", f"ifd-trainer select '{file}' --keep {share / 100:g} "
         "--output cherry.jsonl"]
        for share, rows in ((1, 1), (5, 4), (10, 8))
    ]  # fmt: skip
    quantiles = page.split(">Quantiles</h2>")[1].split("</table>")[0]
    assert f"50 % (median)</th><td>{frame['ifd'].median():.3f}</td><td>{frame['cas'].median():.3f}</td>" in quantiles
    assert_no_holes(page.replace(str(file), ""))
    # The command does what the table says.
    assert main(["select", str(file), "--keep", "0.05", "--output", str(tmp_path / "cherry.jsonl")]) == 0
    assert (
        f"4 rows kept, 5.00 % of all 80 rows in the pool (4 asked for), ifd >= {under[3]:.4f}."
        in capsys.readouterr().out
    )


def test_a_file_of_other_scores_than_were_recorded_is_reported_without_them(scored, tmp_path):
    file, frame = scored
    frame.assign(ifd=frame["ifd"] * 0.9).to_parquet(file)
    assert provenance_path(file).is_file()
    assert main(["report", str(file), "--output", str(tmp_path)]) == 0
    page = page_of(tmp_path / "report.html")
    assert "tiny/model" not in page
    assert f"<dt>File</dt><dd>{file}</dd>" in page


def test_scores_of_a_definition_are_reported_by_the_score_that_it_ranks_by():
    origin = Origin("scored.jsonl", definition="superfiltering")
    data = read_report_data(scores(), None, None, origin)
    assert data.score == "ifd_ppl"
    assert summary_of(data).steps[-1][1] == "ifd-trainer select scored.jsonl --keep 0.05 --output cherry.jsonl"
    assert summary_of(data).steps[1][1] == (
        "ifd-trainer score ROWS --model MODEL --definition superfiltering --output scored.jsonl --calibrate"
    )
    ends = summary(scores(), origin=Origin("scored.jsonl", definition="superfiltering", measured=True))
    assert ends.steps[-1][1] == (
        "ifd-trainer select scored.jsonl --keep 0.05 --max-ifd calibrated --drop-duplicates --output cherry.jsonl"
    )
    measured = summary(scores(), origin=Origin("scored.jsonl", measured=True))
    assert measured.steps[-1][1] == (
        "ifd-trainer select scored.jsonl --keep 0.05 --max-ifd calibrated --drop-unfinished --drop-duplicates --output "
        "cherry.jsonl"
    )


def test_a_score_just_below_one_does_not_look_like_one(tmp_path):
    frame = pd.DataFrame({"row_id": range(3), "cas": [0.99999, 0.5, 0.4], "das": 1.0, "ifd_status": "ok"})
    frame["answer_tokens"] = 5
    page = page_without_plots(frame)
    assert cut_lines(page)[0][2] == "0.99999"
    kept = frame.assign(reason=["kept", "below_cut", "below_cut"], times=[1, 0, 0])
    assert "1 of 3 rows is kept, cut at 0.99999." in visible(page_without_plots(kept))
    assert "cut 0.99999" in texts_in(plot_ifd_histogram(kept))


def chosen_by_reward(columns: dict) -> pd.DataFrame:
    """Four rows, of which the two with the highest reward are kept: neither is at the head of the IFD."""
    frame = pd.DataFrame({"row_id": range(4), "cas": [0.2, 0.9, 0.4, 0.7], "das": 1.0, "answer_tokens": 5})
    return frame.assign(ifd_status="ok", **columns)


@pytest.mark.parametrize(
    "frame",
    [
        chosen_by_reward({"reason": ["kept", "below_cut", "kept", "below_cut"], "times": [1, 0, 1, 0]}),
        chosen_by_reward({"ifd_reason": "kept", "ifd_rank": [1, 3, 2, 4]}),
    ],
    ids=["passed over", "ranks"],
)
def test_rows_that_another_column_chose_have_no_cut_in_the_ifd(frame):
    kept, page = int((frame.get("times", pd.Series([1] * 4)) > 0).sum()), visible(page_without_plots(frame))
    assert f"{kept} of 4 rows are kept, not chosen by IFD alone." in page
    assert "cut at" not in page
    assert "just below the cut" not in page
    assert not [text for text in texts_in(plot_ifd_histogram(frame)) if text.startswith("cut")]


def test_a_column_times_of_the_data_set_is_not_how_often_a_row_is_trained_on():
    frame = chosen_by_reward({"ifd_reason": ["below_cut", "kept", "below_cut", "kept"], "times": [3, 0, 4, 0]})
    assert "2 of 4 rows are kept, cut at 0.700." in visible(page_without_plots(frame))


def test_rows_over_a_quota_are_not_told_to_be_below_the_cut():
    frame = chosen_by_reward({"ifd_reason": ["kept", "kept", "over_quota", "over_quota"]})
    page = page_without_plots(frame)
    assert "<h3>Dropped, the quota of their value is filled</h3>" in page
    assert page.count("over_quota") == 0


def test_a_row_without_an_id_is_not_called_nan():
    page = page_without_plots(chosen_by_reward({"id": ["a", None, "b", "c"]}).drop(columns="row_id"))
    assert re.findall(r'<th scope="row">(.*?)</th><td data-name="IFD"', page)[:4] == ["-", "c", "b", "a"]


def test_scores_that_tell_nothing_at_all_are_a_worry(tmp_path):
    assert "the scores hardly tell a row from a mismatched one" in summary(guarded(tmp_path, separation=0.0)).verdict


def test_too_few_rows_below_one_are_told_where_a_share_would_cut():
    frame = pd.DataFrame({"cas": [0.5] + [1.5] * 39, "das": 1.0, "answer_tokens": 3, "ifd_status": "ok"})
    lines = cut_lines(page_without_plots(frame))
    assert [line[1:3] for line in lines] == [["1", "0.5000"], ["2", "only 1 row below 1"], ["4", "only 1 row below 1"]]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_what_a_table_of_rows_is_searched_and_sorted_by_is_there(tmp_path):
    page = page_without_plots(guarded(tmp_path))
    assert page.count('<div class="search" hidden>') == page.count('<div class="rows-section">') == 2
    assert page.count("<h3>Kept, highest scores</h3>") == 2
    for table in re.findall(r"<table.*?</table>", page, re.DOTALL):
        columns = len(re.findall(r'<th scope="col"', table))
        for line in re.findall(r"<tr>(.*?)</tr>", table.split("</thead>")[1], re.DOTALL):
            assert len(re.findall(r"<t[hd]\b", line)) == columns  # sorted by column
    assert page.count("<table") == page.count('class="scroll" tabindex="0" role="region" aria-label="')


def test_the_meaning_of_every_column_of_numbers_stands_below_its_table(tmp_path):
    page = page_without_plots(guarded(tmp_path))
    for title in ("Epochs</h2>", "Kept out by guards</h3>"):
        part = page.split(f">{title}")[1].split("</details>")[0]
        headers = re.findall(r'<th scope="col">(.*?)</th>', part)
        assert set(headers) - set(re.findall(r"<li><b>(.*?)</b>", part)) == {"epoch"}


# ---- figures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figures_of_a_run_are_saved_in_any_format(tmp_path, ending, begins):
    guarded(tmp_path).save()
    history = History.load(tmp_path)
    for plot in (plot_kept_flow, plot_ifd_histogram, plot_held_out_loss):
        file = tmp_path / f"{plot.__name__}.{ending}"
        plot(history).savefig(file)
        assert file.read_bytes().startswith(begins)
    figure = plot_kept_by_label(pd.DataFrame({"rows": [4, 2], "epoch 0": [0.5, 0.0]}, index=["<a&b>", "$x_"]))
    figure.savefig(tmp_path / f"labels.{ending}")


def test_a_history_is_drawn_as_its_epochs_are(tmp_path):
    history = make_history(tmp_path)
    one, other = plot_kept_flow(history), plot_kept_flow({epoch: history.rows(epoch) for epoch in range(3)})
    heights = [[bar.get_height() for bars in figure.axes[0].containers for bar in bars] for figure in (one, other)]
    assert heights[0] == heights[1]
    with pytest.raises(ValueError, match="The history holds no held-out loss"):
        plot_held_out_loss(make_history(tmp_path / "none", epochs=1))


def test_labels_are_no_markup_in_a_page(tmp_path):
    history = make_history(tmp_path)
    name = '<script> id="x" #ffffff;'
    history.save_pool(history.pool().assign(quality=name))
    page = write_report(history).read_text(encoding="utf-8")
    assert page.count("<script>") == 1
    drawing = re.findall(r"<svg.*?</svg>", page, re.DOTALL)[-1]
    assert f">{name} (80)" in unescape(drawing)
