"""DDP over more and more workers; and the memory that one takes."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from raytrain.bench.rounds import Contender, Measured, ratio
from raytrain.bench.torchrun import TorchrunGroup
from raytrain.config.schema import RunConfig, override, to_dict
from raytrain.data.corpus import Corpus


class Scaling:
    """The same training by one worker with all threads and by several that share them.

    At a fixed global batch, several workers are held against one with all threads; at a fixed batch per worker, against
    one with the threads of one of them, as many times.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        corpus: Corpus,
        workers: list[int],
        threads: int,
        cores: list[int],
        seconds: float,
        stack: ExitStack,
        device: torch.device,
    ) -> None:
        self.config = config
        self.corpus = corpus
        self.workers = workers
        # a GPU is a worker's own: threads are not what is shared
        self.threads = {size: threads if device.type == "cuda" else max(1, threads // size) for size in workers}
        self.oversubscribed = [size for size in workers if device.type != "cuda" and size > len(cores)]
        wanted = {(1, threads)} | {(size, self.threads[size]) for size in workers}
        wanted |= {(1, self.threads[size]) for size in workers}
        self.groups = {key: stack.enter_context(TorchrunGroup(key[0], key[1], cores)) for key in sorted(wanted)}
        self.all = (1, threads)
        self.count = 1
        first = self._ask(self.all, config, 0)
        self.count = max(1, round(seconds / first["seconds"]))

    def contenders(self) -> list[Contender]:
        """Every group on the preset's batch, and the larger ones on one of so many times the size."""
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
        """By number of workers: bytes a second of all together, and efficiencies."""
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


def measure_memory(
    configs: list[RunConfig[Any]], corpus: Corpus, threads: int, cores: list[int]
) -> list[dict[str, Any]]:
    """The most memory that training takes, each config in a process of its own."""
    rows = []
    for config in configs:
        with TorchrunGroup(1, threads, cores, torchrun=False) as group:
            command = {"do": "memory", "config": to_dict(config), "corpus": str(corpus.path)}
            peak = group.ask(command)[0]
        rows.append({"batch_size": config.batch_size, "precision": config.precision, "peak_bytes": peak})
    return rows
