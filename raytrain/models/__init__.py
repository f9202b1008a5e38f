"""The models: all read byte tokens, give the terms of a bound, and write text one byte at a time."""

from __future__ import annotations

from typing import Any

import torch

from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.models.byte_lstm import ByteLstm
from raytrain.models.hybrid import Hybrid
from raytrain.models.lstm_vae import LstmVae

Model = Hybrid | LstmVae | ByteLstm


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
