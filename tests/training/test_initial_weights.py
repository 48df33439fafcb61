"""The original weights on disk: what is kept, what comes back, and what is refused."""

from __future__ import annotations

import shutil
from collections import namedtuple

import peft
import pytest
import torch
from conftest import build_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tiny_runs import difference, weights_of

import ifd_trainer.training.initial_weights as snapshot_module
from ifd_trainer.errors import FileAccessError
from ifd_trainer.training.initial_weights import Snapshot


def spoil(model: torch.nn.Module) -> None:
    """Change every trainable parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)


@pytest.mark.parametrize("part", [1, 3000, 2**30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_come_back_bit_for_bit(tmp_path, part, dtype):
    model = build_model(400).to(dtype)
    before = weights_of(model)
    snapshot = Snapshot(tmp_path / "ifd_original")
    assert not snapshot.complete
    snapshot.save(model, part_bytes=part)
    assert snapshot.complete
    places = [p.data_ptr() for p in model.parameters()]
    spoil(model)
    assert difference(weights_of(model), before) > 0
    snapshot.restore(model)
    assert difference(weights_of(model), before) == 0
    assert [p.data_ptr() for p in model.parameters()] == places  # in place: the optimizer holds them
    files = list((tmp_path / "ifd_original").glob("*.safetensors"))
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in files]
    assert all(len(together) == 1 or sum(together) <= part for together in sizes)
    assert sum(map(len, sizes)) == len(before)
    assert len(files) == {1: len(before), 2**30: 1}.get(part, len(files)) <= len(before)
    assert 1 < Snapshot.size(model) <= sum(path.stat().st_size for path in files)


def test_tied_weights_are_kept_once(tmp_path):
    model = build_model(400, tie_word_embeddings=True)
    before = weights_of(model)
    Snapshot(tmp_path / "s").save(model)
    spoil(model)
    Snapshot(tmp_path / "s").restore(model)
    assert difference(weights_of(model), before) == 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_of_a_model_with_adapters_the_adapters_are_kept(tmp_path):
    model = peft.get_peft_model(build_model(400), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = weights_of(model)
    Snapshot(tmp_path / "s").save(model)
    with safe_open(tmp_path / "s" / "part-000.safetensors", framework="pt") as part:
        assert all("lora" in name for name in part.keys())  # noqa: SIM118 (it is no dictionary)
    spoil(model)
    Snapshot(tmp_path / "s").restore(model)
    assert difference(weights_of(model), before) == 0


def test_a_later_snapshot_takes_the_place_of_an_older_one(tmp_path):
    snapshot, model = Snapshot(tmp_path / "s"), build_model(400)
    snapshot.save(model)
    spoil(model)
    later = weights_of(model)
    snapshot.save(model)
    spoil(model)
    snapshot.restore(model)
    assert difference(weights_of(model), later) == 0
    snapshot.remove()
    assert not (tmp_path / "s").exists()


def test_what_cannot_be_restored_is_said(tmp_path):
    snapshot, model = Snapshot(tmp_path / "s"), build_model(400)
    with pytest.raises(ValueError, match=r"not in .*s: the snapshot was deleted or cut off.*Start the run anew"):
        snapshot.restore(model)
    snapshot.save(model)
    with pytest.raises(ValueError, match=r"is of another model: 9 of its parameters are not trained here, 0 trained"):
        snapshot.restore(build_model(400, num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"embed_tokens.weight has shape \(400, 32\) in .*, \(500, 32\) in the model"):
        snapshot.restore(build_model(500))
    (tmp_path / "s" / "index.json").unlink()
    with pytest.raises(ValueError, match="deleted or cut off"):
        snapshot.restore(model)


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 9, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"original weights take 0.00 GB in .*, but only 0.00 GB are free. Make room"):
        Snapshot(tmp_path / "s").save(build_model(400))
    assert not list((tmp_path / "s").iterdir())


def test_a_disk_that_is_full_by_the_time_of_writing_is_an_error_of_one_line(tmp_path, monkeypatch):
    def full(tensors, path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(snapshot_module, "save_file", full)
    with pytest.raises(FileAccessError, match=r"original weights cannot be written to .*s: .*No space left on device"):
        Snapshot(tmp_path / "s").save(build_model(400))
    assert not Snapshot(tmp_path / "s").complete
