"""LSTM over symbols and dense features for CPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raytrain.data.vocabulary import PAD
from raytrain.models import buffers, lstm_kernels, norm_kernels
from raytrain.models.compiled import array
from raytrain.models.products import multiply

ENABLED = os.environ.get("RAYTRAIN_CPU_LSTM", "on") != "off"
"""False if ``RAYTRAIN_CPU_LSTM=off`` was set before the import: CPUs then run ``nn.LSTM``, as GPUs do."""


# ----------------------------------------------------------------------------------------- the recurrence

_UNIT = 16
"""The number of rows for symbols is a multiple of this: the library sets itself up once for each product shape."""


class Recurrence(torch.autograd.Function):
    """One-layer LSTM with one matrix product a step in each pass, and one for the gradients of all weights.

    The inputs of a step are one matrix [rows, batch]: one-hot vectors, with a row for each symbol that occurs in the
    batch; a row of ones for the biases; the dense features; the hidden state, which is the output of the step before.
    The batch is the last axis. So the weights are the left operand in their own memory layout, and the library
    rearranges the small operand instead: 1.5 times as fast.

    The equations and the order of the gates are those of ``nn.LSTM``: input, forget, cell, output. If the parameters of
    a layer normalisation are given, it acts on the pre-activations of all gates together. Whatever the type of the
    products, normalisation, gates, cells and their gradients are at least float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        symbols: Tensor | None,
        dense: Tensor | None,
        hidden: Tensor | None,
        cell: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        epsilon: float,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the outputs [batch, length, hidden] in ``dtype``, the type of the products, and the last state.

        ``scale`` and ``shift`` [4 hidden] belong to the layer normalisation; None for none. ``epsilon`` is added to the
        variance.
        """
        width = parameters[1].shape[1]
        num_dense = 0 if dense is None else dense.shape[2]
        reads, used = _reads(dtype, symbols, dense, width)
        length, rows, batch = len(reads) - 1, reads.shape[1], reads.shape[2]
        weight = _joined(dtype, parameters, used, rows - num_dense - width, num_dense)
        wide = torch.promote_types(dtype, torch.float32)
        gates = buffers.empty(length, 4, width, batch, dtype=wide)
        cells = buffers.empty(length + 1, width, batch, dtype=wide)
        outputs = reads[:, -width:]
        if hidden is None or cell is None:
            outputs[0], cells[0] = 0, 0
        else:
            outputs[0], cells[0] = hidden.t(), cell.t()
        norm = (
            Norm.empty(scale, shift, epsilon, length, batch, dtype) if scale is not None and shift is not None else None
        )
        _go_forward(weight, reads, gates, cells, norm)
        ctx.save_for_backward(used, weight, reads, gates, cells, *(norm.tensors() if norm else ()))
        ctx.epsilon = epsilon
        ctx.num_dense, ctx.num_inputs, ctx.has_state = num_dense, parameters[0].shape[1], hidden is not None
        # copies, so that carrying the state on does not keep all steps in memory
        last = outputs[-1].t().to(wide, copy=True), cells[-1].t().clone()
        ctx.mark_non_differentiable(*last)
        return outputs[1:].permute(2, 0, 1), *last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the arguments of ``forward``."""
        used, weight, reads, gates, cells, *normalised = ctx.saved_tensors
        norm = Norm(ctx.epsilon, *normalised) if normalised else None
        length, _, width, batch = gates.shape
        rows, num_dense, wide = reads.shape[1], ctx.num_dense, gates.dtype
        learnt = rows - num_dense - width  # the first row that receives a gradient
        of_reads = buffers.empty(length, num_dense + width, batch, dtype=reads.dtype)
        of_gates = buffers.empty(length, 4 * width, batch, dtype=reads.dtype)
        of_cell, *of_norm = _go_back(gradient, weight[:, learnt:], gates, cells, of_gates, of_reads, norm)
        of_weight = multiply(
            _steps_last(of_gates), _steps_last(reads[:-1]).t(), buffers.empty(4 * width, rows, dtype=reads.dtype)
        )
        of_input = buffers.empty(4 * width, ctx.num_inputs, dtype=wide).zero_()
        of_input[:, :num_dense] = of_weight[:, learnt:-width]
        of_input.index_copy_(1, num_dense + used, of_weight[:, : len(used)].to(wide))
        of_hidden = buffers.empty(4 * width, width, dtype=wide).copy_(of_weight[:, -width:])
        of_bias = of_weight[:, learnt - 1].to(wide)
        of_state = (of_reads[0, num_dense:].t().to(wide), of_cell.t()) if ctx.has_state else (None, None)
        of_dense = of_reads[:, :num_dense].permute(2, 0, 1) if num_dense else None
        return None, None, of_dense, *of_state, *(of_norm or (None, None)), None, of_input, of_hidden, of_bias, of_bias


@dataclass(frozen=True)
class Norm:
    """Layer normalisation of the pre-activations of all steps, and what its backward pass needs."""

    epsilon: float
    """Added to the variance."""
    scale: Tensor
    shift: Tensor
    """[4 hidden], as ``scale``."""
    products: Tensor
    """[length, 4 hidden, batch]: the pre-activations before the normalisation."""
    statistics: Tensor
    """[length, 2, batch]: their mean, and 1 / their standard deviation."""

    @classmethod
    def empty(cls, scale: Tensor, shift: Tensor, epsilon: float, length: int, batch: int, dtype: torch.dtype) -> Norm:
        """Return a normalisation whose pre-activations and statistics are still to be filled in."""
        products = buffers.empty(length, len(scale), batch, dtype=dtype)
        wide = torch.promote_types(dtype, torch.float32)
        statistics = torch.empty(length, 2, batch, dtype=wide)
        return cls(epsilon, scale.to(wide), shift.to(wide), products, statistics)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors, in the order of the fields."""
        return self.scale, self.shift, self.products, self.statistics


def _reads(dtype: torch.dtype, symbols: Tensor | None, dense: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Return each step's inputs [length + 1, rows, batch], hidden states left empty, and the symbols that have rows."""
    like = dense if symbols is None else symbols
    assert like is not None
    batch, length = like.shape[:2]
    used, row = torch.empty(0, dtype=torch.int64), None
    if symbols is not None:
        used, row = torch.unique(symbols.t(), return_inverse=True)
    dense_rows = _UNIT * (len(used) // _UNIT + 1)
    num_dense = 0 if dense is None else dense.shape[2]
    reads = buffers.empty(length + 1, dense_rows + num_dense + width, batch, dtype=dtype)
    reads[:, :dense_rows] = 0
    reads[:, dense_rows - 1] = 1
    if symbols is not None and row is not None:
        # PAD is all zeros, as in OneHot
        places = (torch.arange(length)[:, None] * reads.shape[1] + row) * batch + torch.arange(batch)
        reads.view(-1)[places] = (symbols.t() != PAD).to(dtype)
    if dense is not None:
        reads[:-1, dense_rows:-width] = dense.permute(1, 2, 0)
    return reads, used


def _joined(
    dtype: torch.dtype, parameters: tuple[Tensor, ...], used: Tensor, dense_rows: int, num_dense: int
) -> Tensor:
    """Return the weights [4 hidden, rows] of all inputs of a step."""
    inputs, hidden, *biases = parameters
    width = hidden.shape[1]
    weight = _matrix(len(hidden), dense_rows + num_dense + width, dtype)
    weight[:, :dense_rows] = 0
    weight[:, : len(used)] = inputs.index_select(1, num_dense + used)
    weight[:, dense_rows - 1] = biases[0] + biases[1]
    weight[:, dense_rows:-width] = inputs[:, :num_dense]
    weight[:, -width:] = hidden
    return weight


def _go_forward(weight: Tensor, reads: Tensor, gates: Tensor, cells: Tensor, norm: Norm | None) -> None:
    """Run all steps. Fill in the hidden states, which are the last rows of ``reads``, and the other arguments.

    These are ``gates`` [length, 4, hidden, batch], ``cells`` [length + 1, hidden, batch], and the pre-activations and
    statistics of ``norm``. ``reads`` and ``cells`` already hold the initial state.
    """
    width, batch = cells.shape[1:]
    # the pre-activations of a step, normalised or not
    product = torch.empty(4 * width, batch, dtype=cells.dtype if norm else reads.dtype)
    before = _flat(product.view(4, width, batch))
    gate, cell, output = _flat(gates), _flat(cells), _flat(reads[:, -width:])
    for t, read in enumerate(reads[:-1].unbind()):
        if norm is None:
            multiply(weight, read, product)
        else:
            multiply(weight, read, norm.products[t])
            mean, factor = array(norm.statistics[t])
            given = array(norm.products[t]), array(norm.scale), array(norm.shift), norm.epsilon
            norm_kernels.forward(*given, mean, factor, array(product))
        lstm_kernels.forward(before, gate[t], cell[t], cell[t + 1], output[t + 1])


def _go_back(
    gradient: Tensor,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    of_gates: Tensor,
    of_reads: Tensor,
    norm: Norm | None,
) -> tuple[Tensor, ...]:
    """Run all steps backwards. Fill in ``of_gates`` [length, 4 hidden, batch] and ``of_reads`` [length, rows, batch].

    ``gradient`` [batch, length, hidden] is that of the outputs; ``weight`` [4 hidden, rows] covers only the rows that
    receive a gradient. Return the gradient of the initial cell state [hidden, batch], and those of scale and shift
    [4 hidden].
    """
    length, _, width, batch = gates.shape
    back = _matrix(weight.shape[1], 4 * width, weight.dtype).copy_(weight.t())
    of_output = _flat(buffers.empty(length, width, batch, dtype=of_reads.dtype).copy_(gradient.permute(1, 2, 0)))
    gate, cell, of_gate = _flat(gates), _flat(cells), _flat(of_gates.view(length, 4, width, batch))
    of_hidden = [*_flat(of_reads[:, -width:]), np.zeros_like(of_output[0])]
    of_cell = torch.zeros(width, batch, dtype=gates.dtype)
    carried = _flat(of_cell)
    of_product = torch.empty(4 * width, batch, dtype=gates.dtype)
    of_norm = torch.zeros(2, 4 * width, batch, dtype=gates.dtype) if norm else None
    after = _flat(of_product.view(4, width, batch))
    for t, (of_step, of_read) in reversed(list(enumerate(zip(of_gates.unbind(), of_reads.unbind(), strict=True)))):
        step = of_output[t], of_hidden[t + 1], gate[t], cell[t], cell[t + 1], carried
        if norm is None or of_norm is None:
            lstm_kernels.backward(*step, of_gate[t])
        else:
            lstm_kernels.backward(*step, after)
            (mean, factor), (of_scale, of_shift) = array(norm.statistics[t]), array(of_norm)
            given = array(of_product), array(norm.products[t]), array(norm.scale)
            norm_kernels.backward(*given, mean, factor, of_scale, of_shift, array(of_step))
        multiply(back, of_step, of_read)
    return of_cell, *(() if of_norm is None else of_norm.sum(2))


def _flat(steps: Tensor) -> Any:
    """Return the array [..., hidden x batch] of ``steps`` [..., hidden, batch], in the same memory."""
    return array(steps.view(*steps.shape[:-2], -1))


def _matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised matrix [rows, columns], as the left operand of ``multiply``."""
    if dtype == torch.float32:
        return buffers.empty(rows, columns, dtype=dtype)  # any other layout would be copied at every product
    # rows begin at cache lines, but not all of them map to the same few cache sets
    stride = -(-columns // 32) * 32
    whole = buffers.empty(rows, stride + 32 * (stride % 256 == 0), dtype=dtype)
    # oneDNN's AMX kernels multiply the gaps between rows by zero: a NaN there would reach the product
    whole[:, columns:] = 0
    return whole[:, :columns]


def _steps_last(values: Tensor) -> Tensor:
    """Return [length, rows, batch] as a matrix [rows, length x batch]."""
    length, rows, batch = values.shape
    return buffers.empty(rows, length, batch, dtype=values.dtype).copy_(values.transpose(0, 1)).flatten(1)
