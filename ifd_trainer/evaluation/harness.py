"""Tasks of lm-evaluation-harness on a model in memory, document by document.

What a task asks, with how many examples before it, and what of an answer counts is the task's own affair, in the
release of lm_eval that is installed; `TaskScores.versions` says which. Here a model is handed over and given back as it
was, and the samples that lm_eval logs become values of single documents, which arms can be paired by.

`DEFAULT_TASKS` are tasks of the Open LLM Leaderboard, and one for code. Of what selection may cost, MMLU stands for
knowledge, GSM8K for maths, and `humaneval_bpb` for code. That one is defined here, since the usual tasks for code run
programs that a model has written: it asks how well a model predicts HumanEval's own solutions,

    bits per byte = -log2 P(solution | prompt) / bytes of the solution

(lower is better), which runs nothing, and may tell models apart that solve none of the problems. HumanEval and MBPP
themselves are run where `confirm_run_unsafe_code` says so.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.metadata
import logging
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from ..errors import HubError, NotFoundError, NotInstalledError, UserError, one_line, with_kind
from ..scoring.engine import model_device
from ..scoring.eval_guard import eval_mode
from ..scoring.generation import plain_generation
from ..scoring.model_parts import unwrapped
from .documents import joined, long_form
from .measures import CODE, DEFAULT_TASKS

logger = logging.getLogger(__name__)

STANDS_FOR = {"mmlu": "knowledge", "gsm8k": "maths", CODE: "code"}
# The measure that is usually reported of a task; of others the first of `_USUAL` that it has.
_MAIN = {"gsm8k": "exact_match (strict-match)", "truthfulqa_mc2": "acc", "mmlu": "acc"}
_USUAL = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "pass@1", "f1", "bits_per_byte")
Paths = str | Path | Sequence[str | Path] | None  # of folders
BATCH = 8  # prompts at a time; the same in all arms, since it changes how scores are rounded


@dataclass(frozen=True)
class PlannedTask:
    """A task that can be run.

    Attributes:
        name: as it was asked for.
        subtasks: of a group, those that it is made of; else itself.
        documents: how many are asked.
        measures: what `TaskScores.values` will have of it.
    """

    name: str
    subtasks: tuple[str, ...]
    documents: int
    measures: tuple[str, ...]


@dataclass(frozen=True)
class TaskScores:
    """What a model has reached.

    Attributes:
        values: the long form of `documents`: `set` is a task's name as it was asked for, `group` the subtask of a group
            of tasks, else None, and `document` the subtask and the number that lm_eval gives the document. Measures are
            those that a task reports the mean of; one that depends on how an answer is cut out of a text has that in
            parentheses.
        aggregates: what lm_eval reports, with the columns `set`, `task` (of a group itself, and of each subtask),
            `measure` and `value`. Some groups weigh all subtasks alike, however many documents they have.
        versions: of each subtask, and of lm_eval.
    """

    values: pd.DataFrame
    aggregates: pd.DataFrame
    versions: dict[str, str]


def check_tasks(
    tasks: Sequence[str] = DEFAULT_TASKS,
    include_path: Paths = None,
    limit: float | None = None,
    window: int | None = None,
    confirm_run_unsafe_code: bool = False,
) -> list[PlannedTask]:
    """Find tasks, load their data, and try out one document of each: what goes wrong is known before training.

    Args:
        tasks: names of tasks, groups or tags of lm_eval, or paths of YAML files that define one.
        include_path: folders with further YAML files of tasks, which come before lm_eval's own.
        limit: most documents of each subtask, or a share of them below 1.
        window: most tokens that the model reads and writes, if known.
        confirm_run_unsafe_code: whether tasks may run programs that a model wrote, on this machine, as they are.

    Raises:
        NotInstalledError: without lm_eval, or a package that a task needs.
        UserError: for a name that is not known, a task that two names stand for, one that runs programs without
            confirmation, one that asks for more tokens than the window has, and one that does not work.
        NotFoundError: for a folder or a file that is not there, and for words that IFEval needs.
        HubError: for data that cannot be loaded.

    >>> check_tasks(["arc_challenge"], limit=100)                                                   # doctest: +SKIP
    [PlannedTask(name='arc_challenge', subtasks=('arc_challenge',), documents=100, measures=('acc', 'acc_norm'))]
    """
    _check_limit(limit)
    with _global_states():
        manager = _manager(include_path)
        asked = _load(tasks, manager, confirm_run_unsafe_code)
        for each in asked:
            for task in each.subtasks:
                _check_length(each.name, task, window)
        return [
            PlannedTask(
                each.name,
                tuple(task.task_name for task in each.subtasks),
                sum(_documents(task, limit) for task in each.subtasks),
                _tried(each, manager),
            )
            for each in asked
        ]


def run_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = DEFAULT_TASKS,
    include_path: Paths = None,
    limit: float | None = None,
    batch_size: int | str = BATCH,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> TaskScores:
    """Ask a model the documents of tasks.

    It is asked in eval mode and without settings of its own for generating (a temperature, a repetition penalty), so
    that arms differ in weights alone; modes, settings and all global random states, which lm_eval sets, are afterwards
    as they were, and the tokenizer is not touched.

    Args:
        model: a causal language model of transformers, or one with adapters of peft.
        tokenizer: its own.
        tasks, include_path, limit, confirm_run_unsafe_code: see `check_tasks`.
        batch_size: prompts at a time, or "auto": as many as lm_eval finds to fit in memory.
        apply_chat_template: put prompts, and the examples before them, into the tokenizer's chat template.

    Raises:
        As `check_tasks`.

    >>> scores = run_tasks(model, tokenizer, ["arc_challenge", "gsm8k"], limit=100)                 # doctest: +SKIP
    >>> main_measures(scores.values).groupby("set").value.mean()                                    # doctest: +SKIP
    """
    _check_limit(limit)
    model = unwrapped(model)
    with _global_states(), eval_mode(model, model_device(model)), plain_generation(model):
        manager = _manager(include_path)
        asked = _load(tasks, manager, confirm_run_unsafe_code)
        results = _run(
            _harnessed(model, tokenizer, batch_size),
            tasks=[item for each in asked for item in each.items],
            task_manager=manager,
            limit=limit,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=confirm_run_unsafe_code,
        )
        return _scores(asked, results)


def main_measures(values: pd.DataFrame) -> pd.DataFrame:
    """The lines of each task's main measure, which is usually reported of it.

    >>> frame = joined([long_form("arc", name, ["0"], [1.0]) for name in ("acc", "acc_norm")])
    >>> main_measures(frame).measure.tolist()
    ['acc_norm']
    """
    main = {name: main_measure(name, of.unique()) for name, of in values.groupby("set", sort=False)["measure"]}
    return values[values["measure"] == values["set"].map(main)]


def main_measure(task: str, measures: Collection[str]) -> str:
    """Which of its measures is usually reported of a task.

    >>> main_measure("gsm8k", ["exact_match (flexible-extract)", "exact_match (strict-match)"])
    'exact_match (strict-match)'
    """
    if _MAIN.get(task) in measures:
        return _MAIN[task]
    plain = {measure.partition(" (")[0]: measure for measure in reversed(list(measures))}
    return next((plain[name] for name in _USUAL if name in plain), next(iter(measures)))


# ---- what is asked ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A name that was asked for: what lm_eval made of it, the groups in that, and the subtasks."""

    name: str
    items: list[Any]
    groups: list[str]
    subtasks: list[Any]


def _load(tasks: Sequence[str], manager: Any, confirmed: bool) -> list[_Asked]:
    """The tasks with their data, by the names that were asked for."""
    names = list(dict.fromkeys(tasks))
    if not names:
        raise UserError(f"No tasks to run. Name some, or leave them out for {', '.join(DEFAULT_TASKS)}.")
    for name in names:
        _check_known(name, manager)
        entry = manager.task_index.get(name)
        _check_safe(name, entry is not None and (entry.cfg or {}).get("unsafe_code"), confirmed)
    asked = [_loaded(name, manager) for name in names]
    owners: dict[str, str] = {}
    for each in asked:
        for task in each.subtasks:
            _check_safe(each.name, getattr(task, "UNSAFE_CODE", False), confirmed)
            if (other := owners.setdefault(task.task_name, each.name)) != each.name:
                raise UserError(f"tasks: {task.task_name} is in {other} and in {each.name}. Leave one of them out.")
    return asked


def _manager(include_path: Paths) -> Any:
    """What finds tasks by their names."""
    folders = [] if include_path is None else [include_path] if isinstance(include_path, (str, Path)) else include_path
    for folder in folders:
        if not Path(folder).is_dir():
            raise NotFoundError(f"include_path: there is no folder {folder}.")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise NotInstalledError(
            f"Tasks are run by lm_eval, which cannot be imported ({one_line(error)}): pip install "
            "'ifd_trainer[harness]'."
        ) from error
    return TaskManager(include_path=[str(folder) for folder in folders] or None)


def _check_known(name: str, manager: Any) -> None:
    if name == CODE or name in manager.task_index or Path(name).is_file():
        return
    near = difflib.get_close_matches(name, [CODE, *manager.all_tasks], n=3)
    meant = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
    raise UserError(f"tasks: lm_eval {importlib.metadata.version('lm_eval')} knows no task {name!r}. {meant}")


def _check_safe(name: str, unsafe: Any, confirmed: bool) -> None:
    if unsafe and not confirmed:
        raise UserError(
            f"tasks: {name} runs programs that a model has written, on this machine. Say confirm_run_unsafe_code where "
            f"that may be, or take {CODE}, which runs nothing."
        )


def _loaded(name: str, manager: Any) -> _Asked:
    try:
        found = manager.load([_CODE_TASK if name == CODE and name not in manager.task_index else name])
    except ImportError as error:
        raise _not_installed(name, error) from error
    except OSError as error:
        raise HubError(
            f"The data of the task {name} cannot be loaded ({with_kind(error)}). What was loaded once with a network "
            "is in HF_HOME, or in HF_DATASETS_CACHE, and is read from there without one; else leave the task out."
        ) from error
    except Exception as error:  # of the task's own code, or of a YAML file that says what lm_eval does not read
        raise UserError(f"The task {name} cannot be set up: {with_kind(error)}.") from error
    groups, subtasks = found.get("groups", {}), list(found["tasks"].values())
    inner = {child for group in groups.values() for child in group.child_names}
    outer = [group for group in groups if group not in inner]
    if name not in manager.task_index and name != CODE:  # a file
        name = outer[0] if outer else subtasks[0].task_name
    for task in subtasks:
        _check_words(name, task)
    return _Asked(name, [groups[group] for group in outer] or subtasks, list(groups), subtasks)


def _check_words(name: str, task: Any) -> None:
    """IFEval's own code asks for the words of nltk only when it counts sentences, which is after training."""
    if getattr(task, "DATASET_PATH", None) != "google/IFEval":
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise NotFoundError(
            f"The task {name} needs nltk's punkt_tab, and it could not be loaded. With a network, load it once with "
            "python -m nltk.downloader punkt_tab; else leave the task out."
        ) from error


def _check_limit(limit: float | None) -> None:
    whole = limit is None or limit < 1 or float(limit).is_integer()
    if limit is not None and not (limit > 0 and whole):
        raise UserError(f"limit is a whole number of documents, or a share of them below 1; got {limit!r}.")


def _check_length(name: str, task: Any, window: int | None) -> None:
    if window is None or task.OUTPUT_TYPE != "generate_until":
        return
    given = task.config.generation_kwargs or {}
    new = next((given[key] for key in _LENGTHS if given.get(key) is not None), _NEW)
    if new >= window:
        raise UserError(
            f"The task {name} wants answers of up to {new:,} tokens, and the model's window is {window:,} tokens: none "
            "are left for the question. Leave the task out."
        )


def _tried(asked: _Asked, manager: Any) -> tuple[str, ...]:
    """The measures of a task, of one document of each subtask and a model that answers at random."""
    from lm_eval.models.dummy import DummyLM

    try:
        # Whether a task may run programs is known by now; torch, with the states of all devices, is left alone.
        options = {"task_manager": manager, "limit": 1, "confirm_run_unsafe_code": True, "torch_random_seed": None}
        results = _run(DummyLM(), tasks=asked.items, **options)
    except ImportError as error:
        raise _not_installed(asked.name, error) from error
    except Exception as error:
        raise UserError(
            f"The task {asked.name} does not work: {with_kind(error)}. Mend it, or leave it out."
        ) from error
    return tuple(_scores([asked], results).values["measure"].unique())


def _not_installed(name: str, error: ImportError) -> NotInstalledError:
    return NotInstalledError(
        f"The task {name} needs a package that cannot be imported ({one_line(error)}). Install it, or leave the task "
        "out."
    )


def _documents(task: Any, limit: float | None) -> int:
    count = len(task.eval_docs)
    return count if limit is None else min(count, math.ceil(count * limit) if limit < 1 else int(limit))


_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names that lm_eval takes
_NEW = 256  # of tasks that do not say


# ---- how it is asked -----------------------------------------------------------------------------------------------


def _harnessed(model: nn.Module, tokenizer: Any, batch_size: int | str) -> Any:
    """A model as lm_eval takes it, with a copy of the tokenizer: one without a token for padding would be given one."""
    from lm_eval.models import huggingface

    log = logging.getLogger(huggingface.__name__)
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that a model in memory is what it is
    try:
        return huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
    finally:
        log.setLevel(level)


def _run(lm: Any, **options: Any) -> Mapping[str, Any]:
    from lm_eval import simple_evaluate

    return simple_evaluate(lm, log_samples=True, bootstrap_iters=0, **options)


# ---- what comes of it ---------------------------------------------------------------------------------------------


def _scores(asked: Sequence[_Asked], results: Mapping[str, Any]) -> TaskScores:
    values, reported = [], []
    for each in asked:
        for task in each.subtasks:
            values += _of_documents(each, task, results)
        for name in dict.fromkeys([*each.groups, *(task.task_name for task in each.subtasks)]):
            found = results["results"].get(name, {}).items()
            reported += [
                (each.name, name, _measure(key), float(value))
                for key, value in found
                if "," in key and "_stderr," not in key and _is_number(value)
            ]
    names = [task.task_name for each in asked for task in each.subtasks]
    versions = {name: str(results["versions"][name]) for name in names}
    aggregates = pd.DataFrame(reported, columns=["set", "task", "measure", "value"])
    return TaskScores(joined(values), aggregates, versions | {"lm_eval": importlib.metadata.version("lm_eval")})


def _of_documents(asked: _Asked, task: Any, results: Mapping[str, Any]) -> list[pd.DataFrame]:
    """The long form of each measure that is the mean of what a subtask's documents have."""
    from lm_eval.api.metrics import mean

    name, aggregation = task.task_name, task.aggregation()
    by_key: dict[str, dict[int, Any]] = {}
    for sample in results["samples"][name]:
        for metric in sample["metrics"]:
            by_key.setdefault(f"{metric},{sample['filter']}", {})[sample["doc_id"]] = sample[metric]
    frames = []
    for key, of in by_key.items():
        metric = key.rpartition(",")[0]
        if aggregation.get(metric, mean) is not mean or not all(map(_is_number, of.values())):
            continue  # of pairs or lists, from which the measure is computed as a whole
        said, own = float(results["results"][name][key]), float(np.mean(list(of.values())))
        if not math.isclose(said, own, rel_tol=1e-9, abs_tol=1e-12):
            logger.warning(
                "%s: lm_eval reports %s = %r, and its documents' mean is %r: left out.", name, key, said, own
            )
            continue
        higher = (results["higher_is_better"].get(name) or {}).get(metric)
        documents = [f"{name}/{number}" for number in of]
        groups = [name] * len(of) if len(asked.subtasks) > 1 else None
        higher = True if higher is None else bool(higher)
        frames.append(long_form(asked.name, _measure(key), documents, list(of.values()), higher, groups))
    return frames


def _measure(key: str) -> str:
    """A measure's name: what lm_eval calls it, with the filter that cuts the answer out of a text.

    >>> _measure("acc,none"), _measure("exact_match,strict-match")
    ('acc', 'exact_match (strict-match)')
    """
    metric, _, filter = key.rpartition(",")
    return metric if filter == "none" else f"{metric} ({filter})"


def _is_number(value: Any) -> bool:
    return isinstance(value, (Real, np.bool_))


@contextlib.contextmanager
def _global_states() -> Iterator[None]:
    """Give back the random states of Python and numpy."""
    state, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (lm_eval sets it)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(of_numpy)  # noqa: NPY002


# ---- code that is not run -----------------------------------------------------------------------------------------


def _question(doc: Mapping[str, str]) -> str:
    return doc["prompt"].rstrip()


def _solution(doc: Mapping[str, str]) -> str:
    """The solution behind the white space that ends the prompt, which lm_eval counts to it."""
    return (doc["prompt"] + doc["canonical_solution"])[len(_question(doc)) :]


def _bits_per_byte(doc: Mapping[str, str], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    ((log_likelihood, _),) = results
    return {"bits_per_byte": -log_likelihood / math.log(2) / len(_solution(doc).encode())}


_CODE_TASK = {
    "task": CODE,
    "dataset_path": "openai/openai_humaneval",
    "test_split": "test",
    "output_type": "loglikelihood",
    "doc_to_text": _question,
    "doc_to_target": _solution,
    "num_fewshot": 0,
    "process_results": _bits_per_byte,
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "mean", "higher_is_better": False}],
    "metadata": {"version": 1.0},
}
