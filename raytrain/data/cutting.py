"""Cutting of documents that are too long to be one: text without line ends, or all of a book in one field.

A corpus needs documents for each of its splits, and a window needs no document's beginning: so a text that is one long
line becomes many documents.
"""

from __future__ import annotations

from collections.abc import Iterator

LONGEST = 16 * 2**10
"""Bytes of the longest document that stays whole."""
PIECE = 2**10
"""Bytes of a piece of a longer one, at most."""
_SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


def pieces(text: bytes) -> Iterator[bytes]:
    """Yield ``text``, or the pieces that a longer one than ``LONGEST`` is cut into.

    White space at the ends of a piece is left out, since a separator takes its place.
    """
    if len(text) <= LONGEST:
        yield text
        return
    start = 0
    while start < len(text):
        end = start + cut_position(text[start : start + PIECE + 1], PIECE)
        yield text[start:end].strip()
        start = end


def cut_position(text: bytes, most: int) -> int:
    """Return how many bytes of ``text``, ``most`` of them at most, end before a word; without a space, a character."""
    if len(text) <= most:
        return len(text)
    space = text[: most + 1].translate(_SPACES).rfind(b" ", most // 2)
    if space >= 0:
        return min(space + 1, most)
    position = most
    while position > most - 4 and text[position] & 0xC0 == 0x80:  # within a character of UTF-8
        position -= 1
    return position
