"""Tasks of lm_eval on a model in memory, against accuracies computed without it. Run where lm_eval is installed."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROUNDING, build_model, build_tokenizer, reference_nll
from datasets import Dataset, DatasetDict
from tiny_runs import random_states
from transformers import GenerationConfig

from ifd_trainer.errors import HubError, NotFoundError, NotInstalledError, UserError
from ifd_trainer.evaluation import harness
from ifd_trainer.evaluation.documents import joined, long_form
from ifd_trainer.evaluation.harness import CODE, DEFAULT_TASKS, check_tasks, main_measure, main_measures, run_tasks

CHOICES = [
    {"question": "Name a colour.", "choices": ["red", "the ball", "42"], "answer": 0},
    {"question": "Add 12 and 30.", "choices": ["the cat", "42", "a blue dog in the park"], "answer": 1},
    {"question": "Who sat?", "choices": ["the cat", "green", "maybe", "the mat"], "answer": 0},
    {"question": "Who ran?", "choices": ["a ball", "the dog ran in the park", "yes"], "answer": 1},
    {"question": "What is it?", "choices": ["number", "colour"], "answer": 1},
]
QUESTIONS = ["Add the numbers.", "Name three colours.", "The cat sat on", "She said:"]
SOLUTIONS = [
    {"prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n"},
    {"prompt": "def name():\n", "canonical_solution": "    return 'été'\n"},
]
NEW = 8


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(bos=False)


@pytest.fixture(scope="module")
def trained(tokenizer):
    return build_model(len(tokenizer), seed=3)


def greedy(model, tokenizer, text: str) -> str:
    """What a model says to a text, one token at a time, up to a line break."""
    ids, said = tokenizer(text).input_ids, []
    while len(said) < NEW:
        with torch.no_grad():
            token = int(model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        said.append(token)
    return tokenizer.decode(said, skip_special_tokens=True).split("\n")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer, trained) -> Path:
    """Tasks over local files: two of choices, which make a group, and one of texts, of which half are answered."""
    folder = tmp_path_factory.mktemp("tasks")
    said = [greedy(trained, tokenizer, f"Q: {question}\nA:") for question in QUESTIONS]
    texts = [
        {"question": question, "answer": text if i % 2 else f"{text}!"}
        for i, (question, text) in enumerate(zip(QUESTIONS, said, strict=True))
    ]
    for name, rows in (("choices", CHOICES), ("others", CHOICES[:2]), ("texts", texts)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    choices = {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    texts = {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "letter",
                "filter": [{"function": "regex", "regex_pattern": "([a-z])"}, {"function": "take_first"}],
            },
        ],
    }
    for name, task in (("choices", choices), ("others", choices), ("texts", texts)):
        data = {"data_files": {"test": str(folder / f"{name}.jsonl")}}
        task |= {"task": f"tiny_{name}", "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
        write(folder, f"{name}.yaml", task)
    metrics = [{"metric": "acc", "weight_by_size": False}]
    group = {"group": "tiny_group", "task": ["tiny_choices", "tiny_others"], "aggregate_metric_list": metrics}
    write(folder, "group.yaml", group)
    unsafe = texts | {"task": "tiny_program", "unsafe_code": True}
    write(folder, "unsafe.yaml", unsafe)
    write(folder, "away.yaml", choices | {"task": "tiny_away", "dataset_path": "nobody/nothing", "dataset_kwargs": {}})
    results = "!function broken.results"
    broken = yaml.safe_dump(texts | {"task": "tiny_broken", "process_results": results}).replace(
        f"'{results}'", results
    )
    (folder / "broken.yaml").write_text(broken, encoding="utf-8")
    (folder / "broken.py").write_text("def results(doc, said):\n    return {'exact_match': doc['points']}\n")
    words = {"dataset_path": "google/IFEval", "dataset_kwargs": {}}
    write(folder, "words.yaml", texts | {"task": "tiny_words"} | words)
    write(folder, "wrong.yaml", choices | {"task": "tiny_wrong", "output_type": "guessing"})
    return folder


def write(folder: Path, name: str, config: dict) -> None:
    (folder / name).write_text(yaml.safe_dump(config), encoding="utf-8")


def chosen(model, tokenizer, row: dict, by_length: bool = False) -> int:
    """The choice that a model finds most likely, of all of it or per character; one forward for each."""
    scores = []
    for choice in row["choices"]:
        before = tokenizer(f"Q: {row['question']}\nA:").input_ids
        ids = tokenizer(f"Q: {row['question']}\nA: {choice}").input_ids
        likelihood = -reference_nll(model, ids, len(before)) * (len(ids) - len(before))
        scores.append(likelihood / len(choice) if by_length else likelihood)
    return int(np.argmax(scores))


def right(model, tokenizer, rows: list[dict], by_length: bool = False) -> list[float]:
    return [float(chosen(model, tokenizer, row, by_length) == row["answer"]) for row in rows]


# ---- without lm_eval ----------------------------------------------------------------------------------------------


def test_without_lm_eval_an_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(NotInstalledError, match=r"pip install 'ifd_trainer\[harness\]'"):
        check_tasks(["arc_challenge"])


@pytest.mark.parametrize(
    ("task", "measures", "main"),
    [
        ("hellaswag", ["acc", "acc_norm"], "acc_norm"),
        ("mmlu", ["acc"], "acc"),
        ("gsm8k", ["exact_match (flexible-extract)", "exact_match (strict-match)"], "exact_match (strict-match)"),
        ("ifeval", ["prompt_level_strict_acc", "prompt_level_loose_acc"], "prompt_level_strict_acc"),
        ("mine", ["exact_match (a)", "exact_match (b)"], "exact_match (a)"),
        ("mine", ["smoothness", "roughness"], "smoothness"),
        (CODE, ["bits_per_byte"], "bits_per_byte"),
    ],
)
def test_one_measure_of_a_task_is_the_main_one(task, measures, main):
    assert main_measure(task, measures) == main
    frame = joined([long_form(task, measure, ["0", "1"], [0, 1]) for measure in measures])
    assert main_measures(frame).measure.tolist() == [main] * 2


def test_by_default_knowledge_maths_and_code_are_asked():
    assert set(harness.STANDS_FOR) <= set(DEFAULT_TASKS)
    assert set(harness.STANDS_FOR.values()) == {"knowledge", "maths", "code"}


@pytest.mark.parametrize("limit", [0, -1, 2.5])
def test_a_limit_is_a_count_or_a_share(limit):
    with pytest.raises(UserError, match="limit is a whole number of documents, or a share of them below 1"):
        check_tasks(["arc_challenge"], limit=limit)


def test_a_folder_of_tasks_has_to_be_there(tmp_path):
    with pytest.raises(NotFoundError, match="there is no folder"):
        check_tasks(["arc_challenge"], include_path=tmp_path / "nothing")


# ---- with it ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_eval():
    """The package, with one index of its 14,000 files for all tests."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    make, made = tasks.TaskManager, {}

    def manager(include_path):
        key = str(include_path)
        made[key] = made.get(key) or make(include_path=include_path)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "TaskManager", manager)
        yield lm_eval


@pytest.fixture(scope="module")
def scores(lm_eval, folder, tokenizer, trained):
    return run_tasks(trained, tokenizer, ["tiny_group", "tiny_texts"], folder, batch_size=2)


def of(scores, set: str, measure: str):
    return scores.values[(scores.values.set == set) & (scores.values.measure == measure)]


@pytest.mark.parametrize(("measure", "by_length"), [("acc", False), ("acc_norm", True)])
def test_choices_are_right_where_the_likeliest_is(scores, tokenizer, trained, measure, by_length):
    found = of(scores, "tiny_group", measure)
    expected = right(trained, tokenizer, CHOICES, by_length) + right(trained, tokenizer, CHOICES[:2], by_length)
    assert found.value.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    assert found.document.tolist() == [f"tiny_choices/{i}" for i in range(5)] + [f"tiny_others/{i}" for i in range(2)]
    assert found.group.tolist() == ["tiny_choices"] * 5 + ["tiny_others"] * 2
    assert found.higher.all()


def test_texts_are_right_where_they_are_said(scores):
    found = of(scores, "tiny_texts", "exact_match (whole)")
    assert found.value.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert found.document.tolist() == [f"tiny_texts/{i}" for i in range(4)]
    assert found.group.isna().all()
    assert len(of(scores, "tiny_texts", "exact_match (letter)")) == 4


def test_what_lm_eval_reports_is_the_mean_of_its_documents(scores):
    reported = scores.aggregates.set_index(["task", "measure"]).value
    for (group, measure), frame in scores.values[scores.values.set == "tiny_group"].groupby(["group", "measure"]):
        assert reported[group, measure] == pytest.approx(frame.value.mean(), abs=1e-12)
    assert reported["tiny_texts", "exact_match (whole)"] == 0.5
    # The group weighs its two tasks alike, whatever their sizes.
    assert reported["tiny_group", "acc"] == pytest.approx(
        (reported["tiny_choices", "acc"] + reported["tiny_others", "acc"]) / 2
    )
    assert set(scores.aggregates.set) == {"tiny_group", "tiny_texts"}


def test_releases_are_kept(scores, lm_eval):
    assert set(scores.versions) == {"tiny_choices", "tiny_others", "tiny_texts", "lm_eval"}
    assert scores.versions["lm_eval"] == lm_eval.__version__


def test_the_model_is_given_back_as_it_was(lm_eval, folder, scores):
    tokenizer = build_tokenizer(bos=False)
    tokenizer.pad_token = None
    model = build_model(len(tokenizer), seed=3, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.config.use_cache = False
    own = model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, repetition_penalty=9.0, eos_token_id=2, pad_token_id=0
    )
    modes = [module.training for module in model.modules()]
    states = random_states()
    weights = copy.deepcopy(model.state_dict())
    found = run_tasks(model, tokenizer, ["tiny_choices", "tiny_texts"], folder, batch_size=3)
    assert of(found, "tiny_texts", "exact_match (whole)").value.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert of(found, "tiny_choices", "acc").value.tolist() == of(scores, "tiny_group", "acc").value.tolist()[:5]
    assert of(found, "tiny_choices", "acc").group.isna().all()
    assert [module.training for module in model.modules()] == modes
    assert random_states() == states
    assert (model.config.use_cache, model.generation_config, tokenizer.pad_token) == (False, own, None)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_limit_takes_the_first_documents(lm_eval, folder, tokenizer, trained, scores):
    found = run_tasks(trained, tokenizer, ["tiny_choices"], folder, limit=3)
    assert of(found, "tiny_choices", "acc").value.tolist() == of(scores, "tiny_group", "acc").value.tolist()[:3]


def test_an_adapter_is_asked_with_its_weights(lm_eval, folder, tokenizer, scores):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=8, lora_alpha=64, init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = peft.get_peft_model(build_model(len(tokenizer), seed=3), config).eval()
    found = run_tasks(model, tokenizer, ["tiny_choices", "tiny_texts"], folder)
    assert of(found, "tiny_choices", "acc").value.tolist() == right(model, tokenizer, CHOICES)
    assert not of(found, "tiny_texts", "exact_match (whole)").value.any()


def test_a_plan_draws_no_random_numbers(lm_eval, folder):
    before = random_states()
    check_tasks(["tiny_choices"], folder)
    assert random_states() == before


@pytest.mark.parametrize(("limit", "documents"), [(None, [7, 4]), (3, [5, 3]), (0.5, [4, 2])])
def test_a_plan_says_how_many_documents_are_asked(lm_eval, folder, limit, documents):
    planned = check_tasks(["tiny_group", "tiny_texts"], folder, limit)
    assert [task.documents for task in planned] == documents
    assert [task.subtasks for task in planned] == [("tiny_choices", "tiny_others"), ("tiny_texts",)]
    assert [task.measures for task in planned] == [
        ("acc", "acc_norm"),
        ("exact_match (whole)", "exact_match (letter)"),
    ]


def test_a_file_is_a_task_too(lm_eval, folder, tokenizer, trained):
    assert [task.name for task in check_tasks([str(folder / "choices.yaml")], folder)] == ["tiny_choices"]


@pytest.mark.parametrize(
    ("tasks", "options", "error", "message"),
    [
        ([], {}, UserError, "No tasks to run"),
        (["tiny_choises"], {}, UserError, "knows no task 'tiny_choises'. Did you mean tiny_choices"),
        (["arc_chalenge"], {}, UserError, "Did you mean arc_challenge"),
        (["tiny_group", "tiny_others"], {}, UserError, "tiny_others is in tiny_group and in tiny_others"),
        (["tiny_program"], {}, UserError, "tiny_program runs programs that a model has written"),
        (["tiny_away"], {}, HubError, "The data of the task tiny_away cannot be loaded"),
        (["tiny_broken"], {}, UserError, "The task tiny_broken does not work: KeyError: 'points'"),
        (["tiny_wrong"], {}, UserError, "The task tiny_wrong cannot be set up: .*guessing"),
        (
            ["tiny_texts"],
            {"window": NEW},
            UserError,
            "tiny_texts wants answers of up to 8 tokens, and the model's window",
        ),
    ],
)
def test_what_cannot_be_run_is_known_beforehand(lm_eval, folder, tasks, options, error, message):
    with pytest.raises(error, match=message):
        check_tasks(tasks, folder, **options)


def test_the_words_of_ifeval_have_to_be_there(lm_eval, folder, monkeypatch):
    import datasets
    import nltk

    def nowhere(name):
        raise LookupError(name)

    monkeypatch.setattr(datasets, "load_dataset", lambda **options: DatasetDict({"test": Dataset.from_list(CHOICES)}))
    monkeypatch.setattr(nltk.data, "find", nowhere)
    with pytest.raises(NotFoundError, match=r"tiny_words needs nltk's punkt_tab.*python -m nltk\.downloader punkt_tab"):
        check_tasks(["tiny_words"], folder)


def test_programs_are_run_where_that_is_confirmed(lm_eval, folder):
    planned = check_tasks(["tiny_program", "tiny_choices"], folder, confirm_run_unsafe_code=True)
    assert [task.documents for task in planned] == [4, 5]


def test_code_is_measured_by_how_well_it_is_predicted(lm_eval, folder, monkeypatch, tokenizer, trained):
    import datasets

    asked = []

    def load(path, name=None, **options):
        asked.append(path)
        return DatasetDict({"test": Dataset.from_list(SOLUTIONS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = run_tasks(trained, tokenizer, [CODE], folder)
    expected = []
    for row in SOLUTIONS:  # the line break at the prompt's end is the solution's: tokens may hold it and what follows
        before = tokenizer(row["prompt"].rstrip()).input_ids
        ids = tokenizer(row["prompt"] + row["canonical_solution"]).input_ids
        nats = reference_nll(trained, ids, len(before)) * (len(ids) - len(before))
        expected.append(nats / np.log(2) / len(("\n" + row["canonical_solution"]).encode()))
    assert set(asked) == {"openai/openai_humaneval"}
    assert found.values.value.tolist() == pytest.approx(expected, rel=ROUNDING)
    assert (found.values.measure.unique().tolist(), found.values.higher.any()) == (["bits_per_byte"], False)
    assert found.aggregates.value.tolist() == pytest.approx([np.mean(expected)], rel=ROUNDING)
