"""`ifd-trainer select` with what keeps noise out: rows, scores and their measure in; reasons, counts and a card out."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.data.readable_text import row_texts
from ifd_trainer.data.table_reader import TableReader
from ifd_trainer.errors import FileAccessError, UserError
from ifd_trainer.publish.provenance import Provenance, provenance_path, read_provenance, write_provenance

SUBJECTS = ["tides", "bridges", "glaciers", "violins", "harvests", "lanterns", "comets", "dialects", "markets", "ferns"]
# Of 40 measured scores the 2nd smallest is the limit with alpha 0.05, floor(0.05 * 41), and with 0.1 the 4th.
WRONG = [0.7, 0.8, 0.85, 0.9] + [1 + i / 100 for i in range(36)]
CUT = [10.0 + i for i in range(20)]
SCORES = [0.79, 0.78, 0.81, 0.77, 0.76, 0.75, 0.89, 0.74, 0.73, 0.72]
LOSSES = [1.0, 1.0, 1.0, 25.0, 1.0, 1.0, 25.0, 1.0, None, 1.0]
IDS = [f"r{9 - i}" for i in range(10)]


def pool(**columns: list) -> pd.DataFrame:
    """Ten rows: 4 says what 0 does but for a letter, 5 and 7 what 2 and 1 do, in other letters and with more space."""
    texts = [
        f"Explain in a few plain sentences how {subject} come about, and name one of them." for subject in SUBJECTS
    ]
    answers = [
        f"Most {subject} need many years, some water and a patient eye to be understood." for subject in SUBJECTS
    ]
    texts[4], answers[4] = texts[0].replace("plain", "plaim"), answers[0]
    texts[5], answers[5] = texts[2].upper(), answers[2] + "!"
    texts[7], answers[7] = texts[1], answers[1].replace(" ", "  ")
    frame = pd.DataFrame({"instruction": texts, "input": "", "output": answers, "id": IDS})
    frame["ifd"], frame["eot_loss"], frame["answer_tokens"], frame["ifd_status"] = SCORES, LOSSES, 9, "ok"
    frame["ifd_ppl"] = [score / 2 for score in SCORES]
    return frame.assign(**columns)


MADE = Provenance("paper", "org/model", program="ifd_trainer 0", wrong_ifd=WRONG, cut_eot_loss=CUT)
MADE_PPL = [value / 2 for value in WRONG]


def saved(path, frame: pd.DataFrame, made: Provenance | None = MADE) -> str:
    write_rows(Dataset.from_pandas(frame), path)
    if made is not None:
        write_provenance(path, made, frame)
    return str(path)


@pytest.fixture
def scored(tmp_path) -> str:
    return saved(tmp_path / "scored.parquet", pool())


def reasons(source, tmp_path, *options: object) -> list[str]:
    assert main(["select", str(source), "--all", "--output", str(tmp_path / "out.parquet"), *map(str, options)]) == 0
    return load_rows(str(tmp_path / "out.parquet"))["ifd_reason"][:]


def test_the_calibrated_limit_is_that_of_the_measured_scores(scored, tmp_path, capsys):
    found = reasons(scored, tmp_path, "--keep", 3, "--max-ifd", "calibrated")
    expected = ["kept", "kept", "above_limit", "kept", *["below_cut"] * 2, "above_limit", *["below_cut"] * 3]
    assert found == expected  # 0.81 and 0.89 are not below 0.8; the next best take their places
    out = capsys.readouterr().out
    assert (
        "3 rows kept, 30.00 % of all 10 rows in the pool (3 asked for), ifd >= 0.7700 and < 0.8000 (calibrated, " in out
    )
    assert "alpha 0.05). Not kept: 5 below_cut, 2 above_limit." in out
    card = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert (
        "| limit | `ifd` < 0.8, calibrated with alpha = 0.05 on 40 answers under the prompts of other rows: at " in card
    )
    assert "below 0.8" in card
    assert "| `above_limit` | 2 | 20.00 % | dropped: at or above the limit |" in card


def test_another_alpha_has_another_limit(scored, tmp_path):
    found = reasons(scored, tmp_path, "--keep", 1, "--max-ifd", "calibrated", "--alpha", 0.1)
    assert [found.count("above_limit"), found.index("kept")] == [0, 6]  # all are below 0.9
    assert "`ifd` < 0.9, calibrated with alpha = 0.1 " in (tmp_path / "out.md").read_text(encoding="utf-8")


def test_the_limit_is_one_of_the_score_that_ranks(tmp_path):
    made = Provenance("superfiltering", program="ifd_trainer 0", wrong_ifd=WRONG, wrong_ifd_ppl=MADE_PPL)
    source = saved(tmp_path / "scored.jsonl", pool(), made)
    found = reasons(source, tmp_path, "--keep", 1, "--max-ifd", "calibrated")
    assert [found.count("above_limit"), found.index("kept")] == [2, 0]
    assert "`ifd_ppl` < 0.4, calibrated" in (tmp_path / "out.md").read_text(encoding="utf-8")


def test_unfinished_answers_are_dropped_by_the_measured_ends(scored, tmp_path, capsys):
    found = reasons(scored, tmp_path, "--keep", 0.2, "--drop-unfinished")
    assert [i for i, reason in enumerate(found) if reason == "unfinished"] == [3, 6]
    assert [i for i, reason in enumerate(found) if reason == "kept"] == [0, 2]
    out = capsys.readouterr()
    assert (out.err, "2 unfinished" in out.out) == ("", True)
    assert "| `unfinished` | 2 | 20.00 % | dropped: the answer is unfinished |" in (tmp_path / "out.md").read_text()


def test_where_ends_say_too_little_none_is_dropped_and_that_is_told(tmp_path, capsys):
    source = saved(tmp_path / "scored.parquet", pool(eot_loss=[15.0 + i for i in range(10)]))
    assert "unfinished" not in reasons(source, tmp_path, "--keep", 2, "--drop-unfinished")
    error = capsys.readouterr().err
    assert (
        "warning: --drop-unfinished drops none: the end-of-turn token tells too little about which answers are "
        "finished (its loss is 19.5 nats behind the rows' answers, 19.5 behind 20 answers cut off at random, medians)"
    ) in error


@pytest.mark.parametrize("ids", ["id", "number", None])
def test_of_duplicates_the_lowest_id_that_may_be_kept_stays(tmp_path, ids):
    frame = pool()
    if ids == "number":
        frame = frame.assign(id=range(90, 80, -1))
    frame = frame if ids else frame.rename(columns={"id": "name"})
    found = reasons(saved(tmp_path / "scored.parquet", frame), tmp_path, "--keep", 10, "--drop-duplicates")
    dropped = {i for i, reason in enumerate(found) if reason == "duplicate"}
    assert dropped == ({0, 1, 2} if ids else {4, 5, 7})
    assert found.count("kept") == 7


def test_a_row_that_is_dropped_for_another_reason_stands_for_none(tmp_path, capsys):
    """Of 0 and 4 the lower id, 4, is above the limit; of 2 and 5 the lower id, 5, is unfinished; 7 is a refusal."""
    frame = pool(ifd=[*SCORES[:4], 1.5, *SCORES[5:]], eot_loss=[*LOSSES[:5], 25.0, *LOSSES[6:]])
    frame.loc[[1, 7], "output"] = ["I cannot help with that.", "I cannot help with that, sorry."]
    options = ["--drop-refusals", "--drop-unfinished", "--drop-duplicates", 0.85]
    found = reasons(saved(tmp_path / "scored.parquet", frame), tmp_path, "--keep", 4, *options)
    refused, unfinished = "refusal", "unfinished"
    assert found == [
        "kept",
        refused,
        "kept",
        unfinished,
        "above_limit",
        unfinished,
        unfinished,
        refused,
        "kept",
        "kept",
    ]
    assert "Not kept: 3 unfinished, 2 refusal, 1 above_limit." in capsys.readouterr().out


def test_the_similarity_says_what_is_the_same(scored, tmp_path, capsys):
    assert reasons(scored, tmp_path, "--keep", 10, "--drop-duplicates", 1).count("duplicate") == 2  # not the typo
    for wrong in ("0.4", "1.5"):
        assert main(["select", scored, "--output", str(tmp_path / "no.jsonl"), "--drop-duplicates", wrong]) == 2
        assert (
            f"similarity must be a share from 0.5 to 1, or None for equal texts, got {wrong}" in capsys.readouterr().err
        )


def test_a_shortfall_says_which_guards_leave_too_few(tmp_path, capsys):
    source = saved(tmp_path / "scored.parquet", pool())
    command = ["select", source, "--keep", "9", "--output", str(tmp_path / "out.jsonl"), "--max-ifd", "calibrated"]
    assert main([*command, "--drop-unfinished", "--drop-duplicates"]) == 0
    error = capsys.readouterr().err
    assert (
        "only 5 are eligible (2 above_limit, 2 duplicate, 1 unfinished). Lower --keep, or raise --alpha, or " in error
    )
    assert "give --max-ifd a number (inf: no limit)." in error


# ---- what was not measured --------------------------------------------------------------------------------------

CHERRY = [{"ppl": [0, torch.tensor(2.0).exp(), torch.tensor(s * 2).exp()], "token_loss": [[], [], []]} for s in SCORES]


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (None, ["--max-ifd", "calibrated"], "--max-ifd calibrated: nothing says how noise scores in"),
        (None, ["--drop-unfinished"], "--drop-unfinished: nothing says how noise scores in"),
        (
            Provenance("paper", program="ifd_trainer 0"),
            ["--max-ifd", "calibrated"],
            "score it with `ifd-trainer score --",
        ),
        (MADE, ["--max-ifd", "calibrated", "--alpha", "0.01"], "alpha=0.01 takes at least 99 answers under a wrong"),
        (MADE, ["--max-ifd", "calibrated", "--score", "ifd_ppl"], "holds no measure, or is not there): score it with"),
        (MADE, ["--alpha", "0.1"], "--alpha goes with --max-ifd calibrated."),
        (MADE, ["--max-ifd", "calibrated", "--alpha", "1.5"], "alpha must be a share in (0, 1), got 1.5"),
        (MADE, ["--max-ifd", "lowest"], "argument --max-ifd: wants a number or calibrated, got 'lowest'"),
    ],
)
def test_what_was_not_measured_is_told_before_anything_is_written(tmp_path, capsys, made, options, words):
    source = saved(tmp_path / "scored.parquet", pool(), made)
    assert main(["select", source, "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [["--max-ifd", "calibrated"], ["--drop-unfinished"]])
def test_scores_of_another_program_say_nothing_of_noise(tmp_path, capsys, options):
    source = saved(tmp_path / "rows.parquet", pool()[["instruction", "input", "output"]], None)
    torch.save(CHERRY, tmp_path / "cherry.pt")
    command = ["select", source, "--scores", str(tmp_path / "cherry.pt"), "--output", str(tmp_path / "out.jsonl")]
    assert main([*command, *options]) == 2
    error = capsys.readouterr().err
    assert "the scores are those of Cherry_LLM, which measures nothing else of " in error
    assert "score it with `ifd-trainer score --calibrate`" in error


def test_scores_and_measure_may_be_those_of_another_file(scored, tmp_path):
    source = saved(tmp_path / "rows.parquet", pool()[["instruction", "input", "output"]], None)
    options = ["--keep", 1, "--max-ifd", "calibrated", "--drop-unfinished"]
    found = reasons(source, tmp_path, "--scores", scored, *options)
    assert [found.count("above_limit"), found.count("unfinished"), found.index("kept")] == [2, 1, 0]


def test_rows_without_ends_are_told_from_rows_that_were_not_measured(tmp_path, capsys):
    command = ["--drop-unfinished", "--output", str(tmp_path / "out.jsonl")]
    older = saved(tmp_path / "older.parquet", pool().drop(columns="eot_loss"))
    assert main(["select", older, *command]) == 2
    assert "older.parquet has no column eot_loss: score it with `ifd-trainer score --cal" in capsys.readouterr().err
    made = Provenance("cherry", program="ifd_trainer 0", wrong_ifd=WRONG, cut_eot_loss=[])
    cherry = saved(tmp_path / "cherry.parquet", pool(eot_loss=np.full(10, np.nan)), made)
    assert main(["select", cherry, *command]) == 2
    assert (
        "(scores by definition cherry). Score them by the definition paper, or leave it out." in capsys.readouterr().err
    )
    made = Provenance("paper", program="ifd_trainer 0", wrong_ifd=WRONG, cut_eot_loss=[])
    cut = saved(tmp_path / "cut.parquet", pool(eot_loss=np.full(10, np.nan)), made)
    assert main(["select", cut, *command]) == 2
    assert "(each answer is cut off, or no token ends its turn). Leave it out." in capsys.readouterr().err


# ---- provenance -------------------------------------------------------------------------------------------------


def test_what_was_measured_is_read_as_it_was_written_and_not_where_it_was_changed(scored):
    frame, path = load_rows(scored).to_pandas(), provenance_path(scored)
    assert read_provenance(scored, frame) == MADE
    text = path.read_text(encoding="utf-8")
    assert yaml.safe_load(text)["wrong_ifd"] == WRONG
    path.write_text(text.replace("0.85", "0.58"), encoding="utf-8")
    with pytest.raises(FileAccessError, match="was changed after it was written"):
        read_provenance(scored, frame)
    for other in ("[a, b]", "5"):
        path.write_text(f"scores: {'0' * 32}\nwrong_ifd: {other}\n", encoding="utf-8")
        with pytest.raises(UserError, match="does not say how scores were made"):
            read_provenance(scored, frame)


# ---- the texts that are compared --------------------------------------------------------------------------------


def test_the_texts_of_a_row_are_all_that_it_says():
    def texts(rows: list[dict]) -> list[tuple[str, str]]:
        return list(row_texts(TableReader(Dataset.from_list(rows))))

    assert texts([{"instruction": "Add.", "input": None, "output": "3"}]) == [("Add.", "3")]
    assert texts([{"instruction": "Add.", "input": "1, 2", "output": None}]) == [("Add.\n1, 2", "")]
    assert texts([{"prompt": "Q", "completion": " A"}]) == [("Q", " A")]
    assert texts([{"instruction": "Add.", "input": "", "response": "3"}]) == [("Add.", "3")]
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "More"), ("assistant", "No.")]
    chat = [{"role": role, "content": content} for role, content in turns]
    before = "system: Be brief.\nuser: Hi\nassistant: Yes?\nuser: More"
    assert texts([{"messages": chat}, {"messages": None}]) == [(before, "assistant: No."), ("", "")]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": "1"}}]}
    (prompt, answer), (_, other) = texts(
        [
            {"messages": [chat[1], call]},
            {"messages": [chat[1], json.loads(json.dumps(call).replace('"1"', '"2"'))]},
        ]
    )
    assert (prompt, answer.split("\n")[0], answer == other) == ("user: Hi", "assistant: ", False)
    with pytest.raises(UserError, match="No answers among the columns"):
        texts([{"other": 1}])


def test_chats_that_say_the_same_are_duplicates_and_those_that_only_end_alike_are_not(tmp_path):
    def chat(first: str) -> list[dict]:
        said = [
            ("user", first),
            ("assistant", "Gladly, tell me more."),
            ("user", "Go on."),
            ("assistant", "As you wish."),
        ]
        return [{"role": role, "content": content} for role, content in said]

    firsts = ["Write a poem about a lighthouse.", "Translate a recipe for soup.", "write a poem about a  lighthouse"]
    frame = pd.DataFrame({"messages": [chat(first) for first in firsts], "ifd": [0.5, 0.6, 0.7]})
    frame = frame.assign(ifd_ppl=0.5, eot_loss=1.0, answer_tokens=4, ifd_status="ok")
    found = reasons(saved(tmp_path / "chats.parquet", frame), tmp_path, "--keep", 2, "--drop-duplicates")
    assert found == ["kept", "kept", "duplicate"]
    assert math.isnan(load_rows(str(tmp_path / "out.parquet")).to_pandas()["ifd_rank"][2])
