"""The page of a comparison, from made-up files of runs: nothing is trained."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ifd_trainer.cli import main
from ifd_trainer.compare.arm_run import RESULT
from ifd_trainer.compare.comparison import FILE, Comparison
from ifd_trainer.compare.exports import latex_table, results_frame
from ifd_trainer.compare.page import PAGE, write_comparison_report
from ifd_trainer.compare.plots import plot_intervals, plot_losses
from ifd_trainer.compare.results import read_curves, read_results, results_of
from ifd_trainer.compare.trained_rows import read_trained_rows
from ifd_trainer.compare.wording import headline
from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.held_out_losses import Point, rows_path
from ifd_trainer.evaluation.measures import MAIN
from ifd_trainer.training.history import FOLDER, History

POOL, HELD_OUT = 10, 30
# Arms by name: how far their losses are from those of random rows, and the rows they train on with each seed.
ARMS = {
    "random": (0.0, [{0, 1, 2}, {3, 4, 5}]),
    "better": (-0.5, [{0, 1, 8}, {1, 2, 8}]),
    "alike": (0.0, [{0, 9}, {0, 9}]),
    "full": (0.3, None),
}
LABELS = ["clean"] * 6 + ["noise"] * 2 + [None, "clean"]


def made_up(
    folder: Path, arms: dict = ARMS, recipe: str = "", labels: list | None = LABELS, scale: float = 1.0
) -> Path:
    """The files of a comparison whose runs have two points each; `scale` is of their tokens and seconds of `full`."""
    draws = np.random.default_rng(0)
    base = draws.uniform(1, 2, HELD_OUT)
    tokens = draws.integers(5, 50, HELD_OUT)
    keys = {name: {} if name == "full" else {"policy": name} for name in arms}
    keys |= {"better": {"policy": "better", "scorer": "m"}} if "better" in arms else {}
    content = {
        "recipe": f"model: tiny\ndataset_name: rows.jsonl\neval_dataset: held.jsonl\n{recipe}",
        "keys": {"keep": "3"},
        "arms": keys,
        "seeds": [0, 1],
        "steps": [3],
        "measures": {},
        "versions": {"ifd_trainer": "9.9"},
        "machine": "a machine",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(content))
    for name, (shift, chosen) in arms.items():
        for seed in (0, 1):
            place = folder / name.replace("/", "_").replace(" ", "_") / f"seed-{seed}"
            place.mkdir(parents=True)
            times = scale if name == "full" else 1.0
            last = Point(3, 3, int(300 * times), 20.0 * times + seed)
            points = [Point(0, 0, 0, 0.0), last] if name == "random" and seed == 0 else [last]
            (place / "points.jsonl").write_text("".join(json.dumps(asdict(point)) + "\n" for point in points))
            for point in points:
                # Of "alike", rows and seeds differ from random rows in no direction.
                noise = draws.normal(0, 0.2 if name == "alike" else 0.01, HELD_OUT)
                losses = base + 3 if point.step == 0 else base + shift + noise
                frame = pd.DataFrame({"cas": losses, "answer_tokens": tokens, "ifd_status": "ok", "ifd": losses / 3})
                frame = frame.assign(set=MAIN, category=None, group=None)
                frame.to_parquet(rows_path(place, point))
            result = {"rows": POOL, "seconds_scoring_beforehand": 1.5 if name == "better" else 0.0, "device": "cpu"}
            (place / RESULT).write_text(json.dumps(result))
            if chosen is not None:
                history(place, chosen[seed], labels)
    return folder


def history(place: Path, chosen: set[int], labels: list | None, settings: dict | None = None) -> None:
    """Two epochs, of which the second trains on the rows with even numbers alone, twice."""
    kept = History(place / FOLDER, settings or {})
    for epoch in (0, 1):
        times = [(row in chosen) * (epoch == 0 or 2 * (row % 2 == 0)) for row in range(POOL)]
        kept.add({"epoch": epoch}, pd.DataFrame({"row_id": [f"r{row}" for row in range(POOL)], "times": times}))
    pool = {"row_id": [f"r{row}" for row in range(POOL)], "prompt": [f"Say <b>{row}</b>." for row in range(POOL)]}
    pool |= {"answer": [f"It is <i>{row}</i>." for row in range(POOL)]} | ({"quality": labels} if labels else {})
    kept.save_pool(pd.DataFrame(pool))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A comparison whose page is written."""
    place = made_up(tmp_path_factory.mktemp("page") / "mine", recipe="label: quality\n", scale=20.0)
    assert main(["report", str(place)]) == 0
    return place


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / PAGE).read_text(encoding="utf-8")


def text_of(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def table_of(page: str, name: str) -> list[list[str]]:
    """The cells of the table that is called so."""
    table = page[page.index(f'aria-label="{name}"><table') :]
    lines = re.findall(r"<tr>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)] for line in lines]


def test_the_page_opens_with_what_differs_and_what_does_not(folder, page):
    box = text_of(re.search(r'<section class="verdict good".*?</section>', page, re.DOTALL)[0])
    assert "Lower held-out loss than with random rows: better." in box
    assert "Higher held-out loss than with random rows: full." in box
    assert "No difference shown: alike." in box
    assert "as multiples of those with random rows: better 1.1, alike 1.0, full 19.5." in box
    results = read_results(Comparison.load(folder))
    by_arm = {outcome.arm: outcome.against for outcome in results.of("steps")}
    lines = {line[0]: line for line in table_of(page, "Differences and costs")}
    assert lines["better"][1] == f"{by_arm['better'].mean:+.4f}, lower"
    assert lines["full"][1] == f"{by_arm['full'].mean:+.4f}, higher"
    assert lines["alike"][1] == "none shown"
    assert lines["full"][4:] == ["6,000", "400.5", "19.5"]


def test_without_a_difference_the_page_says_what_could_have_been_shown(tmp_path):
    made_up(tmp_path, {name: ARMS[name] for name in ("random", "alike")})
    page = write_comparison_report(tmp_path).read_text()
    said = headline(read_results(Comparison.load(tmp_path)))
    assert said.startswith("No arm differs from random rows, as far as 2 seeds and 30 held-out rows can show")
    assert said in text_of(page)
    assert 'class="verdict"' in page
    assert "Rows that arms disagree on" not in page  # there is no other arm that selects


def test_the_tables_of_the_three_views_are_those_of_the_results(folder, page):
    results = read_results(Comparison.load(folder))
    for view, name in (
        ("steps", "Held-out loss with as many optimizer steps (3)"),
        ("tokens", "Held-out loss with as many tokens trained on (300)"),
        ("compute", "Held-out loss with as many seconds for training and scoring (20)"),
    ):
        lines = table_of(page, name)[1:]
        for line, outcome in zip(lines, results.of(view), strict=True):
            found = outcome.against
            assert line[:2] == [outcome.arm, f"{outcome.loss:.4f}"]
            if found is None:
                assert line[2:] == [""] * 5
                continue
            assert line[2:4] == [f"{found.mean:+.4f}", f"{found.low:+.4f} to {found.high:+.4f}"]
            assert line[5] == f"{found.smallest:.4f}"
            assert line[6].startswith("no difference shown" if not found.shown else ("lower", "higher"))


def test_overlap_is_the_share_of_rows_that_both_trained_on(folder, page):
    lines = {line[0]: line[1:] for line in table_of(page, "Rows in common")[1:]}
    assert lines["random"] == ["0 %", percent((2 / 4 + 0) / 2), percent((1 / 4 + 0) / 2), "30 %"]
    assert lines["better"] == [percent(0.25), percent(2 / 4), percent((1 / 4 + 0) / 2), "30 %"]
    assert lines["alike"] == [percent(0.125), percent(0.125), "100 %", "20 %"]
    assert lines["full"][-1] == "100 %"


def test_noise_kept_is_the_share_of_a_labels_rows(page):
    lines = {line[0]: line[1:] for line in table_of(page, "By quality")}
    assert lines["quality"] == ["rows", "random", "better", "alike", "full"]
    # Seven rows are clean, r8 has no label.
    assert lines["clean"] == ["7", percent((3 / 7 + 3 / 7) / 2), percent((2 / 7 + 2 / 7) / 2), percent(2 / 7), "100 %"]
    assert lines["noise"] == ["2", "0 %", "0 %", "0 %", "100 %"]
    assert lines["(none)"] == ["1", "0 %", "100 %", "0 %", "100 %"]
    assert lines["all rows"] == ["10", "30 %", "30 %", "20 %", "100 %"]


def test_rows_that_one_arm_trains_on_with_every_seed_and_another_never(folder, page):
    tables = re.findall(r'<div class="rows-part">.*?</table>', page, re.DOTALL)
    titles = [text_of(re.search(r"<h3>.*?</h3>", table)[0]) for table in tables]
    assert titles == ["better, never alike", "alike, never better"]  # neither random nor full
    rows = [re.findall(r'<th scope="row">(\w+)</th>', table) for table in tables]
    assert rows == [["r8", "r1"], ["r9"]]  # of "better", r8 three times and r1 once; r0 is of one seed alone
    assert 'data-name="times">3<' in tables[0]
    trained = read_trained_rows(Comparison.load(folder), [0, 1])
    assert trained.disagreed("better", "alike") == ["r8", "r1"]
    assert trained.times["better"].loc["r8"].tolist() == [3, 3]


def test_what_was_trained_on_before_training_began_anew_does_not_count(tmp_path):
    made_up(tmp_path, {name: ARMS[name] for name in ("random", "better")})
    for seed in (0, 1):
        settings = {"warmup_epochs": 1, "warmup": {"type": "Brief"}, "start_anew": True}
        history(tmp_path / "better" / f"seed-{seed}", {1, 8}, LABELS, settings)
    trained = read_trained_rows(Comparison.load(tmp_path), [0, 1])
    assert trained.times["better"].sum(axis=1).loc[["r1", "r8"]].tolist() == [0, 4]


def test_lines_go_through_the_mean_of_the_seeds_from_a_shared_start(folder):
    """Of `better`: it has scored rows for 1.5 seconds before its first step."""
    curves = read_curves(Comparison.load(folder))
    results = results_of(curves)
    tokens, seconds = plot_losses(curves).axes
    loss = next(outcome.loss for outcome in results.of("steps") if outcome.arm == "better")
    for axes, used in ((tokens, [0, 300]), (seconds, [1.5, 22.0])):
        thick = [line for line in axes.lines if line.get_marker() == "s"]
        assert len(thick) == 1
        assert thick[0].get_xdata() == pytest.approx(used)
        assert thick[0].get_ydata() == pytest.approx([results.before, loss])
        thin = [line for line in axes.lines if line.get_color() == thick[0].get_color() and line not in thick]
        assert len(thin) == 2


def test_intervals_of_shown_differences_have_filled_dots(folder):
    results = read_results(Comparison.load(folder))
    steps = plot_intervals(results).axes[0]
    dots = [line for line in steps.lines if line.get_marker() == "o"]
    assert [line.get_markerfacecolor() == line.get_color() for line in dots] == [True, False, True]
    found = [outcome.against for outcome in results.of("steps") if outcome.against is not None]
    assert [line.get_xdata()[0] for line in dots] == [each.mean for each in found]
    # An arm that is far beyond the others is an arrow at the edge, with its difference in numbers.
    tokens = plot_intervals(results).axes[1]
    assert [line.get_marker() for line in tokens.lines if line.get_marker() in "<>"] == [">"]
    far = next(outcome.against.mean for outcome in results.of("tokens") if outcome.arm == "full")
    assert far > tokens.get_xlim()[1]
    assert f"{far:+.3f}" in [text.get_text() for text in tokens.texts]


def test_what_is_html_in_names_and_texts_is_text_on_the_page(tmp_path, page):
    assert "It is &lt;i&gt;8&lt;/i&gt;." in page
    assert "<i>8</i>" not in page
    name = "$x_1$ & 5%<u>"
    arms = {"random": ARMS["random"], name: ARMS["better"]}
    written = write_comparison_report(made_up(tmp_path, arms)).read_text()
    assert "<u>" not in written
    assert "$x_1$ &amp; 5%&lt;u&gt;" in written
    assert r"\$x\_1\$ \& 5\%<u>" in (tmp_path / "results.tex").read_text()


def test_the_page_needs_no_other_file_and_runs_no_other_script(page):
    assert re.findall(r'(?:src|href)="(?!#)([^"]*)"', page) == [
        "results.json",
        "results.csv",
        "measured.csv",
        "results.tex",
    ]
    assert "default-src 'none'" in page
    assert page.count("<svg") == 2
    assert page.count("<script>") == 1


def test_numbers_in_csv_are_those_in_json(folder):
    outcomes = json.loads((folder / "results.json").read_text())["outcomes"]
    with (folder / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(outcomes) == 12
    for line, outcome in zip(lines, outcomes, strict=True):
        assert (line["arm"], line["view"], float(line["loss"])) == (outcome["arm"], outcome["view"], outcome["loss"])
        assert [float(line[f"loss_seed_{seed}"]) for seed in (0, 1)] == outcome["by_seed"]
        found = outcome["against"]
        if found is None:
            assert line["difference"] == line["low"] == line["shown"] == ""
            continue
        assert float(line["difference"]) == found["mean"]
        for name in ("low", "high", "boot_low", "boot_high", "p", "smallest"):
            assert float(line[name]) == found[name]
        for name in ("seeds_needed", "rows_needed"):
            assert line[name] == ("" if found[name] is None else str(found[name]))


def test_numbers_in_latex_are_those_in_json_rounded(folder):
    results = read_results(Comparison.load(folder))
    text = (folder / "results.tex").read_text()
    assert text == latex_table(results)
    body = text[text.index("\\midrule") : text.index("\\bottomrule")].splitlines()[1:]
    assert len(body) == 4
    for line, name in zip(body, ("random", "better", "alike", "full"), strict=True):
        cells = [cell.strip() for cell in line.removesuffix("\\\\").split("&")]
        expected = [name]
        for view in ("steps", "tokens", "compute"):
            outcome = next(outcome for outcome in results.of(view) if outcome.arm == name)
            found = outcome.against
            expected.append(f"{outcome.loss:.4f}")
            expected += (
                ["", ""] if found is None else [f"${found.mean:+.4f}$", f"$[{found.low:+.4f}, {found.high:+.4f}]$"]
            )
        cost = next(cost for cost in results.costs if cost.arm == name)
        assert cells == [*expected, f"{cost.tokens:.0f}", f"{cost.seconds:.1f}"]
    assert results_frame(results)["arm"].tolist() == ["random", "better", "alike", "full"] * 3


def test_a_label_that_the_rows_do_not_have_is_said_and_an_asked_one_refused(tmp_path):
    arms = {name: ARMS[name] for name in ("random", "better")}
    made_up(tmp_path, arms, recipe="label: kind\n", labels=None)
    page = write_comparison_report(tmp_path).read_text()
    assert "The rows have no column &#39;kind&#39;, which the recipe names as their label." in page
    assert "By kind" not in page
    with pytest.raises(UserError, match="There is no column 'tone' to take labels from"):
        write_comparison_report(tmp_path, label="tone")


def test_arms_without_a_history_are_left_out_of_what_needs_one(tmp_path):
    made_up(tmp_path, {name: ARMS[name] for name in ("random", "better", "alike")})
    (tmp_path / "better" / "seed-1" / FOLDER / "history.json").unlink()
    page = write_comparison_report(tmp_path).read_text()
    assert "Which rows were trained on is not known of better: no history is left." in page
    assert table_of(page, "Rows in common")[0] == ["arm", "random", "alike"]


def test_a_seed_that_has_not_ended_is_left_out_and_said(tmp_path):
    made_up(tmp_path, {name: ARMS[name] for name in ("random", "better")})
    record = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(record | {"seeds": [0, 1, 2]}))
    page = write_comparison_report(tmp_path, tmp_path / "elsewhere").read_text()
    assert "Of 1 seed not all arms have ended: 2 left out." in page
    assert (tmp_path / "elsewhere" / "results.csv").exists()
    assert not (tmp_path / PAGE).exists()


def test_a_folder_of_another_version_is_refused(tmp_path, capsys):
    (tmp_path / FILE).write_text('{"recipe": "", "words": []}')
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "it does not say keys, arms, seeds, steps, measures, versions, machine" in error
    assert "Run the comparison anew" in error


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
