"""Posterior q(z | x): its parameters, draws from it, and its KL from the prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from raytrain.models.noise import Noise
from raytrain.models.normalisation import CodeNorm


class Posterior(nn.Module):
    """Head for q(z | x) = N(mean, diag(exp(log variance))) on features [batch, inputs], in float32.

    Features are divided by the square root of their number. One step of Adam changes each weight by the learning rate,
    so it would otherwise move a sum over thousands of features thousands of times as far as one of them.

    The log variance is bounded softly: while the KL weight is near 0, nothing else holds it. With a fixed variance it
    is the constant ln(1 - gamma^2), gamma being ``mean_norm``, so that the aggregate posterior has the variance 1 of
    the prior (bounded information rate: Braithwaite and Kleijn 2018). With b the bias of the normalised mean, the KL of
    a dimension is then -ln(1 - gamma^2) / 2 + b^2 / 2 nats on average over a training batch, whatever the KL weight.
    For b = 0 that is the capacity of a Gaussian channel: the mutual information can approach but not exceed it.
    """

    LOG_VARIANCE_BOUND = 10.0
    INITIAL_BOUND = 0.5
    """Initial weights are uniform in +- this: the KL of a dimension starts below 0.1 nats."""

    def __init__(self, inputs: int, latent: int, mean_norm: float = 0.0, fixed_variance: bool = False) -> None:
        """Build the modules.

        Args:
            inputs: number of features.
            latent: dimensions of the code.
            mean_norm: see ``CodeNorm``; 0 does not normalise.
            fixed_variance: whether the variance is fixed at 1 - ``mean_norm``^2 instead of learnt.
        """
        super().__init__()
        self.linear = nn.Linear(inputs, latent if fixed_variance else 2 * latent)
        self.scale = inputs**-0.5
        self.norm = CodeNorm(latent, mean_norm) if mean_norm else None
        self.fixed_log_variance = math.log1p(-(mean_norm**2)) if fixed_variance else None

    def initialise(self) -> None:
        """Draw the weights so that the posterior starts near the prior's mean and variance."""
        nn.init.uniform_(self.linear.weight, -self.INITIAL_BOUND, self.INITIAL_BOUND)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        outputs: Tensor = self.linear(features * self.scale).float()
        if self.fixed_log_variance is None:
            mean, log_variance = outputs.chunk(2, dim=-1)
            log_variance = self.LOG_VARIANCE_BOUND * torch.tanh(log_variance / self.LOG_VARIANCE_BOUND)
        else:
            mean, log_variance = outputs, torch.full_like(outputs, self.fixed_log_variance)
        return mean if self.norm is None else self.norm(mean), log_variance


def draw_posterior(mean: Tensor, log_variance: Tensor, noise: Noise) -> Tensor:
    """Draw z = mean + sigma * noise (reparametrisation), [batch, latent]."""
    return mean + (0.5 * log_variance).exp() * noise.normal(mean.shape[-1])


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) by dimension, in nats; shapes [batch, latent]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
