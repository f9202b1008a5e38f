"""Batch normalisation of sample groups with ReLU and mask on CPUs, compiled by Numba.

It computes the same as ``GroupBatchNorm.activate`` in training, in one call for each pass instead of forty. In a small
network, most of the time of forty calls is overhead. Tensors have the shape [batch, channels, length] and are stored as
[batch, length, channels]. Features are float32 or bfloat16, everything else is float32. The groups are split over
threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange
from torch import Tensor

from raytrain.models.compiled import Array, array, compiled, compiled_for_threads, narrow, run, wide


def forward(
    features: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    output: Tensor,
    statistics: Tensor,
    epsilon: float,
    cover: bool,
) -> None:
    """Write the activations [batch, channels, length], and the groups' statistics [2, groups, channels].

    ``mask`` [batch, 1, length] holds 0s and 1s.
    """
    arrays = _last(features), _positions(mask), array(weight), array(bias), _last(output), array(statistics)
    run(_forward, _forward_in_blocks, statistics.shape[1], features.numel(), *arrays, epsilon, cover)


def backward(
    gradient: Tensor,
    features: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    of_features: Tensor,
    of_parameters: Tensor,
    epsilon: float,
    cover: bool,
) -> None:
    """Write the gradients of the features, and those of weight and bias for each group [2, groups, channels]."""
    arrays = _last(gradient), _last(features), _positions(mask), array(weight), array(bias), array(statistics)
    written = _last(of_features), array(of_parameters)
    run(_backward, _backward_in_blocks, statistics.shape[1], features.numel(), *arrays, *written, epsilon, cover)


def _last(features: Tensor) -> Array:
    return array(features.transpose(1, 2))


def _positions(mask: Tensor) -> Array:
    return array(mask[:, 0].contiguous())


@compiled
def _forward(
    features: Array,
    mask: Array,
    weight: Array,
    bias: Array,
    output: Array,
    statistics: Array,
    epsilon: float,
    cover: bool,
    first: int,
    end: int,
) -> None:
    # unsigned indices: with signed ones, Numba checks at each access whether they count from the end
    positions, channels = np.uint64(features.shape[1]), np.uint64(len(weight))
    size, like = np.uint64(len(features) // statistics.shape[1]), features.dtype.type(0)
    zero, one = weight.dtype.type(0), weight.dtype.type(1)
    scale, part = np.empty_like(weight), np.empty_like(weight)
    mean, variance = np.empty_like(weight), np.empty_like(weight)
    for group in range(np.uint64(first), np.uint64(end)):
        begin, stop, total = group * size, (group + np.uint64(1)) * size, zero
        mean[:], variance[:] = zero, zero
        for s in range(begin, stop):
            part[:] = zero  # partial sums, so that a sum of thousands of terms keeps its last digits
            for t in range(positions):
                total += mask[s, t]
                for c in range(channels):
                    part[c] += wide(features[s, t, c]) * mask[s, t]
            for c in range(channels):
                mean[c] += part[c]
        for c in range(channels):
            mean[c] /= total
        for s in range(begin, stop):
            for t in range(positions):
                for c in range(channels):
                    centred = wide(features[s, t, c]) - mean[c]
                    variance[c] += centred * centred * mask[s, t]
        for c in range(channels):
            variance[c] /= total
            scale[c] = weight[c] / np.sqrt(variance[c] + weight.dtype.type(epsilon))
            statistics[0, group, c], statistics[1, group, c] = mean[c], variance[c]
        for s in range(begin, stop):
            for t in range(positions):
                kept = mask[s, t] if cover else one
                for c in range(channels):
                    value = (wide(features[s, t, c]) - mean[c]) * scale[c] + bias[c]
                    output[s, t, c] = narrow((zero if value < zero else value) * kept, like)


@compiled
def _backward(
    gradient: Array,
    features: Array,
    mask: Array,
    weight: Array,
    bias: Array,
    statistics: Array,
    of_features: Array,
    of_parameters: Array,
    epsilon: float,
    cover: bool,
    first: int,
    end: int,
) -> None:
    positions, channels = np.uint64(features.shape[1]), np.uint64(len(weight))
    size, like = np.uint64(len(features) // statistics.shape[1]), features.dtype.type(0)
    zero, one = weight.dtype.type(0), weight.dtype.type(1)
    scale, mean = np.empty_like(weight), np.empty_like(weight)
    of_weight, of_bias, passed = np.empty_like(weight), np.empty_like(weight), np.empty_like(weight)
    constant, slope = np.empty_like(weight), np.empty_like(weight)
    for group in range(np.uint64(first), np.uint64(end)):
        begin, stop, total = group * size, (group + np.uint64(1)) * size, zero
        of_weight[:], of_bias[:] = zero, zero
        for c in range(channels):
            mean[c] = statistics[0, group, c]
            scale[c] = weight[c] / np.sqrt(statistics[1, group, c] + weight.dtype.type(epsilon))
        for s in range(begin, stop):
            for t in range(positions):
                total += mask[s, t]
                kept = mask[s, t] if cover else one
                # three loops: a loop over more arrays than these is not vectorised
                for c in range(channels):
                    value = (wide(features[s, t, c]) - mean[c]) * scale[c] + bias[c]
                    passed[c] = zero if value <= zero else wide(gradient[s, t, c]) * kept
                for c in range(channels):
                    of_bias[c] += passed[c]
                for c in range(channels):
                    of_weight[c] += passed[c] * (wide(features[s, t, c]) - mean[c])
        # gradient through the statistics, to be subtracted: constant + slope x centred feature where the mask is 1
        for c in range(channels):
            precision = one / (statistics[1, group, c] + weight.dtype.type(epsilon))
            slope[c] = scale[c] * precision * of_weight[c] / total
            constant[c] = scale[c] * of_bias[c] / total
            of_parameters[0, group, c], of_parameters[1, group, c] = of_weight[c] * np.sqrt(precision), of_bias[c]
        for s in range(begin, stop):
            for t in range(positions):
                kept = mask[s, t] if cover else one
                for c in range(channels):
                    value = (wide(features[s, t, c]) - mean[c]) * scale[c] + bias[c]
                    passed[c] = zero if value <= zero else wide(gradient[s, t, c]) * kept
                for c in range(channels):
                    through = (constant[c] + slope[c] * (wide(features[s, t, c]) - mean[c])) * mask[s, t]
                    of_features[s, t, c] = narrow(scale[c] * passed[c] - through, like)


@compiled_for_threads
def _forward_in_blocks(
    features: Array,
    mask: Array,
    weight: Array,
    bias: Array,
    output: Array,
    statistics: Array,
    epsilon: float,
    cover: bool,
    blocks: int,
) -> None:
    groups = statistics.shape[1]
    size = -(-groups // blocks)
    for block in prange(blocks):
        first, end = min(block * size, groups), min(block * size + size, groups)
        _forward(features, mask, weight, bias, output, statistics, epsilon, cover, first, end)


@compiled_for_threads
def _backward_in_blocks(
    gradient: Array,
    features: Array,
    mask: Array,
    weight: Array,
    bias: Array,
    statistics: Array,
    of_features: Array,
    of_parameters: Array,
    epsilon: float,
    cover: bool,
    blocks: int,
) -> None:
    groups = statistics.shape[1]
    size = -(-groups // blocks)
    for block in prange(blocks):
        first, end = min(block * size, groups), min(block * size + size, groups)
        _backward(
            gradient, features, mask, weight, bias, statistics, of_features, of_parameters, epsilon, cover, first, end
        )
