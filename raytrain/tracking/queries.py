"""Queries of MLflow about earlier runs: searches, their children, and the history of a metric."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.tracking.client import connect, retry_tracking, shown
from raytrain.tracking.runs import PARENT, Run
from raytrain.utils.errors import UserError

KIND = "raytrain.kind"
SPACE = "raytrain.space"
"""Tag of a search: the name of its search space."""
CORPUS = "raytrain.corpus"
"""Tag of a search and of a run: the digest of its corpus."""
CONFIRMS = "raytrain.confirms"
"""Tag of a trial that repeats the config of another with a new seed: the number of that trial."""
LOCATION = "raytrain.location"
"""Tag of a search and of a run: its location in the storage."""
PAGE = 500


@dataclass(frozen=True)
class Child:
    """A run as the store describes it."""

    run: Run
    name: str
    status: str
    """MLflow's status: RUNNING, FINISHED, FAILED or KILLED."""
    parameters: dict[str, str]
    """The flattened config, as text."""
    tags: dict[str, str]
    metrics: dict[str, float]
    """The latest value of each metric."""


def find_experiment(uri: str, name: str) -> str:
    """Return the id of experiment ``name``.

    Raises:
        UserError: there is none, or it was deleted.
    """
    client = connect(uri)
    found = retry_tracking(lambda: client.get_experiment_by_name(name))
    if found is None or found.lifecycle_stage == "deleted":
        known = sorted(
            experiment.name for experiment in retry_tracking(lambda: client.search_experiments(max_results=50))
        )
        raise UserError(f"--experiment {name}: {shown(uri)} has no such experiment; it has {', '.join(known)}")
    return str(found.experiment_id)


def searches(uri: str, experiment_id: str, *, name: str | None = None, space: str | None = None) -> list[Child]:
    """Return searches of an experiment, newest first: all, those named ``name``, or those of the search space.

    ``name`` may be the MLflow run id of a search.
    """
    for value in (name, space):
        if value is not None and not re.fullmatch(r"[\w.-]+", value):
            return []  # no search can have that name, and it could not be quoted
    condition = f"tags.`{KIND}` = 'search'"
    if name is not None:
        attribute = "run_id" if re.fullmatch("[0-9a-f]{32}", name) else "run_name"
        condition += f" AND attributes.{attribute} = '{name}'"
    if space is not None:
        condition += f" AND tags.`{SPACE}` = '{space}'"
    return list(_found(uri, experiment_id, condition, "attributes.start_time DESC"))


def find_search(uri: str, experiment: str, name: str) -> Child:
    """Return the newest search named ``name``; if there are others, print a note with their distinguishing run ids.

    Raises:
        UserError: there is no such experiment, or no such search in it.
    """
    experiment_id = find_experiment(uri, experiment)
    if found := searches(uri, experiment_id, name=name):
        if len(found) > 1:
            others = "; ".join(f"{each.run.run_id} in {each.tags.get(LOCATION, 'no place')}" for each in found[1:6])
            print(
                f"note: {len(found)} searches are called {name}: this is the newest, in "
                f"{found[0].tags.get(LOCATION, 'no place')}; name an earlier one by its run id: {others}",
                flush=True,
            )
        return found[0]
    known = list(dict.fromkeys(search.name for search in searches(uri, experiment_id)))[:10]
    there = f"its newest: {', '.join(known)}" if known else "it has no searches"
    raise UserError(f"experiment {experiment} has no search {name!r}; {there}")


def children(parent: Run) -> list[Child]:
    """Return the trials of a search, in order of creation."""
    condition = f"tags.`{PARENT}` = '{parent.run_id}'"
    return list(_found(parent.uri, parent.experiment_id, condition, "attributes.start_time ASC"))


def describe(run: Run) -> Child:
    """Return what the store holds about one run."""
    return _child(run.uri, retry_tracking(lambda: connect(run.uri).get_run(run.run_id)))


def history(run: Run, key: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a metric, by step; empty if the run has no such metric."""
    values = retry_tracking(lambda: connect(run.uri).get_metric_history(run.run_id, key))
    return sorted({metric.step: float(metric.value) for metric in values}.items())


def download(run: Run, name: str, folder: Path) -> Path | None:
    """Fetch the top-level artifact ``name`` into ``folder``; return ``None`` if there is none."""
    client = connect(run.uri)
    if name not in {entry.path for entry in retry_tracking(lambda: client.list_artifacts(run.run_id))}:
        return None
    return Path(retry_tracking(lambda: client.download_artifacts(run.run_id, name, str(folder))))


def _found(uri: str, experiment_id: str, condition: str, order: str) -> Iterator[Child]:
    client, token = connect(uri), None
    while True:
        page: Any = retry_tracking(
            lambda token=token: client.search_runs(  # type: ignore[misc]
                [experiment_id], condition, max_results=PAGE, order_by=[order], page_token=token
            )
        )
        yield from (_child(uri, found) for found in page)
        if not (token := page.token):
            return


def _child(uri: str, found: Any) -> Child:
    info, data = found.info, found.data
    run = Run(uri, info.experiment_id, info.run_id, info.start_time)
    return Child(run, info.run_name, info.status, dict(data.params), dict(data.tags), dict(data.metrics))
