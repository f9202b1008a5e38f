"""Everything that is said to MLflow.

The driver opens an ``Experiment`` and, in it, one ``Run`` per identity; the run's address travels to
rank 0, whose ``MetricWriter`` is the only writer of its metrics. Nothing here imports MLflow (1.5 s)
before it is needed, uses MLflow's fluent API, or leaves state in it.
"""

from __future__ import annotations

from raytrain.tracking.host import SystemMetrics, code_tags, host_tags
from raytrain.tracking.model import log_model
from raytrain.tracking.runs import Experiment, Run
from raytrain.tracking.server import check_tracking, tracking_uri, ui_hint
from raytrain.tracking.writer import MetricWriter

__all__ = [
    "Experiment",
    "MetricWriter",
    "Run",
    "SystemMetrics",
    "check_tracking",
    "code_tags",
    "host_tags",
    "log_model",
    "tracking_uri",
    "ui_hint",
]
