"""Everything that is said to MLflow.

The driver opens an ``Experiment`` and, in it, one ``Run`` per identity; the run's address travels to
rank 0, whose ``MetricWriter`` is the only writer of its metrics. Nothing here imports MLflow (1.5 s)
before it is needed, uses MLflow's fluent API, or leaves state in it.
"""

from __future__ import annotations

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
