"""Networks that read byte tokens, return the terms of the ELBO, and generate text byte by byte."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from raytrain.config.models import find_model
from raytrain.config.schema import RunConfig
from raytrain.data.pieces import Vocabulary
from raytrain.models.base import Model, TextModel
from raytrain.utils.errors import UserError

__all__ = ["Model", "TextModel", "build", "build_empty", "encoder_tensors", "num_parameters"]


def build(config: RunConfig[Any]) -> Model:
    """Build the model of ``config``, with weights drawn from ``config.seed``.

    The caller's random state does not change.

    Raises:
        UserError: the implementation that the model's spec names cannot be imported.
    """
    return _build(_implementation(config), config)


def build_empty(config: RunConfig[Any]) -> Model:
    """Build the model without memory for its weights: to count parameters, or to check that it can be built.

    Raises:
        UserError: see ``build``.
    """
    implementation = _implementation(config)
    with torch.device("meta"):
        return _build(implementation, config)


def num_parameters(config: RunConfig[Any]) -> int:
    """Return the number of parameters of the model of ``config``."""
    return sum(parameter.numel() for parameter in build_empty(config).parameters())


def encoder_tensors(model: Model) -> dict[str, Tensor]:
    """Return the parameters and statistics that compute q(z | x), by their names in ``model``; none without a code."""
    parts: tuple[str, ...] = getattr(model, "encoder_parts", ())
    return {name: tensor for name, tensor in model.state_dict().items() if name.partition(".")[0] in parts}


def _build(implementation: Any, config: RunConfig[Any]) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: Model = implementation.from_config(config)
    model.vocabulary = Vocabulary(config.vocabulary, ())
    return model


def _implementation(config: RunConfig[Any]) -> Any:
    """Import the class that implements the model of ``config``.

    Raises:
        UserError: it cannot be imported.
    """
    with torch.device("cpu"):  # the module may make constants: not on the device that the caller builds on
        name = config.model_name
        implementation = find_model(name).implementation
        module, _, attribute = implementation.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"model {name}: cannot import its implementation {implementation!r}: {error}") from None
