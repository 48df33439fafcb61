"""What is found out about a model is found out once, and does not keep the model."""

from __future__ import annotations

import ast
import gc
import weakref
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model
from torch import nn

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import token_budget as memory_module
from ifd_trainer.scoring.engine import Engine
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.model_notes import Question, is_noted, noted
from ifd_trainer.scoring.token_budget import Footprint, token_budget

CPU = torch.device("cpu")
SEGMENTS = [Segment([4, 5, 6, 7], 2), Segment([9, 8, 7], 1)]


def test_each_trial_happens_once_for_a_model_and_setting():
    model, other = build_model(400), build_model(400)
    forwards: list[nn.Module] = []
    for one in (model, other):
        one.register_forward_pre_hook(lambda module, args: forwards.append(module))

    def scored(one: nn.Module) -> tuple[int, np.ndarray]:
        """The number of forwards that scoring takes, all of them of this model; and the scores."""
        forwards.clear()
        nll = answer_nll(one, SEGMENTS)
        assert set(forwards) == {one}
        return len(forwards), nll

    first, nll = scored(model)
    assert first > 4  # how rows round takes two, the logits one, the two engines one or more each; and the batch
    for _ in range(2):
        count, again = scored(model)
        assert count == 1
        assert np.array_equal(again, nll)
    assert [scored(other)[0] for _ in range(2)] == [first, 1]
    model.bfloat16()
    assert [scored(model)[0] for _ in range(2)] == [first - 2, 1]  # how it rounds is found out for all dtypes


def test_the_footprint_is_measured_once_for_a_length(monkeypatch):
    measured = []
    monkeypatch.setattr(memory_module, "device_memory", lambda device: "memory")
    monkeypatch.setattr(memory_module, "planned_bytes", lambda memory, device: 2**30)
    monkeypatch.setattr(memory_module, "measure", lambda run, *_: run(1024, True) or Footprint(0, 2**18))
    model = nn.Linear(1, 1)

    def run(segments: list[Segment]) -> None:
        measured.append(len(segments[0].ids))

    budgets = [token_budget(model, [length] * 700, 9, CPU, run, "how") for length in (100, 120, 100, 300, 100)]
    assert measured == [100, 300]
    assert budgets == [4096] * 5
    # What is known already needs no more tokens than are worth a trial.
    assert token_budget(model, [100], 9, CPU, None, "how") == 4096
    assert token_budget(model, [100], 9, CPU, None, "other") == memory_module.ACCELERATOR_TOKENS
    assert measured == [100, 300]


def test_nothing_keeps_a_scored_model_alive(monkeypatch):
    monkeypatch.setattr(memory_module, "device_memory", lambda device: "memory")
    monkeypatch.setattr(memory_module, "planned_bytes", lambda memory, device: 2**30)
    monkeypatch.setattr(memory_module, "measure", lambda run, *_: run(512, True) or Footprint(0, 2**18))
    model = build_model(400)
    answer_nll(model, [Segment([4, *[5] * 99], 50 + n % 50) for n in range(700)])
    setting = Engine.for_model(model, CPU).setting
    asked = {"rounds by row": None, "logits": setting[1:], "streams": setting[1:]}
    asked |= {"footprint": (setting, (100).bit_length()), "most tokens": setting}
    assert asked.keys() == set(get_args(Question))
    assert all(is_noted(model, question, about) for question, about in asked.items())
    gone, answer = weakref.ref(model), weakref.ref(noted(model, "streams", "elsewhere", lambda: torch.empty(1)))
    assert answer() is not None
    del model
    gc.collect()
    assert gone() is answer() is None


def test_an_error_is_no_answer():
    model = nn.Linear(1, 1)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            noted(model, "streams", None, lambda: 1 / 0)
        assert not is_noted(model, "streams", None)
    assert noted(model, "streams", None, lambda: False) is False
    assert is_noted(model, "streams", None)
    assert not is_noted(nn.Linear(1, 1), "streams", None)


def test_no_other_module_of_the_room_keeps_notes_of_its_own():
    room = ROOT / "ifd_trainer" / "scoring"
    trees = {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in room.glob("*.py")}
    imports = {
        name
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import) and "weakref" in {alias.name for alias in node.names}
    }
    assert imports == {"model_notes.py"}
