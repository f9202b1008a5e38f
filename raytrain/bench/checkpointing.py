"""Cost of checkpoints during training, and of sampling."""

from __future__ import annotations

import time
from typing import Any

import torch

from raytrain.bench.rounds import Contender, Measured, Series, ratio, repeat, synchronise
from raytrain.config.schema import RunConfig, to_dict
from raytrain.data.corpus import Corpus
from raytrain.models import build
from raytrain.models.sampling import sample
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage.base import Storage
from raytrain.training.trainer import Trainer, World

STEPS_BETWEEN = 100
"""Steps between two checkpoints for which the stall is reported."""


class Saving:
    """A checkpoint that is saved while training continues."""

    def __init__(
        self, config: RunConfig[Any], corpus: Corpus, device: torch.device, storage: Storage, seconds: float
    ) -> None:
        self.config = config
        self.device = device
        self.seconds = seconds
        self.trainer = Trainer(config, corpus, World(device=device))
        self.trainer.train_step(0)
        self.committed = 0.0
        self.writer = CheckpointWriter(storage, on_commit=lambda step: self._commit())

    def _commit(self) -> None:
        self.committed = time.perf_counter()

    def contenders(self) -> list[Contender]:
        """Return the only contender."""
        return [Contender("checkpoint", self._block)]

    def _block(self, number: int) -> dict[str, float]:
        """Save a checkpoint, train while it is written, then train as long again."""
        synchronise(self.device)
        began = time.perf_counter()
        tensors = self.trainer.tensors()
        copied = time.perf_counter()
        self.writer.save(Snapshot(number, tensors, {}, to_dict(self.config)), score=float(number))
        saved = time.perf_counter()
        beside = self._train(number)
        self.writer.wait()
        alone = self._train(number)
        return {
            "copy": copied - began,
            "save": saved - copied,
            "commit": self.committed - began,
            "step_beside": beside,
            "step_alone": alone,
            "bytes": float(sum(tensor.nbytes for group in tensors.values() for tensor in group.values())),
        }

    def _train(self, number: int) -> float:
        """Train for a while and return the seconds per step."""
        calls, seconds = repeat(lambda _: self.trainer.train_step(number), self.seconds / 2, self.device)
        return seconds / calls

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return the seconds of a save, and their share of training with a checkpoint every ``STEPS_BETWEEN`` steps."""
        values = measured["checkpoint"]
        # the training thread makes the copy too; it does not wait for a save that is unfinished when the next begins
        pairs = zip(values["copy"].values, values["save"].values, strict=True)
        stall = Series([copy + save for copy, save in pairs])
        between = Series([STEPS_BETWEEN * step for step in values["step_alone"].values])
        checkpoint = {
            "bytes": int(values["bytes"].median),
            "steps_between": STEPS_BETWEEN,
            "copy_seconds": values["copy"].json(),
            "save_seconds": values["save"].json(),
            "commit_seconds": values["commit"].json(),
            "share_inside_save": ratio(values["save"], between).json(),
            "share_of_stall": ratio(stall, between).json(),
            "step_beside_over_alone": ratio(values["step_beside"], values["step_alone"]).json(),
        }
        return {"checkpoint": checkpoint}


class Sampling:
    """Sampling of texts from the untrained model: in batches, and one at a time."""

    def __init__(self, config: RunConfig[Any], device: torch.device, num: int, seconds: float) -> None:
        self.model = build(config).to(device).eval()
        self.device = device
        self.num = num
        self.seconds = seconds

    def contenders(self) -> list[Contender]:
        """Return both contenders."""
        return [
            Contender("sampling batched", lambda number: self._block(self.num, number, 0.0)),
            Contender("sampling one at a time", lambda number: self._block(1, number, self.seconds)),
        ]

    def _block(self, num: int, number: int, seconds: float) -> dict[str, float]:
        lengths: list[int] = []

        def draw(call: int) -> None:
            texts = sample(self.model, num, seed=1000 * number + call)
            lengths.append(sum(len(text.text) for text in texts))

        calls, passed = repeat(draw, seconds, self.device)
        return {"bytes": sum(lengths[-calls:]) / passed, "texts": num * calls / passed}

    def result(self, measured: Measured) -> dict[str, Any]:
        """Return bytes and texts per second of both, and their ratio."""
        batched, single = measured["sampling batched"], measured["sampling one at a time"]
        sampling = {
            "num": self.num,
            "batched": {"bytes_per_second": batched["bytes"].json(), "texts_per_second": batched["texts"].json()},
            "one_at_a_time": {"bytes_per_second": single["bytes"].json(), "texts_per_second": single["texts"].json()},
            "times_one_at_a_time": ratio(batched["bytes"], single["bytes"]).json(),
        }
        return {"sampling": sampling}
