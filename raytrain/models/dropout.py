"""Dropout by the noise of the samples: of input symbols and of features."""

from __future__ import annotations

import torch
from torch import Tensor

from raytrain.data.vocabulary import DROP, SIZE, STOP
from raytrain.models.noise import Noise


def drop_input(inputs: Tensor, noise: Noise, probability: float) -> Tensor:
    """Replace input bytes and pieces by DROP with ``probability``; START and STOP stay."""
    if probability == 0:
        return inputs
    keep = noise.keep(1 - probability, inputs.shape[1])
    return torch.where(keep | ((inputs >= STOP) & (inputs < SIZE)), inputs, DROP)


def drop_features(features: Tensor, noise: Noise, probability: float) -> Tensor:
    """Set each of ``features`` [batch, length, width] to 0 with ``probability``; scale the others to keep the mean."""
    keep = noise.keep(1 - probability, *features.shape[1:])
    return features * keep.to(features.dtype) / (1 - probability)
