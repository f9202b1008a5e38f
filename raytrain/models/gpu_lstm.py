"""LSTMs on GPUs by cuDNN, in the requested type, with sizes that suit its kernels.

PyTorch's autocast runs every LSTM in float16, even if bfloat16 was requested; here weights and inputs are cast first.
Matrix products on GPUs want dimensions that are multiples of 8, better of 128. So widths are padded with zeros, which
change nothing: a unit without weights stays 0.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

UNITS = 128, 64, 8
"""Multiples that a width is padded to: the first that adds at most an eighth, or the last."""


def filled(width: int) -> int:
    """Return ``width`` rounded up to the size that features are padded to."""
    for unit in UNITS:
        whole = -(-width // unit) * unit
        if whole <= 1.125 * width:
            break
    return whole


class PackedWeights(torch.autograd.Function):
    """The weights of an LSTM in another type, padded with zeros, in one block of memory as cuDNN wants them."""

    @staticmethod
    def forward(ctx: Any, kind: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return the weights of inputs [4 units, filled(inputs)] and hidden state [4 units, units], and both biases.

        Units are filled(hidden). ``weights`` have the shapes of ``nn.LSTM``.
        """
        hidden = weights[1].shape[1]
        units = filled(hidden)
        widths = filled(weights[0].shape[1]), units, 1, 1
        block = weights[0].new_zeros(4 * units * sum(widths), dtype=kind)
        packed = []
        for weight, part in zip(weights, block.split([4 * units * width for width in widths]), strict=True):
            given = weight.view(4, hidden, -1)
            part.view(4, units, -1)[:, :hidden, : given.shape[2]] = given
            packed.append(part.view(4 * units, -1) if weight.dim() > 1 else part)
        ctx.shapes, ctx.kind = [weight.shape for weight in weights], weights[0].dtype
        return tuple(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the weights."""
        found = []
        for gradient, shape in zip(gradients, ctx.shapes, strict=True):
            by_gate = gradient.view(4, len(gradient) // 4, -1)
            # for a bias, the last dimension is 1
            found.append(by_gate[:, : shape[0] // 4, : shape[1:].numel()].to(ctx.kind).reshape(shape))
        return None, *found


def run(
    kind: torch.dtype,
    identity: Tensor,
    symbols: Tensor | None,
    dense: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    weights: list[Tensor],
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs [batch, length, hidden] of an LSTM in ``kind``, and its last hidden and cell state.

    Args:
        kind: type of inputs, weights and outputs.
        identity: [symbols, symbols]: the vector that stands for each symbol.
        symbols: [batch, length], or None if the LSTM reads no symbols.
        dense: [batch, length, features], or None if it reads nothing else.
        state: hidden and cell state [batch, hidden] before the first step; None for zeros.
        weights: those of the inputs and of the hidden state, and both biases.
        training: whether a backward pass may follow.
    """
    hidden, inputs = weights[1].shape[1], weights[0].shape[1]
    units, width = filled(hidden), filled(inputs)
    joined = joined_inputs(kind, identity, symbols, dense, width)
    first = [
        joined.new_zeros(1, len(joined), units) if part is None else F.pad(part, (0, units - hidden)).to(kind)[None]
        for part in state or (None, None)
    ]
    with no_autocast(joined.device):
        packed = PackedWeights.apply(kind, *weights)
        # the function that nn.LSTM calls: the module would not take weights as arguments
        outputs, *last = torch.lstm(joined, first, packed, True, 1, 0.0, training, False, True)
    return outputs[..., :hidden], last[0][0, :, :hidden], last[1][0, :, :hidden]


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which autocast is off."""
    return torch.autocast(device.type, enabled=False)


def joined_inputs(
    kind: torch.dtype, identity: Tensor, symbols: Tensor | None, dense: Tensor | None, width: int
) -> Tensor:
    """Return the inputs of an LSTM, [batch, length, width]: features, symbols, and zeros as padding."""
    parts = [] if dense is None else [dense.to(kind)]
    missing = width - (0 if dense is None else dense.shape[2])
    if symbols is not None:  # the zeros are a part of each symbol's vector
        parts.append(F.embedding(symbols, F.pad(identity, (0, missing - identity.shape[1])).to(kind)))
    elif missing:
        parts.append(parts[0].new_zeros(1).expand(*parts[0].shape[:2], missing))
    return torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
