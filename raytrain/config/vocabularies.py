"""Names of vocabularies: the pieces of text that a model reads and writes one at a time."""

from __future__ import annotations

import re

BYTES = 256
"""Pieces of one byte, which every vocabulary has: so it can spell any text."""
LARGEST = 1 << 16
CHARACTERS = 1024
"""Pieces of ``char`` without a number: the bytes, and the most frequent characters of more than one byte."""
_NAME = re.compile(r"byte|char|(char|bpe):([1-9]\d{0,5})")


def parse_vocabulary(name: str) -> tuple[str, int]:
    """Return the kind and the number of pieces of a vocabulary: byte, char, char:N or bpe:N.

    Raises:
        ValueError: there is no such vocabulary.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError("must be byte, char, char:N or bpe:N")
    if match[1] is None:
        return name, BYTES if name == "byte" else CHARACTERS
    if not BYTES < int(match[2]) <= LARGEST:
        raise ValueError(f"a vocabulary has from {BYTES + 1} to {LARGEST:,} pieces, of which {BYTES} are bytes")
    return match[1], int(match[2])


def longer_pieces(name: str) -> int:
    """Return how many pieces of a vocabulary are not single bytes."""
    return parse_vocabulary(name)[1] - BYTES
