"""Batch normalisation of sample groups with ReLU, mask and cast on GPUs: one launch each way instead of forty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytrain.models import gpu_kernels


class FusedNorm(torch.autograd.Function):
    """Normalisation by the statistics of each group, ReLU and mask, in the type of the features.

    It computes what ``GroupBatchNorm.activate`` does in training, with sums in another order.
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
        """Return the activations [batch, channels, length], and the groups' statistics [2, groups, channels]."""
        features = features.contiguous()
        output = torch.empty_like(features)
        statistics = weight.new_empty(2, len(features) // group_size, len(weight))
        gpu_kernels.norm.forward(features, mask, weight, bias, output, statistics, epsilon, cover)
        ctx.save_for_backward(features, mask, weight, bias, statistics)
        ctx.epsilon, ctx.cover = epsilon, cover
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        return output, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of features, weight and bias."""
        features, mask, weight, bias, statistics = ctx.saved_tensors
        of_features, of_parameters = torch.empty_like(features), torch.empty_like(statistics)
        gpu_kernels.norm.backward(
            gradient.contiguous(),
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
