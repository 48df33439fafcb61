"""`IFDScorer` as it is in `ray.data.Dataset.map_batches`, on two processors of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from conftest import ROOT, ROUNDING
from datasets import Dataset

from ifd_trainer.method.columns import IFD_COLUMNS
from ifd_trainer.scoring.transform import IFDScorer

ROWS = [
    {"instruction": f"Name {n} things.", "output": "The cat sat. " * (n % 5), "n": n, "tags": [str(n)] * (n % 3)}
    for n in range(20)
]


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # by default Ray's workers wait for everything else on the machine
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ray.init("local", num_cpus=2, num_gpus=0, include_dashboard=False, runtime_env={"env_vars": environment})
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # of Ray itself
def test_two_workers_score_like_the_transform(cluster, tmp_path: Path, model, tokenizer) -> None:
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    options = {"model": str(tmp_path / "model"), "format": "alpaca", "device": "cpu"}
    scored = ray.data.from_items(ROWS, override_num_blocks=4).map_batches(
        IFDScorer, fn_constructor_kwargs=options, batch_format="pyarrow", batch_size=5, concurrency=2
    )
    found = sorted(scored.take_all(), key=lambda row: row["n"])
    expected = Dataset.from_list(ROWS).map(IFDScorer(**options), batched=True, batch_size=5).to_list()
    assert [list(row) for row in found] == [[*ROWS[0], *IFD_COLUMNS]] * len(ROWS)
    for row, wanted in zip(found, expected, strict=True):
        assert {name: row[name] for name in ROWS[0]} == {name: wanted[name] for name in ROWS[0]}
        assert row["ifd_status"] == wanted["ifd_status"]
        if wanted["ifd"] is not None:
            assert row["ifd"] == pytest.approx(wanted["ifd"], rel=ROUNDING)
        else:
            assert row["ifd"] is None or row["ifd"] != row["ifd"]


@pytest.mark.filterwarnings("ignore")
def test_other_batches_of_a_worker_are_refused_with_the_way_to_do_it(cluster) -> None:
    rows = ray.data.from_items(ROWS).map_batches(
        IFDScorer, fn_constructor_kwargs={"model": "none"}, batch_format="numpy", concurrency=1
    )
    with pytest.raises(ray.exceptions.RayTaskError, match='batch_format="pyarrow"'):
        rows.take_all()
