"""Corpora in a storage: published there once, and read by every node into its own cache."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from raytrain.data.corpus import INFO, Corpus
from raytrain.data.node_cache import NodeCache
from raytrain.data.pieces import Vocabulary, file_of
from raytrain.data.pools import StoredCorpus
from raytrain.data.shards import FILE as SHARDS
from raytrain.data.shards import table
from raytrain.storage import open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError, retry_storage
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json

CORPORA = "corpora"
"""Folder of a storage that holds corpora, each in a folder named by its digest."""
_IN_USE: dict[str, int] = {}
"""Folder -> descriptor by which this process holds it for its lifetime."""


def publish(corpus: Corpus, storage: Storage) -> None:
    """Put ``corpus`` into ``storage``, unless it is there already.

    ``corpus.json`` is written last: without it, nothing counts. A table of shards that is missing is added.

    Raises:
        StorageError: the storage does not accept it.
    """
    location = storage.child(f"{CORPORA}/{corpus.digest}")
    published = location.exists(INFO)
    if published and location.exists(SHARDS):
        return
    for name in () if published else _files(corpus):
        location.upload(name, corpus.path / name)
    location.write(SHARDS, table(corpus))
    if not published:
        location.upload(INFO, corpus.path / INFO)


def is_published(storage: Storage, digest: str) -> bool:
    """Return whether ``publish`` has put a corpus with this digest there.

    Raises:
        StorageError: the storage does not answer.
    """
    return storage.exists(f"{CORPORA}/{digest}/{INFO}")


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


def address(corpus: Corpus, storage: Storage, vocabulary: str = "byte", *, in_pools: bool = False) -> dict[str, str]:
    """Return the address by which ``open_anywhere`` finds the corpus and a vocabulary of it on any node.

    With ``in_pools``, a node without the corpus copies only the pools that it reads.
    """
    found = {"digest": corpus.digest, "path": str(corpus.path), "storage": storage.uri(), "vocabulary": vocabulary}
    return {**found, "copies": "pools"} if in_pools else found


def open_anywhere(address: dict[str, str]) -> Corpus:
    """Return the corpus at its own path if this machine has it there, otherwise from the storage, see ``address``.

    The vocabulary in the address is read from the storage unless it is beside the corpus.

    Raises:
        UserError: the corpus is in neither place.
    """
    path, vocabulary = Path(address["path"]), address["vocabulary"]
    corpus = Corpus.open(path) if (path / INFO).is_file() else None
    if corpus is None or corpus.digest != address["digest"]:
        corpus = _from_storage(open_storage(address["storage"]), address)
    if vocabulary != "byte" and not corpus.has_vocabulary(vocabulary):
        location = open_storage(address["storage"]).child(f"{CORPORA}/{corpus.digest}")
        if (stored := _stored_vocabulary(location, vocabulary)) is not None:
            corpus.add_vocabulary(stored)
    return corpus


def _from_storage(storage: Storage, address: dict[str, str]) -> Corpus:
    digest = address["digest"]
    if address.get("copies") != "pools":
        return fetch(storage, digest)
    if not is_published(storage, digest):
        raise _missing(storage, digest)
    return StoredCorpus.find(storage.child(f"{CORPORA}/{digest}"), digest)


def fetch(storage: Storage, digest: str, cache: Path | None = None) -> Corpus:
    """Return the corpus with this digest, from this node's cache or, once for all of its processes, from ``storage``.

    Raises:
        UserError: it is not in the storage, was altered there, or the cache cannot be written.
    """
    node = NodeCache(cache)
    try:
        if (name := str(node.root / digest)) not in _IN_USE:
            _IN_USE[name] = node.hold(digest)
        location = storage.child(f"{CORPORA}/{digest}")
        return Corpus.open(
            node.folder(digest, lambda folder: retry_storage(lambda: _download(location, folder, digest)))
        )
    except NotFoundError:
        raise _missing(storage, digest) from None
    except StorageError as error:
        raise UserError(f"corpus {digest[:12]} cannot be fetched: {error}") from None
    except OSError as error:
        raise UserError(f"cannot write to the cache {node.root}: {error}; set RAYTRAIN_CACHE") from None


def _missing(storage: Storage, digest: str) -> UserError:
    return UserError(
        f"corpus {digest[:12]} is neither on this machine nor in {storage.uri(CORPORA)}: "
        "prepare it again from the same text, or share the storage between the machines"
    )


def _files(corpus: Corpus) -> list[str]:
    return [name for values in corpus.info["splits"].values() for name in values["files"]]


def _download(location: Storage, folder: Path, digest: str) -> None:
    location.download(INFO, folder / INFO)
    for key in location.list():
        if key != INFO:
            location.download(key, folder / key)
    try:
        corpus = Corpus.open(folder)
        corpus.verify()
    except UserError as error:
        raise UserError(str(error).replace(str(folder), location.uri())) from None
    if corpus.digest != digest:
        raise UserError(f"{location.uri()} holds another corpus, {corpus.digest[:12]}: delete it there")
