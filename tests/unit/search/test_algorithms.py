"""The registries of samplers and schedulers: an unknown name is an error, and one from outside is used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from raytrain.data.corpus import Corpus
from raytrain.runs.records import PLAN
from raytrain.search.algorithms import (
    SAMPLERS,
    SCHEDULERS,
    Halving,
    check_algorithms,
    make_scheduler,
    make_study,
    resolve_algorithm,
    resolve_scheduler,
)
from raytrain.search.plan import Plan, read_plan
from raytrain.search.searcher import OptunaSearcher
from raytrain.search.setup import stored_plan
from raytrain.search.space import read_space
from raytrain.storage.local import FolderStorage
from raytrain.utils.errors import UserError
from tests.unit.search.test_search_objective import a_plan, end, figures, refused, searcher

__all__ = ["refused"]

EMPTY = "def space(trial):\n    return {}\n"


class Middle(optuna.samplers.RandomSampler):
    """Draws the middle of every range."""

    def __init__(self, plan: Plan, seed: int) -> None:
        super().__init__(seed=seed)
        self.plan = plan

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        if isinstance(param_distribution, optuna.distributions.CategoricalDistribution):
            return param_distribution.choices[0]
        return (param_distribution.low + param_distribution.high) / 2


class Recalling(FIFOScheduler):
    """Stops nothing, and keeps what it is reminded of."""

    def __init__(self) -> None:
        super().__init__()
        self.recalled: list[str] = []

    def recall(self, trial_id: str, history: list[dict[str, Any]]) -> None:
        self.recalled.append(trial_id)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SAMPLERS, "middle", Middle)
    monkeypatch.setitem(SCHEDULERS, "recalling", lambda plan: Recalling())


def test_each_algorithm_has_its_sampler() -> None:
    kinds = {name: type(make_study(a_plan(algorithm=name), 0).sampler) for name in ("tpe", "gp", "random", "grid")}
    assert kinds == {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
        "grid": optuna.samplers.RandomSampler,
    }


def test_each_scheduler_is_made_for_the_plan() -> None:
    halving = make_scheduler(a_plan())
    assert isinstance(halving, Halving)
    assert halving._max_t == max(config.steps for config in a_plan().bases.values())
    assert type(make_scheduler(a_plan(scheduler="none"))) is FIFOScheduler


@pytest.mark.parametrize("make", [lambda plan: make_study(plan, 0), make_scheduler, check_algorithms])
def test_an_unknown_name_is_one_line_that_lists_what_there_is(make: Callable[[Plan], Any]) -> None:
    plan = a_plan(algorithm="sgd", scheduler="sgd")
    with pytest.raises(
        UserError, match=r"--(algorithm|scheduler) is 'sgd': must be one of (tpe, gp, random|asha, none)"
    ):
        make(plan)


def test_the_option_comes_before_the_space() -> None:
    space = read_space("mine", EMPTY + "ALGORITHM = 'grid'\n")
    assert resolve_algorithm(None, space) == "grid"
    assert resolve_algorithm("random", space) == "random"
    assert resolve_algorithm(None, read_space("mine", EMPTY)) == "tpe"
    assert resolve_scheduler("asha", "grid", "pareto") == "asha"
    assert resolve_scheduler("none", "tpe", "bound") == "none"


def test_names_that_there_are_not() -> None:
    with pytest.raises(UserError, match="--algorithm is 'sgd': must be one of tpe, gp, random, grid"):
        resolve_algorithm("sgd", read_space("mine", EMPTY))
    with pytest.raises(UserError, match="search space mine: ALGORITHM has 'sgd': must be one of tpe, gp, random, grid"):
        resolve_algorithm(None, read_space("mine", EMPTY + "ALGORITHM = 'sgd'\n"))
    with pytest.raises(UserError, match="--scheduler is 'sgd': must be one of asha, none"):
        resolve_scheduler("sgd", "tpe", "bound")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--algorithm", "sgd"], "--algorithm is 'sgd': must be one of tpe, gp, random, grid"),
        (["--scheduler", "sgd"], "--scheduler is 'sgd': must be one of asha, none"),
    ],
)
def test_a_name_that_there_is_not_is_refused_before_anything_runs(
    refused: Callable[..., str], arguments: list[str], line: str
) -> None:
    assert line in refused("tune", "hybrid", *arguments)


def test_a_search_uses_what_is_registered_from_outside(registered: None, corpus: Corpus, tmp_path: Path) -> None:
    space = read_space(
        "mine", "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', 0.0, 1.0)}\n"
    )
    assert resolve_algorithm("middle", space) == "middle"
    plan = a_plan(space=space, algorithm="middle", scheduler=resolve_scheduler("recalling", "middle", "bound"))
    found = searcher(plan, corpus, tmp_path)
    assert isinstance(found.study.sampler, Middle)
    assert found.study.sampler.plan is plan
    assert found.suggest("0")["job"]["config"]["objective"]["alpha"] == 0.5
    scheduler = make_scheduler(plan)
    assert isinstance(scheduler, Recalling)
    resumed = OptunaSearcher(found.search, found.records, found.records.read(), scheduler)
    resumed.suggest("again")
    assert scheduler.recalled == ["again"]


def test_a_scheduler_that_recalls_nothing_is_not_asked_to(corpus: Corpus, tmp_path: Path) -> None:
    first = searcher(a_plan(), corpus, tmp_path)
    first.suggest("0")
    plain: TrialScheduler = FIFOScheduler()
    OptunaSearcher(first.search, first.records, first.records.read(), plain).suggest("again")


def test_a_search_is_not_resumed_without_what_was_registered(registered: None, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path / "s")
    storage.write(PLAN, replace(a_plan(), algorithm="middle").to_json())
    assert read_plan(storage) is not None
    SAMPLERS.pop("middle")
    with pytest.raises(UserError, match="--algorithm is 'middle': must be one of tpe, gp, random, grid"):
        stored_plan("s", str(tmp_path))


ONE = "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', 0.0, 1.0)}\n"


def result_at(alpha: float) -> dict[str, float]:
    """The lower alpha, the lower the negative ELBO; but below 0.7 too little of the code is used."""
    return figures(2.0 + alpha, 10 * alpha)


def drawn(algorithm: str, min_used: float, corpus: Corpus, folder: Path) -> list[float]:
    """The 16 draws of a search that is resumed after 8."""
    plan = a_plan(space=read_space("mine", ONE), algorithm=algorithm, num_samples=12, min_used=min_used)
    found = searcher(plan, corpus, folder)
    for number in range(16):
        if number == 8:
            before = [trial.constraints for trial in found.study.trials]
            found = searcher(plan, corpus, folder)
            assert [trial.constraints for trial in found.study.trials] == before
        alpha = found.suggest(str(number))["job"]["config"]["objective"]["alpha"]
        end(found, found.trials[number], result_at(alpha))
    return [trial.params["a"] for trial in found.trials]


@pytest.mark.parametrize("algorithm", ["tpe", "gp"])
def test_a_sampler_keeps_to_the_constraint_also_when_the_search_was_resumed(
    algorithm: str, corpus: Corpus, tmp_path: Path
) -> None:
    free = drawn(algorithm, 0.0, corpus, tmp_path / "free")
    bound = drawn(algorithm, 7.0, corpus, tmp_path / "bound")
    assert free[:4] == bound[:4]  # at random
    assert sum(bound[8:]) / 8 > sum(free[8:]) / 8 + 0.2
    assert min(alpha for alpha in bound if alpha >= 0.7) < 0.8


def test_a_running_trial_and_one_that_diverged_are_no_hindrance_to_a_gaussian_process(
    corpus: Corpus, tmp_path: Path
) -> None:
    plan = a_plan(algorithm="gp", num_samples=12, min_used=1.0)  # a conditional space
    found = searcher(plan, corpus, tmp_path)
    for number in range(8):
        found.suggest(str(number))
        if number == 2:
            end(found, found.trials[number], {}, "early_stopped")
        elif number != 3:
            end(found, found.trials[number], figures(2.0 + number / 10, number / 2))
    assert found.failure is None
    assert len(found.trials) == 8
