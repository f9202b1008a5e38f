"""Optuna's study of a search as any reader opens it, held against the records of the search."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from raytrain.metrics import SearchObjective
from raytrain.runs.repeats import searched, winner
from raytrain.runs.trials import Trial


def opened(path: Path) -> optuna.Study:
    """Return the study, as any reader opens it."""
    return optuna.load_study(study_name=None, storage=JournalStorage(JournalFileBackend(str(path))))


STATES = {
    "waiting": TrialState.WAITING,
    "running": TrialState.RUNNING,
    "interrupted": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "stopped": TrialState.COMPLETE,
    "early_stopped": TrialState.COMPLETE,
    "failed": TrialState.FAIL,
}


def check_agreement(study: optuna.Study, trials: list[Trial], search_objective: SearchObjective) -> None:
    """Every trial of the search is in the study, in order, with its point, state, values, constraints and reports."""
    own = searched(trials)
    known = [point for point in study.trials if "search" in point.user_attrs]  # of earlier searches
    points = {
        point.user_attrs["identity"]: point
        for point in study.trials
        if "identity" in point.user_attrs and point not in known
    }
    assert list(points) == [trial.identity for trial in own]
    assert len(study.directions) == len(search_objective.directions)
    for trial in own:
        point = points[trial.identity]
        assert point.params == (trial.params if trial.distributions else {})
        assert point.user_attrs["status"] == trial.status
        assert point.user_attrs["trial"] == trial.name
        assert point.state == (STATES[trial.status] if trial.best or trial.status != "early_stopped" else
                               TrialState.PRUNED)  # fmt: skip
        if point.state == TrialState.COMPLETE:
            assert point.values == search_objective.values(trial.best)
            assert list(point.constraints.values()) == list(search_objective.constraints(trial.best).values())
            assert point.user_attrs["kl"] == trial.best["kl"]
        if len(study.directions) == 1:
            reports = {entry["step"]: entry[search_objective.metric] for entry in trial.history}
            assert point.intermediate_values == reports
    best = winner(trials, search_objective)
    if best is not None and best.ended and not known and len(study.directions) == 1:
        assert study.best_value == best.best[search_objective.metric]
        assert study.best_trial.user_attrs["trial"] == best.name
