"""Causal convolutions that can replace the hybrid's LSTM (Semeniuta et al. 2017, figure 6)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.models.normalisation import GroupBatchNorm


class ByteNet(nn.Module):
    """Decoder with a fixed receptive field: highway blocks of causal convolutions.

    As in the authors' code, a convolution of width 1 with gated tanh units comes first. In each block that follows, a
    convolution gives a carry gate, an input gate and a candidate. Batch normalisation follows each convolution. The
    authors' convolutions have width 3 with the future tap masked. That equals width 2: every block adds one character.
    The paper's 1, 2, 3, 5, 7, 10 layers see 2, 3, 4, 6, 8, 11 characters.
    """

    def __init__(self, inputs: int, hidden: int, layers: int, group_size: int) -> None:
        super().__init__()
        self.resize = nn.Conv1d(inputs, 2 * hidden, kernel_size=1)
        self.resize_norm = GroupBatchNorm(2 * hidden, group_size)
        self.convolutions = nn.ModuleList(nn.Conv1d(hidden, 3 * hidden, kernel_size=2) for _ in range(layers))
        self.norms = nn.ModuleList(GroupBatchNorm(3 * hidden, group_size) for _ in range(layers))

    @property
    def receptive_field(self) -> int:
        """Number of characters before a position that its output depends on."""
        return 1 + len(self.convolutions)

    def forward(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """Map ``inputs`` [batch, length, inputs] to [batch, length, hidden].

        Batch statistics are taken over ``mask`` [batch, 1, length], as in ``GroupBatchNorm``.
        """
        features = _gate(self.resize_norm(self.resize(inputs.transpose(1, 2)), mask))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = _highway(norm(convolution(F.pad(features, (1, 0))), mask), features)
        return features.transpose(1, 2)

    def begin(self, num: int, symbols: int, vectors: Tensor | None = None) -> ByteNetState:
        """Return the state of ``num`` texts before the first symbol.

        The last ``symbols`` inputs are a one-hot vector or, if given, a row of ``vectors`` [all symbols, symbols].
        """
        weight, bias = _folded(self.resize, self.resize_norm)
        dense = weight.shape[1] - symbols
        table = weight[:, dense:].t() if vectors is None else vectors.detach() @ weight[:, dense:].t()
        blocks = [_folded(*block) for block in zip(self.convolutions, self.norms, strict=True)]
        zeros = weight.new_zeros(num, self.resize.out_channels // 2)
        return ByteNetState(
            weight[:, :dense].t(),
            table + bias,
            [(weight.t(), bias) for weight, bias in blocks],
            [zeros] * len(blocks),
        )


@dataclass(frozen=True)
class ByteNetState:
    """State of generation: the weights with the normalisation folded in, and the last input of every block."""

    weight: Tensor
    table: Tensor
    """[symbols, 2 hidden]: contribution of a symbol to the first convolution."""
    blocks: list[tuple[Tensor, Tensor]]
    """Weight [2 hidden, 3 hidden] and bias of each block."""
    last: list[Tensor]
    """Last input [batch, hidden] of each block."""

    def advance(self, symbol: Tensor, dense: Tensor) -> tuple[Tensor, ByteNetState]:
        """Return the output [batch, hidden] after ``symbol`` [batch] and ``dense`` [batch, inputs], and the state."""
        features = _gate(torch.addmm(self.table[symbol], dense, self.weight))
        inputs = []
        for (weight, bias), before in zip(self.blocks, self.last, strict=True):
            inputs.append(features)
            features = _highway(torch.addmm(bias, torch.cat((before, features), dim=1), weight), features)
        return features, replace(self, last=inputs)

    def keep(self, rows: Tensor) -> ByteNetState:
        """Return the state of these rows of the batch only."""
        return replace(self, last=[before[rows] for before in self.last])


def _gate(values: Tensor) -> Tensor:
    """Apply gated tanh units over the second axis, which halves it."""
    candidate, gate = values.chunk(2, dim=1)
    return torch.tanh(candidate) * torch.sigmoid(gate)


def _highway(values: Tensor, features: Tensor) -> Tensor:
    """Return a block's output from its input ``features`` and its convolution's ``values``, three times as wide."""
    update, carry, candidate = values.chunk(3, dim=1)
    return torch.sigmoid(carry) * features + torch.sigmoid(update) * torch.tanh(candidate)


def _folded(convolution: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Fold the normalisation, with its running statistics, into a convolution.

    Return one matrix [outputs, taps x inputs] and the bias.
    """
    assert isinstance(convolution, nn.Conv1d)
    assert isinstance(norm, GroupBatchNorm)
    assert convolution.bias is not None
    scale, shift = norm.running_scale_and_shift()
    weight = convolution.weight.transpose(1, 2).flatten(1)
    return (weight * scale[:, None]).detach(), (convolution.bias * scale + shift).detach()
