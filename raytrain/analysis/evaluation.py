"""Evaluation of a trained model on a split of a corpus, as sums over samples that add up over workers.

All noise is drawn by sample group, with the seed of the training loop's own evaluation. The metrics therefore do not
depend on how the samples are split over workers. The negative ELBO is the one that training reported, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytrain.config.schema import RunConfig, from_dict
from raytrain.data.batches import BUCKET_WIDTH, Batch, EvaluationBatches
from raytrain.data.cache import open_anywhere
from raytrain.data.pieces import Vocabulary, byte_vocabulary
from raytrain.data.vocabulary import PAD
from raytrain.metrics import computed_metrics
from raytrain.models import Model, build
from raytrain.models.heads import negative_log_likelihood
from raytrain.models.likelihood import (
    MIXTURE_SAMPLES,
    SYMBOLS_AT_ONCE,
    aggregate_posterior,
    importance_weighted,
    log_likelihood,
    swapped_loss,
)
from raytrain.models.noise import EVALUATION_SEED, Noise
from raytrain.models.posterior import draw_posterior, gaussian_kl
from raytrain.models.stream import state_before
from raytrain.models.terms import StreamState, Terms
from raytrain.training.loss import BoundTotals


@dataclass(frozen=True)
class Task:
    """An evaluation to do, in plain values that any worker can receive."""

    config: dict[str, Any]
    corpus: dict[str, str]
    """Address of the corpus for any node: see ``data.cache.address``."""
    split: str
    num_samples: int | None
    """Maximum number of samples; ``None`` takes all of the split."""
    iw_samples: int
    """Draws of z for the importance-weighted estimate. A model without z ignores it."""
    vocabulary: dict[str, Any] | None = None
    """Values of the model's vocabulary; ``None`` for bytes."""

    def batches(self) -> EvaluationBatches:
        """Return the batches of samples, the same for every worker.

        Raises:
            UserError: the corpus lacks the split, or the split has no sample of the model's length.
        """
        split = open_anywhere(self.corpus).split(self.split)
        vocabulary = byte_vocabulary() if self.vocabulary is None else Vocabulary.from_values(self.vocabulary)
        return EvaluationBatches(split, from_dict(self.config), self.num_samples, vocabulary)

    def share(self, tensors: dict[str, Tensor], rank: int, world_size: int, cpus: float, device: str) -> Totals:
        """Return the totals of worker ``rank`` of ``world_size`` for the weights ``tensors``, on the CPU."""
        torch.set_num_threads(max(1, int(cpus)))
        model = build(from_dict(self.config))
        model.load_state_dict(tensors)
        return evaluate(model.to(device).eval(), self.batches(), self.iw_samples, rank, world_size)


@torch.no_grad()
def evaluate(
    model: Model,
    batches: EvaluationBatches,
    iw_samples: int,
    rank: int = 0,
    world_size: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Totals:
    """Return the totals over the samples of ``rank``, on the CPU.

    Args:
        model: in evaluation mode.
        advance: called after each batch with its number of samples.
    """
    config = batches.config
    device = next(model.parameters()).device
    mixture_stride = -(-batches.num_samples // MIXTURE_SAMPLES)
    lengths = torch.from_numpy(batches.samples.vocabulary.lengths)
    totals = Totals.empty(model.latent, config, iw_samples if model.latent else 0, lengths)
    state: StreamState | None = None
    for batch in batches.batches(rank, world_size):
        state = totals.add_batch(model, batch, mixture_stride, device, state_before(model, batch, state))
        if advance is not None:
            advance(len(batch.tokens))
    return totals


@dataclass
class Totals:
    """Sums over samples, in float64 on the CPU; ``+`` combines those of several workers."""

    config: RunConfig[Any]
    iw_samples: int
    lengths: Tensor
    """[symbols]: bytes of text of each symbol."""
    bound: BoundTotals
    weighted: Tensor
    """[2]: importance-weighted NLL and Monte Carlo negative ELBO, of the same draws."""
    kl: Tensor
    """[latent]: KL by dimension."""
    by_position: Tensor
    """[2, length]: nats of the reconstruction and number of predictions at each position."""
    by_length: Tensor
    """[bins, 4]: samples, text bytes, reconstruction and KL; bin i holds lengths in [i, i + 1) x BUCKET_WIDTH bytes."""
    mixture: Tensor
    """[samples, 3 x latent]: mean, log variance and a draw of q(z | x), for samples evenly spaced among all."""

    @classmethod
    def empty(cls, latent: int, config: RunConfig[Any], iw_samples: int, lengths: Tensor) -> Totals:
        """Return the totals over no samples."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            config=config,
            iw_samples=iw_samples,
            lengths=lengths,
            bound=BoundTotals(latent),
            weighted=zeros(2),
            kl=zeros(latent),
            by_position=zeros(2, config.length),
            by_length=zeros(_longest(config, lengths) // BUCKET_WIDTH + 1, 4),
            mixture=zeros(0, 3 * latent),
        )

    def __add__(self, other: Totals) -> Totals:
        bound = BoundTotals(self.bound.latent)
        bound.sums = self.bound.sums + other.bound.sums
        return Totals(
            config=self.config,
            iw_samples=self.iw_samples,
            lengths=self.lengths,
            bound=bound,
            weighted=self.weighted + other.weighted,
            kl=self.kl + other.kl,
            by_position=self.by_position + other.by_position,
            by_length=self.by_length + other.by_length,
            mixture=torch.cat((self.mixture, other.mixture)),
        )

    def add_batch(
        self,
        model: Model,
        batch: Batch,
        mixture_stride: int,
        device: torch.device,
        state: StreamState | None,
    ) -> StreamState | None:
        """Add a batch; every ``mixture_stride``-th sample enters the aggregate posterior.

        Return the state after the chunks of a stream, given ``state`` before them.
        """
        tokens = batch.tokens.to(device)
        if model.latent == 0:
            nothing = torch.zeros(len(tokens), 0, device=device)
            if batch.previous is None or state is None:
                logits = model.predict(tokens, nothing)
            else:
                logits, state = model.read(tokens, batch.previous.to(device), state)
            self._add_elbo(model, batch, tokens, logits, nothing, nothing, nothing)
            return state
        mean, log_variance = model.encode(tokens)
        z = draw_posterior(mean, log_variance, self._noise(batch, device))
        self._add_elbo(model, batch, tokens, model.predict(tokens, z), mean, log_variance, z)
        estimates = importance_weighted(
            lambda codes: log_likelihood(model, tokens, codes),
            mean,
            log_variance,
            self._noise(batch, device),
            self.iw_samples,
            draws_at_once=max(1, SYMBOLS_AT_ONCE // tokens.numel()),
        )
        self.weighted += torch.stack(estimates).sum(1).cpu()
        rows = torch.cat((mean, log_variance, z), dim=1).double().cpu()
        taken = batch.numbers(self.config.group_size) % mixture_stride == 0
        self.mixture = torch.cat((self.mixture, rows[taken]))
        return None

    def _noise(self, batch: Batch, device: torch.device) -> Noise:
        """Return the noise of the training loop's evaluation, from its first draw."""
        return Noise(EVALUATION_SEED, 0, batch.groups, self.config.group_size, count=len(batch.tokens), device=device)

    def _add_elbo(
        self, model: Model, batch: Batch, tokens: Tensor, logits: Tensor, mean: Tensor, log_variance: Tensor, z: Tensor
    ) -> None:
        nats = negative_log_likelihood(logits, tokens).double().cpu()
        kl = gaussian_kl(mean, log_variance).double().cpu()
        code = mean.cpu(), log_variance.cpu(), z.cpu()
        terms = Terms(nats.sum(1), kl, nats.new_zeros(len(nats)), *code)
        if model.latent:
            terms.swapped = swapped_loss(model, tokens, z, self.config.group_size).double().cpu()
        self.bound.add(terms, batch.text_bytes)
        self.kl += kl.sum(0)
        self.by_position[:, : nats.shape[1]] += torch.stack((nats.sum(0), (batch.tokens != PAD).double().sum(0)))
        text_bytes = self.lengths[batch.tokens].sum(1)
        parts = torch.stack((torch.ones(len(nats)), text_bytes, nats.sum(1), kl.sum(1)), dim=1)
        self.by_length.index_add_(0, text_bytes // BUCKET_WIDTH, parts.double())

    def metrics(self, model: Model | None = None) -> dict[str, Any]:
        """Return all metrics, ready for JSON, in nats per sample unless the name says bits.

        The metrics of a latent code (from ``importance_weighted`` on) exist only for a model that has one.
        ``by_position`` holds the reconstruction: bits per prediction at each position of a sample, and the number of
        predictions. Bits x predictions adds up to the total; the KL belongs to no position.
        ``by_length`` holds the negative ELBO, in bits per byte of text.

        Args:
            model: needed for the registered metrics that have a function; without it they are left out.
        """
        bound = self.bound.metrics()
        samples, text_bytes = self.bound.sums[:2].tolist()
        bits_per_byte = samples / (math.log(2) * text_bytes)
        metrics: dict[str, Any] = {
            "samples": int(samples),
            "text_bytes": int(text_bytes),
            # no auxiliary loss is computed here; active units are among the metrics of a latent code
            **{name: value for name, value in bound.items() if name not in ("auxiliary", "active_units")},
            "reconstruction_bits_per_byte": bound["reconstruction"] * bits_per_byte,
        }
        if self.bound.latent:
            weighted, monte_carlo = (self.weighted / samples).tolist()
            metrics |= {
                "importance_weighted": weighted,
                "importance_weighted_bits_per_byte": weighted * bits_per_byte,
                "monte_carlo_bound": monte_carlo,
                "monte_carlo_bits_per_byte": monte_carlo * bits_per_byte,
                "iw_samples": self.iw_samples,
                "active_units": int(bound["active_units"]),
                **aggregate_posterior(*self.mixture.chunk(3, dim=1)),
                "mixture_samples": len(self.mixture),
                "kl_by_dimension": (self.kl / samples).tolist(),
            }
        if model is not None:
            metrics |= computed_metrics(model, bound)
        return metrics | {"by_position": self._positions(), "by_length": self._lengths()}

    def _positions(self) -> dict[str, list[Any]]:
        nats, predictions = self.by_position[:, self.by_position[1] > 0]
        return {
            "bits": (nats / predictions / math.log(2)).tolist(),
            "predictions": [int(count) for count in predictions.tolist()],
        }

    def _lengths(self) -> list[dict[str, Any]]:
        rows = []
        for number, (samples, text_bytes, reconstruction, kl) in enumerate(self.by_length.tolist()):
            if samples == 0:
                continue
            low, high = number * BUCKET_WIDTH, number * BUCKET_WIDTH + BUCKET_WIDTH - 1
            windows, documents = (self.config.sampling == name for name in ("windows", "documents"))
            longest = _longest(self.config, self.lengths) - documents  # a document has a STOP
            rows.append(
                {
                    "from_bytes": longest if windows else low,
                    "to_bytes": longest if windows else min(high, longest),
                    "samples": int(samples),
                    "bits_per_byte": (reconstruction + kl) / (math.log(2) * text_bytes),
                    "reconstruction": reconstruction / samples,
                    "kl": kl / samples,
                }
            )
        return rows


def _longest(config: RunConfig[Any], lengths: Tensor) -> int:
    """Return the most bytes that a sample may have, with a STOP; for a stream, ``config.length`` counts pieces."""
    return config.length * int(lengths.max()) if config.sampling == "stream" else config.length
