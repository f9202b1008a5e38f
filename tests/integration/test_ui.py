"""What a user of a search sees in MLflow's own pages, looked at in a real browser."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from raytrain.analysis.search_report import write_search_report
from raytrain.cluster.resources import Cluster
from raytrain.config.schema import from_dict, override
from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC
from raytrain.runs.trials import Trial, TrialStore
from raytrain.runs.workspace import Workspace
from raytrain.search.algorithms import Halving
from raytrain.search.finish import finish
from raytrain.search.options import SearchOptions
from raytrain.search.plan import Plan
from raytrain.search.searcher import OptunaSearcher, Search
from raytrain.search.setup import admit
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.tracking.runs import Run
from raytrain.tracking.views import share_view
from raytrain.training.loop import train
from raytrain.training.trainer import World
from raytrain.training.worker import Job, final_samples
from tests.conftest import tiny_config
from tests.support import browser
from tests.support.browser import Shown
from tests.support.mlflow_server import MlflowServer, running_server

if TYPE_CHECKING:
    from playwright.sync_api import Page


NAME = "hybrid-example"
NUM_TRIALS = 3
STEPS = 30
SPACE = """
def space(trial):
    return {
        "objective.alpha": trial.suggest_float("alpha", 0.0, 0.5),
        "optimizer.learning_rate": trial.suggest_float("learning_rate", 1e-3, 8e-3, log=True),
    }
"""


class Logged:
    """What a worker says while it trains: metrics to MLflow, evaluations to the record of the trial."""

    def __init__(self, trial: Trial, run: Run) -> None:
        self.trial = trial
        self.writer = MetricWriter(run.uri, run.run_id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(step, metrics)

    def pending(self) -> list[Any]:
        return self.writer.pending()

    def replay(self, records: list[Any]) -> None:
        self.writer.replay(records)

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        """Nobody has missed any."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        self.trial.step = step
        self.trial.history.append({"step": step, METRIC: metrics[METRIC], "kl": metrics["kl"]})
        if not self.trial.best or metrics[METRIC] < self.trial.best[METRIC]:
            self.trial.best = metrics

    def preemption_notice(self) -> bool:
        return False


def fill(uri: str, corpus: Corpus, folder: Path) -> Search:
    """A search as the command leaves it, but for Ray: real trials, trained one after the other in this process."""
    base = override(tiny_config("hybrid", steps=STEPS, log_every=3, evaluate_every=3), {"objective.end": 0.3})
    plan = Plan(
        identity="0" * 16,
        space=read_space("hybrid", SPACE), bases={"hybrid": base}, budget=None, algorithm="tpe", corpus=corpus.digest,
        num_samples=NUM_TRIALS, seed=base.seed, workers={}, experiment="raytrain", corpus_path=str(corpus.path),
    )  # fmt: skip
    workspace = Workspace(open_storage(folder / "runs"), corpus, uri)
    search = admit(NAME, plan, workspace, Cluster(({"CPU": 2.0},)), SearchOptions(), "tests", 0)
    assert search is not None
    records = TrialStore(search.location)
    searcher = OptunaSearcher(search, records, [], Halving(base.steps, search.plan.search_objective))
    started = time.monotonic()
    for number in range(NUM_TRIALS):
        work(search, searcher, number)
    records.close()
    finish(search, searcher.trials, time.monotonic() - started)
    search.lease.release()
    write_search_report(search.parent, folder / "report")
    return search


def work(search: Search, searcher: OptunaSearcher, number: int) -> None:
    """Draw a trial and train it, as a worker does."""
    job = Job(**searcher.suggest(str(number))["job"])
    trial, run = searcher.trial(str(number)), Run(**job.tracking)
    report = Logged(trial, run)
    trial.started_at = time.time()
    train(
        from_dict(job.config), search.workspace.corpus, World(), open_storage(job.storage).child("checkpoints"), report
    )
    assert report.writer.close() == 0
    final_samples(job)
    trial.status, trial.ended_at = "finished", time.time()
    trial.seconds = trial.ended_at - trial.started_at
    run.finish("FINISHED")
    searcher.records.update(trial)
    searcher.on_trial_complete(str(number), {METRIC: trial.best[METRIC]})


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server of these tests' own: in the session's one another search may have a champion."""
    with running_server(tmp_path_factory.mktemp("mlflow_server")) as server:
        yield server


@pytest.fixture(scope="module")
def search(mlflow_server: MlflowServer, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Search:
    """A finished search of three trials, in a real server."""
    return fill(mlflow_server.uri, corpus, tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def shown(search: Search) -> Shown:
    """The same as MLflow knows it."""
    found = browser.find(search.parent.uri, "raytrain")
    assert found.search == (NAME, search.parent.run_id)
    assert len(found.trials) == NUM_TRIALS
    return found


@pytest.fixture(scope="module")
def trials(search: Search) -> list[Trial]:
    """Its trials by number."""
    return TrialStore(search.location).read()


@pytest.fixture
def picture(page: Page) -> Callable[[str], None]:
    """Keeps a picture of the page where RAYTRAIN_SCREENSHOTS names a folder."""

    def write(name: str) -> None:
        if folder := os.environ.get("RAYTRAIN_SCREENSHOTS"):
            browser.picture(page, Path(folder), name)

    return write


def test_the_runs_are_the_search_and_under_it_its_trials(
    page: Page, shown: Shown, search: Search, picture: Callable[[str], None]
) -> None:
    cells = browser.open_runs(page, shown)
    picture("runs")
    names = [cell.splitlines()[-1] for cell in cells if NAME in cell]
    assert names[0] == NAME
    assert sorted(names[1:]) == [f"{number:03} {NAME}" for number in range(NUM_TRIALS)]
    # the search names its corpus and the model that came of it
    assert any("synthetic" in cell and search.plan.corpus[:8] in cell for cell in cells)
    assert any("raytrain-hybrid" in cell for cell in cells)


def test_the_view_of_the_trials_has_the_best_first(
    page: Page, shown: Shown, search: Search, trials: list[Trial], picture: Callable[[str], None]
) -> None:
    parameters = ["objective.alpha", "optimizer.learning_rate"]
    metrics = ["bits_per_byte", "bound", "kl", "active_units"]
    link = share_view(search.parent, f"{NAME}: best trials first", metrics, parameters)
    names, columns = browser.open_trials(page, shown, link)
    picture("trials")
    ordered = sorted(trials, key=lambda trial: trial.best[METRIC])
    assert [trial.number for trial in ordered] != [2, 1, 0], "the newest first would look the same"
    assert names == [f"{trial.name} {NAME}" for trial in ordered]
    expected = [*(f"best/{key}" for key in metrics), *parameters]
    assert [column for column in columns if column in expected] == expected
    assert page.get_by_test_id("saved-views-trigger").inner_text() == f"{NAME}: best trials first"


def test_the_search_says_what_it_has_found(
    page: Page, shown: Shown, trials: list[Trial], picture: Callable[[str], None]
) -> None:
    description = browser.open_search(page, shown)
    picture("search")
    best = min(trials, key=lambda trial: trial.best[METRIC])
    assert f"All {NUM_TRIALS} trials, best first" in description
    assert f"Best trial {best.name}: negative ELBO {best.best[METRIC]:.3f} bits/byte" in description
    assert "models:/raytrain-hybrid@champion" in description
    # the table: every trial with its figures and what the space has set
    for trial in trials:
        assert f"{trial.best[METRIC]:.3f}" in description
        assert f"{trial.fields['objective.alpha']:.3g}" in description


def test_the_chart_of_a_trial_is_over_its_steps(page: Page, shown: Shown, picture: Callable[[str], None]) -> None:
    title, ticks = browser.open_chart(page, shown)
    picture("chart")
    assert title == "Step"
    assert {int(tick) for tick in ticks} >= {10, 20, STEPS}


def test_figures_and_samples_are_shown(page: Page, shown: Shown, picture: Callable[[str], None]) -> None:
    text = browser.open_text(page, shown, "samples.txt")
    logged = Path(MlflowClient(shown.uri).download_artifacts(shown.search[1], "samples.txt")).read_text()
    words = re.findall(r"[A-Za-z]{2,}", logged)
    assert words
    assert all(word in text for word in words)
    width, height = browser.open_image(page, shown, "report/best_so_far.png")
    picture("artifact")
    assert min(width, height) >= 300


def test_the_champion_has_its_card(
    page: Page, shown: Shown, trials: list[Trial], picture: Callable[[str], None]
) -> None:
    best = min(trials, key=lambda trial: trial.best[METRIC])
    assert shown.model == ("raytrain-hybrid", "1")
    assert "@ champion" in browser.open_model(page, shown)
    card = browser.open_version(page, shown)
    picture("model")
    assert "@ champion" in card
    assert NAME in card  # the search that it came from
    assert f"negative ELBO {best.best[METRIC]:.3f} bits/byte" in card
    assert "false or meaningless" in card
    assert f"optimizer.learning_rate: {best.fields['optimizer.learning_rate']}" in card
