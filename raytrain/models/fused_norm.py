"""Batch normalisation of sample groups with ReLU, mask and cast: one kernel per pass instead of forty operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytrain.models import cpu_kernels, gpu_kernels


def kernels_for(device: torch.device) -> Any:
    """Return the module with the kernels for a device; None if there are none."""
    if device.type == "cpu":
        return cpu_kernels.norm
    return gpu_kernels.norm if gpu_kernels.available(device) else None


def laid_out(features: Tensor, kernels: Any) -> Tensor:
    """Return ``features`` [batch, channels, length] in the layout that ``kernels`` need: channels last on CPUs."""
    if kernels is cpu_kernels.norm:
        return features.transpose(1, 2).contiguous().transpose(1, 2)
    return features.contiguous()


class FusedNorm(torch.autograd.Function):
    """Normalisation by the statistics of each group, ReLU and mask, in the type of the features.

    It computes the same as ``GroupBatchNorm.activate`` in training, with sums in another order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        mask: Tensor,
        weight: Tensor,
        bias: Tensor,
        group_size: int,
        epsilon: float,
        cover: bool,
    ) -> tuple[Tensor, Tensor]:
        """Return the activations [batch, channels, length], and the groups' statistics [2, groups, channels].

        Raises:
            ValueError: the batch does not consist of whole groups.
        """
        if len(features) % group_size:
            raise ValueError(f"a batch of {len(features)} samples has no groups of {group_size}")
        mask = mask.expand(len(features), 1, features.shape[2])
        kernels = kernels_for(features.device)
        features = laid_out(features, kernels)
        output = torch.empty_like(features)
        statistics = weight.new_empty(2, len(features) // group_size, len(weight))
        kernels.forward(features, mask, weight, bias, output, statistics, epsilon, cover)
        ctx.save_for_backward(features, mask, weight, bias, statistics)
        ctx.kernels, ctx.epsilon, ctx.cover = kernels, epsilon, cover
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return output, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of features, weight and bias."""
        features, mask, weight, bias, statistics = ctx.saved_tensors
        of_features, of_parameters = torch.empty_like(features), torch.empty_like(statistics)
        ctx.kernels.backward(
            laid_out(gradient, ctx.kernels),
            features,
            mask,
            weight,
            bias,
            statistics,
            of_features,
            of_parameters,
            ctx.epsilon,
            ctx.cover,
        )
        of_weight, of_bias = of_parameters.sum(1)
        return of_features, None, of_weight, of_bias, None, None, None
