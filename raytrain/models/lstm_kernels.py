"""Gates of an LSTM step on CPUs, forward and backward in one pass each over memory, compiled by Numba.

PyTorch would make ten passes, each over matrices that do not fit in the fastest cache. Arrays are flattened over
[hidden, batch]. Products and outputs are float32, float64 or the bits of bfloat16. All other arrays are float32, or
float64 alongside float64.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from raytrain.models.compiled import Array, compiled, compiled_for_threads, exp, narrow, run, wide


@compiled
def _forward(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array, first: int, end: int) -> None:
    one, like = cell.dtype.type(1), output.dtype.type(0)
    two = one + one
    # unsigned: Numba would check whether each signed index is negative, and could not vectorise the loop
    for i in range(np.uint64(first), np.uint64(end)):
        update = one / (one + exp(-wide(product[0, i])))
        keep = one / (one + exp(-wide(product[1, i])))
        candidate = two / (one + exp(-two * wide(product[2, i]))) - one
        release = one / (one + exp(-wide(product[3, i])))
        gates[0, i], gates[1, i], gates[2, i], gates[3, i] = update, keep, candidate, release
        after = keep * cell[i] + update * candidate
        next_cell[i] = after
        squashed = two / (one + exp(-two * after)) - one
        output[i] = narrow(release * squashed, like)


@compiled
def _backward(
    of_output: Array,
    of_hidden: Array,
    gates: Array,
    cell: Array,
    next_cell: Array,
    of_cell: Array,
    of_gates: Array,
    first: int,
    end: int,
) -> None:
    one, like = cell.dtype.type(1), of_gates.dtype.type(0)
    two = one + one
    for i in range(np.uint64(first), np.uint64(end)):
        update, keep, candidate, release = gates[0, i], gates[1, i], gates[2, i], gates[3, i]
        squashed = two / (one + exp(-two * next_cell[i])) - one
        of_state = wide(of_output[i]) + wide(of_hidden[i])
        of_after = of_cell[i] + of_state * release * (one - squashed * squashed)
        of_gates[0, i] = narrow(of_after * candidate * update * (one - update), like)
        of_gates[1, i] = narrow(of_after * cell[i] * keep * (one - keep), like)
        of_gates[2, i] = narrow(of_after * update * (one - candidate * candidate), like)
        of_gates[3, i] = narrow(of_state * squashed * release * (one - release), like)
        of_cell[i] = of_after * keep


@compiled_for_threads
def _forward_in_blocks(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array, blocks: int) -> None:
    size = -(-len(cell) // blocks)
    for block in prange(blocks):
        _forward(product, gates, cell, next_cell, output, block * size, min(block * size + size, len(cell)))


@compiled_for_threads
def _backward_in_blocks(
    of_output: Array,
    of_hidden: Array,
    gates: Array,
    cell: Array,
    next_cell: Array,
    of_cell: Array,
    of_gates: Array,
    blocks: int,
) -> None:
    size = -(-len(cell) // blocks)
    for block in prange(blocks):
        first, end = block * size, min(block * size + size, len(cell))
        _backward(of_output, of_hidden, gates, cell, next_cell, of_cell, of_gates, first, end)


def forward(product: Array, gates: Array, cell: Array, next_cell: Array, output: Array) -> None:
    """Compute a step from the pre-activations of its gates, input, forget, cell and output.

    Args:
        product: [4, hidden x batch], the pre-activations.
        gates: [4, hidden x batch], where the gates are written.
        cell: [hidden x batch], the cells before the step.
        next_cell, output: [hidden x batch], where the cells after the step and the hidden state are written.
    """
    run(_forward, _forward_in_blocks, len(cell), len(cell), product, gates, cell, next_cell, output)


def backward(
    of_output: Array, of_hidden: Array, gates: Array, cell: Array, next_cell: Array, of_cell: Array, of_gates: Array
) -> None:
    """Compute the gradients of a step.

    Args:
        of_output, of_hidden: [hidden x batch], gradients of the output itself and of the output as read by the next
            step.
        gates, cell, next_cell: as ``forward`` left them.
        of_cell: [hidden x batch], gradient of the cells after the step; overwritten by that of the cells before.
        of_gates: [4, hidden x batch], where the gradients of the pre-activations are written.
    """
    arrays = of_output, of_hidden, gates, cell, next_cell, of_cell, of_gates
    run(_backward, _backward_in_blocks, len(cell), len(cell), *arrays)
