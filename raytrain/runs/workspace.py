"""Workspace of a command: storage, corpus and tracking store, opened and checked before anything runs."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config.schema import RunConfig, from_dict
from raytrain.data.cache import CORPORA, address, fetch, is_published, publish, share_vocabulary
from raytrain.data.corpus import Corpus
from raytrain.data.prepare import prepare
from raytrain.data.sources import check as check_source
from raytrain.storage import ARTIFACTS, open_storage_root
from raytrain.storage.base import Storage
from raytrain.storage.check import check_writable
from raytrain.tracking.client import check_tracking, older_store, tracking_uri
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from raytrain.runs.checkpoint import Checkpoint
    from raytrain.tracking.runs import Run

REPORTED = ("read", "formats", "dropped", "remarks")
"""Parts of a corpus's report that are logged to MLflow: counts, but no file names."""
CACHE = ".cache"
"""Subfolder of a folder storage for the corpora prepared for it."""


@dataclass(frozen=True)
class Workspace:
    """Storage, corpus and tracking store of one command."""

    storage: Storage
    corpus: Corpus
    tracking_uri: str

    def artifact_root(self) -> str:
        """Return the address of MLflow's artifacts when there is no tracking server."""
        return self.storage.uri(ARTIFACTS)

    def share_vocabulary(self, config: RunConfig[Any]) -> None:
        """Learn the vocabulary of a config, unless that has been done, and put it where workers find it.

        Raises:
            UserError: the library that learns it is not installed.
            StorageError: the storage does not accept it.
        """
        share_vocabulary(self.corpus, self.storage, config.vocabulary)

    def corpus_address(self, config: RunConfig[Any]) -> dict[str, str]:
        """Return the address at which workers of a config find the corpus and its vocabulary, on any node."""
        return address(self.corpus, self.storage, config.vocabulary, in_pools=config.pool_bytes > 0)

    def log_corpus(self, run: Run) -> None:
        """Log the corpus as the dataset of an MLflow run."""
        profile: dict[str, Any] = {
            name: {"documents": self.corpus.split(name).num_documents, "bytes": self.corpus.split(name).num_bytes}
            for name in self.corpus.splits
        }
        location = self.storage.uri(f"{CORPORA}/{self.corpus.digest}")
        source = location if "://" in location else self.corpus.path.as_uri()
        if (report := self.corpus.info.get("report")) is not None:
            profile["report"] = {name: value for name, value in report.items() if name in REPORTED}
        run.log_dataset(self.corpus.name, self.corpus.digest, source, profile)


def open_workspace(config: RunConfig[Any], storage: str | None, published: bool = True) -> Workspace:
    """Check the storage and the tracking store, and prepare the corpus.

    An S3 storage also keeps the corpus, for other nodes and for later, unless ``published`` is False. ``storage`` is a
    folder or s3:// address; ``None`` means ``RAYTRAIN_STORAGE``, or ``./runs`` if that is not set.

    Raises:
        UserError: the storage cannot be written, the corpus is unavailable, or the tracking store cannot be used.
    """
    check_source(config.data, config.data_path)  # before anything is created
    location, uri = _open_locations(storage)
    folder = location.folder
    corpus = prepare(
        config.data,
        path=config.data_path,
        field=config.data_field,
        output=None,
        cache=folder / CACHE if folder is not None else None,
    )
    corpus.vocabulary(config.vocabulary)  # report what cannot be learnt before anything begins
    if folder is None and published:
        publish(corpus, location)
    return Workspace(location, corpus, uri)


def reopen_workspace(storage: str | None, digest: str, path: str) -> Workspace:
    """Check the storage and the tracking store, and find the corpus with which a run or search was begun.

    Raises:
        UserError: the storage cannot be written, the corpus is not found, or the tracking store cannot be used.
    """
    location, uri = _open_locations(storage)
    corpus = _prepared(location, digest, Path(path))
    return Workspace(location, corpus if corpus is not None else fetch(location, digest), uri)


def corpus_of(stored: Checkpoint, location: Storage, data: str | None, path: str | None, field: str | None) -> Corpus:
    """Return the corpus ``data`` or, if that is not given, the corpus that a checkpoint was trained on.

    The latter is looked up in the storage ``location``, or else prepared again from the text that the config names.

    Raises:
        UserError: the corpus is unavailable.
    """
    cache = location.folder / CACHE if location.folder is not None and location.folder.is_dir() else None
    if data is not None:
        return prepare(data, path=path, field=field, cache=cache)
    digest = stored.state.get("corpus")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{1,64}", digest)):
        raise UserError(f"checkpoint {stored.uri}: its state names no corpus; name one by --data")
    if digest is not None and (corpus := _prepared(location, digest)) is not None:
        return corpus
    if digest is not None and is_published(location, digest):
        return fetch(location, digest)
    config = from_dict(stored.config)
    corpus = prepare(config.data, path=path or config.data_path, field=field or config.data_field, cache=cache)
    if digest not in (None, corpus.digest):
        raise UserError(
            f"{stored.uri} was trained on corpus {digest[:12]}, the text at {config.data} gives {corpus.digest[:12]}: "
            "name the corpus by --data, or where training kept it by --storage"
        )
    return corpus


def _prepared(location: Storage, digest: str, *paths: Path) -> Corpus | None:
    """Return the corpus already prepared at one of ``paths`` or for a folder storage; ``None`` if there is none."""
    known = [path / "corpus.json" for path in paths]
    if location.folder is not None:
        known += sorted((location.folder / CACHE / "corpora").glob("*/corpus.json"))
    for info in known:
        if os.path.isfile(info) and (corpus := Corpus.open(info.parent)).digest == digest:
            corpus.verify()
            return corpus
    return None


def _open_locations(storage: str | None) -> tuple[Storage, str]:
    location = open_storage_root(storage)
    check_writable(location)
    uri = tracking_uri()
    check_tracking(uri)
    if (older := older_store(uri)) is not None:
        print(
            f"note: {older} holds runs of an older MLflow, and a plain `mlflow ui` shows those: "
            f"see these by mlflow ui --backend-store-uri {uri}",
            flush=True,
        )
    return location, uri
