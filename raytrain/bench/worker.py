"""Worker of a benchmark: obeys commands from a socket, alone or as one of a group under ``torchrun``.

torchrun ... -m raytrain.bench.worker SOCKET CORES
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytrain.training.trainer import Trainer, World

WARM_UP = 2
"""Steps before the first timed one."""


def share_of(cores: list[int], rank: int, size: int) -> list[int]:
    """Return the cores of worker ``rank`` of ``size``: an even share, or one of them where there are too few."""
    if size > len(cores):
        return [cores[rank % len(cores)]]
    return cores[len(cores) * rank // size : len(cores) * (rank + 1) // size]


class Worker:
    """Commands of a worker, by name."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.trainers: dict[str, Trainer] = {}

    def steps(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do ``count`` training steps from ``first``; return seconds and bytes of text."""
        from raytrain.bench.rounds import synchronise

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
        from raytrain.bench.timed import timed_train
        from raytrain.config.schema import from_dict
        from raytrain.data.corpus import Corpus
        from raytrain.storage import open_storage
        from raytrain.training.reporters import PrintReporter

        config = from_dict(command["config"])
        with tempfile.TemporaryDirectory(prefix="raytrain-bench-") as folder:
            return timed_train(
                config, Corpus.open(command["corpus"]), self.world, open_storage(folder), PrintReporter(config)
            )

    def memory(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do a few steps; return the peak memory of this process in bytes."""
        from raytrain.bench.machine import peak_memory

        self._trainer(command)
        return dict(peak_memory(self.world.device))

    def _trainer(self, command: dict[str, Any]) -> Trainer:
        from raytrain.config.schema import from_dict
        from raytrain.data.corpus import Corpus
        from raytrain.training.trainer import Trainer

        key = json.dumps(command["config"])
        if key not in self.trainers:
            trainer = Trainer(from_dict(command["config"]), Corpus.open(command["corpus"]), self.world)
            trainer.rehearse()
            for step in range(WARM_UP):
                trainer.train_step(step)
            self.trainers[key] = trainer
        return self.trainers[key]

    def _meet(self) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.barrier()


def main() -> None:
    """Pin the process to its cores, connect, and obey commands until the socket is closed."""
    address, cores = sys.argv[1], [int(core) for core in sys.argv[2].split(",")]
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.sched_setaffinity(0, share_of(cores, rank, size))  # before torch makes its threads

    import torch

    from raytrain.training.torchrun import torchrun_world

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torchrun_world() as world, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        stream = connection.makefile("rw")
        worker = Worker(world)
        while line := stream.readline():
            command = json.loads(line)
            answer = getattr(worker, command["do"])(command)
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
