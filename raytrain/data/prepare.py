"""From source to corpus: read, cleaned, split and written once, then reused."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from raytrain.data import cleaning, documents, readers, sources, synthetic
from raytrain.data import files as inputs
from raytrain.data.corpus import FORMAT, SPLITS, Corpus, CorpusWriter, partial_prefix
from raytrain.data.documents import Fill, Source, rules_of
from raytrain.data.read_tasks import can_be_cut
from raytrain.data.reading import Report, Selection
from raytrain.data.unpacking import CODECS
from raytrain.utils.errors import UserError, check_text
from raytrain.utils.files import expanded, local_path, locked
from raytrain.utils.text import one_line

_LARGE = 4 * 2**30
"""Size of a source, in bytes, from which preparing on several cores is advised."""
_SHOWN = 8
"""Guesses, or reasons why nothing is left, that are printed at most."""
_log = logging.getLogger(__name__)


def prepare(
    source: str,
    *,
    path: str | None = None,
    field: str | None = None,
    selection: Selection | None = None,
    output: Path | None = None,
    cache: Path | None = None,
    fill: Fill | None = None,
) -> Corpus:
    """Return the corpus of a source, built on the first call and reused while the source stays the same.

    Args:
        source: a prepared corpus, which is opened; or a source for ``sources.documents``.
        path: location of the text of a named source.
        field: field or column that holds the text.
        selection: which texts of the source are taken; ``field`` overrides its own field.
        output: folder for the corpus instead of one in the cache.
        cache: folder of downloads and corpora; default ``$RAYTRAIN_CACHE`` or ``~/.cache/raytrain``.
        fill: function that adds a source's documents to its corpus; by default this process adds them one by one.

    Raises:
        UserError: see ``sources`` and ``corpus``; or a corpus was altered, or a folder cannot be written.
    """
    for given, what in ((source, "the source"), (path, "--data-path"), (output, "--output")):
        if given is not None:
            check_text(str(given), what)  # because corpus.json records it
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
    if source == "synthetic" and fill is not None:
        raise UserError("synthetic is made, not read: leave --distributed out")
    wanted = Source(source, path, selection, cache or inputs.default_cache())
    corpus = _prepared(wanted, output, fill)
    if lost := corpus.info.get("invalid_replaced", 0):
        _log.warning(
            "%s: %s runs of bytes are not UTF-8 and became spaces; if it is text in Latin-1, convert it first: "
            "iconv -f LATIN1 -t UTF-8",
            corpus.info["source"],
            f"{lost:,}",
        )
    return corpus


def _prepared(source: Source, output: Path | None, fill: Fill | None) -> Corpus:
    """Return the corpus of a source that is not a corpus itself, built unless it exists."""
    cache, key = source.cache, _key(source)
    folder = output or cache / "corpora" / f"{_name(source.name)}-{key}"
    if (found := _existing(folder, key)) is not None:
        return found
    try:
        with locked(cache / "locks" / hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]):
            if (found := _existing(folder, key)) is not None:
                return found
            for leftover in folder.parent.glob(f"{partial_prefix(folder)}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            if fill is None:
                _advise(source)
            _build(source, folder, key, fill or documents.fill)
    except OSError as error:
        raise UserError(f"cannot write the corpus of {source.name}: {error}; set RAYTRAIN_CACHE or --output") from None
    return Corpus.open(folder)


def _advise(source: Source) -> None:
    """Print that there is a faster way for a large source, unless it is a single file that one task must read."""
    if source.name in sources.NAMES and source.path is None:
        return
    files = [item for _, item in source.files()]
    if (size := sum(item.size for item in files)) >= _LARGE and (len(files) > 1 or can_be_cut(files[0])):
        _log.warning(
            "%s has %.1f GB, which one core reads: python -m raytrain.data prepare --distributed uses all of a machine "
            "or a cluster, for the same corpus",
            one_line(source.described),
            size / 1e9,
        )


def _existing(folder: Path, key: str) -> Corpus | None:
    """Return the corpus in ``folder`` if it was built from the same text in the same way."""
    if not (folder / "corpus.json").is_file():
        return None
    corpus = Corpus.open(folder)
    if corpus.info.get("key") != key:
        return None
    corpus.verify()
    return corpus


def _build(source: Source, folder: Path, key: str, fill: Fill) -> None:
    with CorpusWriter(
        folder, name=_name(source.name), source=source.described, cleaning=rules_of(source.name)[0]
    ) as writer:
        writer.annotate({"key": key})
        if source.name == "synthetic":
            _add_synthetic(writer)
            return
        taken = fill(source, writer)
        _say(source.described, taken.read, taken.report)
        writer.annotate({"pieces_of_longer": taken.cut, "invalid_replaced": taken.invalid})
        writer.annotate({"report": {"read": taken.read, **taken.report.values()}})
        if source.is_cleaned:
            writer.annotate({"duplicates_dropped": taken.duplicates})


def _say(source: str, read: int, report: Report) -> None:
    """Print what was decided without being told.

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


def _add_synthetic(writer: CorpusWriter) -> None:
    """Add the default corpus, with its limits: that of the grammar, and that of each split's actual documents."""
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


def _key(source: Source) -> str:
    """Return the key of a corpus in the cache, which changes if the text or its processing may have changed."""
    named = source.name if source.name in sources.NAMES else None
    values = [
        *(FORMAT, cleaning.VERSION, readers.VERSION, documents.TRAIN_SHARE, documents.VALID_SHARE),
        *(named, asdict(source.selection), sources.fingerprint(source.name, source.path)),
    ]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
