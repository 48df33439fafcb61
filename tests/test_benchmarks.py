"""The benchmarks at the smallest size: that they run, compare equal numbers, and count what they say. No times."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, ROUNDING, build_model, build_tokenizer, reference_nll

from ifd_trainer.data.encoding import token_count
from ifd_trainer.scoring.job_parts import Parts
from ifd_trainer.scoring.transform import IFDScorer
from ifd_trainer.training import callback as callback_module
from ifd_trainer.training.checkpoint_state import load_selection

DRY = ["--device", "cpu", "--dtype", "float32", "--tiny", "--runs", "1"]


def loaded(path: Path) -> ModuleType:
    """A benchmark as a module: its folder is not one of packages."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """Scripts find what lies beside them."""
    folder = str(ROOT / "tests" / "benchmarks")
    before, threads = list(sys.path), torch.get_num_threads()
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    yield
    sys.path[:] = before
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measuring(beside_each_other) -> ModuleType:
    import measuring

    return measuring


def checked(folder: Path, name: str) -> dict:
    """The results of a run, after what holds for all of them."""
    results = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert results["peak_flops"] > 0
    for case in results["cases"]:
        assert case["procedures"]["this package"]["ratio"] == [1.0]
        for found in case["procedures"].values():
            assert found["largest_relative_difference"] < 1e-4
            assert found["tokens_run"] > 0
            numbers = [found["rows_per_s"], found["share_of_peak"], *found["seconds"], *found["tokens_per_s"]]
            assert all(math.isfinite(number) and number > 0 for number in numbers)
    return results


def test_a_dry_run_of_the_benchmark_for_gpus(tmp_path):
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")
    bench.main([*DRY, "--output", str(tmp_path)])
    results = checked(tmp_path, "scoring-cpu")
    groups = [case["group"].split(",")[0] for case in results["cases"]]
    sweeps = ["tokens of a row", "vocabulary", "token budget", "rows", "engine"]
    assert list(dict.fromkeys(groups)) == ["model", *sweeps]
    run = {case["label"]: case["procedures"]["this package"]["tokens_run"] for case in results["cases"]}
    assert run["long definition, stream"] < run["long definition, padded"] / 1.5
    assert results["left_out"] == []
    model = results["cases"][0]
    ours = model["procedures"]["this package"]
    expected = {"at the measured rate": 52_000 / ours["rows_per_s"]}
    expected["at the peak"] = expected["at the measured rate"] * ours["share_of_peak"]
    assert model["whole_set_seconds"] == pytest.approx(expected)


def test_a_case_that_does_not_fit_is_left_out_with_its_reason(tmp_path, monkeypatch):
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")

    def measured(case, *_):
        if case.group != "model":
            raise torch.OutOfMemoryError("too large")
        return bench_measured(case, *_)

    bench_measured, bench.measured = bench.measured, measured
    bench.main([*DRY, "--models", "tiny Llama", "--output", str(tmp_path)])
    results = checked(tmp_path, "scoring-cpu")
    assert [case["label"] for case in results["cases"]] == ["tiny Llama"]
    assert {case["reason"] for case in results["left_out"]} == {"too large"}


def test_the_models_only_on_more_rows(tmp_path):
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")
    bench.main([*DRY, "--models", "tiny Qwen2", "--rows", "15", "--no-sweeps", "--output", str(tmp_path)])
    (case,) = checked(tmp_path, "scoring-cpu")["cases"]
    assert (case["label"], case["procedures"]["this package"]["rows"]) == ("tiny Qwen2", 15)


def test_the_seconds_of_the_whole_set_by_hand():
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")
    result = {"procedures": {"this package": {"rows": 26_000, "seconds": [3.0, 1.0, 2.0], "operations": 10.0**15}}}
    assert bench.whole_set(result, peak=5e14) == {"at the measured rate": 4.0, "at the peak": 4.0}


def test_a_device_or_a_model_that_is_not_there_is_a_clear_error(monkeypatch):
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no cuda device here.*--device cpu --tiny"):
        bench.main([])
    with pytest.raises(SystemExit, match="No configuration is named 'GPT-5'; there are: SmolLM2 135M"):
        bench.main(["--device", "cpu", "--models", "GPT-5"])


# Parameters as their makers give them, without and with the embedding where that is how they are known.
@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("SmolLM2 135M", 134.5),
        ("Qwen2.5 0.5B", 494.0),
        ("Llama 3.2 1B", 1235.8),
        ("Qwen2.5 1.5B", 1543.7),
        ("Qwen2.5 3B", 3085.9),
        ("Llama 2 7B", 6738.4),
        ("Qwen2.5 7B", 7615.6),
        ("Llama 3.1 8B", 8030.3),
    ],
)
def test_the_configurations_have_the_parameters_of_their_models(name, millions):
    bench = loaded(ROOT / "tests" / "gpu" / "bench_scoring.py")
    model = bench.builder(bench.CONFIGS[name], torch.device("meta"), torch.bfloat16)()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.fixture
def saved_model(tmp_path) -> str:
    tokenizer = build_tokenizer()
    build_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_dry_run_of_the_benchmark_for_processors(saved_model, tmp_path):
    bench = loaded(ROOT / "tests" / "benchmarks" / "scoring.py")
    bench.main(["--model", saved_model, "--rows", "8", "--runs", "1", "--tiny", "--output", str(tmp_path / "out")])
    results = checked(tmp_path / "out", "scoring-cpu")
    groups = [case["group"].split(",")[0] for case in results["cases"]]
    sweeps = ["tokens of a row", "vocabulary", "token budget", "rows"]
    assert list(dict.fromkeys(groups)) == ["real rows", "shared task", "large vocabulary", *sweeps]
    assert set(results["in_loop"]) == {"0.1", "1.0"}
    for runs in results["in_loop"].values():
        assert all(run["scoring"] > 0 and run["training"] > 0 for run in runs)
    # The definition is computed once: fewer tokens run than the rows hold.
    shared = results["cases"][1]["procedures"]
    assert shared["this package"]["tokens_run"] < shared["this package"]["tokens"] / 1.5
    assert shared["one row at a time"]["tokens_run"] == shared["one row at a time"]["tokens"]


def test_the_other_procedures_compute_the_losses_of_single_tokens(measuring):
    model, pairs = build_model(400), measuring.alpaca_like(5, 400, scale=0.3)
    segments = measuring.segments_of(pairs)
    expected = [reference_nll(model, segment.ids, segment.start) for segment in segments]
    with torch.no_grad():
        for procedure in (measuring.one_row_at_a_time, measuring.padded_batches):
            np.testing.assert_allclose(procedure(model, segments), expected, rtol=ROUNDING)
    np.testing.assert_allclose(measuring.ours(model, pairs), expected, rtol=ROUNDING)


def test_operations_counted_by_hand(measuring):
    model = build_model(400, tie_word_embeddings=True)
    # Two layers: queries and output 32 x 32, keys and values 16 x 32 each, three products of 32 x 64.
    body = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert measuring.operations(model, tokens=7, scored=3) == 2 * (body * 7 + 32 * 400 * 3)


def test_the_peak_of_memory_is_seen(measuring, monkeypatch):
    looks, memory_info = threading.Semaphore(0), measuring.psutil.Process.memory_info

    def look(process):
        memory = memory_info(process)
        looks.release()
        return memory

    monkeypatch.setattr(measuring.psutil.Process, "memory_info", look)
    with measuring.peak_bytes(torch.device("cpu")) as found:
        held = torch.ones(50 * 2**20)
        while looks.acquire(blocking=False):
            pass  # looks from before it was there
        for _ in range(2):  # the first of them may have begun before, too
            assert looks.acquire(timeout=60)
        del held  # gone when the block ends
    assert 180 * 2**20 < found[0] < 400 * 2**20


def test_rows_have_the_lengths_that_are_described(measuring):
    pairs = measuring.alpaca_like(2000, 1000)
    answers = [pair.conditioned.scored for pair in pairs]
    assert np.median(answers) == pytest.approx(45, rel=0.1)
    assert max(answers) <= 514
    assert all(pair.conditioned.ids[:30] == pairs[0].conditioned.ids[:30] for pair in pairs)
    assert all(pair.direct.scored == pair.conditioned.scored for pair in pairs)
    fixed = measuring.fixed_length(3, 64, 1000)
    assert {len(pair.conditioned.ids) for pair in fixed} == {64}
    long = measuring.long_definition(4, 1000)
    assert token_count(long) == sum(len(segment.ids) for segment in measuring.segments_of(long))
    assert all(pair.conditioned.ids[:300] == long[0].conditioned.ids[:300] for pair in long)


def test_a_dry_run_of_the_benchmark_of_selection(tmp_path, capsys):
    bench = loaded(ROOT / "tests" / "benchmarks" / "selection.py")
    bench.main(["--tiny", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "selection.json").read_text())
    assert (results["rows"], list(results["cases"])) == (400, ["base", *bench.CASES])
    for found in results["cases"].values():
        assert len(found["seconds"]) == 1
        assert found["peak_bytes"] > 50 * 2**20
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["base", "400", "400", "400"]


def test_a_dry_run_of_the_benchmark_of_duplicates(tmp_path, capsys):
    bench = loaded(ROOT / "tests" / "benchmarks" / "duplicates.py")
    bench.main(["--tiny", "--output", str(tmp_path)])
    base, case = json.loads((tmp_path / "duplicates.json").read_text())["cases"]
    assert (base["rows"], case["rows"], case["copies_found"], case["others"]) == (100, 400, 1.0, 0)
    assert case["peak_bytes"] > 50 * 2**20
    assert case["seconds"] > case["normalising"] > 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["100", "400"]


def test_the_benchmark_of_duplicates_edits_what_it_says(tmp_path, capsys):
    bench = loaded(ROOT / "tests" / "benchmarks" / "duplicates.py")
    for name in bench.FILES:
        rows = [{"instruction": prompt, "output": answer} for prompt, answer in bench.pool_of(60, seed=len(name))]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = bench.of_real_rows(tmp_path, number=20)
    bench.print_real(found)
    assert len(capsys.readouterr().out.splitlines()) == 2 * 10 + 2 + 9 * 3
    assert (found["rows"], found["equal"], len(found["near"])) == (180, 0, 9)  # the copies of each pool
    for edits in found["edits"].values():
        assert edits["upper case"] == edits["white space"] == {"prompt": 1, "answer": 1, "both": 1}
        assert edits["a word replaced by any other"]["both"] < edits["a word replaced by any other"]["answer"]
    edits = bench.edits_of(np.random.default_rng(0), [("", "zebra")])
    edited = {name: edit("one two") for name, edit in edits.items()}
    assert edited["a word replaced by any other"] in ("zebra two", "one zebra")
    assert edited["a word dropped"] in (" two", "one ")
    assert len(set(edited.values())) == len(edits)


@pytest.fixture(scope="module")
def noise(beside_each_other) -> ModuleType:
    import noise

    return noise


def noise_rows(number: int) -> list[dict[str, str]]:
    """Rows of a few topics, answers of two sentences."""
    topics = ["tides of the sea", "rivers of Asia", "birds of the moor", "bread of the city"]
    return [
        {
            "instruction": f"{'Explain' if i % 3 else 'Name'} the {topics[i % 4]}, part {i}.",
            "output": f"Part {i} of the {topics[i % 4]} is known well. It was written down {i} years ago by her.",
        }
        for i in range(number)
    ]


def test_a_dry_run_of_the_benchmark_of_noise(noise, saved_model, tmp_path, capsys):
    lines = {"rows": noise_rows(80), "own": [{**row, "quality": "clean"} for row in noise_rows(30)]}
    lines["own"][3] |= {"output": "No.", "quality": "one_word"}
    lines["own"][0]["quality"] = "duplicated"  # its original comes behind it
    lines["own"].append({**lines["own"][0], "quality": "clean"})
    files = [str(tmp_path / f"{name}.jsonl") for name in lines]
    for path, rows in zip(files, lines.values(), strict=True):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    noise.main(["--model", saved_model, "--data", *files, "--rows", "40", "--seeds", "2", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "noise.json").read_text())
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")
    assert list(results["files"]) == ["rows", "own"]
    made, own = (results["files"][name]["settings"] for name in ("rows", "own"))
    assert (list(made), list(own)) == (["everywhere", "within clusters", "fluent"], ["as labelled"])
    for setting, runs in made.items():
        assert [run["seed"] for run in runs] == [0, 1]
        wrong = {"fluent": 2} if setting == "fluent" else {"shuffled": 8}
        counts = {"untouched": 40 - 4 - sum(wrong.values()), "duplicated": 2, **wrong, "truncated": 4}
        for run in runs:
            assert run["kinds"] == counts
            assert run["kept_rows"]["random"] == run["kept_rows"]["longest answers"] == 4
            for found in run["policies"].values():
                kept = sum(counts[kind] * share["kept"] for kind, share in found.items())
                assert kept == pytest.approx(round(kept), abs=1e-9)
            assert all(0 <= share <= 1 for shares in run["dropped"].values() for share in shares.values())
    assert own["as labelled"][0]["kinds"] == {"untouched": 29, "duplicated": 1, "one_word": 1}
    assert own["as labelled"][0]["copies"] == {"recall": 1.0, "precision": 1.0}
    assert own["as labelled"][0]["dropped"]["duplicates"] == {"untouched": 0.0, "duplicated": 1.0, "one_word": 0.0}
    costs = results["files"]["rows"]["costs"]
    assert list(costs)[:4] == ["scoring", "limit, random", "limit, near", "unfinished"]
    assert all(cost["seconds"] > 0 and cost["tokens"] > 0 for cost in costs.values())
    assert costs["scoring"]["segments"] == 2 * 42
    assert "rows, within clusters: lift" in capsys.readouterr().out


def test_the_benchmark_of_noise_makes_what_it_says(noise):
    from ifd_trainer.data.formats import WIZARDLM

    rows = noise_rows(60)
    clusters = np.arange(60) % 4
    pools = {setting: noise.with_noise(rows, WIZARDLM, clusters, setting, seed=5) for setting in noise.SETTINGS}
    for setting, pool in pools.items():
        assert (pool.kinds[60:] == "duplicated").all()
        assert (len(pool.rows), len(pool.kinds), len(pool.origin)) == (63, 63, 63)
        for number, (row, before) in enumerate(zip(pool.rows, rows, strict=False)):
            kind, other = pool.kinds[number], rows[pool.origin[number]]
            assert row["instruction"] == before["instruction"]
            assert (row == before) == (kind == "untouched")
            if kind == "truncated":
                assert before["output"].startswith(row["output"])
                assert row["output"][-1] not in ".!? "
            elif kind != "untouched":
                assert row["output"] == other["output"]
                assert kind == ("fluent" if setting == "fluent" else "shuffled")
            if kind == "fluent":
                assert other["instruction"].split()[0] == row["instruction"].split()[0]
            if setting == "within clusters":
                assert clusters[pool.origin[number]] == clusters[number]
        for copy in pool.rows[60:]:
            shared = [(copy["instruction"] == row["instruction"]) + (copy["output"] == row["output"]) for row in rows]
            assert max(shared) == 1
        again = noise.with_noise(rows, WIZARDLM, clusters, setting, seed=5)
        assert again.rows == pool.rows
    for setting in ("everywhere", "within clusters"):  # answers change places, and none is lost
        moved = np.flatnonzero(pools[setting].kinds == "shuffled")
        assert len(moved) == 12
        assert sorted(pools[setting].origin[moved]) == moved.tolist()
    truncated = [np.flatnonzero(pool.kinds == "truncated").tolist() for pool in pools.values()]
    assert truncated[0] == truncated[1] == truncated[2]
    assert len(truncated[0]) == 6


def test_the_benchmark_of_noise_counts_shares_and_lifts_by_hand(noise):
    kinds = np.array(["untouched"] * 6 + ["shuffled"] * 2 + ["duplicated"] * 2, dtype=object)
    found = noise.shares(np.array([0, 1, 2, 6]), kinds)
    assert found["untouched"] == {"kept": 0.5, "lift": pytest.approx(0.75 / 0.6)}
    assert found["shuffled"] == {"kept": 0.5, "lift": pytest.approx(0.25 / 0.2)}
    assert found["duplicated"] == {"kept": 0.0, "lift": 0.0}
    assert noise.shares(np.array([], dtype=int), kinds)["shuffled"] == {"kept": 0.0, "lift": None}
    groups = np.array([0, 1, 2, 1, 4, 5, 6, 7, 0, 9])  # rows 1 and 3 say the same, and 0 with one of the copies
    assert noise.copies_found(groups, kinds) == {"recall": 0.5, "precision": 0.5}
    assert noise.cell([0.5, None, 1.0], ".2f") == "0.75 (0.50 to 1.00)"


def in_one_process(monkeypatch: pytest.MonkeyPatch, bench: ModuleType, work: Callable[[list[str]], object]) -> None:
    """Let a benchmark start the first of its processes alone, and do here what it would start the others for."""
    started, measured = [], bench.measured

    def here(command: list[str]) -> tuple[float, int]:
        if not started:
            started.append(command)
            return measured(command)
        work(command[2:])
        return 1.0, 2**20

    monkeypatch.setattr(bench, "measured", here)


def test_a_dry_run_of_the_benchmark_of_large_files(saved_model, tmp_path, monkeypatch):
    bench = loaded(ROOT / "tests" / "benchmarks" / "streaming.py")

    def work(words: list[str]) -> None:
        with monkeypatch.context() as patch:
            for owner, name in ((IFDScorer, "encode_rows"), (IFDScorer, "score"), (Parts, "save")):
                patch.setattr(owner, name, getattr(owner, name))  # put back what it puts there
            bench.worker(int(words[0]), words[1:])

    in_one_process(monkeypatch, bench, work)
    checked_rows = []
    check = bench.check
    monkeypatch.setattr(bench, "check", lambda pool, output: checked_rows.append(check(pool, output)))
    bench.main(["--model", saved_model, "--tiny", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "streaming.json").read_text())
    assert (results["rows"], results["part_rows"]) == (400, 50)
    assert list(results["cases"]) == ["base", "from the start", "from the last part"]
    assert len(checked_rows) == 2


def test_a_dry_run_of_the_benchmark_of_turns(saved_model, tmp_path, capsys):
    bench, data = loaded(ROOT / "tests" / "benchmarks" / "turns.py"), tmp_path / "rows.jsonl"
    rows = [{"instruction": f"Add {i} and 2.", "output": f"The sum is {i + 2}."} for i in range(9)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    bench.main(
        [
            "--model",
            saved_model,
            "--data",
            str(data),
            "--turns",
            "3",
            "--rows",
            "2",
            "--runs",
            "1",
            "--output",
            str(tmp_path),
        ]
    )
    results = json.loads((tmp_path / "turns.json").read_text())
    assert (results["conversations"], results["turns"]) == (2, 3)
    assert results["largest_difference"] < 1e-5
    assert list(results["ratios"]) == ["all turns", "last answer", "one by one"]
    assert results["ratios"]["last answer"] == [1.0]
    assert "2 conversations of 3 answers" in capsys.readouterr().out


def test_a_dry_run_of_the_benchmark_of_growth(saved_model, tmp_path, monkeypatch):
    bench = loaded(ROOT / "tests" / "benchmarks" / "growth.py")

    def work(words: list[str]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(callback_module, "load_selection", load_selection)  # put back what it puts there
            bench.worker(Path(words[0]), words[1], Path(words[2]), words[3] == "1")

    in_one_process(monkeypatch, bench, work)
    bench.main(["--model", saved_model, "--tiny", "--output", str(tmp_path)])
    base, case = json.loads((tmp_path / "growth.json").read_text())["cases"]
    assert (base["rows"], case["rows"]) == (100, 400)
    parts = ["start", "texts", "epoch", "checkpoint"]
    parts += [f"resume: {part}" for part in ("start", "read", *parts[1:])]
    assert sorted(case["seconds"]) == sorted(parts)
    # A row has four floats, a count and a status in the file of a checkpoint; trainer_state.json does not grow.
    assert 400 * 32 < case["bytes"]["ifd_selection.npz"] < 400 * 80
    assert abs(case["bytes"]["trainer_state.json"] - base["bytes"]["trainer_state.json"]) < 100
    assert set(case["bytes"]) == {"epoch-000.parquet", "pool.parquet", "ifd_selection.npz", "trainer_state.json"}


def test_the_pool_of_the_benchmark_of_growth_reads_as_it_says(tmp_path):
    from datasets import Dataset

    from ifd_trainer.data.response_header import response_prefix
    from ifd_trainer.training.pool import Pool

    bench, tokenizer = loaded(ROOT / "tests" / "benchmarks" / "growth.py"), build_tokenizer()
    header = tokenizer("### Response:", add_special_tokens=False)["input_ids"]
    bench.write_pool(tmp_path / "pool", 3000, np.arange(100, 300), header)
    pool = Pool(Dataset.from_file(str(tmp_path / "pool" / "rows.arrow")))
    prompts, _ = pool.read()
    assert response_prefix(tokenizer, prompts) == header
    assert len(prompts) == len(pool) == 3000
    starts, ends = pool.spans(np.arange(3000)).T
    assert np.median(ends - starts) == pytest.approx(45, rel=0.1)
    assert (ends == pool.lengths(np.arange(3000))).all()


def test_the_benchmark_of_large_files_tells_wrong_rows(tmp_path):
    bench = loaded(ROOT / "tests" / "benchmarks" / "streaming.py")
    rows = {"id": ["row-3", "row-1"], "instruction": ["a", "b"], "output": ["c", "d"]}
    pool, output = tmp_path / "pool.parquet", tmp_path / "out.parquet"
    pq.write_table(pa.table(rows), pool)
    cas, das = bench.losses_of(np.array([3, 1]))
    for given in (cas, cas[::-1]):
        pq.write_table(pa.table({**rows, "cas": given, "das": das}), output)
        with nullcontext() if given is cas else pytest.raises(AssertionError, match="not equal"):
            bench.check(pool, output)


def test_the_benchmark_of_selection_tells_wrong_rows(tmp_path):
    bench = loaded(ROOT / "tests" / "benchmarks" / "selection.py")
    pool, output = tmp_path / "pool.parquet", tmp_path / "out.parquet"
    bench.write_pool(pool, 400)
    rows = pq.read_table(pool).to_pylist()
    assert rows[7] == {**rows[7], "ifd": rows[7]["cas"] / rows[7]["das"], "ifd_status": "ok"}
    assert [row["ifd"] is None for row in rows] == [row["ifd_status"] != "ok" for row in rows]
    able = [row for row in rows if row["ifd"] is not None and row["ifd"] < 1]
    able = sorted(able, key=lambda row: (-row["ifd"], row["id"]))
    assert bench.best(pool, 20, False) == [row["id"] for row in able[:20]]
    able = [row for row in able if row["output"] != bench.REFUSED]
    assert bench.best(pool, 300, True) == [row["id"] for row in able[:300]]
    ids = bench.best(pool, 20, False)
    for order in (ids, ids[::-1]):
        pq.write_table(pa.table({"id": order, "ifd_rank": range(1, 21)}), output)
        with nullcontext() if order is ids else pytest.raises(AssertionError, match="other rows"):
            bench.check(pool, output, 400, "keep")


def test_a_comparison_says_what_is_known_of_a_pool_with_half_of_its_answers_shuffled(tmp_path):
    """Guards leave them out and beat random rows; the highest IFDs without guards are just these rows."""
    bench = loaded(ROOT / "tests" / "benchmarks" / "comparisons.py")
    found = bench.main(["--case", "shuffled", "--rows", "96", "--output", str(tmp_path)])["shuffled"][0]
    assert found["guarded"]["shown"]
    assert found["guarded"]["difference"] < -0.1 < 0.1 < found["dynamic"]["difference"]


# ---- a scorer that is trained too long --------------------------------------------------------------------------


def test_a_dry_run_of_the_benchmark_of_a_scorer_that_is_trained_too_long(
    beside_each_other, saved_model, tmp_path, capsys
):
    import overtrained

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in noise_rows(90)))
    options = ["--rows", "80", "--trained", "12", "--epochs", "2", "--answer-tokens", "400", "--lr", "1e-2"]
    overtrained.main(["--model", saved_model, "--data", str(path), *options, "--output", str(tmp_path)])
    runs = json.loads((tmp_path / "overtrained.json").read_text())["lr"]["0.01"]
    assert len(runs) == 2
    assert (runs[0]["loss"], runs[0]["freeze"], runs[0]["with_first"]) == (None, None, pytest.approx(1.0))
    assert runs[1]["loss"] > 0
    for run in runs:
        assert all(0 <= run[name] <= 1 for name in ("separation", "area", "noise_below_limit", "at_or_above_1"))
    assert "learning rate 0.01" in capsys.readouterr().out


# ---- rescoring --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rescoring(beside_each_other) -> ModuleType:
    import rescoring

    return rescoring


def test_a_dry_run_of_the_benchmark_of_rescoring(rescoring, saved_model, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in noise_rows(50)))
    options = ["--rows", "40", "--epochs", "2", "--lr", "1e-2", "--seeds", "2", "--answer-tokens", "400"]
    rescoring.main(["--model", saved_model, "--data", str(path), *options, "--output", str(tmp_path)])
    found = json.loads((tmp_path / "rescoring.json").read_text())
    assert (found["rows"], found["kept"], found["steps"]) == (40, 4, [0, 2, 4])
    assert found["ways"].keys() == rescoring.ways().keys()
    assert found["ways"]["all"]["overlap"] == [1.0, 1.0]
    for name, way in rescoring.ways().items():
        if way.budget is not None:
            assert found["ways"][name]["cost"] <= way.budget
    assert "candidates, 10 %" in capsys.readouterr().out
    rescoring.main(["--losses", str(tmp_path / "rescoring.npz"), "--seeds", "2", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "rescoring.json").read_text()) == found


def test_the_benchmark_of_rescoring_counts_overlap_and_cost_by_hand(rescoring):
    """Ten rows with answers of two tokens; by the second scoring the best one is row 1, and it was row 0."""
    cas, das = np.full((2, 10, 2), 0.2), np.full((2, 10, 2), 1.0)
    cas[0, :2], cas[1, :2] = [[0.8, 1.0], [0.4, 0.6]], [[0.1, 0.3], [0.7, 0.5]]
    run = rescoring.Recorded(
        np.tile([3, 3, 1], (10, 1)),
        np.full(10, 2),
        cas.reshape(2, 20),
        das.reshape(2, 20),
        np.array([[0]]),
        np.array([0, 1]),
        np.ones(3),
    )
    assert run.means(run.cas)[0, :3].tolist() == pytest.approx([0.9, 0.5, 0.2])
    training = 3 * 6  # an epoch on one row of six tokens
    way = rescoring.Way
    assert rescoring.played(run, way(None, top=1.0), 0) == [(1.0, 10 * (6 + 3) / training)]
    assert rescoring.played(run, way(None, direct=False, top=0.0), 0) == [(0.0, 0.0)]
    assert rescoring.played(run, way(None, direct=False, top=0.2), 0) == [(1.0, 2 * 6 / training)]
    # Two rows nearest to the cut, which is row 0: that row and the next.
    for direct, cost in ((False, 2 * 6), (True, 2 * (6 + 3))):
        near = way(budget=cost / training, drawn=0.0, stale=0.0, direct=direct)
        assert rescoring.played(run, near, 0) == [(1.0, pytest.approx(cost / training))]
    assert rescoring.played(run, way(budget=0.5 * 6 / training), 0) == [(0.0, 0.0)]
