"""What is saved of a run, in what form, and how it is read back.

A checkpoint is a folder ``step-00000250``: tensors as safetensors, the rest as JSON, and ``manifest.json``, written
last, with the size and the SHA-256 sum of each. Without a valid manifest there is no checkpoint. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import safetensors.torch

from raytrain.checkpoint_form import (
    MANIFEST,
    Checkpoint,
    Refused,
    Snapshot,
    commit,
    folder_of,
    manifest_of,
    read,
    read_manifest,
    steps_in,
    to_json,
    valid,
)
from raytrain.checkpoint_writer import CheckpointWriter
from raytrain.errors import UserError
from raytrain.storage import Storage, StorageError, open_storage

__all__ = ["Checkpoint", "CheckpointWriter", "Snapshot", "best", "export", "latest", "load", "newest_step"]


def load(source: Storage | str | Path) -> Checkpoint:
    """The checkpoint in one given folder.

    Raises:
        UserError: it cannot be read, is no checkpoint, is incomplete or altered, or has a newer form.
    """
    storage = source if isinstance(source, Storage) else open_storage(source)
    try:
        return read(storage)
    except Refused as error:
        raise UserError(f"checkpoint {storage.uri()}: {error}") from None
    except StorageError as error:
        raise UserError(f"checkpoint: {error}") from None


def latest(storage: Storage) -> Checkpoint | None:
    """The newest valid checkpoint below ``storage``; those that are refused are logged with the reason.

    Raises:
        StorageError: the store does not answer. That is not taken for "there is none".
    """
    return next(valid(storage, steps_in(storage)[::-1]), None)


def best(storage: Storage) -> Checkpoint | None:
    """The valid checkpoint with the lowest score, the first of equals; None where none is scored.

    Raises:
        StorageError: the store does not answer.
    """
    scores: dict[int, float] = {}
    for step in steps_in(storage):
        with contextlib.suppress(Refused):
            if (score := read_manifest(storage.child(folder_of(step)), step)["score"]) is not None:
                scores[step] = score
    return next(valid(storage, sorted(scores, key=lambda step: (scores[step], step))), None)


def newest_step(storage: Storage) -> int | None:
    """The step of the newest checkpoint that was completed; what is in it is not looked at.

    Raises:
        StorageError: the store does not answer.
    """
    keys = set(storage.list())
    return max((step for step in steps_in(storage) if f"{folder_of(step)}/{MANIFEST}" in keys), default=None)


def export(stored: Checkpoint, folder: Path) -> Path:
    """Write the weights of ``stored`` alone, without what only training needs, as a checkpoint; returns ``folder``.

    Raises:
        StorageError: ``folder`` cannot be written.
    """
    files = {
        "config.json": to_json(stored.config),
        "state.json": to_json(
            {key: stored.state[key] for key in ("best_step", "best", "corpus") if key in stored.state}
        ),
        "model.safetensors": safetensors.torch.save(stored.tensors("model")),
    }
    commit(open_storage(folder), stored.step, files, manifest_of(stored.step, stored.score, files))
    return folder
