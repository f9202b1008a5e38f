"""Sampling, reconstruction, interpolation and scoring of texts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytrain.data.pieces import Symbols
from raytrain.data.vocabulary import PAD, STOP
from raytrain.models import Model
from raytrain.models.heads import negative_log_likelihood
from raytrain.models.noise import Noise
from raytrain.models.symbols import outputs_of, symbols_of
from raytrain.utils.errors import UserError
from raytrain.utils.text import readable

ROWS = 256
"""Texts that are computed at once, so that their features and gates stay small."""
CHECK_EVERY = 8
"""Bytes between two checks of which texts have ended: a check makes the host wait for the device."""


class RequestError(UserError, ValueError):
    """The model cannot do what was requested, or a value of the request is invalid."""


@dataclass(frozen=True)
class Sample:
    """Generated text with its model's log-probability and entropy."""

    text: bytes
    """The bytes, without STOP; they start with the prefix, if one was given."""
    log_probability: float
    """log p(text | z) in nats at temperature 1, prefix included, STOP included unless the sample was cut off."""
    entropy: float
    """Mean entropy of the model's predictions along the sample, in nats at temperature 1."""
    truncated: bool
    """True if the maximum length was reached before the model predicted STOP."""
    symbols: tuple[int, ...] = ()
    """The bytes or pieces that the model wrote, without STOP. Other pieces may spell the same text."""

    def __str__(self) -> str:
        """Return the text, readable: invalid UTF-8 sequences become spaces."""
        return readable(self.text)


def sample(
    model: Model,
    num: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_length: int | None = None,
    prefix: bytes = b"",
    seed: int = 0,
    z: Tensor | None = None,
) -> list[Sample]:
    """Draw ``num`` texts, for codes from the prior (``prior_codes``) or for ``z`` [num, latent].

    Sample i depends only on ``seed``, i and its code, however many others are drawn.

    Args:
        temperature: divides the logits; 0 takes the most likely byte each time.
        top_p: bytes are drawn from the smallest set of most likely ones with this probability, at ``temperature``.
        max_length: in symbols, STOP included; at most (and by default) the length that the model was trained for.
        prefix: bytes that each text starts with.

    Raises:
        RequestError: a value is out of range, the length exceeds the model's, or predictions are not finite.
    """
    (beginning,) = model.vocabulary.encode([prefix])
    length = _check(model, temperature, top_p, max_length, len(beginning))
    if z is None:
        z = prior_codes(model, num, seed)
    if z.shape != (num, model.latent):
        raise RequestError(f"z has the shape {tuple(z.shape)}: it must be [{num}, {model.latent}]")
    z = z.to(_device(model))
    samples: list[Sample] = []
    with _evaluation(model):
        for first in range(0, num, ROWS):
            rows = range(first, min(first + ROWS, num))
            noise = Noise(seed, 1, rows, 1, device=z.device).uniform(length)
            tokens, statistics = _generate(model, z[first : rows.stop], noise, beginning, temperature, top_p)
            if not statistics.isfinite().all():
                raise RequestError("the model's predictions are not finite: its weights are damaged")
            samples.extend(_samples(model, tokens.cpu(), statistics.cpu()))
    return samples


def prior_codes(model: Model, num: int, seed: int = 0) -> Tensor:
    """Return the codes [num, latent] that ``sample`` draws from the prior with ``seed``."""
    return Noise(seed, 0, range(num), 1, device=_device(model)).normal(model.latent)


def posterior_means(model: Model, texts: Sequence[bytes]) -> Tensor:
    """Return the mean of q(z | x) of each text, [len(texts), latent].

    Raises:
        RequestError: the model has no latent code, or a text does not fit.
    """
    if model.latent == 0:
        raise RequestError("the model has no latent code: it can neither reconstruct nor interpolate, only sample")
    encoder: Any = model
    with _evaluation(model):
        means = [encoder.encode(tokens.to(_device(model)))[0] for tokens in tokenise(model, texts).split(ROWS)]
    return torch.cat(means)


def reconstruct(
    model: Model,
    texts: Sequence[bytes],
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Decode the posterior mean of each text, greedily by default.

    Raises:
        RequestError: as ``posterior_means`` and ``sample``.
    """
    z = posterior_means(model, texts)
    return sample(model, len(texts), temperature=temperature, top_p=top_p, max_length=max_length, seed=seed, z=z)


def interpolate(
    model: Model,
    a: bytes,
    b: bytes,
    steps: int = 7,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    max_length: int | None = None,
    seed: int = 0,
) -> list[Sample]:
    """Decode ``steps`` codes, evenly spaced from the posterior mean of ``a`` to that of ``b``, both included.

    Raises:
        RequestError: fewer than two steps, or as ``posterior_means`` and ``sample``.
    """
    if steps < 2:
        raise RequestError(f"steps is {steps}: an interpolation has at least 2, its ends")
    start, end = posterior_means(model, [a, b])
    weight = torch.linspace(0, 1, steps, device=start.device)[:, None]
    z = (1 - weight) * start + weight * end
    return sample(model, steps, temperature=temperature, top_p=top_p, max_length=max_length, seed=seed, z=z)


def score(
    model: Model,
    texts: Sequence[bytes],
    z: Tensor,
    truncated: Sequence[bool] | None = None,
    symbols: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return log p(text | z) in nats, [len(texts)], for codes z [len(texts), latent].

    STOP is included unless ``truncated`` is true for the text, as in ``Sample.truncated``; for the default see
    ``tokenise``. With pieces, this is the probability of one spelling of the text, a lower bound. The spelling is the
    vocabulary's or, if given, the one in ``symbols``, as in ``Sample.symbols``.

    Raises:
        RequestError: a text does not fit.
    """
    tokens, z = tokenise(model, texts, truncated, symbols).to(_device(model)), z.to(_device(model))
    with _evaluation(model):
        parts = zip(tokens.split(ROWS), z.split(ROWS), strict=True)
        return torch.cat([-negative_log_likelihood(model.predict(part, codes), part).sum(1) for part, codes in parts])


def tokenise(
    model: Model,
    texts: Sequence[bytes],
    truncated: Sequence[bool] | None = None,
    spelling: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Return tokens [len(texts), longest] of texts as the model has learnt them, PAD after each.

    The vocabulary cuts the texts into pieces unless ``spelling`` gives them.

    STOP ends a text unless it is ``truncated``. By default a text is truncated if it fills the model's length, and so
    is every text for a model of windows, which has never seen STOP.

    Raises:
        RequestError: there is no text, or one that is empty or longer than the model's length.
    """
    encoded = model.vocabulary.encode(texts) if spelling is None else [np.array(row) for row in spelling]
    if truncated is None:
        truncated = [not model.documents or len(row) == model.length for row in encoded]
    symbols = [[*row.tolist(), *([] if cut else [STOP])] for row, cut in zip(encoded, truncated, strict=True)]
    if not symbols:
        raise RequestError("there is no text")
    for text, row, inside in zip(texts, symbols, encoded, strict=True):
        if len(row) > model.length:
            raise RequestError(
                f"the text {readable(text[:20])!r}... has {len(inside)} {_noun(model)}: "
                f"the model takes {model.length} symbols"
            )
        if not row:
            raise RequestError("an empty text has no symbols for a model of windows: give at least one byte")
    tokens = torch.full((len(symbols), max(map(len, symbols))), PAD)
    for number, row in enumerate(symbols):
        tokens[number, : len(row)] = torch.tensor(row)
    return tokens


# ------------------------------------------------------------------------------------------ internals


def _check(model: Model, temperature: float, top_p: float, max_length: int | None, prefix: int) -> int:
    """Check the arguments of ``sample`` and return the length to generate.

    Raises:
        RequestError: see ``sample``.
    """
    if not 0 <= temperature < float("inf"):
        raise RequestError(f"temperature is {temperature}: must not be negative")
    if not 0 < top_p <= 1:
        raise RequestError(f"top_p is {top_p}: must be above 0 and at most 1")
    length = model.length if max_length is None else max_length
    if not 0 < length <= model.length:
        raise RequestError(f"max_length is {length}: must be between 1 and the model's length of {model.length}")
    if prefix > length:
        raise RequestError(f"the prefix has {prefix} {_noun(model)}: more than the {length} symbols of a sample")
    return length


@contextmanager
def _evaluation(model: Model) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def _device(model: Model) -> torch.device:
    return next(model.parameters()).device


def _generate(
    model: Model, z: Tensor, noise: Tensor, prefix: Symbols, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Return tokens [num, length], and their log-probabilities and the entropies [2, num, length].

    ``noise`` [num, length] is uniform in [0, 1). Ignore everything after a text's STOP, and after the piece with which
    it reaches the model's length in bytes: a text that has ended leaves the batch only at the next check.
    """
    lengths = None if model.vocabulary.is_bytes else torch.from_numpy(model.vocabulary.lengths).to(z.device)
    written = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    tokens = torch.full(noise.shape, STOP, device=z.device)
    statistics = torch.zeros(2, *noise.shape, device=z.device)
    rows = torch.arange(len(z), device=z.device)
    previous = tokens[:, 0]
    ended = torch.zeros_like(rows, dtype=torch.bool)
    state: Any = model.begin(z)
    for position in range(noise.shape[1]):
        if position > 0 and position % CHECK_EVERY == 0:
            going = (~ended).nonzero()[:, 0]
            if len(going) == 0:
                break
            if len(going) < len(rows):
                rows, previous, ended, state = rows[going], previous[going], ended[going], state.keep(going)
                written = written[going]
        logits, state = model.advance(previous, state)
        if position < len(prefix):
            previous = torch.full_like(previous, int(prefix[position]))
        elif lengths is None:
            previous = _choose(logits, noise[rows, position], temperature, top_p)
        else:
            previous = symbols_of(_choose(logits, noise[rows, position], temperature, top_p))
        log_probabilities = logits.float().log_softmax(-1)
        tokens[rows, position] = previous
        output = previous if lengths is None else outputs_of(previous)
        statistics[0, rows, position] = log_probabilities.gather(-1, output[:, None])[:, 0]
        statistics[1, rows, position] = -(log_probabilities.exp() * log_probabilities).sum(-1)
        ended |= previous == STOP
        if lengths is not None:
            written += lengths[previous]
            ended |= written >= model.length
    return tokens, statistics


def _choose(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
    """Choose the next symbol [batch] from ``logits`` [batch, symbols] and ``uniform`` [batch] in [0, 1)."""
    if temperature == 0:
        return logits.argmax(-1)
    # float64: a symbol of probability 0 is never chosen, and float32 noise cannot reach past the last one
    weights = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        weights = _nucleus(weights, top_p)
    cumulative = weights.cumsum(-1)
    threshold = uniform.double()[:, None] * cumulative[:, -1:]
    # if the weights are NaN the search ends past the last symbol
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=weights.shape[-1] - 1)


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Set all ``probabilities`` [batch, symbols] to 0 except the fewest most likely ones that sum to ``top_p``."""
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    likelier = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, order, likelier < top_p)
    return probabilities * kept


def _samples(model: Model, tokens: Tensor, statistics: Tensor) -> Iterator[Sample]:
    """Yield the samples from what ``_generate`` returned."""
    length, vocabulary = tokens.shape[1], model.vocabulary
    going = tokens != STOP
    if not vocabulary.is_bytes:  # a text ends with the piece by which it reaches the model's length in bytes
        lengths = torch.from_numpy(vocabulary.lengths)[tokens]
        going &= lengths.cumsum(1) - lengths < model.length
    counts = going.long().cumprod(1).sum(1)
    for row, count in enumerate(counts.tolist()):
        symbols = tokens[row, :count].tolist()
        text = vocabulary.decode(symbols)
        truncated = count == length or (not vocabulary.is_bytes and len(text) >= model.length)
        log_probabilities, entropies = statistics[:, row, : count + (not truncated)]
        yield Sample(
            text=text,
            log_probability=log_probabilities.sum().item(),
            entropy=entropies.mean().item(),
            truncated=truncated,
            symbols=tuple(symbols),
        )


def _noun(model: Model) -> str:
    return "bytes" if model.vocabulary.is_bytes else "pieces"


def sample_text(
    model: Model, num: int, *, temperature: float = 1.0, max_length: int | None = None, seed: int = 0
) -> list[str]:
    """Draw ``num`` texts from the model as readable strings: invalid byte sequences become spaces."""
    drawn = sample(model, num, temperature=temperature, max_length=max_length, seed=seed)
    return [readable(item.text) for item in drawn]
