"""Corpora in a storage: put there once, read by every node into a cache of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from raytrain.data.corpus import Corpus
from raytrain.data.files import default_cache
from raytrain.data.pieces import Vocabulary, file_of
from raytrain.storage import open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.utils.errors import UserError
from raytrain.utils.files import locked
from raytrain.utils.validation import parse_json

CORPORA = "corpora"
"""Where in a storage corpora are, each in a folder that its digest names."""
CACHE_LIMIT = 50 * 2**30
"""Bytes of fetched corpora that a node keeps, unless ``RAYTRAIN_CACHE_BYTES`` says otherwise."""
_INFO = "corpus.json"
_PARTIAL = ".partial-"
"""Start of the name of a folder that does not count: one that is being fetched or removed."""
_IN_USE: dict[str, int] = {}
"""Digest -> descriptor of the shared lock that this process holds while it lives."""


def publish(corpus: Corpus, storage: Storage) -> None:
    """Put ``corpus`` into ``storage``, unless it is there.

    ``corpus.json`` is written last: without it nothing counts.

    Raises:
        StorageError: the storage does not take it.
    """
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    if location.exists(_INFO):
        return
    for name in _files(corpus):
        location.upload(name, corpus.path / name)
    location.upload(_INFO, corpus.path / _INFO)


def is_published(storage: Storage, digest: str) -> bool:
    """Return whether ``publish`` has put a corpus with this digest there.

    Raises:
        StorageError: the storage does not answer.
    """
    return storage.exists(f"{CORPORA}/{digest}/{_INFO}")


def share_vocabulary(corpus: Corpus, storage: Storage, name: str) -> None:
    """Put a vocabulary of ``corpus`` where ``open_anywhere`` finds it, so that no worker has to learn it.

    Where it is nowhere yet, it is learnt. It is kept beside the corpus; in the storage too where that is no folder that
    nodes share, or where nothing can be written beside the corpus.

    Raises:
        UserError: the library that learns it is not installed.
        StorageError: the storage does not take it.
    """
    shared = name, storage.uri()
    if name != "byte" and shared not in corpus.shared:
        _share_vocabulary(corpus, storage, name)
        corpus.shared.add(shared)


def _share_vocabulary(corpus: Corpus, storage: Storage, name: str) -> None:
    if storage.folder is not None and corpus.has_vocabulary(name):
        corpus.vocabulary(name)  # one that is damaged is learnt again
        return
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    if (stored := _stored_vocabulary(location, name)) is not None:
        corpus.add_vocabulary(stored)
        return
    values = corpus.vocabulary(name).values()
    if storage.folder is None or not corpus.has_vocabulary(name):
        retry_storage(lambda: location.write(file_of(name), json.dumps(values).encode()))


def _stored_vocabulary(location: Storage, name: str) -> Vocabulary | None:
    """Return the vocabulary that ``share_vocabulary`` put there; ``None`` if it did not, or it is damaged."""
    with contextlib.suppress(NotFoundError, ValueError):
        vocabulary = Vocabulary.from_values(parse_json(retry_storage(lambda: location.read(file_of(name)))))
        if vocabulary.name == name:
            return vocabulary
    return None


def address(corpus: Corpus, storage: Storage, vocabulary: str = "byte") -> dict[str, str]:
    """Return what ``open_anywhere`` finds the corpus and one of its vocabularies by on any node."""
    return {"digest": corpus.digest, "path": str(corpus.path), "storage": storage.uri(), "vocabulary": vocabulary}


def open_anywhere(address: dict[str, str]) -> Corpus:
    """Return the corpus at its own path where this machine has it there, otherwise fetched from the storage.

    The vocabulary that the address names is read from the storage unless it is beside the corpus.

    Raises:
        UserError: the corpus is in neither.
    """
    path, vocabulary = Path(address["path"]), address["vocabulary"]
    corpus = Corpus.open(path) if (path / _INFO).is_file() else None
    if corpus is None or corpus.digest != address["digest"]:
        corpus = fetch(open_storage(address["storage"]), address["digest"])
    if vocabulary != "byte" and not corpus.has_vocabulary(vocabulary):
        location = open_storage(address["storage"]).child(f"{CORPORA}/{corpus.digest}")
        if (stored := _stored_vocabulary(location, vocabulary)) is not None:
            corpus.add_vocabulary(stored)
    return corpus


def fetch(storage: Storage, digest: str, cache: Path | None = None) -> Corpus:
    """Return the corpus with this digest, from this node's cache or, once for all of its processes, from ``storage``.

    The least recently used corpora leave the cache when it grows beyond its limit, unless a process reads them.

    Raises:
        UserError: it is not in the storage, what is there was altered, or the cache cannot be written.
    """
    root = (cache or default_cache()) / "fetched"
    folder, limit = root / digest, _limit()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _hold(root, digest)
        with locked(root / f"{digest}.writing"):
            if not (folder / _INFO).is_file():
                retry_storage(lambda: _download(storage.child(f"{CORPORA}/{digest}"), folder, digest))
        os.utime(folder)
        with locked(root / "evicting"):
            _evict(root, limit)
    except NotFoundError:
        raise UserError(
            f"corpus {digest[:12]} is neither on this machine nor in {storage.uri(CORPORA)}: "
            "prepare it again from the same text, or share the storage between the machines"
        ) from None
    except StorageError as error:
        raise UserError(f"corpus {digest[:12]} cannot be fetched: {error}") from None
    except OSError as error:
        raise UserError(f"cannot write to the cache {root}: {error}; set RAYTRAIN_CACHE") from None
    return Corpus.open(folder)


def _files(corpus: Corpus) -> list[str]:
    return [name for values in corpus.info["splits"].values() for name in values["files"]]


def _download(location: Storage, folder: Path, digest: str) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{_PARTIAL}{digest}-") as scratch:
        partial = Path(scratch) / digest
        location.download(_INFO, partial / _INFO)
        for key in location.list():
            if key != _INFO:
                location.download(key, partial / key)
        try:
            corpus = Corpus.open(partial)
            corpus.verify()
        except UserError as error:
            raise UserError(str(error).replace(str(partial), location.uri())) from None
        if corpus.digest != digest:
            raise UserError(f"{location.uri()} holds another corpus, {corpus.digest[:12]}: delete it there")
        os.replace(partial, folder)


def _hold(root: Path, digest: str) -> None:
    """Keep other processes from evicting the corpus while this one lives."""
    path = str(root / f"{digest}.used")
    if path not in _IN_USE:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        _IN_USE[path] = descriptor


def _limit() -> int:
    text = os.environ.get("RAYTRAIN_CACHE_BYTES") or str(CACHE_LIMIT)
    if not text.isdecimal():
        raise UserError(f"RAYTRAIN_CACHE_BYTES is {text!r}: must be a number of bytes")
    return int(text)


def _evict(root: Path, limit: int) -> None:
    for leftover in root.glob(f"{_PARTIAL}*"):
        digest = leftover.name.removeprefix(_PARTIAL).partition("-")[0]
        with contextlib.suppress(BlockingIOError), locked(root / f"{digest}.writing", wait=False):
            shutil.rmtree(leftover, ignore_errors=True)
    folders = sorted(path.parent for path in root.glob(f"*/{_INFO}"))
    # what is being written has a name that begins with a dot, and may be gone before it is asked for its size
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("[!.]*")) for folder in folders}
    excess = sum(sizes.values()) - limit
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
        if excess <= 0:
            return
        with contextlib.suppress(BlockingIOError), locked(root / f"{folder.name}.used", wait=False):
            doomed = root / f"{_PARTIAL}{folder.name}-{secrets.token_hex(4)}"
            folder.rename(doomed)  # at once: half of a corpus must not be taken for one
            shutil.rmtree(doomed)
            excess -= sizes[folder]
