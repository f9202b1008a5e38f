"""Model configs, and the registry of models.

This module imports no torch: the command line reads it for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

from raytrain.config.plugins import load_plugins
from raytrain.utils.errors import UserError

ModelName = str
"""Key of ``MODELS``."""
ModelT = TypeVar("ModelT")
"""Config class of a model."""
MAX_LAYERS = 256
"""Most layers of a network: none of this kind is deeper, and one with a zero too many would take forever to build."""


def require(condition: bool, name: str, value: object, rule: str) -> None:
    """Refuse the value of a field.

    Raises:
        ValueError: ``condition`` is false; the message names the field, its value and the rule.
    """
    if not condition:
        raise ValueError(f"{name} is {value!r}: {rule}")


def require_norm(mean_norm: float, fixed_variance: bool) -> None:
    """Refuse an impossible normalisation of the code.

    Raises:
        ValueError: see ``require``.
    """
    require(0 <= mean_norm < 10, "model.mean_norm", mean_norm, "must be in [0, 10)")
    require(
        not fixed_variance or 0 < mean_norm < 1,
        "model.mean_norm",
        mean_norm,
        "must be in (0, 1) with model.fixed_variance, which leaves 1 - mean_norm^2 for the variance",
    )


# --------------------------------------------------------------------------------------------- configs


@dataclass(frozen=True)
class HybridConfig:
    """Convolutional VAE with an LSTM or causal convolutions on top (Semeniuta et al. 2017, section 3)."""

    feature_maps: tuple[int, ...] = (128, 256)
    """Feature maps of each encoder convolution; each halves the length."""
    decoder_maps: tuple[int, ...] = (128, 200)
    """Feature maps of each deconvolution, as many as in the encoder; each doubles the length."""
    latent: int = 50
    """Dimensions of the latent code z."""
    hidden: int = 500
    """Units of the network on top."""
    decoder: Literal["lstm", "bytenet"] = "lstm"
    """Network on top: an LSTM, or causal convolutions in highway blocks (the paper's figure 6, with 256 units)."""
    decoder_layers: int = 1
    """Blocks of the causal convolutions, which see decoder_layers + 1 characters; an LSTM has one layer."""
    skip: bool = False
    """Predict by the sum of the network on top and the auxiliary head, so that the code has a way of its own to the
    logits (skip connections: Dieng et al. 2019)."""
    mean_norm: float = 0.0
    """If above 0, posterior means are batch-normalised to this standard deviation (Zhu et al. 2020). The KL is then at
    least latent x mean_norm^2 / 2 nats."""
    fixed_variance: bool = False
    """Fix the posterior's variance at 1 - mean_norm^2, so that codes have the prior's variance (Braithwaite and Kleijn
    2018). The KL is then latent x -ln(1 - mean_norm^2) / 2 nats."""
    weight_dropout: float = 0.0
    """Dropout of the recurrent weights of the LSTM on top, one mask a step for all samples (Merity et al. 2018)."""
    layer_norm: bool = False
    """Normalise the pre-activations of the LSTM on top over its units, as in the authors' code (Ba et al. 2016)."""

    def __post_init__(self) -> None:
        require(len(self.feature_maps) > 0, "model.feature_maps", self.feature_maps, "give at least one width")
        require(
            len(self.decoder_maps) == len(self.feature_maps),
            "model.decoder_maps",
            self.decoder_maps,
            f"give as many widths as model.feature_maps has ({len(self.feature_maps)})",
        )
        for name in ("feature_maps", "decoder_maps"):
            widths = getattr(self, name)
            require(all(width > 0 for width in widths), f"model.{name}", widths, "widths must be positive")
        require(self.latent > 0, "model.latent", self.latent, "must be positive")
        require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")
        require_norm(self.mean_norm, self.fixed_variance)
        require(
            0 < self.decoder_layers <= MAX_LAYERS,
            "model.decoder_layers",
            self.decoder_layers,
            f"must be in [1, {MAX_LAYERS}]",
        )
        require(
            self.decoder == "bytenet" or self.decoder_layers == 1,
            "model.decoder_layers",
            self.decoder_layers,
            "the LSTM has 1; set model.decoder to bytenet for more",
        )
        require(0 <= self.weight_dropout < 1, "model.weight_dropout", self.weight_dropout, "must be in [0, 1)")
        require(
            self.decoder == "lstm" or self.weight_dropout == 0,
            "model.weight_dropout",
            self.weight_dropout,
            "causal convolutions have no recurrent weights; set model.decoder to lstm, or this to 0",
        )
        require(
            self.decoder == "lstm" or not self.layer_norm,
            "model.layer_norm",
            self.layer_norm,
            "causal convolutions have batch normalisation; set model.decoder to lstm, or this to false",
        )


@dataclass(frozen=True)
class LstmVaeConfig:
    """Baseline with an LSTM encoder and an LSTM decoder (Bowman et al. 2016)."""

    latent: int = 100
    """Dimensions of the latent code z."""
    hidden: int = 500
    """Units of the encoder LSTM and of the decoder LSTM."""
    pool: Literal["last", "mean", "max"] = "last"
    """What the posterior reads: the encoder's last output, or the mean or maximum of all (Long et al. 2019)."""
    code_to_inputs: bool = False
    """Let the decoder read the code at every byte (He et al. 2019), not only in its first state as in the paper."""
    mean_norm: float = 0.0
    """If above 0, posterior means are batch-normalised to this standard deviation (Zhu et al. 2020). The KL is then at
    least latent x mean_norm^2 / 2 nats."""
    fixed_variance: bool = False
    """Fix the posterior's variance at 1 - mean_norm^2, so that codes have the prior's variance (Braithwaite and Kleijn
    2018). The KL is then latent x -ln(1 - mean_norm^2) / 2 nats."""
    weight_dropout: float = 0.0
    """Dropout of the decoder's recurrent weights, one mask a step for all samples (Merity et al. 2018)."""
    layer_norm: bool = False
    """Normalise the pre-activations of both LSTMs over their units, as in the authors' code (Ba et al. 2016)."""

    def __post_init__(self) -> None:
        require(self.latent > 0, "model.latent", self.latent, "must be positive")
        require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")
        require_norm(self.mean_norm, self.fixed_variance)
        require(0 <= self.weight_dropout < 1, "model.weight_dropout", self.weight_dropout, "must be in [0, 1)")


@dataclass(frozen=True)
class ByteLstmConfig:
    """Stacked LSTM language model over bytes."""

    layers: int = 4
    """Stacked LSTM layers."""
    hidden: int = 512
    """Units of each layer."""
    dropout: float = 0.5
    """Dropout of the outputs of every layer, the last included; a mask for each sample and position."""
    weight_dropout: float = 0.0
    """Dropout of the recurrent weights of every layer, one mask a step for all samples (Merity et al. 2018)."""
    layer_norm: bool = False
    """Normalise the pre-activations of every layer over its units (Ba et al. 2016)."""

    def __post_init__(self) -> None:
        require(0 < self.layers <= MAX_LAYERS, "model.layers", self.layers, f"must be in [1, {MAX_LAYERS}]")
        require(self.hidden > 0, "model.hidden", self.hidden, "must be positive")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "must be in [0, 1)")
        require(0 <= self.weight_dropout < 1, "model.weight_dropout", self.weight_dropout, "must be in [0, 1)")


# -------------------------------------------------------------------------------------------- registry


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything that the rest of the package needs to know about a model."""

    config: type
    """Config class; each model has its own."""
    implementation: str
    """``module:Class`` of the network, imported when a model is built. The class implements ``TextModel``."""
    has_latent: bool
    """True if the model has a latent code z. Without one its KL is 0, and there is no posterior to collapse."""
    label: str
    """Name in figures and tables."""
    full_size: str
    """Preset that training starts from on machines with GPUs."""
    reads_pieces: bool = False
    """Whether it can read and write pieces of more than one byte (``--vocabulary``)."""
    carries_state: bool = False
    """True if the network implements ``StreamModel``, so that it can read a stream; only without a latent code."""
    colour: str = ""
    """Colour in figures, as matplotlib takes it; empty: a colour that no other model has."""
    marker: str = ""
    """Marker in figures, as matplotlib takes it; empty: chosen as the colour is."""
    line: str = "-"
    """Line style in figures, as matplotlib takes it."""


MODELS: dict[ModelName, ModelSpec] = {
    "hybrid": ModelSpec(
        config=HybridConfig,
        implementation="raytrain.models.hybrid:Hybrid",
        has_latent=True,
        label="hybrid VAE",
        full_size="paper-ptb",
        reads_pieces=True,
        colour="#0072B2",
        marker="o",
        line="-",
    ),
    "lstm_vae": ModelSpec(
        config=LstmVaeConfig,
        implementation="raytrain.models.lstm_vae:LstmVae",
        has_latent=True,
        label="LSTM VAE",
        full_size="paper-ptb",
        reads_pieces=True,
        colour="#D55E00",
        marker="s",
        line="--",
    ),
    "byte_lstm": ModelSpec(
        config=ByteLstmConfig,
        implementation="raytrain.models.byte_lstm:ByteLstm",
        has_latent=False,
        label="LSTM language model",
        full_size="bios",
        reads_pieces=True,
        carries_state=True,
        colour="#767676",
        marker="^",
        line=":",
    ),
}
"""The models, by the name that the command line uses. Plugins add theirs: read it through ``known_models``."""


def known_models() -> dict[ModelName, ModelSpec]:
    """Return ``MODELS`` once the plugins have filled it.

    Raises:
        UserError: a plugin cannot be loaded, or two models share a config class.
    """
    load_plugins()
    owners: dict[type, ModelName] = {}
    for name, spec in MODELS.items():
        if (other := owners.setdefault(spec.config, name)) != name:
            raise UserError(
                f"models {other} and {name} share the config class {spec.config.__name__}: give each its own"
            )
    return MODELS


def find_model(name: ModelName) -> ModelSpec:
    """Return the spec of the model ``name``.

    Raises:
        UserError: no model is registered under ``name``.
    """
    models = known_models()
    if name not in models:
        raise UserError(f"unknown model {name!r}: must be one of {', '.join(models)}")
    return models[name]


def model_name(config: object) -> ModelName:
    """Return the name of the model that a config class belongs to.

    Raises:
        UserError: no model is registered with this class.
    """
    for name, spec in known_models().items():
        if type(config) is spec.config:
            return name
    raise UserError(
        f"no model has the config class {type(config).__name__}: "
        "it must be registered by a module that RAYTRAIN_PLUGINS names"
    )


def require_stream_model(config: object) -> None:
    """Refuse a stream for a model that carries no state, or that is not registered yet.

    This does not load the plugins: the presets, which plugins import, are themselves configs and are checked here.

    Raises:
        ValueError: the model of this config class cannot read a stream.
    """
    name, spec = next(((name, spec) for name, spec in MODELS.items() if type(config) is spec.config), (None, None))
    able = ", ".join(other for other, known in MODELS.items() if known.carries_state)
    require(
        spec is not None and spec.carries_state,
        "sampling",
        "stream",
        f"{name or type(config).__name__} carries no state from one chunk of text to the next; "
        f"use windows or documents, or a model that does ({able})",
    )


def require_piece_model(config: object, vocabulary: str) -> None:
    """Refuse a vocabulary of longer pieces for a model that only knows bytes, or that is not registered yet.

    Raises:
        ValueError: the model of this config class cannot read and write pieces.
    """
    name, spec = next(((name, spec) for name, spec in MODELS.items() if type(config) is spec.config), (None, None))
    able = ", ".join(other for other, known in MODELS.items() if known.reads_pieces)
    require(
        spec is not None and spec.reads_pieces,
        "vocabulary",
        vocabulary,
        f"{name or type(config).__name__} reads and writes single bytes; use byte, or a model of pieces ({able})",
    )


def has_latent(name: ModelName) -> bool:
    """Return whether a model has a latent code.

    Records may name models that are not registered here; they count as having one.
    """
    spec = known_models().get(name)
    return spec is None or spec.has_latent
