"""Cleaning of text before it is stored.

All text sources: each maximal run of bytes that is not valid UTF-8 becomes one space (``valid_utf8``). The characters
of Penn Treebank (``without_outer_spaces``): each line also loses the space at either end. Tweets and bios (``clean``)
also, in this order: HTML entities are decoded; runs of white space, line ends included, become one space, and none is
left at the ends; links become ``url``; mentions become ``@userid``. Cleaning cleaned text changes nothing. Exact
duplicates of tweets and bios are dropped (``Seen``).
"""

from __future__ import annotations

import hashlib
import html
import re

VERSION = 2
"""Part of the key of a prepared corpus: raise it when a rule changes."""
VALID_RULE = "each run of bytes that is not valid UTF-8 becomes one space"
CHARACTER_RULES = (VALID_RULE, "one space at the beginning and one at the end of a line left out")
CLEAN_RULES = (
    VALID_RULE,
    "HTML entities decoded",
    "runs of white space become one space, none at the ends",
    "links become url",
    "mentions become @userid",
    "exact duplicates dropped",
)
_INVALID = re.compile("[\udc80-\udcff]+")


# Bounded, and ended by a semicolon: "AT&T" is not an entity, and a long run of digits must not reach int().
_ENTITY = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
_ENTITY_PASSES = 8


# A bare "http", "https:" or "https:/…" is the rest of a link that was cut off or masked.
_LINK = re.compile(
    r"https?://\S+|(?<!\w)www\.\S+|(?<!\w)https?(?!\w)(?::/{0,2})?(?:…|\.\.\.)?",
    re.IGNORECASE,
)


# Not after a word character, which would make it an e-mail address.
_MENTION = re.compile(r"(?<!\w)@[A-Za-z0-9_]+")


def valid_utf8(text: bytes) -> bytes:
    """Return ``text`` with every maximal run of invalid bytes replaced by one space."""
    return replace_invalid(text)[0]


def replace_invalid(text: bytes) -> tuple[bytes, int]:
    """Return the result of ``valid_utf8``, and the number of replaced runs."""
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        # surrogateescape turns each invalid byte, and nothing else, into a code point of this range.
        replaced, runs = _INVALID.subn(" ", text.decode("utf-8", "surrogateescape"))
        return replaced.encode("utf-8"), runs
    return text, 0


def without_outer_spaces(text: bytes) -> bytes:
    """Return a line of Penn Treebank, " text ", as "text", which published figures per character count.

    With line ends, these are 5,017,482, 393,042 and 442,423 characters for training, validation and test.
    """
    return valid_utf8(text).removeprefix(b" ").removesuffix(b" ")


def clean(text: bytes) -> bytes:
    """Return a tweet or a bio, cleaned by the rules above; may be empty. Takes linear time."""
    line = " ".join(_decode_entities(valid_utf8(text).decode("utf-8")).split())
    return _MENTION.sub("@userid", _LINK.sub("url", line)).encode("utf-8")


def _decode_entities(text: str) -> str:
    """Decode until nothing is left to decode (tweets are escaped twice).

    Ampersands nested more deeply than in any real text become spaces, which bounds the time.
    """
    for _ in range(_ENTITY_PASSES):
        decoded = unescape(text)
        if decoded == text:
            return text
        text = decoded
    return text.replace("&", " ")


def unescape(text: str) -> str:
    """Return ``text`` with its HTML entities decoded once, since X's interfaces escape it once."""
    return _ENTITY.sub(lambda match: html.unescape(match.group()), text) if "&" in text else text


def digest(text: bytes) -> bytes:
    """Return the 16-byte digest by which texts count as equal."""
    return hashlib.blake2b(text, digest_size=16).digest()


class Seen:
    """Remembers texts by their digests: about 100 bytes of memory per distinct text."""

    def __init__(self) -> None:
        self._digests: set[bytes] = set()

    def add(self, text: bytes) -> bool:
        """Remember ``text``; return True if it is new."""
        return self.add_digest(digest(text))

    def add_digest(self, of_text: bytes) -> bool:
        """Remember the digest of a text; return True if it is new."""
        if of_text in self._digests:
            return False
        self._digests.add(of_text)
        return True
