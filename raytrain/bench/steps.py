"""Training steps of raytrain and of the plain model on the same batches, the data alone, and an evaluation."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from raytrain.bench.baseline import PlainTrainer, has_plain
from raytrain.bench.flops import count_operations
from raytrain.bench.peak import ceilings
from raytrain.bench.rounds import Contender, Measured, ratio, repeat, synchronise
from raytrain.config.schema import RunConfig, override
from raytrain.data.batches import EVALUATION_GROUPS, Batch, EvaluationBatches, TrainingBatches
from raytrain.data.corpus import Corpus
from raytrain.data.pools import part_of
from raytrain.training.trainer import Trainer, World

MOST_STEPS = 200
"""Maximum number of steps in a block."""


@dataclass
class Work:
    """Totals over the steps of a block."""

    steps: int = 0
    text_bytes: int = 0
    operations: int = 0
    necessary: int = 0
    """Operations without the products with one-hot vectors."""

    def count(self, batch: Batch, config: RunConfig[Any]) -> None:
        """Count a step."""
        self.steps += 1
        self.text_bytes += batch.text_bytes
        if not has_plain(config):
            return
        operations = count_operations(config, *batch.tokens.shape)
        self.operations += operations.all
        self.necessary += operations.necessary


class Stepper:
    """Training steps of raytrain in one precision, or of the plain model."""

    def __init__(self, config: RunConfig[Any], corpus: Corpus, device: torch.device, plain: bool) -> None:
        self.config = config
        self.device = device
        self.batches = TrainingBatches(corpus, config)
        self.trainer = None if plain else Trainer(config, corpus, World(device=device))
        self.plain = PlainTrainer(config, device) if plain else None
        self.name = f"plain {config.batch_size}" if plain else f"step {config.batch_size} {config.precision}"
        self.step(0)
        synchronise(device)
        began = time.perf_counter()
        self.step(1)
        synchronise(device)
        self.seconds = time.perf_counter() - began
        """Seconds of the second step: the first allocates the memory that the others use."""

    def step(self, number: int) -> Batch:
        """Do a step and return its batch."""
        if self.trainer is not None:
            return self.trainer.train_step(number)[0]
        assert self.plain is not None
        batch = self.batches.batch(number)
        self.plain.train_step(batch.tokens.to(self.device), number)
        return batch

    def block(self, steps: int, number: int) -> dict[str, float]:
        """Return the rates of the ``number``-th block of ``steps`` steps; all of a batch size use the same samples."""
        synchronise(self.device)
        began = time.perf_counter()
        batches = [self.step(number * steps + offset) for offset in range(steps)]
        synchronise(self.device)
        seconds = time.perf_counter() - began
        work = Work()
        for batch in batches:
            work.count(batch, self.config)
        return {
            "seconds": seconds / steps,
            "bytes": work.text_bytes / seconds,
            "operations": work.operations / seconds,
            "necessary": work.necessary / seconds,
        }


class Steps:
    """Steps of every batch size, in every precision and of the plain model."""

    def __init__(
        self,
        config: RunConfig[Any],
        corpus: Corpus,
        device: torch.device,
        batch_sizes: list[int],
        precisions: list[str],
        seconds: float,
        plain: bool,
    ) -> None:
        self.steppers: list[Stepper] = []
        self.steps_of_block: dict[int, int] = {}
        for size in batch_sizes:
            sized = override(config, {"batch_size": size})
            contenders = [
                Stepper(override(sized, {"precision": name}), corpus, device, plain=False) for name in precisions
            ]
            if plain and has_plain(sized):
                contenders.append(Stepper(sized, corpus, device, plain=True))
            if not contenders:
                continue
            # the same number of steps for each, so that they see the same samples
            typical = statistics.median(stepper.seconds for stepper in contenders)
            self.steps_of_block[size] = min(MOST_STEPS, max(1, round(seconds / typical)))
            self.steppers += contenders

    def contenders(self) -> list[Contender]:
        """Return a contender for each stepper."""
        return [
            Contender(stepper.name, partial(stepper.block, self.steps_of_block[stepper.config.batch_size]))
            for stepper in self.steppers
        ]

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return the rates of raytrain's and the plain steps, and their share of the measured peak rate."""
        best = ceilings(measured)
        rows: dict[str, list[dict[str, Any]]] = {}
        for stepper in self.steppers:
            size, precision = stepper.config.batch_size, stepper.config.precision
            values = measured[stepper.name]
            row: dict[str, Any] = {
                "batch_size": size,
                "precision": "float32" if stepper.plain else precision,
                "steps_per_block": self.steps_of_block[size],
                "step_seconds": values["seconds"].json(),
                "bytes_per_second": values["bytes"].json(),
            }
            if counted := has_plain(stepper.config):
                row["operations_per_second"] = values["operations"].json()
            if counted and (ceiling := best.get(row["precision"])) is not None:
                row["share_of_ceiling"] = values["operations"].median / ceiling.median
                row["share_without_look_ups"] = values["necessary"].median / ceiling.median
            if not stepper.plain and f"plain {size}" in measured:
                row["times_plain"] = ratio(values["bytes"], measured[f"plain {size}"]["bytes"]).json()
            rows.setdefault("plain" if stepper.plain else "step", []).append(row)
        return rows


class Data:
    """Batches of the training step, made and thrown away."""

    def __init__(self, config: RunConfig[Any], corpus: Corpus, seconds: float) -> None:
        self.batches = TrainingBatches(corpus, config)
        self.seconds = seconds

    def contenders(self) -> list[Contender]:
        """Return the only contender."""
        return [Contender("data", lambda _: self._block())]

    def _block(self) -> dict[str, float]:
        made: list[int] = []
        calls, seconds = repeat(
            lambda number: made.append(self.batches.batch(number).text_bytes), self.seconds / 4, torch.device("cpu")
        )
        return {"bytes": sum(made[-calls:]) / seconds}

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return bytes of text per second, and their ratio to what the fastest step consumes."""
        data = measured["data"]["bytes"]
        steps = [values["bytes"] for name, values in measured.items() if name.startswith("step ")]
        fastest = max(steps, key=lambda series: series.median, default=None)
        part = {"bytes_per_second": data.json()}
        if fastest is not None:
            part["times_fastest_step"] = ratio(data, fastest).json()
        return {"data": part}


class Evaluation:
    """Evaluations, on fewer validation samples than a run has."""

    def __init__(self, config: RunConfig[Any], corpus: Corpus, device: torch.device) -> None:
        few = min(config.evaluate_samples, EVALUATION_GROUPS * config.group_size)
        self.device = device
        self.samples = EvaluationBatches(part_of(corpus, "valid", config), config, config.evaluate_samples).num_samples
        self.trainer = Trainer(override(config, {"evaluate_samples": few}), corpus, World(device=device))
        self.trainer.evaluate()

    def contenders(self) -> list[Contender]:
        """Return the only contender."""
        return [Contender("evaluation", lambda _: self._block())]

    def _block(self) -> dict[str, float]:
        _, seconds = repeat(lambda _: self.trainer.evaluate(), 0.0, self.device)
        return {"seconds_per_sample": seconds / self.trainer.valid_batches.num_samples}

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return the samples of an evaluation of the run, and the seconds of each."""
        seconds = measured["evaluation"]["seconds_per_sample"]
        return {"evaluation": {"samples": self.samples, "seconds_per_sample": seconds.json()}}
