"""What one worker does: the training loop, top to bottom.

The same code runs under Ray Train, torchrun and one process; it needs torch, NumPy and safetensors
only. Without Ray:

    torchrun --nproc-per-node 2 -m raytrain.loop config.json --corpus CORPUS --storage FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain import checkpoint as checkpoints
from raytrain.config import RunConfig, from_dict, to_dict
from raytrain.data.batches import Batch, EvaluationBatches, TrainingBatches, rank_groups
from raytrain.data.corpus import Corpus
from raytrain.errors import UserError, run_command
from raytrain.models import Model, Noise, Terms, build
from raytrain.models.layers import GroupBatchNorm, synchronise_statistics
from raytrain.notice import PreemptedError, Rounds
from raytrain.objective import BoundTotals, kl_weight, loss
from raytrain.progress import Progress
from raytrain.storage import Storage, open_storage

EVALUATION_SEED = 0x5EED
"""Seeds the posterior noise of evaluation: the same for every run, so that bounds can be compared."""


@dataclass(frozen=True)
class World:
    """Where this worker stands among all."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Report(Protocol):
    """Where the loop's metrics go."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of one step; called on rank 0 only."""

    def pending(self) -> list[Any]:
        """What was logged and has not arrived, as JSON; a checkpoint keeps it."""

    def replay(self, records: list[Any]) -> None:
        """After a resume, before the first ``log``: what the checkpoint kept; called on rank 0 only."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The validation figures of a step; called on every rank."""

    def notice(self) -> bool:
        """Whether this worker's machine is about to be taken away; called on every rank about every two seconds."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run knows."""

    step: int
    best_step: int
    """The evaluated step with the best score."""
    best: dict[str, float]
    """Its validation figures."""
    precision: str
    """The compute type that was chosen."""
    device: str


class Trainer:
    """The state of a run on one worker, and what a step does to it."""

    def __init__(self, config: RunConfig[Any], corpus: Corpus, world: World) -> None:
        rank_groups(config, world.rank, world.size)  # refuses more workers than groups before anything is built
        self.config = config
        self.world = world
        self.train_batches = TrainingBatches(corpus, config)
        self.valid_batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
        self.model: Model = build(config).to(world.device)
        self.network: nn.Module = self.model
        if world.size > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,  # synchronise_statistics keeps them alike
                gradient_as_bucket_view=True,
            )
        self.optimizer = build_optimizer(self.model, config)
        self.precision = resolve_precision(config.precision, world.device)

    # ------------------------------------------------------------------------------------------ step

    def forward(self, network: nn.Module, batch: Batch, seed: int, step: int, input_dropout: float) -> Terms:
        """The terms of a batch, its noise drawn from (seed, step, group)."""
        device = self.world.device
        noise = Noise(seed, step, batch.groups, self.config.group_size, count=len(batch.tokens), device=device)
        with self.autocast():
            terms: Terms = network(batch.tokens.to(device, non_blocking=True), noise, input_dropout)
        return terms

    def forward_backward(self, batch: Batch, step: int) -> Terms:
        """Gradients of the mean loss over the global batch, averaged by DDP; returns the local terms."""
        config = self.config
        terms = self.forward(self.network, batch, config.seed, step, config.objective.input_dropout)
        weight = kl_weight(config.objective, step, config.steps)
        # DDP divides the sum over ranks by their number
        (loss(terms, config, weight) * (self.world.size / config.batch_size)).backward()
        return terms

    def train_step(self, step: int) -> tuple[Batch, Terms, Tensor]:
        """One optimiser step; returns the local batch, its terms and the gradient's norm before clipping."""
        self.network.train()
        batch = self.train_batches.batch(step, self.world.rank, self.world.size)
        terms = self.forward_backward(batch, step)
        synchronise_statistics(self.model, self.config.batch_size // self.config.group_size)
        clip = self.config.optimizer.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return batch, terms, norm

    def rehearse(self) -> None:
        """A forward and backward pass that leaves no trace.

        DDP orders its buckets anew after the first backward pass. Doing that before any state is loaded
        makes the sums of a resumed run the same, bit for bit, as those of one that was never stopped.
        """
        self.network.train()
        self.forward_backward(self.train_batches.batch(0, self.world.rank, self.world.size), 0)
        self.optimizer.zero_grad(set_to_none=False)
        for layer in self.model.modules():
            if isinstance(layer, GroupBatchNorm):
                layer.batch_statistics = None

    @torch.no_grad()
    def evaluate(self, draws: int = 0) -> dict[str, float]:
        """Figures of the full bound on the validation samples (KL weight 1, no dropout, fixed noise).

        With ``draws`` of z also the importance-weighted estimate of the likelihood, in nats per sample and bits per
        byte. The noise of every figure follows from the samples alone.
        """
        self.network.eval()
        totals = BoundTotals(self.model.latent, self.world.device)
        for batch in self.valid_batches.batches(self.world.rank, self.world.size):
            totals.add(self.forward(self.model, batch, EVALUATION_SEED, 0, 0.0), batch.text_bytes)
        figures = self.reduce(totals).metrics()
        return figures | self.likelihood(figures, draws) if draws else figures

    def likelihood(self, figures: dict[str, float], draws: int) -> dict[str, float]:
        """The importance-weighted estimate; of a model without z it is the bound."""
        from raytrain.evaluation import estimate_likelihood  # which needs this module

        if self.model.latent == 0:
            return {"nll": figures["bound"], "nll_bits_per_byte": figures["bits_per_byte"]}
        batches = self.valid_batches.batches(self.world.rank, self.world.size)
        with self.autocast():
            sums = estimate_likelihood(self.model, batches, self.config.group_size, draws)
        if self.world.size > 1:
            dist.all_reduce(sums)
        nats = float(sums[0] / sums[1])
        return {"nll": nats, "nll_bits_per_byte": figures["bits_per_byte"] * nats / figures["bound"]}

    def figures(self, batch: Batch, terms: Terms) -> dict[str, float]:
        """Figures of a training batch over all ranks."""
        totals = BoundTotals(self.model.latent, self.world.device)
        totals.add(terms, batch.text_bytes)
        return self.reduce(totals).metrics()

    def reduce(self, totals: BoundTotals) -> BoundTotals:
        """Totals over all ranks."""
        if self.world.size > 1:
            dist.all_reduce(totals.sums)
        return totals

    def autocast(self) -> AbstractContextManager[Any]:
        """Computes matrix products in bfloat16 where that is the precision; losses stay in float32."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    # ----------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Copies on the CPU of all that changes from step to step: weights, statistics, moments."""
        moments = {
            f"{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        groups = {"model": self.model.state_dict(), "optimizer": moments}
        return {
            stem: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in group.items()}
            for stem, group in groups.items()
        }

    def load(self, stored: checkpoints.Checkpoint) -> None:
        """Take over the tensors of a checkpoint."""
        self.model.load_state_dict(stored.tensors("model"))
        moments = stored.tensors("optimizer")
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                value.copy_(moments[f"{key}.{name}"])

    def share(self, step: int) -> int:
        """Give rank 0's state and step to all ranks; returns that step."""
        if self.world.size == 1:
            return step
        moments = [value for slots in self.optimizer.state.values() for value in slots.values()]
        number = torch.tensor(step, device=self.world.device)
        for tensor in [number, *self.model.state_dict().values(), *moments]:
            dist.broadcast(tensor, 0)
        return int(number)


def train(
    config: RunConfig[Any], corpus: Corpus, world: World, storage: Storage, report: Report, draws: int = 0
) -> Outcome:
    """Train until ``config.steps``, from the newest valid checkpoint under ``storage`` if there is one.

    The best checkpoint is the one with the lowest bound or, where evaluations take ``draws`` of z for it, with the
    lowest estimate of the negative log-likelihood.

    Raises:
        UserError: more workers than sample groups, or a corpus shorter than one sample.
        FloatingPointError: the loss or a validation figure is not finite.
        PreemptedError: a worker's machine is about to go; the newest checkpoint has all steps that were done.
    """
    score = "nll" if draws else "bound"
    trainer = Trainer(config, corpus, world)
    trainer.rehearse()

    # ------------------------------------------------------------------------------------- resume
    step, best_step, best = 0, 0, {}
    if world.rank == 0 and (stored := checkpoints.latest(storage)) is not None:
        trainer.load(stored)
        step, best_step, best = stored.step, stored.state["best_step"], stored.state["best"]
        report.replay(stored.state["pending"])
    step = trainer.share(step)

    throughput, rounds = Throughput(world.size), Rounds(world, step)
    with checkpoints.CheckpointWriter(storage) if world.rank == 0 else nullcontext() as writer:
        while step < config.steps:
            # ----------------------------------------------------------------------------------- step
            batch, terms, norm = trainer.train_step(step)
            throughput.count(batch)
            step += 1
            last = step == config.steps
            metrics: dict[str, float] = {}

            # ------------------------------------------------------------------------------------ log
            if step % config.log_every == 0 or last:
                figures = trainer.figures(batch, terms)
                check_finite("loss is", figures, step)
                metrics |= {f"train/{name}": value for name, value in figures.items() if name != "active_units"}
                metrics |= {
                    "train/kl_weight": kl_weight(config.objective, step - 1, config.steps),
                    "train/gradient_norm": norm.item(),
                    "train/learning_rate": learning_rate(config, step - 1),
                    "train/bytes_per_second": throughput.rate(),
                }

            # ------------------------------------------------------------------------------- evaluate
            evaluation: dict[str, float] = {}
            if step % config.evaluate_every == 0 or last:
                with throughput.paused():
                    evaluation = trainer.evaluate(draws)
                # before it is saved: a checkpoint of it would help nobody
                check_finite("validation figures are", evaluation, step)
                metrics |= {f"valid/{name}": value for name, value in evaluation.items()}
                if not best or evaluation[score] < best[score]:
                    best_step, best = step, evaluation
                    metrics |= {f"best/{name}": value for name, value in best.items()}
            if metrics and world.rank == 0:
                report.log(step, metrics)

            # ----------------------------------------------------------------------------- checkpoint
            leave = rounds.due(step) and rounds.ask(step, report.notice()) and not last
            if writer is not None and (evaluation or leave or step % config.checkpoint_every == 0):
                snapshot = checkpoints.Snapshot(
                    step=step,
                    tensors=trainer.tensors(),
                    state={
                        "best_step": best_step,
                        "best": best,
                        "pending": report.pending(),
                        "corpus": corpus.digest,
                    },
                    config=to_dict(config),
                )
                writer.save(snapshot, score=evaluation.get(score))
            if evaluation:
                report.evaluated(step, evaluation)
            if leave:
                if writer is not None:
                    writer.wait()
                raise PreemptedError(f"a machine under the run is about to go; saved at step {step}")
    return Outcome(step, best_step, best, trainer.precision, world.device.type)


# --------------------------------------------------------------------------------------------- parts


def check_finite(what: str, figures: dict[str, float], step: int) -> None:
    """End a run that has diverged.

    Raises:
        FloatingPointError: a figure is not finite.
    """
    if not all(math.isfinite(value) for value in figures.values()):
        raise FloatingPointError(
            f"the {what} not finite at step {step}: try a lower --optimizer.learning-rate or --optimizer.clip 1"
        )


def learning_rate(config: RunConfig[Any], step: int) -> float:
    """The paper's decay, with a hundredth of the steps for an epoch: x decay at each after decay_start."""
    optimizer = config.optimizer
    # the small number keeps a step that is a whole hundredth from being rounded down
    hundredths = math.floor(100 * (step / config.steps - optimizer.decay_start) + 1e-9)
    return optimizer.learning_rate * optimizer.decay ** max(0, hundredths)


def build_optimizer(model: nn.Module, config: RunConfig[Any]) -> torch.optim.Adam:
    """Adam whose moments exist from the start, so that a checkpoint can be loaded into them."""
    settings = config.optimizer
    optimizer = torch.optim.Adam(
        model.parameters(), lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), fused=True
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bfloat16 where the hardware multiplies bfloat16 matrices, otherwise float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bfloat16" if fast else "float32"


class Throughput:
    """Bytes of text a second over all workers, evaluation left out."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.bytes = 0
        self.started = time.perf_counter()

    def count(self, batch: Batch) -> None:
        """Count a step; the other ranks' shares are taken to be as large as this one's."""
        self.bytes += batch.text_bytes * self.world_size

    def rate(self) -> float:
        """The rate since the last call."""
        now = time.perf_counter()
        rate = self.bytes / (now - self.started)
        self.bytes, self.started = 0, now
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that passes inside."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began


# ------------------------------------------------------------------------------------- without Ray


class PrintReport:
    """Prints a progress line for every record."""

    def __init__(self, config: RunConfig[Any]) -> None:
        self.progress = Progress(config.steps)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        print(self.progress.line(step, metrics), flush=True)

    def pending(self) -> list[Any]:
        return []

    def replay(self, records: list[Any]) -> None:
        """Nothing is ever pending."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The progress line has said it."""

    def notice(self) -> bool:
        return False  # nobody gives any


@contextmanager
def torchrun_world() -> Iterator[World]:
    """The world that torchrun's variables describe, or one process; NCCL on GPUs, gloo on CPUs."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(rank, size, device)
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be saving: nobody leaves before all are done
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    """Train the run of a config file on a prepared corpus."""
    parser = argparse.ArgumentParser(prog="python -m raytrain.loop", description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of a run")
    parser.add_argument("--corpus", required=True, help="folder of a prepared corpus")
    parser.add_argument("--storage", required=True, help="folder or s3:// address for checkpoints")
    arguments = parser.parse_args()
    try:
        config = from_dict(json.loads(arguments.config.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config {arguments.config}: {error}") from None
    with torchrun_world() as world:
        report = PrintReport(config)
        outcome = train(config, Corpus.open(arguments.corpus), world, open_storage(arguments.storage), report)
        if world.rank == 0:
            print(json.dumps(asdict(outcome)))


if __name__ == "__main__":
    run_command(main)
