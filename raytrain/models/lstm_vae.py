"""LSTM VAE, the hybrid's baseline (Bowman et al. 2016, as in Semeniuta et al. 2017, section 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytrain.config.models import LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.data.vocabulary import PAD, SIZE
from raytrain.models.cpu_lstm import run_lstm
from raytrain.models.decoding import LstmState, LstmStep
from raytrain.models.layers import (
    NUM_OUTPUTS,
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
from raytrain.models.noise import Noise


class LstmVae(nn.Module):
    """LSTM encoder, Gaussian latent code, and an LSTM decoder that sees z only as its first state."""

    def __init__(self, config: LstmVaeConfig, length: int, documents: bool = True) -> None:
        super().__init__()
        self.latent = config.latent
        self.length = length
        self.documents = documents
        self.one_hot = OneHot()
        self.encoder = nn.LSTM(SIZE, config.hidden, batch_first=True)
        self.posterior = Posterior(config.hidden, config.latent)
        self.first_state = nn.Linear(config.latent, 2 * config.hidden)
        self.decoder = nn.LSTM(SIZE, config.hidden, batch_first=True)
        self.output = nn.Linear(config.hidden, NUM_OUTPUTS)
        initialise_uniform(self)

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> LstmVae:
        """Build the model of a run."""
        return cls(config.model, config.length, documents=config.sampling == "documents")

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Return the terms of the ELBO for ``tokens`` [batch, length], PAD after each STOP."""
        mean, log_variance = self.encode(tokens)
        z = draw_posterior(mean, log_variance, noise)
        logits = self._decode(drop_input(shift_right(tokens), noise, input_dropout), z)
        return Terms(
            reconstruction=negative_log_likelihood(logits, tokens).sum(1),
            kl=gaussian_kl(mean, log_variance),
            auxiliary=mean.new_zeros(len(tokens)),
            mean=mean,
        )

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), [batch, latent] each, from the output at the last symbol."""
        outputs = run_lstm(self.encoder, self.one_hot, tokens)
        last = (tokens != PAD).sum(1) - 1
        return self.posterior(outputs[torch.arange(len(tokens), device=tokens.device), last])

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] of each of ``tokens`` [batch, length] given z and those before."""
        return self._decode(shift_right(tokens), z)

    def _decode(self, inputs: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] after ``inputs`` [batch, length], for codes z [batch, latent]."""
        outputs = run_lstm(self.decoder, self.one_hot, inputs, state=self._first_state(z))
        logits: Tensor = self.output(outputs)
        return logits

    def _first_state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's first state, (h0, c0) = tanh(linear z), [batch, hidden] each."""
        hidden, cell = torch.tanh(self.first_state(z)).chunk(2, dim=-1)
        return hidden, cell

    @torch.no_grad()
    def begin(self, z: Tensor) -> LstmState:
        """Return the decoder's state before the first byte, for codes z [batch, latent]."""
        return LstmState([LstmStep(self.decoder, SIZE)], [list(self._first_state(z))])

    @torch.no_grad()
    def advance(self, previous: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """Return logits [batch, NUM_OUTPUTS] of the byte after ``previous`` [batch], and the state after it."""
        output, state = state.advance(previous)
        return self.output(output), state
