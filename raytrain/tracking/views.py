"""Views of the table of runs: its columns and sort order, kept in MLflow under a name and a link."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raytrain.metrics import METRIC
from raytrain.tracking.client import connect, retry_tracking, ui_hint
from raytrain.tracking.runs import PARENT

if TYPE_CHECKING:
    from raytrain.tracking.runs import Run

VIEW = "mlflow.sharedViewState."
"""Tag of an experiment that holds a view listed under "Views" on MLflow's page, by its key (MLflow 3.17)."""
BEST = f"metrics.`best/{METRIC}`"
FIRST = ("attributes.`Run Name`", "attributes.`Created`")
"""Columns that are always shown."""
MAX_PARAMETERS = 12
"""Most columns of parameters: more would not fit side by side, nor in an experiment's tag (5,000 characters)."""


def share_view(search: Run, name: str, metrics: Sequence[str], parameters: Sequence[str]) -> str:
    """Save a view of a search's trials, best first, and return how to open it, as ``Run.ui_hint`` does.

    Calling it again replaces the view.

    Args:
        search: MLflow run of the search.
        name: name of the view on MLflow's page.
        metrics: keys of the metrics that have a column.
        parameters: names of the parameters that have a column, after those of the metrics; only the first
            ``MAX_PARAMETERS`` are used.
    """
    now = time.time_ns() // 1_000_000
    value = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(_state(search, metrics, parameters))}
    client = connect(search.uri)
    retry_tracking(lambda: client.set_experiment_tag(search.experiment_id, VIEW + search.run_id, json.dumps(value)))
    return f"{ui_hint(search.uri, search.experiment_id)}&viewStateShareKey={search.run_id}"


def _state(search: Run, metrics: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
    """Return the state that MLflow's page saves for a table; anything unnamed keeps the page's default."""
    columns = [f"metrics.`best/{key}`" for key in metrics]
    columns += [f"params.`{name}`" for name in parameters[:MAX_PARAMETERS]]
    return {
        # sorted by a metric, the page does not nest runs, so it would mix in the search and other searches' trials
        "searchFilter": f"tags.`{PARENT}` = '{search.run_id}'",
        "orderByKey": BEST,
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": [*FIRST, *columns],
        "columnWidths": {column: 6 * len(column) for column in columns},  # pixels: wide enough for its name
    }
