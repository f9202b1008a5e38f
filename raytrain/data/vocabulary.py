"""Bytes are the vocabulary: 256 byte values and three symbols that are not text."""

from __future__ import annotations

STOP = 256
"""Ends a document; also what a model is given before the first byte (START)."""
PAD = 257
"""Fills a batch of documents up to the longest; never counted in a loss."""
DROP = 258
"""Stands for an input byte that input dropout removed."""
SIZE = 259
