"""The plan of a search as it is printed, and what its result says beside its metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from raytrain import models
from raytrain.config.schema import RunConfig, from_dict, override
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC
from raytrain.models import num_parameters
from raytrain.models.hybrid import Hybrid
from raytrain.models.ladder import validation_ladder
from raytrain.runs.records import PLAN
from raytrain.search import searcher as searchers
from raytrain.search.algorithms import SAMPLERS
from raytrain.search.estimate import worker_bytes
from raytrain.search.finish import description, model_card
from raytrain.search.options import SearchOptions
from raytrain.search.plan import WarmStart, grid_points
from raytrain.search.searcher import OptunaSearcher
from raytrain.search.setup import check_starts, largest_worker, reference_lines, stored_plan
from raytrain.search.space import check_space, read_space
from raytrain.storage import open_storage
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import a_plan, a_trial, end, figures, searcher


def test_the_plan_shows_what_counting_reaches(corpus: Corpus) -> None:
    windows, documents = tiny_config("hybrid"), tiny_config("byte_lstm", sampling="documents", length=64)
    one = a_plan(bases={"hybrid": windows, "byte_lstm": tiny_config("byte_lstm")})
    (line,) = reference_lines(one, corpus)
    assert line == str(validation_ladder(corpus, windows))
    assert line.startswith("reference: byte 3-gram ")
    two = reference_lines(a_plan(bases={"hybrid": windows, "byte_lstm": documents}), corpus)
    assert [each.partition(":")[0] for each in two] == ["reference on windows of 24", "reference on documents of 64"]
    assert two[1].endswith(str(validation_ladder(corpus, documents)).removeprefix("reference"))
    pieces = tiny_config("byte_lstm", sampling="windows", vocabulary="bpe:300")
    three = reference_lines(a_plan(bases={"hybrid": windows, "byte_lstm": pieces}), corpus)
    assert [each.partition(":")[0] for each in three] == [
        "reference on windows of 24", "reference on windows of 24 in bpe",
    ]  # fmt: skip
    assert "; bpe:300 " in three[1]


@pytest.mark.parametrize("factor", [0.9, 1.25])
def test_card_and_description_hold_the_winner_against_counting(corpus: Corpus, tmp_path: Path, factor: float) -> None:
    plan = a_plan(num_samples=1)
    best = a_trial(0)
    ladder = validation_ladder(corpus, best.config)
    best.best = figures(factor * ladder.bits[ladder.best], 3.0)
    search: Any = SimpleNamespace(name="s", plan=plan, workspace=SimpleNamespace(corpus=corpus))
    comparison = ladder.comparison(best.best[METRIC])
    assert f"- {comparison}\n" in model_card(search, best, ["a text"], comparison)
    text = description(search, [best], best, ladder, "models:/m@champion", "#/", 5.0)
    assert f"\nCompared with counting: {comparison}.\n" in text
    assert ("warning: the best trial's model has learnt less than counting: it needs 25.0% more" in text) == (
        factor > 1
    )


SIZES = """
def space(trial):
    return {"model.hidden": trial.suggest_categorical("hidden", [16, 32, 64]),
            "objective.alpha": trial.suggest_float("alpha", 0.0, 1.0, step=0.5)}
"""


def with_hidden(hidden: int) -> RunConfig[Any]:
    return override(tiny_config("hybrid"), {"model.hidden": hidden})


@pytest.mark.parametrize("algorithm", ["tpe", "gp", "random", "grid"])
def test_no_model_with_too_many_parameters_is_trained(algorithm: str, corpus: Corpus, tmp_path: Path) -> None:
    most = num_parameters(with_hidden(32))
    plan = a_plan(space=read_space("mine", SIZES), algorithm=algorithm, max_parameters=most)
    found = searcher(plan, corpus, tmp_path)
    for number in range(6):
        assert num_parameters(from_dict(found.suggest(str(number))["job"]["config"])) <= most
        end(found, found.trials[number], figures(2.0 - found.trials[number].config.model.hidden / 64, 3.0))
    assert 32 in {trial.config.model.hidden for trial in found.trials} <= {16, 32}
    points = [(trial.params["hidden"], trial.params["alpha"]) for trial in found.trials]
    if algorithm == "grid":
        assert len(set(points)) == len(grid_points(plan.space, plan.bases, None, most)) == 6
        assert len(grid_points(plan.space, plan.bases, None, None)) == 9


def test_a_search_begins_at_the_start_of_its_space(corpus: Corpus, tmp_path: Path) -> None:
    source = SIZES.replace(", step=0.5", "") + "START = {'hidden': 32, 'alpha': 0.123}"
    plan = a_plan(space=read_space("mine", source))
    found = searcher(plan, corpus, tmp_path / "search")
    for number in range(4):
        found.suggest(str(number))
    first, *others = [(trial.params["hidden"], trial.params["alpha"]) for trial in found.trials]
    assert first == (32, 0.123)
    assert first not in others
    # not beside the configs of warm starts, and only where it may be trained
    start = WarmStart(reference="it.json", config=with_hidden(64), params=None)
    later = searcher(replace(plan, warm_starts=(start,)), corpus, tmp_path / "later")
    for number in range(2):
        later.suggest(str(number))
    assert later.trials[0].config.model.hidden == 64
    assert later.trials[1].params["alpha"] != 0.123
    small = searcher(replace(plan, max_parameters=num_parameters(with_hidden(16))), corpus, tmp_path / "small")
    small.suggest("0")
    assert small.trials[0].config.model.hidden == 16


def test_a_sampler_that_insists_on_large_models_is_left_for_a_random_draw(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Insists(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return 64 if param_name == "hidden" else 0.5

    monkeypatch.setattr(searchers, "MOST_DRAWS", 40)
    monkeypatch.setitem(SAMPLERS, "insists", lambda plan, seed: Insists())
    most = num_parameters(with_hidden(32))
    plan = a_plan(space=read_space("mine", SIZES), algorithm="insists", max_parameters=most)
    found = searcher(plan, corpus, tmp_path)
    found.suggest("0")
    assert isinstance(found.study.sampler, Insists)
    assert found.trials[0].config.model.hidden < 64
    none = searcher(replace(plan, max_parameters=1), corpus, tmp_path / "none")
    assert none.suggest("0") == OptunaSearcher.FINISHED
    assert "--max-parameters 1: none of 40 points" in str(none.failure)


def test_a_limit_that_nothing_keeps_is_refused() -> None:
    points, most = [with_hidden(hidden) for hidden in (16, 32)], num_parameters(with_hidden(16))
    check_starts(SearchOptions(), points, ())
    check_starts(SearchOptions(max_parameters=most), points, ())
    with pytest.raises(UserError, match=rf"none of 2 points of the space has so few; the least is {most:,}"):
        check_starts(SearchOptions(max_parameters=most - 1), points, ())
    start = WarmStart(reference="a.json", config=points[1])
    with pytest.raises(UserError, match=r"--max-parameters \d+: --warm-start a.json has"):
        check_starts(SearchOptions(max_parameters=most), points, (start,))
    with pytest.raises(UserError, match=r"--num-samples is 1: the 2 of --warm-start count among them"):
        check_starts(SearchOptions(num_samples=1), points, (start, start))


def test_no_memory_is_set_aside_for_models_that_the_limit_leaves_out() -> None:
    plan = a_plan(space=read_space("mine", SIZES))
    most = num_parameters(with_hidden(32))
    assert largest_worker(plan, 2) == worker_bytes(with_hidden(64), 2)
    assert largest_worker(replace(plan, max_parameters=most), 2) == worker_bytes(with_hidden(32), 2)
    assert largest_worker(replace(plan, max_parameters=1), 2) == 0


def test_a_point_of_the_space_is_built_once_before_the_search_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check builds them all; what memory the largest takes, and which keep a limit, is known from that."""
    built: list[RunConfig[Any]] = []
    build_empty = models.build_empty
    monkeypatch.setattr(models, "build_empty", lambda config: [built.append(config), build_empty(config)][1])
    models._size.cache_clear()
    plan = a_plan(space=read_space("mine", SIZES), max_parameters=10**9)
    points = check_space(plan.space, plan.bases, plan.budget, plan.algorithm, plan.seed)
    assert len(built) == len(set(points)) > 1
    assert largest_worker(plan, 2) == worker_bytes(with_hidden(64), 2) > worker_bytes(with_hidden(32), 2)
    assert [config for config in built if built.count(config) > 1] == []
    # another implementation under the same name and with the same config is another model
    monkeypatch.setattr(models, "_implementation", lambda config: type("Other", (Hybrid,), {}))
    models.model_size(points[0])
    assert built.count(points[0]) == 2


def test_the_limit_is_part_of_the_plan(tmp_path: Path) -> None:
    storage, plan = open_storage(tmp_path / "s"), a_plan(max_parameters=5000)
    storage.write(PLAN, plan.to_json())
    known, begun = stored_plan("s", str(tmp_path))
    assert (known.max_parameters, begun.max_parameters) == (5000, 5000)
    assert a_plan().differences(known) == ["max_parameters was 5000, is None"]
