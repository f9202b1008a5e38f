"""Earlier searches: which of their results a new one knows, what its sampler makes of them, and what is said."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from raytrain.config.schema import override
from raytrain.data.corpus import Corpus
from raytrain.metrics import LIKELIHOOD, METRIC
from raytrain.models import num_parameters
from raytrain.runs.records import PLAN, STUDY
from raytrain.runs.trials import Trial, TrialStore
from raytrain.runs.workspace import Workspace
from raytrain.search.earlier import NewSearch, WarmStarts, read_references
from raytrain.search.plan import Plan, read_plan
from raytrain.search.setup import known_or_new, stored_plan
from raytrain.search.space import read_space
from raytrain.storage.local import FolderStorage
from raytrain.tracking.runs import Experiment
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.stored_study import check_agreement, opened
from tests.unit.search.test_search_objective import (
    a_plan,
    a_trial,
    checkpointed,
    end,
    figures,
    searcher,
)
from tests.unit.search.test_study import Driven


def quality(params: dict[str, Any]) -> float:
    """A quadratic toy objective in bits per byte, with its best point in the branch "linear"."""
    branch = (params["end"] - 0.3) ** 2 if params["annealing"] == "linear" else 0.3
    return float(2.0 + (params["alpha"] - 0.8) ** 2 + branch)


def drawn(plan: Plan, number: int, **changes: Any) -> Trial:
    """A trial that has ended, at a random point of the space of ``plan``."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    point = study.ask()
    config = plan.space.resolve(plan.bases, point, plan.budget)
    kinds = {name: optuna.distributions.distribution_to_json(kind) for name, kind in point.distributions.items()}
    bits = quality(point.params) if "annealing" in point.params else 2.0
    best = figures(bits, 4 * point.params["alpha"]) | {LIKELIHOOD: bits - 0.1}
    given: dict[str, Any] = {"config": config, "params": point.params, "distributions": kinds, "best": best}
    return replace(a_trial(number), identity=f"{plan.identity}-{number}", **{**given, **changes})


def recorded(storage: FolderStorage, name: str, plan: Plan, trials: Sequence[Trial]) -> FolderStorage:
    """Leave an earlier search in the storage."""
    location = storage.child(name)
    location.write(PLAN, plan.to_json())
    records = TrialStore(location)
    for trial in trials:
        records.add(trial)
    records.close()
    return location


def new_search(plan: Plan) -> NewSearch:
    return NewSearch(
        space=plan.space, bases=plan.bases, budget=plan.budget, algorithm=plan.algorithm,
        search_objective=plan.search_objective, corpus=plan.corpus, max_parameters=plan.max_parameters,
    )  # fmt: skip


def read(plan: Plan, storage: FolderStorage, *references: str) -> WarmStarts:
    return read_references(references, new_search(plan), storage)


def knowing(plan: Plan, storage: FolderStorage, *references: str) -> Plan:
    found = read(plan, storage, *references)
    return replace(plan, earlier=found.earlier, warm_starts=found.starts)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderStorage:
    """A storage in the working directory, where no MLflow store is yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return FolderStorage(tmp_path / "runs")


# ------------------------------------------------------------------------------------- which are known


def test_each_reason_is_counted_in_one_line(storage: FolderStorage) -> None:
    plan = a_plan()
    wide = replace(plan, space=read_space("wide", plan.space.source.replace("0.0, 1.0", "1.5, 2.0")))
    longer = {"hybrid": tiny_config("hybrid", steps=48)}
    others = {"hybrid": tiny_config("hybrid", evaluate_samples=16)}
    clipped = {"hybrid": override(tiny_config("hybrid"), {"optimizer.clip": 3.0})}
    trials = [
        *(drawn(plan, number) for number in range(4)),
        drawn(plan, 4, status="stopped"),
        drawn(plan, 5, status="early_stopped", best={}),
        drawn(plan, 6, status="failed", best={}),
        *(drawn(plan, number, status="running") for number in (7, 8)),
        *(drawn(replace(plan, bases=longer), number) for number in (9, 10)),
        drawn(replace(plan, bases=others), 11),
        drawn(replace(plan, bases=clipped), 12),
        drawn(wide, 13),
        drawn(plan, 14, distributions={}, params={}, origin="a.json"),
        drawn(plan, 15, confirms=0),
    ]
    recorded(storage, "first", plan, trials)
    found = read(plan, storage, "first")
    (earlier,) = found.earlier
    steps = tiny_config("hybrid").steps
    samples = tiny_config("hybrid").evaluate_samples
    assert earlier.note == (
        "6 of 15 trials of first are known to the sampler; 1 has no result; 2 have not ended; "
        f"2 have other steps (48, here {steps}); 1 has other validation samples (evaluate_samples 16, here {samples}); "
        "1 has other settings (optimizer.clip was 3.0, is 10.0); "
        f"1 lies outside this space (alpha {trials[13].params['alpha']}); 1 was no point of its space"
    )
    assert [trial.number for trial in earlier.trials] == list(range(6))
    assert found.starts == ()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"corpus": "f" * 16}, "have another corpus (0123456789ab, here ffffffffffff)"),
        ({"objective": "pareto"}, "have another search objective (bound, here pareto)"),
        ({"algorithm": "random"}, "are of no use to the algorithm random"),
        ({"bases": {"lstm_vae": tiny_config("lstm_vae")}}, "are of another model (hybrid)"),
        ({"max_parameters": 100}, "have more parameters (than 100)"),
        ({"space": read_space("other", "def space(trial):\n    return {'seed': trial.suggest_int('s', 1, 3)}\n")},
         "lie outside this space (it has no s)"),
    ],
)  # fmt: skip
def test_nothing_is_known_of_a_search_that_cannot_be_compared(
    changes: dict[str, Any], reason: str, storage: FolderStorage
) -> None:
    plan = a_plan()
    recorded(storage, "first", plan, [drawn(plan, number) for number in range(3)])
    with pytest.raises(UserError) as refused:  # no trial has a checkpoint, either
        read(replace(plan, **changes), storage, "first")
    assert str(refused.value) == (
        f"--warm-start first: 0 of 3 trials of first are known to the sampler; 3 {reason}: its best has left no "
        "checkpoint to train anew"
    )


def test_the_winner_of_a_search_that_cannot_be_compared_is_trained_anew(storage: FolderStorage) -> None:
    plan = a_plan()
    trials = [drawn(plan, number) for number in range(3)]
    location = recorded(storage, "first", plan, trials)
    best = min(trials, key=lambda trial: trial.best[METRIC])
    checkpointed(TrialStore(location).location(best.identity), best.config)
    longer = replace(plan, bases={"hybrid": tiny_config("hybrid", steps=48)})
    found = read(longer, storage, "first")
    (start,) = found.starts
    assert (start.reference, start.params) == ("first", best.params)
    assert start.config == replace(best.config, steps=48)
    assert found.earlier[0].trials == ()
    assert found.earlier[0].note.startswith("0 of 3 trials of first are known to the sampler; 3 have other steps")
    # where anything is known, nothing is trained again
    assert read(plan, storage, "first").starts == ()


def test_a_trial_of_other_seeds_and_intervals_is_comparable(storage: FolderStorage) -> None:
    plan = a_plan(bases={"hybrid": tiny_config("hybrid", seed=9, checkpoint_every=7, data="elsewhere")})
    recorded(storage, "first", plan, [drawn(plan, 0)])
    assert len(read(a_plan(), storage, "first").earlier[0].trials) == 1


# --------------------------------------------------------------------------------- how they are named


def test_a_search_is_named_by_name_folder_file_or_experiment(storage: FolderStorage) -> None:
    plan, uri = a_plan(), f"sqlite:///{Path('mlflow.db').absolute()}"
    experiment = Experiment.open(uri, "bios", str(Path("artifacts").absolute()))
    for index, name in enumerate(("first", "second", "gone")):
        own = replace(plan, identity=f"{index}" * 16)
        location = recorded(storage, name, own, [drawn(own, 10 * index + number) for number in range(2)])
        tags = {"kind": "search", "location": location.uri()}
        experiment.open_run(own.identity, name, config={}, parameters={}, tags=tags)
    shutil.rmtree(storage.uri("gone"))
    folder = storage.uri("first")
    for reference in ("first", "runs/first", folder, f"{folder}/", f"runs/first/{PLAN}", f"{folder}/{STUDY}"):
        found = read(plan, storage, reference)
        assert [(each.name, each.reference, len(each.trials)) for each in found.earlier] == [("first", reference, 2)]
    all_of_it = read(plan, storage, "bios")
    assert {(each.name, each.reference, len(each.trials)) for each in all_of_it.earlier} == {
        ("first", "bios", 2), ("second", "bios", 2),
    }  # fmt: skip
    # what two references name is known once
    twice = read(plan, storage, "first", "bios")
    assert sum(len(each.trials) for each in twice.earlier) == 4
    assert "0 of 2 trials of first are known to the sampler; 2 are known already" in [
        each.note for each in twice.earlier
    ]
    # and what is known can be compared: it needs no second training, though nothing of it was new
    assert read(plan, storage, "first", "first").starts == ()


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("gone", r"--warm-start gone: there is no such search in .*, no such folder, and no such experiment in MLflow"),
        ("runs/gone", r"--warm-start: .*runs/gone does not exist or is empty"),
        ("gone/search.json", r"cannot read the config gone/search.json"),
        ("broken", r"--warm-start broken: .*search.json is not a search's plan"),
        ("empty", r"--warm-start empty: 0 of 0 trials of empty are known to the sampler: its best has left no"),
        ("torn", r"--warm-start torn: .*trial.json is not the record of a trial"),
    ],
)
def test_what_names_nothing_is_one_line(reference: str, line: str, storage: FolderStorage) -> None:
    recorded(storage, "empty", a_plan(), [])
    recorded(storage, "torn", a_plan(), []).write("trials/x/trial.json", b"{}")
    storage.child("broken").write(PLAN, b"[")
    with pytest.raises(UserError, match=line) as refused:
        read(a_plan(), storage, reference)
    assert "\n" not in str(refused.value)


# -------------------------------------------------------------------------------- what the sampler does


def best_of(plan: Plan, corpus: Corpus, folder: Path) -> list[float]:
    """The values of the toy objective at what a search draws, one trial after the other."""
    found = searcher(plan, corpus, folder)
    values = []
    for number in range(4):
        found.suggest(str(number))
        trial = found.trials[number]
        values.append(quality(trial.params))
        end(found, trial, figures(values[-1], 4 * trial.params["alpha"]))
    return values


@pytest.mark.parametrize("algorithm", ["tpe", "gp"])
def test_a_sampler_that_knows_results_draws_better_points(
    algorithm: str, corpus: Corpus, storage: FolderStorage, tmp_path: Path
) -> None:
    plan = a_plan(num_samples=16, algorithm=algorithm)
    recorded(storage, "first", plan, [drawn(plan, number) for number in range(30)])
    gains = []
    for seed in range(3):
        new = replace(plan, seed=seed)
        without = best_of(new, corpus, tmp_path / f"without-{seed}")
        with_results = best_of(knowing(new, storage, "first"), corpus, tmp_path / f"with-{seed}")
        assert with_results != without
        gains.append(sum(without) - sum(with_results))
    assert all(gain > 0 for gain in gains), gains


def test_results_are_no_trials_of_the_search(corpus: Corpus, storage: FolderStorage, tmp_path: Path) -> None:
    plan = a_plan()
    recorded(storage, "first", plan, [drawn(plan, number) for number in range(6)])
    found = searcher(knowing(plan, storage, "first"), corpus, tmp_path)
    assert (len(found.study.trials), found.trials) == (6, [])
    found.suggest("0")
    assert [trial.number for trial in found.trials] == [0]
    assert len(TrialStore(found.search.location).read()) == 1


@pytest.mark.parametrize("changes", [{"min_used": 1.8}, {"objective": "pareto", "min_used": 1.0}, {"objective": "nll"}])
def test_results_count_by_the_objective_and_the_constraint_of_the_new_search(
    changes: dict[str, Any], corpus: Corpus, storage: FolderStorage, tmp_path: Path
) -> None:
    """The earlier search may have had another constraint."""
    plan = a_plan(**changes)
    trials = [*(drawn(plan, number) for number in range(5)), drawn(plan, 5, status="early_stopped", best={})]
    recorded(storage, "first", replace(plan, min_used=0.0), trials)
    found = searcher(knowing(plan, storage, "first"), corpus, tmp_path)
    objective = plan.search_objective
    known = found.study.trials
    pareto = objective.objective == "pareto"
    # Optuna prunes no trial with two values
    assert len(known) == (5 if pareto else 6)
    for point, trial in zip(known[:5], trials, strict=False):
        assert (point.state, point.values) == (TrialState.COMPLETE, objective.values(trial.best))
        assert point.constraints == objective.constraints(trial.best)
    assert pareto or known[5].state == TrialState.PRUNED
    for number in range(3):
        found.suggest(str(number))


def test_a_resumed_search_knows_what_the_undisturbed_one_knows(
    corpus: Corpus, storage: FolderStorage, tmp_path: Path
) -> None:
    """Whatever has become of the earlier search meanwhile."""
    plan = a_plan(min_used=1.0)
    recorded(storage, "first", plan, [drawn(plan, number) for number in range(8)])
    begun = knowing(plan, storage, "first")
    homes = [tmp_path / name for name in ("undisturbed", "resumed")]
    for home in homes:
        FolderStorage(home / "s").write(PLAN, begun.to_json())
    undisturbed = searcher(begun, corpus, homes[0])
    drawn_points = []
    for number in range(5):
        undisturbed.suggest(str(number))
        drawn_points.append(undisturbed.trials[number].params)
        end(undisturbed, undisturbed.trials[number], figures(quality(drawn_points[-1]), 2.0))

    first = searcher(begun, corpus, homes[1])
    for number in range(5):
        first.suggest(str(number))
        assert first.trials[number].params == drawn_points[number]
        if number < 4:
            end(first, first.trials[number], figures(quality(drawn_points[number]), 2.0))
    shutil.rmtree(storage.uri("first"))  # and the driver dies with the fifth trial at work
    stored = read_plan(FolderStorage(homes[1] / "s"))
    assert stored == replace(begun, space=stored.space if stored else begun.space)
    again = searcher(stored, corpus, homes[1])
    again.suggest("again")
    end(again, again.trials[4], figures(quality(drawn_points[4]), 2.0))

    def told(study: optuna.Study) -> list[Any]:
        points = [(each.params, each.distributions, each.state, each.values, each.constraints) for each in study.trials]
        return sorted(points, key=str)

    assert len(undisturbed.study.trials) == 13
    assert told(again.study) == told(undisturbed.study)
    # both go on as any other resumed search does
    drawn_next = [searcher(stored, corpus, home).suggest("next")["job"]["config"] for home in homes]
    assert drawn_next[0] == drawn_next[1]


def test_the_same_command_again_keeps_what_the_search_began_with(
    corpus: Corpus, storage: FolderStorage, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = a_plan()
    location = recorded(storage, "first", plan, [drawn(plan, number) for number in range(3)])
    begun = knowing(plan, storage, "first")
    storage.child("s").write(PLAN, begun.to_json())
    records = TrialStore(location)
    records.add(drawn(plan, 3))  # the earlier search has been given more trials
    records.close()
    now = knowing(plan, storage, "first")
    assert len(now.earlier[0].trials) == 4
    assert known_or_new("s", now, Workspace(storage, corpus, "")).earlier == begun.earlier
    found, options = stored_plan("s", storage.uri())
    assert found.earlier == begun.earlier
    assert options.warm_start == ("first",)
    recorded(storage, "second", replace(plan, identity="2" * 16), [drawn(plan, 9)])
    with pytest.raises(UserError, match=r"belongs to a search with other settings .it knows other searches"):
        known_or_new("s", knowing(plan, storage, "second"), Workspace(storage, corpus, ""))


@pytest.mark.parametrize("key", ["reference", "name", "note", "trials"])
def test_a_plan_whose_earlier_searches_are_damaged_is_one_line(key: str, storage: FolderStorage) -> None:
    plan = a_plan()
    recorded(storage, "first", plan, [drawn(plan, 0)])
    begun = knowing(plan, storage, "first")
    text = begun.to_json().replace(f'"{key}": '.encode(), f'"{key}s": '.encode())
    assert text != begun.to_json()
    storage.child("s").write(PLAN, text)
    with pytest.raises(UserError, match=r"search.json is not a search's plan") as refused:
        read_plan(storage.child("s"))
    assert "\n" not in str(refused.value)


def test_the_stored_study_has_them_first_and_says_whose_they_are(
    corpus: Corpus, storage: FolderStorage, tmp_path: Path
) -> None:
    plan = a_plan()
    known = [drawn(plan, number) for number in range(3)]
    recorded(storage, "first", plan, known)
    begun = knowing(plan, storage, "first")
    search = Driven(begun, corpus, tmp_path)
    search.start("0")
    search.report("0", 10, figures(2.5))
    search.stop("0")
    search.end()
    for _ in range(2):  # and again after it is resumed
        study = opened(Path(search.location.uri(STUDY)))
        check_agreement(study, TrialStore(search.found.search.location).read(), plan.search_objective)
        assert [point.user_attrs.get("search") for point in study.trials] == ["first"] * 3 + [None]
        assert [point.values for point in study.trials[:3]] == [[trial.best[METRIC]] for trial in known]
        assert [point.params for point in study.trials[:3]] == [trial.params for trial in known]
        Driven(begun, corpus, tmp_path).end()


def test_larger_models_than_are_allowed_are_not_known(storage: FolderStorage) -> None:
    source = "def space(trial):\n    return {'model.hidden': trial.suggest_categorical('hidden', [16, 32])}\n"
    plan = a_plan(space=read_space("sizes", source))
    trials = []
    for number, hidden in enumerate((16, 32)):
        config = override(tiny_config("hybrid"), {"model.hidden": hidden})
        kinds = {
            "hidden": optuna.distributions.distribution_to_json(optuna.distributions.CategoricalDistribution([16, 32]))
        }
        trials.append(
            replace(a_trial(number, figures(2.0)), config=config, params={"hidden": hidden}, distributions=kinds)
        )
    recorded(storage, "first", plan, trials)
    most = num_parameters(trials[0].config)
    (earlier,) = read(replace(plan, max_parameters=most), storage, "first").earlier
    assert [trial.params for trial in earlier.trials] == [{"hidden": 16}]
    assert earlier.note.endswith(f"1 has more parameters (than {most:,})")
