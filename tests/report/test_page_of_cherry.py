"""The report of the whole Cherry method, of diverse selections, and of what `ifd-trainer select` wrote."""

from __future__ import annotations

import html
import json
import math
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import build_model
from datasets import Dataset
from test_page import (
    PLOTS,
    assert_no_holes,
    assert_plots,
    grid,
    make_history,
    page_of,
    page_without_plots,
    printed,
    row_tables,
    visible,
)
from test_page import scores as scores_of
from tiny_runs import INF, TOKENIZER, raw_rows, sft_trainer, text_rows, train

from ifd_trainer import Brief, Cherry, IFDSelectionCallback
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.method.facility_location import Diverse
from ifd_trainer.method.plain_data import to_data
from ifd_trainer.report.page import write_report
from ifd_trainer.report.plots import plot_cas_das, plot_ifd_histogram, plot_kept_flow
from ifd_trainer.report.report_data import read_report_data
from ifd_trainer.report.score_frames import merged
from ifd_trainer.report.tables import epoch_table, label_rich_table
from ifd_trainer.report.wording import EpochKinds, scoring_sentence
from ifd_trainer.training.history import History

BRIEF = Brief(clusters=4, per_cluster=2, max_share=0.2)  # 8 of 40 rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The history of a real run: 8 rows once, then 2 epochs of 6 rows from the original weights."""
    folder = tmp_path_factory.mktemp("cherry")
    rows = text_rows(raw_rows(40)).add_column("quality", ["clean", "shuffled"] * 20)
    options = {"num_train_epochs": 2, "eval_dataset": text_rows(raw_rows(4, seed=9)), "eval_strategy": "epoch"}
    trainer = sft_trainer(folder, rows, model=build_model(len(TOKENIZER)), **options)
    trainer.add_callback(IFDSelectionCallback.cherry(trainer, 6, brief=BRIEF, max_ifd=INF))
    witness = train(trainer)
    return History.load(folder), witness


def terminal(history: History) -> str:
    return re.sub(r"\s+", " ", printed(epoch_table(history)))


def text_of(page: str) -> str:
    return re.sub(r"\s+", " ", visible(page))


def facts_of(page: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", page))


# ---- a real run -----------------------------------------------------------------------------------------------------


def test_the_terminal_names_the_brief_experience_and_where_training_starts_anew(run):
    history, _ = run
    lines = [line.split() for line in printed(epoch_table(history)).splitlines()]
    table = [line for line in lines if line and line[0] in ("0", "anew", "1", "2")]
    assert [line[0] for line in table] == ["0", "anew", "1", "2"]
    losses = [f"{record['eval_loss']:.4f}" for record in history.epochs]
    assert table[0][:4] == ["0", "brief", "40", "8"]
    assert [line[-1] for line in table] == [losses[0], "anew", *losses[1:]]
    assert table[2][5] == "-"  # nothing is compared with the sample
    assert table[3][5:7] == ["100", "%"]
    assert "scored" not in [column.header.split("\n")[0] for column in epoch_table(history).columns]
    text = terminal(history)
    assert "Epoch 0 is the brief experience, on a sample." in text
    assert "Before epoch 1, training starts anew from the original weights" in text
    assert "All scores were made once, when epoch 1 began, by the model that the brief experience had given." in text
    assert max(map(len, printed(epoch_table(history)).splitlines())) <= 80


def test_the_page_names_them_too_and_lists_the_sample(run, tmp_path):
    history, witness = run
    path = write_report(history, tmp_path)
    page = page_of(path)
    assert list(grid(page, "Epochs")) == ["start", "0 (brief experience)", "1", "2"]
    parts = page.split(">Epochs</h")[1].split("</table>")[0].split('<tr class="between">')
    assert len(parts) == 2
    assert "0 (brief experience)" in parts[0]
    assert parts[1].startswith('<td colspan="10">Training starts anew from the original weights</td>')
    assert grid(page, "Rows by what became of them") == {
        "kept": ["8", "6", "6"],
        "dropped: below the cut": ["0", "34", "34"],
        "not in the sample of the brief experience": ["32", "0", "0"],
    }
    facts = facts_of(page)
    assert (
        facts["Rows to train on"]
        == "8 rows in the brief experience, then 6 rows (15.0 % of the pool) in each of 2 epochs"
    )
    assert facts["Optimizer updates"] == "10 planned: 4 in the brief experience, 6 after training starts anew"
    assert facts["Brief experience"].startswith("epoch 0, on 8 rows chosen by k-means")
    assert facts["Brief experience"].endswith("then training starts anew from the original weights")
    tables = row_tables(page)
    assert sorted(map(int, tables["Rows of the sample"])) == sorted(witness.epochs()[0])
    sample = page.split(">Rows of the sample<")[1].split("</table>")[0]
    raw = {row["row_id"]: row for row in raw_rows(40)}
    for row in witness.epochs()[0]:
        assert f">{raw[row]['instruction']}</div>" in sample
        assert f">{raw[row]['output']}</div>" in sample
    headers = re.findall(r'<th scope="col"[^>]*>(.*?)</th>', sample)
    assert headers == ["row", "quality", "text"]  # it has no scores
    assert set(map(int, tables["Kept, highest scores"])) == set(witness.epochs()[1])
    assert tables["Rows without a score"] == []
    assert "Rows of epochs 1-2" in page
    assert "<details>" not in page  # both epochs have one scoring and one selection
    assert "epoch 0 (brief experience)" in text_of(page.split(">By quality<")[1])
    assert "Epoch 0 went without scores." in page
    assert_plots(path, PLOTS)
    assert_no_holes(page.replace("<dd>Cherry(max_ifd=inf", "<dd>Cherry("))


def test_a_sample_that_is_too_long_is_shown_in_parts(run):
    history, witness = run
    page = page_without_plots(history, rows=3)
    shown = list(map(int, row_tables(page)["Rows of the sample"]))
    sample = sorted(witness.epochs()[0])
    assert shown == [sample[0], sample[2], sample[5]]  # spread over it
    assert "3 of 8." in page


def test_the_labels_in_the_terminal_name_the_brief_experience(run):
    history, _ = run
    text = printed(label_rich_table(history, "quality"))
    assert "(brief experience)" in text
    assert len(re.findall(r"epoch \d", text)) == 3


# ---- histories of other rhythms ---------------------------------------------------------------------------------


def rhythm(folder, made: list[int | None], **settings) -> History:
    """A history whose epochs say in which epoch their scores were made."""
    history = make_history(folder, epochs=len(made))
    history.settings |= {"every": 1, "warmup_epochs": 0, "warmup": None, "start_anew": False, "scorer": None}
    history.settings |= {"freeze_after": None, **settings}
    for record, at in zip(history.epochs, made, strict=True):
        record["scored_at"] = at
        if at is None:
            record |= dict.fromkeys(("mean_kept", "mean_dropped", "cut"))
    return history


@pytest.mark.parametrize(
    ("made", "settings", "sentence"),
    [
        ([0, 1, 2], {}, "Each epoch is scored with the model as it is when the epoch begins."),
        ([0, 0, 0], {}, "All scores were made once, when epoch 0 began, by the model as it was then."),
        ([0], {"freeze_after": 0}, "All scores were made once, when epoch 0 began, by the model as it was then."),
        ([None, 1, 1], {"warmup_epochs": 1}, "when epoch 1 began, by the model that the warm-up had given."),
        ([0, 0, 2], {"every": 2}, "Scores were made when epochs 0 and 2 began, by the model as it was then; the"),
        ([0, 0, 0], {"scorer": "columns"}, "The scores are those that the training set came with"),
        ([0, 0, 0], {"scorer": "gpt2"}, "The scores are those of another model, gpt2"),
        (
            [None, 1, 2],
            {"warmup_epochs": 1, "warmup": to_data(Brief()), "start_anew": True},
            "as it is when the epoch begins (of epoch 1, before training starts anew).",
        ),
    ],
)
def test_it_is_said_who_scored_and_when(tmp_path, made, settings, sentence):
    history = rhythm(tmp_path, made, **settings)
    assert sentence in terminal(history)
    assert sentence in text_of(page_without_plots(history))
    headers = [column.header.replace("\n", " ") for column in epoch_table(history).columns]
    assert ("scored in" in headers) == (settings == {"every": 2})


def test_scores_that_are_older_than_their_epoch_have_a_column(tmp_path):
    history = rhythm(tmp_path, [0, 0, 2], every=2)
    table = epoch_table(history)
    column = next(column for column in table.columns if column.header == "scored\nin")
    assert list(column.cells) == ["0", "0", "2"]


def test_older_histories_say_nothing_of_rhythms(tmp_path):
    history = make_history(tmp_path)  # records without scored_at, settings without warm-up
    assert "Each epoch is scored with the model as it is" in terminal(history)
    assert EpochKinds.from_settings(history.settings) == EpochKinds()
    assert scoring_sentence({}, [{"epoch": 0}]) == ""
    page = page_without_plots(history)
    assert "brief experience" not in page
    assert '<tr class="between">' not in page


def test_a_run_that_ended_in_the_brief_experience(tmp_path):
    history = rhythm(tmp_path, [None], warmup_epochs=1, warmup=to_data(BRIEF), start_anew=True)
    rows = history.rows(0).assign(**dict.fromkeys(("cas", "das", "ifd", "ifd_ppl"), np.nan), ifd_status="not_scored")
    rows["reason"] = np.where(rows["times"] > 0, "kept", "not_in_sample")
    history.add(history.epochs[0] | {"reasons": rows["reason"].value_counts().to_dict()}, rows)
    page = page_of(write_report(history, rows=4))
    assert len(row_tables(page)["Rows of the sample"]) == 4
    assert "Rows without a score" not in page
    assert '<tr class="between">' not in page  # it never started anew
    assert "anew" not in [line.strip() for line in printed(epoch_table(history)).splitlines()]
    assert_no_holes(page)


def test_epochs_with_the_same_scores_and_selection_are_merged():
    one = pd.DataFrame({"ifd": [0.5, np.nan], "kept": [True, False]})
    other = one.assign(kept=[False, True])
    epochs = {0: one, 1: one.copy(), 2: other, 4: other, 5: other}
    assert list(merged(epochs, ["ifd", "kept"])) == ["0-1", 2, "4-5"]
    assert list(merged(epochs, ["ifd"])) == ["0-2", "4-5"]
    assert list(merged({None: one}, ["ifd"])) == [None]


def test_a_history_of_the_version_before_gives_the_same_page(tmp_path):
    today = rhythm(tmp_path / "today", [None, 1, 2], warmup_epochs=1, warmup=to_data(BRIEF), start_anew=True)
    today.save()
    before = tmp_path / "before"
    shutil.copytree(today.folder, before)
    content = json.loads((before / "history.json").read_text())
    reprs = {"policy": "Cherry(max_ifd=1.0, score='ifd', on_shortfall='repeat')", "schedule": "Constant(keep=0.25)"}
    settings = content["settings"] | reprs | {"warmup": repr(BRIEF)}
    (before / "history.json").write_text(json.dumps(content | {"version": 1, "settings": settings}))
    pages = [facts_of(page_of(write_report(History.load(folder)))) for folder in (before, today.folder)]
    assert pages[0] == pages[1]
    assert html.unescape(pages[0]["Policy"]) == reprs["policy"]
    assert pages[0]["Brief experience"].startswith("epoch 0, on 20 rows chosen by k-means")


# ---- plots ----------------------------------------------------------------------------------------------------------


def frame_of(kept: str, ids: str = "abcdef") -> pd.DataFrame:
    rows = pd.DataFrame({"row_id": list(ids), "ifd": 0.5})
    return rows.assign(reason=np.where(rows["row_id"].isin(list(kept)), "kept", "below_cut"))


def test_the_flow_parts_the_brief_experience_from_what_follows():
    epochs = {0: frame_of("abcd"), 1: frame_of("bc"), 2: frame_of("bd")}
    figure = plot_kept_flow(epochs, sample=[0], restart=1)
    ax = figure.axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    sample, again, back, new, gone = heights
    assert sample == [4, 0, 0]
    assert again == [0, 0, 1]
    assert back == [0, 0, 0]
    assert new == [0, 2, 1]  # d was only in the sample before
    assert gone == [0, 0, -1]
    assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "--"] == [[0.5, 0.5]]
    assert "training starts anew" in [text.get_text() for text in ax.texts]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "sample of the brief experience" in legend
    assert "kept in an earlier epoch, not in the one before" not in legend  # none was
    assert ax.get_ylim()[1] > 4


@pytest.mark.parametrize("restart", [None, 0, 3])
def test_the_flow_has_no_line_where_training_did_not_start_anew(restart):
    figure = plot_kept_flow({0: frame_of("ab"), 1: frame_of("bc")}, restart=restart)
    assert [line for line in figure.axes[0].lines if line.get_linestyle() == "--"] == []


def test_redundant_rows_have_a_colour_of_their_own():
    rows = frame_of("ab").assign(ifd=[0.9, 0.7, 0.8, 0.3, 0.2, 0.1])
    rows.loc[2, "reason"] = "redundant"
    figure = plot_ifd_histogram(rows)
    drawn = [sum(bar.get_height() for bar in bars) for bars in figure.axes[0].containers]
    assert drawn == [3, 2, 0, 1]
    assert "dropped: other rows stand for it" in [text.get_text() for text in figure.legends[0].get_texts()]


# ---- diverse selections ---------------------------------------------------------------------------------------------


def test_a_diverse_selection_is_explained_and_its_redundant_rows_are_listed(tmp_path):
    frame = scores_of()
    columns = {name: frame[name].to_numpy() for name in frame}
    columns["embedding"] = np.random.default_rng(0).normal(size=(len(frame), 3))
    policy = Diverse(share=0.5)
    selection = policy(columns, 10)
    rows = frame.assign(reason=selection.reasons.astype(str), times=np.bincount(selection.kept, minlength=len(frame)))
    history = make_history(tmp_path, epochs=1)
    history.settings |= {"policy": to_data(policy)}
    history.add(history.epochs[0] | {"reasons": rows["reason"].value_counts().to_dict()}, rows)
    page = page_of(write_report(history, rows=4))
    rule = "of the 50 % of the eligible rows (below 1) with the highest IFD = cas / das, those whose embeddings stand"
    assert facts_of(page)["Rule"].startswith(rule)
    assert facts_of(page)["With too few such rows"] == "rows are repeated"
    ranked = rows.dropna(subset=["ifd"]).sort_values("ifd", ascending=False)
    redundant = ranked.loc[ranked["reason"] == "redundant", "row_id"].tolist()
    below = ranked.loc[ranked["reason"] == "below_cut", "row_id"].tolist()
    assert len(redundant) == round(0.5 * selection.eligible) - 10
    tables = row_tables(page)
    assert tables["Dropped, for other rows stand for them"] == redundant[:4]
    assert tables["Dropped, just below the cut"] == below[:4]
    assert grid(page, "Rows by what became of them")["dropped: other rows stand for it"] == [str(len(redundant))]
    assert_no_holes(page)


# ---- what `select` wrote --------------------------------------------------------------------------------------------

# cas and das in nats per token; below 1, rows 1, 3, 4 and 0 by IFD, highest first; row 1 refuses, row 5 failed.
LOSSES = [(1.0, 2.0), (1.8, 2.0), (2.4, 2.0), (1.6, 2.0), (0.9, 1.5), (math.nan, math.nan)]
ANSWERS = ["Yes.", "I'm sorry, but I cannot help.", "No.", "Red.", "Blue.", "Green."]


@pytest.fixture
def scored(tmp_path):
    frame = pd.DataFrame(LOSSES, columns=["cas", "das"])
    frame["ifd"], frame["ifd_ppl"] = frame["cas"] / frame["das"], np.exp(frame["cas"] - frame["das"])
    frame["answer_tokens"], frame["ifd_status"] = 3, ["ok"] * 5 + ["failed"]
    frame["instruction"], frame["output"] = [f"Ask {i}." for i in range(6)], ANSWERS
    write_rows(Dataset.from_pandas(frame), tmp_path / "scored.parquet")
    return tmp_path / "scored.parquet"


@pytest.mark.parametrize("card", ["--card", "--no-card"])
def test_a_folder_of_selected_rows(scored, tmp_path, card):
    folder = tmp_path / "cherry"
    assert main(["select", str(scored), "--keep", "2", "--drop-refusals", card, "--output", str(folder)]) == 0
    before = load_rows(str(folder)).to_list()
    assert main(["report", str(folder)]) == 0
    page = page_of(folder / "report.html")
    assert "Every row here was kept" in page
    assert ("README.md beside it counts them." in page) == (card == "--card")
    assert grid(page, "Rows by what became of them") == {"kept": ["2"]}
    shown = page.split(">Kept, highest scores<")[1].split("</table>")[0]
    assert [i for i in range(6) if f"Ask {i}." in shown] == [3, 4]
    assert load_rows(str(folder)).to_list() == before  # the report's files are not taken for data
    assert_no_holes(page)


def test_a_folder_of_all_rows_with_their_reasons(scored, tmp_path):
    folder = tmp_path / "cherry"
    options = ["--keep", "1", "--drop-refusals", "--all"]
    assert main(["select", str(scored), *options, "--output", str(folder)]) == 0
    page = page_of(write_report(folder, tmp_path / "page"))
    assert grid(page, "Rows by what became of them") == {
        "kept": ["1"],
        "dropped: below the cut": ["2"],
        "dropped: at or above the limit": ["1"],
        "dropped: the answer looks like a refusal": ["1"],
        "no score: the program that scored gave up on the row": ["1"],
    }
    assert row_tables(page)["Dropped, answers that look like refusals"] == ["1"]
    assert row_tables(page)["Kept, highest scores"] == ["3"]
    assert row_tables(page)["Dropped, just below the cut"] == ["4", "0"]
    why = page.split(">Rows without a score<")[1]
    assert "the program that scored gave up on the row" in why
    assert "Every row here was kept" not in page


def test_the_rank_says_what_was_ranked_by(tmp_path):
    rows = pd.DataFrame({"cas": [1.0, 3.0], "das": [1.25, 4.0], "ifd_status": "ok", "ifd_reason": "kept"})
    rows["ifd"], rows["ifd_ppl"] = [0.8, 0.75], np.exp([-0.25, -1.0])
    page = page_of(write_report(rows.assign(ifd_rank=[1, 2]), tmp_path / "both"))
    assert "<dt>Score</dt><dd>IFD</dd>" in page
    rows["ifd_ppl"] = [0.3, 0.6]
    page = page_of(write_report(rows.assign(ifd_rank=[2, 1]), tmp_path / "ratio"))
    assert "<dt>Score</dt><dd>IFD (ppl)</dd>" in page


def test_a_folder_that_holds_neither_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "it holds notes.txt" in error
    assert "the output folder of a training run (with ifd_history/history.json)" in error
    assert "`ifd-trainer select --output FOLDER` wrote (with train.parquet)" in error
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        write_report(tmp_path / "nothing")


# ---- calibrated limits ----------------------------------------------------------------------------------------------


def test_each_epoch_is_drawn_and_listed_with_the_limit_that_was_measured_for_it(tmp_path):
    history = make_history(tmp_path, epochs=2)
    history.settings |= {"policy": to_data(Cherry("calibrated")), "max_ifd": None}
    for record, limit in zip(history.epochs, (0.75, 0.5), strict=True):
        record["limit"] = limit
    page = page_of(write_report(history))
    rule = "of those below a limit that is measured in each scoring: below it are 5 % of answers that are scored under"
    assert rule in facts_of(page)["Rule"]
    assert "limit : rows with a score at or above it are dropped" in text_of(page)
    assert [column.header for column in epoch_table(history).columns].count("limit") == 1
    data = read_report_data(history, None, None)
    figure = plot_ifd_histogram(data.scored, score="ifd", max_ifd=data.max_ifd)
    lines = [{line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == "-"} for ax in figure.axes]
    assert lines == [{0.75}, {0.5}]
    figure = plot_cas_das(data.scored, score="ifd", max_ifd=data.max_ifd)
    assert [[line.get_label() for line in ax.lines if line.get_label().startswith("limit")] for ax in figure.axes] == [
        ["limit 0.75"],
        ["limit 0.5"],
    ]
