"""The models: all read byte tokens, give the terms of a bound, and write text one byte at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from raytrain import checkpoint
from raytrain.config import ByteLstmConfig, HybridConfig, LstmVaeConfig, RunConfig, from_dict
from raytrain.errors import UserError
from raytrain.models.byte_lstm import ByteLstm
from raytrain.models.hybrid import Hybrid
from raytrain.models.layers import Noise, Terms
from raytrain.models.lstm_vae import LstmVae
from raytrain.models.sampling import (
    RequestError,
    Sample,
    interpolate,
    one_line,
    posterior_means,
    prior_codes,
    readable,
    reconstruct,
    sample,
    score,
    tokenise,
)

Model = Hybrid | LstmVae | ByteLstm

__all__ = [
    "Model",
    "Noise",
    "RequestError",
    "Sample",
    "Terms",
    "build",
    "build_empty",
    "from_checkpoint",
    "interpolate",
    "load",
    "one_line",
    "posterior_means",
    "prior_codes",
    "readable",
    "reconstruct",
    "sample",
    "sample_text",
    "score",
    "tokenise",
]


def build(config: RunConfig[Any]) -> Model:
    """The model of ``config``, its weights drawn from ``config.seed``; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = _build(config)
    model.documents = config.sampling == "documents"
    return model


def _build(config: RunConfig[Any]) -> Model:
    if isinstance(config.model, HybridConfig):
        return Hybrid(config.model, config.length, config.group_size)
    if isinstance(config.model, LstmVaeConfig):
        return LstmVae(config.model, config.length)
    if isinstance(config.model, ByteLstmConfig):
        return ByteLstm(config.model, config.length)
    raise ValueError(f"model is {config.model!r}: not one of the models")


def build_empty(config: RunConfig[Any]) -> Model:
    """The model without memory for its weights: to count parameters, or to see that it can be built."""
    with torch.device("meta"):
        return build(config)


def load(place: str | Path) -> Model:
    """The trained model of a checkpoint folder or ``s3://`` address, in evaluation mode.

    Raises:
        UserError: not a checkpoint, or a damaged one.
    """
    return from_checkpoint(checkpoint.load(place))


def from_checkpoint(stored: checkpoint.Checkpoint) -> Model:
    """The trained model of an open checkpoint, in evaluation mode.

    Raises:
        UserError: its weights are not those of the model that its config describes.
    """
    try:
        config = from_dict(stored.config)
        expected = build_empty(config).state_dict()  # first: a config may describe a model larger than the memory
    except (UserError, RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"checkpoint {stored.uri}: its config is not that of a model: {error}") from None
    weights = stored.matching("model", expected)
    model = build(config)
    model.load_state_dict(weights)
    return model.eval()


def sample_text(
    model: Model, num: int, *, temperature: float = 1.0, max_length: int | None = None, seed: int = 0
) -> list[str]:
    """``num`` texts drawn from the model, readable: invalid byte sequences become spaces."""
    drawn = sample(model, num, temperature=temperature, max_length=max_length, seed=seed)
    return [readable(item.text) for item in drawn]
