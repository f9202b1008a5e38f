"""Hybrid convolutional VAE (Semeniuta et al. 2017, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raytrain.config.models import HybridConfig
from raytrain.config.schema import RunConfig
from raytrain.config.vocabularies import longer_pieces
from raytrain.data.vocabulary import NUM_OUTPUTS, PAD, SIZE
from raytrain.models.bytenet import ByteNet, ByteNetState
from raytrain.models.convolutions import Doubling, Halving
from raytrain.models.decoding import LstmState, LstmStep
from raytrain.models.dropout import drop_input
from raytrain.models.heads import Head, SymbolHead, negative_log_likelihood
from raytrain.models.initialisation import initialise_uniform
from raytrain.models.lstm import Lstm, run_lstm
from raytrain.models.noise import Noise
from raytrain.models.normalisation import GroupBatchNorm
from raytrain.models.posterior import Posterior, draw_posterior, gaussian_kl
from raytrain.models.symbols import OneHot, piece_vectors, read_symbols, shift_right
from raytrain.models.terms import Terms


@dataclass(frozen=True)
class HybridState:
    """State of the decoder: deconvolved features [batch, length, maps], position, and state of the network on top."""

    features: Tensor
    position: int
    top: LstmState | ByteNetState

    def keep(self, rows: Tensor) -> HybridState:
        """Return the state of these rows of the batch only."""
        return HybridState(self.features[rows], self.position, self.top.keep(rows))


class Hybrid(nn.Module):
    """Convolutional encoder, Gaussian latent code, deconvolutional decoder, LSTM or causal convolutions on top.

    Every convolution halves the length and every deconvolution doubles it. So the model pads samples to
    ``padded_length``, a multiple of 2^depth, and masks them: the loss of a document does not depend on its batch.
    """

    encoder_parts = ("embedding", "convolutions", "encoder_norms", "posterior")

    def __init__(
        self, config: HybridConfig, length: int, group_size: int, documents: bool = True, longer: int = 0
    ) -> None:
        """Build the modules.

        Args:
            length: symbols of the longest sample, STOP included.
            group_size: samples that share batch statistics.
            documents: true if texts end with STOP; false for windows.
            longer: number of pieces longer than one byte in the vocabulary.

        Raises:
            ValueError: ``model.feature_maps`` gives more convolutions than ``length`` can be halved times.
        """
        super().__init__()
        depth = len(config.feature_maps)
        if 2**depth > length:
            raise ValueError(
                f"model.feature_maps is {config.feature_maps!r}: {depth} convolutions of stride 2 "
                f"need a length of at least {2**depth}, not {length}"
            )
        self.latent = config.latent
        self.length = length
        self.documents = documents
        self.padded_length = -(-length // 2**depth) * 2**depth
        self.code_length = self.padded_length // 2**depth
        self.code_maps = config.feature_maps[-1]
        self.one_hot = OneHot()
        self.embedding = piece_vectors(longer, config.feature_maps[0])
        self.symbol_width = config.feature_maps[0] if longer else SIZE
        widths = (self.symbol_width, *config.feature_maps)
        self.convolutions = nn.ModuleList(Halving(before, after) for before, after in pairwise(widths))
        self.encoder_norms = nn.ModuleList(GroupBatchNorm(width, group_size) for width in config.feature_maps)
        self.posterior = Posterior(
            self.code_maps * self.code_length, config.latent, config.mean_norm, config.fixed_variance
        )
        self.expand = nn.Linear(config.latent, self.code_maps * self.code_length)
        widths = (self.code_maps, *config.decoder_maps)
        self.deconvolutions = nn.ModuleList(Doubling(before, after) for before, after in pairwise(widths))
        self.decoder_norms = nn.ModuleList(GroupBatchNorm(width, group_size) for width in config.decoder_maps)
        self.auxiliary = SymbolHead(config.decoder_maps[-1], longer)
        self.feature_scale = config.decoder_maps[-1] ** -0.5
        width = config.decoder_maps[-1] + self.symbol_width
        self.lstm = (
            Lstm(width, config.hidden, config.weight_dropout, config.layer_norm) if config.decoder == "lstm" else None
        )
        self.bytenet = (
            ByteNet(width, config.hidden, config.decoder_layers, group_size) if config.decoder == "bytenet" else None
        )
        self.skip = config.skip
        # with the skip, the auxiliary head provides the frequencies
        outputs = NUM_OUTPUTS + longer
        self.output = Head(config.hidden, outputs) if config.skip else SymbolHead(config.hidden, longer)
        initialise_uniform(self)
        if self.lstm is not None and not longer and not config.layer_norm:
            self.lstm.raise_symbols(config.decoder_maps[-1])

    @classmethod
    def from_config(cls, config: RunConfig[Any]) -> Hybrid:
        """Build the model of a run."""
        documents, longer = config.sampling == "documents", longer_pieces(config.vocabulary)
        return cls(config.model, config.length, config.group_size, documents=documents, longer=longer)

    def forward(self, tokens: Tensor, noise: Noise, input_dropout: float = 0.0) -> Terms:
        """Return the terms of the ELBO for ``tokens`` [batch, length at most self.length], PAD after each STOP."""
        masks = self._masks(tokens)
        mean, log_variance = self.encode(tokens, masks)
        z = draw_posterior(mean, log_variance, noise)
        features = self.deconvolve(z, masks)[:, : tokens.shape[1]]
        auxiliary = self.auxiliary(features)
        inputs = drop_input(shift_right(tokens), noise, input_dropout)
        logits = self._logits(self._decode(inputs, features, masks[0], noise), auxiliary)
        return Terms(
            reconstruction=negative_log_likelihood(logits, tokens).sum(1),
            kl=gaussian_kl(mean, log_variance),
            auxiliary=negative_log_likelihood(auxiliary, tokens).sum(1),
            mean=mean,
            log_variance=log_variance,
            z=z,
        )

    def predict(self, tokens: Tensor, z: Tensor) -> Tensor:
        """Return logits [batch, length, NUM_OUTPUTS] for ``tokens`` [batch, length], each given z and those before it.

        The model is in evaluation mode: batch statistics would need the length of the whole sample.
        """
        features = self.deconvolve(z)[:, : tokens.shape[1]]
        hidden = self._decode(shift_right(tokens), features, self._masks(tokens)[0])
        return self._logits(hidden, self.auxiliary(features) if self.skip else None)

    def _decode(self, inputs: Tensor, features: Tensor, mask: Tensor, noise: Noise | None = None) -> Tensor:
        """Return the outputs [batch, length, hidden] of the network on top, for ``inputs`` [batch, length].

        ``features`` are the deconvolved ones.
        """
        scaled = features * self.feature_scale
        if self.bytenet is not None:
            joined = torch.cat((scaled, self._vectors(inputs).to(features.dtype)), dim=-1)
            outputs: Tensor = self.bytenet(joined, mask[..., : inputs.shape[1]])
            return outputs
        assert self.lstm is not None
        return run_lstm(self.lstm, self.one_hot, *read_symbols(self.embedding, inputs, scaled), noise=noise)

    def _vectors(self, symbols: Tensor) -> Tensor:
        """Return vectors [batch, length, symbol_width] of ``symbols``: one-hot, or learnt ones for pieces."""
        vectors: Tensor = self.one_hot(symbols) if self.embedding is None else self.embedding(symbols)
        return vectors

    def _logits(self, hidden: Tensor, auxiliary: Tensor | None) -> Tensor:
        """Return the logits for outputs of the network on top; with the skip, add those of the auxiliary head."""
        logits: Tensor = self.output(hidden)
        return logits + auxiliary if self.skip and auxiliary is not None else logits

    def encode(self, tokens: Tensor, masks: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | x), [batch, latent] each."""
        masks = self._masks(tokens) if masks is None else masks
        features = self._first(self._pad(tokens), masks[0])
        for number, (norm, mask) in enumerate(zip(self.encoder_norms, masks[1:], strict=True)):
            assert isinstance(norm, GroupBatchNorm)
            convolved = self.convolutions[number](features) if number else features
            features = norm.activate(convolved, mask, cover=True)
        return self.posterior(features.flatten(1))

    def _first(self, symbols: Tensor, mask: Tensor) -> Tensor:
        """Return the outputs of the first convolution for ``symbols`` [batch, padded_length]."""
        first = self.convolutions[0]
        assert isinstance(first, Halving)
        if self.embedding is None:
            return first.of_symbols(symbols, self.one_hot)
        vectors: Tensor = first(self.embedding(symbols).transpose(1, 2) * mask)  # PAD carries no information
        return vectors

    def deconvolve(self, z: Tensor, masks: list[Tensor] | None = None) -> Tensor:
        """Return features [batch, padded_length, maps] of z [batch, latent]; masks are for batch statistics only.

        The features themselves are never masked: the length is unknown at generation time.
        """
        features = F.relu(self.expand(z)).unflatten(1, (self.code_maps, self.code_length))
        levels = [z.new_ones(())] * len(self.deconvolutions) if masks is None else masks[-2::-1]
        for deconvolution, norm, mask in zip(self.deconvolutions, self.decoder_norms, levels, strict=True):
            assert isinstance(norm, GroupBatchNorm)
            features = norm.activate(deconvolution(features), mask, cover=False)
        return features.transpose(1, 2)

    # ------------------------------------------------------------------------------------ generation

    @torch.no_grad()
    def begin(self, z: Tensor) -> HybridState:
        """Return the decoder's state before the first byte, for codes z [batch, latent]."""
        if self.bytenet is not None:
            vectors = None if self.embedding is None else self.embedding.weight
            return HybridState(self.deconvolve(z), 0, self.bytenet.begin(len(z), self.symbol_width, vectors))
        assert self.lstm is not None
        zeros = z.new_zeros(len(z), self.lstm.hidden_size)
        step = LstmStep(self.lstm, SIZE if self.embedding is None else 0)
        return HybridState(self.deconvolve(z), 0, LstmState([step], [[zeros, zeros]]))

    @torch.no_grad()
    def advance(self, previous: Tensor, state: HybridState) -> tuple[Tensor, HybridState]:
        """Return logits [batch, NUM_OUTPUTS] for the byte after ``previous`` [batch], and the state after it."""
        features = state.features[:, state.position]
        scaled = features * self.feature_scale
        output: Tensor
        top: LstmState | ByteNetState
        if isinstance(state.top, ByteNetState):  # its table already holds the learnt vectors
            output, top = state.top.advance(previous, scaled)
        else:
            output, top = state.top.advance(*read_symbols(self.embedding, previous, scaled))
        logits = self._logits(output, self.auxiliary(features) if self.skip else None)
        return logits, HybridState(state.features, state.position + 1, top)

    # --------------------------------------------------------------------------------------- masking

    def _pad(self, tokens: Tensor) -> Tensor:
        return F.pad(tokens, (0, self.padded_length - tokens.shape[1]), value=PAD)

    def _masks(self, tokens: Tensor) -> list[Tensor]:
        """Return masks [batch, 1, padded_length / 2^level] for levels 0 to depth: 1 where a position covers text."""
        mask = (self._pad(tokens) != PAD).float()[:, None]
        return [mask[..., :: 2**level] for level in range(len(self.convolutions) + 1)]
