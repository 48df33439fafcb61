"""Selection in the loop on a GPU: what the other tests, on a CPU, cannot see. On a machine with one GPU or more:

    IFD_TEST_DEVICE=cuda python -m pytest tests/gpu

Skipped without the variable; with "cpu" it is the dry run of everything that does not need a GPU.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from itertools import chain

import pytest
import torch
from conftest import build_model
from distributed_run import RESUME_FROM
from launching import launch
from tiny_runs import DEVICE, INF, difference, raw_rows, select, sft_trainer, text_rows, train, weights_of

pytestmark = pytest.mark.skipif("IFD_TEST_DEVICE" not in os.environ, reason="set IFD_TEST_DEVICE=cuda")
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path, bf16):
    def run(folder, resume=None):
        model = build_model(400, attention_dropout=0.1)
        trainer = sft_trainer(
            folder, text_rows(raw_rows(24)), model=model, bf16=bf16, save_strategy="steps", save_steps=7
        )
        select(trainer, keep=[12, 9, 14], max_ifd=INF)
        return train(trainer, resume_from_checkpoint=resume), weights_of(trainer.model)

    whole, weights = run(tmp_path / "whole")
    assert [len(epoch) for epoch in whole.epochs()] == [12, 9, 14]
    resumed, again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-7"))
    assert resumed.order() == whole.order()[len(list(chain(*(u.rows for u in whole.updates[:7])))) :]
    assert difference(weights, again) == 0


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero3"])
def test_processes_agree_and_resume(tmp_path, kind):
    if kind == "zero3" and not find_spec("deepspeed"):
        pytest.skip("needs deepspeed")
    processes = torch.cuda.device_count() if DEVICE == "cuda" else 2
    code, text = launch(kind, tmp_path, limit=500, processes=processes)
    assert code == 0, text[-8000:]
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(processes)]
    for case in found[0]:
        for key in ("orders", "ifd", "forwards", "global_step", "max_steps", "epoch", "weights", "leftovers"):
            assert all(other[case][key] == found[0][case][key] for other in found), (case, key)
        assert found[0][case]["leftovers"] == []
        assert found[0][case]["global_step"] == found[0][case]["max_steps"]
    for one in found:
        whole, resumed = one["base"], one["resumed"]
        assert list(chain(*resumed["batches"])) == list(chain(*whole["batches"]))[RESUME_FROM:]
        assert resumed["weights"] == whole["weights"]
