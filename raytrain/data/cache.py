"""Corpora in a storage: published there once, and read by every node into its own cache."""

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
"""Folder of a storage that holds corpora, each in a folder named by its digest."""
CACHE_LIMIT = 50 * 2**30
"""Bytes of fetched corpora that a node caches, unless ``RAYTRAIN_CACHE_BYTES`` says otherwise."""
_INFO = "corpus.json"
_PARTIAL = ".partial-"
"""Prefix of a folder that does not count: one that is being fetched or removed."""
_IN_USE: dict[str, int] = {}
"""Digest -> descriptor of the shared lock that this process holds for its lifetime."""


def publish(corpus: Corpus, storage: Storage) -> None:
    """Put ``corpus`` into ``storage``, unless it is there already.

    ``corpus.json`` is written last: without it, nothing counts.

    Raises:
        StorageError: the storage does not accept it.
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

    If the vocabulary does not exist anywhere yet, it is learnt. It is kept beside the corpus. It is also put into the
    storage if that is not a folder shared by the nodes, or if nothing can be written beside the corpus.

    Raises:
        UserError: the library that learns it is not installed.
        StorageError: the storage does not accept it.
    """
    shared = name, storage.uri()
    if name != "byte" and shared not in corpus.shared:
        _share_vocabulary(corpus, storage, name)
        corpus.shared.add(shared)


def _share_vocabulary(corpus: Corpus, storage: Storage, name: str) -> None:
    if storage.folder is not None and corpus.has_vocabulary(name):
        corpus.vocabulary(name)  # a damaged one is learnt again
        return
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    if (stored := _stored_vocabulary(location, name)) is not None:
        corpus.add_vocabulary(stored)
        return
    values = corpus.vocabulary(name).values()
    if storage.folder is None or not corpus.has_vocabulary(name):
        retry_storage(lambda: location.write(file_of(name), json.dumps(values).encode()))


def _stored_vocabulary(location: Storage, name: str) -> Vocabulary | None:
    """Return the vocabulary that ``share_vocabulary`` stored; ``None`` if there is none, or it is damaged."""
    with contextlib.suppress(NotFoundError, ValueError):
        vocabulary = Vocabulary.from_values(parse_json(retry_storage(lambda: location.read(file_of(name)))))
        if vocabulary.name == name:
            return vocabulary
    return None


def address(corpus: Corpus, storage: Storage, vocabulary: str = "byte") -> dict[str, str]:
    """Return the address by which ``open_anywhere`` finds the corpus and a vocabulary of it on any node."""
    return {"digest": corpus.digest, "path": str(corpus.path), "storage": storage.uri(), "vocabulary": vocabulary}


def open_anywhere(address: dict[str, str]) -> Corpus:
    """Return the corpus at its own path if this machine has it there, otherwise fetched from the storage.

    The vocabulary in the address is read from the storage unless it is beside the corpus.

    Raises:
        UserError: the corpus is in neither place.
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

    The least recently used corpora are evicted when the cache exceeds its limit, unless a process reads them.

    Raises:
        UserError: it is not in the storage, was altered there, or the cache cannot be written.
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
    # files being written have names that start with a dot, and may be gone before their size is read
    sizes = {folder: sum(file.stat().st_size for file in folder.glob("[!.]*")) for folder in folders}
    excess = sum(sizes.values()) - limit
    for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime):
        if excess <= 0:
            return
        with contextlib.suppress(BlockingIOError), locked(root / f"{folder.name}.used", wait=False):
            doomed = root / f"{_PARTIAL}{folder.name}-{secrets.token_hex(4)}"
            folder.rename(doomed)  # atomic: half a corpus must not be mistaken for a whole one
            shutil.rmtree(doomed)
            excess -= sizes[folder]
