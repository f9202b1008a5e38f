"""Reference ladder: the bits per byte of n-grams of each order on a model's samples, kept beside the corpus."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from raytrain.config.schema import RunConfig
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.pieces import byte_vocabulary
from raytrain.data.pools import part_of
from raytrain.metrics import METRIC, METRICS
from raytrain.models.ngrams import COUNTED, MAX_ORDER, STRETCHES, measure_ngrams
from raytrain.utils.files import complete_file
from raytrain.utils.validation import parse_json, validate_object, validate_type

BASELINE_ORDER = 2
"""Order of the n-gram that trials must beat: the 3-gram, which knows the two bytes before the next."""
QUICK = 16_000_000
"""Bytes of training text up to which a whole ladder takes a few seconds."""
FILE = "ngrams.json"
"""File of a corpus's folder that keeps its ladders."""
METHOD = {"version": 1, "max_order": MAX_ORDER, "counted": COUNTED, "stretches": STRETCHES}
"""How ladders are measured; the version rises when ``measure_ngrams`` returns other figures for the same text."""


@dataclass(frozen=True)
class Ladder:
    """Bits per byte of the n-grams of each order on a set of samples: the negative log-likelihood, STOP counted."""

    bits: tuple[float, ...]
    """[orders]: bits per byte with contexts of 0, 1, ... symbols, each interpolated with all shorter ones."""
    counted: int
    """Bytes of the training text that the n-grams are fitted on."""
    available: int
    """Bytes of the training text."""
    entropy: float | None = None
    """Bits per byte of whole documents below which no model can get; ``None`` where the text has no known source."""
    vocabulary: str = "byte"
    """Name of the vocabulary whose bytes or pieces are the symbols of the n-grams."""
    pieces: Ladder | None = None
    """The ladder of the pieces that a model reads; ``None`` if it reads bytes. It is measured on the same samples or,
    if they are part of a stream, on about the same text."""

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Return the ladder that ``asdict`` turned into ``values``.

        Raises:
            ValueError: they are not a ladder.
        """
        ladder = validate_object(cls, values)
        if ladder.pieces is not None:
            ladder = replace(ladder, pieces=cls.from_json(ladder.pieces))
        if not BASELINE_ORDER < len(ladder.bits) <= MAX_ORDER + 1:
            raise ValueError(f"bits are of {len(ladder.bits)} orders")
        if not all(0 < bits < math.inf for bits in ladder.bits):
            raise ValueError("bits must be positive and finite")
        return ladder

    @property
    def best(self) -> int:
        """Order with the fewest bits."""
        return self.bits.index(min(self.bits))

    @property
    def baseline(self) -> float:
        """Bits per byte of the byte n-gram that trials must beat."""
        return self.bits[BASELINE_ORDER]

    @property
    def lowest(self) -> Ladder:
        """The ladder of bytes or of pieces, whichever has the n-gram with the fewest bits."""
        return min((self, self.pieces or self), key=lambda ladder: ladder.bits[ladder.best])

    @property
    def fit(self) -> str:
        """Return how much of a large training text was counted; empty where all of it was."""
        if self.counted == self.available:
            return ""
        return f"fitted on {self.counted / 1e6:.0f} of {self.available / 1e6:,.0f} MB"

    def __str__(self) -> str:
        """Return the line for the start of a search or a run."""
        grams = ", ".join(map(self._gram, dict.fromkeys((BASELINE_ORDER, self.best))))
        which = f"(best, order {self.best})" if len(self.bits) > MAX_ORDER else "(longer ones are counted at the end)"
        line = f"reference: byte {grams} bits per byte {which}"
        pieces = None if self.pieces is None else f"{self.pieces.best_gram} (best, order {self.pieces.best})"
        return "; ".join(filter(None, (line, pieces, self.fit, self._entropy())))

    @property
    def best_gram(self) -> str:
        """Name and bits per byte of the best n-gram."""
        return f"{self.vocabulary} {self._gram(self.best)}"

    def comparison(self, bits: float) -> str:
        """Return a line that compares a model's ``bits`` per byte on the samples with those of the best n-grams."""
        pieces = None if self.pieces is None else self.pieces.best_gram
        figures = filter(None, (f"model {_shown(bits)}, {self.best_gram}", pieces, self._entropy()))
        return "; n-grams ".join(filter(None, (f"{', '.join(figures)} bits per byte", self.fit)))

    def warning(self, bits: float, whose: str = "the") -> str | None:
        """Return a warning about a model above the best n-gram; ``None`` for one below it.

        ``whose`` comes before the word "model".
        """
        lowest = self.lowest
        if bits < lowest.bits[lowest.best]:
            return None
        more, gram = bits / lowest.bits[lowest.best] - 1, f"{lowest.vocabulary} {lowest.best + 1}-gram"
        return f"{whose} model has learnt less than counting: it needs {more:.1%} more than a {gram}"

    def _gram(self, order: int) -> str:
        return f"{order + 1}-gram {_shown(self.bits[order])}"

    def _entropy(self) -> str:
        return "" if self.entropy is None else f"entropy {_shown(self.entropy)}"


def _shown(bits: float) -> str:
    return METRICS[METRIC].format({METRIC: bits})


def validation_ladder(corpus: Corpus, config: RunConfig[Any], *, quick: bool = False) -> Ladder:
    """Return the ladder on the validation samples of a run's evaluations; for ``quick`` see ``reference_ladder``."""
    samples = EvaluationBatches(part_of(corpus, "valid", config), config, config.evaluate_samples)
    return reference_ladder(corpus, samples, quick)


def reference_ladder(corpus: Corpus, samples: EvaluationBatches, quick: bool = False) -> Ladder:
    """Return the ladder of ``corpus`` on ``samples``: from its file or, on the first call, measured.

    It is the ladder of bytes. For samples in longer pieces it also holds the ladder of the pieces.

    ``quick`` is for the start of a run, which must not wait. On a text larger than ``QUICK`` it measures only the
    orders up to the baseline's, and no pieces. The whole ladder is then measured once the trials have ended and their
    cores are idle.

    Raises:
        UserError: the corpus has changed since it was opened.
    """
    quick = quick and len(corpus.split("train").stream) > QUICK
    in_bytes, pieces = samples, None
    if not samples.samples.vocabulary.is_bytes:
        most = None if samples.is_whole else samples.num_samples  # a stream may have another number of chunks in bytes
        in_bytes = EvaluationBatches(samples.samples.split, samples.config, most, byte_vocabulary())
        pieces = None if quick else _ladder(corpus, samples, MAX_ORDER)
    ladder = _ladder(corpus, in_bytes, BASELINE_ORDER if quick else MAX_ORDER)
    return replace(ladder, entropy=corpus.info.get("entropy_bits_per_byte"), pieces=pieces)


def _ladder(corpus: Corpus, samples: EvaluationBatches, max_order: int) -> Ladder:
    """Return the ladder of the symbols in which ``samples`` are read, with at least the orders up to ``max_order``."""
    train, chosen, vocabulary = corpus.split("train"), samples.samples, samples.samples.vocabulary
    key = f"{chosen.split.name}/{samples.config.sampling}/{samples.config.length}/{samples.num_samples}"
    if samples.config.pool_bytes:
        key += f"/{samples.config.pool_bytes}"
    if not vocabulary.is_bytes:
        key += f"/{vocabulary.name}/{vocabulary.digest[:16]}"
    ladder = _read(corpus).get(key)
    if ladder is None or len(ladder.bits) <= max_order:
        bits, counted = measure_ngrams(train, samples, max_order)
        available = train.num_bytes if chosen.documents else len(train.stream)
        ladder = Ladder(bits, counted, available, vocabulary=vocabulary.name)
        _write(corpus, key, ladder)
    return ladder


def _read(corpus: Corpus) -> dict[str, Ladder]:
    """Return the ladders in the corpus's file; none if it is missing, damaged, or of another method or corpus."""
    try:
        values = validate_type(parse_json((corpus.path / FILE).read_bytes()), dict[str, Any], "it")
        if (values.get("method"), values.get("corpus")) != (METHOD, corpus.digest):
            return {}
        ladders = validate_type(values.get("ladders"), dict[str, Any], "ladders")
        return {key: Ladder.from_json(ladder) for key, ladder in ladders.items()}
    except (OSError, ValueError):
        return {}


def _write(corpus: Corpus, key: str, ladder: Ladder) -> None:
    """Add a ladder to the corpus's file, if that is writable.

    The file is replaced as a whole. If two processes write at the same moment, one loses its ladder and will measure it
    again.
    """
    if not (corpus.path / "corpus.json").is_file():
        return  # the folder was removed, and must not be recreated
    ladders = _read(corpus) | {key: ladder}
    values = {"method": METHOD, "corpus": corpus.digest, "ladders": {name: asdict(ladders[name]) for name in ladders}}
    with contextlib.suppress(OSError), complete_file(corpus.path / FILE) as partial:
        partial.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
