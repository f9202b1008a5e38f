"""The training loop under Ray Train, compared with the same loop under ``torchrun``.

Ray is imported here and nowhere else in this package.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray import train as ray_train
from ray.train.torch import get_device

from raytrain.bench.machine import Machine
from raytrain.bench.rounds import Contender, Measured, confidence, ratio
from raytrain.bench.timed import timed_config, timed_train
from raytrain.bench.torchrun import TorchrunGroup
from raytrain.bench.worker import share_of
from raytrain.cluster.connection import connect
from raytrain.config.schema import RunConfig, from_dict, to_dict
from raytrain.config.workers import WorkerSpec
from raytrain.data.batches import TrainingBatches
from raytrain.data.cache import address
from raytrain.data.corpus import Corpus
from raytrain.storage import open_storage
from raytrain.tracking.runs import Experiment
from raytrain.training.trainer import World
from raytrain.training.worker import Job, RayReporter
from raytrain.training.worker_group import WorkerGroup

IDLE_S = 5.0
"""Seconds for which the CPU use of Ray's idle processes is measured."""


class OnRay:
    """Runs of the whole loop on a worker group of Ray Train, as in ``raytrain.train``, and on a torchrun group."""

    def __init__(
        self,
        config: RunConfig[Any],
        corpus: Corpus,
        workers: int,
        machine: Machine,
        seconds: float,
        stack: ExitStack,
    ) -> None:

        self.corpus = corpus
        self.workers = workers
        self.threads = machine.threads_of(workers)
        self.cores = machine.cores
        self.group = stack.enter_context(TorchrunGroup(workers, self.threads, machine.cores))
        command = {"do": "steps", "config": to_dict(config), "corpus": str(corpus.path), "first": 0, "count": 1}
        self.asked = config
        self.config = timed_config(config, round(seconds / self.group.ask(command)[0]["seconds"]))
        batches = TrainingBatches(corpus, self.config)
        self.bytes = sum(batches.batch(step).text_bytes for step in range(self.config.steps)) / self.config.steps
        self.scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytrain-bench-")))
        self.experiment = Experiment.open(
            f"sqlite:///{self.scratch}/mlflow.db", "bench", str(self.scratch / "artifacts")
        )
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        connect("local")
        stack.callback(ray.shutdown)
        cpus, gpus = (float(self.threads), 0.0) if machine.device.type == "cpu" else (1.0, 1.0)
        self.held = WorkerGroup(serve, WorkerSpec(workers, cpus, gpus), "bench", str(self.scratch))
        stack.callback(self.held.dismiss)
        self.number = 0
        self._ray()  # starts the worker group
        self.idle = idle_cpu([p for p in psutil.Process().children(recursive=True) if p.pid not in before])

    def contenders(self) -> list[Contender]:
        """Return both contenders."""
        command = {"do": "loop", "config": to_dict(self.config), "corpus": str(self.corpus.path)}
        return [
            Contender("torchrun", lambda _: next(filter(None, self.group.ask(command)))),
            Contender("ray", lambda _: self._ray()),
        ]

    def _ray(self) -> dict[str, float]:
        """Run the loop on the worker group, in an MLflow run of its own."""
        self.number += 1
        location = self.scratch / str(self.number)
        location.mkdir()
        run = self.experiment.open_run(str(self.number), str(self.number), parameters={}, tags={})
        job = Job(
            config=to_dict(self.config),
            corpus=address(
                self.corpus, open_storage(str(location)), self.config.vocabulary, in_pools=self.config.pool_bytes > 0
            ),
            storage=str(location),
            tracking=asdict(run),
            cpus=float(self.threads),
            progress="raytrain/progress/bench",
        )
        self.held.train({"job": asdict(job), "cores": self.cores}, lambda metrics: None)
        return dict(json.loads((location / "times.json").read_text("utf-8")))

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return the rates of both, their ratio with its confidence interval, and the time inside report calls."""
        torchrun, ray = measured["torchrun"], measured["ray"]
        ratios = ratio(torchrun["seconds"], ray["seconds"])
        step = ray["seconds"].median
        inside = {
            "log": ray["log"].median / (self.asked.log_every * step),
            "evaluated": ray["evaluated"].median / (self.asked.evaluate_every * step),
        }
        part = {
            "workers": self.workers,
            "threads": self.threads,
            "steps": self.config.steps,
            "torchrun_bytes_per_second": self.bytes / torchrun["seconds"].median,
            "ray_bytes_per_second": self.bytes / ray["seconds"].median,
            "step_seconds": {"torchrun": torchrun["seconds"].json(), "ray": ray["seconds"].json()},
            "ray_over_torchrun": ratios.json() | {"confidence_95": confidence(ratios)},
            "call_seconds": {name: ray[name].json() for name in inside},
            "share_inside_reports": sum(inside.values()),
            "idle_cores": self.idle,
        }
        return {"ray": part}


def idle_cpu(processes: list[Any]) -> float:
    """Return the number of cores that these idle processes keep busy."""

    def used() -> float:
        total = 0.0
        for process in processes:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    before = used()
    time.sleep(IDLE_S)
    return (used() - before) / IDLE_S


def serve(values: dict[str, Any]) -> None:
    """Do one timed run after another on a worker of the group, with the reports of ``raytrain.train``."""
    coordinator, context = values["coordinator"], ray_train.get_context()
    world = World(rank=context.get_world_rank(), size=context.get_world_size(), device=get_device())
    node = context.get_node_rank() if context.get_local_rank() == 0 else None
    number = 0
    while (order := ray.get(coordinator.job.remote(number))) is not None:
        job = Job(**order["job"])
        os.sched_setaffinity(0, share_of(order["cores"], world.rank, world.size))
        torch.set_num_threads(int(job.cpus))
        config = from_dict(job.config)
        storage = open_storage(job.storage)

        def send(metrics: dict[str, Any], number: int = number) -> None:
            ray.get(coordinator.evaluated.remote(number, world.rank, metrics))

        report = RayReporter(job, config, rank=world.rank, node=node, send=send)
        times = timed_train(config, Corpus.open(job.corpus["path"]), world, storage.child("checkpoints"), report)
        report.close(storage)
        if world.rank == 0:
            storage.write("times.json", json.dumps(times).encode())
        ray.get(coordinator.ended.remote(world.size))
        number += 1
