"""Symbols of models: 256 byte values, three that are not text and, in some vocabularies, longer pieces of text."""

from __future__ import annotations

STOP = 256
"""Ends a document; also the model's input before the first byte (START)."""
PAD = 257
"""Fills a batch of documents up to the longest; never counted in a loss."""
DROP = 258
"""Replaces an input byte that input dropout removed."""
SIZE = 259
"""Number of single-byte and special symbols; the symbols of longer pieces start here."""
NUM_OUTPUTS = STOP + 1
"""Predictable symbols below ``SIZE``: the bytes and STOP. PAD and DROP are never predicted."""
UNPREDICTED = SIZE - NUM_OUTPUTS
"""Symbols between STOP and the longer pieces; an output beyond STOP stands for the symbol this many places further."""
