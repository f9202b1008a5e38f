"""Worker options of the command line, and the workers that one run asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from raytrain.utils.errors import UserError

Device = Literal["auto", "cpu", "cuda"]
"""Device that workers compute on; ``auto``: the GPUs that they reserve, if any, otherwise CPUs."""


@dataclass
class WorkerOptions:
    """Options about the workers of one run."""

    workers: str = "1"
    """DDP workers. 2:8 is elastic: the run continues with as few as 2, and grows to 8 as resources allow."""
    cpus_per_worker: float | None = None
    """CPUs of each worker; default: an equal share of all CPUs or, with GPUs, those of its node for each of its
    GPUs."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; default: 1 if the cluster has any, otherwise 0."""
    device: Device = "auto"
    """Device that workers compute on. auto: the GPUs that they reserve, if any; cpu leaves those GPUs unused."""


@dataclass(frozen=True)
class WorkerSpec:
    """Workers that one run asks for. They start together, or wait together."""

    workers: int
    """Number of workers; of an elastic run, the minimum."""
    cpus: float
    """CPUs of each worker."""
    gpus: float
    """GPUs that each worker reserves."""
    most: int | None = None
    """Maximum of an elastic run, which continues with as many workers as fit; None for a run that is not elastic."""
    device: Device = "auto"
    memory: int = 0
    """Bytes of a node's memory that each worker reserves; 0: none."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"{self.workers} workers: a run needs at least one")
        if self.most is not None and self.most < self.workers:
            raise UserError(f"--workers {self.workers}:{self.most}: the maximum must not be below the minimum")
        if self.cpus < 0 or self.gpus < 0 or self.cpus + self.gpus == 0:
            raise UserError(f"a worker of {self.cpus:g} CPUs and {self.gpus:g} GPUs has nothing to compute on")
        if self.device == "cuda" and self.gpus == 0:
            raise UserError(
                "--device cuda: the workers reserve no GPU; use a cluster that has some, and --gpus-per-worker 1"
            )
        if self.limit > 1 and self.gpus % 1 and self.on_gpus:
            raise UserError(
                f"{self.limit} workers with {self.gpus:g} GPUs each: workers of one run cannot share a GPU (NCCL "
                "refuses two ranks on one card); use whole GPUs, or fractions with one worker"
            )

    @property
    def limit(self) -> int:
        """Maximum number of workers."""
        return self.most or self.workers

    @property
    def on_gpus(self) -> bool:
        """True if the workers compute on GPUs, rather than only reserving them."""
        return self.gpus > 0 and self.device != "cpu"

    @property
    def per_worker(self) -> dict[str, float]:
        """Resources of one worker, as Ray names them."""
        return {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount > 0}

    @property
    def reserved(self) -> dict[str, float]:
        """Return all that Ray sets aside for one worker: its resources, and memory in bytes if any is reserved."""
        return self.per_worker | ({"memory": self.memory} if self.memory else {})

    def __str__(self) -> str:
        each = " and ".join(f"{amount:g} {name}" for name, amount in self.per_worker.items())
        return f"{self.workers}{f':{self.most}' if self.most else ''} x ({each})"


def parse_workers(text: str) -> tuple[int, int | None]:
    """Return the minimum and, for an elastic run, the maximum of ``--workers``: "2" or "2:8".

    Raises:
        UserError: the text is neither form.
    """
    match = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
    if match is None:
        raise UserError(f"--workers {text!r} is neither a number of workers nor a range of them: give 2, or 2:8")
    return int(match[1]), int(match[2]) if match[2] else None
