"""Trainer: the model, the optimiser and the batches of one worker, and one training step."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raytrain.config.schema import RunConfig, in_force
from raytrain.data.batches import (
    EVALUATION_GROUPS,
    GPU_EVALUATION_GROUPS,
    Batch,
    EvaluationBatches,
    TrainingBatches,
    group_rows,
    rank_groups,
)
from raytrain.data.corpus import Corpus
from raytrain.data.frequencies import symbol_frequencies
from raytrain.data.pieces import Vocabulary
from raytrain.data.pools import part_of
from raytrain.metrics import computed_metrics
from raytrain.models import Model, build
from raytrain.models.heads import start_from_frequencies
from raytrain.models.likelihood import (
    MIXTURE_SAMPLES,
    aggregate_posterior,
    estimate_likelihood,
    sample_likelihoods,
    swapped_loss,
)
from raytrain.models.noise import EVALUATION_SEED, Noise
from raytrain.models.normalisation import CodeNorm, GroupBatchNorm, synchronise_statistics
from raytrain.models.stream import state_before
from raytrain.models.terms import StreamState, Terms
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.trained_model import stored_vocabulary
from raytrain.training.divergence import SkippedSteps
from raytrain.training.gradients import average_in_bfloat16
from raytrain.training.loss import BoundTotals, loss
from raytrain.training.multiplier import Multiplier
from raytrain.training.precision import NARROW, resolve_precision, set_up_products
from raytrain.training.recorder import StepRecorder
from raytrain.training.step_inputs import StepInputs, schedule_of
from raytrain.utils.errors import UserError

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
        self.changes_made = 0
        """Number of changes of the config that are in force: none at the first step."""
        self.current = in_force(config, 0)
        """The config in force at the current step: ``config`` with the changes that are due."""
        self.world = world
        self._corpus = corpus
        self.train_batches = TrainingBatches(corpus, config)
        self.valid_batches = self.evaluation_batches(corpus)
        self.raw: Model = build(config)
        """The model whose weights the optimiser changes."""
        vocabulary = self.train_batches.samples.vocabulary
        start_from_frequencies(
            self.raw, symbol_frequencies(part_of(corpus, "train", config), config.sampling, vocabulary)
        )
        self.raw.vocabulary = vocabulary
        self.raw.to(world.device)
        self.model: Model = copy_for_average(self.raw) if config.optimizer.ema else self.raw
        """The model that the run produces: the moving average of ``raw``'s weights or, without one, ``raw`` itself."""
        self.network: nn.Module = self.raw
        if world.size > 1:
            self.network = DistributedDataParallel(
                self.raw,
                device_ids=[world.device] if world.device.type == "cuda" else None,
                forward_sync_buffers=False,  # synchronise_statistics keeps them equal on all ranks
                gradient_as_bucket_view=True,
            )
            if config.gradients == "bfloat16":
                self.network.register_comm_hook(world.size, average_in_bfloat16)
        self.skipped = SkippedSteps(world.device)
        self.lanes: StreamState = self.model.stream_state(config.batch_size) if config.sampling == "stream" else {}
        """The state of all lanes of a stream; those of other ranks are as old as the last ``gather_lanes``."""
        rate = config.objective.rate
        self.multiplier = Multiplier(rate, world.device) if rate > 0 and self.model.latent > 0 else None
        self.precision = resolve_precision(config.precision, world.device)
        self.loss_scale = config.batch_size if self.precision == "float16" else 1.0
        """Factor of the loss in backward passes. With the mean over a batch, a sample's gradients underflow in float16;
        with the sum they do not."""
        if world.device.type == "cuda":
            set_up_products(self.precision)
        self.recorder: StepRecorder | None = None
        """Replays recorded steps on a GPU; ``None`` if every step runs eagerly."""
        if records_steps(config, world):
            self.recorder = self.new_recorder()

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        """The optimiser with its moments, built when first asked for: an evaluation needs none, and PyTorch's compiler,
        which every optimiser of PyTorch imports, takes as long to import as the rest of it."""
        return build_optimizer(self.raw, self.config)

    # ------------------------------------------------------------------------------------------ step

    def train_step(self, step: int) -> tuple[Batch, Terms, Tensor]:
        """Take one optimiser step; return the local batch, its terms and the gradient norm before clipping.

        If loss, gradients or batch statistics are not finite on any rank, the step changes only the counters in
        ``skipped``, identically on all ranks. The decision stays on the device: the host does not wait for it. The next
        step overwrites the terms and the norm of a recorded step.

        Raises:
            UserError: the step does not fit in the memory of the GPU.
        """
        self.network.train()
        self.make_changes(step)
        batch = self.train_batches.batch(step, self.world.rank, self.world.size)
        try:
            if self.recorder is not None and self.recorder.works:
                terms, norm = self.recorder.run(batch, step, lambda: self.step_inputs(batch, step))
            else:
                terms, norm = self.compute_step(self.step_inputs(batch, step))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"a step on {len(batch.tokens)} samples of {batch.tokens.shape[1]} symbols does not fit the memory of "
                "the GPU: give a smaller --batch-size, or more workers"
            ) from error
        return batch, terms, norm

    def make_changes(self, step: int) -> None:
        """Apply the changes of the config that are due at ``step``, whichever step was taken before."""
        due = sum(change.step <= step for change in self.config.changes)
        if due == self.changes_made:
            return
        self.changes_made, self.current = due, in_force(self.config, step)
        if self.multiplier is not None:
            self.multiplier.rate = self.current.objective.rate
        if self.recorder is not None:
            self.recorder = self.new_recorder()  # recorded steps keep the values that they were recorded with

    def new_recorder(self) -> StepRecorder:
        """Return a recorder that has not recorded any step."""
        return StepRecorder(self.current, self.world.device, self.compute_step, self.recorded_noise, self.optimizer)

    def step_inputs(self, batch: Batch, step: int) -> StepInputs:
        """Return the inputs of a step, copied to the device."""
        device = self.world.device
        return StepInputs(
            tokens=batch.tokens.to(device, non_blocking=True),
            previous=None if batch.previous is None else batch.previous.to(device, non_blocking=True),
            groups=batch.groups,
            noise=self.noise(batch, self.config.seed, step),
            schedule=schedule_of(self.current, step, device),
        )

    def noise(self, batch: Batch, seed: int, step: int, keys: Tensor | None = None) -> Noise:
        """Return the noise of a batch: see ``Noise``."""
        size, device = self.config.group_size, self.world.device
        return Noise(seed, step, batch.groups, size, count=len(batch.tokens), device=device, keys=keys)

    def recorded_noise(self, batch: Batch, keys: Tensor) -> Noise:
        """Return the noise of a batch whose draws have ``keys``."""
        return self.noise(batch, self.config.seed, 0, keys)

    def compute_step(self, inputs: StepInputs) -> tuple[Terms, Tensor]:
        """Do the device's part of ``train_step``: read no value back to the host, and take no other input."""
        schedule = inputs.schedule
        terms = self.forward_backward(inputs)
        clip = self.config.optimizer.clip or float("inf")
        norm = nn.utils.clip_grad_norm_(self.raw.parameters(), clip)
        num_groups = self.config.batch_size // self.config.group_size
        good = synchronise_statistics(self.raw, num_groups, norm.isfinite())
        skipped = self.skipped.count(good)
        # the fused Adam kernels read this private attribute and leave every tensor unchanged where it is 1
        self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.learning_rate
        self.optimizer.step()
        if self.multiplier is not None:
            self.multiplier.ascend(self.mean_kl(terms), schedule.learning_rate, good)
        # DDP keeps gradients in its buckets
        self.optimizer.zero_grad(set_to_none=self.world.size == 1)
        if self.model is not self.raw:
            self.update_average(schedule.average_share, skipped)
        self.carry_on(inputs.groups, terms, good)
        return terms, norm

    def forward_backward(self, inputs: StepInputs) -> Terms:
        """Compute the gradients of the mean loss over the global batch, averaged by DDP; return the local terms.

        A local loss that is not finite makes the gradients of every rank not finite.
        """
        config, schedule = self.current, inputs.schedule
        terms = self.step_terms(inputs)
        # DDP divides the sum over ranks by their number
        share = self.world.size / config.batch_size
        mean = loss(terms, config, schedule.kl_weight, schedule.alpha, self.multiplier) * share
        # a loss may overflow while its gradients do not: NaN gradients tell the other ranks without another message
        mean.backward(torch.where(mean.detach().isfinite(), self.loss_scale, math.nan))
        if self.loss_scale != 1:
            gradients = [parameter.grad for parameter in self.raw.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, 1 / self.loss_scale)
        return terms

    def step_terms(self, inputs: StepInputs) -> Terms:
        """Return the loss terms of a step; for a stream, given the state of its lanes."""
        stream = {}
        if inputs.previous is not None:
            rows = group_rows(self.config, inputs.groups)
            stream = {"previous": inputs.previous, "state": {name: state[rows] for name, state in self.lanes.items()}}
        with self.autocast():
            terms: Terms = self.network(inputs.tokens, inputs.noise, self.current.objective.input_dropout, **stream)
        return terms

    @torch.no_grad()
    def update_average(self, share: float | Tensor, skipped: Tensor) -> None:
        """Move the average by ``share`` of the distance to the raw weights; leave it if ``skipped`` is 1.0."""
        weight = share * (1 - skipped)
        for average, parameter in zip(self.model.parameters(), self.raw.parameters(), strict=True):
            average.lerp_(parameter, weight)

    def carry_on(self, groups: range, terms: Terms, good: Tensor) -> None:
        """Carry the state of the groups' lanes to the next step; keep the old one if the step was not ``good``."""
        rows = group_rows(self.config, groups)
        for name, state in (terms.state or {}).items():
            old = self.lanes[name][rows]
            old.copy_(torch.where(good, state, old))

    def rehearse(self) -> None:
        """Run a forward and a backward pass and discard the results.

        DDP rebuilds its buckets after the first backward pass. Doing that before any state is loaded makes the sums of
        a resumed run bit-identical to those of a run that was never stopped.
        """
        self.network.train()
        self.forward_backward(self.step_inputs(self.train_batches.batch(0, self.world.rank, self.world.size), 0))
        self.optimizer.zero_grad(set_to_none=False)
        for layer in self.raw.modules():
            if isinstance(layer, GroupBatchNorm | CodeNorm):
                layer.batch_statistics = None

    def evaluation_batches(self, corpus: Corpus, vocabulary: Vocabulary | None = None) -> EvaluationBatches:
        """Return the validation samples; ``vocabulary`` is a model's, if it is not the one that the corpus gives."""
        groups = GPU_EVALUATION_GROUPS if self.world.device.type == "cuda" else EVALUATION_GROUPS
        valid, num_samples = part_of(corpus, "valid", self.config), self.config.evaluate_samples
        return EvaluationBatches(valid, self.config, num_samples, vocabulary, groups)

    @torch.no_grad()
    def evaluate(self, draws: int = 0) -> dict[str, float]:
        """Return the metrics of the negative ELBO on the validation samples (KL weight 1, no dropout, fixed noise).

        With ``draws`` of z, also return the importance-weighted estimate of the likelihood, in nats per sample and
        bits per byte. The noise depends only on the samples. Metrics that are registered with a function come last:
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
            terms = self.evaluated_terms(batch, state)
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

    def evaluated_terms(self, batch: Batch, state: StreamState | None) -> Terms:
        """Return the terms of a validation batch; for a stream, given ``state``."""
        device = self.world.device
        stream = {}
        if batch.previous is not None:
            stream = {"previous": batch.previous.to(device, non_blocking=True), "state": state}
        with self.autocast():
            tokens, noise = batch.tokens.to(device, non_blocking=True), self.noise(batch, EVALUATION_SEED, 0)
            terms: Terms = self.model(tokens, noise, 0.0, **stream)
        return terms

    @torch.no_grad()
    def losses(self, draws: int = 0) -> dict[str, list[float]]:
        """Return the loss of every validation sample, whose mean ``evaluate`` returns; for a single worker only.

        Returns:
            ``nats``: the negative ELBO or, with ``draws`` of z, the importance-weighted estimate of the negative
            log-likelihood. ``bytes``: the bytes of text. Both are in the order of the samples.
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
                terms = self.evaluated_terms(batch, state)
                state, found = terms.state, terms.reconstruction.double() + terms.kl.sum(1).double()
            nats += found.tolist()
            text_bytes += lengths[batch.tokens].sum(1).tolist()
        return {"nats": nats, "bytes": text_bytes}

    def information(self, mixture: Tensor) -> dict[str, float]:
        """Return the mutual information between samples and codes.

        ``mixture`` [samples, 3 x latent] has mean, log variance and z of this rank's samples, and zeros elsewhere.
        """
        if self.world.size > 1:
            dist.all_reduce(mixture)  # each row belongs to one rank: the sum rounds nothing
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
        """Return the mean KL per sample of the step's batch over all ranks, a scalar."""
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
        """Return a context in which matrix products use the type of the precision; losses stay in float32."""
        kind = NARROW.get(self.precision)
        return torch.autocast(self.world.device.type, kind or torch.bfloat16, enabled=kind is not None)

    # ----------------------------------------------------------------------------------------- state

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return all state that changes from step to step except the counters, by checkpoint file stem and name.

        ``model`` holds the tensors that readers of a trained model need. ``optimizer`` holds those that only training
        needs: the moments and the multiplier and, with a moving average, the raw weights. ``stream`` is the state of a
        stream's lanes; other ranks' lanes are as ``gather_lanes`` last brought them.
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
        """Return contiguous copies of ``state`` on the CPU; wait for a GPU once, not for each tensor."""
        on_gpu = self.world.device.type == "cuda"
        copies = {
            stem: {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu).copy_(
                    tensor.detach(), non_blocking=on_gpu
                )
                for name, tensor in group.items()
            }
            for stem, group in self.state().items()
        }
        if on_gpu:
            torch.cuda.synchronize(self.world.device)
        return copies

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
        """Read and write text with ``vocabulary``, that of a checkpoint or of rank 0."""
        if vocabulary.digest != self.train_batches.samples.vocabulary.digest:
            self.train_batches = TrainingBatches(self._corpus, self.config, vocabulary)
            self.valid_batches = self.evaluation_batches(self._corpus, vocabulary)
        self.raw.vocabulary = self.model.vocabulary = vocabulary

    def gather_lanes(self) -> None:
        """Bring the state of every rank's lanes to all ranks; call it on each. Do nothing without a stream."""
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
            # each node learns its own if none came with the corpus, maybe with another version of the library
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


def records_steps(config: RunConfig[Any], world: World) -> bool:
    """Return whether steps are recorded as CUDA graphs: for one worker on a GPU, unless the config says otherwise."""
    return config.graphs == "auto" and world.device.type == "cuda" and world.size == 1


def copy_for_average(model: Model) -> Model:
    """Return a copy of ``model`` with weights of its own and the buffers of ``model`` itself.

    Running statistics are averages already, so those of the raw weights serve the average of the weights too.
    """
    average = copy.deepcopy(model, {id(buffer): buffer for buffer in model.buffers()}).requires_grad_(False)
    for layer in average.modules():
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()  # cuDNN wants a layer's weights in one block, and they were copied singly
    return average


def build_optimizer(model: nn.Module, config: RunConfig[Any]) -> torch.optim.AdamW:
    """Return fused AdamW with its moments allocated, so that a checkpoint can be loaded into them.

    Weight decay acts on parameters of two or more dimensions: matrices and convolution kernels, but neither biases nor
    the scales of normalisation.
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
