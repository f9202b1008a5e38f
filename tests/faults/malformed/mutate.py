"""Damage: to bytes, and to the structure of JSON."""

from __future__ import annotations

import copy
import json
import os
import re
from functools import reduce
from pathlib import Path
from random import Random
from typing import Any

PIECES = (
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\xbd", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\r\n", b"\n",
    b"\n\n\n", b"\x1b[31m", "\u2028".encode(), "\u200d\U0001f600".encode(), b'"', b"\\ud83d", b"{", b"}", b"[" * 3000,
    b"9" * 5000, b"NaN", b"null", b"x" * 70_000, b"\x7f" * 9, b"\xff" * 8, b"\0" * 16, b"&#99999999;", b"../../",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 2**31, 2**63,
    2**64, -(2**63) - 1, 10**18, 10**400, "", "x", "0", "1e5", "nan", "inf", "../../../etc/passwd", "/etc/passwd", "..",
    "a\0b", "\ud800", "\udcff", "~nobody-of-that-name/x", "y" * 5000, "line\nbreak", "\x1b[31m[red]x[/red]", "[/", "-x",
    "s3://", "s3://b/k", "s3://bucket/key", "models:/x@y", "ftp://host/x", [], {}, [[]], [None], [1, "a"], [0], [-1],
    [10**12], reduce(lambda inner, _: [inner], range(150), []), {"": 0}, {"name": "hybrid"}, {"float": "nan"}, [1] * 70,
)  # fmt: skip
"""What stands in for any value in JSON."""


def damaged(data: bytes, random: Random, most: int = 3) -> bytes:
    """``data`` after one or a few pieces of damage."""
    changed = bytearray(data)
    for _ in range(random.randint(1, most)):
        _damage(changed, random)
    return bytes(changed)


def _damage(data: bytearray, random: Random) -> None:
    size = len(data)
    start = random.randint(0, size)
    stop = min(size, start + random.choice((1, 2, 8, 64, 1000)))
    match random.randrange(9):
        case 0 | 1 if size:
            data[random.randrange(size)] ^= 1 << random.randrange(8)
        case 2:
            del data[start:]
        case 3:
            data[start:start] = random.choice(PIECES)
        case 4:
            data[start:start] = random.randbytes(random.choice((1, 4, 100)))
        case 5:
            data[stop:stop] = data[start:stop] * random.choice((1, 1, 50))
        case 6:
            del data[start:stop]
        case 7:
            number = random.choice((0, -1, 1, 2**31, 2**40, 2**63 - 1, -(2**63)))
            data[start : start + 8] = number.to_bytes(8, "little", signed=True)
        case _:
            data[start:stop] = random.choice(PIECES)[: max(1, stop - start)]


def overwrite(path: Path, location: int = 20) -> None:
    """Change a byte in the file, as an editor or a broken disk would: its size stays."""
    with open(path, "r+b") as file:
        file.seek(location)
        file.write(b"#")
    os.utime(path, ns=(1, path.stat().st_mtime_ns + 1_000_000))  # whatever the resolution of the file system's clock


def restructured(value: Any, random: Random, most: int = 2) -> Any:
    """A copy of a JSON value with one or a few members replaced, removed, renamed, doubled or added."""
    root = [copy.deepcopy(value)]
    for _ in range(random.randint(1, most)):
        holder, key = random.choice(list(_places(root)))
        match random.randrange(8):
            case 0 if holder is not root:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[random.choice((key + "x", key.upper(), "", "format", "../" + key))] = holder.pop(key)
            case 2:
                other_holder, other = random.choice(list(_places(root)))
                holder[key] = copy.deepcopy(other_holder[other])
            case 3 if isinstance(holder, dict):
                holder[random.choice(("extra", "\ud800", "a\0b", "x" * 300))] = random.choice(VALUES)
            case 4 if type(holder[key]) in (int, float) and abs(holder[key]) < 1e300:
                holder[key] = random.choice((-holder[key], str(holder[key]), holder[key] + 0.5, [holder[key]]))
            case _:
                holder[key] = copy.deepcopy(random.choice(VALUES))
    return root[0]


def _places(root: Any) -> Any:
    """Every (container, key or index) below ``root``."""
    for key in list(root) if isinstance(root, dict) else range(len(root)):
        yield root, key
        if isinstance(root[key], (dict, list)):
            yield from _places(root[key])


def written(value: Any, random: Random) -> bytes:
    """JSON as bytes, now and then itself damaged."""
    text = json.dumps(value, indent=random.choice((None, 1)))
    match random.randrange(12):
        case 0:
            return damaged(text.encode(), random)
        case 1:
            start, end = random.choice((("[", "]"), ('{"a":', "}")))
            depth = random.choice((100_000, 980, 300))
            nested = start * depth + "1" + end * depth
            if random.random() < 0.5 or not (scalars := list(re.finditer(r'(?<=: )("[^"\\]*"|[-.\d]+)', text))):
                return nested[: random.choice((depth * len(start), len(nested)))].encode()
            chosen = random.choice(scalars)
            return (text[: chosen.start()] + nested + text[chosen.end() :]).encode()
        case 2:
            return text.encode(random.choice(("utf-16", "utf-8-sig", "utf-32")))
        case 3:
            return text.replace(": ", ": " + "9" * 5000, 1).encode()
    return text.encode()
