"""Recorder of training steps as CUDA graphs: the host makes one launch a step instead of hundreds.

At small batches the host takes longer to launch the kernels of a step than a GPU takes to run them. A graph replays the
kernels of a recorded step on the same memory: the inputs that change from step to step are copied there first.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytrain.config.schema import RunConfig
from raytrain.data.batches import Batch
from raytrain.models.noise import Noise, draw_keys
from raytrain.models.terms import Terms
from raytrain.training.step_inputs import Schedule, StepInputs, scheduled

STAGES = 4
"""Steps whose inputs may be on their way to the device at once."""
_log = logging.getLogger(__name__)
Step = Callable[[StepInputs], tuple[Terms, Tensor]]
"""Computes a step on the device; returns its terms and the norm of its gradients."""


@dataclass
class Stage:
    """Pinned memory of the host, from which the inputs of a step are copied."""

    words: Tensor
    values: Tensor
    copied: torch.cuda.Event


class Recording:
    """The steps of one shape: the memory that they read on the device and, once it is recorded, their graph."""

    def __init__(self, batch: Batch, draws: int, device: torch.device) -> None:
        """Take memory for batches of the shape of ``batch`` and the keys of ``draws`` draws of noise."""
        words = draws + batch.tokens.numel() + (0 if batch.previous is None else batch.previous.numel())
        self.words = torch.zeros(words, dtype=torch.int64, device=device)
        self.values = torch.zeros(len(fields(Schedule)), device=device)
        self.shape, self.draws = batch.tokens.shape, draws
        self.stages = [
            Stage(
                torch.zeros(words, dtype=torch.int64, pin_memory=True),
                torch.zeros(len(self.values), pin_memory=True),
                torch.cuda.Event(),
            )
            for _ in range(STAGES)
        ]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: tuple[Terms, Tensor] | None = None
        self.repeated = 0

    def feed(self, batch: Batch, keys: list[int], values: list[float]) -> None:
        """Copy the inputs of a step to the device; wait only if the device lags ``STAGES`` steps behind."""
        stage = self.stages[self.repeated % STAGES]
        self.repeated += 1
        stage.copied.synchronize()
        parts = [torch.tensor(keys, dtype=torch.int64), batch.tokens.flatten()]
        torch.cat([*parts, *([] if batch.previous is None else [batch.previous])], out=stage.words)
        stage.values.copy_(torch.tensor(values))
        self.words.copy_(stage.words, non_blocking=True)
        self.values.copy_(stage.values, non_blocking=True)
        stage.copied.record()

    def inputs(self, batch: Batch, noise: Callable[[Batch, Tensor], Noise]) -> StepInputs:
        """Return the inputs held in the memory; only the shapes and groups of ``batch`` are used."""
        keys, tokens, previous = self.words.split(
            [self.draws, batch.tokens.numel(), len(self.words) - self.draws - batch.tokens.numel()]
        )
        return StepInputs(
            tokens=tokens.view(self.shape),
            previous=None if batch.previous is None else previous,
            groups=batch.groups,
            noise=noise(batch, keys),
            schedule=Schedule(*self.values.unbind()),
        )


class StepRecorder:
    """Runs training steps on a GPU: for each batch shape, the first two steps eagerly, later ones by a graph.

    The results have the same bits either way, so it does not matter to a resumed run which steps were recorded.
    """

    def __init__(
        self,
        config: RunConfig[Any],
        device: torch.device,
        compute: Step,
        noise: Callable[[Batch, Tensor], Noise],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Set up without recording anything.

        Args:
            compute: does a step on the device from its inputs, and reads no value back to the host.
            noise: returns the noise of a batch whose draws have these keys.
            optimizer: the optimiser that ``compute`` steps.
        """
        self.works = True
        """False once a step was seen to wait for the device: such a step cannot be recorded."""
        self._config, self._device = config, device
        self._compute, self._noise, self._optimizer = compute, noise, optimizer
        self._recordings: dict[torch.Size, Recording] = {}
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch, step: int, plain: Callable[[], StepInputs]) -> tuple[Terms, Tensor]:
        """Take a step; return its terms, without gradient, and the norm of its gradients.

        Args:
            plain: returns the inputs of the step outside the memory of any recording.
        """
        recording = self._recordings.get(batch.tokens.shape)
        if recording is None:
            inputs = plain()
            result = self._apart(inputs)
            self._recordings[batch.tokens.shape] = Recording(batch, inputs.noise.draws, self._device)
            return result
        keys = list(islice(draw_keys(self._config.seed, step), recording.draws))
        recording.feed(batch, keys, scheduled(self._config, step))
        if recording.repeated == 1:
            return self._watched(recording.inputs(batch, self._noise))
        if recording.graph is None:
            self._record(recording, batch)
        assert recording.graph is not None
        assert recording.result is not None
        recording.graph.replay()
        return recording.result

    def _apart(self, inputs: StepInputs) -> tuple[Terms, Tensor]:
        """Take a step eagerly, on the stream on which steps are recorded."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms, norm = self._compute(inputs)
        current.wait_stream(self._stream)
        return detached(terms), norm

    def _watched(self, inputs: StepInputs) -> tuple[Terms, Tensor]:
        """Take a step eagerly; note whether the host waits for the device in it."""
        with noted_waits() as waits:
            result = self._apart(inputs)
        if waits:
            self.works = False
            _log.warning(
                "steps wait for the GPU (%s): they are not recorded as CUDA graphs, and take longer",
                ", ".join(sorted(set(waits))),
            )
        return result

    def _record(self, recording: Recording, batch: Batch) -> None:
        """Record a step without running it."""
        recording.graph = torch.cuda.CUDAGraph()
        for group in self._optimizer.param_groups:
            group["capturable"] = True
        # another thread may write a checkpoint meanwhile
        with torch.cuda.graph(
            recording.graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"
        ):
            terms, norm = self._compute(recording.inputs(batch, self._noise))
        for group in self._optimizer.param_groups:
            group["capturable"] = False  # PyTorch warns of it outside a recording
        recording.result = detached(terms), norm


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """Note by file and line each time that the host waits for the GPU inside the context, as far as PyTorch knows.

    The list is filled when the context ends.
    """
    places: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = [seen for seen in caught if "called a synchronizing" in str(seen.message)]
    places += [f"{Path(seen.filename).name}:{seen.lineno}" for seen in found]


def detached(terms: Terms) -> Terms:
    """Return the terms without gradient."""
    values = {field.name: getattr(terms, field.name) for field in fields(terms)}
    found: dict[str, Any] = {name: value.detach() for name, value in values.items() if isinstance(value, Tensor)}
    return replace(terms, **found)
