"""What a command needs before anything runs: a place, a corpus, a name, a tracking store; all checked first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config import RunConfig, differences, from_dict, identity, to_dict
from raytrain.data.corpus import Corpus
from raytrain.data.store import CORPORA, address, fetch, is_published, publish
from raytrain.errors import UserError, check_text
from raytrain.json_text import parse_json, typed_fields
from raytrain.resources import GangOptions, parse_workers
from raytrain.storage import NotFoundError, Storage, StorageError, check_writable, open_storage

if TYPE_CHECKING:
    from raytrain.checkpoint import Checkpoint
    from raytrain.tracking import Run

ARTIFACTS = "mlflow-artifacts"
"""Where under the storage MLflow keeps artifacts when there is no tracking server."""
CACHE = ".cache"
"""Where under a folder the corpora are that were prepared for it."""
EXPERIMENT = "raytrain"
"""MLflow experiment where no other is named."""
RUN = "run.json"
"""Says which run owns a name: its identity and config."""


@dataclass(frozen=True)
class Session:
    """Where things live during one command."""

    storage: Storage
    corpus: Corpus
    tracking_uri: str

    def artifact_root(self) -> str:
        """The address of MLflow's artifacts when there is no tracking server."""
        return self.storage.uri(ARTIFACTS)

    def corpus_address(self) -> dict[str, str]:
        """What workers on any node find the corpus by."""
        return address(self.corpus, self.storage)

    def log_corpus(self, run: Run) -> None:
        """Make the corpus the dataset of an MLflow run."""
        splits = {
            name: {"documents": self.corpus.split(name).num_documents, "bytes": self.corpus.split(name).num_bytes}
            for name in self.corpus.splits
        }
        place = self.storage.uri(f"{CORPORA}/{self.corpus.digest}")
        source = place if "://" in place else self.corpus.path.as_uri()
        run.log_dataset(self.corpus.name, self.corpus.digest, source, splits)


def open_session(config: RunConfig[Any], storage: str | None, published: bool = True) -> Session:
    """Check where things live and prepare the corpus; one in S3 keeps the corpus too, for other nodes and later,
    unless ``published`` is False.

    ``storage`` is a folder or s3:// address; ``RAYTRAIN_STORAGE`` if None, and ``./runs`` without that.

    Raises:
        UserError: storage that cannot be written, a corpus that cannot be had, an unusable tracking store.
    """
    from raytrain.data.prepare import prepare

    place, uri = _open_places(storage)
    folder = place.folder
    corpus = prepare(
        config.data,
        path=config.data_path,
        field=config.data_field,
        output=None,
        cache=folder / CACHE if folder is not None else None,
    )
    if folder is None and published:
        publish(corpus, place)
    return Session(place, corpus, uri)


def reopen_session(storage: str | None, digest: str, path: str) -> Session:
    """As ``open_session``, with the corpus that a run or search has begun with, wherever it is to be found.

    Raises:
        UserError: storage that cannot be written, a corpus that is nowhere, an unusable tracking store.
    """
    place, uri = _open_places(storage)
    corpus = _prepared(place, digest, Path(path))
    return Session(place, corpus if corpus is not None else fetch(place, digest), uri)


def corpus_of(stored: Checkpoint, place: Storage, data: str | None, path: str | None, field: str | None) -> Corpus:
    """The corpus ``data`` or, without it, the one that a checkpoint was trained on.

    That one is looked for in the storage ``place``, then prepared again from the text that the config names.

    Raises:
        UserError: it cannot be had.
    """
    from raytrain.data.prepare import prepare

    cache = place.folder / CACHE if place.folder is not None and place.folder.is_dir() else None
    if data is not None:
        return prepare(data, path=path, field=field, cache=cache)
    digest = stored.state.get("corpus")
    if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{1,64}", digest)):
        raise UserError(f"checkpoint {stored.uri}: its state names no corpus; name one by --data")
    if digest is not None and (corpus := _prepared(place, digest)) is not None:
        return corpus
    if digest is not None and is_published(place, digest):
        return fetch(place, digest)
    config = from_dict(stored.config)
    corpus = prepare(config.data, path=path or config.data_path, field=field or config.data_field, cache=cache)
    if digest not in (None, corpus.digest):
        raise UserError(
            f"{stored.uri} was trained on corpus {digest[:12]}, the text at {config.data} gives {corpus.digest[:12]}: "
            "name the corpus by --data, or where training kept it by --storage"
        )
    return corpus


def _prepared(place: Storage, digest: str, *paths: Path) -> Corpus | None:
    """The corpus that was prepared at one of ``paths`` or for a storage that is a folder, if it is there."""
    known = [path / "corpus.json" for path in paths]
    if place.folder is not None:
        known += sorted((place.folder / CACHE / "corpora").glob("*/corpus.json"))
    for info in known:
        if os.path.isfile(info) and (corpus := Corpus.open(info.parent)).digest == digest:
            corpus.verify()
            return corpus
    return None


def open_storage_root(storage: str | None) -> Storage:
    """The storage that ``--storage`` names, or ``RAYTRAIN_STORAGE``, or ``./runs``.

    Raises:
        UserError: an address that is neither a folder nor s3://.
    """
    root = storage or os.environ.get("RAYTRAIN_STORAGE") or "runs"
    return open_storage(root if "://" in root else Path(root).resolve())  # workers run in other directories


def _open_places(storage: str | None) -> tuple[Storage, str]:
    from raytrain.tracking import check_tracking, tracking_uri

    place = open_storage_root(storage)
    check_writable(place)
    uri = tracking_uri()
    check_tracking(uri)
    return place, uri


def check_samples(config: RunConfig[Any], corpus: Corpus, workers: int) -> None:
    """Make sure that training and evaluation have samples, and every worker a share of each batch.

    Raises:
        UserError: a model that cannot be, a split shorter than one sample, or more workers than groups.
    """
    from raytrain.data.batches import EvaluationBatches, TrainingBatches, rank_groups
    from raytrain.models import build_empty

    try:
        build_empty(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"the model of this config cannot be built: {str(error).splitlines()[0]}") from None
    TrainingBatches(corpus, config)
    EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
    rank_groups(config, 0, workers)


def at_first(workers: int, larger: Iterable[RunConfig[Any]]) -> int:
    """The workers to check a config for before it is known whether there are GPUs: with them, the batch is larger.

    ``larger`` are the configs for GPUs.
    """
    return 1 if any(workers <= config.batch_size // config.group_size for config in larger) else workers


def check_name(name: str) -> None:
    """Make sure that ``name`` can be a folder of the storage.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == ARTIFACTS:
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', at most 100, and not {ARTIFACTS!r}")


@dataclass(frozen=True)
class Claim:
    """Whose a name is: what a run is resumed by."""

    identity: str
    config: RunConfig[Any]
    corpus: str
    """Digest of its corpus."""
    corpus_path: str
    experiment: str
    """MLflow experiment that it was begun in, and goes on in."""
    gang: GangOptions = field(default_factory=GangOptions)
    """The workers that it was begun with; runs of before do not say it."""


def claim_name(
    storage: Storage, name: str, config: RunConfig[Any], corpus: Corpus, experiment: str, gang: GangOptions
) -> Claim:
    """The claim of the run that owns ``name``; a new name is taken for this config.

    Raises:
        UserError: the name belongs to a run with another config.
    """
    check_name(name)
    own = Claim(identity(config, corpus.digest), config, corpus.digest, str(corpus.path), experiment, gang)
    place = storage.child(name)
    if not place.exists(RUN):
        values = {each.name: getattr(own, each.name) for each in fields(own)}
        values |= {"config": to_dict(config), "gang": asdict(gang)}
        place.write(RUN, json.dumps(values, indent=2).encode())
        return own
    stored = _read_owner(place)
    if stored.identity != own.identity:
        changed = "; ".join(differences(to_dict(stored.config), to_dict(config))) or "another corpus"
        raise UserError(
            f"--name {name} belongs to a run with another config ({changed}); choose another name, "
            "or give the same config to resume that run"
        )
    return stored


def read_claim(storage: Storage, name: str) -> Claim:
    """The claim of the run that owns ``name``.

    Raises:
        UserError: there is no such run.
    """
    check_name(name)
    try:
        return _read_owner(storage.child(name))
    except NotFoundError:
        raise UserError(f"--resume {name}: there is no such run in {storage.uri()}") from None
    except StorageError as error:
        raise UserError(f"--resume {name}: {error}") from None


def _read_owner(place: Storage) -> Claim:
    """What ``claim_name`` has written.

    Raises:
        StorageError: it cannot be read.
        UserError: it is something else.
    """
    data = place.read(RUN)
    try:
        stored = parse_json(data)
        stored.setdefault("experiment", EXPERIMENT)  # runs of before do not say it
        gang = GangOptions(**typed_fields(GangOptions, stored.get("gang", {}), "gang."))
        config = from_dict(stored["config"])
        claim = Claim(**typed_fields(Claim, {**stored, "config": config, "gang": gang}))
        if not re.fullmatch("[0-9a-f]{1,64}", claim.corpus):
            raise ValueError("it names no corpus")
        os.fsencode(claim.corpus_path)
        check_text(claim.experiment, "experiment")
        parse_workers(claim.gang.workers)
        return claim
    except (UserError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{place.uri(RUN)} does not say whose the name is ({error}): choose another name") from None
