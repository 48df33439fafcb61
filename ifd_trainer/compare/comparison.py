"""A comparison on disk: its arms and seeds, what is done of it, and what is left.

    <output_dir>/comparison.json       what is compared: recipe, arms, seeds, versions
    <output_dir>/<arm>/seed-<n>/       a run, see `arm_run`: `result.json` is there once it has ended
    <output_dir>/compare.html          what was found, a page; its numbers are in results.json, .csv and .tex

Each run is a process of its own, so a comparison that was killed has lost what came after the last checkpoints of the
runs that were going, and nothing else. What runs share is computed once, in the cache of `datasets`: the tokens, and
the scores of arms that score with the same model beforehand.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from .. import __version__
from ..data.atomic import write_json
from ..data.paths import folder_name
from ..errors import FileAccessError, NotFoundError, RunError, UserError, one_line
from ..evaluation.held_out_losses import Point, read_points, rows_path
from ..evaluation.measures import Measures
from ..recipe.file import COMPARED, overrides, read_recipe
from .arm_run import RESULT, ArmRun, write_run
from .arms import Arm, arm_of

FILE = "comparison.json"
_RECORD = ("recipe", "keys", "arms", "seeds", "steps", "measures", "versions", "machine")
_VERSIONS = ("torch", "transformers", "trl", "datasets")


@dataclass(frozen=True)
class Task:
    """One arm with one seed.

    Attributes:
        folder: where it runs.
        done: whether it has ended.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """As a progress display has it."""
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / RESULT).exists()

    def result(self) -> dict[str, Any]:
        """What the run has written at its end."""
        return json.loads((self.folder / RESULT).read_text(encoding="utf-8"))

    def points(self) -> list[Point]:
        """Where its held-out rows were scored."""
        return read_points(self.folder)

    def held_out(self, point: Point) -> pd.DataFrame:
        """The scores of the held-out rows at a point."""
        return pd.read_parquet(rows_path(self.folder, point))


@dataclass
class Comparison:
    """Arms and seeds of a recipe.

    Attributes:
        folder: where everything is.
        recipe: the recipe's file.
        words: of the command line, over the recipe's keys.
        arms: random rows first.
        seeds: each arm runs with each of them.
        steps: after which the held-out rows of all arms are scored, the ends of the first arm's epochs.
        measures: what is measured beside the losses of the recipe's held-out rows.
    """

    folder: Path
    recipe: str
    words: list[str]
    arms: list[Arm]
    seeds: list[int]
    steps: list[int] = field(default_factory=list)
    measures: Measures = Measures()

    @classmethod
    def load(cls, folder: Path) -> Comparison:
        """What a folder holds, to be read: the recipe's file is not in it, so that it cannot go on.

        Raises:
            UserError: as `read_record` does.
        """
        record = read_record(folder)
        arms = [arm_of(name, keys) for name, keys in record["arms"].items()]
        return cls(folder, "", [], arms, record["seeds"], record["steps"], Measures(**record["measures"]))

    def tasks(self) -> list[Task]:
        """All runs, seed by seed, so that a comparison that is cut short has whole seeds."""
        return [
            Task(arm, seed, self.folder / folder_name(arm.name) / f"seed-{seed}")
            for seed in self.seeds
            for arm in self.arms
        ]

    def in_order(self, workers: int, cost: Mapping[str, float] | None = None) -> list[Task]:
        """All runs as they begin, `workers` at a time: seed by seed, and of the last seeds the longest first, so that
        none of these is left to run alone at the end.

        Args:
            cost: of a run of each arm, in any unit.
        """
        tasks, cost = self.tasks(), cost or {}
        late = len(self.arms) * min(workers, len(self.seeds)) if workers > 1 else 0
        before = len(tasks) - late
        return tasks[:before] + sorted(tasks[before:], key=lambda task: -cost.get(task.arm.name, 0.0))

    def save(self) -> None:
        """Write what is compared; a comparison that is there has to be the same one.

        Raises:
            UserError: for a folder with another comparison.
        """
        content = self._content()
        path = self.folder / FILE
        if path.exists():
            there = read_record(self.folder)
            other = [] if there["steps"] == self.steps else ["steps"]
            other += [] if Measures(**there["measures"]) == self.measures else ["measures"]
            other += [] if _trained_by(there["recipe"]) == _trained_by(content["recipe"]) else ["recipe"]
            keys = {**there["keys"], **content["keys"]}
            other += [key for key in keys if there["keys"].get(key) != content["keys"].get(key)]
            other += [f"arm {name}" for name, keys in there["arms"].items() if content["arms"].get(name, keys) != keys]
            if other:
                raise UserError(
                    f"{self.folder} holds another comparison: {', '.join(other)} {'is' if len(other) == 1 else 'are'} "
                    "not the same. Name another output_dir, or delete it."
                )
        write_json(path, content)

    def _content(self) -> dict[str, Any]:
        return {
            "recipe": Path(self.recipe).read_text(encoding="utf-8"),
            "keys": {key: value for key, value in overrides(self.words).items() if key != "output_dir"},
            "arms": {arm.name: dict(arm.keys) for arm in self.arms},
            "seeds": self.seeds,
            "steps": self.steps,
            "measures": asdict(self.measures),
            "versions": {"ifd_trainer": __version__, **{name: version(name) for name in _VERSIONS}},
            "machine": f"{platform.machine()}, {os.cpu_count()} processors, {platform.platform()}",
        }

    def run(
        self,
        workers: int = 1,
        devices: Sequence[str] = (),
        say: Callable[[str], None] = print,
        launch: Callable[[Path, str | None], None] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> None:
        """Train all that is left, `workers` runs at a time.

        Args:
            cost: see `in_order`.
            devices: of CUDA, which runs take in turn; none to leave them as they are.
            say: tells what has begun and ended, and what is left.
            launch: trains what a folder's `run.json` says, on a device; by default in a process of its own.

        Raises:
            RunError: for a run that failed; the others that were going end first.
        """
        every = self.in_order(workers, cost)
        left = [task for task in every if not task.done]
        began, done, launch = time.perf_counter(), 0, launch or partial(in_a_process, workers=workers)
        going: dict[Future[None], Task] = {}
        waiting = iter(enumerate(left))
        with ThreadPoolExecutor(workers) as pool:
            while True:
                while len(going) < workers and (following := next(waiting, None)) is not None:
                    number, task = following
                    say(f"{task.name}: begins ({len(every) - len(left) + number + 1} of {len(every)})")
                    self._write(task, at_start=number == 0)
                    device = devices[number % len(devices)] if devices else None
                    going[pool.submit(launch, task.folder, device)] = task
                if not going:
                    return
                for ended in wait(going, return_when=FIRST_COMPLETED).done:
                    task = going.pop(ended)
                    ended.result()
                    done += 1
                    each = (time.perf_counter() - began) / done
                    rest = f", about {minutes(each * (len(left) - done))} left" if done < len(left) else ""
                    say(f"{task.name}: done{rest}")

    def _write(self, task: Task, at_start: bool) -> None:
        """Say in the folder of a run what it is to do."""
        words = [*self.words, *task.arm.arguments(), "--seed", str(task.seed), "--output_dir", str(task.folder)]
        words += ["--eval_strategy", "no", "--save_strategy", "epoch", "--save_total_limit", "1"]
        words += ["--report_to", "none"]
        if "split_seed" not in {**read_recipe(self.recipe), **overrides(self.words)}:
            words += ["--split_seed", "0"]  # the same held-out rows with all seeds
        steps = self.steps if not task.arm.selects else []
        write_run(task.folder, ArmRun(self.recipe, words, task.arm.selects, steps, at_start, asdict(self.measures)))


def _trained_by(recipe: str) -> dict[str, Any]:
    """The keys of a recipe that its runs read; those that only a comparison reads are compared for themselves."""
    return {key: value for key, value in (yaml.safe_load(recipe) or {}).items() if key not in COMPARED}


def read_record(folder: Path) -> dict[str, Any]:
    """What `comparison.json` says: recipe, keys over it, arms, seeds, steps, versions and machine.

    Raises:
        UserError: when there is none, or one that is damaged or of another version.
    """
    path = folder / FILE
    if not path.exists():
        raise NotFoundError(f"No comparison in {folder}: `ifd-trainer compare` writes {FILE} there.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _RECORD if key not in record]
        if missing:
            raise ValueError(f"it does not say {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise FileAccessError(
            f"{path} cannot be read ({one_line(error)}): it is damaged, or of another version. Run the comparison anew."
        ) from error
    return record


def in_a_process(folder: Path, device: str | None, workers: int = 1) -> None:
    """Train what a folder says, in a process that ends when this one does, however that ends.

    Args:
        workers: how many such processes there are at a time. They share the processor: threads of several that wait for
            one another by spinning take its cores from each other.

    Raises:
        RunError: with the last line of its log, where it failed.
    """
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device is not None else {})
    if workers > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(processors() // workers, 1)))
    command, log = [sys.executable, "-m", f"{__package__}.arm_run", str(folder)], folder / "log.txt"
    with log.open("a", encoding="utf-8") as out:
        # The pipe closes when this process ends.
        run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=subprocess.STDOUT, env=environment)
        code = run.wait()
        run.stdin.close()
    if code:
        last = "".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:])
        raise RunError(f"The run in {folder} ended with code {code}: {last} (all of it: {log}).")


def processors() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def minutes(seconds: float) -> str:
    """A time as one would say it.

    >>> minutes(40), minutes(600), minutes(9000)
    ('40 s', '10 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
