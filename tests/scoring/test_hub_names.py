"""Models by their hub names, from a cache as the hub's client keeps one; nothing is fetched."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from huggingface_hub import constants

from ifd_trainer import IFDScorer
from ifd_trainer.cli import main
from ifd_trainer.data.files import load_rows
from ifd_trainer.publish.provenance import provenance_path
from ifd_trainer.scoring.weights_digest import checkpoint_digest

OLD, NEW = "a" * 40, "b" * 40
ROWS = {"instruction": ["Name a thing.", "Name two things."], "output": ["The cat sat. ", "The cat sat. The cat."]}
CODE = {
    "configuration_own.py": """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
""",
    "modeling_own.py": """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
""",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch, model, tokenizer) -> Path:
    """A cache with two commits of `org/tiny`, whose weights differ, and `org/own`, the newer one with code."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def publish(name: str, commit: str) -> Path:
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        model.save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return snapshot

    publish("org/tiny", OLD)
    model.lm_head.weight.data.mul_(1.5)
    publish("org/tiny", NEW)
    snapshot = publish("org/own", NEW)
    for name, code in CODE.items():
        (snapshot / name).write_text(code)
    config = json.loads((snapshot / "config.json").read_text())
    own = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (snapshot / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    return tmp_path / "hub"


def run(tmp_path: Path, *options: str) -> int:
    """The exit code of scoring the rows into scored.jsonl."""
    (tmp_path / "rows.json").write_text(json.dumps(Dataset.from_dict(ROWS).to_list()))
    files = [str(tmp_path / "rows.json"), "--output", str(tmp_path / "scored.jsonl")]
    return main(["score", *files, "--device", "cpu", "--format", "alpaca", *options])


def score(tmp_path: Path, *options: str) -> tuple[dict, dict]:
    """The scores of the rows, and their provenance."""
    assert run(tmp_path, *options) == 0
    output = tmp_path / "scored.jsonl"
    return load_rows(str(output)).to_dict(), yaml.safe_load(provenance_path(output).read_text())


@pytest.mark.parametrize(("options", "commit"), [((), NEW), (("--revision", OLD), OLD), (("--revision", NEW), NEW)])
def test_a_hub_name_gives_the_scores_of_its_commit_and_says_which(hub, tmp_path, options, commit):
    found, provenance = score(tmp_path, "--model", "org/tiny", *options)
    folder = hub / "models--org--tiny" / "snapshots" / commit
    expected, _ = score(tmp_path, "--model", str(folder))
    assert found == expected
    assert provenance["weights"] == f"org/tiny@{commit}"
    assert checkpoint_digest(str(folder)) != checkpoint_digest(str(folder.parent / ({OLD, NEW} - {commit}).pop()))


def test_a_model_with_code_of_its_own_is_scored_where_that_is_allowed(hub, tmp_path, capsys):
    found, provenance = score(tmp_path, "--model", "org/own", "--trust-remote-code")
    assert found == score(tmp_path, "--model", "org/tiny")[0]
    assert provenance["weights"] == f"org/own@{NEW}"
    scorer = IFDScorer("org/own", format="alpaca", device="cpu", trust_remote_code=True)
    again = pickle.loads(pickle.dumps(scorer))  # what `map` does for its cache and for its workers
    assert Dataset.from_dict(ROWS).map(again, batched=True)["cas"] == found["cas"]


def test_code_from_another_repository_is_told_by_its_commit(hub):
    """The commit of the weights stays the same when that of their code moves on."""
    snapshot, code = (hub / f"models--org--{name}" for name in ("own", "code"))
    config = json.loads((snapshot / "snapshots" / NEW / "config.json").read_text())
    elsewhere = {name: f"org/code--{value}" for name, value in config["auto_map"].items()}
    (snapshot / "snapshots" / NEW / "config.json").write_text(json.dumps(config | {"auto_map": elsewhere}))
    (code / "refs").mkdir(parents=True)
    for commit in (OLD, NEW):
        (code / "snapshots" / commit).mkdir(parents=True)
        for name, text in CODE.items():
            (code / "snapshots" / commit / name).write_text(text)
        (code / "refs" / "main").write_text(commit)
        scorer = IFDScorer("org/own", format="alpaca", trust_remote_code=True)
        assert scorer.digest() == f"org/own@{NEW}+org/code@{commit}"
    assert IFDScorer("org/own", format="alpaca").digest() == f"org/own@{NEW}"  # code that is not run


def test_code_that_comes_with_a_model_is_not_run_without_being_asked_for(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "n")
    assert run(tmp_path, "--model", "org/own") == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert not (tmp_path / "modules").exists()


def test_a_revision_that_is_not_there_is_an_error_before_any_folder_is_made(hub, tmp_path, capsys):
    assert run(tmp_path, "--model", "org/tiny", "--revision", "v9") == 2
    assert "org/tiny at v9 cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "scored.jsonl.parts").exists()
