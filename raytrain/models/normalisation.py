"""Normalisation by batch statistics: of feature maps by group of samples, of codes over all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.models import fused_norm

MOMENTUM = 0.1
"""Weight of a step's statistics in the running statistics."""


class GroupBatchNorm(nn.Module):
    """Batch normalisation over [batch, channels, length] with statistics of groups of samples.

    In training, statistics are taken over each group of ``group_size`` samples, without positions outside the mask. So
    they do not depend on how a batch is split over workers. In evaluation the running statistics are used;
    ``synchronise_statistics`` updates them once a step, identically on all ranks.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, group_size: int, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.group_size = group_size
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.batch_statistics: Tensor | None = None
        """[2, groups, channels]: statistics of this rank's groups, until ``synchronise_statistics`` takes them."""

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Normalise ``features`` [batch, channels, length] in float32; ``mask`` [batch, 1, length] holds 0s and 1s."""
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
        self.batch_statistics = torch.stack((mean.detach(), variance.detach())).flatten(2)
        normalised = centred * torch.rsqrt(variance + self.epsilon)
        return (normalised * self.weight[:, None] + self.bias[:, None]).flatten(0, 1)

    def activate(self, features: Tensor, mask: Tensor, *, cover: bool) -> Tensor:
        """Normalise, apply ReLU and, if ``cover``, the mask; the result has the type of ``features``."""
        if self.training and fused_norm.kernels_for(features.device) is not None:
            settings = self.group_size, self.epsilon, cover
            activations, statistics = fused_norm.FusedNorm.apply(features, mask, self.weight, self.bias, *settings)
            self.batch_statistics = statistics.detach()
            return activations
        activations = F.relu(self(features, mask))
        return (activations * mask if cover else activations).to(features.dtype)

    def running_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return the scale and the shift of each channel in evaluation, [channels] each."""
        scale = self.weight * torch.rsqrt(self.running_var + self.epsilon)
        return scale, self.bias - self.running_mean * scale


class CodeNorm(nn.Module):
    """Batch normalisation of posterior means [batch, latent] to a fixed standard deviation gamma (Zhu et al. 2020).

    The KL of a dimension is then at least gamma^2 / 2 nats on average, whatever the decoder does. In training, the
    statistics are those of the batch of all workers. In evaluation the running statistics are used, with the unbiased
    variance. The mean has a learnt bias; gamma is fixed.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, latent: int, gamma: float, epsilon: float = 1e-10) -> None:
        super().__init__()
        self.gamma = gamma
        self.epsilon = epsilon
        self.bias = nn.Parameter(torch.zeros(latent))
        self.register_buffer("running_mean", torch.zeros(latent))
        self.register_buffer("running_var", torch.ones(latent))
        self.batch_statistics: Tensor | None = None
        """[2, latent]: mean and variance of the batch of all workers, until ``synchronise_statistics`` takes them."""

    def forward(self, mean: Tensor) -> Tensor:
        """Normalise ``mean`` [batch, latent], this worker's share of the batch."""
        if not self.training:
            return (mean - self.running_mean) * (self.gamma * torch.rsqrt(self.running_var + self.epsilon)) + self.bias
        wide = mean.double()  # the variance is a difference of two sums
        count = wide.new_full((1,), len(wide))
        sums = AllReduce.apply(torch.cat((wide.sum(0), wide.square().sum(0), count)))
        first, second = sums[:-1].view(2, -1) / sums[-1]
        variance = second - first.square()
        unbiased = variance * sums[-1] / (sums[-1] - 1).clamp(min=1)
        self.batch_statistics = torch.stack((first, unbiased)).detach().float()
        normalised = (wide - first) * torch.rsqrt(variance.clamp(min=0) + self.epsilon)
        return self.gamma * normalised.float() + self.bias


class AllReduce(torch.autograd.Function):
    """Sum over all ranks, whose gradient is the sum of all ranks' gradients; the tensor itself for one worker."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        """Return the sum of every rank's ``tensor``."""
        return _sum_over_ranks(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient for this rank's summand."""
        return _sum_over_ranks(gradient)


def _sum_over_ranks(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def synchronise_statistics(model: nn.Module, num_groups: int, good: Tensor) -> Tensor:
    """Move the running statistics of every ``GroupBatchNorm`` and ``CodeNorm`` towards those of the whole batch.

    Call it once after each forward pass in training; ``num_groups`` counts the groups of all ranks. One small
    all-reduce keeps the statistics identical on all ranks at every step. So evaluation needs no reduction, and a
    checkpoint at any step is the same whichever rank writes it.

    ``good`` is a scalar bool, the same on all ranks. If it is false or a statistic is not finite, no statistic moves
    and the result is false; otherwise the result is true.
    """
    groups = [layer for layer in model.modules() if isinstance(layer, GroupBatchNorm)]
    codes = [layer for layer in model.modules() if isinstance(layer, CodeNorm)]
    layers: list[GroupBatchNorm | CodeNorm] = [*groups, *codes]
    if not layers:
        return good
    # a CodeNorm already has the statistics of the whole batch
    parts = [layer.batch_statistics for layer in codes if layer.batch_statistics is not None]
    if groups:
        each = torch.cat([layer.batch_statistics for layer in groups if layer.batch_statistics is not None], dim=2)
        parts.insert(0, _sum_over_ranks(each.sum(1)) / num_groups)
    means = torch.cat(parts, dim=1)
    good = good & means.isfinite().all()
    buffers = [layer.running_mean for layer in layers] + [layer.running_var for layer in layers]
    running = torch.cat(buffers)
    moved = torch.where(good, running.lerp(means.flatten(), MOMENTUM), running)
    torch._foreach_copy_(buffers, moved.split([len(buffer) for buffer in buffers]))
    for layer in layers:
        layer.batch_statistics = None
    return good
