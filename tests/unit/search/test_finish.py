"""What is registered of a search: the figures are those of the checkpoint, whatever the record of its trial says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from raytrain.analysis.figures.records import read_trials
from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC, SearchObjective
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import CHECKPOINTS
from raytrain.runs.repeats import Confirm
from raytrain.search import finish
from raytrain.search.finish import best_checkpoint, write_table
from raytrain.tracking.runs import Experiment
from raytrain.utils.errors import UserError
from tests.support.mlflow_server import new_store
from tests.unit.search.test_search_objective import a_plan, a_trial, end, figures, searcher


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


@pytest.mark.parametrize(
    ("num_samples", "confirm", "left"),
    [
        (1, Confirm(configs=1, seeds=2, first_seed=1000), "2 more have not begun"),
        (2, Confirm(configs=1, seeds=2, first_seed=1000), "1 more has not begun"),
        (2, None, "1 more has not begun"),
    ],
)
def test_a_time_budget_that_ends_between_two_trials_is_an_interruption(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_samples: int,
    confirm: Confirm | None,
    left: str,
) -> None:
    """Every trial that has begun has ended, but the search is not over: ``--resume`` begins the others."""
    found = searcher(a_plan(num_samples=num_samples, confirm=confirm, min_used=5.0 * (not confirm)), corpus, tmp_path)
    found.suggest("0")
    end(found, found.trials[0], figures(1.5, kl=1.0))
    monkeypatch.setattr(finish, "best_checkpoint", lambda search, trials: None)  # no trial may win

    uri = new_store(tmp_path)
    parent = Experiment.open(uri, "e", str(tmp_path / "artifacts")).open_run("s", "s", parameters={}, tags={})
    search = replace(found.search, parent=parent)
    finish.finish(search, found.trials, 1.0)
    run = MlflowClient(uri).get_run(parent.run_id)
    assert run.info.status == "KILLED"
    why = f"the time budget is used up: {left}"
    assert run.data.tags["raytrain.reason"] == f"{why}; go on with {search.resume_command}"
    assert f"T{why[1:]}. Go on with `{search.resume_command}`." in run.data.tags["mlflow.note.content"]
    printed = capsys.readouterr().out
    assert f"{why}\ngo on with: {search.resume_command}\n" in printed
    assert "try more trials" not in printed


def test_the_description_of_a_winner_says_that_the_search_goes_on(corpus: Corpus, tmp_path: Path) -> None:
    """A search without a confirmation has a winner also where its time was up."""
    search, trials = searcher(a_plan(num_samples=2), corpus, tmp_path).search, [a_trial(0, figures(1.5, kl=1.0))]
    ladder: Any = SimpleNamespace(comparison=lambda *_: "", warning=lambda *_: None)
    text = finish.description(search, trials, trials[0], ladder, "m", "#", 1.0)
    assert text.startswith(
        "The time budget is used up: 1 more has not begun. Go on with `python -m raytrain.tune --resume s"
    )
    both = [*trials, a_trial(1, figures(1.6, kl=1.0))]
    assert finish.description(search, both, trials[0], ladder, "m", "#", 1.0).startswith("Best trial 000")
