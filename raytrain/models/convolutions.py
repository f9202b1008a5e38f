"""Convolutions that halve and double the length of their inputs.

On CPUs each is one matrix product or, for one-hot vectors, a look-up: in a small network, PyTorch's own convolutions
spend most of their time on set-up. There the memory layout is [batch, length, channels], behind views of the usual
shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from raytrain.data.vocabulary import PAD
from raytrain.models import products

TAPS = 3


class Halving(nn.Conv1d):
    """Convolution of width 3 and stride 2: [batch, before, length] -> [batch, after, length / 2], for even lengths."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, kernel_size=TAPS, stride=2, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        if features.device.type != "cpu":
            return super().forward(features)
        read = _Adjoint.apply(features.transpose(1, 2), windows, overlap)
        weight = self.weight.transpose(1, 2).flatten(1)
        return products.linear(read, weight, self.bias).transpose(1, 2)

    def of_symbols(self, symbols: Tensor, one_hot: Callable[[Tensor], Tensor]) -> Tensor:
        """Convolve the vectors ``one_hot(symbols)`` of ``symbols`` [batch, length]; PAD is all zeros."""
        if symbols.device.type != "cpu":
            return super().forward(one_hot(symbols).transpose(1, 2))
        read = F.pad(symbols, (1, 0), value=PAD).unfold(1, TAPS, 2)
        rows = torch.where(read == PAD, PAD, read + self.in_channels * torch.arange(TAPS))
        table = self.weight.permute(2, 1, 0).flatten(0, 1)
        assert self.bias is not None
        summed = F.embedding_bag(rows.flatten(0, 1), table, mode="sum", padding_idx=PAD) + self.bias
        if torch.is_autocast_enabled("cpu"):  # like the other convolutions
            summed = summed.to(torch.get_autocast_dtype("cpu"))
        return summed.unflatten(0, rows.shape[:2]).transpose(1, 2)


class Doubling(nn.ConvTranspose1d):
    """Transposed convolution of width 3 and stride 2: [batch, before, length] -> [batch, after, 2 length]."""

    def __init__(self, before: int, after: int) -> None:
        # with output padding 1 the length is doubled exactly
        super().__init__(before, after, kernel_size=TAPS, stride=2, padding=1, output_padding=1)

    def forward(self, features: Tensor, output_size: list[int] | None = None) -> Tensor:
        if features.device.type != "cpu":
            return super().forward(features, output_size)
        assert self.bias is not None
        weight = self.weight.permute(2, 1, 0).flatten(0, 1)
        # exactly one of the last two taps contributes to each output, and adds the bias
        bias = F.pad(self.bias.repeat(TAPS - 1), (len(self.bias), 0))
        written = products.linear(features.transpose(1, 2), weight, bias)
        return _Adjoint.apply(written, overlap, windows).transpose(1, 2)


def windows(features: Tensor) -> Tensor:
    """Gather what each output of a ``Halving`` reads: [batch, length, width] -> [batch, length / 2, 3 width].

    Output t reads the positions 2t - 1, 2t and 2t + 1; zeros precede the first position.
    """
    batch, length, width = features.shape
    read = features.new_empty(batch, length // 2, TAPS, width)
    read[:, 0, 0] = 0
    read[:, 1:, 0] = features[:, 1:-1:2]
    read[:, :, 1:] = features.unflatten(1, (-1, 2))
    return read.flatten(2)


def overlap(written: Tensor) -> Tensor:
    """Sum overlapping windows, the adjoint of ``windows``: [batch, length / 2, 3 width] -> [batch, length, width]."""
    taps = written.unflatten(2, (TAPS, -1))
    summed = taps[:, :, 1:].clone(memory_format=torch.contiguous_format)
    summed[:, :-1, 1] += taps[:, 1:, 0]
    return summed.flatten(1, 2)


class _Adjoint(torch.autograd.Function):
    """A linear map whose gradient is computed by its adjoint."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, map_: Callable[[Tensor], Tensor], adjoint: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.adjoint = adjoint
        return map_(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.adjoint(gradient), None, None
