"""Parts that models share: loss terms, one-hot inputs, batch statistics by group, posterior, likelihoods."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import DROP, PAD, SIZE, STOP
from raytrain.models.noise import Noise

NUM_OUTPUTS = STOP + 1
"""Number of symbols that can be predicted: the bytes and STOP. PAD and DROP are never predicted."""


@dataclass
class Terms:
    """Terms of the negative ELBO of a batch, in nats per sample and float32."""

    reconstruction: Tensor
    """[batch]: -log p(x | z), summed over the sample's bytes and its STOP."""
    kl: Tensor
    """[batch, latent]: KL(q(z | x) || p(z)) by dimension; no dimensions without a latent code."""
    auxiliary: Tensor
    """[batch]: reconstruction loss of the auxiliary head; zeros for models without one."""
    mean: Tensor
    """[batch, latent]: mean of q(z | x)."""


class OneHot(nn.Module):
    """Map tokens [...] to one-hot vectors [..., SIZE]; PAD is all zeros, so that it carries no information.

    It is a look-up in the identity matrix. The recurrent networks and the first convolution see the one-hot vectors of
    the paper, with no embedding in between.
    """

    identity: Tensor

    def __init__(self, symbols: int = SIZE) -> None:
        super().__init__()
        # not torch.eye: on the meta device (build_empty) that imports torch's compiler, which takes seconds
        identity = torch.zeros(symbols, symbols).fill_diagonal_(1)
        if symbols > PAD:
            identity[PAD] = 0
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.identity)


class GroupBatchNorm(nn.Module):
    """Batch normalisation over [batch, channels, length] with statistics of groups of samples.

    In training, statistics are those of each group of ``group_size`` samples, without positions outside the mask. So
    they do not depend on how workers share a batch. In evaluation the running statistics are used;
    ``synchronise_statistics`` updates them once a step, alike on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, group_size: int, momentum: float = 0.1, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.group_size = group_size
        self.momentum = momentum
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.batch_statistics: Tensor | None = None
        """[2, channels]: sums over this rank's groups, until ``synchronise_statistics`` takes them."""

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Normalise ``features`` [batch, channels, length]; ``mask`` [batch, 1, length] is of 0 and 1."""
        features = features.float()
        if not self.training:
            scale, shift = self.running_scale_and_shift()
            return features * scale[:, None] + shift[:, None]
        grouped = features.unflatten(0, (-1, self.group_size))
        weight = mask.unflatten(0, (-1, self.group_size))
        weight = weight / weight.sum((1, 3), keepdim=True)
        mean = (grouped * weight).sum((1, 3), keepdim=True)
        centred = grouped - mean
        variance = (centred.square() * weight).sum((1, 3), keepdim=True)
        self.batch_statistics = torch.stack((mean.detach().sum((0, 1, 3)), variance.detach().sum((0, 1, 3))))
        normalised = centred * torch.rsqrt(variance + self.epsilon)
        return (normalised * self.weight[:, None] + self.bias[:, None]).flatten(0, 1)

    def running_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the factor and the summand of each channel in evaluation, [channels] each."""
        scale = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        return scale, self.bias - self.running_mean * scale


def synchronise_statistics(model: nn.Module, num_groups: int, good: Tensor) -> Tensor:
    """Move the running statistics of every ``GroupBatchNorm`` by the mean over all ranks' groups.

    Call it once after each training forward; ``num_groups`` counts the groups of all ranks. One small all-reduce keeps
    the statistics identical on all ranks at every step. So evaluation needs no reduction, and a checkpoint at any step
    is the same whichever rank writes it.

    ``good`` is a bool without dimensions, the same on all ranks. If it is false or a statistic is not finite, nothing
    moves and the result is false; otherwise it is true.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GroupBatchNorm)]
    if not layers:
        return good
    statistics = [layer.batch_statistics for layer in layers if layer.batch_statistics is not None]
    sums = torch.cat(statistics, dim=1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    means = sums / num_groups
    good = good & means.isfinite().all()
    running = [torch.stack((layer.running_mean, layer.running_var)) for layer in layers]
    means = torch.where(good, means, torch.cat(running, dim=1))
    for layer, (mean, variance) in zip(layers, means.split([len(layer.weight) for layer in layers], 1), strict=True):
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance, layer.momentum)
        layer.batch_statistics = None
    return good


# ----------------------------------------------------------------------------------------- functions


def shift_right(tokens: Tensor) -> Tensor:
    """Return a decoder's inputs: START (which is STOP), then the tokens [batch, length] without the last."""
    return F.pad(tokens[:, :-1], (1, 0), value=STOP)


def drop_input(inputs: Tensor, noise: Noise, probability: float) -> Tensor:
    """Replace input bytes by DROP with ``probability``; START and STOP stay."""
    if probability == 0:
        return inputs
    keep = noise.keep(1 - probability, inputs.shape[1]).bool()
    return torch.where(keep | (inputs >= STOP), inputs, DROP)


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the nats [batch, length] of ``targets`` under ``logits`` [batch, length, NUM_OUTPUTS]; 0 at PAD."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="none")
    return losses.view(targets.shape)


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, 1)) by dimension, in nats; shapes [batch, latent]."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class Posterior(nn.Module):
    """Head for q(z | x) = N(mean, diag(exp(log variance))) on features [batch, inputs], in float32.

    The log variance is bounded softly. While the KL weight is near 0 nothing else holds it, and with thousands of
    inputs a few steps of Adam take it to where its exponential overflows.
    """

    LOG_VARIANCE_BOUND = 10.0

    def __init__(self, inputs: int, latent: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * latent)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.linear(features).float().chunk(2, dim=-1)
        return mean, self.LOG_VARIANCE_BOUND * torch.tanh(log_variance / self.LOG_VARIANCE_BOUND)


def draw_posterior(mean: Tensor, log_variance: Tensor, noise: Noise) -> Tensor:
    """Draw z = mean + sigma * noise (reparametrisation), [batch, latent]."""
    return mean + (0.5 * log_variance).exp() * noise.normal(mean.shape[-1])


def initialise_uniform(module: nn.Module, bound: float = 0.1) -> None:
    """Draw all weights and biases from uniform(-bound, bound), as the paper's code does.

    Normalisation keeps its initial identity.
    """
    for layer in module.modules():
        if not isinstance(layer, GroupBatchNorm):
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound)
