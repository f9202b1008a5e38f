"""Vocabularies: convert texts to symbols and back, exactly, for any bytes.

Every vocabulary has all single bytes as pieces. Longer pieces are learnt from the training split: the most frequent
multi-byte characters, or pieces by byte-pair encoding (Sennrich et al. 2016). Learning them again gives the same
pieces. The library reads text, so each byte is presented to it as a character, and its joins are joins of bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from raytrain.config.vocabularies import longer_pieces, parse_vocabulary
from raytrain.data.vocabulary import SIZE, STOP
from raytrain.utils.errors import UserError
from raytrain.utils.files import complete_file
from raytrain.utils.validation import parse_json, validate_type

FORMAT = 1
LEARNT = 32_000_000
"""Bytes of training text from which pieces are learnt, in evenly spaced stretches."""
STRETCHES = 64
WORDS = r" ?[A-Za-z\x{80}-\x{ff}]+| ?[0-9]+| ?[^A-Za-z0-9\x{80}-\x{ff}\s]+|\s+"
"""Units that no piece crosses: a word, a number or punctuation, with the space before it; or white space."""
BLOCK = 1 << 16
"""Approximate bytes per block when cutting a text without documents."""
BLOCKS = 16
"""Blocks that are passed to the library at once, which cuts them in parallel."""
SPACES = np.array([9, 10, 11, 12, 13, 28, 29, 30, 31, 32, 0x85, 0xA0], dtype=np.uint8)
"""Bytes that the library may treat as white space."""
Symbols = NDArray[np.int64]


class TextSplit(Protocol):
    """The text that pieces are learnt from."""

    @property
    def stream(self) -> Any:
        """All documents as bytes, each followed by a line feed."""


class Vocabulary:
    """Pieces of text, each of them a symbol."""

    def __init__(self, name: str, pieces: Sequence[bytes], tokenizer: str = "") -> None:
        """Make a vocabulary with the longer ``pieces``; ``tokenizer`` is the library's way to cut text, as JSON.

        Raises:
            ValueError: there is no such vocabulary, or these pieces do not fit it.
        """
        self.name = name
        self.kind, _ = parse_vocabulary(name)
        self.pieces = tuple(pieces)
        if (
            len(set(pieces)) != len(pieces)
            or len(pieces) > longer_pieces(name)
            or any(len(piece) < 2 for piece in pieces)
        ):
            raise ValueError(f"these are not the pieces of a vocabulary {name}")
        self._tokenizer_json = tokenizer
        self._tokenizer: Any = None
        self._numbers = {piece: SIZE + number for number, piece in enumerate(pieces)}
        self._texts = [*(bytes([value]) for value in range(STOP)), *[b""] * (SIZE - STOP), *pieces]
        self.lengths = np.zeros(SIZE + longer_pieces(name), dtype=np.int64)
        """[symbols]: bytes of text that each symbol stands for."""
        self.lengths[: len(self._texts)] = [len(text) for text in self._texts]

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # it is immutable

    @property
    def is_bytes(self) -> bool:
        """Whether every symbol of text is a single byte."""
        return self.kind == "byte"

    def encode(self, texts: Sequence[bytes]) -> list[Symbols]:
        """Return the symbols of each text, without STOP."""
        if self.kind == "byte":
            return [np.frombuffer(text, dtype=np.uint8).astype(np.int64) for text in texts]
        if self.kind == "char":
            return [np.array(list(self._characters(text)), dtype=np.int64) for text in texts]
        encoded = self._loaded().encode_batch_fast([text.decode("latin-1") for text in texts], add_special_tokens=False)
        return [self._symbol_of[item.ids] for item in encoded]

    def encode_stream(self, stream: NDArray[np.uint8]) -> Iterator[Symbols]:
        """Yield the symbols of a text without documents, in blocks; together they equal those of the whole text.

        No piece spans two blocks, since each block starts with white space after something else. If there is no such
        place, a block ends anywhere.
        """
        edges = [0]
        while edges[-1] < len(stream):
            end = min(edges[-1] + BLOCK, len(stream))
            block = np.asarray(stream[edges[-1] : end])
            seams = np.flatnonzero(np.isin(block[1:], (10, 32)) & ~np.isin(block[:-1], SPACES))
            edges.append(edges[-1] + int(seams[-1]) + 1 if end < len(stream) and len(seams) else end)
            if len(edges) > BLOCKS or edges[-1] == len(stream):
                yield from self.encode([stream[first:last].tobytes() for first, last in pairwise(edges)])
                edges = edges[-1:]

    def decode(self, symbols: Sequence[int] | Symbols) -> bytes:
        """Return the text that symbols stand for; non-text and unused symbols stand for nothing."""
        known = len(self._texts)
        return b"".join(self._texts[symbol] for symbol in map(int, symbols) if symbol < known)

    def values(self) -> dict[str, Any]:
        """Return the vocabulary as JSON-ready values."""
        pieces = [piece.decode("latin-1") for piece in self.pieces]
        return {"format": FORMAT, "name": self.name, "pieces": pieces, "tokenizer": self._tokenizer_json}

    @property
    def digest(self) -> str:
        """SHA-256 sum of its JSON."""
        return hashlib.sha256(json.dumps(self.values(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_values(cls, values: Any) -> Vocabulary:
        """Return the vocabulary that the property ``values`` describes.

        Raises:
            ValueError: these are not the values of a vocabulary.
        """
        kinds = {"format": int, "name": str, "pieces": list[str], "tokenizer": str}
        values = validate_type(values, dict[str, Any], "vocabulary")
        checked = {name: validate_type(values.get(name), kind, f"vocabulary.{name}") for name, kind in kinds.items()}
        if checked["format"] != FORMAT:
            raise ValueError(f"it is a vocabulary of format {checked['format']}, not {FORMAT}")
        vocabulary = cls(
            checked["name"], [piece.encode("latin-1") for piece in checked["pieces"]], checked["tokenizer"]
        )
        if vocabulary.kind == "bpe":
            vocabulary._loaded()
        return vocabulary

    def _characters(self, text: bytes) -> Iterator[int]:
        """Yield the symbols of characters; anything that is not UTF-8, or not a piece, is spelt in bytes."""
        for character in text.decode("utf-8", "surrogateescape"):
            encoded = character.encode("utf-8", "surrogateescape")
            number = self._numbers.get(encoded)
            if number is None:
                yield from encoded
            else:
                yield number

    def _loaded(self) -> Any:
        """Return the library's tokenizer.

        Raises:
            ValueError: its JSON is damaged, or its pieces differ from those of the vocabulary.
        """
        if self._tokenizer is None:
            tokenizer = _tokenizers().Tokenizer
            try:
                self._tokenizer = tokenizer.from_str(self._tokenizer_json)
            except Exception as error:  # the library has no more specific class
                raise ValueError(f"the tokenizer of the vocabulary {self.name} is damaged: {error}") from None
            found = {number: text.encode("latin-1") for text, number in self._tokenizer.get_vocab().items()}
            symbols = [
                piece[0] if len(piece) == 1 else self._numbers.get(piece, -1) for _, piece in sorted(found.items())
            ]
            if -1 in symbols or len(symbols) != STOP + len(self.pieces):
                raise ValueError(f"the tokenizer of the vocabulary {self.name} has other pieces")
            self._symbol_of = np.array(symbols, dtype=np.int64)
        return self._tokenizer


def byte_vocabulary() -> Vocabulary:
    """Return the vocabulary of single bytes."""
    return Vocabulary("byte", ())


def vocabulary_of(train: Callable[[], TextSplit], name: str, folder: Path) -> Vocabulary:
    """Return the vocabulary ``name`` of a corpus, from its file in ``folder`` or, on the first call, learnt.

    ``train`` returns the split to learn from.

    Raises:
        UserError: the library that learns it is not installed.
    """
    if name == "byte":
        return byte_vocabulary()
    path = folder / file_of(name)
    with contextlib.suppress(OSError, ValueError):
        vocabulary = Vocabulary.from_values(parse_json(path.read_bytes()))
        if vocabulary.name == name:
            return vocabulary
    vocabulary = learn(train(), name)
    keep(vocabulary, folder)
    return vocabulary


def keep(vocabulary: Vocabulary, folder: Path) -> None:
    """Write a vocabulary beside the corpus in ``folder``, if that is writable."""
    if (folder / "corpus.json").is_file():
        with contextlib.suppress(OSError), complete_file(folder / file_of(vocabulary.name)) as partial:
            partial.write_text(json.dumps(vocabulary.values(), ensure_ascii=False) + "\n", "utf-8")


def file_of(name: str) -> str:
    """Return the name of the file that holds a vocabulary beside its corpus."""
    return f"vocabulary-{name.replace(':', '-')}.json"


def learn(train: TextSplit, name: str) -> Vocabulary:
    """Learn a vocabulary from the training split; the result is the same each time.

    Raises:
        UserError: the library that learns it is not installed.
    """
    kind, size = parse_vocabulary(name)
    documents = _documents(train)
    if kind == "char":
        counts = Counter(char for text in documents for char in text.decode("utf-8", "replace") if char > "\x7f")
        del counts["\ufffd"]
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        return Vocabulary(name, [char.encode() for char, _ in ranked[: longer_pieces(name)]])
    library = _tokenizers()
    alphabet = [chr(value) for value in range(STOP)]
    tokenizer = library.Tokenizer(library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    tokenizer.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(WORDS), "isolated")
    tokenizer.train_from_iterator((text.decode("latin-1") for text in documents), trainer=trainer)
    ordered = [text.encode("latin-1") for text, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    return Vocabulary(name, [piece for piece in ordered if len(piece) > 1], tokenizer.to_str())


def _documents(train: TextSplit) -> Iterator[bytes]:
    """Yield the lines of the training text or, if it is large, those of stretches of it."""
    size = len(train.stream)
    length, number = (size, 1) if size <= LEARNT else (LEARNT // STRETCHES, STRETCHES)
    for start in np.linspace(0, size - length, number).astype(np.int64):
        yield from train.stream[start : start + length].tobytes().split(b"\n")


def _tokenizers() -> Any:
    """Return the library that learns pieces."""
    try:
        import tokenizers
    except ImportError:
        raise UserError("the vocabularies bpe:N need the package tokenizers: pip install tokenizers") from None
    return tokenizers
