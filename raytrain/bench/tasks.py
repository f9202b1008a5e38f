"""Tasks of a benchmark worker: training steps, whole runs and memory, one for each command."""

from __future__ import annotations

import json
import tempfile
import time
from typing import Any

import torch.distributed as dist

from raytrain.bench.machine import peak_memory
from raytrain.bench.rounds import synchronise
from raytrain.bench.timed import timed_train
from raytrain.config.schema import from_dict
from raytrain.data.corpus import Corpus
from raytrain.storage import open_storage
from raytrain.training.reporters import PrintReporter
from raytrain.training.trainer import Trainer, World

WARM_UP = 2
"""Steps before the first timed one."""


class Worker:
    """Commands of a worker, by name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.trainers: dict[str, Trainer] = {}

    def steps(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do ``count`` training steps from ``first``; return seconds and bytes of text."""
        trainer = self._trainer(command)
        self._meet()
        began = time.perf_counter()
        text_bytes = sum(
            trainer.train_step(step)[0].text_bytes
            for step in range(command["first"], command["first"] + command["count"])
        )
        synchronise(self.world.device)
        self._meet()
        return {"seconds": time.perf_counter() - began, "bytes": text_bytes}

    def loop(self, command: dict[str, Any]) -> dict[str, Any]:
        """Run the whole loop; return the times of ``timed_train``."""
        config = from_dict(command["config"])
        with tempfile.TemporaryDirectory(prefix="raytrain-bench-") as folder:
            return timed_train(
                config, Corpus.open(command["corpus"]), self.world, open_storage(folder), PrintReporter(config)
            )

    def memory(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do a few steps; return the peak memory of this process in bytes."""
        self._trainer(command)
        return dict(peak_memory(self.world.device))

    def _trainer(self, command: dict[str, Any]) -> Trainer:
        key = json.dumps(command["config"])
        if key not in self.trainers:
            trainer = Trainer(from_dict(command["config"]), Corpus.open(command["corpus"]), self.world)
            trainer.rehearse()
            for step in range(WARM_UP):
                trainer.train_step(step)
            self.trainers[key] = trainer
        return self.trainers[key]

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()
