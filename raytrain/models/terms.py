"""Terms of a model's loss, and the state that it carries along a stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

StreamState = dict[str, Tensor]
"""State that a model carries from one chunk of a stream to the next: name -> [lanes, ...], float32, no gradients."""


@dataclass
class Terms:
    """Terms of the negative ELBO of a batch, in nats per sample and float32."""

    reconstruction: Tensor
    """[batch]: -log p(x | z), summed over the sample's bytes and its STOP."""
    kl: Tensor
    """[batch, latent]: KL(q(z | x) || p(z)) by dimension; [batch, 0] without a latent code."""
    auxiliary: Tensor
    """[batch]: reconstruction loss of the auxiliary head; zeros for models without one."""
    mean: Tensor
    """[batch, latent]: mean of q(z | x)."""
    log_variance: Tensor
    """[batch, latent]: log variance of q(z | x)."""
    z: Tensor
    """[batch, latent]: the code that the sample was reconstructed from."""
    swapped: Tensor | None = None
    """[batch]: the reconstruction with another sample's code; only in evaluation, by ``likelihood.swapped_loss``."""
    state: StreamState | None = None
    """The state after a chunk of a stream, for the next chunk; only if a state was given."""

    @classmethod
    def without_code(cls, reconstruction: Tensor) -> Terms:
        """Return the terms of a model that has neither a latent code nor an auxiliary head."""
        nothing = reconstruction.new_zeros(len(reconstruction), 0)
        return cls(reconstruction, nothing, torch.zeros_like(reconstruction), nothing, nothing, nothing)
