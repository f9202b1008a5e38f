"""Cutting of documents that are too long: text without line ends, or a whole book in one field.

A corpus needs documents for each of its splits, but a window need not start at a document. So a text that is one long
line becomes many documents.
"""

from __future__ import annotations

from collections.abc import Iterator

LONGEST = 16 * 2**10
"""Bytes of the longest document that is left whole."""
PIECE = 2**10
"""Most bytes of a piece of a longer document."""
_SPACES = bytes.maketrans(b"\t\n\v\f\r", b"     ")


def pieces(text: bytes) -> Iterator[bytes]:
    """Yield ``text``, or the pieces into which it is cut if it is longer than ``LONGEST``.

    White space at the ends of a piece is dropped, since a separator takes its place.
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
    """Return where to cut ``text`` after at most ``most`` bytes: before a word or, without a space, a character."""
    if len(text) <= most:
        return len(text)
    space = text[: most + 1].translate(_SPACES).rfind(b" ", most // 2)
    if space >= 0:
        return min(space + 1, most)
    position = most
    while position > most - 4 and text[position] & 0xC0 == 0x80:  # inside a UTF-8 character
        position -= 1
    return position
