"""LSTM VAE, the hybrid's baseline (Bowman et al. 2016, as in Semeniuta et al. 2017, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from raytrain.config.models import LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.config.vocabularies import longer_pieces
from raytrain.data.vocabulary import PAD, SIZE
from raytrain.models.decoding import LstmState, LstmStep
from raytrain.models.dropout import drop_input
from raytrain.models.heads import SymbolHead, negative_log_likelihood
from raytrain.models.initialisation import initialise_uniform
from raytrain.models.lstm import Lstm, run_lstm
from raytrain.models.noise import Noise
from raytrain.models.posterior import Posterior, draw_posterior, gaussian_kl
from raytrain.models.symbols import OneHot, piece_vectors, read_symbols, shift_right
from raytrain.models.terms import Terms


@dataclass(frozen=True)
class LstmVaeState:
    """State of the decoder: the code [batch, latent], if it reads that at every byte, and the state of its LSTM."""

    code: Tensor | None
    decoder: LstmState

    def keep(self, rows: Tensor) -> LstmVaeState:
        """Return the state of these rows of the batch only."""
        return LstmVaeState(None if self.code is None else self.code[rows], self.decoder.keep(rows))


class LstmVae(nn.Module):
    """LSTM encoder, Gaussian latent code, and an LSTM decoder with z in its initial state and, if asked, its inputs."""

    encoder_parts = ("embedding", "encoder", "posterior")

    def __init__(self, config: LstmVaeConfig, length: int, documents: bool = True, longer: int = 0) -> None:
        """Build the modules; ``longer`` is the number of pieces longer than one byte in the vocabulary."""
        super().__init__()
        self.latent = config.latent
        self.length = length
        self.documents = documents
        self.one_hot = OneHot()
        self.embedding = piece_vectors(longer, config.hidden)
        inputs = config.hidden if longer else SIZE
        self.encoder = Lstm(inputs, config.hidden, layer_norm=config.layer_norm)
        self.pool = config.pool
        self.posterior = Posterior(config.hidden, config.latent, config.mean_norm, config.fixed_variance)
        self.first_state = nn.Linear(config.latent, 2 * config.hidden)
        self.code_to_inputs = config.code_to_inputs
        width = inputs + (config.latent if config.code_to_inputs else 0)
        self.decoder = Lstm(width, config.hidden, config.weight_dropout, config.layer_norm)
        self.output = SymbolHead(config.hidden, longer)
        initialise_uniform(self)
        if not longer and not config.layer_norm:
            self.encoder.raise_symbols(0)
            self.decoder.raise_symbols(config.latent if config.code_to_inputs else 0)

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> LstmVae:
        """Build the model of a run."""
        documents, longer = config.sampling == "documents", longer_pieces(config.vocabulary)
        return cls(config.model, config.length, documents=documents, longer=longer)

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Return the terms of the ELBO for ``tokens`` [batch, length], PAD after each STOP."""
        mean, log_variance = self.encode(tokens)
        z = draw_posterior(mean, log_variance, noise)
        logits = self._decode(drop_input(shift_right(tokens), noise, input_dropout), z, noise)
        return Terms(
            reconstruction=negative_log_likelihood(logits, tokens).sum(1),
            kl=gaussian_kl(mean, log_variance),
            auxiliary=mean.new_zeros(len(tokens)),
            mean=mean,
            log_variance=log_variance,
            z=z,
        )

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), [batch, latent] each, from the encoder's outputs."""
        outputs = run_lstm(self.encoder, self.one_hot, *read_symbols(self.embedding, tokens))
        covered = tokens != PAD
        if self.pool == "last":
            last = covered.sum(1) - 1
            return self.posterior(outputs[torch.arange(len(tokens), device=tokens.device), last])
        if self.pool == "mean":
            return self.posterior((outputs * covered[..., None]).sum(1) / covered.sum(1, keepdim=True))
        # outputs of an LSTM are above -1
        return self.posterior(torch.where(covered[..., None], outputs, -1).amax(1))

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] for ``tokens`` [batch, length], each given z and those before."""
        return self._decode(shift_right(tokens), z)

    def _decode(self, inputs: Tensor, z: Tensor, noise: Noise | None = None) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] after ``inputs`` [batch, length], for codes z [batch, latent]."""
        codes = z[:, None].expand(-1, inputs.shape[1], -1) if self.code_to_inputs else None
        read = read_symbols(self.embedding, inputs, codes)
        outputs = run_lstm(self.decoder, self.one_hot, *read, self._first_state(z), noise)
        logits: Tensor = self.output(outputs)
        return logits

    def _first_state(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoder's initial state, (h0, c0) = tanh(linear z), [batch, hidden] each."""
        hidden, cell = torch.tanh(self.first_state(z)).chunk(2, dim=-1)
        return hidden, cell

    @torch.no_grad()
    def begin(self, z: Tensor) -> LstmVaeState:
        """Return the decoder's state before the first byte, for codes z [batch, latent]."""
        step = LstmStep(self.decoder, SIZE if self.embedding is None else 0)
        decoder = LstmState([step], [list(self._first_state(z))])
        return LstmVaeState(z if self.code_to_inputs else None, decoder)

    @torch.no_grad()
    def advance(self, previous: Tensor, state: LstmVaeState) -> tuple[Tensor, LstmVaeState]:
        """Return logits [batch, NUM_OUTPUTS] for the byte after ``previous`` [batch], and the state after it."""
        output, decoder = state.decoder.advance(*read_symbols(self.embedding, previous, state.code))
        return self.output(output), LstmVaeState(state.code, decoder)
