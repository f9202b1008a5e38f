"""Symbols of models: 256 byte values, three that are not text and, of some vocabularies, longer pieces of text."""

from __future__ import annotations

STOP = 256
"""Ends a document; also what a model is given before the first byte (START)."""
PAD = 257
"""Fills a batch of documents up to the longest; never counted in a loss."""
DROP = 258
"""Stands for an input byte that input dropout removed."""
SIZE = 259
"""Number of symbols of bytes; longer pieces have the symbols from here on."""
NUM_OUTPUTS = STOP + 1
"""Symbols of bytes that can be predicted: the bytes and STOP. PAD and DROP are never predicted."""
UNPREDICTED = SIZE - NUM_OUTPUTS
"""Symbols between STOP and the longer pieces; an output beyond STOP stands for the symbol so many places further."""
