"""Everything that can be set: validated, and written to and read from JSON.

A run is a pure function of (``RunConfig``, corpus, seed). Whatever is given as a fraction here is a
fraction of ``RunConfig.steps``, so that a longer run keeps its shape; ``ObjectiveConfig`` and
``OptimizerConfig`` say which.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Literal, TypeVar

ModelName = Literal["hybrid", "lstm_vae", "byte_lstm"]
MODEL_NAMES: tuple[ModelName, ...] = typing.get_args(ModelName)
MAX_LAYERS = 256
"""No net of this kind is deeper; a number with a zero too many would only be built for ever."""


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value!r}: {rule}")


@dataclass(frozen=True)
class HybridConfig:
    """The convolutional VAE with an LSTM or causal convolutions on top (Semeniuta et al. 2017, section 3)."""

    feature_maps: tuple[int, ...] = (128, 256)
    """Feature maps of each encoder convolution; every one halves the length."""
    decoder_maps: tuple[int, ...] = (128, 200)
    """Feature maps of each deconvolution; as many as in the encoder, each doubles the length."""
    latent: int = 50
    """Dimensions of the latent code z."""
    hidden: int = 500
    """Units of the net on top."""
    decoder: Literal["lstm", "bytenet"] = "lstm"
    """The net on top: an LSTM, or causal convolutions in highway blocks (the paper's figure 6, with 256 units)."""
    decoder_layers: int = 1
    """Blocks of the causal convolutions, which see decoder_layers + 1 characters; an LSTM has one layer."""

    def __post_init__(self) -> None:
        _require(len(self.feature_maps) > 0, "model.feature_maps", self.feature_maps, "give at least one width")
        _require(
            len(self.decoder_maps) == len(self.feature_maps),
            "model.decoder_maps",
            self.decoder_maps,
            f"give as many widths as model.feature_maps has ({len(self.feature_maps)})",
        )
        for name in ("feature_maps", "decoder_maps"):
            widths = getattr(self, name)
            _require(all(width > 0 for width in widths), f"model.{name}", widths, "widths must be positive")
        _require(self.latent > 0, "model.latent", self.latent, "must be positive")
        _require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")
        _require(
            0 < self.decoder_layers <= MAX_LAYERS,
            "model.decoder_layers",
            self.decoder_layers,
            f"must be in [1, {MAX_LAYERS}]",
        )
        _require(
            self.decoder == "bytenet" or self.decoder_layers == 1,
            "model.decoder_layers",
            self.decoder_layers,
            "the LSTM has 1; set model.decoder to bytenet for more",
        )


@dataclass(frozen=True)
class LstmVaeConfig:
    """The baseline: an LSTM encoder and an LSTM decoder (Bowman et al. 2016)."""

    latent: int = 100
    """Dimensions of the latent code z."""
    hidden: int = 500
    """Units of the encoder LSTM and of the decoder LSTM."""

    def __post_init__(self) -> None:
        _require(self.latent > 0, "model.latent", self.latent, "must be positive")
        _require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")


@dataclass(frozen=True)
class ByteLstmConfig:
    """A stacked LSTM language model over bytes."""

    layers: int = 4
    """Stacked LSTM layers."""
    hidden: int = 512
    """Units of each layer."""
    dropout: float = 0.5
    """Dropout between layers (not after the last)."""

    def __post_init__(self) -> None:
        _require(0 < self.layers <= MAX_LAYERS, "model.layers", self.layers, f"must be in [1, {MAX_LAYERS}]")
        _require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")


ModelConfig = HybridConfig | LstmVaeConfig | ByteLstmConfig
MODEL_CONFIGS: dict[ModelName, type[ModelConfig]] = {
    "hybrid": HybridConfig,
    "lstm_vae": LstmVaeConfig,
    "byte_lstm": ByteLstmConfig,
}
ModelT = TypeVar("ModelT", HybridConfig, LstmVaeConfig, ByteLstmConfig)
