"""The LSTM VAE, the hybrid's baseline (Bowman et al. 2016, as in Semeniuta et al. 2017, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from raytrain.config import LstmVaeConfig
from raytrain.data.vocabulary import PAD, SIZE
from raytrain.models.layers import (
    NUM_OUTPUTS,
    Noise,
    OneHot,
    Posterior,
    Terms,
    draw_posterior,
    drop_input,
    gaussian_kl,
    initialise_uniform,
    negative_log_likelihood,
    shift_right,
)


class LstmState(NamedTuple):
    """Where an LSTM decoder stands: [layers, batch, hidden] each."""

    hidden: Tensor
    cell: Tensor


class LstmVae(nn.Module):
    """LSTM encoder, Gaussian latent code, LSTM decoder that sees z only as its first state."""

    def __init__(self, config: LstmVaeConfig, length: int) -> None:
        super().__init__()
        self.latent = config.latent
        self.length = length
        self.one_hot = OneHot()
        self.encoder = nn.LSTM(SIZE, config.hidden, batch_first=True)
        self.posterior = Posterior(config.hidden, config.latent)
        self.first_state = nn.Linear(config.latent, 2 * config.hidden)
        self.decoder = nn.LSTM(SIZE, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)
        initialise_uniform(self)

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Terms of the bound for ``tokens`` [batch, length], PAD after each STOP."""
        mean, log_variance = self.encode(tokens)
        state = self.begin(draw_posterior(mean, log_variance, noise))
        inputs = drop_input(shift_right(tokens), noise, input_dropout)
        outputs, _ = self.decoder(self.one_hot(inputs), (state.hidden, state.cell))
        return Terms(
            reconstruction=negative_log_likelihood(self.output(outputs), tokens).sum(1),
            kl=gaussian_kl(mean, log_variance),
            auxiliary=mean.new_zeros(len(tokens)),
            mean=mean,
        )

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | x), [batch, latent] each, from the output at the last symbol."""
        outputs, _ = self.encoder(self.one_hot(tokens))
        last = (tokens != PAD).sum(1) - 1
        return self.posterior(outputs[torch.arange(len(tokens), device=tokens.device), last])

    def begin(self, z: Tensor) -> LstmState:
        """The decoder's first state, (h0, c0) = tanh(linear z), for codes z [batch, latent]."""
        hidden, cell = torch.tanh(self.first_state(z)).chunk(2, dim=-1)
        return LstmState(hidden[None].contiguous(), cell[None].contiguous())

    def advance(self, previous: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """Logits [batch, NUM_OUTPUTS] of the next byte after ``previous`` [batch], and the state after it."""
        output, (hidden, cell) = self.decoder(self.one_hot(previous)[:, None], (state.hidden, state.cell))
        return self.output(output[:, 0]), LstmState(hidden, cell)
