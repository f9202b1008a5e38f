"""Text from a model: one byte at a time, in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raytrain.data.vocabulary import STOP

if TYPE_CHECKING:
    from raytrain.models import Model


@dataclass(frozen=True)
class Sample:
    """One generated text and what its model thinks of it."""

    text: bytes
    """The bytes, without STOP."""
    log_probability: float
    """log p(text | z) in nats at temperature 1, STOP included unless the sample was cut off."""
    entropy: float
    """Mean entropy of the model's predictions along the sample, in nats at temperature 1."""
    truncated: bool
    """True if the length ran out before the model said STOP."""


@torch.inference_mode()
def sample(
    model: Model,
    num: int,
    *,
    temperature: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
    z: Tensor | None = None,
) -> list[Sample]:
    """Draw ``num`` texts, of codes from the prior or of ``z`` [num, latent].

    ``temperature`` 0 takes the most likely byte each time. ``max_length`` is in symbols, STOP included,
    and at most (and by default) the length the model was trained for, where the model has one.

    Raises:
        ValueError: a negative temperature, or a length that the model does not have.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: must not be negative")
    length = model.length if max_length is None else max_length
    if not 0 < length <= model.length:
        raise ValueError(f"max_length is {length}: must be between 1 and the model's length of {model.length}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    if z is None:
        z = torch.randn(num, model.latent, generator=generator, device=device)
    was_training = model.training
    model.eval()
    try:
        tokens, log_probabilities, entropies = _decode(model, z, temperature, length, generator)
    finally:
        model.train(was_training)
    lengths = (tokens != STOP).long().cumprod(1).sum(1)
    samples = []
    for row, count in enumerate(lengths.tolist()):
        predictions = min(count + 1, length)
        samples.append(
            Sample(
                text=bytes(tokens[row, :count].tolist()),
                log_probability=log_probabilities[row, :predictions].sum().item(),
                entropy=entropies[row, :predictions].mean().item(),
                truncated=count == length,
            )
        )
    return samples


def _decode(
    model: Model, z: Tensor, temperature: float, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their log-probabilities and the entropies, [num, length] each; what follows STOP is to be ignored."""
    state: Any = model.begin(z)
    previous = torch.full((len(z),), STOP, device=z.device)
    columns: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for _ in range(length):
        logits, state = model.advance(previous, state)
        log_probabilities = logits.float().log_softmax(-1)
        if temperature == 0:
            previous = logits.argmax(-1)
        else:
            weights = (logits.float() / temperature).softmax(-1)
            previous = torch.multinomial(weights, 1, generator=generator)[:, 0]
        columns[0].append(previous)
        columns[1].append(log_probabilities.gather(-1, previous[:, None])[:, 0])
        columns[2].append(-(log_probabilities.exp() * log_probabilities).sum(-1))
    tokens, chosen, entropies = (torch.stack(column, dim=1).cpu() for column in columns)
    return tokens, chosen, entropies


def readable(text: bytes) -> str:
    """Bytes as text for the eye: every invalid sequence becomes a space."""
    return text.decode("utf-8", errors="replace").replace("\ufffd", " ")
