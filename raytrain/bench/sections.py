"""Sections of the check of a device: what is right on it, and how fast a step is beside plain PyTorch."""

from __future__ import annotations

import gc
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from raytrain.bench.baseline import PlainTrainer
from raytrain.bench.flops import count_operations
from raytrain.bench.rounds import repeat
from raytrain.config.presets import preset
from raytrain.config.schema import RunConfig, to_dict
from raytrain.data.corpus import Corpus
from raytrain.models import gpu_kernels, sampling
from raytrain.models.lstm import has_narrow_lstm
from raytrain.models.noise import Noise
from raytrain.models.terms import Terms
from raytrain.runs.checkpoint import Checkpoint
from raytrain.training.recorder import noted_waits
from raytrain.training.trainer import Trainer, World

FULL = {"hybrid": "paper-tweets", "lstm_vae": "paper-tweets", "byte_lstm": "bios"}
"""Preset of each model whose steps are timed on GPUs."""
Rows = list[dict[str, Any]]


@dataclass
class Check:
    """A check of one device, and what its sections have found so far."""

    device: torch.device
    quick: bool
    models: list[str]
    corpus: Corpus
    found: dict[str, Rows] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------ configs

    def small(self, model: str, **changes: Any) -> RunConfig[Any]:
        """Return a config that even a CPU trains in seconds."""
        config = preset("laptop", model)
        # at the preset's learning rate, two runs that differ by rounding diverge from each other within a few steps
        config = replace(config, evaluate_samples=512, optimizer=replace(config.optimizer, learning_rate=4e-3))
        if self.quick:
            config = replace(config, length=32, model=replace(config.model, hidden=64), evaluate_samples=64)
        return replace(config, **changes)

    def timed(
        self,
        model: str,
        batch_size: int,
        precision: Literal["float32", "bfloat16"],
        graphs: Literal["auto", "off"] = "auto",
    ) -> RunConfig[Any]:
        """Return the config whose steps are timed: windows, so that every batch has the same shape."""
        small = self.quick or self.device.type == "cpu"
        config = self.small(model) if small else replace(preset(FULL[model], model), sampling="windows")
        return replace(config, batch_size=batch_size, precision=precision, graphs=graphs)

    def trainer(self, config: RunConfig[Any], device: torch.device | None = None) -> Trainer:
        """Return a new trainer on ``device``, by default the one that is checked."""
        return Trainer(config, self.corpus, World(device=device or self.device))

    # ----------------------------------------------------------------------------------------- sections

    def machine(self) -> Rows:
        """What is checked."""
        row = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            row |= {
                "device": properties.name,
                "GB": properties.total_memory / 1e9,
                "cuda": torch.version.cuda,
                "cudnn": torch.backends.cudnn.version(),
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
                "fused kernels": gpu_kernels.available(self.device),
            }
        return [row]

    def ceilings(self) -> Rows:
        """The fastest products."""
        side = 8192 if self.device.type == "cuda" else 512
        rows = []
        for name, kind, tf32 in self.types():
            left, right = (torch.randn(side, side, device=self.device).to(kind) for _ in range(2))
            with tf32_allowed(tf32):
                seconds = self.seconds(partial(torch.mm, left, right))
            rows.append({"type": name, "TFLOP/s": 2e-12 * side**3 / seconds})
        return rows

    def noise(self) -> Rows:
        """Whether the noise has the bits of the CPU."""

        def draws(device: torch.device) -> list[Tensor]:
            noise = Noise(3, 5, range(8), 16, device=device)
            return [noise.normal(50), noise.keep(0.3, 200, 30), noise.uniform(77), noise.keep_shared(0.5, 99, 9)]

        pairs = zip(draws(self.device), draws(torch.device("cpu")), strict=True)
        return [{"same bits as the CPU's": all(torch.equal(here.cpu(), there) for here, there in pairs)}]

    def cpu(self) -> Rows:
        """Gradients and steps in float32 against those of the CPU, as relative differences."""
        steps, rows = 3 if self.quick else 50, []
        for model in self.models:
            config = self.small(model, precision="float32")
            with tf32_allowed(False):
                here, there = self.trainer(config), self.trainer(config, torch.device("cpu"))
                row: dict[str, Any] = {"model": model, "gradients": difference(gradients(here), gradients(there))}
                for step in range(steps):
                    losses = [mean_bound(trainer.train_step(step)[1]) for trainer in (here, there)]
                    if step in (0, steps - 1):
                        row[f"step {step + 1}"] = abs(losses[0] / losses[1] - 1)
                row |= {"bits/byte": here.evaluate()["bits_per_byte"], "CPU": there.evaluate()["bits_per_byte"]}
            rows.append(row)
        return rows

    def resume(self) -> Rows:
        """Whether a run repeats itself and goes on from a stored state, bit for bit."""
        half, rows = 2 if self.quick else 20, []
        for model in self.models:
            config = self.small(model)
            first, again, resumed = (self.trainer(config) for _ in range(3))
            plain = self.trainer(replace(config, graphs="off"))
            for trainer in (first, again, resumed, plain):
                trainer.rehearse()
            for step in range(half):
                first.train_step(step)
            stored = self.stored(first)
            for step in range(2 * half):
                again.train_step(step)
                plain.train_step(step)
            resumed.load(stored)
            for trainer in (first, resumed):
                for step in range(half, 2 * half):
                    trainer.train_step(step)
            end = flat(first)
            recorded = first.recorder is not None and first.recorder.works
            rows.append(
                {
                    "model": model,
                    "precision": first.precision,
                    "repeats": same_bits(end, flat(again)),
                    "resumes": same_bits(end, flat(resumed)),
                    "recorded": recorded,
                    # where steps could be recorded and were not, there is nothing to compare
                    "as without graphs": same_bits(end, flat(plain)) and (first.recorder is None or recorded),
                }
            )
        return rows

    def steps(self) -> Rows:
        """A training step by batch and type, beside plain PyTorch in float32 and by autocast."""
        rows: Rows = []
        best = {row["type"]: row["TFLOP/s"] for row in self.found.get("ceilings", [])}
        sizes = (64, 512, 2048) if self.device.type == "cuda" and not self.quick else (16,)
        for model in self.models:
            for size in sizes:
                measured = {}
                for name, step in self.contenders(model, size):
                    gc.collect()  # a trainer and its recorder reference each other
                    if self.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    measured[name] = self.seconds(step)
                    row = {"model": model, "batch": size, "step": name, "ms": 1e3 * measured[name]}
                    if self.device.type == "cuda":
                        row |= {"kernels": count_kernels(step), "GB": torch.cuda.max_memory_allocated() / 1e9}
                    config = self.timed(model, size, "float32")
                    operations = count_operations(config, size, config.length).all
                    kind = "float32" if "float32" in name else "bfloat16"
                    if kind in best:
                        row["of ceiling"] = 1e-12 * operations / measured[name] / best[kind]
                    row |= {f"x {other}": measured[other] / measured[name] for other in measured if "plain" in other}
                    rows.append(row)
        return rows

    def contenders(self, model: str, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
        """Yield steps of plain PyTorch and of raytrain on the same batch, one after the other."""
        ways = [("plain float32", False)]
        if self.device.type != "cpu" or has_narrow_lstm():
            ways.append(("plain autocast", True))
        for name, enabled in ways:
            config = self.timed(model, size, "float32")
            plain = PlainTrainer(config, self.device)
            tokens = self.trainer(config).train_batches.batch(0).tokens
            pytorch_defaults()

            def step(plain: PlainTrainer = plain, tokens: Tensor = tokens, enabled: bool = enabled) -> None:
                with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
                    plain.train_step(tokens.to(self.device), 0)

            yield name, step
            del plain, tokens, step
        precisions: list[Literal["float32", "bfloat16"]] = ["float32", "bfloat16"]
        for precision in precisions:
            if self.device.type == "cuda":
                trainer = self.trainer(self.timed(model, size, precision, "off"))
                yield f"{precision}, no graph", partial(trainer.train_step, 0)
                del trainer
            yield precision, self.warm_step(self.timed(model, size, precision))

    def warm_step(self, config: RunConfig[Any]) -> Callable[[], object]:
        """Return a step of a trainer that has recorded it, where steps are recorded."""
        step = partial(self.trainer(config).train_step, 0)
        for _ in range(3):
            step()
        return step

    def waits(self) -> Rows:
        """How often the host waits for the device."""
        rows: Rows = []
        for model in self.models if self.device.type == "cuda" else ():
            trainer = self.trainer(self.timed(model, 64, "bfloat16", "off"))
            bodies: dict[str, Callable[[], object]] = {
                "a step": partial(trainer.train_step, 0),
                "an evaluation": trainer.evaluate,
                "a copy of the state": trainer.tensors,
                "64 texts": partial(sampling.sample, trainer.model, 64),
            }
            rows.append({"model": model} | {name: count_waits(body) for name, body in bodies.items()})
            rows[-1]["a copy of the state, ms"] = 1e3 * self.seconds(trainer.tensors)
        return rows

    def bound(self) -> Rows:
        """The negative ELBO after some steps, by type."""
        steps, rows = 3 if self.quick else 300, []
        for model in self.models:
            row: dict[str, Any] = {"model": model, "steps": steps}
            for precision in ("float32", "bfloat16"):
                trainer = self.trainer(self.small(model, precision=precision, steps=steps))
                for step in range(steps):
                    trainer.train_step(step)
                row[f"{precision}, bits/byte"] = trainer.evaluate()["bits_per_byte"]
                row[f"{precision}, skipped"] = trainer.skipped.counts()[0]
            rows.append(row)
        return rows

    def texts(self) -> Rows:
        """Sampling and evaluation."""
        rows, number = [], 8 if self.quick else 1024
        for model in self.models:
            trainer = self.trainer(self.small(model))
            rows.append(
                {
                    "model": model,
                    "1 text, ms": 1e3 * self.seconds(partial(sampling.sample, trainer.model, 1)),
                    f"{number} texts, ms": 1e3 * self.seconds(partial(sampling.sample, trainer.model, number)),
                    "evaluation, ms": 1e3 * self.seconds(trainer.evaluate),
                }
            )
        return rows

    def group(self) -> Rows:
        """A sum over a group of one process."""
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
            try:
                values = torch.ones(11_000_000 // (100 if self.quick else 1), device=self.device)
                seconds = self.seconds(lambda: dist.all_reduce(values))
                return [
                    {"backend": backend, "MB": values.nbytes / 1e6, "ms": 1e3 * seconds, "right": bool(values[0] == 1)}
                ]
            finally:
                dist.destroy_process_group()

    # ------------------------------------------------------------------------------------------ helpers

    def types(self) -> list[tuple[str, torch.dtype, bool]]:
        """Return name, type and whether products may use tf32, of each kind of product."""
        found = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
        gpus = [("tf32", torch.float32, True), ("float16", torch.float16, False)]
        return found + (gpus if self.device.type == "cuda" else [])

    def seconds(self, body: Callable[[], object]) -> float:
        """Return the mean time of a call after the first, until the device has finished it."""
        body()
        calls, passed = repeat(lambda _: body(), 0.02 if self.quick else 0.5, self.device)
        return passed / calls

    def stored(self, trainer: Trainer) -> Checkpoint:
        """Return the trainer's state as a checkpoint in memory, as if it had been read back."""
        state = {"skipped": trainer.skipped.counts()}
        return Checkpoint(0, None, state, to_dict(trainer.config), "in memory", trainer.tensors())


SECTIONS = ("machine", "ceilings", "noise", "cpu", "resume", "steps", "waits", "bound", "texts", "group")
"""Methods of ``Check``, the most useful first."""


def pytorch_defaults() -> None:
    """Set PyTorch's defaults for GPUs: LSTMs and convolutions use tf32, other products do not."""
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    torch.backends.cudnn.deterministic = False


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Allow or forbid tf32 in matrix products and cuDNN inside the context."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Return the gradients of the first batch by parameter name, on the CPU in float64; clear those of the trainer."""
    trainer.network.train()
    trainer.forward_backward(trainer.step_inputs(trainer.train_batches.batch(0), 0))
    named = trainer.raw.named_parameters()
    found = {name: value.grad.detach().double().cpu() for name, value in named if value.grad is not None}
    trainer.optimizer.zero_grad()
    return found


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the norm of the difference over all tensors, as a share of the norm of ``wanted``."""
    apart = sum(float((found[name] - value).square().sum()) for name, value in wanted.items())
    return (apart / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5


def mean_bound(terms: Terms) -> float:
    """Return the mean negative ELBO of a batch."""
    return float((terms.reconstruction.sum() + terms.kl.sum()).detach()) / len(terms.reconstruction)


def flat(trainer: Trainer) -> dict[str, Tensor]:
    """Return the state of a trainer by file and name."""
    return {f"{stem}.{name}": tensor for stem, group in trainer.tensors().items() for name, tensor in group.items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return whether two states are equal."""
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def count_waits(body: Callable[[], object]) -> int:
    """Return how often a call, after its first, waits for the GPU, as far as PyTorch knows."""
    body()
    with noted_waits() as waits:
        body()
    return len(waits)


def count_kernels(body: Callable[[], object]) -> int:
    """Return how many kernels and copies a call runs on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
        body()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in watched.events())
