"""Layer normalisation of an LSTM's pre-activations on CPUs, compiled by Numba.

Arrays are [rows, batch], and each column is normalised. Products are float32, float64 or the bits of bfloat16. All
other arrays are float32, or float64 alongside float64. The columns are split over threads.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from raytrain.models.compiled import Array, compiled, compiled_for_threads, narrow, run, wide


def forward(
    product: Array, scale: Array, shift: Array, epsilon: float, mean: Array, factor: Array, normalised: Array
) -> None:
    """Normalise ``product`` to ``normalised``, both [rows, batch].

    Args:
        scale, shift: [rows], learnt.
        epsilon: added to the variance.
        mean, factor: [batch], where the mean of each column and 1 / its standard deviation are written.
    """
    arrays = product, scale, shift, epsilon, mean, factor, normalised
    run(_forward, _forward_in_blocks, len(mean), product.size, *arrays)


def backward(
    of_normalised: Array,
    product: Array,
    scale: Array,
    mean: Array,
    factor: Array,
    of_scale: Array,
    of_shift: Array,
    of_product: Array,
) -> None:
    """Compute the gradients.

    Args:
        of_normalised: [rows, batch], the gradient of what ``forward`` returned; overwritten.
        product, scale, mean, factor: as ``forward`` left them.
        of_scale, of_shift: [rows, batch], to which each column's share of the gradients is added.
        of_product: [rows, batch], where the gradient of the product is written.
    """
    arrays = of_normalised, product, scale, mean, factor, of_scale, of_shift, of_product
    run(_backward, _backward_in_blocks, len(mean), product.size, *arrays)


@compiled
def _forward(
    product: Array,
    scale: Array,
    shift: Array,
    epsilon: float,
    mean: Array,
    factor: Array,
    normalised: Array,
    first: int,
    end: int,
) -> None:
    rows, zero, one = np.uint64(len(product)), mean.dtype.type(0), mean.dtype.type(1)
    begin, stop, share = np.uint64(first), np.uint64(end), one / mean.dtype.type(len(product))
    for column in range(begin, stop):
        mean[column] = factor[column] = zero
    for row in range(rows):
        for column in range(begin, stop):
            mean[column] += wide(product[row, column]) * share
    for row in range(rows):
        for column in range(begin, stop):
            centred = wide(product[row, column]) - mean[column]
            factor[column] += centred * centred * share
    for column in range(begin, stop):
        factor[column] = one / np.sqrt(factor[column] + mean.dtype.type(epsilon))
    for row in range(rows):
        times, plus = scale[row], shift[row]
        for column in range(begin, stop):
            normalised[row, column] = (wide(product[row, column]) - mean[column]) * factor[column] * times + plus


@compiled
def _backward(
    of_normalised: Array,
    product: Array,
    scale: Array,
    mean: Array,
    factor: Array,
    of_scale: Array,
    of_shift: Array,
    of_product: Array,
    first: int,
    end: int,
) -> None:
    rows, like = np.uint64(len(product)), product.dtype.type(0)
    begin, stop, share = np.uint64(first), np.uint64(end), mean.dtype.type(1) / mean.dtype.type(len(product))
    of_mean, of_factor = np.zeros(len(mean), mean.dtype), np.zeros(len(mean), mean.dtype)
    # one loop for each: a loop over more arrays than these is not vectorised
    for row in range(rows):
        for column in range(begin, stop):
            of_shift[row, column] += of_normalised[row, column]
    for row in range(rows):
        for column in range(begin, stop):
            normalised = (wide(product[row, column]) - mean[column]) * factor[column]
            of_scale[row, column] += of_normalised[row, column] * normalised
    for row in range(rows):
        times = scale[row]
        for column in range(begin, stop):
            gradient = of_normalised[row, column] * times
            of_normalised[row, column] = gradient
            of_mean[column] += gradient * share
            of_factor[column] += gradient * (wide(product[row, column]) - mean[column]) * factor[column] * share
    for row in range(rows):
        for column in range(begin, stop):
            normalised = (wide(product[row, column]) - mean[column]) * factor[column]
            through = of_normalised[row, column] - of_mean[column] - normalised * of_factor[column]
            of_product[row, column] = narrow(through * factor[column], like)


@compiled_for_threads
def _forward_in_blocks(
    product: Array,
    scale: Array,
    shift: Array,
    epsilon: float,
    mean: Array,
    factor: Array,
    normalised: Array,
    blocks: int,
) -> None:
    size = -(-len(mean) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(mean))
        _forward(product, scale, shift, epsilon, mean, factor, normalised, first, end)


@compiled_for_threads
def _backward_in_blocks(
    of_normalised: Array,
    product: Array,
    scale: Array,
    mean: Array,
    factor: Array,
    of_scale: Array,
    of_shift: Array,
    of_product: Array,
    blocks: int,
) -> None:
    size = -(-len(mean) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(mean))
        _backward(of_normalised, product, scale, mean, factor, of_scale, of_shift, of_product, first, end)
