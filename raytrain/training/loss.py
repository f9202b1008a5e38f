"""Loss and negative ELBO: the objective that training minimises, and the totals of the bound that it reports."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from raytrain.config.schema import RunConfig
from raytrain.models.terms import Terms
from raytrain.training.multiplier import Multiplier


def loss(
    terms: Terms,
    config: RunConfig[Any],
    weight: float | Tensor,
    alpha: float | Tensor,
    multiplier: Multiplier | None = None,
) -> Tensor:
    """Return J = reconstruction + weight * KL + alpha * auxiliary, in nats, summed over the local samples.

    Free bits and the target KL act on the mean KL of each group of samples, never of the local batch. So J does not
    depend on how the batch is split over workers. The term of a ``multiplier`` is linear in the KL: averaged over the
    workers, its gradient is the gradient for the mean KL of the whole batch.
    """
    objective = config.objective
    kl = terms.kl.unflatten(0, (-1, config.group_size)).mean(1)
    if objective.free_bits > 0 and kl.shape[1] > 0:
        penalty = kl.clamp(min=objective.free_bits / kl.shape[1]).sum(1)
    elif objective.target_kl > 0:
        penalty = (kl.sum(1) - objective.target_kl).abs()
    else:
        penalty = kl.sum(1)
    total = terms.reconstruction.sum() + weight * (config.group_size * penalty.sum()) + alpha * terms.auxiliary.sum()
    return total if multiplier is None else total + multiplier.term(terms.kl)


class BoundTotals:
    """Sums over samples that give the parts of the negative ELBO; they add up over batches and ranks."""

    ACTIVE_VARIANCE = 0.01
    """A latent dimension is active if the variance of its posterior mean over samples exceeds this
    (Burda et al. 2016)."""

    def __init__(self, latent: int, device: torch.device | str = "cpu") -> None:
        self.latent = latent
        self.sums = torch.zeros(6 + 2 * latent, dtype=torch.float64, device=device)
        """samples, text bytes, reconstruction, KL, auxiliary, swapped, sum of means, sum of squared means"""

    def add(self, terms: Terms, text_bytes: int) -> None:
        """Add the samples of a batch."""
        swapped = terms.auxiliary.new_zeros(()) if terms.swapped is None else terms.swapped
        parts = (terms.reconstruction, terms.kl, terms.auxiliary, swapped)
        mean = terms.mean.detach().double()
        counts = mean.new_tensor([len(mean), text_bytes])
        sums = torch.stack([part.detach().double().sum() for part in parts])
        self.sums += torch.cat((counts, sums, mean.sum(0), mean.square().sum(0)))

    def metrics(self) -> dict[str, float]:
        """Return reconstruction, KL, auxiliary loss and negative ELBO (``bound``) in nats per sample, and active units.

        ``bits_per_byte`` is the negative ELBO in another unit. If codes were swapped (in evaluations of a latent code),
        ``used`` is how much the swap adds to the reconstruction. The negative ELBO has KL weight 1 and no auxiliary
        loss, whatever training used.
        """
        samples, text_bytes, reconstruction, kl, auxiliary, swapped = self.sums[:6].tolist()
        means, squares = self.sums[6:].view(2, self.latent) / samples
        variance = squares - means.square()
        used = {"used": (swapped - reconstruction) / samples} if swapped else {}
        return used | {
            "reconstruction": reconstruction / samples,
            "kl": kl / samples,
            "auxiliary": auxiliary / samples,
            "bound": (reconstruction + kl) / samples,
            "bits_per_byte": (reconstruction + kl) / (math.log(2) * text_bytes),
            "active_units": float((variance > self.ACTIVE_VARIANCE).sum()),
        }
