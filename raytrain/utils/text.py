"""Tables in Markdown whose cells may hold any text."""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; ``head`` and ``rows`` hold Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(text: bytes | str) -> str:
    """Return ``text`` unchanged as inline code: nothing in it is taken for markup, and it stays on one line.

    Invalid byte sequences and unprintable characters become spaces.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace").replace("\ufffd", " ")
    shown = "".join(character if character.isprintable() else " " for character in text)
    if not shown.strip():
        return ""
    # a bar ends a table's cell even inside code, so it is escaped; the fence is longer than any in the text
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")


def mean_and_range(values: Sequence[float], digits: int) -> str:
    """Return the mean and, for several values, the lowest and highest; empty if there are none or not all finite."""
    if not values or not all(map(math.isfinite, values)):
        return ""
    mean, *limits = (f"{value:.{digits}f}" for value in (statistics.fmean(values), min(values), max(values)))
    return f"{mean} ({' to '.join(limits)})" if len(values) > 1 else mean


def duration(seconds: float) -> str:
    """Return a duration as text, such as 1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def one_line(text: str) -> str:
    """Return a text as one line of valid UTF-8, with control characters, line ends and lone surrogates escaped."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
        else character
        for character in text
    )


def readable(text: bytes) -> str:
    """Return bytes as readable text: every invalid sequence becomes a space."""
    return text.decode("utf-8", errors="replace").replace("\ufffd", " ")
