"""Further sets of held-out rows, categories and groups: what is read, what is scored, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chat_server import ChatServer, completion
from datasets import Dataset
from tiny_runs import RECIPES, TOKENIZER, build_model, raw_rows

from ifd_trainer.cli import main
from ifd_trainer.compare.arm_run import main as arm_run
from ifd_trainer.compare.comparison import Comparison
from ifd_trainer.compare.exports import measured_frame, results_frame
from ifd_trainer.compare.results import read_results
from ifd_trainer.data.format_choice import FormatOptions
from ifd_trainer.data.formats import ALPACA, MESSAGES
from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.agreement import agreement
from ifd_trainer.evaluation.at_end import answers_path, asked_rows, measure_at_end
from ifd_trainer.evaluation.documents import long_form
from ifd_trainer.evaluation.harness import TaskScores
from ifd_trainer.evaluation.held_out_sets import read_sets, rows_frame
from ifd_trainer.evaluation.measured import measured_of, read_documents, write_documents
from ifd_trainer.evaluation.measures import KEYS, MAIN, Measures
from ifd_trainer.evaluation.statistics import difference
from ifd_trainer.recipe.file import COMPARED


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_set_is_read_in_the_format_that_it_has(tmp_path):
    own = Dataset.from_list(raw_rows(3))
    lines(tmp_path / "alike.jsonl", raw_rows(2, seed=4))
    lines(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "?"}]}])
    lines(tmp_path / "named.jsonl", [{"ask": "1 + 1?", "reply": "2", "topic": "sums"}])
    measures = Measures(
        {
            "alike": "alike.jsonl",
            "chats": {"path": "chats.jsonl"},
            "named": {
                "path": "named.jsonl",
                "prompt_column": "ask",
                "answer_column": "reply",
                "template": "Q: {instruction}",
            },
        },
        category_column="topic",
    )
    sets = read_sets(own, ALPACA, measures, tmp_path, FormatOptions())
    assert [each.name for each in sets] == [MAIN, "alike", "chats", "named"]
    assert [each.format for each in sets[:3]] == [ALPACA, ALPACA, MESSAGES]
    assert sets[3].format.render(sets[3].rows[0]).prompt == "Q: 1 + 1?"
    frame = rows_frame(sets)
    assert frame["set"].tolist() == [MAIN] * 3 + ["alike"] * 2 + ["chats", "named"]
    assert frame["category"].tolist() == [None] * 6 + ["sums"]
    assert frame["group"].isna().all()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"code": "nowhere.jsonl"}, r"held_out_sets: code: .*nowhere\.jsonl"),
        ({"code": 3}, "held_out_sets: code wants a file or a name, or a mapping with its path, got 3"),
        ({"code": {"path": "rows.jsonl", "fromat": "alpaca"}}, "there is no key 'fromat'. Known are path, split"),
        ({MAIN: "rows.jsonl"}, "are the rows of eval_dataset. Give this set another name"),
        (["rows.jsonl"], "held_out_sets wants a mapping from names to files"),
        ({"code": "empty.jsonl"}, r"held_out_sets: code: .*empty\.jsonl"),
    ],
)
def test_a_set_that_cannot_be_read_is_named(tmp_path, sets, message):
    lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match=message):
        read_sets(Dataset.from_list(raw_rows(3)), ALPACA, Measures(sets), tmp_path, FormatOptions())


def test_a_column_that_no_set_has_is_refused(tmp_path):
    with pytest.raises(UserError, match="category_column: no set of held-out rows has a column 'topic'; they have"):
        read_sets(Dataset.from_list(raw_rows(3)), ALPACA, Measures(category_column="topic"), tmp_path, FormatOptions())


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Comparison:
    """Two arms with two seeds, trained in this process, on two sets with categories and groups."""
    place = tmp_path_factory.mktemp("sets")
    build_model(len(TOKENIZER)).save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    lines(place / "rows.jsonl", raw_rows(12))
    own = [{**row, "topic": "ab"[n % 2], "document": f"d{n // 2}"} for n, row in enumerate(raw_rows(12, seed=9))]
    lines(place / "held_out.jsonl", own)
    lines(place / "other.jsonl", [{**row, "topic": "rare" if n else None} for n, row in enumerate(raw_rows(5, seed=8))])
    lines(place / "asked.jsonl", [{"text": "What ran?"}, {"text": "A cat or a dog?"}])
    (place / "recipe.yaml").write_text(
        f"model_name_or_path: {place / 'model'}\ndataset_name: rows.jsonl\neval_dataset: held_out.jsonl\n"
        "format: alpaca\nkeep: 4\nnum_train_epochs: 1\nper_device_train_batch_size: 2\nlearning_rate: 0.01\n"
        "max_length: 256\nuse_cpu: true\ngradient_checkpointing: false\nbf16: false\ndisable_tqdm: true\nseeds: 2\n"
        f"arms: longest\noutput_dir: {place / 'out'}\nheld_out_sets: {{other: other.jsonl}}\ncategory_column: topic\n"
        "answers: 4\nmax_new_tokens: 8\nprompts: {asked: asked.jsonl}\n"
    )
    made = []

    def run(self, *args, **kwargs):
        made.append(self)
        original(self, say=lambda text: None, launch=lambda folder, device: arm_run(folder))

    original = Comparison.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", run)
        assert main(["compare", str(place / "recipe.yaml"), "--group_column", "document"]) == 0
    return made[0]


@RECIPES
def test_each_set_and_category_has_the_losses_of_its_own_rows(compared):
    results = read_results(compared)
    assert results.rows == 12
    assert [(part.of, part.category, part.rows) for part in results.parts] == [
        (MAIN, "a", 6),
        (MAIN, "b", 6),
        ("other", None, 5),
    ]
    assert results.left_out == ["rare of other (4 rows with a loss)", "(none) of other (1 row with a loss)"]
    tasks = {(task.arm.name, task.seed): task for task in compared.tasks()}
    frames = {key: task.held_out(task.points()[-1]) for key, task in tasks.items()}
    for part in results.parts:
        for outcome in part.in_view("steps"):
            for seed, loss in enumerate(outcome.by_seed):
                frame = frames[outcome.arm, seed].query("set == @part.of")
                frame = frame if part.category is None else frame[frame["category"] == part.category]
                assert loss == pytest.approx(np.average(frame["cas"], weights=frame["answer_tokens"]))


@RECIPES
def test_intervals_are_clustered_by_the_groups_of_rows(compared):
    results = read_results(compared)
    tasks = {(task.arm.name, task.seed): task for task in compared.tasks()}
    frames = {key: task.held_out(task.points()[-1]).query("set == @MAIN") for key, task in tasks.items()}
    losses = {arm: np.stack([frames[arm, seed]["cas"] for seed in (0, 1)]) for arm in ("random", "longest")}
    weights = frames["random", 0]["answer_tokens"].to_numpy()
    groups = [f"d{n // 2}" for n in range(12)]
    found = next(o.against for o in results.of("steps") if o.arm == "longest")
    clustered = difference(losses["longest"], losses["random"], weights, groups)
    assert found.of_rows == pytest.approx(clustered.of_rows)
    assert found.of_rows != pytest.approx(difference(losses["longest"], losses["random"], weights).of_rows)


@RECIPES
def test_the_ifd_of_held_out_rows_is_measured(compared):
    results = read_results(compared)
    assert [(each.measure, each.of, each.documents) for each in results.measured[:2]] == [
        ("IFD", MAIN, 12),
        ("IFD", "other", 5),
    ]
    task = next(task for task in compared.tasks() if (task.arm.name, task.seed) == ("longest", 1))
    scores = task.held_out(task.points()[-1]).query("set == 'other'")
    arm = next(arm for arm in results.measured[1].arms if arm.arm == "longest")
    assert arm.by_seed[1] == pytest.approx((scores["cas"] / scores["das"]).mean())
    assert results.measured[0].higher is None


@RECIPES
def test_tables_and_files_have_all_sets(compared, capsys):
    results = read_results(compared)
    frame = results_frame(results)
    assert set(zip(frame["set"], frame["category"].fillna(""), strict=True)) == {
        (MAIN, ""), (MAIN, "a"), (MAIN, "b"), ("other", ""),
    }  # fmt: skip
    assert len(frame) == 4 * 2 * 3
    assert measured_frame(results)["documents"].tolist() == [12, 12, 5, 5] + [4] * 16 + [2] * 4
    assert main(["report", str(compared.folder)]) == 0
    page = (compared.folder / "compare.html").read_text(encoding="utf-8")
    assert "Losses of other rows" in page
    assert "a (held-out rows)" in page
    assert "Too few rows to compare losses of: rare of other (4 rows with a loss) and (none) of other" in page


@RECIPES
def test_trained_models_answer_the_same_rows_and_prompts(compared):
    chosen = [str(place) for place in asked_rows(12, most=4)]
    assert len(set(chosen)) == 4
    for task in compared.tasks():
        answers = pd.read_parquet(answers_path(task.folder, MAIN))
        assert answers["document"].tolist() == chosen
        assert answers["group"].tolist() == [f"d{int(place) // 2}" for place in chosen]
        rows = raw_rows(12, seed=9)
        assert answers["reference"].tolist() == [rows[int(place)]["output"] for place in chosen]
        assert (answers["answer_tokens"] <= 8).all()
        asked = pd.read_parquet(answers_path(task.folder, "asked"))
        assert [text.count("### Instruction:\nWhat ran?\n") for text in asked["prompt"]] == [1, 0]
        assert asked["question"].tolist() == ["What ran?", "A cat or a dog?"]
    measured = {(each.measure, each.of): each for each in read_results(compared).measured}
    found = measured["ROUGE-L", MAIN]
    assert (found.documents, found.higher) == (4, True)
    task = next(task for task in compared.tasks() if (task.arm.name, task.seed) == ("longest", 1))
    answers = pd.read_parquet(answers_path(task.folder, MAIN))
    assert {measure: each.higher for (measure, of), each in measured.items() if of == "asked"} == {
        "answer tokens": None,
        "cut off": None,
    }
    lengths = measured["answer tokens", MAIN].arms
    assert next(arm for arm in lengths if arm.arm == "longest").by_seed[1] == answers["answer_tokens"].mean()
    values = agreement(answers).query("measure == 'ROUGE-L'")["value"]
    assert next(arm for arm in found.arms if arm.arm == "longest").by_seed[1] == pytest.approx(values.mean())


@RECIPES
def test_a_judge_is_asked_once_runs_have_ended(compared, capsys):
    """By the command, beside whose runs all is there already; a server gives the arm's answers more."""
    folder = compared.folder
    text = compared.recipe
    answers = {
        (task.arm.name, task.seed): pd.read_parquet(answers_path(task.folder, "asked"))["answer"].tolist()
        for task in compared.tasks()
    }
    pairs = [
        (a, b) for seed in (0, 1) for a, b in zip(*(answers[arm, seed] for arm in ("longest", "random")), strict=True)
    ]
    unlike = {pair for pair in pairs if pair[0] != pair[1]}
    command = ["compare", text, "--group_column", "document", "--judge", "tiny"]
    with ChatServer(lambda body, number: completion("7 7")) as server:
        assert main([*command, "--judge_url", server.url]) == 0
        assert len(server.requests) == 2 * len(unlike)
        assert main([*command, "--judge_url", server.url]) == 0
        assert len(server.requests) == 2 * len(unlike)
    out = capsys.readouterr().out
    assert "at its end, it answers 4 of held-out rows, 4 of other and 2 of asked, in at most 8 tokens each" in out
    assert "tiny judges at most 4 pairs of answers" in out
    assert "What tiny prefers" in out
    assert "What a judge prefers" in (folder / "compare.html").read_text(encoding="utf-8")
    judging = json.loads((folder / "results.json").read_text())["judging"]
    assert judging["arms"][0]["ties"] == 4
    assert judging["settings"]["model"] == "tiny"


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    asked = []

    def run_tasks(model, tokenizer, tasks, **settings):
        asked.append((tasks, settings["limit"]))
        return TaskScores(long_form("arc", "acc", ["arc/0", "arc/1"], [1, 0]), pd.DataFrame({"value": [0.5]}), {})

    monkeypatch.setattr("ifd_trainer.evaluation.at_end.run_tasks", run_tasks)
    for _ in range(2):
        measure_at_end(None, None, [], [], Measures(tasks="arc", task_limit=2), tmp_path)
    assert asked == [(("arc",), 2)]
    (read,) = read_documents(tmp_path)
    assert read["value"].tolist() == [1.0, 0.0]


def frame_of(values: dict[str, float], measure: str = "exact match", higher: bool | None = True) -> pd.DataFrame:
    made = pd.DataFrame(
        {"set": "answers", "measure": measure, "document": list(values), "value": list(values.values())}
    )
    return made.assign(higher=higher, group=None).astype(object)


def test_documents_are_paired_by_their_keys_and_left_out_where_a_run_has_none(tmp_path):
    one = frame_of({"a": 1.0, "b": 0.0, "c": 1.0, "d": np.nan})
    other = frame_of({"c": 1.0, "b": 1.0, "a": 1.0, "e": 0.0})
    (found,) = measured_of({"random": [one, other], "longest": [other, other]})
    assert (found.measure, found.of, found.higher) == ("exact match", "answers", True)
    assert (found.documents, found.lacking) == (3, 2)
    base, arm = found.arms
    assert base.by_seed == pytest.approx([2 / 3, 1.0])
    assert arm.by_seed == [1.0, 1.0]
    assert base.against is None
    assert arm.against.mean == pytest.approx(1 / 6)
    write_documents(tmp_path, "answers", one)
    (read,) = read_documents(tmp_path)
    assert read["document"].tolist() == ["a", "b", "c", "d"]


def test_a_measure_of_one_document_says_nothing(tmp_path):
    assert measured_of({"random": [frame_of({"a": 1.0})] * 2, "longest": [frame_of({"a": 0.0})] * 2}) == []


def test_a_run_does_not_read_the_keys_of_measures():
    assert set(KEYS) <= set(COMPARED)
