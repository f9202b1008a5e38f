"""What is registered of a search: the figures are those of the checkpoint, whatever the record of its trial says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from raytrain.analysis.figures.records import read_trials
from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC, SearchObjective
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import CHECKPOINTS
from raytrain.search import finish
from raytrain.search.finish import best_checkpoint, write_table
from raytrain.utils.errors import UserError
from tests.unit.search.test_search_objective import a_plan, a_trial, figures, searcher


def test_the_figures_of_the_best_model_are_those_of_its_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    """Of a better evaluation only the record is left: its checkpoint was lost."""
    found = searcher(a_plan(), corpus, tmp_path)
    found.suggest("0")
    (trial,) = found.trials
    trial.best = figures(1.5, kl=1.0)
    evaluations = [{"step": 10, **figures(1.5, kl=1.0)}, {"step": 20, **figures(1.75, kl=2.0)}]
    with CheckpointWriter(found.location(trial).child(CHECKPOINTS)) as writer:
        state = {"evaluations": evaluations, "best": evaluations[0], "best_step": 10}
        writer.save(Snapshot(20, {"model": {}}, state, to_dict(trial.config)), score=figures(1.75)["bound"])
    best = best_checkpoint(found.search, found.trials)
    assert best is not None
    assert (best[0].best, best[1].step) == (figures(1.75, kl=2.0), 20)
    assert best[0].identity == trial.identity


def test_the_table_of_trials_has_the_curve_of_each(tmp_path: Path) -> None:
    """As the record has it; a language model has no use of a code."""
    first, second, third = a_trial(0, figures(1.5)), a_trial(1, figures(2.0)), a_trial(2, {})
    first.history = [
        {"step": 10, METRIC: 2.0, "kl": 1.0, "used": 0.5},
        {"step": 20, METRIC: 1.5, "kl": 2.0, "used": 1.0},
    ]
    second.history = [{"step": 10, METRIC: 2.0, "kl": 0.0, "comparable_step": 10}]
    write_table([first, second, third], SearchObjective(), tmp_path / "trials.parquet")
    assert [row.curves for row in read_trials(tmp_path / "trials.parquet")] == [
        {METRIC: [(10, 2.0), (20, 1.5)], "kl": [(10, 1.0), (20, 2.0)], "used": [(10, 0.5), (20, 1.0)]},
        {METRIC: [(10, 2.0)], "kl": [(10, 0.0)]},
        {},
    ]


@pytest.mark.parametrize("failing", ["best_checkpoint", "register"])
@pytest.mark.parametrize("away", [False, True])
def test_a_search_whose_model_is_not_registered_has_a_report_and_says_why(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, away: bool
) -> None:
    found = searcher(a_plan(), corpus, tmp_path)
    parent: Any = SimpleNamespace(**dict.fromkeys(("set_tags", "log_file", "log_text", "log_dict"), lambda *_: None))
    search, trials = replace(found.search, parent=parent), [a_trial(0, figures(1.5, kl=1.0))]
    stored: Any = None
    results = {"best_checkpoint": (trials[0], stored), "print_best": [], "model_card": ""}
    for name, result in results.items():
        monkeypatch.setattr(finish, name, lambda *_, result=result: result)

    def fail(*_: Any) -> None:
        raise UserError("the real one")

    reported: list[bool] = []

    def log_report(search: Any) -> None:
        reported.append(True)
        if away:
            raise MlflowException("nobody answers")

    monkeypatch.setattr(finish, failing, fail)
    monkeypatch.setattr(finish, "log_report", log_report)
    with pytest.raises(UserError, match="the real one"):
        finish.finish(search, trials, 1.0)
    assert reported == [True]
