"""Batch normalisation of sample groups with ReLU and mask on GPUs, one kernel per pass, compiled by Triton.

A program computes one channel of one group, which is a few thousand numbers. It reads them three times, the last two
times from the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


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
    """Write the activations of ``features`` to ``output``, both [batch, channels, length] and contiguous.

    Args:
        mask: [batch, 1, length], float32; statistics are taken where it is 1, and with ``cover`` the rest becomes 0.
        weight, bias: [channels], float32.
        statistics: [2, groups, channels], float32, where mean and variance are written.
        epsilon: added to the variance.
        cover: whether to multiply the activations by the mask.
    """
    _forward[statistics.shape[1:]](
        features, mask, weight, bias, output, statistics, *_sizes(features, mask, statistics), epsilon, cover, BLOCK
    )


def backward(
    of_output: Tensor,
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
    """Write the gradient of the features, and those of weight and bias by group, [2, groups, channels]."""
    tensors = of_output, features, mask, weight, bias, statistics, of_features, of_parameters
    _backward[statistics.shape[1:]](*tensors, *_sizes(features, mask, statistics), epsilon, cover, BLOCK)


def _sizes(features: Tensor, mask: Tensor, statistics: Tensor) -> tuple[int, ...]:
    batch, channels, length = features.shape
    groups = statistics.shape[1]
    return groups, channels, length, batch // groups, mask.stride(0), mask.stride(2)


@triton.jit
def _place(start, group, channel, channels, length, size, BLOCK: tl.constexpr):
    """Return sample, position and offset for a block of a group's channel, and which of the elements exist."""
    index = start + tl.arange(0, BLOCK)
    sample = group.to(tl.int64) * size + index // length
    position = index % length
    return sample, position, (sample * channels + channel) * length + position, index < size * length


@triton.jit
def _forward(
    features,
    mask,
    weight,
    bias,
    output,
    statistics,
    groups,
    channels,
    length,
    size,
    of_sample,
    of_position,
    epsilon,
    COVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, channel = tl.program_id(0), tl.program_id(1)
    total, covered = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, size * length, BLOCK):
        sample, position, offset, inside = _place(start, group, channel, channels, length, size, BLOCK)
        part = tl.load(mask + sample * of_sample + position * of_position, mask=inside, other=0.0)
        total += part * tl.load(features + offset, mask=inside, other=0.0).to(tl.float32)
        covered += part
    count = tl.sum(covered, 0)
    mean = tl.sum(total, 0) / count
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size * length, BLOCK):
        sample, position, offset, inside = _place(start, group, channel, channels, length, size, BLOCK)
        part = tl.load(mask + sample * of_sample + position * of_position, mask=inside, other=0.0)
        centred = tl.load(features + offset, mask=inside, other=0.0).to(tl.float32) - mean
        squares += part * centred * centred
    variance = tl.sum(squares, 0) / count
    tl.store(statistics + group * channels + channel, mean)
    tl.store(statistics + (groups + group) * channels + channel, variance)
    scale = tl.load(weight + channel) / tl.sqrt(variance + epsilon)
    shift = tl.load(bias + channel)
    for start in range(0, size * length, BLOCK):
        sample, position, offset, inside = _place(start, group, channel, channels, length, size, BLOCK)
        centred = tl.load(features + offset, mask=inside, other=0.0).to(tl.float32) - mean
        value = centred * scale + shift
        # a NaN must stay a NaN: comparisons with it are false
        value = tl.where(value < 0, 0.0, value)
        if COVER:
            value *= tl.load(mask + sample * of_sample + position * of_position, mask=inside, other=0.0)
        tl.store(output + offset, value.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    of_output,
    features,
    mask,
    weight,
    bias,
    statistics,
    of_features,
    of_parameters,
    groups,
    channels,
    length,
    size,
    of_sample,
    of_position,
    epsilon,
    COVER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, channel = tl.program_id(0), tl.program_id(1)
    mean = tl.load(statistics + group * channels + channel)
    factor = 1 / tl.sqrt(tl.load(statistics + (groups + group) * channels + channel) + epsilon)
    scale, shift = tl.load(weight + channel), tl.load(bias + channel)
    of_scale, of_shift = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    covered = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size * length, BLOCK):
        sample, position, offset, inside = _place(start, group, channel, channels, length, size, BLOCK)
        part = tl.load(mask + sample * of_sample + position * of_position, mask=inside, other=0.0)
        normalised = (tl.load(features + offset, mask=inside, other=0.0).to(tl.float32) - mean) * factor
        gradient = tl.load(of_output + offset, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.where(normalised * scale + shift <= 0, 0.0, gradient)
        if COVER:
            gradient *= part
        of_scale += gradient * normalised
        of_shift += gradient
        covered += part
    count, along, all_ = tl.sum(covered, 0), tl.sum(of_scale, 0), tl.sum(of_shift, 0)
    tl.store(of_parameters + group * channels + channel, along)
    tl.store(of_parameters + (groups + group) * channels + channel, all_)
    for start in range(0, size * length, BLOCK):
        sample, position, offset, inside = _place(start, group, channel, channels, length, size, BLOCK)
        part = tl.load(mask + sample * of_sample + position * of_position, mask=inside, other=0.0)
        normalised = (tl.load(features + offset, mask=inside, other=0.0).to(tl.float32) - mean) * factor
        gradient = tl.load(of_output + offset, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.where(normalised * scale + shift <= 0, 0.0, gradient)
        if COVER:
            gradient *= part
        # the gradient through mean and variance, in which each position of the mask has an equal share
        gradient -= part * (all_ + normalised * along) / count
        tl.store(of_features + offset, (gradient * scale * factor).to(of_features.dtype.element_ty), mask=inside)
