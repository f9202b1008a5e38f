"""What a search looks for, what it starts from, and which trials it ends: every part that needs no Ray cluster."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.tune.schedulers import TrialScheduler

from raytrain.analysis import evaluation
from raytrain.analysis.tables import search_summary
from raytrain.config.cli import parse_fields
from raytrain.config.presets import preset
from raytrain.config.schema import ObjectiveConfig, RunConfig, override, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.metrics import INFEASIBLE_PENALTY, LIKELIHOOD, METRIC, NO_RESULT, RUNG, SearchObjective, pareto_front
from raytrain.models import ladder
from raytrain.models.ladder import Ladder, validation_ladder
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import PLAN, search_objective_of
from raytrain.runs.repeats import winner
from raytrain.runs.trials import Trial, TrialStore, rank
from raytrain.runs.workspace import Workspace
from raytrain.search.algorithms import Halving, add_to_study, make_study, resolve_scheduler
from raytrain.search.finish import table
from raytrain.search.options import SearchOptions
from raytrain.search.plan import Plan, WarmStart, read_plan
from raytrain.search.searcher import OptunaSearcher, Search
from raytrain.search.space import grid, load_space, read_space
from raytrain.search.warm_start import point_of, read_warm_start
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.storage.lease import Holder, Lease
from raytrain.storage.local import FolderStorage
from raytrain.tracking.runs import Run
from raytrain.training import trainer as loop_module
from raytrain.training.early_stopping import MARGIN, EarlyStoppedError, why_early_stopped
from raytrain.training.loop import train
from raytrain.training.trainer import Trainer, World
from raytrain.training.worker import Job, RayReporter
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.integration.test_commands import refused
from tests.unit.training.test_loop import Recorder, final, on_workers

__all__ = ["refused"]

# ------------------------------------------------------------------------------------------- hopeless


def figures(bits: float, kl: float = 0.0, nats_per_bit: float = 40.0) -> dict[str, float]:
    bound = bits * nats_per_bit
    return {METRIC: bits, "bound": bound, "reconstruction": bound - kl, "kl": kl, "active_units": 1.0}


LATE = ObjectiveConfig(start=0.3, end=0.5)
CONSTANT = ObjectiveConfig(annealing="constant")


@pytest.mark.parametrize(
    ("objective", "step", "bits", "kl", "judged"),
    [
        (CONSTANT, 1999, 9.0, 0.0, None),  # too early, however bad
        (CONSTANT, 2000, 9.0, 0.0, "negative ELBO of 9.000"),
        (CONSTANT, 2000, 4.1, 0.0, "negative ELBO of 4.100"),
        (CONSTANT, 4000, 9.0, 0.0, None),  # it has ended
        (CONSTANT, 2000, 4.0, 0.0, None),  # a slow one, that may get below the n-gram
        (LATE, 2000, 9.0, 0.0, "reconstruction of 9.000"),
        (LATE, 2000, 9.0, 250.0, None),  # the code costs 6.25 of 9 bits, and its price has just become what it is
        (LATE, 2499, 9.0, 250.0, None),
        (LATE, 2500, 9.0, 250.0, "negative ELBO of 9.000"),
        (LATE, 2500, 4.1, 100.0, "negative ELBO of 4.100"),
        (LATE, 2500, 4.0, 100.0, None),
    ],
)
def test_a_trial_is_hopeless_only_by_what_it_has_been_trained_for(
    objective: ObjectiveConfig, step: int, bits: float, kl: float, judged: str | None
) -> None:
    config = tiny_config("hybrid", steps=4000, objective=objective)
    reason = why_early_stopped(config, step, figures(bits, kl), 4.05 / MARGIN)
    assert (reason is None) == (judged is None)
    assert judged is None or (judged in str(reason) and f"step {step} of 4000" in str(reason))
    assert judged is None or f"above the {4.05 / MARGIN:.3f} of a byte 3-gram" in str(reason)


def test_an_autoencoder_is_no_language_model_and_never_hopeless() -> None:
    free = ObjectiveConfig(annealing="constant", weight=0.0)
    assert why_early_stopped(tiny_config("hybrid", steps=4000, objective=free), 2000, figures(38.0, 250.0), 2.9) is None
    for objective in (replace(free, weight=0.01), replace(free, target_kl=5.0), replace(free, rate=5.0)):
        config = tiny_config("hybrid", steps=4000, objective=objective)
        assert why_early_stopped(config, 2000, figures(38.0, 250.0), 2.9) is not None
    # a language model has no code that could cost anything
    config = tiny_config("byte_lstm", steps=4000, objective=free)
    assert why_early_stopped(config, 2000, figures(38.0), 2.9) is not None


def test_a_short_run_is_given_200_steps() -> None:
    config = tiny_config("hybrid", steps=240, objective=CONSTANT)
    assert why_early_stopped(config, 199, figures(9), 4.0) is None
    assert why_early_stopped(config, 200, figures(9), 4.0) is not None


class Sent:
    """Stands for Tune: keeps what it is sent."""

    def __init__(self) -> None:
        self.results: list[dict[str, Any]] = []

    def __call__(self, result: dict[str, Any]) -> None:
        self.results.append(result)


def a_job(config: RunConfig[Any], **changes: Any) -> Job:
    return Job(config=to_dict(config), corpus={}, storage="", tracking={}, cpus=1.0, **changes)


def test_the_report_ends_a_hopeless_trial_after_it_was_heard_and_out_of_reach_of_asha() -> None:
    config, sent = tiny_config("hybrid", steps=1000, objective=CONSTANT), Sent()
    # rank 1 has no writer: what it does, every rank does
    report = RayReporter(a_job(config, baseline=4.0), config, rank=1, node=None, send=sent)
    report.evaluated(250, figures(6.0))
    report.evaluated(500, figures(4.3))  # 10% above the n-gram: it may get below it
    with pytest.raises(EarlyStoppedError, match=r"early-stopped at step 750 of 1000: its negative ELBO of 4\.500"):
        report.evaluated(750, figures(4.5))
    assert [(result["step"], RUNG in result) for result in sent.results] == [(250, True), (500, True), (750, False)]
    alone = RayReporter(a_job(config), config, rank=1, node=None, send=sent)
    alone.evaluated(500, figures(4.5))  # a run that is no trial


def test_validation_figures_that_are_not_finite_end_the_run_and_leave_the_best_checkpoint(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("hybrid", steps=40)
    evaluations = []

    def evaluate(trainer: Trainer, draws: int = 0) -> dict[str, float]:
        evaluations.append(draws)
        return figures(3.0 - len(evaluations), kl=math.inf if len(evaluations) == 3 else 1.0)

    monkeypatch.setattr(loop_module.Trainer, "evaluate", evaluate)
    recorder = Recorder()
    with pytest.raises(FloatingPointError, match="validation metrics are not finite at step 30"):
        train(config, corpus, World(), open_storage(tmp_path), recorder)
    assert len(evaluations) == 3
    best = checkpoint.best(open_storage(tmp_path))
    assert best is not None
    assert best.step == final(tmp_path).step == 20


# ------------------------------------------------------------------------------------------ likelihood


def weighted(config: RunConfig[Any], corpus: Corpus, trainer: Trainer, draws: int) -> float:
    batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
    totals = evaluation.evaluate(trainer.model.eval(), batches, draws)
    return float(totals.metrics()["importance_weighted"])


@pytest.mark.parametrize("model", ["hybrid", "lstm_vae"])
def test_the_likelihood_is_the_one_that_evaluation_measures(corpus: Corpus, model: str) -> None:
    config = tiny_config(model)
    trainer = Trainer(config, corpus, World())
    for step in range(5):
        trainer.train_step(step)
    plain, found = trainer.evaluate(), trainer.evaluate(8)
    assert {name: found[name] for name in plain} == plain
    assert found.keys() - plain.keys() == {"nll", LIKELIHOOD}
    assert found["nll"] == pytest.approx(weighted(config, corpus, trainer, 8), rel=1e-9)
    assert found["nll"] < found["bound"]
    assert found[LIKELIHOOD] / found["nll"] == pytest.approx(found[METRIC] / found["bound"])
    assert trainer.evaluate(8) == found
    assert trainer.evaluate(3)["nll"] != found["nll"]


def test_the_likelihood_of_a_model_without_a_code_is_its_bound(corpus: Corpus) -> None:
    found = Trainer(tiny_config("byte_lstm"), corpus, World()).evaluate(8)
    assert (found["nll"], found[LIKELIHOOD]) == (found["bound"], found[METRIC])


def _likelihood(world: World, corpus_path: str, out: str) -> None:
    trainer = Trainer(tiny_config("hybrid"), Corpus.open(corpus_path), world)
    found = trainer.evaluate(4)
    Path(out, f"{world.size}-{world.rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_every_worker_knows_the_likelihood_over_all_of_them(corpus: Corpus, tmp_path: Path) -> None:
    _likelihood(World(), str(corpus.path), str(tmp_path))
    on_workers(2, _likelihood, str(corpus.path), str(tmp_path))
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert first == pytest.approx(one, rel=1e-6)


def test_the_likelihood_in_bfloat16_is_near(corpus: Corpus) -> None:
    exact = Trainer(tiny_config("hybrid"), corpus, World()).evaluate(4)
    near = Trainer(tiny_config("hybrid", precision="bfloat16"), corpus, World()).evaluate(4)
    assert near["nll"] == pytest.approx(exact["nll"], rel=0.005)


def test_the_best_checkpoint_is_chosen_by_what_is_looked_for(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {10: (3.0, 2.0), 20: (2.5, 2.2), 30: (2.7, 1.9), 40: (2.9, 2.5)}
    for draws, expected in ((0, 20), (8, 30)):
        steps = iter(values)

        def evaluate(trainer: Trainer, draws: int = 0, steps: Any = steps) -> dict[str, float]:
            bits, likelihood = values[next(steps)]
            return figures(bits) | ({"nll": likelihood, LIKELIHOOD: likelihood} if draws else {})

        monkeypatch.setattr(loop_module.Trainer, "evaluate", evaluate)
        location = open_storage(tmp_path / str(draws))
        outcome = train(tiny_config("hybrid", steps=40), corpus, World(), location, Recorder(), draws)
        best = checkpoint.best(location)
        assert best is not None
        assert outcome.best_step == best.step == expected


# ------------------------------------------------------------------------------------------------ goal


def a_trial(number: int, best: dict[str, float] | None = None, **changes: Any) -> Trial:
    values: dict[str, Any] = {"params": {}, "distributions": {}, "fields": {}, "status": "finished"}
    return Trial(
        number=number,
        identity=f"identity-{number}",
        config=tiny_config("hybrid"),
        **{**values, "best": best or {}, **changes},
    )


SOME = [
    a_trial(0, figures(2.0, 0.01)),
    a_trial(1, figures(2.4, 3.0)),
    a_trial(2, figures(2.2, 1.5)),
    a_trial(3),
    a_trial(4, figures(2.5, 2.0)),
    a_trial(5, figures(3.0, 9.0), status="stopped"),
    a_trial(6, figures(math.nan, 5.0), status="failed"),
]


def numbers(trials: list[Trial]) -> list[int]:
    return [trial.number for trial in trials]


def test_what_a_code_costs_is_not_what_of_it_is_used() -> None:
    asked = SearchObjective("pareto", min_used=2.0)
    unread, read = figures(2.0, 9.0) | {"used": 1.5}, figures(2.0, 1.0) | {"used": 2.5}
    assert (asked.may_win(unread), asked.may_win(read)) == (False, True)
    assert (asked.values(unread), asked.values(read)) == ([2.0, 1.5], [2.0, 2.5])
    assert asked.score(unread) == INFEASIBLE_PENALTY + 0.5


def test_without_the_use_that_is_asked_for_no_trial_wins() -> None:
    assert numbers(rank(SOME, SearchObjective()))[:5] == [0, 2, 1, 4, 5]
    asked = SearchObjective(min_used=1.8)
    # those that lack it come after, the nearest to it first
    assert numbers(rank(SOME, asked)) == [1, 4, 5, 2, 0, 3, 6]
    best = winner(SOME, asked)
    assert best is not None
    assert best.number == 1
    assert winner(SOME, SearchObjective(min_used=10.0)) is None
    assert winner([SOME[3], SOME[6]], SearchObjective()) is None


def test_a_kl_that_rounding_made_negative_is_no_lack() -> None:
    assert SearchObjective().may_win(figures(2.0, -1e-9))


def test_the_likelihood_is_compared_where_it_is_looked_for() -> None:
    one, two = a_trial(0, figures(2.0) | {LIKELIHOOD: 1.9}), a_trial(1, figures(2.1) | {LIKELIHOOD: 1.8})
    assert numbers(rank([one, two], SearchObjective())) == [0, 1]
    assert numbers(rank([one, two], SearchObjective("nll"))) == [1, 0]
    assert winner([a_trial(0, figures(2.0))], SearchObjective("nll")) is None


POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12)


@given(POINTS)
def test_the_front_is_what_no_point_beats(points: list[tuple[float, float]]) -> None:
    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] <= point[0] and other[1] >= point[1] for other in points)

    found = pareto_front([*points, (math.nan, 9.0), (-9.0, math.inf)], lambda point: point)
    assert set(found) == {point for point in points if not beaten(point)}
    assert len(set(found)) == len(found)
    assert [bound for bound, _ in found] == sorted(bound for bound, _ in found)


def test_the_winner_of_a_front_is_its_lowest_bound_with_enough_kl() -> None:
    assert numbers(pareto_front(SOME, Trial.point)) == [0, 2, 1, 5]
    for least, expected in ((0.0, 0), (1.0, 2), (2.0, 1), (4.0, 5)):
        best = winner(SOME, SearchObjective("pareto", least))
        assert best is not None
        assert best.number == expected
        assert best in pareto_front(SOME, Trial.point)


def test_the_summary_says_who_cannot_win_and_shows_the_front() -> None:
    pareto = SearchObjective("pareto", 1.8)
    text = search_summary(SOME, pareto, winner(SOME, pareto))
    assert "at least 1.8 nats of the code used" in " ".join(text.split())
    assert "Pareto front: no trial beats these" in text
    assert "cannot win, since they use less than 1.8 nats of the code: 000, 002" in text
    assert "collapsed" not in text
    best = winner(SOME, SearchObjective())
    assert best is not None
    plain = search_summary(SOME, SearchObjective(), best)
    assert "Pareto front" not in plain
    assert "cannot win" not in plain
    assert "warning: the best trial's posterior has collapsed (KL 0.010 nats)" in plain
    assert "warning" not in search_summary(SOME, SearchObjective(), None)  # nothing is said of one that has not won
    bits = best.best[METRIC]
    known, better = (Ladder((4.0, 3.5, 3.0, 3.0, factor * bits), 9, 9) for factor in (0.8, 1.1))
    assert (
        "warning: the best trial's model has learnt less than counting: it needs 25.0% more than a byte 5-gram; "
        "give the trials more --steps\n"
    ) in search_summary(SOME, SearchObjective(), best, known)
    assert search_summary(SOME, SearchObjective(), best, better) == plain
    marked = search_summary([replace(SOME[1], origin="paper.json")], SearchObjective(), None)
    assert "from paper.json" in marked


def test_the_table_says_where_each_stands_and_who_is_on_the_front() -> None:
    columns = table(SOME, SearchObjective(min_used=1.8))
    assert columns["rank"] == [5, 1, 4, 6, 2, 3, 7]
    assert columns["front"] == [True, True, True, False, False, True, False]


# ------------------------------------------------------------------------------------- ASHA and Optuna

SOURCE = """
def space(trial):
    fields = {"objective.alpha": trial.suggest_float("alpha", 0.0, 1.0)}
    if trial.suggest_categorical("annealing", ["constant", "linear"]) == "linear":
        return fields | {"objective.annealing": "linear", "objective.end": trial.suggest_float("end", 0.2, 0.5)}
    return fields | {"objective.annealing": "constant"}
"""


def a_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "identity": "0" * 16,
        "space": read_space("mine", SOURCE), "bases": {"hybrid": tiny_config("hybrid")}, "budget": None,
        "algorithm": "tpe", "corpus": "0123456789abcdef", "num_samples": 8, "seed": 3, "workers": {},
        "experiment": "raytrain", "corpus_path": "/somewhere/corpus",
    }  # fmt: skip
    return Plan(**{**settings, **changes})


def decisions(search_objective: SearchObjective, results: list[dict[str, float]]) -> list[str]:
    """What ASHA says to trials that reach its first rung one after the other."""
    scheduler = Halving(80, search_objective)
    scheduler.set_search_properties(METRIC, "min")
    answers = []
    for number, result in enumerate(results):
        trial: Any = SimpleNamespace(trial_id=str(number))
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
        answers.append(scheduler.on_trial_result(None, trial, {RUNG: 10, "step": 10, **result}))
    return answers


def test_asha_stops_what_cannot_win_before_what_can() -> None:
    go, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    results = [figures(2.4, 3.0), figures(2.0, 0.0), figures(2.5, 4.0), figures(2.3, 5.0), figures(1.9, 0.0)]
    assert decisions(SearchObjective(), results) == [go, go, stop, go, go]
    assert decisions(SearchObjective(min_used=1.0), results) == [go, stop, go, go, stop]
    # worse bounds, better likelihoods
    turned = [figures(bits) | {LIKELIHOOD: 5 - bits} for bits in (2.0, 2.1, 1.9)]
    assert decisions(SearchObjective(), turned) == [go, stop, go]
    assert decisions(SearchObjective("nll"), turned) == [go, go, stop]


def test_asha_remembers_scores_of_before() -> None:
    scheduler, asked = Halving(80, SearchObjective(min_used=1.0)), [figures(2.4, 3.0), figures(2.5, 3.0)]
    scheduler.set_search_properties(METRIC, "min")
    for number, result in enumerate(asked):
        scheduler.recall(f"known-{number}", [{"step": 10, RUNG: 10, METRIC: result[METRIC], "kl": result["kl"]}])
    trial: Any = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    answer = scheduler.on_trial_result(None, trial, {RUNG: 10, "step": 10, **figures(1.0, 0.5)})  # type: ignore[arg-type]
    assert answer == TrialScheduler.STOP


def test_only_what_is_compared_on_one_metric_is_stopped_early() -> None:
    found = [resolve_scheduler(None, "tpe", name) for name in ("bound", "nll", "pareto")]  # type: ignore[arg-type]
    assert found == ["asha", "asha", "none"]


def test_a_short_search_is_not_all_random() -> None:
    def random_trials(num: int) -> int:
        return int(make_study(a_plan(num_samples=num), 0).sampler._n_startup_trials)  # type: ignore[attr-defined]

    assert [random_trials(num) for num in (2, 8, 12, 18, 100)] == [4, 4, 4, 6, 10]


def test_trials_that_are_drawn_while_others_run_are_not_drawn_beside_them() -> None:
    """With settings that draw independently of what runs, the next points gather where the best is."""
    study = make_study(a_plan(), 0)
    for index in range(20):
        point = study.ask()
        alpha = point.suggest_float("alpha", 0.0, 1.0)
        study.tell(point, abs(alpha - 0.5) + index * 1e-6)
    running = []
    for _ in range(8):
        running.append(study.ask().suggest_float("alpha", 0.0, 1.0))
    distances = np.diff(np.sort(running))
    assert distances.min() > 1e-3
    assert {trial.state for trial in study.trials[20:]} == {optuna.trial.TrialState.RUNNING}


def told_of(plan: Plan, trials: list[Trial]) -> optuna.Study:
    study = make_study(plan, 0)
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for trial in trials:
        point = source.ask()
        plan.space.resolve(plan.bases, point, None)
        kinds = {name: optuna.distributions.distribution_to_json(kind) for name, kind in point.distributions.items()}
        add_to_study(study, replace(trial, params=point.params, distributions=kinds), plan.search_objective)
    return study


def test_optuna_learns_what_is_looked_for() -> None:
    states = optuna.trial.TrialState
    diverged = a_trial(7, status="early_stopped")
    trials = [*SOME, diverged]
    bound = told_of(a_plan(), trials)
    assert [trial.value for trial in bound.trials] == [2.0, 2.4, 2.2, None, 2.5, 3.0, None, None]
    # one that diverged is a poor point; one that failed or never ran says nothing
    assert [trial.state for trial in bound.trials[3:]] == [
        states.FAIL, states.COMPLETE, states.COMPLETE, states.FAIL, states.PRUNED,
    ]  # fmt: skip
    asked = told_of(a_plan(min_used=1.8), trials)
    assert [trial.value for trial in asked.trials[:3]] == [2.0, 2.4, 2.2]
    missed = [trial.constraints.get("used") for trial in asked.trials]
    assert missed[:3] == [pytest.approx(1 - 0.01 / 1.8), pytest.approx(1 - 3.0 / 1.8), pytest.approx(1 - 1.5 / 1.8)]
    assert missed[-1] == NO_RESULT
    assert all(trial.constraints == {} for trial in bound.trials)
    both = told_of(a_plan(objective="pareto"), trials)
    assert [trial.values for trial in both.trials[:3]] == [[2.0, 0.01], [2.4, 3.0], [2.2, 1.5]]
    assert both.trials[7].state == states.FAIL
    assert {trial.number for trial in both.best_trials} == {0, 1, 2, 5}
    for study in (bound, asked, both):
        a_plan().space.resolve(a_plan().bases, study.ask(), None)  # and it draws on


# ------------------------------------------------------------------------------------------ warm start


def drawn_before(config: RunConfig[Any], params: dict[str, Any] | None) -> WarmStart:
    return WarmStart(reference="earlier", config=config, params=params)


@pytest.mark.parametrize("model", ["hybrid", "lstm_vae", "byte_lstm"])
def test_every_recorded_point_of_the_shipped_spaces_is_one_again(model: str) -> None:
    space = load_space(model)
    bases: Any = {model: preset("laptop", model)}  # type: ignore[arg-type]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(15):
        point = study.ask()
        target = space.resolve(bases, point, None)
        values = point_of(drawn_before(target, {**point.params, "another": 3}), space, bases, None)
        assert values == point.params
        assert space.resolve(bases, optuna.trial.FixedTrial(values), None) == target
        assert point_of(drawn_before(target, None), space, bases, None) is None


def test_recorded_points_of_a_grid_over_models_are_points_again() -> None:
    space = load_space("paper_fig4")
    bases: Any = {model: preset("laptop", model) for model in space.models or ("hybrid",)}
    budget = space.budget(None)
    for values in grid(space, budget)[::3]:
        target = space.resolve(bases, optuna.trial.FixedTrial(values), budget)
        found = point_of(drawn_before(target, values), space, bases, budget)
        assert found is not None
        assert space.resolve(bases, optuna.trial.FixedTrial(found), budget) == target


def test_a_config_that_the_space_cannot_make_of_the_recorded_parameters_is_no_point() -> None:
    plan = a_plan()
    for changes, params in (
        # out of range
        ({"objective.annealing": "linear", "objective.end": 0.6, "objective.alpha": 0.5},
         {"alpha": 0.5, "annealing": "linear", "end": 0.6}),
        # not searched
        ({"objective.annealing": "constant", "objective.alpha": 0.5, "optimizer.clip": 3.0},
         {"alpha": 0.5, "annealing": "constant"}),
        # no such choice
        ({"objective.annealing": "sigmoid", "objective.alpha": 0.5}, {"alpha": 0.5, "annealing": "sigmoid"}),
        # of another space: a parameter is missing, or means something else
        ({"objective.annealing": "constant", "objective.alpha": 0.5}, {"annealing": "constant"}),
        ({"objective.annealing": "constant", "objective.alpha": 0.5}, {"alpha": 0.25, "annealing": "constant"}),
        ({"objective.annealing": "constant", "objective.alpha": 0.5}, {"alpha": "a", "annealing": "constant"}),
    ):  # fmt: skip
        start = drawn_before(override(plan.bases["hybrid"], changes), params)
        assert point_of(start, plan.space, plan.bases, None) is None
    inside = {"objective.annealing": "linear", "objective.end": 0.4, "objective.alpha": 0.5}
    params = {"alpha": 0.5, "annealing": "linear", "end": 0.4}
    start = drawn_before(override(plan.bases["hybrid"], inside), params)
    assert point_of(start, plan.space, plan.bases, None) == params


def test_a_space_that_fails_on_the_way_costs_no_more_than_the_point() -> None:
    space = read_space("mine", "def space(trial):\n    return {'objective.alpha': trial.study.nothing}\n")
    assert point_of(drawn_before(tiny_config("hybrid"), {"alpha": 1.0}), space, a_plan().bases, None) is None


def checkpointed(location: Storage, config: RunConfig[Any]) -> str:
    """Leave a checkpoint that was evaluated; returns its address."""
    with CheckpointWriter(location.child("checkpoints")) as writer:
        writer.save(Snapshot(10, {"model": {}}, {}, to_dict(config)), 2.0)
        writer.wait()
    return location.uri()


def test_a_trial_of_an_earlier_search_brings_its_parameters(tmp_path: Path) -> None:
    plan, records = a_plan(), TrialStore(open_storage(tmp_path / "earlier"))
    params = {"alpha": 0.75, "annealing": "constant"}
    config = plan.space.resolve(plan.bases, optuna.trial.FixedTrial(params), None)
    kinds = {"alpha": optuna.distributions.distribution_to_json(optuna.distributions.FloatDistribution(0.0, 1.0))}
    drawn = replace(a_trial(0, figures(2.0)), config=config, params=params, distributions=kinds)
    outside = replace(a_trial(1, figures(2.1)), config=config, origin="a.json")
    addresses = []
    for trial in (drawn, outside):
        records.add(trial)
        addresses.append(checkpointed(records.location(trial.identity), config))
    run = checkpointed(open_storage(tmp_path / "run"), config)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    step = f"{addresses[0]}/checkpoints/step-00000010"
    (tmp_path / "earlier" / PLAN).write_bytes(plan.to_json())
    references = [addresses[0], step, str(tmp_path / "earlier"), addresses[1], run, str(file)]
    found = [read_warm_start(reference, reference, plan.bases) for reference in references]
    assert [start.config for start in found] == [config] * 6
    assert [start.params for start in found] == [params] * 3 + [None] * 3
    points = [point_of(start, plan.space, plan.bases, None) for start in found]
    assert points == [params] * 3 + [None] * 3


def test_a_trial_whose_record_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    records = TrialStore(open_storage(tmp_path))
    location = records.location("id0")
    checkpointed(location, tiny_config("hybrid"))
    location.write("trial.json", b"{}")
    with pytest.raises(UserError, match=r"--warm-start: .*trial\.json is not the record of a trial"):
        read_warm_start("it", location.uri(), {"hybrid": tiny_config("hybrid")})


def test_a_config_that_joins_a_search_takes_its_text_and_samples(tmp_path: Path) -> None:
    base = tiny_config("hybrid", data="text.txt", steps=400)
    other = override(
        preset("paper-ptb", "hybrid"),
        {"objective.end": 0.4, "seed": 7, "model.feature_maps": [8, 16], "model.decoder_maps": [16, 8]},
    )
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(other)))
    start = read_warm_start(str(file), str(file), {"hybrid": base})
    assert start.reference == str(file)
    found = start.config
    for name in ("data", "data_path", "steps", "log_every", "evaluate_every", "evaluate_samples", "checkpoint_every",
                 "length", "sampling"):  # fmt: skip
        assert getattr(found, name) == getattr(base, name)
    for name in ("model", "objective", "optimizer", "batch_size", "group_size", "seed"):
        assert getattr(found, name) == getattr(other, name)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the config"),
        ("{}", "model.name must be one of"),
        (json.dumps(to_dict(tiny_config("lstm_vae"))), "is a config of lstm_vae; searched: hybrid"),
        (
            json.dumps(to_dict(override(preset("paper-tweets", "hybrid"), {"length": 128}))),
            "need a length of at least 32, not 24",
        ),
    ],
)
def test_a_config_that_cannot_join_is_one_line(tmp_path: Path, content: str | None, words: str) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        read_warm_start(str(file), str(file), {"hybrid": tiny_config("hybrid")})
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"--warm-start: .*does not exist"):
        read_warm_start("it", str(tmp_path / "nowhere"), {"hybrid": tiny_config("hybrid")})


# ------------------------------------------------------------------------------------------------ plan

INSIDE = override(tiny_config("hybrid"), {"objective.annealing": "constant", "objective.alpha": 0.75})
OUTSIDE = override(tiny_config("hybrid"), {"optimizer.clip": 3.0})
IN = WarmStart(reference="in.json", config=INSIDE, params={"alpha": 0.75, "annealing": "constant"})
OUT = WarmStart(reference="out.json", config=OUTSIDE, params={"alpha": 0.75, "annealing": "constant"})


def test_what_is_looked_for_and_started_from_is_part_of_the_plan(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    plan = a_plan(
        objective="nll",
        min_used=1.5,
        warm_starts=(
            WarmStart(reference="a.json", config=INSIDE, params={"alpha": 0.75}),
            WarmStart(reference="models:/x@champion", config=OUTSIDE),
        ),
    )
    storage.write(PLAN, plan.to_json())
    found = read_plan(storage)
    assert found is not None
    assert (found.search_objective, found.warm_starts) == (SearchObjective("nll", 1.5), plan.warm_starts)
    assert plan.differences(found) == []
    assert "objective was nll, is bound" in replace(plan, objective="bound").differences(found)
    assert "min_used was 1.5, is 2.0" in replace(plan, min_used=2.0).differences(found)
    assert "it started from other configs" in replace(plan, warm_starts=plan.warm_starts[:1]).differences(found)
    renamed = (replace(plan.warm_starts[0], reference="b.json"), plan.warm_starts[1])
    assert replace(plan, warm_starts=renamed).differences(found) == []
    assert search_objective_of(json.loads(plan.to_json())) == plan.search_objective


def test_a_plan_of_before_looks_for_the_bound(tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    values = json.loads(a_plan().to_json())
    for name in ("objective", "min_used", "warm_starts"):
        del values[name]
    storage.write(PLAN, json.dumps(values).encode())
    found = read_plan(storage)
    assert found is not None
    assert (found.search_objective, found.warm_starts) == (SearchObjective(), ())


# ------------------------------------------------------------------------------------------- proposals


@dataclass(frozen=True)
class FakeRun(Run):
    """A run of a store that is not there."""

    def log_dataset(self, *_: Any) -> None:
        """Nothing is kept."""


class FakeExperiment:
    """Makes runs and keeps their tags."""

    name, experiment_id = "raytrain", "1"

    def __init__(self) -> None:
        self.tags: list[dict[str, str]] = []

    def deleted_run(self, identity: str, parent: str | None = None) -> None:
        """Nothing is deleted."""

    def running(self, parent: str) -> dict[str, str]:
        return {}

    def open_run(self, identity: str, name: str, **values: Any) -> FakeRun:
        self.tags.append(values["tags"])
        return FakeRun("sqlite:///nowhere", "0", f"run-{identity}", 0)


def searcher(plan: Plan, corpus: Corpus, folder: Path) -> OptunaSearcher:
    """The proposals of a search as they are when it is begun or resumed."""
    workspace = Workspace(open_storage(folder), corpus, "sqlite:///nowhere")
    fake: Any = FakeExperiment()
    lease = Lease(workspace.storage.child("s"), 1, Holder.here())
    search = Search("s", plan, workspace, lease, fake, FakeRun("", "0", "parent", 0), WorkerSpec(1, 1, 0), 1, None, ())
    records = TrialStore(search.location)
    return OptunaSearcher(search, records, records.read(), Halving(20, plan.search_objective))


def end(found: OptunaSearcher, trial: Trial, best: dict[str, float], status: Any = "finished") -> None:
    trial.best, trial.status = best, status
    found.ended(trial)
    found.records.add(trial)


def test_a_search_begins_with_what_it_starts_from(corpus: Corpus, tmp_path: Path) -> None:
    plan = a_plan(warm_starts=(OUT, IN), objective="nll")
    first = searcher(plan, corpus, tmp_path)
    jobs = [first.suggest(str(number))["job"] for number in range(3)]
    assert [job["config"] for job in jobs[:2]] == [to_dict(OUTSIDE), to_dict(INSIDE)]
    assert [trial.origin for trial in first.trials] == ["out.json", "in.json", ""]
    assert [trial.params for trial in first.trials[:2]] == [{}, {"alpha": 0.75, "annealing": "constant"}]
    assert [tags.get("started_from") for tags in first.search.experiment.tags] == ["out.json", "in.json", None]  # type: ignore[attr-defined]
    assert {job["draws"] for job in jobs} == {SearchObjective("nll").draws} != {0}
    baseline = validation_ladder(corpus, OUTSIDE).bits[2]
    assert {job["baseline"] for job in jobs} == {trial.baseline for trial in first.trials} == {baseline}
    end(first, first.trials[0], figures(2.0, 1.0) | {LIKELIHOOD: 1.9})
    first.on_trial_result("1", {"step": 10, **figures(2.2), LIKELIHOOD: 2.1})
    end(first, first.trials[1], figures(2.2, 1.0) | {LIKELIHOOD: 2.1})
    # Optuna knows the one that is a point of the space, and nothing of the other
    assert [trial.value for trial in first.study.trials] == [2.1, None]

    # the machine dies while the third is running: it is the next, and no start is run again
    second = searcher(plan, corpus, tmp_path)
    job = second.suggest("again")["job"]
    assert job["config"] == jobs[2]["config"]
    assert [trial.value for trial in second.study.trials] == [2.1, None]
    assert second.suggest("new")["job"]["config"] not in [job["config"] for job in jobs]
    assert [trial.origin for trial in second.trials] == ["out.json", "in.json", "", ""]


def test_an_evaluation_that_a_trial_repeats_after_its_process_died_is_reported_once(
    corpus: Corpus, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    found = searcher(a_plan(), corpus, tmp_path)
    found.suggest("0")
    for step, bits in ((5, 2.5), (10, 2.4), (5, 2.5), (10, 2.4), (15, 2.3)):
        found.on_trial_result("0", {"step": step, **figures(bits)})
    (point,) = found.study.trials
    assert list(point.intermediate_values) == [5, 10, 15]
    assert [str(each.message) for each in recwarn if "already reported" in str(each.message)] == []


def test_a_resumed_search_stops_trials_by_the_figure_that_it_began_with(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = searcher(a_plan(), corpus, tmp_path).suggest("0")["job"]["baseline"]
    # whatever measures ladders now
    monkeypatch.setattr(ladder, "FILE", "another.json")
    monkeypatch.setattr(ladder, "measure_ngrams", lambda *_: ((9.0,) * 8, 1))
    resumed = searcher(a_plan(), corpus, tmp_path)
    assert [resumed.suggest(number)["job"]["baseline"] for number in "01"] == [begun, begun]
    assert [trial.baseline for trial in TrialStore(resumed.search.location).read()] == [begun, begun]
    # other samples have another
    longer = searcher(a_plan(bases={"hybrid": tiny_config("hybrid", length=32)}), corpus, tmp_path / "longer")
    assert longer.suggest("0")["job"]["baseline"] == 9.0


def test_a_start_that_was_interrupted_goes_on_without_a_point(corpus: Corpus, tmp_path: Path) -> None:
    plan = a_plan(warm_starts=(OUT, IN))
    first = searcher(plan, corpus, tmp_path)
    first.suggest("0")
    second = searcher(plan, corpus, tmp_path)
    assert second.suggest("0")["job"]["config"] == to_dict(OUTSIDE)
    second.on_trial_result("0", {"step": 10, **figures(2.2)})
    assert second.suggest("1")["job"]["config"] == to_dict(INSIDE)
    end(second, second.trials[0], figures(2.0))
    assert len(second.study.trials) == 1


def test_a_config_without_recorded_parameters_is_tried_and_no_point_of_the_space(
    corpus: Corpus, tmp_path: Path
) -> None:
    plan = a_plan(warm_starts=(replace(IN, params=None),))
    found = searcher(plan, corpus, tmp_path)
    assert found.suggest("0")["job"]["config"] == to_dict(INSIDE)
    assert (found.trials[0].params, found.trials[0].on_the_space) == ({}, False)
    end(found, found.trials[0], figures(2.0))
    assert found.study.trials == []


def test_a_grid_is_whole_behind_what_it_starts_from(corpus: Corpus, tmp_path: Path) -> None:
    space = read_space("g", "def space(trial):\n    return {'seed': trial.suggest_int('s', 1, 3)}\n")
    plan = a_plan(space=space, algorithm="grid", warm_starts=(OUT,))
    found = searcher(plan, corpus, tmp_path)
    seeds = [found.suggest(str(number))["job"]["config"]["seed"] for number in range(4)]
    assert seeds == [0, 1, 2, 3]


def test_a_search_for_a_front_tells_optuna_both_figures(corpus: Corpus, tmp_path: Path) -> None:
    found = searcher(a_plan(objective="pareto"), corpus, tmp_path)
    for number, (bits, kl) in enumerate([(2.0, 0.0), (2.5, 4.0), (2.6, 3.0)]):
        found.suggest(str(number))
        found.on_trial_result(str(number), {"step": 10, **figures(bits, kl)})
        end(found, found.trials[number], figures(bits, kl))
    found.suggest("bad")
    end(found, found.trials[3], {}, "early_stopped")
    assert [trial.number for trial in found.study.best_trials] == [0, 1]
    assert found.study.trials[3].state == optuna.trial.TrialState.FAIL


def test_a_point_that_diverged_is_a_poor_one_and_one_that_failed_says_nothing(corpus: Corpus, tmp_path: Path) -> None:
    found = searcher(a_plan(), corpus, tmp_path)
    for number, status in enumerate(("early_stopped", "failed")):
        found.suggest(str(number))
        end(found, found.trials[number], {}, status)
    states = optuna.trial.TrialState
    assert [trial.state for trial in found.study.trials] == [states.PRUNED, states.FAIL]
    found.suggest("next")


def test_an_interrupted_trial_is_not_told_to_optuna(corpus: Corpus, tmp_path: Path) -> None:
    found = searcher(a_plan(), corpus, tmp_path)
    found.suggest("0")
    end(found, found.trials[0], figures(2.0), "interrupted")
    assert found.study.trials[0].state == optuna.trial.TrialState.RUNNING


# ------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hybrid", "--search-objective", "kl"], "--search-objective is 'kl': must be one of bound, nll, pareto"),
        (["hybrid", "--min-used", "-1"], "--min-used is -1: give nats of at least 0"),
        (["hybrid", "--min-used", "nan"], "--min-used is nan: give nats of at least 0"),
        (["byte_lstm", "--min-used", "2"], "--min-used 2: byte_lstm has no latent code"),
        (
            ["byte_lstm", "--search-objective", "pareto"],
            "--search-objective pareto: byte_lstm has no latent code",
        ),
        (["hybrid", "--data", "text.txt", "--warm-start", "a.json"], "cannot read the config a.json"),
        (
            ["hybrid", "--data", "text.txt", "--warm-start", "gone"],
            "--warm-start gone: there is no such search in",
        ),
        (["hybrid", "--data", "text.txt", "--warm-start", "./gone"], "--warm-start: "),
    ],
)
def test_a_mistake_in_what_is_looked_for_is_one_line(
    refused: Callable[..., str], arguments: list[str], line: str
) -> None:
    assert line in refused("tune", *arguments)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--best-of", "gone"], "--best-of gone: there is no such search in"),
        (["--best-of", "gone", "--steps", "30"], "--best-of gone: there is no such search in"),
        (["--resume", "gone", "--best-of", "gone"], "--resume gone: there is no such run"),
    ],
)
def test_a_mistake_in_what_is_built_upon_is_one_line(
    refused: Callable[..., str], arguments: list[str], line: str
) -> None:
    assert line in refused("train", *arguments)


def test_what_is_looked_for_and_the_fields_of_the_objective_are_told_apart() -> None:
    arguments = [
        "--search-objective",
        "pareto",
        "--objective.alpha",
        "0.3",
        "--min-used",
        "2",
        "--warm-start",
        "a",
        "b",
    ]
    options, config = parse_fields("raytrain.tune", SearchOptions(), tiny_config("hybrid"), arguments)
    assert (options.search_objective, options.min_used, options.warm_start) == ("pareto", 2.0, ("a", "b"))
    assert config.objective.alpha == 0.3
    options, config = parse_fields("raytrain.tune", SearchOptions(), tiny_config("hybrid"), ["--objective.end", "0.4"])
    assert (options.search_objective, config.objective.end) == ("bound", 0.4)
