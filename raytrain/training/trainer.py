"""Trainer: the model, the optimiser and the batches of one worker, and one training step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain.config.schedules import auxiliary_weight, kl_weight, learning_rate
from raytrain.config.schema import RunConfig
from raytrain.data.batches import Batch, EvaluationBatches, TrainingBatches, rank_groups
from raytrain.data.corpus import Corpus
from raytrain.data.frequencies import symbol_frequencies
from raytrain.metrics import computed_metrics
from raytrain.models import Model, build
from raytrain.models.layers import (
    CodeNorm,
    GroupBatchNorm,
    Terms,
    start_from_frequencies,
    synchronise_statistics,
)
from raytrain.models.likelihood import MIXTURE_SAMPLES, aggregate_posterior, estimate_likelihood, swapped_loss
from raytrain.models.noise import EVALUATION_SEED, Noise
from raytrain.runs import checkpoint as checkpoints
from raytrain.training.divergence import SkippedSteps
from raytrain.training.loss import BoundTotals, loss
from raytrain.training.multiplier import Multiplier


@dataclass(frozen=True, kw_only=True)
class World:
    """Rank of a worker, number of workers, and the device that it computes on."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Trainer:
    """The state of a run on one worker, with the training step, the evaluation and the checkpointed tensors."""

    def __init__(self, config: RunConfig[Any], corpus: Corpus, world: World) -> None:
        rank_groups(config, world.rank, world.size)  # refuses more workers than groups before anything is built
        self.config = config
        self.world = world
        self.train_batches = TrainingBatches(corpus, config)
        self.valid_batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
        self.model: Model = build(config)
        start_from_frequencies(self.model, symbol_frequencies(corpus.split("train"), config.sampling))
        self.model.to(world.device)
        self.network: nn.Module = self.model
        if world.size > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,  # synchronise_statistics keeps them equal on all ranks
                gradient_as_bucket_view=True,
            )
        self.optimizer = build_optimizer(self.model, config)
        self.skipped = SkippedSteps(world.device)
        rate = config.objective.rate
        self.multiplier = Multiplier(rate, world.device) if rate > 0 and self.model.latent > 0 else None
        self.precision = resolve_precision(config.precision, world.device)

    # ------------------------------------------------------------------------------------------ step

    def forward(self, network: nn.Module, batch: Batch, seed: int, step: int, input_dropout: float) -> Terms:
        """Return the loss terms of a batch, with noise drawn from (seed, step, sample group)."""
        device = self.world.device
        noise = Noise(seed, step, batch.groups, self.config.group_size, count=len(batch.tokens), device=device)
        with self.autocast():
            terms: Terms = network(batch.tokens.to(device, non_blocking=True), noise, input_dropout)
        return terms

    def forward_backward(self, batch: Batch, step: int) -> Terms:
        """Compute the gradients of the mean loss over the global batch, averaged by DDP; return the local terms.

        A local loss that is not finite makes the gradients of every rank not finite.
        """
        config = self.config
        terms = self.forward(self.network, batch, config.seed, step, config.objective.input_dropout)
        weight = kl_weight(config.objective, step, config.steps)
        alpha = auxiliary_weight(config.objective, step, config.steps)
        # DDP divides the sum over ranks by their number
        mean = loss(terms, config, weight, alpha, self.multiplier) * (self.world.size / config.batch_size)
        # a loss may overflow while its gradients do not: NaN gradients tell the other ranks without another message
        mean.backward(torch.where(mean.detach().isfinite(), 1.0, math.nan))
        return terms

    def train_step(self, step: int) -> tuple[Batch, Terms, Tensor]:
        """Take one optimiser step; return the local batch, its terms and the gradient norm before clipping.

        A step whose loss, gradients or batch statistics are not finite on any rank changes nothing but the counters in
        ``skipped``, on all ranks alike. The decision stays on the device: the host does not wait for it.
        """
        self.network.train()
        batch = self.train_batches.batch(step, self.world.rank, self.world.size)
        terms = self.forward_backward(batch, step)
        clip = self.config.optimizer.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        num_groups = self.config.batch_size // self.config.group_size
        good = synchronise_statistics(self.model, num_groups, norm.isfinite())
        # the fused Adam kernels read this private attribute and leave every tensor unchanged where it is 1
        self.optimizer.found_inf = self.skipped.count(good)  # type: ignore[attr-defined]
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.multiplier is not None:
            self.multiplier.ascend(self.mean_kl(terms), rate, good)
        self.optimizer.zero_grad(set_to_none=False)
        return batch, terms, norm

    def rehearse(self) -> None:
        """Run a forward and a backward pass and discard its results.

        DDP rebuilds its buckets after the first backward pass. Doing that before any state is loaded makes the sums of
        a resumed run bit-identical to those of a run that was never stopped.
        """
        self.network.train()
        self.forward_backward(self.train_batches.batch(0, self.world.rank, self.world.size), 0)
        self.optimizer.zero_grad(set_to_none=False)
        for layer in self.model.modules():
            if isinstance(layer, GroupBatchNorm | CodeNorm):
                layer.batch_statistics = None

    @torch.no_grad()
    def evaluate(self, draws: int = 0) -> dict[str, float]:
        """Return the metrics of the negative ELBO on the validation samples (KL weight 1, no dropout, fixed noise).

        With ``draws`` of z, also return the importance-weighted estimate of the likelihood, in nats per sample and
        bits per byte. The noise follows from the samples alone. Metrics that are registered with a function come last:
        see ``raytrain.metrics.Metric``.
        """
        self.network.eval()
        latent, device, size = self.model.latent, self.world.device, self.config.group_size
        totals = BoundTotals(latent, device)
        stride = -(-self.valid_batches.num_samples // MIXTURE_SAMPLES)
        mixture = torch.zeros(-(-self.valid_batches.num_samples // stride), 3 * latent, device=device)
        for batch in self.valid_batches.batches(self.world.rank, self.world.size):
            terms = self.forward(self.model, batch, EVALUATION_SEED, 0, 0.0)
            if latent:
                with self.autocast():
                    terms.swapped = swapped_loss(self.model, batch.tokens.to(device), terms.z, size)
                numbers = batch.numbers(size)
                taken = numbers % stride == 0
                rows = torch.cat((terms.mean, terms.log_variance, terms.z), dim=1)
                mixture[(numbers[taken] // stride).to(device)] = rows[taken.to(device)]
            totals.add(terms, batch.text_bytes)
        metrics = self.reduce(totals).metrics()
        if latent:
            metrics |= self.information(mixture)
        if draws:
            metrics |= self.likelihood(metrics, draws)
        return metrics | computed_metrics(self.model, metrics)

    def information(self, mixture: Tensor) -> dict[str, float]:
        """Return the mutual information of samples and codes.

        ``mixture`` [samples, 3 x latent] has mean, log variance and z of this rank's samples, and zeros elsewhere.
        """
        if self.world.size > 1:
            dist.all_reduce(mixture)  # each row is one rank's: the sum rounds nothing
        return {"mutual_information": aggregate_posterior(*mixture.chunk(3, dim=1))["mutual_information"]}

    def likelihood(self, metrics: dict[str, float], draws: int) -> dict[str, float]:
        """Return the importance-weighted estimate; for a model without z it equals the negative log-likelihood."""
        if self.model.latent == 0:
            return {"nll": metrics["bound"], "nll_bits_per_byte": metrics["bits_per_byte"]}
        batches = self.valid_batches.batches(self.world.rank, self.world.size)
        with self.autocast():
            sums = estimate_likelihood(self.model, batches, self.config.group_size, draws)
        if self.world.size > 1:
            dist.all_reduce(sums)
        nats = float(sums[0] / sums[1])
        return {"nll": nats, "nll_bits_per_byte": metrics["bits_per_byte"] * nats / metrics["bound"]}

    def batch_metrics(self, batch: Batch, terms: Terms) -> dict[str, float]:
        """Return the metrics of a training batch over all ranks."""
        totals = BoundTotals(self.model.latent, self.world.device)
        totals.add(terms, batch.text_bytes)
        return self.reduce(totals).metrics()

    def mean_kl(self, terms: Terms) -> Tensor:
        """Return the mean KL per sample of the step's batch over all ranks, without dimensions."""
        total = terms.kl.detach().sum()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total / self.config.batch_size

    def reduce(self, totals: BoundTotals) -> BoundTotals:
        """Sum the totals over all ranks, in place."""
        if self.world.size > 1:
            dist.all_reduce(totals.sums)
        return totals

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which matrix products use bfloat16 if that is the precision; losses stay in float32."""
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    # ----------------------------------------------------------------------------------------- state

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return CPU copies of everything that changes from step to step: weights, statistics, moments, multiplier."""
        groups = {"model": self.model.state_dict(), "optimizer": self.moments()}
        return {
            stem: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in group.items()}
            for stem, group in groups.items()
        }

    def moments(self) -> dict[str, Tensor]:
        """Return the state of the optimisers by its names in a checkpoint: Adam's moments, and the multiplier."""
        moments = {
            f"{key}.{name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        return moments | ({} if self.multiplier is None else self.multiplier.tensors())

    def load(self, stored: checkpoints.Checkpoint) -> None:
        """Load the tensors and the counters of a checkpoint.

        Raises:
            UserError: its tensors are not those of the model.
        """
        expected = self.tensors()
        weights, moments = (stored.matching(stem, expected[stem]) for stem in ("model", "optimizer"))
        self.skipped.load(stored.state.get("skipped", [0, 0, 0]))
        self.model.load_state_dict(weights)
        for name, value in self.moments().items():
            value.copy_(moments[name])

    def load_encoder(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights and statistics that compute q(z | x), by their names in the model; all others stay."""
        self.model.load_state_dict({**self.model.state_dict(), **tensors})

    def share(self, step: int) -> int:
        """Broadcast rank 0's state and step to all ranks; return that step."""
        if self.world.size == 1:
            return step
        for tensor in [self.skipped.counters, *self.model.state_dict().values(), *self.moments().values()]:
            dist.broadcast(tensor, 0)
        return self.first(step)

    def first(self, number: int) -> int:
        """Return rank 0's number on all ranks."""
        if self.world.size == 1:
            return number
        shared = torch.tensor(number, device=self.world.device)
        dist.broadcast(shared, 0)
        return int(shared)


def resolve_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bfloat16 where the hardware multiplies bfloat16 matrices, otherwise float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = torch.cpu.get_capabilities()
        fast = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return "bfloat16" if fast else "float32"


def build_optimizer(model: nn.Module, config: RunConfig[Any]) -> torch.optim.Adam:
    """Return fused Adam with its moments allocated, so that a checkpoint can be loaded into them."""
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
