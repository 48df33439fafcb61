"""Comparisons on a tiny model: what arms train on, what is measured of them, and what happens when they are killed."""

from __future__ import annotations

import json
import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROUNDING, reference_nll
from datasets import Dataset
from tiny_runs import RECIPES, TOKENIZER, build_model, raw_rows
from transformers import AutoModelForCausalLM

from ifd_trainer.cli import main
from ifd_trainer.compare.arm_run import main as arm_run
from ifd_trainer.compare.arms import read_arms
from ifd_trainer.compare.comparison import Comparison, Task, in_a_process
from ifd_trainer.compare.plan import PlannedArm, idle_lines, operations_per_second
from ifd_trainer.compare.results import read_results
from ifd_trainer.data.formats import ALPACA
from ifd_trainer.errors import UserError
from ifd_trainer.evaluation.held_out_losses import HeldOutRows
from ifd_trainer.recipe.parsing import parse_recipe
from ifd_trainer.recipe.plan import only_the_plan
from ifd_trainer.recipe.run import build_run
from ifd_trainer.training.history import History

pytestmark = RECIPES
ARMS = "arms:\n  longest:\n  static:\n  full:\n  mine: {policy: lowest, score: ifd_ppl}\n"


@pytest.fixture(autouse=True)
def a_machine_of_known_speed(monkeypatch):
    """It is measured for half a second before each comparison."""
    monkeypatch.setattr("ifd_trainer.compare.plan.operations_per_second", lambda: 5e10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, rows, held-out rows and a recipe."""
    place = tmp_path_factory.mktemp("comparison")
    build_model(len(TOKENIZER)).save_pretrained(place / "model")
    TOKENIZER.save_pretrained(place / "model")
    for name, rows in (("rows", raw_rows(20)), ("held_out", raw_rows(6, seed=9))):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(text)
    (place / "recipe.yaml").write_text(
        "# a comparison\ndataset_name: rows.jsonl\neval_dataset: held_out.jsonl\nformat: alpaca\nkeep: 6\n"
        "max_ifd: .inf\nnum_train_epochs: 2\nper_device_train_batch_size: 2\nlearning_rate: 0.01\nmax_length: 256\n"
        "use_cpu: true\ngradient_checkpointing: false\nbf16: false\ndisable_tqdm: true\n"
        f"output_dir: {place / 'out'}\nseeds: 2\n{ARMS}"
    )
    return place


def command(folder: Path, *words: str) -> list[str]:
    return ["compare", str(folder / "recipe.yaml"), "--model", str(folder / "model"), *words]


@pytest.fixture(scope="module")
def compared(folder) -> Comparison:
    """All arms and seeds, trained one after the other in this process."""
    comparison = prepared(folder, "out")
    comparison.run(say=lambda text: None, launch=lambda place, device: arm_run(place))
    return comparison


def prepared(folder: Path, name: str, *words: str) -> Comparison:
    """A comparison of which nothing has run: what the command makes of a recipe."""
    made = []

    class Noted(Exception):
        pass

    def run(self, *args, **kwargs):
        made.append(self)
        raise Noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", run)
        assert main(command(folder, "--output_dir", str(folder / name), *words)) == 1  # by Noted
    return made[0]


def task_of(comparison: Comparison, arm: str, seed: int) -> Task:
    return next(task for task in comparison.tasks() if (task.arm.name, task.seed) == (arm, seed))


def test_arms_train_on_what_they_say(compared):
    answers = {row["row_id"]: len(TOKENIZER(row["output"]).input_ids) for row in raw_rows(20)}
    for seed in (0, 1):
        chosen = {
            arm: [
                set(History.load(task_of(compared, arm, seed).folder).rows(e).query("times > 0")["row_id"])
                for e in (0, 1)
            ]
            for arm in ("random", "longest", "static", "mine")
        }
        assert all(len(rows) == 6 for epochs in chosen.values() for rows in epochs)
        assert chosen["random"][0] != chosen["random"][1]
        assert chosen["static"][0] == chosen["static"][1]
        shortest = min(answers[row] for row in chosen["longest"][0])
        assert sum(count > shortest for count in answers.values()) < 6
        assert not chosen["static"][0] & chosen["mine"][0]
    assert task_of(compared, "random", 0).result()["rows"] == 20
    assert not (task_of(compared, "full", 0).folder / "ifd_history").exists()


def test_an_arm_keeps_the_rows_most_like_a_target_set(folder, caplog):
    (folder / "task.jsonl").write_text(json.dumps(raw_rows(20)[7] | {"output": ""}) + "\n")
    words = ["--arms", "target", "--target_set", "task.jsonl"]  # beside the recipe
    comparison = prepared(folder, "targets", *words)
    assert "no effect without" not in caplog.text
    keys = {arm.name: arm.keys for arm in comparison.arms}
    assert [keys[name]["target_set"] for name in ("random", "target")] == ["", "task.jsonl"]
    comparison.run(say=lambda text: None, launch=lambda place, device: arm_run(place))
    history = History.load(task_of(comparison, "target", 0).folder)
    assert history.settings["max_ifd"] is None
    assert [record["reasons"] for record in history.epochs] == [{"kept": 6, "less_like_targets": 14}] * 2
    assert history.rows(0).query("times > 0")["target_similarity"].min() > 0


def test_held_out_rows_are_scored_where_epochs_end_and_of_all_rows_at_the_same_steps(compared):
    assert compared.steps == [3, 6]
    for task in compared.tasks():
        first = [0] if task == compared.tasks()[0] else []
        steps = [3, 6, 10, 20] if task.arm.name == "full" else [3, 6]
        points = task.points()
        assert [point.step for point in points] == first + steps
        assert points == sorted(points, key=lambda point: (point.tokens, point.seconds))
        assert not list(task.folder.glob("checkpoint-*"))


def test_losses_are_those_of_the_trained_model(folder, compared, tmp_path):
    """The same run by `ifd-trainer train`, whose model is scored one token at a time."""
    task = task_of(compared, "longest", 1)
    words = json.loads((task.folder / "run.json").read_text())["words"]
    words = ["train", str(folder / "recipe.yaml"), *words, "--output_dir", str(tmp_path), "--save_strategy", "no"]
    assert main(words) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    found = task.held_out(task.points()[-1])
    for row, cas in zip(raw_rows(6, seed=9), found["cas"], strict=True):
        prompt = ALPACA.render(row, None).prompt
        ids = TOKENIZER(prompt + row["output"]).input_ids
        start = len(TOKENIZER(prompt).input_ids)
        assert cas == pytest.approx(reference_nll(model, ids, start), rel=ROUNDING)


def test_results_are_means_over_tokens_and_seeds(compared):
    results = read_results(compared)
    frames = {arm: [task_of(compared, arm, s) for s in (0, 1)] for arm in ("random", "longest", "full")}

    def loss(task: Task, step: int) -> float:
        point = next(point for point in task.points() if point.step == step)
        frame = task.held_out(point)
        return float(np.average(frame["cas"], weights=frame["answer_tokens"]))

    by_arm = {outcome.arm: outcome for outcome in results.of("steps")}
    for arm, tasks in frames.items():
        assert by_arm[arm].by_seed == pytest.approx([loss(task, 6) for task in tasks])
        assert by_arm[arm].loss == pytest.approx(np.mean(by_arm[arm].by_seed))
    assert by_arm["random"].against is None
    assert by_arm["longest"].against.mean == pytest.approx(by_arm["longest"].loss - by_arm["random"].loss)
    assert results.before == pytest.approx(loss(task_of(compared, "random", 0), 0))
    tokens = min(task.points()[-1].tokens for task in compared.tasks())
    assert {outcome.at for outcome in results.of("tokens")} == {tokens}
    costs = {cost.arm: cost for cost in results.costs}
    beforehand = [task.result()["seconds_scoring_beforehand"] for task in compared.tasks()]
    for arm in ("random", "longest"):
        assert costs[arm].beforehand == 0
        assert History.load(task_of(compared, arm, 0).folder).rows(0)["ifd"].isna().all()
    assert max(beforehand) == costs["static"].beforehand > 0
    history = History.load(task_of(compared, "mine", 0).folder)
    assert history.rows(0)["ifd"].tolist() != history.rows(1)["ifd"].tolist()
    assert costs["full"].steps == 20


def test_losses_between_two_points_are_in_proportion(compared):
    results = read_results(compared)
    outcome = next(o for o in results.of("tokens") if o.arm == "longest")
    task = task_of(compared, "longest", 0)
    before, first, last = task_of(compared, "random", 0).points()[0], *task.points()
    left, right = (first, last) if outcome.at > first.tokens else (before, first)
    losses = []
    for point, owner in ((left, task if left is first else task_of(compared, "random", 0)), (right, task)):
        frame = owner.held_out(point)
        losses.append(float(np.average(frame["cas"], weights=frame["answer_tokens"])))
    share = (outcome.at - left.tokens) / (right.tokens - left.tokens)
    assert outcome.by_seed[0] == pytest.approx(losses[0] + share * (losses[1] - losses[0]))


def test_what_has_ended_is_not_done_again(folder, compared, capsys):
    compared.run(launch=lambda place, device: pytest.fail("trained again"))
    assert main(command(folder)) == 0
    out = capsys.readouterr().out
    assert "begins" not in out
    assert "Held-out loss with as many optimizer steps (6)" in out
    assert json.loads((folder / "out" / "results.json").read_text())["seeds"] == [0, 1]
    page = folder / "out" / "compare.html"
    assert f"Page: {page}" in out
    written = page.read_text()
    assert "Rows in common" in written
    assert main(["report", str(folder / "out")]) == 0
    assert page.read_text() == written


def test_no_long_run_is_left_to_run_alone(folder):
    """Two at a time, seed by seed, but of the last two seeds the longest first."""
    comparison, cost = prepared(folder, "ordered", "--arms", "static", "longest"), {"static": 5.0, "longest": 2.0}
    comparison.seeds = [0, 1, 2]

    def order(workers, **options):
        begun = []

        def say(text):
            if ": begins" in text:
                begun.append(text.partition(":")[0])

        comparison.run(workers, say=say, launch=lambda place, device: None, **options)
        return begun

    arms = ("random", "static", "longest")
    by_seed = [f"{arm}, seed {seed}" for seed in range(3) for arm in arms]
    assert order(1, cost=cost) == order(2) == by_seed
    longest = [f"{arm}, seed {seed}" for arm in ("static", "longest", "random") for seed in (1, 2)]
    assert order(2, cost=cost) == by_seed[:3] + longest


def test_a_comparison_that_stopped_goes_on_where_it_was(folder, compared):
    """One run fails in its second epoch: those before it have ended, and it goes on from its checkpoint."""
    comparison = prepared(folder, "stopped")
    trained = []

    def launch(place, device):
        trained.append(place.parent.name)
        arm_run(place)

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3 and "longest" in str(self.folder):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOutRows, "on_epoch_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            comparison.run(say=lambda text: None, launch=launch)
    assert trained == ["random", "longest"]
    half = task_of(comparison, "longest", 0)
    assert [point.step for point in half.points()] == [3]
    seconds = half.points()[0].seconds

    comparison.seeds = [0]
    comparison.run(say=lambda text: None, launch=launch)
    assert trained == ["random", "longest", "longest", "static", "full", "mine"]
    whole = task_of(compared, "longest", 0)
    assert [point.step for point in half.points()] == [3, 6]
    assert half.points()[1].seconds > seconds == half.points()[0].seconds
    pd.testing.assert_frame_equal(half.held_out(half.points()[1]), whole.held_out(whole.points()[-1]), rtol=ROUNDING)
    with pytest.raises(UserError, match="1 of 1 seeds have ended with all arms, and a difference wants at least 2"):
        read_results(comparison)


def test_a_folder_with_another_comparison_is_refused(folder, compared, capsys):
    assert main(command(folder, "--learning_rate", "0.02")) == 2
    assert f"{folder / 'out'} holds another comparison: learning_rate is not the same" in capsys.readouterr().err


def test_the_plan_says_what_will_be_done(folder, capsys, monkeypatch):
    show_bars(monkeypatch)
    words = ["--max_length", "250", "--seeds", "7", "9"]  # no test has prepared rows of this length before
    assert main(command(folder, "--output_dir", str(folder / "planned"), "--plan", *words)) == 0
    said = capsys.readouterr()
    assert "examples" not in said.err
    lines = said.out.splitlines()
    named = [line for line in lines if "updates, about" in line]
    assert [line.split()[0] for line in named] == ["random", "longest", "static", "full", "mine"]
    assert [" 6 updates" in line for line in named] == [True, True, True, False, True]
    assert "5 arms with 2 seeds each (7, 9): about" in lines[-1]
    assert "at the 50 GFLOP/s" in lines[-1]
    assert not (folder / "planned").exists()


def test_arms_that_score_once_go_without_how_losses_change_and_the_plan_says_so(folder, capsys):
    arms = ["--arms", "static,superfiltering,dynamic", "--superfilter", str(folder / "model"), "--plan"]
    assert main(command(folder, *arms, "--scores", "ira", "loss_change")) == 0
    out = capsys.readouterr().out
    assert "scores: loss_change is how the losses of the model in training change; rows are scored once" in out
    assert "in the arms static, superfiltering, which go without." in out
    assert main(command(folder, *arms, "--scores", "ira")) == 0
    assert "loss_change" not in capsys.readouterr().out
    given = {"static": None, "dynamic": None, "mine": {"scorer": "gpt2", "scores": ["rifd"]}}
    found = {arm.name: arm.keys.get("scores") for arm in read_arms(given, "m", scores="loss_change")}
    assert found == {"random": None, "static": ["ifd"], "dynamic": None, "mine": ["rifd"]}
    found = {arm.name: arm.keys.get("scores") for arm in read_arms(given, "m", scores=["rifd", "loss_change"])}
    assert found["static"] == ["rifd", "rcas", "rdas"]


def test_arms_whose_scores_stay_within_an_epoch_are_not_divided():
    given = {"static": None, "cherry": None, "dynamic": None, "mine": {"scorer": "gpt2"}, "halves": {"every_steps": 4}}
    found = {arm.name: arm.keys.get("every_steps") for arm in read_arms(given, "m", every_steps=8)}
    assert found == {"random": None, "static": 0, "cherry": 0, "dynamic": None, "mine": 0, "halves": 4}
    assert all("every_steps" not in arm.keys for arm in read_arms(["static", "cherry"], "m"))


def show_bars(monkeypatch) -> None:
    """Let `datasets` show its bars, which tests go without."""
    bars = sys.modules["datasets.utils.tqdm"]
    monkeypatch.setattr(bars, "HF_DATASETS_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(bars, "_hf_datasets_progress_bars_disabled", False)


def test_a_plan_goes_without_bars_and_names_to_come_and_with_other_warnings(monkeypatch, capsys):
    show_bars(monkeypatch)

    def said(rows: int) -> tuple[bool, list[str]]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with only_the_plan() if rows == 2 else nullcontext():
                Dataset.from_dict({"n": range(rows)}).map(lambda row: row, desc="Reading")
                for kind, module in (
                    (FutureWarning, "transformers.a"),
                    (UserWarning, "transformers.a"),
                    (FutureWarning, "b"),
                ):
                    warnings.warn_explicit(f"{module}: {kind.__name__}", kind, "a.py", 1, module)
        return "Reading" in capsys.readouterr().err, [str(each.message) for each in caught]

    others = ["transformers.a: UserWarning", "b: FutureWarning"]
    assert said(rows=2) == (False, others)
    assert said(rows=3) == (True, ["transformers.a: FutureWarning", *others])


def test_keys_that_no_arm_has_a_use_for_are_named_before_anything_runs(folder, caplog):
    words = ["--arms", "longest", "--balance_by", "output", "--plan"]
    assert main(command(folder, *words)) == 0
    assert caplog.messages == [
        "balance_by: no effect without policy: balanced.",
        "max_ifd: no effect without policy: cherry.",
    ]


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"balanced": None}, ["max_ifd: no effect without policy: cherry."]),
        ({"balanced": None, "static": None}, []),
        (
            {"longest": None, "mine": {"policy": "lowest", "tiers": 4}},
            [
                "balance_by: no effect without policy: balanced.",
                "max_ifd: no effect without policy: cherry.",
                "arms: mine: tiers: no effect without curriculum.",
            ],
        ),
        (
            {"balanced": {"tiers": 4}, "static": {"tiers": 5, "curriculum": "easy_to_hard"}},
            ["arms: balanced: tiers: no effect without curriculum."],
        ),
    ],
)
def test_a_key_is_idle_where_no_arm_uses_it_and_an_arms_own_one_in_that_arm(folder, arms, said):
    recipe, shared = str(folder / "recipe.yaml"), ["--model", str(folder / "model"), "--balance_by", "output"]
    planned = []
    for arm in read_arms(arms, "m", balance_by="output"):
        selection = parse_recipe(recipe, [*shared, *arm.arguments()], plan=True).selection
        planned.append(PlannedArm(arm, 0, [], 0, 0, 0.0, selection))
    assert idle_lines(recipe, shared, planned) == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--arms", "longst"],
            "arms: 'longst' is no known arm, and has no keys that say what it is. Did you mean longest?",
        ),
        (["--arms", "balanced"], "name it with balance_by"),
        (["--arms", "superfiltering"], "name it with superfilter: gpt2"),
        (["--arms", "target"], "name them with target_set: FILE"),
        (["--seeds", "1"], "at least 2"),
        (["--seeds", "3", "3"], "two or more different ones"),
        (["--eval_dataset", ""], "needs held-out rows"),
        (["--workers", "0"], "--workers must be at least 1, got 0."),
        (["--seeds", "two"], "invalid int value: 'two'. See ifd-trainer compare --help."),
        (["--nonsense", "1"], "--nonsense"),
        (["--category_column", "topic"], "category_column: no set of held-out rows has a column 'topic'"),
        (
            ["--answers", "3", "--max_new_tokens", "600"],
            "max_new_tokens=600 leaves no token of the model's window of 512",
        ),
        (["--judge", "gpt-4"], "A judge wants answers: name prompts in the recipe"),
        (["--judge", "gpt-4", "--answers", "3"], "The judge wants a key: set OPENAI_API_KEY"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(folder, capsys, monkeypatch, words, message):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    assert main(command(folder, "--output_dir", str(folder / "refused"), *words)) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "refused").exists()


def test_a_run_that_fails_names_its_log(folder, capsys):
    """In a process of its own, whose model is not there any more."""
    comparison = prepared(folder, "fails", "--arms", "longest")
    (folder / "model" / "config.json").rename(folder / "model" / "away.json")
    try:
        with pytest.raises(RuntimeError, match=r"ended with code 1: error: .*log\.txt\)"):
            comparison.run(say=lambda text: None)
    finally:
        (folder / "model" / "away.json").rename(folder / "model" / "config.json")


@pytest.mark.parametrize("name", ["compare_demo", "compare_alpaca"])
def test_the_recipes_of_comparisons_say_what_they_are_and_can_be_planned(folder, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", name]) == 0
    assert f"Run it with: ifd-trainer compare {name}.yaml" in capsys.readouterr().out
    text = Path(f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("Reproduces", "Hardware", "Time"):
        assert sum(line.startswith(f"# {word}: ") for line in text.splitlines()) == 1
    text = text.replace("tatsu-lab/alpaca", str(folder / "rows.jsonl")).replace("gpt2", str(folder / "model"))
    text = text.replace("tasks: default", "#")  # whose data lie on a hub
    Path("here.yaml").write_text(text.replace("bf16: true", "bf16: false"), encoding="utf-8")
    assert main(["compare", "here.yaml", "--model", str(folder / "model"), "--use_cpu", "true", "--plan"]) == 0
    named = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "about" in line and "update" in line]
    assert named == (
        ["random", "guarded"]
        if name == "compare_demo"
        else ["random", "full", "longest", "static", "superfiltering", "cherry", "dynamic", "guarded"]
    )


def test_rows_held_out_of_a_mixture_are_the_same_with_all_seeds(folder, tmp_path):
    text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    text = text.replace("dataset_name: rows.jsonl\neval_dataset: held_out.jsonl\n", "")
    mixture = f"datasets: [{{path: {folder / 'rows.jsonl'}}}]\ntest_split_size: 5\n"
    (folder / "mixture.yaml").write_text(text + mixture, encoding="utf-8")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Comparison, "run", lambda self, *args, **kwargs: made.append(self))
        words = ["compare", str(folder / "mixture.yaml"), "--model", str(folder / "model"), "--arms", "longest"]
        assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2  # nothing has run
    comparison = made[0]
    comparison.seeds = [0, 1]
    written = []
    comparison.run(say=lambda text: None, launch=lambda place, device: written.append(held_out_of(place)))
    assert len(written) == 4
    assert len(written[0]) == 5
    assert all(rows == written[0] for rows in written)


def held_out_of(place: Path) -> list[str]:
    """The held-out rows of the run that a folder describes, which is then as if it had ended."""
    todo = json.loads((place / "run.json").read_text(encoding="utf-8"))
    run = build_run(parse_recipe(todo["recipe"], todo["words"]))
    (place / "result.json").write_text("{}")
    assert len(run.trainer.train_dataset) == 15
    return run.held_out["instruction"][:]


def test_arms_that_would_share_a_folder_are_refused(folder, capsys):
    text = (
        (folder / "recipe.yaml").read_text(encoding="utf-8").replace(ARMS, "arms: {a b: {keep: 3}, a/b: {keep: 4}}\n")
    )
    (folder / "alike.yaml").write_text(text, encoding="utf-8")
    assert main(["compare", str(folder / "alike.yaml"), "--model", str(folder / "model")]) == 2
    assert "several of them would be in the folder 'a_b'" in capsys.readouterr().err


def test_the_speed_of_a_machine_is_that_of_its_matrix_products():
    assert 1e7 < operations_per_second(size=64, seconds=0.01) < 1e16


def test_processes_that_run_side_by_side_share_the_cores(folder, monkeypatch):
    started = []

    class Ended:
        stdin = open(os.devnull)  # noqa: SIM115

        def __init__(self, command, env, **kwargs):
            started.append(env.get("OMP_NUM_THREADS"))

        def wait(self):
            return 0

    monkeypatch.setattr("subprocess.Popen", Ended)
    monkeypatch.setattr("ifd_trainer.compare.comparison.processors", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for workers in (1, 3, 9):
        in_a_process(folder, None, workers)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # a user's own
    in_a_process(folder, None, 3)
    assert started == [None, "2", "1", "5"]
