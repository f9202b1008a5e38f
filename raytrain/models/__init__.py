"""Networks that read byte tokens, return the terms of the ELBO, and generate text byte by byte."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from raytrain.config.models import find_model
from raytrain.config.schema import RunConfig, to_dict
from raytrain.data.pieces import Vocabulary
from raytrain.models.base import Model, TextModel
from raytrain.utils.errors import UserError

__all__ = [
    "Model",
    "ModelSize",
    "TextModel",
    "build",
    "build_empty",
    "encoder_tensors",
    "model_size",
    "num_parameters",
]


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


@dataclass(frozen=True)
class ModelSize:
    """How large a model is."""

    parameters: int
    rows: int
    """Total rows of all its matrices: the number of outputs that one position of the text may keep in memory."""


def model_size(config: RunConfig[Any]) -> ModelSize:
    """Return the size of the model of ``config``.

    The model is built once per process and its size cached: before a search starts, it asks for the same points of its
    space several times.

    Raises:
        UserError: see ``build``.
    """
    return _size(_Building(_implementation(config), json.dumps(to_dict(config), sort_keys=True), config))


@dataclass(frozen=True)
class _Building:
    """A model to build, as a cache key: its implementation and its config as text, since a config may be unhashable."""

    implementation: Any
    text: str
    config: RunConfig[Any] = field(compare=False)


@lru_cache(maxsize=1024)
def _size(building: _Building) -> ModelSize:
    weights = list(build_empty(building.config).parameters())
    return ModelSize(
        parameters=sum(weight.numel() for weight in weights),
        rows=sum(weight.shape[0] for weight in weights if weight.ndim > 1),
    )


def num_parameters(config: RunConfig[Any]) -> int:
    """Return the number of parameters of the model of ``config``."""
    return model_size(config).parameters


def encoder_tensors(model: Model) -> dict[str, Tensor]:
    """Return the parameters and statistics that compute q(z | x), by their names in ``model``; empty without a code."""
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
    with torch.device("cpu"):  # the module may create constants, which must not be on the caller's device
        name = config.model_name
        implementation = find_model(name).implementation
        module, _, attribute = implementation.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise UserError(f"model {name}: cannot import its implementation {implementation!r}: {error}") from None
