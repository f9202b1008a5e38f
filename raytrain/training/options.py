"""Options of a run, as the command line and the Python API take them."""

from __future__ import annotations

from dataclasses import dataclass

from raytrain.config.workers import WorkerOptions
from raytrain.runs.records import EXPERIMENT


@dataclass
class TrainOptions(WorkerOptions):
    """Options of a run; all else is a field of its config."""

    name: str | None = None
    """Name of the run; the same name resumes it. Default: the model and a hash of the config."""
    best_of: str | None = None
    """Search whose winner's config is trained, changed by the options; or an MLflow experiment: its newest search."""
    resume: str | None = None
    """Name of the run to resume, with as many workers; only its storage must be given beside it."""
    storage: str | None = None
    """Folder or s3://bucket/prefix where everything is kept; default: $RAYTRAIN_STORAGE or ./runs."""
    address: str | None = None
    """Address of the Ray cluster; default: the one that is found, otherwise a new one on this machine."""
    experiment: str = EXPERIMENT
    """MLflow experiment."""

    def worker_options(self) -> WorkerOptions:
        """Return the options of the workers alone."""
        return WorkerOptions(self.workers, self.cpus_per_worker, self.gpus_per_worker, self.device)
