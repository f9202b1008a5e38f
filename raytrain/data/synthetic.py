"""The embedded default corpus: tweet-like English text from a grammar whose exact entropy is known.

Documents are independent. Each is drawn as: a topic; a body of the topic, whether to include its optional part, and a
tail (these make a template); then, left to right, one option for every slot: address (``@userid``), exclamation, the
template's words and numbers, end mark, emoji, hashtag of the topic, common hashtag, link. A question has no tail and no
end mark. Given the template, all choices are independent. The grammar is unambiguous (a document has exactly one
derivation; a test proves it), so entropy and likelihood are exact. Every document is valid UTF-8 of at most 127 bytes.

Probabilities: the option of rank r (from 1) among topics, bodies of a topic, words, emoji and hashtags has a
probability proportional to 1 / (r + 4); numbers are uniform; an optional part is included with probability 1/2; the
others are in ``synthetic_grammar``.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raytrain.data import synthetic_grammar as grammar
from raytrain.data.corpus import SPLITS, SplitName

SEED = 0
"""Seed of the default corpus."""
DOCUMENTS: dict[SplitName, int] = {"train": 60_000, "valid": 4_000, "test": 4_000}
"""Documents of each split of the default corpus."""
LONGEST = 127
"""Most bytes of a document."""


# Part of the meaning of a seed: random numbers are drawn for this many documents at a time.
_BLOCK = 4096


class Slot:
    """A choice between byte strings."""

    def __init__(self, options: tuple[tuple[str, float], ...]) -> None:
        self.options: tuple[bytes, ...] = tuple(text.encode() for text, _ in options)
        total = math.fsum(weight for _, weight in options)
        self.probabilities: tuple[float, ...] = tuple(weight / total for _, weight in options)
        self.cumulative = np.array([*itertools.accumulate(self.probabilities[:-1]), 1.0])
        self.nll = np.array([-math.log(probability) for probability in self.probabilities])
        self.objects = np.array(self.options, dtype=object)
        self.longest = max(map(len, self.options))

    @property
    def entropy(self) -> float:
        """Entropy in nats."""
        return math.fsum(p * -math.log(p) for p in self.probabilities)

    @property
    def mean_bytes(self) -> float:
        return math.fsum(p * len(option) for p, option in zip(self.probabilities, self.options, strict=True))


@dataclass(frozen=True)
class Template:
    """A sequence of slots, and its probability among all templates (with optional parts expanded)."""

    slots: tuple[Slot, ...]
    probability: float


def documents(seed: int, num: int) -> Iterator[tuple[bytes, float]]:
    """Yield ``num`` documents, each with its negative log-likelihood in nats.

    They are the same on every machine; fewer documents of a seed are the first of more.
    """
    all_templates = templates()
    chooser = np.array([*itertools.accumulate(item.probability for item in all_templates[:-1]), 1.0])
    width = 1 + max(len(item.slots) for item in all_templates)
    generator = np.random.Generator(np.random.PCG64(seed))
    for start in range(0, num, _BLOCK):
        uniform = generator.random(size=(_BLOCK, width))
        chosen = np.searchsorted(chooser, uniform[:, 0], side="right")
        texts, nlls = np.empty(_BLOCK, dtype=object), np.empty(_BLOCK)
        for number in np.unique(chosen):
            rows = np.flatnonzero(chosen == number)
            texts[rows], nlls[rows] = _fill(all_templates[number], uniform[rows, 1:])
        yield from itertools.islice(zip(texts.tolist(), nlls.tolist(), strict=True), num - start)


def default_corpus() -> Iterator[tuple[SplitName, bytes, float]]:
    """Yield (split, document, nats) of the default corpus; the splits differ by seed and may share documents."""
    for number, split in enumerate(SPLITS):
        for text, nats in documents(len(SPLITS) * SEED + number, DOCUMENTS[split]):
            yield split, text, nats


def entropy() -> float:
    """Return the nats per document, in closed form: by the chain rule, over the one derivation of each document."""
    return math.fsum(
        item.probability * (-math.log(item.probability) + math.fsum(slot.entropy for slot in item.slots))
        for item in templates()
    )


def mean_bytes() -> float:
    """Return the expected bytes of a document, in closed form."""
    return math.fsum(item.probability * math.fsum(slot.mean_bytes for slot in item.slots) for item in templates())


def bits_per_byte() -> float:
    """Return the limit for any model: entropy of a document / (ln 2 x its expected bytes)."""
    return entropy() / (math.log(2) * mean_bytes())


def nll(document: bytes) -> float:
    """Return the negative log-likelihood of any bytes in nats; infinite if the grammar cannot generate them."""
    probability = math.fsum(item.probability * _match(item.slots, document) for item in templates())
    return -math.log(probability) if probability > 0 else math.inf


def fingerprint() -> str:
    """Return a hash of everything that determines the default corpus."""
    tables = [(item.probability, [(slot.options, slot.probabilities) for slot in item.slots]) for item in templates()]
    return hashlib.sha256(repr((tables, SEED, DOCUMENTS)).encode()).hexdigest()


def _fill(template: Template, uniform: NDArray[np.float64]) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
    """Return documents of one template from uniform numbers (documents, at least as many as slots)."""
    columns = []
    nlls = np.full(len(uniform), -math.log(template.probability))
    for position, slot in enumerate(template.slots):
        picks = np.searchsorted(slot.cumulative, uniform[:, position], side="right")
        columns.append(slot.objects[picks])
        nlls += slot.nll[picks]
    texts = np.empty(len(uniform), dtype=object)
    texts[:] = [b"".join(parts) for parts in zip(*columns, strict=True)]
    return texts, nlls


def _match(slots: tuple[Slot, ...], document: bytes) -> float:
    """Return the probability that the slots spell the document: a forward pass over the positions reached."""
    reached = {0: 1.0}
    for slot in slots:
        following: dict[int, float] = {}
        for position, probability in reached.items():
            for option, weight in zip(slot.options, slot.probabilities, strict=True):
                if document.startswith(option, position):
                    end = position + len(option)
                    following[end] = following.get(end, 0.0) + probability * weight
        if not following:
            return 0.0
        reached = following
    return reached.get(len(document), 0.0)


# ----------------------------------------------------------------------------------------- the grammar


@functools.cache
def templates() -> tuple[Template, ...]:
    """Return every template, with optional parts expanded; the probabilities sum to 1."""
    words = {name: Slot(_ranked(text.split("|"))) for name, text in grammar.WORDS.items()}
    words |= {name: Slot(tuple((item, 1.0) for item in text.split("|"))) for name, text in grammar.NUMBERS.items()}
    opening = (Slot(grammar.ADDRESS), Slot(grammar.EXCLAMATION))
    mark, link = Slot(grammar.MARK), Slot(grammar.LINK)
    common_tag = _optional(grammar.COMMON_TAGS, " #", grammar.NO_COMMON_TAG)
    found = []
    topics = _ranked(list(grammar.TOPICS))
    for topic, topic_weight in topics:
        emoji, tags, *bodies = (line.strip() for line in grammar.TOPICS[topic].strip().splitlines())
        all_emoji = _optional(f"{emoji}|{grammar.COMMON_EMOJI}", " ", grammar.NO_EMOJI)
        closing = (all_emoji, _optional(tags, " #", grammar.NO_TAG), common_tag, link)
        for body, weight in _ranked(bodies):
            question = body.endswith("?")
            tails = (("", 1.0),) if question else grammar.TAIL
            end = closing if question else (mark, *closing)
            variants = _variants(body)
            for variant, (tail, tail_weight) in itertools.product(variants, tails):
                slots = (*opening, *_slots(variant + tail, words), *end)
                if sum(slot.longest for slot in slots) > LONGEST:
                    raise ValueError(f"synthetic grammar, {topic}: {variant + tail!r} can exceed {LONGEST} bytes")
                found.append(Template(slots, topic_weight * weight * tail_weight / len(variants)))
    return tuple(found)


def _ranked(texts: list[str]) -> tuple[tuple[str, float], ...]:
    """Return the texts with probabilities proportional to 1 / (rank + 4)."""
    weights = [1 / (rank + 4) for rank in range(1, len(texts) + 1)]
    total = math.fsum(weights)
    return tuple((text, weight / total) for text, weight in zip(texts, weights, strict=True))


def _optional(texts: str, prefix: str, absent: float) -> Slot:
    """Return a slot for one of the texts, each after ``prefix``, or for nothing with probability ``absent``."""
    present = ((prefix + text, (1 - absent) * weight) for text, weight in _ranked(texts.split("|")))
    return Slot((("", absent), *present))


def _variants(body: str) -> list[str]:
    """Return a body without and with its optional part, if it has one."""
    match = re.search(r" ?\[(.*)\]", body)
    if match is None:
        return [body]
    inserted = match.group().replace("[", "").replace("]", "")
    return [body[: match.start()] + body[match.end() :], body[: match.start()] + inserted + body[match.end() :]]


def _slots(body: str, words: dict[str, Slot]) -> list[Slot]:
    """Return the slots of a body: ``{name}`` becomes a choice, the text between names a slot with one option."""
    pieces = re.split(r"\{(\w+)\}", body)
    return [words[piece] if position % 2 else Slot(((piece, 1.0),)) for position, piece in enumerate(pieces) if piece]
