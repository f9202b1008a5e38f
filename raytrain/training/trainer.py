"""Trainer: the model, the optimiser and the batches of one worker, and one training step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain.config.schedules import auxiliary_weight, average_decay, kl_weight, learning_rate
from raytrain.config.schema import RunConfig
from raytrain.data.batches import Batch, EvaluationBatches, TrainingBatches, group_rows, rank_groups
from raytrain.data.corpus import Corpus
from raytrain.data.frequencies import symbol_frequencies
from raytrain.data.pieces import Vocabulary
from raytrain.metrics import computed_metrics
from raytrain.models import Model, build
from raytrain.models.layers import (
    CodeNorm,
    GroupBatchNorm,
    StreamState,
    Terms,
    start_from_frequencies,
    synchronise_statistics,
)
from raytrain.models.likelihood import (
    MIXTURE_SAMPLES,
    aggregate_posterior,
    estimate_likelihood,
    sample_likelihoods,
    swapped_loss,
)
from raytrain.models.noise import EVALUATION_SEED, Noise
from raytrain.models.stream import state_before
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.trained_model import stored_vocabulary
from raytrain.training.divergence import SkippedSteps
from raytrain.training.loss import BoundTotals, loss
from raytrain.training.multiplier import Multiplier

T = TypeVar("T")


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
        self.raw: Model = build(config)
        """The model whose weights the optimiser changes."""
        vocabulary = self.train_batches.samples.vocabulary
        start_from_frequencies(self.raw, symbol_frequencies(corpus.split("train"), config.sampling, vocabulary))
        self.raw.vocabulary = vocabulary
        self.raw.to(world.device)
        self.model: Model = copy_for_average(self.raw) if config.optimizer.ema else self.raw
        """The model that the run makes: the moving average of ``raw``'s weights or, without one, ``raw`` itself."""
        self.network: nn.Module = self.raw
        if world.size > 1:
            self.network = DistributedDataParallel(
                self.raw,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,  # synchronise_statistics keeps them equal on all ranks
                gradient_as_bucket_view=True,
            )
        self.optimizer = build_optimizer(self.raw, config)
        self.skipped = SkippedSteps(world.device)
        self.lanes: StreamState = self.model.stream_state(config.batch_size) if config.sampling == "stream" else {}
        """The state of all lanes of a stream; those of other ranks are as old as the last ``gather_lanes``."""
        rate = config.objective.rate
        self.multiplier = Multiplier(rate, world.device) if rate > 0 and self.model.latent > 0 else None
        self.precision = resolve_precision(config.precision, world.device)

    # ------------------------------------------------------------------------------------------ step

    def forward(
        self,
        network: nn.Module,
        batch: Batch,
        seed: int,
        step: int,
        input_dropout: float,
        state: StreamState | None = None,
    ) -> Terms:
        """Return the loss terms of a batch, with noise drawn from (seed, step, sample group).

        ``state`` is that of the lanes before the chunks of a stream.
        """
        device = self.world.device
        noise = Noise(seed, step, batch.groups, self.config.group_size, count=len(batch.tokens), device=device)
        stream = {}
        if batch.previous is not None:
            stream = {"previous": batch.previous.to(device, non_blocking=True), "state": state}
        with self.autocast():
            terms: Terms = network(batch.tokens.to(device, non_blocking=True), noise, input_dropout, **stream)
        return terms

    def forward_backward(self, batch: Batch, step: int) -> Terms:
        """Compute the gradients of the mean loss over the global batch, averaged by DDP; return the local terms.

        A local loss that is not finite makes the gradients of every rank not finite.
        """
        config = self.config
        state = {name: state[group_rows(config, batch.groups)] for name, state in self.lanes.items()}
        terms = self.forward(self.network, batch, config.seed, step, config.objective.input_dropout, state)
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
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), clip)
        num_groups = self.config.batch_size // self.config.group_size
        good = synchronise_statistics(self.raw, num_groups, norm.isfinite())
        skipped = self.skipped.count(good)
        # the fused Adam kernels read this private attribute and leave every tensor unchanged where it is 1
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        rate = learning_rate(self.config.optimizer, step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.multiplier is not None:
            self.multiplier.ascend(self.mean_kl(terms), rate, good)
        # DDP keeps gradients in its buckets
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)
        if self.model is not self.raw:
            self.update_average(step, skipped)
        self.carry_on(batch, terms, good)
        return batch, terms, norm

    @torch.no_grad()
    def update_average(self, step: int, skipped: Tensor) -> None:
        """Move the average towards the raw weights; where ``skipped`` is 1.0 instead of 0.0, it stays as it is."""
        weight = (1 - average_decay(self.config.optimizer, step)) * (1 - skipped)
        for average, parameter in zip(self.model.parameters(), self.raw.parameters(), strict=True):
            average.lerp_(parameter, weight)

    def carry_on(self, batch: Batch, terms: Terms, good: Tensor) -> None:
        """Carry the state of the batch's lanes to the next step; keep the old one if the step was not ``good``."""
        rows = group_rows(self.config, batch.groups)
        for name, state in (terms.state or {}).items():
            old = self.lanes[name][rows]
            old.copy_(torch.where(good, state, old))

    def rehearse(self) -> None:
        """Run a forward and a backward pass and discard its results.

        DDP rebuilds its buckets after the first backward pass. Doing that before any state is loaded makes the sums of
        a resumed run bit-identical to those of a run that was never stopped.
        """
        self.network.train()
        self.forward_backward(self.train_batches.batch(0, self.world.rank, self.world.size), 0)
        self.optimizer.zero_grad(set_to_none=False)
        for layer in self.raw.modules():
            if isinstance(layer, GroupBatchNorm | CodeNorm):
                layer.batch_statistics = None

    @torch.no_grad()
    def evaluate(self, draws: int = 0) -> dict[str, float]:
        """Return the metrics of the negative ELBO on the validation samples (KL weight 1, no dropout, fixed noise).

        With ``draws`` of z, also return the importance-weighted estimate of the likelihood, in nats per sample and
        bits per byte. The noise follows from the samples alone. Metrics that are registered with a function come last:
        see ``raytrain.metrics.Metric``.
        """
        self.model.eval()
        latent, device, size = self.model.latent, self.world.device, self.config.group_size
        totals = BoundTotals(latent, device)
        stride = -(-self.valid_batches.num_samples // MIXTURE_SAMPLES)
        mixture = torch.zeros(-(-self.valid_batches.num_samples // stride), 3 * latent, device=device)
        state: StreamState | None = None
        for batch in self.valid_batches.batches(self.world.rank, self.world.size):
            state = state_before(self.model, batch, state)
            terms = self.forward(self.model, batch, EVALUATION_SEED, 0, 0.0, state)
            state = terms.state
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

    @torch.no_grad()
    def losses(self, draws: int = 0) -> dict[str, list[float]]:
        """Return the loss of every validation sample, by a trainer that is alone: those whose mean ``evaluate`` gives.

        Returns:
            ``nats``: the negative ELBO or, with ``draws`` of z, the importance-weighted estimate of the negative
            log-likelihood. ``bytes``: the bytes of text. Both in the order of the samples.
        """
        self.model.eval()
        nats: list[float] = []
        text_bytes: list[float] = []
        lengths = torch.from_numpy(self.valid_batches.samples.vocabulary.lengths)
        state: StreamState | None = None
        for batch in self.valid_batches.batches():
            if draws and self.model.latent:
                with self.autocast():
                    found = sample_likelihoods(self.model, batch, self.config.group_size, draws)
            else:
                state = state_before(self.model, batch, state)
                terms = self.forward(self.model, batch, EVALUATION_SEED, 0, 0.0, state)
                state, found = terms.state, terms.reconstruction.double() + terms.kl.sum(1).double()
            nats += found.tolist()
            text_bytes += lengths[batch.tokens].sum(1).tolist()
        return {"nats": nats, "bytes": text_bytes}

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

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that changes from step to step but the counters, by stem of a checkpoint's file and name.

        ``model`` is what readers of a trained model take. ``optimizer`` is what only training needs: the moments and,
        beside a moving average, the raw weights. ``stream`` is the state of a stream's lanes; those of other ranks are
        what ``gather_lanes`` has brought here.
        """
        training = {
            f"{key}.{name}": value
            for name, parameter in self.raw.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.model is not self.raw:
            training |= {f"raw.{name}": parameter.detach() for name, parameter in self.raw.named_parameters()}
        if self.multiplier is not None:
            training |= self.multiplier.tensors()
        stream = {"stream": self.lanes} if self.lanes else {}
        return {"model": self.model.state_dict(), "optimizer": training, **stream}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return CPU copies of ``state``."""
        return {
            stem: {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in group.items()}
            for stem, group in self.state().items()
        }

    def load(self, stored: checkpoints.Checkpoint) -> None:
        """Load the tensors and the counters of a checkpoint.

        Raises:
            UserError: its tensors are not those of the model and its optimiser.
        """
        state = self.state()
        found = {stem: stored.matching(stem, group) for stem, group in state.items()}
        self.use_vocabulary(stored_vocabulary(stored))
        self.skipped.load(stored.state.get("skipped", [0, 0, 0]))
        self.model.load_state_dict(found["model"])
        for stem in state.keys() - {"model"}:
            for name, tensor in state[stem].items():
                tensor.copy_(found[stem][name])

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Read and write by ``vocabulary``, that of a checkpoint or of rank 0."""
        for batches in (self.train_batches, self.valid_batches):
            batches.samples.vocabulary = vocabulary
        self.raw.vocabulary = self.model.vocabulary = vocabulary

    def gather_lanes(self) -> None:
        """Bring the state of every rank's lanes to all ranks; each takes part. Nothing to do without a stream."""
        if self.world.size == 1:
            return
        for rank in range(self.world.size):
            rows = group_rows(self.config, rank_groups(self.config, rank, self.world.size))
            for state in self.lanes.values():
                dist.broadcast(state[rows], rank)

    def load_encoder(self, tensors: Mapping[str, Tensor]) -> None:
        """Load the weights and statistics that compute q(z | x), by their names in the model; all others stay."""
        for model in {self.raw, self.model}:
            model.load_state_dict({**model.state_dict(), **tensors})

    def share(self, step: int) -> int:
        """Broadcast rank 0's state and step to all ranks; return that step."""
        if self.world.size == 1:
            return step
        for group in ({"skipped": self.skipped.counters}, *self.state().values()):
            for tensor in group.values():
                dist.broadcast(tensor, 0)
        if not self.model.vocabulary.is_bytes:
            # each node learns its own where none came with the corpus, maybe by another version of the library
            self.use_vocabulary(Vocabulary.from_values(self.share_values(self.model.vocabulary.values())))
        return self.first(step)

    def share_values(self, values: T) -> T:
        """Return rank 0's plain values on all ranks."""
        if self.world.size == 1:
            return values
        shared = [values]
        dist.broadcast_object_list(shared, 0, device=self.world.device)
        return shared[0]

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


def copy_for_average(model: Model) -> Model:
    """Return a copy of ``model`` with weights of its own and the buffers of ``model`` itself.

    Running statistics are averages already, so those of the raw weights serve the average of the weights too.
    """
    average = copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers()}).requires_grad_(False)
    for layer in average.modules():
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()  # cuDNN wants the weights of a layer in one block, and they were copied singly
    return average


def build_optimizer(model: nn.Module, config: RunConfig[Any]) -> torch.optim.AdamW:
    """Return fused AdamW with its moments allocated, so that a checkpoint can be loaded into them.

    Weight decay acts on parameters of two or more dimensions: matrices and convolution kernels, neither biases nor the
    scales of normalisation.
    """
    settings = config.optimizer
    decaying = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer
