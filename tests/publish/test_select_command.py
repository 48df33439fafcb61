"""`ifd-trainer select`: rows and scores in, a data set with its card out."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from huggingface_hub import DatasetCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows, write_rows
from ifd_trainer.errors import FileAccessError, UserError
from ifd_trainer.method.reasons import Status
from ifd_trainer.publish.card import MARKER, public_name, size_category
from ifd_trainer.publish.provenance import Provenance, provenance_path, read_provenance, write_provenance

STATUSES = [status.value for status in Status if status is not Status.OK]
# cas and das in nats per token; IFD 0.5, 0.9, 1.2, 0.8 and 0.8, and one row without an answer.
LOSSES = [(1.0, 2.0), (1.8, 2.0), (2.4, 2.0), (1.6, 2.0), (1.6, 2.0), (math.nan, math.nan)]
ROWS = [
    {"instruction": f"Ask {i}.", "input": None, "output": f"Answer {i}.", "id": f"r{9 - i}", "date": "2024-01-01"}
    for i in range(6)
]
ROWS[1]["output"] = "I’m sorry, but I cannot help."
ROWS[5]["output"] = ""


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return str(path)


@pytest.fixture
def cherry(tmp_path: Path) -> str:
    saved = [
        {"ppl": [0, torch.tensor(das).exp(), torch.tensor(cas).exp()], "token_loss": [[], [9.0, das], [9.0, cas]]}
        for cas, das in LOSSES
    ]
    torch.save(saved, tmp_path / "cherry.pt")
    return str(tmp_path / "cherry.pt")


@pytest.fixture
def scored(tmp_path: Path) -> str:
    path = tmp_path / "scored.parquet"
    frame = pd.DataFrame(LOSSES, columns=["cas", "das"])
    frame["ifd"] = [0.5, 0.9, 1.2, 0.8, 0.8, None]
    frame["ifd_ppl"] = [math.exp(cas - das) if cas == cas else None for cas, das in LOSSES]
    frame["answer_tokens"] = [2, 3, 4, 5, 6, 0]
    frame["ifd_status"] = ["ok"] * 5 + ["empty_answer"]
    write_rows(Dataset.from_pandas(pd.concat([pd.DataFrame(ROWS), frame], axis=1)), path)
    made = Provenance("paper", "org/model", "org/model@0a1b", "alpaca", max_length=64, program="ifd_trainer 0")
    write_provenance(path, made, frame)
    return str(path)


def select(*arguments: object) -> int:
    return main(["select", *map(str, arguments)])


def card_of(path: Path) -> tuple[dict, str]:
    _, matter, text = path.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(matter), text


def test_one_kept_row_just_below_the_limit_reads_as_what_it_is(tmp_path, capsys):
    frame = pd.DataFrame({"instruction": ["Ask."] * 3, "output": ["So."] * 3, "ifd": [0.99999, 0.5, 1.00001]})
    frame = frame.assign(ifd_ppl=0.5, answer_tokens=3, ifd_status="ok")
    write_rows(Dataset.from_pandas(frame), tmp_path / "scored.parquet")
    assert select(tmp_path / "scored.parquet", "--keep", "1", "--all", "--output", tmp_path / "out.jsonl") == 0
    said = "1 row kept, 33.33 % of all 3 rows in the pool (1 asked for), ifd >= 0.99999. Not kept: 1 above_limit, 1"
    assert said in capsys.readouterr().out
    _, text = card_of(tmp_path / "out.md")
    assert "All 3 rows of scored.parquet, each with its score; 1 row of the 3 of scored.parquet is marked" in text
    assert "the row with the highest Instruction-Following Difficulty (IFD) below 1." in text
    assert "| lowest score kept | 0.99999 |" in text
    assert "| 100 % (highest) | 1.0000 | 0.99999 |" in text


def test_scores_of_another_program_are_enough(rows, cherry, tmp_path, capsys):
    assert select(rows, "--scores", cherry, "--keep", "0.5", "--output", tmp_path / "out.jsonl") == 0
    kept = load_rows(str(tmp_path / "out.jsonl")).to_list()
    assert [row["instruction"] for row in kept] == ["Ask 1.", "Ask 3.", "Ask 4."]
    assert [{name: row[name] for name in ROWS[0]} for row in kept] == [ROWS[1], ROWS[3], ROWS[4]]
    assert [row["ifd_rank"] for row in kept] == [1, 3, 2]  # the ids of the equal ones are r6 and r5
    assert [row["ifd_definition"] for row in kept] == ["cherry"] * 3
    assert [row["ifd"] for row in kept] == pytest.approx([0.9, 0.8, 0.8])
    out = capsys.readouterr().out
    assert "3 rows kept, 50.00 % of all 6 rows in the pool (3 asked for), ifd >= 0.8000." in out
    assert "Not kept: 1 above_limit, 1 below_cut, 1 empty_answer." in out


@pytest.mark.parametrize(
    ("options", "first"),
    [([], "Ask 4."), (["--id-column", "instruction"], "Ask 3."), (["--id-column", "id"], "Ask 4.")],
)
def test_ties_are_broken_by_row_id(scored, tmp_path, options, first):
    assert select(scored, "--keep", "2", "--output", tmp_path / "out.csv", *options) == 0
    assert load_rows(str(tmp_path / "out.csv"))["instruction"][:] == ["Ask 1.", first]


def test_refusals_are_dropped_on_request(scored, tmp_path, capsys):
    assert select(scored, "--keep", "1", "--drop-refusals", "--all", "--output", tmp_path / "out.json") == 0
    found = load_rows(str(tmp_path / "out.json"))
    assert found["ifd_reason"][:] == ["below_cut", "refusal", "above_limit", "below_cut", "kept", "empty_answer"]
    assert "1 refusal" in capsys.readouterr().out


def test_another_selection_in_a_folder_of_the_same_name_is_not_the_first_one_from_the_cache(scored, tmp_path):
    found = []
    for place, keep in (("a", "1"), ("b", "3"), ("c", "2")):
        out = tmp_path / place / "cherry"
        assert select(scored, "--keep", keep, "--output", out) == 0
        found.append(
            (len(load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]), len(load_rows(str(out))))
        )
        card = out / "README.md"  # two selections may well have the same card: the title and the numbers of rows
        card.write_text("---\n" + card.read_text(encoding="utf-8").split("---\n")[1] + "---\n", encoding="utf-8")
        found.append(len(load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]))
    assert found == [(1, 1), 1, (3, 3), 3, (2, 2), 2]


def test_a_folder_is_a_data_set(scored, tmp_path):
    out = tmp_path / "cherry"
    assert select(scored, "--keep", "0.34", "--output", out) == 0
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "histogram.png", "train.parquet"]
    assert (out / "histogram.png").read_bytes().startswith(b"\x89PNG")
    found = load_dataset(str(out), cache_dir=str(tmp_path / "cache"))
    assert list(found) == ["train"]
    assert found["train"]["instruction"][:] == ["Ask 1.", "Ask 4."]
    assert select(out, "--keep", "1", "--output", tmp_path / "one.jsonl") == 0  # and can be selected from again
    assert load_rows(str(tmp_path / "one.jsonl"))["instruction"][:] == ["Ask 1."]


def test_the_card_says_what_was_done(scored, tmp_path):
    assert select(scored, "--keep", "0.34", "--output", tmp_path / "out" / "cherry.csv") == 0
    assert (tmp_path / "out" / "cherry.png").is_file()
    matter, text = card_of(tmp_path / "out" / "cherry.md")
    assert matter["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "cherry.csv"}]}]
    assert matter["size_categories"] == ["n<1K"]
    assert MARKER in text
    assert "![Histogram of ifd over the pool, kept rows apart](cherry.png)" in text
    assert str(tmp_path) not in text  # a card is published
    facts = dict(re.findall(r"^\| ([a-z ]+) \| (.+) \|$", text, re.MULTILINE))
    assert facts["source"] == "scored.parquet"
    assert facts["scoring model"] == "org/model"
    assert facts["its weights"] == "org/model@0a1b"
    assert facts["definition of the scores"].startswith("paper: ")
    assert facts["options of the scoring"] == "maximal length: 64"
    assert facts["asked for"] == "34 % of all 6 rows of the pool = 2 rows"
    assert facts["kept"] == "2 rows, 33.33 % of all 6 rows of the pool"
    assert facts["limit"] == "`ifd` < 1"
    assert facts["lowest score kept"] == "0.8000"
    assert facts["ranked by"] == "`ifd`, ties by `id`"
    counts = {name: (rows, share) for name, rows, share in re.findall(r"^\| `(\w+)` \| (\d+) \| (.+?) \|", text, re.M)}
    assert counts == {
        "kept": ("2", "33.33 %"),
        "below_cut": ("2", "33.33 %"),
        "above_limit": ("1", "16.67 %"),
        "empty_answer": ("1", "16.67 %"),
    }
    assert "By `ifd_status`: 5 `ok`, 1 `empty_answer`." in text
    assert "| 50 % (median) | 0.8000 | 0.8500 |" in text
    assert "| 100 % (highest) | 1.2000 | 0.9000 |" in text
    # Ranks 1, 4, 5, 2.5, 2.5 against 1 to 5: sum of products of their deviations 1.5, of squares 9.5 and 10.
    assert f"answer tokens here: {1.5 / math.sqrt(95):.2f})" in text
    assert "does not remove label noise" in " ".join(text.split())


def test_a_shortfall_is_on_the_card_and_an_error_if_strict(scored, tmp_path, capsys):
    command = [scored, "--keep", "5", "--output", tmp_path / "out.jsonl"]
    assert select(*command, "--strict") == 2
    assert "5 rows asked for (of 6 rows in the pool), only 4 are eligible" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    assert select(*command) == 0
    assert "only 4 are eligible (1 above_limit, 1 empty_answer)" in capsys.readouterr().err
    assert "| shortfall | 1 row: only 4 were eligible |" in (tmp_path / "out.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ["data", "scores", "folder"])
def test_what_is_selected_from_is_not_written_over(rows, scored, tmp_path, monkeypatch, capsys, source):
    monkeypatch.chdir(tmp_path)
    if source == "folder":
        assert select(scored, "--all", "--output", tmp_path / "data") == 0
    path, command = {
        "data": ("scored.parquet", [scored, "--output", "./scored.parquet"]),
        "scores": ("scored.parquet", [rows, "--scores", scored, "--output", "scored.parquet"]),
        "folder": ("data/train.parquet", ["data", "--output", tmp_path / "data"]),
    }[source]
    before = (tmp_path / path).read_bytes()
    assert select(*command, "--keep", "1") == 2
    assert "is read by this command, and what is not kept of it would be lost" in capsys.readouterr().err
    assert (tmp_path / path).read_bytes() == before
    # All rows of the data may take its place; scores are another program's file, whatever is kept.
    assert select(*command, "--keep", "1", "--all") == (2 if source == "scores" else 0)
    assert len(load_rows(str(tmp_path / path))) == 6


@pytest.mark.parametrize(
    ("status", "options", "told", "not_told"),
    [
        ("too_short", [], ["(6 too_short)", "No row has a score (ifd)"], ["--keep", "--max-ifd"]),
        ("ok", ["--max-ifd", "0.1"], ["Raise --max-ifd"], ["Lower"]),
        ("ok", ["--max-ifd", "inf", "--keep", "6"], ["only 5 are eligible", "Lower --keep."], ["--max-ifd"]),
    ],
)
def test_a_shortfall_is_put_down_to_what_caused_it(scored, tmp_path, capsys, status, options, told, not_told):
    frame = load_rows(scored).to_pandas()
    if status != "ok":
        frame = frame.assign(ifd=None, ifd_ppl=None, ifd_status=status).astype({"ifd": float, "ifd_ppl": float})
    write_rows(Dataset.from_pandas(frame), tmp_path / "rows.parquet")
    select(tmp_path / "rows.parquet", "--output", tmp_path / "out.jsonl", *options)
    found = capsys.readouterr().err
    assert [word for word in told if word not in found] == []
    assert [word for word in not_told if word in found] == []


def test_another_readme_is_not_written_over(scored, tmp_path, capsys):
    (tmp_path / "README.md").write_text("# My project\n", encoding="utf-8")
    assert select(scored, "--output", tmp_path) == 2
    assert "was not written by `ifd-trainer select`" in capsys.readouterr().err
    assert not (tmp_path / "train.parquet").exists()
    assert select(scored, "--keep", "1", "--output", tmp_path, "--no-card") == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# My project\n"
    for _ in range(2):  # its own card is
        assert select(scored, "--keep", "1", "--output", tmp_path / "own") == 0


def test_scores_of_two_definitions_are_not_ranked_together(scored, cherry, rows, tmp_path, capsys):
    assert select(scored, "--keep", "1", "--all", "--output", tmp_path / "a.jsonl") == 0
    assert select(rows, "--scores", cherry, "--keep", "1", "--all", "--output", tmp_path / "b.jsonl") == 0
    both = (tmp_path / "a.jsonl").read_text(encoding="utf-8") + (tmp_path / "b.jsonl").read_text(encoding="utf-8")
    (tmp_path / "both.jsonl").write_text(both, encoding="utf-8")
    capsys.readouterr()
    assert select(tmp_path / "both.jsonl", "--output", tmp_path / "c.jsonl") == 2
    assert "scores of several definitions (cherry, paper)" in capsys.readouterr().err


def test_a_definition_says_which_score_ranks(rows, tmp_path, capsys):
    path = tmp_path / "super.jsonl"
    records = [{"ppl": [0, math.exp(das), 0, math.exp(cas)], "loss": [0, das, 0, cas]} for cas, das in LOSSES]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    assert select(rows, "--scores", path, "--keep", "1", "--output", tmp_path / "a.jsonl", "--scored-by", "gpt2") == 0
    assert f"ifd_ppl >= {math.exp(-0.2):.4f}" in capsys.readouterr().out
    text = (tmp_path / "a.md").read_text(encoding="utf-8")
    assert "| scoring model | gpt2 |" in text
    assert "| definition of the scores | superfiltering: " in text
    assert select(rows, "--scores", path, "--keep", "1", "--score", "ifd", "--output", tmp_path / "a.jsonl") == 0
    assert "ifd >= 0.9000" in capsys.readouterr().out


def test_rows_that_hold_scores_of_data_juicer(tmp_path, capsys):
    rows = [
        row | {"__dj__stats__": {"ifd_score": score}}
        for row, score in zip(ROWS, [0.1, 0.4, 2, 0.3, 0.2, None], strict=True)
    ]
    path = tmp_path / "dj.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert select(path, "--keep", "2", "--output", tmp_path / "a.jsonl") == 0
    kept = load_rows(str(tmp_path / "a.jsonl")).to_list()
    assert [row["__dj__stats__"] for row in kept] == [{"ifd_score": 0.4}, {"ifd_score": 0.3}]
    assert [row["ifd"] for row in kept] == [0.4, 0.3]
    assert "1 above_limit, 1 empty_answer" in capsys.readouterr().out
    assert select(path, "--score", "ifd_ppl", "--output", tmp_path / "a.jsonl") == 2
    assert "The scores have no ifd_ppl" in capsys.readouterr().err


def test_provenance_is_believed_for_its_scores_only(scored, tmp_path):
    frame = load_rows(scored).to_pandas()
    assert read_provenance(scored, frame).model == "org/model"
    for ending in (".csv", ".json", ".jsonl"):  # the digest does not depend on the format of the file
        write_rows(load_rows(scored), tmp_path / f"copy{ending}")
        provenance_path(tmp_path / f"copy{ending}").write_bytes(provenance_path(scored).read_bytes())
        assert read_provenance(tmp_path / f"copy{ending}", load_rows(str(tmp_path / f"copy{ending}")).to_pandas())
    assert read_provenance(scored, frame.assign(ifd=frame["ifd"] + 0.1)) is None
    assert read_provenance(tmp_path / "other.csv", frame) is None
    for other in (b"- 1\n", b"\xff", b"", b"model: [\n", b"model: m\n"):
        provenance_path(scored).write_bytes(other)
        with pytest.raises(ValueError, match="does not say how scores were made"):
            read_provenance(scored, frame)


def test_a_provenance_that_was_changed_is_never_believed(scored):
    """Each bit flipped, each place cut off: told, or as it was, never another one or none."""
    frame, path = load_rows(scored).to_pandas(), provenance_path(scored)
    whole, expected = path.read_bytes(), read_provenance(scored, load_rows(scored).to_pandas())
    damaged = [whole[:at] for at in range(len(whole))]
    for at, bit in itertools.product(range(len(whole)), range(8)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    same = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            found = read_provenance(scored, frame)
        except UserError:
            continue
        assert found == expected, data
        same += 1
    assert same < 20  # the white space at the end, and all but the checksum
    path.write_bytes(whole.replace(b"org/model\n", b"org/other\n"))
    with pytest.raises(FileAccessError, match=r"\.yaml was changed after it was written, .*only its line `checksum:`"):
        read_provenance(scored, frame)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert read_provenance(scored, frame).model == "org/other"


CELL = st.none() | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "output": CELL,
                "extra": CELL,
                "nested": st.none() | st.fixed_dictionaries({"a": st.lists(CELL, max_size=2), "b": st.integers(-9, 9)}),
                "ifd": st.floats(0.01, 0.99),
            }
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([".parquet", ".jsonl"]),
)
def test_every_column_of_a_kept_row_is_as_it_was(tmp_path, rows, ending):
    rows = [row | {"ifd_status": "ok", "place": i} for i, row in enumerate(rows)]
    source, output = tmp_path / f"rows{ending}", tmp_path / f"out{ending}"
    write_rows(Dataset.from_list(rows), source)
    keep = (len(rows) + 1) // 2
    assert select(source, "--keep", keep, "--output", output, "--no-card") == 0
    kept = load_rows(str(output)).to_list()
    assert len(kept) == keep
    for row in kept:
        assert (row.pop("ifd_reason"), row.pop("ifd_rank") > 0) == ("kept", True)
        assert row == rows[row["place"]]
    if ending == ".parquet":
        assert pq.read_schema(output).names[:-2] == pq.read_schema(source).names
        assert [pq.read_schema(output).field(name).type for name in rows[0]] == [
            pq.read_schema(source).field(name).type for name in rows[0]
        ]


POOL = st.lists(
    st.tuples(st.sampled_from([0.3, 0.5, 0.5, 0.9, 0.999, 1.0, 1.5, None]), st.sampled_from(["ok", *STATUSES])),
    min_size=1,
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(POOL, st.integers(1, 12) | st.floats(0.01, 1.0), st.sampled_from(["id", None]), st.booleans(), st.data())
def test_the_file_holds_what_an_independent_sort_keeps(tmp_path, pool, keep, ids, everything, data):
    pool = [*pool, (0.5, "ok")]
    keep = min(keep, len(pool)) if isinstance(keep, int) else keep
    score = [ifd if status == "ok" else None for ifd, status in pool]
    names = data.draw(st.permutations([f"row {i:02d}" for i in range(len(pool))]))
    rows = Dataset.from_dict({"id": names, "ifd": score, "ifd_status": [status for _, status in pool]})
    rows = rows if ids else rows.rename_column("id", "name")
    asked = keep if isinstance(keep, int) else max(1, round(keep * len(pool)))
    eligible = [i for i, ifd in enumerate(score) if ifd is not None and ifd < 1]
    best = sorted(eligible, key=lambda i: (-score[i], names[i] if ids else i))[:asked]
    write_rows(rows, tmp_path / "pool.parquet")
    command = [tmp_path / "pool.parquet", "--keep", keep, "--output", tmp_path / "out.parquet", "--no-card"]
    assert select(*command, *(["--all"] if everything else [])) == 0
    expected = []
    for i, (_, status) in enumerate(pool):
        dropped = "nonfinite" if score[i] is None else "above_limit" if score[i] >= 1 else "below_cut"
        new = {
            "ifd_rank": best.index(i) + 1 if i in best else None,
            "ifd_reason": "kept" if i in best else dropped if status == "ok" else status,
        }
        expected += [rows[i] | new] if everything or i in best else []
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.to_pylist() == expected
    assert [str(found.schema.field(name).type) for name in ("ifd_rank", "ifd_reason")] == ["int64", "string"]


class FakeHub:
    """Takes commits and keeps what was in them."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.files: dict[str, bytes] = {}

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> str:
        self.repositories[name] = {"type": repo_type, "private": private, "exist_ok": exist_ok}
        return f"https://hub.example/datasets/{name}"

    def create_commit(self, name: str, operations: list, *, repo_type: str, commit_message: str) -> None:
        assert (repo_type, name in self.repositories) == ("dataset", True)
        self.files |= {op.path_in_repo: Path(op.path_or_fileobj).read_bytes() for op in operations}


@pytest.mark.parametrize(
    ("output", "data", "image"), [("out", "train.parquet", "histogram.png"), ("c.csv", "c.csv", "c.png")]
)
def test_rows_and_card_are_pushed(scored, tmp_path, monkeypatch, capsys, output, data, image):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    command = [scored, "--keep", "2", "--output", tmp_path / output, "--push-to-hub", "someone/cherry"]
    assert select(*command, "--private") == 0
    assert hub.repositories == {"someone/cherry": {"type": "dataset", "private": True, "exist_ok": True}}
    assert sorted(hub.files) == sorted(["README.md", data, image])
    for name, content in hub.files.items():
        (tmp_path / "hub").mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_bytes(content)
    pushed = load_dataset(str(tmp_path / "hub"), cache_dir=str(tmp_path / "cache"), split="train")
    assert pushed["instruction"][:] == ["Ask 1.", "Ask 4."]
    assert f"({image})" in hub.files["README.md"].decode()
    assert "Pushed to https://hub.example/datasets/someone/cherry." in capsys.readouterr().out


def test_without_a_network_the_files_are_there(scored, tmp_path, capsys):
    # The tests run with HF_HUB_OFFLINE=1, so that this is the hub's own refusal.
    out = tmp_path / "out"
    assert select(scored, "--keep", "2", "--output", out, "--push-to-hub", "someone/cherry") == 2
    captured = capsys.readouterr()
    assert "Could not push to someone/cherry: " in captured.err
    assert f"All files are written ({out / 'train.parquet'}" in captured.err
    assert "hf auth login" in captured.err
    assert "2 rows kept" in captured.out
    assert len(load_rows(str(out / "train.parquet"))) == 2


def test_a_hub_that_breaks_off_is_one_line(scored, tmp_path, monkeypatch, capsys):
    class ReadTimeout(Exception):
        """Like those of the client's transport, neither an OSError nor a ValueError."""

    def broken(*_: object, **__: object) -> None:
        raise ReadTimeout("The read operation timed out")

    hub = FakeHub()
    hub.create_commit = broken
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert select(scored, "--keep", "2", "--output", tmp_path / "out", "--push-to-hub", "someone/cherry") == 2
    assert "timed out. All files are written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--push-to-hub", "cherry"], "takes USER/NAME"),
        (["--push-to-hub", "a/b--c"], "a/b--c"),
        (["--push-to-hub", "a/b", "--no-card"], "leave out --no-card"),
        (["--private"], "--private goes with --push-to-hub"),
        (["--id-column", "nothing"], "no column 'nothing'"),
        (["--scores", "nothing.pt"], "No such file of scores: nothing.pt"),
        (["--keep", "many"], "is not a number"),
    ],
)
def test_wrong_options_are_told_before_anything_is_written(scored, tmp_path, capsys, options, words):
    assert select(scored, "--output", tmp_path / "out", *options) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_on_a_card(tmp_path):
    assert public_name("org/data") == "org/data"
    assert public_name(str(tmp_path / "model")) == "model"
    assert [size_category(n) for n in (1, 999, 1000, 52_002, 10**7)] == [
        "n<1K",
        "n<1K",
        "1K<n<10K",
        "10K<n<100K",
        "10M<n<100M",
    ]


HOSTILE = [
    "a|b `c` _d_ *e* [f](g) <img src=x onerror=alert(1)> &amp; ~~h~~ $i$ \\",
    "line one\n---\nlicense: mit\n# two",
    "``` <!-- --> \t {{ program }} {% raw %}",
    "# __init__ snake_case - ![x](y)",
    "\N{RIGHT-TO-LEFT OVERRIDE}名: 'q' \"r\"",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_others_are_shown_on_the_card_as_they_are(tmp_path, name):
    """Of the data, the model, columns and statuses; read back as hubs read it: YAML, and Markdown with tables."""
    frame = pd.DataFrame(
        {name: [3, 2, 1], "ifd": [0.9, 0.8, np.nan], "answer_tokens": [2, 3, 0], "ifd_status": ["ok", "ok", name]}
    )
    frame["ifd_ppl"], frame["n"] = frame["ifd"], [0, 1, 2]
    file = f"{name.replace('/', ' ')}.jsonl"
    write_rows(Dataset.from_pandas(frame), tmp_path / file)
    made = Provenance(name, f"org/{name}", name, name, dtype=name, program=name)
    write_provenance(tmp_path / file, made, frame)
    out = tmp_path / "out" / f"[x] {file}"
    assert select(tmp_path / file, "--keep", "1", "--output", out, "--id-column", name, "--all") == 0
    card, line = out.with_suffix(".md"), " ".join(name.split())
    shown = " ".join(file.split())
    matter = DatasetCard.load(card).data.to_dict()
    assert matter["pretty_name"] == f"{shown}: all rows, marked the 1 row with the highest IFD"
    assert "license" not in matter
    assert matter == card_of(card)[0]
    tokens = list(walk(MarkdownIt().enable(["table", "strikethrough"]).parse(card_of(card)[1])))
    assert [token.content for token in tokens if token.type == "html_block"] == [f"{MARKER}\n"]
    assert not [token for token in tokens if token.type in ("html_inline", "em_open", "strong_open", "s_open", "hr")]
    assert [token.attrs["href"] for token in tokens if token.type == "link_open"] == [
        "https://arxiv.org/abs/2308.12032"
    ]
    assert [unquote(token.attrs["src"]) for token in tokens if token.type == "image"] == [out.with_suffix(".png").name]
    texts = [text_of(token) for token in tokens if token.type == "inline"]
    assert texts[0] == f"{shown}: all rows, marked the 1 row with the highest IFD"
    assert texts[1].startswith(f"All 3 rows of {shown}, each with its score")
    facts = dict(itertools.pairwise(texts[2:]))
    assert facts["source"] == shown
    assert facts["scoring model"] == f"org/{line}"
    assert [facts[key] for key in ("its weights", "prompt format", "scored with", "definition of the scores")] == [
        line
    ] * 4
    assert facts["options of the scoring"] == f"dtype: {line}"
    assert facts["ranked by"] == f"ifd, ties by {line}"
    assert facts[line] == "1"  # row of that reason
    assert f"By ifd_status: 2 ok, 1 {line}." in texts


def walk(tokens):
    for token in tokens:
        yield token
        yield from walk(token.children or [])


def text_of(token) -> str:
    """What a reader sees of a line."""
    return "".join(child.content for child in token.children if child.type in ("text", "code_inline", "text_special"))


@pytest.mark.parametrize("name", ["[a] *b?.jsonl", "a\n---\nb.jsonl"])
def test_a_name_with_brackets_or_lines_and_a_card_is_a_data_set(scored, tmp_path, name):
    out = tmp_path / "out" / name
    assert select(scored, "--keep", "2", "--output", out) == 0
    out.with_suffix(".md").rename(tmp_path / "out" / "README.md")
    (tmp_path / "out" / "a bc.jsonl").write_text('{"other": 1}\n')
    found = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))["train"]
    assert found["instruction"][:] == ["Ask 1.", "Ask 4."]
