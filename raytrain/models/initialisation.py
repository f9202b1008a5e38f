"""Initialisation of weights."""

from __future__ import annotations

from torch import nn

from raytrain.models.normalisation import CodeNorm, GroupBatchNorm
from raytrain.models.posterior import Posterior


def initialise_uniform(module: nn.Module, bound: float = 0.1) -> None:
    """Draw all weights and biases from uniform(-bound, bound), as the paper's code does; see ``Lstm.raise_symbols``.

    Normalisation keeps its initial identity, and posteriors have bounds of their own.
    """
    for layer in module.modules():
        if not isinstance(layer, GroupBatchNorm | CodeNorm | nn.LayerNorm):
            for parameter in layer.parameters(recurse=False):
                nn.init.uniform_(parameter, -bound, bound)
    for layer in module.modules():
        if isinstance(layer, Posterior):
            layer.initialise()
