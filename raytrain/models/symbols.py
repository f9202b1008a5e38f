"""Symbols as a network reads and predicts them: one-hot or learnt vectors, a decoder's inputs, numbers of outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.data.vocabulary import NUM_OUTPUTS, PAD, SIZE, STOP, UNPREDICTED


class OneHot(nn.Module):
    """Map tokens [...] to one-hot vectors [..., SIZE]; PAD is all zeros, so that it carries no information.

    It is a look-up in the identity matrix. The recurrent networks and the first convolution see the one-hot vectors of
    the paper, with no embedding in between.
    """

    identity: Tensor

    def __init__(self, symbols: int = SIZE) -> None:
        super().__init__()
        # not torch.eye: on the meta device (build_empty) that imports torch's compiler, which takes seconds
        identity = torch.zeros(symbols, symbols).fill_diagonal_(1)
        if symbols > PAD:
            identity[PAD] = 0
        self.register_buffer("identity", identity, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.identity)


def piece_vectors(longer: int, width: int) -> nn.Embedding | None:
    """Return learnt vectors for all symbols of a vocabulary with ``longer`` pieces; ``None`` for bytes alone.

    With one-hot vectors of thousands of pieces, most of a network's weights would belong to pieces and be seldom
    trained.
    """
    return nn.Embedding(SIZE + longer, width) if longer else None


def read_symbols(
    vectors: nn.Embedding | None, symbols: Tensor, dense: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return symbols and dense features that an LSTM reads, from ``symbols`` [...] and ``dense`` [..., features].

    With learnt ``vectors`` of symbols, everything it reads is dense, and the symbols are ``None``.
    """
    if vectors is None:
        return symbols, dense
    learnt = vectors(symbols)
    return None, learnt if dense is None else torch.cat((dense, learnt.to(dense.dtype)), dim=-1)


def shift_right(tokens: Tensor, previous: Tensor | None = None) -> Tensor:
    """Return a decoder's inputs: ``previous`` [batch], then ``tokens`` [batch, length] without the last.

    Without ``previous``, START comes first; it is the same symbol as STOP.
    """
    if previous is None:
        return F.pad(tokens[:, :-1], (1, 0), value=STOP)
    return torch.cat((previous[:, None], tokens[:, :-1]), dim=1)


def outputs_of(symbols: Tensor) -> Tensor:
    """Return the outputs that stand for ``symbols``: bytes and STOP keep their numbers, longer pieces follow STOP."""
    return torch.where(symbols >= SIZE, symbols - UNPREDICTED, symbols)


def symbols_of(outputs: Tensor) -> Tensor:
    """Return the symbols that ``outputs`` stand for."""
    return torch.where(outputs >= NUM_OUTPUTS, outputs + UNPREDICTED, outputs)
