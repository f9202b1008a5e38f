"""A population whose driver is killed ends as one that was never disturbed, and its winner is one run."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.config.schema import LOCATION, to_dict
from raytrain.metrics import SearchObjective
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Checkpoint
from raytrain.runs.trials import rank
from raytrain.storage.local import FolderStorage
from tests.faults.test_search_resume import ARGUMENTS, begin, end, models, trials
from tests.support.ray_instance import assert_nothing_left

SPACE = """
ALGORITHM = "pbt"
def space(trial):
    return {
        "objective.annealing": "constant",
        "objective.weight": trial.suggest_float("weight", 0.1, 1.0, log=True),
        "optimizer.learning_rate": trial.suggest_float("rate", 3e-4, 1e-2, log=True),
        "model.latent": trial.suggest_categorical("latent", [4, 8]),
    }
"""
COMMAND = [argument if argument != "space.py" else "population.py" for argument in ARGUMENTS]
COMMAND = [*COMMAND, "--num-samples", "4", "--parts", "4"]
RESULTS = 32
"""Evaluations of four members: two in each part of 20 steps."""


def start(ray_cpu: str, home: Path, *arguments: str) -> Any:
    home.mkdir(exist_ok=True)
    (home / "population.py").write_text(SPACE)
    return begin(ray_cpu, home, *arguments)


@pytest.fixture(scope="module")
def undisturbed(ray_cpu: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("population")
    end(start(ray_cpu, home, "raytrain.tune", *COMMAND), home, 0)
    return home


def results(home: Path) -> dict[Any, Any]:
    """What each part of each member has come from, was trained with, and has reached."""
    found = trials(home)
    by_identity = {trial.identity: (trial.member, trial.end) for trial in found}
    return {
        (trial.member, trial.end): (
            by_identity.get(trial.continues),
            {name: value for name, value in to_dict(trial.config).items() if name not in LOCATION},
            trial.params,
            trial.status,
            trial.best,
            trial.history,
        )
        for trial in found
    }


def newest(location: Path) -> Checkpoint:
    stored = checkpoint.latest(FolderStorage(location / "checkpoints"))
    assert stored is not None
    return stored


def killed_and_resumed(ray_cpu: str, home: Path, result: int) -> None:
    moment = f"raytrain.search.recorder:TrialRecorder.on_trial_result:{result}"
    end(start(ray_cpu, home, "tests.support.killed", moment, *COMMAND), home, -signal.SIGKILL)
    end(begin(ray_cpu, home, "raytrain.tune", "--resume", "s"), home, 0)


def test_a_population_that_was_killed_ends_as_an_undisturbed_one(
    ray_cpu: str, undisturbed: Path, tmp_path: Path
) -> None:
    killed_and_resumed(ray_cpu, tmp_path, 19)
    mine, theirs = results(tmp_path), results(undisturbed)
    assert mine == theirs
    assert len(mine) == 16
    # members were replaced, and by one that was trained with something else
    replaced = [key for key, (parent, *_) in theirs.items() if parent is not None and parent[0] != key[0]]
    assert len(replaced) >= 3
    assert any(theirs[key][1]["changes"] for key in replaced)
    assert models(tmp_path) == models(undisturbed) == (1, 1)
    assert_nothing_left(ray_cpu)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_a_population_that_was_killed_at_any_moment(ray_cpu: str, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    killed_and_resumed(ray_cpu, tmp_path, random.Random(seed).randint(1, RESULTS))
    assert results(tmp_path) == results(undisturbed)


def test_the_schedule_of_the_winner_is_that_of_one_run(ray_cpu: str, undisturbed: Path) -> None:
    last = [trial for trial in trials(undisturbed) if trial.end == 80]
    won = next(trial for trial in rank(last, SearchObjective()) if trial.config.changes)
    (undisturbed / "won.json").write_text(json.dumps(to_dict(won.config)))
    again = ("raytrain.train", "hybrid", "--config", "won.json", "--name", "again", "--cpus-per-worker", "1")
    end(begin(ray_cpu, undisturbed, *again), undisturbed, 0)
    part, whole = newest(undisturbed / f"runs/s/trials/{won.identity}"), newest(undisturbed / "runs/again")
    assert part.step == whole.step == 80
    for stem in ("model", "optimizer"):
        mine, theirs = whole.tensors(stem), part.tensors(stem)
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert torch.equal(tensor, theirs[name]), name
    assert_nothing_left(ray_cpu)
