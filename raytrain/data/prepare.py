"""Source to corpus: read, cleaned, split and written once, then reused."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from raytrain.data import cleaning, readers, sources, synthetic
from raytrain.data import files as inputs
from raytrain.data.corpus import FORMAT, SPLITS, Corpus, CorpusWriter, SplitName, partial_prefix
from raytrain.data.cutting import pieces
from raytrain.data.reading import Report, Selection
from raytrain.data.unpacking import CODECS
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.files import expanded, local_path, locked
from raytrain.utils.text import one_line

TRAIN_SHARE = 0.9
VALID_SHARE = 0.05
_SHOWN = 8
"""Guesses, or reasons why nothing is left, that are printed."""
_log = logging.getLogger(__name__)


def prepare(
    source: str,
    *,
    path: str | None = None,
    field: str | None = None,
    selection: Selection | None = None,
    output: Path | None = None,
    cache: Path | None = None,
) -> Corpus:
    """Return the corpus of a source, built at the first call and reused while the source stays the same.

    Args:
        source: a prepared corpus, which is opened; or what ``sources.documents`` takes.
        path: where the text of a named source lies.
        field: field or column that holds the text.
        selection: which texts of the source are taken; its own field gives way to ``field``.
        output: folder for the corpus instead of one in the cache.
        cache: folder of downloads and corpora; default ``$RAYTRAIN_CACHE`` or ``~/.cache/raytrain``.

    Raises:
        UserError: see ``sources`` and ``corpus``; a corpus that was altered; or a folder that cannot be written.
    """
    for given, what in ((source, "the source"), (path, "--data-path"), (output, "--output")):
        if given is not None:
            check_text(str(given), what)  # corpus.json records them
    if source not in sources.NAMES and os.path.isfile(expanded(source) / "corpus.json"):
        if (path, field, selection or Selection(), output) != (None, None, Selection(), None):
            raise UserError(f"{source} is a prepared corpus: it takes no --data-path, field, selection or --output")
        corpus = Corpus.open(expanded(source))
        corpus.verify()
        return corpus
    output = None if output is None else local_path(output, "--output")
    selection = selection or Selection()
    if field is not None:
        selection = replace(selection, field=field)
    corpus = _prepared(source, path, selection, output, cache or inputs.default_cache())
    if lost := corpus.info.get("invalid_replaced", 0):
        _log.warning(
            "%s: %s runs of bytes are not UTF-8 and became spaces; if it is text in Latin-1, convert it first: "
            "iconv -f LATIN1 -t UTF-8",
            corpus.info["source"],
            f"{lost:,}",
        )
    return corpus


def _prepared(source: str, path: str | None, selection: Selection, output: Path | None, cache: Path) -> Corpus:
    """Return the corpus of a source that is no corpus yet, built unless it is there."""
    key = _key(source, path, selection)
    folder = output or cache / "corpora" / f"{_name(source)}-{key}"
    if (found := _existing(folder, key)) is not None:
        return found
    try:
        with locked(cache / "locks" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]):
            if (found := _existing(folder, key)) is not None:
                return found
            for leftover in folder.parent.glob(f"{partial_prefix(folder)}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            _build(source, path, selection, folder, cache, key)
    except OSError as error:
        raise UserError(f"cannot write the corpus of {source}: {error}; set RAYTRAIN_CACHE or --output") from None
    return Corpus.open(folder)


def _existing(folder: Path, key: str) -> Corpus | None:
    """Return the corpus in ``folder``, if it was built from the same text in the same way."""
    if not (folder / "corpus.json").is_file():
        return None
    corpus = Corpus.open(folder)
    if corpus.info.get("key") != key:
        return None
    corpus.verify()
    return corpus


def split_of(text: bytes) -> SplitName:
    """Return the split of a text, by its hash: 90% train, 5% valid, 5% test. The same text is never in two."""
    share = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2**64
    if share < TRAIN_SHARE:
        return "train"
    return "valid" if share < TRAIN_SHARE + VALID_SHARE else "test"


def _build(source: str, path: str | None, selection: Selection, folder: Path, cache: Path, key: str) -> None:
    cleaned = source in sources.CLEANED
    rules, clean = _cleaning(source)
    described = source if path is None else f"{source} from {path}"
    with CorpusWriter(folder, name=_name(source), source=described, cleaning=rules) as writer:
        writer.annotate({"key": key})
        if source == "synthetic":
            _add_synthetic(writer)
            return
        seen = cleaning.Seen()
        reading = sources.reading(source, selection)
        read = cut = invalid = duplicates = 0
        for split, document in sources.documents(source, path, reading, cache):
            read += 1
            for piece in pieces(document):
                cut += len(piece) < len(document)
                text, runs = cleaning.replace_invalid(piece)
                invalid += runs
                text = clean(text)
                if cleaned and text and not seen.add(text):
                    duplicates += 1
                    continue
                writer.add(split or split_of(text), text)
        _say(described, read, reading.report)
        writer.annotate({"pieces_of_longer": cut, "invalid_replaced": invalid})
        writer.annotate({"report": {"read": read, **reading.report.values()}})
        if cleaned:
            writer.annotate({"duplicates_dropped": duplicates})


def _say(source: str, read: int, report: Report) -> None:
    """Say what was decided without being told.

    Raises:
        UserError: nothing was kept, although there was something.
    """
    left_out = [*(f"{count:,} {reason}" for reason, count in report.dropped.most_common())]
    left_out += [f"{name}: {reason}" for name, reason in report.skipped.items()]
    if read == 0 and left_out:
        raise UserError(f"{source}: nothing in it was asked for ({'; '.join(left_out[:_SHOWN])})")
    for line in report.guesses[:_SHOWN]:
        _log.warning("%s", one_line(line))
    if (more := len(report.guesses) - _SHOWN) > 0:
        _log.warning("and %d more files, which corpus.json lists", more)


def _cleaning(source: str) -> tuple[tuple[str, ...], Callable[[bytes], bytes]]:
    """Return the rules by which the text of a source is cleaned, and the function that applies them."""
    if source == "synthetic":
        return (), bytes
    if source == "ptb_characters":
        return cleaning.CHARACTER_RULES, cleaning.without_outer_spaces
    if source in sources.CLEANED:
        return cleaning.CLEAN_RULES, cleaning.clean
    return (cleaning.VALID_RULE,), cleaning.valid_utf8


def _add_synthetic(writer: CorpusWriter) -> None:
    """Add the default corpus, with its limit: that of the grammar, and that of the very documents of each split."""
    nats = dict.fromkeys(SPLITS, 0.0)
    num_bytes = dict.fromkeys(SPLITS, 0)
    for split, text, nll in synthetic.default_corpus():
        writer.add(split, text)
        nats[split] += nll
        num_bytes[split] += len(text)
    writer.annotate({"seed": synthetic.SEED, "entropy_bits_per_byte": synthetic.bits_per_byte()})
    for split in SPLITS:
        writer.annotate({"nll_bits_per_byte": nats[split] / (math.log(2) * num_bytes[split])}, split)


def _name(source: str) -> str:
    """Return a short name for a corpus: the source's own, or that of its file or folder."""
    if source in sources.NAMES:
        return source
    name = source.rstrip("/").rpartition("/")[2] if inputs.is_s3(source) else Path(source).resolve().name
    for endings in (CODECS, (*readers.KINDS, "zip")):
        stem, _, ending = name.rpartition(".")
        name = stem if ending.lower() in endings else name
    return name or "text"


def _key(source: str, path: str | None, selection: Selection) -> str:
    """Return what a corpus in the cache is found by: it changes when the text or what is done to it may have."""
    named = source if source in sources.NAMES else None
    versions = [FORMAT, cleaning.VERSION, readers.VERSION]
    values = [*versions, TRAIN_SHARE, VALID_SHARE, named, asdict(selection), sources.fingerprint(source, path)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
