"""Scaling of DDP over the number of workers, and the memory of a training process."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

from raytrain.bench.machine import Machine
from raytrain.bench.rounds import Contender, Measured, ratio
from raytrain.bench.torchrun import TorchrunGroup
from raytrain.config.schema import RunConfig, override, to_dict
from raytrain.data.corpus import Corpus


class Scaling:
    """The same training by one worker with all threads, and by several workers that share the threads.

    At a fixed global batch (strong scaling), several workers are compared with one worker that has all threads. At a
    fixed batch per worker (weak scaling), n workers are compared with n times the rate of one worker that has the
    threads of one of them.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        corpus: Corpus,
        workers: list[int],
        machine: Machine,
        seconds: float,
        stack: ExitStack,
    ) -> None:
        self.config = config
        self.corpus = corpus
        self.workers = workers
        on_gpus = machine.device.type == "cuda"
        self.threads = {size: machine.threads_of(size) for size in workers}
        self.oversubscribed = [size for size in workers if not on_gpus and size > len(machine.cores)]
        wanted = {(1, machine.threads)} | {(size, self.threads[size]) for size in workers}
        wanted |= {(1, self.threads[size]) for size in workers}
        self.groups = {key: stack.enter_context(TorchrunGroup(key[0], key[1], machine.cores)) for key in sorted(wanted)}
        self.all = (1, machine.threads)
        self.count = 1
        first = self._ask(self.all, config, 0)
        self.count = max(1, round(seconds / first["seconds"]))

    def contenders(self) -> list[Contender]:
        """Return every group on the preset's batch, and groups of several workers also on one such batch per worker."""
        contenders = []
        for key in self.groups:
            for factor in sorted({1, key[0]}):
                config = override(self.config, {"batch_size": factor * self.config.batch_size})
                contenders.append(Contender(_name(key, factor), partial(self._block, key, config)))
        return contenders

    def _block(self, key: tuple[int, int], config: RunConfig[Any], number: int) -> dict[str, float]:
        return self._ask(key, config, number * self.count)

    def _ask(self, key: tuple[int, int], config: RunConfig[Any], first: int) -> dict[str, float]:
        command = {"do": "steps", "config": to_dict(config), "corpus": str(self.corpus.path)}
        answers = self.groups[key].ask(command | {"first": first, "count": self.count})
        seconds = max(answer["seconds"] for answer in answers)
        return {"seconds": seconds, "bytes": sum(answer["bytes"] for answer in answers) / seconds}

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return bytes per second of all workers together, and efficiencies, by number of workers."""
        rows = []
        for size in self.workers:
            threads = self.threads[size]
            whole, fixed = measured[_name((size, threads), 1)]["bytes"], measured[_name((size, threads), size)]["bytes"]
            alone = measured[_name((1, threads), 1)]["bytes"]
            rows.append(
                {
                    "workers": size,
                    "threads": threads,
                    "oversubscribed": size in self.oversubscribed,
                    "fixed_batch_bytes_per_second": whole.json(),
                    "fixed_batch_efficiency": ratio(whole, measured[_name(self.all, 1)]["bytes"]).json(),
                    "fixed_share_bytes_per_second": fixed.json(),
                    "fixed_share_efficiency": {
                        key: [item / size for item in value] if isinstance(value, list) else value / size
                        for key, value in ratio(fixed, alone).json().items()
                    },
                }
            )
        return {"ddp": {"batch_size": self.config.batch_size, "steps_per_block": self.count, "workers": rows}}


def _name(key: tuple[int, int], factor: int) -> str:
    return f"ddp {key[0]} x {key[1]} threads, {factor} x the batch"


def measure_memory(configs: list[RunConfig[Any]], corpus: Corpus, machine: Machine) -> list[dict[str, Any]]:
    """Measure the peak memory of training, each config in a process of its own."""
    rows = []
    for config in configs:
        with TorchrunGroup(1, machine.threads, machine.cores, torchrun=False) as group:
            command = {"do": "memory", "config": to_dict(config), "corpus": str(corpus.path)}
            peak = group.ask(command)[0]
        rows.append({"batch_size": config.batch_size, "precision": config.precision, "peak_bytes": peak})
    return rows
