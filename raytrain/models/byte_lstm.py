"""The stacked byte-level LSTM language model that writes Twitter bios."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from raytrain.config import ByteLstmConfig
from raytrain.data.vocabulary import SIZE
from raytrain.models.layers import (
    NUM_OUTPUTS,
    Noise,
    OneHot,
    Terms,
    drop_input,
    negative_log_likelihood,
    shift_right,
)
from raytrain.models.lstm_vae import LstmState


class ByteLstm(nn.Module):
    """One-layer LSTMs with dropout between them, then a linear classifier over the next byte.

    Dropout is drawn from the step's own noise: the fused dropout of a deep ``nn.LSTM`` would depend on
    the rank, and re-seeding it at every step is slow on GPUs.
    """

    latent = 0
    """A language model has no latent code: its bound is its likelihood."""

    def __init__(self, config: ByteLstmConfig, length: int, inputs: int = SIZE, outputs: int = NUM_OUTPUTS) -> None:
        super().__init__()
        self.length = length
        self.dropout = config.dropout
        self.one_hot = OneHot(inputs)
        self.layers = nn.ModuleList(
            nn.LSTM(inputs if layer == 0 else config.hidden, config.hidden, batch_first=True)
            for layer in range(config.layers)
        )
        self.output = nn.Linear(config.hidden, outputs)

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Terms for ``tokens`` [batch, length], PAD after each STOP: a reconstruction and nothing else."""
        features = self.one_hot(drop_input(shift_right(tokens), noise, input_dropout))
        for layer, lstm in enumerate(self.layers):
            if layer > 0 and self.training and self.dropout > 0:
                keep = noise.keep(1 - self.dropout, *features.shape[1:])
                features = features * keep.to(features.dtype) / (1 - self.dropout)
            features, _ = lstm(features)
        reconstruction = negative_log_likelihood(self.output(features), tokens).sum(1)
        nothing = reconstruction.new_zeros(len(tokens), 0)
        return Terms(reconstruction, kl=nothing, auxiliary=reconstruction.new_zeros(len(tokens)), mean=nothing)

    def begin(self, z: Tensor) -> LstmState:
        """The state before the first byte, zeros; ``z`` [batch, 0] only says how many samples."""
        zeros = z.new_zeros(len(self.layers), len(z), self.output.in_features)
        return LstmState(zeros, zeros)

    def advance(self, previous: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """Logits [batch, NUM_OUTPUTS] of the next byte after ``previous`` [batch], and the state after it."""
        features = self.one_hot(previous)[:, None]
        hiddens, cells = [], []
        for lstm, hidden, cell in zip(self.layers, state.hidden, state.cell, strict=True):
            features, (hidden, cell) = lstm(features, (hidden[None], cell[None]))
            hiddens.append(hidden)
            cells.append(cell)
        return self.output(features[:, 0]), LstmState(torch.cat(hiddens), torch.cat(cells))
