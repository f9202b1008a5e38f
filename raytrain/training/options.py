"""Options of a run, as the command line and the Python API take them."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.config.workers import WorkerOptions
from raytrain.runs.records import EXPERIMENT


@dataclass
class TrainOptions(WorkerOptions):
    """Options of the command; all else is a field of the run's config."""

    name: str | None = None
    """Name of the run; the same name resumes it. By default one that follows from the config."""
    best_of: str | None = None
    """Search whose winner's config is trained, changed by the options; or an MLflow experiment: its newest search."""
    resume: str | None = None
    """Name of a run to go on with, by as many workers; nothing else is needed but where its storage is."""
    storage: str | None = None
    """Folder or s3://bucket/prefix for all that is kept; default $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Ray cluster to use; by default the one that is found, or a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""
