"""Stacked LSTM language model of bytes or pieces, the one that writes Twitter bios."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import RunConfig
from raytrain.config.vocabularies import longer_pieces
from raytrain.data.vocabulary import SIZE
from raytrain.models.decoding import LstmState, LstmStep
from raytrain.models.dropout import drop_features, drop_input
from raytrain.models.heads import SymbolHead, negative_log_likelihood
from raytrain.models.initialisation import initialise_uniform
from raytrain.models.lstm import Lstm, continue_lstm
from raytrain.models.noise import Noise
from raytrain.models.symbols import OneHot, piece_vectors, read_symbols, shift_right
from raytrain.models.terms import StreamState, Terms


class ByteLstm(nn.Module):
    """Stack of one-layer LSTMs with dropout on their outputs, then a linear classifier over the next byte.

    Dropout is drawn from the step's noise. The fused dropout of a deep ``nn.LSTM`` would depend on the rank, and
    re-seeding it at every step is slow on GPUs.
    """

    latent = 0
    """A language model has no latent code: its negative ELBO is its negative log-likelihood."""

    def __init__(
        self,
        config: ByteLstmConfig,
        length: int,
        inputs: int = SIZE,
        outputs: int | None = None,
        documents: bool = True,
        longer: int = 0,
    ) -> None:
        """Build the modules.

        Args:
            length: symbols of the longest sample, STOP included.
            inputs: number of symbols that are read as one-hot vectors.
            outputs: number of symbols to predict, if they are not those of text.
            documents: true if texts end with STOP; false for windows.
            longer: number of pieces longer than one byte in the vocabulary.
        """
        super().__init__()
        self.length = length
        self.documents = documents
        self.dropout = config.dropout
        self.one_hot = OneHot(inputs)
        self.embedding = piece_vectors(longer, config.hidden)
        self.layers = nn.ModuleList(
            Lstm(
                inputs if layer == 0 and not longer else config.hidden,
                config.hidden,
                config.weight_dropout,
                config.layer_norm,
            )
            for layer in range(config.layers)
        )
        self.output = SymbolHead(config.hidden, longer) if outputs is None else nn.Linear(config.hidden, outputs)
        initialise_uniform(self)
        if config.layer_norm:
            return  # as in the code that this normalisation follows
        if config.layers == 1 and not longer:
            self._lstms()[0].raise_symbols(0)
            return
        for layer, lstm in enumerate(self._lstms()):
            lstm.open_gates(0 if layer == 0 and not longer else config.hidden)
        if self.embedding is not None:
            nn.init.uniform_(self.embedding.weight, -0.5, 0.5)  # so that a piece weighs as much as a one-hot byte

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> ByteLstm:
        """Build the model of a run."""
        documents, longer = config.sampling == "documents", longer_pieces(config.vocabulary)
        return cls(config.model, config.length, documents=documents, longer=longer)

    def forward(
        self,
        tokens: Tensor,
        noise: Noise,
        input_dropout: float = 0.0,
        previous: Tensor | None = None,
        state: StreamState | None = None,
    ) -> Terms:
        """Return the terms for ``tokens`` [batch, length], PAD after each STOP: only a reconstruction.

        The chunks of a stream follow the symbols ``previous`` [batch] and ``state``.
        """
        logits, last = self._decode(drop_input(shift_right(tokens, previous), noise, input_dropout), noise, state)
        terms = Terms.without_code(negative_log_likelihood(logits, tokens).sum(1))
        terms.state = None if state is None else last
        return terms

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] for each of ``tokens`` [batch, length], given those before it.

        The model is in evaluation mode; ``z`` [batch, 0] is not read.
        """
        return self._decode(shift_right(tokens), None, None)[0]

    def read(self, tokens: Tensor, previous: Tensor, state: StreamState) -> tuple[Tensor, StreamState]:
        """Return logits [lanes, length, NUM_OUTPUTS] for each symbol of the chunks given all before, and the state."""
        return self._decode(shift_right(tokens, previous), None, state)

    def stream_state(self, lanes: int) -> StreamState:
        """Return the initial state of ``lanes`` lanes: zeros."""
        zeros = self.output.weight.new_zeros(lanes, self.output.in_features)
        return {f"{part}.{layer}": zeros.clone() for layer in range(len(self.layers)) for part in ("hidden", "cell")}

    def _decode(self, inputs: Tensor, noise: Noise | None, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Return logits [batch, length, NUM_OUTPUTS] after ``inputs`` [batch, length], and the last state.

        Without ``noise`` there is no dropout. Without ``state`` the initial state is zeros.
        """
        features: Tensor | None = None if self.embedding is None else self.embedding(inputs)
        last: StreamState = {}
        for layer, lstm in enumerate(self._lstms()):
            names = f"hidden.{layer}", f"cell.{layer}"
            first = None if state is None else (state[names[0]], state[names[1]])
            symbols = inputs if features is None else None
            features, carried = continue_lstm(lstm, self.one_hot, symbols, features, first, noise)
            if self.training and self.dropout > 0 and noise is not None:
                features = drop_features(features, noise, self.dropout)
            last |= dict(zip(names, carried, strict=True))
        logits: Tensor = self.output(features)
        return logits, last

    def begin(self, z: Tensor) -> LstmState:
        """Return the state before the first byte: zeros. ``z`` [batch, 0] gives only the number of samples."""
        zeros = z.new_zeros(len(z), self.output.in_features)
        symbols = self.one_hot.identity.shape[1] if self.embedding is None else 0
        steps = [LstmStep(lstm, symbols if layer == 0 else 0) for layer, lstm in enumerate(self._lstms())]
        return LstmState(steps, [[zeros, zeros] for _ in steps])

    def _lstms(self) -> list[Lstm]:
        return [lstm for lstm in self.layers if isinstance(lstm, Lstm)]

    @torch.no_grad()
    def advance(self, previous: Tensor, state: LstmState) -> tuple[Tensor, LstmState]:
        """Return logits [batch, NUM_OUTPUTS] for the byte after ``previous`` [batch], and the state after it."""
        output, state = state.advance(*read_symbols(self.embedding, previous))
        return self.output(output), state
