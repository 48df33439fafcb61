"""What is found out about a model is found out once, and does not keep the model."""

from __future__ import annotations

import ast
import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import ROOT, build_model
from torch import nn

from ifd_trainer.data.encoding import Segment
from ifd_trainer.scoring import engine as engine_module
from ifd_trainer.scoring import model_notes
from ifd_trainer.scoring import token_budget as memory_module
from ifd_trainer.scoring.losses import answer_nll
from ifd_trainer.scoring.model_notes import is_noted, noted
from ifd_trainer.scoring.token_budget import Footprint, token_budget

CPU = torch.device("cpu")
SEGMENTS = [Segment([4, 5, 6, 7], 2), Segment([9, 8, 7], 1)]
TRIALS = ("_try_by_row", "find_logit_transform", "_streams_exactly")


@pytest.fixture
def trials(monkeypatch) -> list[str]:
    """Names of what the engine tried out on any model."""
    seen: list[str] = []

    def watched(name):
        function = getattr(engine_module, name)
        return lambda *args: seen.append(name) or function(*args)

    for name in TRIALS:
        monkeypatch.setattr(engine_module, name, watched(name))
    return seen


def test_each_trial_happens_once_for_a_model_and_setting(trials):
    model = build_model(400)
    first = [answer_nll(model, SEGMENTS) for _ in range(3)]
    assert sorted(trials) == sorted(TRIALS)
    assert np.array_equal(first[0], first[2])
    answer_nll(build_model(400), SEGMENTS)
    assert sorted(trials) == sorted(TRIALS * 2)
    model.bfloat16()
    for _ in range(2):
        answer_nll(model, SEGMENTS)
    # How it rounds is found out for all dtypes.
    assert sorted(trials[6:]) == ["_streams_exactly", "find_logit_transform"]


def test_a_scored_model_costs_no_further_forwards(trials):
    model, forwards = build_model(400), []
    answer_nll(model, SEGMENTS)
    model.register_forward_hook(lambda *_: forwards.append(1))
    answer_nll(model, SEGMENTS)
    assert len(forwards) == 1


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
    questions = {question for question, _ in model_notes._notes[model]}
    assert questions == {"rounds by row", "logits", "streams", "footprint", "most tokens"}
    gone, before = weakref.ref(model), len(model_notes._notes)
    del model
    gc.collect()
    assert gone() is None
    assert len(model_notes._notes) < before


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
