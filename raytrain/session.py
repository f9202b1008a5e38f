"""What a command needs before anything runs: a place, a corpus, a name, a tracking store; all checked first."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytrain.config import RunConfig, identity, to_dict
from raytrain.data.batches import EvaluationBatches, TrainingBatches, rank_groups
from raytrain.data.corpus import Corpus
from raytrain.errors import UserError
from raytrain.storage import Storage, check_writable, open_storage

if TYPE_CHECKING:
    from raytrain.tracking import Run

ARTIFACTS = "mlflow-artifacts"
"""Where under the storage MLflow keeps artifacts when there is no tracking server."""
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

    def log_corpus(self, run: Run) -> None:
        """Make the corpus the dataset of an MLflow run."""
        splits = {
            name: {"documents": self.corpus.split(name).num_documents, "bytes": self.corpus.split(name).num_bytes}
            for name in self.corpus.splits
        }
        run.log_dataset(self.corpus.name, self.corpus.digest, self.corpus.path.as_uri(), splits)


def open_session(config: RunConfig[Any], storage: str | None) -> Session:
    """Check where things live and prepare the corpus.

    ``storage`` is a folder or s3:// address; ``RAYTRAIN_STORAGE`` if None, and ``./runs`` without that.

    Raises:
        UserError: storage that cannot be written, a corpus that cannot be had, an unusable tracking store.
    """
    from raytrain.data.prepare import prepare
    from raytrain.tracking import check_tracking, tracking_uri

    root = storage or os.environ.get("RAYTRAIN_STORAGE") or "runs"
    local = "://" not in root
    if local:
        root = str(Path(root).resolve())  # workers run in other directories
    place = open_storage(root)
    check_writable(place)
    corpus = prepare(
        config.data,
        path=config.data_path,
        field=config.data_field,
        output=None,
        cache=Path(root) / ".cache" if local else None,
    )
    uri = tracking_uri()
    check_tracking(uri)
    return Session(place, corpus, uri)


def check_samples(config: RunConfig[Any], corpus: Corpus, workers: int) -> None:
    """Make sure that training and evaluation have samples, and every worker a share of each batch.

    Raises:
        UserError: a split shorter than one sample, or more workers than groups.
    """
    TrainingBatches(corpus, config)
    EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
    rank_groups(config, 0, workers)


def check_name(name: str) -> None:
    """Make sure that ``name`` can be a folder of the storage.

    Raises:
        UserError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) or name == ARTIFACTS:
        raise UserError(f"--name {name!r}: use letters, digits, '.', '_' and '-', at most 100, and not {ARTIFACTS!r}")


def claim_name(storage: Storage, name: str, config: RunConfig[Any], corpus: Corpus) -> str:
    """The identity of the run that owns ``name``; a new name is taken for this config.

    Raises:
        UserError: the name belongs to a run with another config.
    """
    check_name(name)
    own = identity(config, corpus.digest)
    place = storage.child(name)
    if not place.exists(RUN):
        values = {"identity": own, "config": to_dict(config), "corpus": corpus.digest}
        place.write(RUN, json.dumps(values, indent=2).encode())
        return own
    stored = json.loads(place.read(RUN))
    if stored["identity"] != own:
        changed = _differences(stored["config"], to_dict(config)) or "another corpus"
        raise UserError(
            f"--name {name} belongs to a run with another config ({changed}); choose another name, "
            "or give the same config to resume that run"
        )
    return own


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            parts.append(_differences(old, new, f"{prefix}{key}."))
        elif old != new:
            parts.append(f"{prefix}{key} was {old}, is {new}")
    return "; ".join(part for part in parts if part)
