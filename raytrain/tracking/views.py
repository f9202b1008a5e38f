"""Views of the runs table: which columns it has and how it is sorted, kept in MLflow under a name and a link."""

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
"""Tag of an experiment: the view that MLflow's page keeps under "Views", by its key (MLflow 3.17)."""
BEST = f"metrics.`best/{METRIC}`"
FIRST = ("attributes.`Run Name`", "attributes.`Created`")
"""Columns that are always there."""
MAX_PARAMETERS = 12
"""More would not fit beside each other, nor (5,000 characters) in a tag of an experiment."""


def share_view(search: Run, name: str, metrics: Sequence[str], parameters: Sequence[str]) -> str:
    """Keep a view of a search's trials, best first, and return how to see it, as ``Run.ui_hint`` does.

    Doing it again replaces the view.

    Args:
        name: what MLflow's page calls the view.
        metrics: keys of the metrics that have a column.
        parameters: names of the parameters that have a column, after those of the metrics; the first
            ``MAX_PARAMETERS`` of them.
    """
    now = time.time_ns() // 1_000_000
    value = {"name": name, "createdAt": now, "updatedAt": now, "state": json.dumps(_state(search, metrics, parameters))}
    client = connect(search.uri)
    retry_tracking(lambda: client.set_experiment_tag(search.experiment_id, VIEW + search.run_id, json.dumps(value)))
    return f"{ui_hint(search.uri, search.experiment_id)}&viewStateShareKey={search.run_id}"


def _state(search: Run, metrics: Sequence[str], parameters: Sequence[str]) -> dict[str, Any]:
    """Return what MLflow's page remembers of a table; what is not named has the page's own default."""
    columns = [f"metrics.`best/{key}`" for key in metrics]
    columns += [f"params.`{name}`" for name in parameters[:MAX_PARAMETERS]]
    return {
        # sorted by a metric, the page does not nest: the search itself and other searches' trials would be among them
        "searchFilter": f"tags.`{PARENT}` = '{search.run_id}'",
        "orderByKey": BEST,
        "orderByAsc": True,
        "selectedColumns": columns,
        "columnOrder": [*FIRST, *columns],
        "columnWidths": {column: 6 * len(column) for column in columns},  # pixels: enough for its name
    }
