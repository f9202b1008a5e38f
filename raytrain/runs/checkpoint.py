"""Checkpoint format: every checksum is verified on reading, and a checkpoint counts only once it is completely written.

A checkpoint is a folder ``step-00000250``: tensors as safetensors, everything else as JSON, and ``manifest.json``. The
manifest is written last, with the size and the SHA-256 checksum of each file. Without a valid manifest there is no
checkpoint. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError

from raytrain.storage import open_storage
from raytrain.storage.base import NotFoundError, Storage, StorageError
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json, validate_type

FORMAT = 1
"""Version of the format; a reader refuses a newer one."""
MANIFEST = "manifest.json"
STEM = re.compile(r"[a-z0-9_]{1,64}")
"""Allowed names of a tensor file, without ``.safetensors``."""
_JSON_FILES = ("config.json", "state.json")
_FOLDER = re.compile(r"step-(\d{8,18})")
PAUSES_S = (0.1, 0.5)
"""Seconds before an altered file is read again: a connection can corrupt data that is intact in the storage."""
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """The state of a run after ``step`` steps."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """File stem (``model``, ``optimizer``) -> name -> tensor, on the CPU and never changed afterwards."""
    state: dict[str, Any]
    """Everything else needed to resume, as JSON. Copied when the snapshot is saved."""
    config: dict[str, Any]
    """The run's config, as JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """A snapshot read back from storage, with every checksum verified."""

    step: int
    score: float | None
    """Score by which checkpoints are ranked, lower is better; ``None`` if it was not scored."""
    state: dict[str, Any]
    config: dict[str, Any]
    uri: str
    _tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)

    @property
    def evaluation(self) -> dict[str, float]:
        """The validation metrics of this checkpoint itself; empty if it was not evaluated.

        Raises:
            UserError: its state holds something else.
        """
        try:
            evaluations = validate_type(self.state.get("evaluations", []), list[dict[str, float]], "evaluations")
        except ValueError as error:
            raise UserError(f"checkpoint {self.uri}: {error}") from None
        own: dict[str, float] = next((each for each in reversed(evaluations) if each.get("step") == self.step), {})
        return {name: value for name, value in own.items() if name != "step"}

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """Return the tensors of one file, by name.

        Raises:
            UserError: the checkpoint has no such file.
        """
        if stem not in self._tensors:
            raise UserError(f"checkpoint {self.uri}: it has no {stem}.safetensors; it has {', '.join(self._tensors)}")
        return self._tensors[stem]

    def matching(self, stem: str, expected: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors of one file, by name; they must match the names, shapes and types of ``expected``.

        Raises:
            UserError: the checkpoint has no such file, it holds something else, or a tensor is not finite.
        """
        tensors = self.tensors(stem)
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in expected or name not in tensors:
                raise UserError(
                    f"checkpoint {self.uri}: the model of its config and its {stem}.safetensors differ in {name!r}"
                )
            found, wanted = tensors[name], expected[name]
            if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                raise UserError(
                    f"checkpoint {self.uri}: {name} is {list(found.shape)} of {found.dtype}, the model of its config "
                    f"has {list(wanted.shape)} of {wanted.dtype}"
                )
            if not found.isfinite().all():
                raise UserError(f"checkpoint {self.uri}: {name} is not finite")
        return tensors


class Refused(Exception):
    """A folder is not a checkpoint; the message says why."""


class Altered(Refused):
    """A file differs from what was written; the connection may have corrupted it."""


# --------------------------------------------------------------------------------------------- read


def valid(storage: Storage, steps: list[int]) -> Iterator[Checkpoint]:
    """Yield the complete checkpoints among ``steps``; log why any other is refused."""
    for step in steps:
        location = storage.child(folder_of(step))
        try:
            yield read(location, step)
        except Refused as error:
            _log.warning("checkpoint %s is not used: %s", location.uri(), error)


def folder_of(step: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"step-{step:08d}"


def steps_in(storage: Storage) -> list[int]:
    """Return the steps of all folders that look like checkpoints, complete or not, in ascending order."""
    folders = {key.partition("/")[0] for key in storage.list() if "/" in key}
    steps = {int(match[1]) for folder in folders if (match := _FOLDER.fullmatch(folder))}
    return sorted(step for step in steps if folder_of(step) in folders)


def read(location: Storage, step: int | None = None) -> Checkpoint:
    """Return the checkpoint in ``location``; it must be of ``step`` if that is given.

    Raises:
        Refused: it is not complete.
        StorageError: the storage does not answer.
    """
    manifest = read_manifest(location, step)
    data = {name: _read_file(location, name, entry) for name, entry in manifest["files"].items()}
    stems = [name.removesuffix(".safetensors") for name in data if name not in _JSON_FILES]
    return Checkpoint(
        step=manifest["step"],
        score=manifest["score"],
        state=_parse_object(data["state.json"], "state.json"),
        config=_parse_object(data["config.json"], "config.json"),
        uri=location.uri(),
        _tensors={stem: _parse_tensors(data[f"{stem}.safetensors"], stem) for stem in stems},
    )


def read_manifest(location: Storage, step: int | None = None) -> dict[str, Any]:
    """Return the manifest with every field checked; it must be of ``step`` if that is given."""
    manifest = _read_again(location, MANIFEST, _parse_manifest)
    score, files = manifest.get("score"), manifest.get("files")
    if type(manifest.get("step")) is not int or not (score is None or (type(score) is float and math.isfinite(score))):
        raise Refused(f"{MANIFEST} has no valid step or score")
    if step is not None and manifest["step"] != step:
        raise Refused(f"it is the checkpoint of step {manifest['step']}, in the folder of another")
    if not isinstance(files, dict) or not all(name in files for name in _JSON_FILES):
        raise Refused(f"{MANIFEST} does not name {' and '.join(_JSON_FILES)}")
    for name, entry in files.items():
        stem = name.removesuffix(".safetensors")
        if name not in _JSON_FILES and not (stem != name and STEM.fullmatch(stem)):
            raise Refused(f"{MANIFEST} names {name!r}, which is no file of a checkpoint")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise Refused(f"{MANIFEST} has no size and sum of {name}")
    return manifest


def _parse_manifest(data: bytes) -> dict[str, Any]:
    manifest = _parse_object(data, MANIFEST)
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise Altered(f"{MANIFEST} is not one of a checkpoint")
    if version > FORMAT:
        raise Refused(f"its format is {version} and this version reads up to {FORMAT}: upgrade raytrain")
    if manifest.pop("sha256", None) != _seal(manifest):
        raise Altered(f"{MANIFEST} was altered")
    return manifest


def _read_file(location: Storage, name: str, entry: dict[str, Any]) -> bytes:
    def check(data: bytes) -> bytes:
        if len(data) != entry["size"]:
            raise Altered(f"{name} has {len(data)} bytes instead of {entry['size']}")
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise Altered(f"{name} was altered: its SHA-256 sum is not the one of the manifest")
        return data

    return _read_again(location, name, check)


def _read_again(location: Storage, name: str, check: Callable[[bytes], T]) -> T:
    """Return the result of ``check`` on a file; if that raises ``Altered``, read the file again after each pause."""
    for pause in PAUSES_S:
        with suppress(Altered):
            return check(_read_once(location, name))
        time.sleep(pause)
    return check(_read_once(location, name))


def _read_once(location: Storage, name: str) -> bytes:
    try:
        return location.read(name)
    except NotFoundError:
        if name == MANIFEST:
            raise Refused(f"it has no {MANIFEST}: not a checkpoint, or one that was not completed") from None
        raise Refused(f"{name} is missing") from None


def _parse_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        values = parse_json(data)
    except ValueError:
        raise Altered(f"{name} is not JSON") from None
    if not isinstance(values, dict):
        raise Refused(f"{name} is not a JSON object")
    return values


def _parse_tensors(data: bytes, stem: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    # safetensors and torch raise all of these, depending on the damage; the checksums are those of the manifest
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise Refused(f"{stem}.safetensors is not a valid safetensors file ({' '.join(str(error).split())})") from None


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(to_json(manifest)).hexdigest()


def to_json(values: dict[str, Any]) -> bytes:
    """Return ``values`` as JSON; equal values give equal bytes."""
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


# -------------------------------------------------------------------------------------------- write


def manifest_of(step: int, score: float | None, files: dict[str, bytes]) -> dict[str, Any]:
    """Return the manifest that makes ``files`` a checkpoint."""
    sums = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "score": score, "files": sums}
    return manifest | {"sha256": _seal(manifest)}


def commit(location: Storage, step: int, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """Write the files, then the manifest that makes them count.

    Over a checkpoint with the same manifest, the files are written in place. Each write replaces a file atomically, so
    a complete checkpoint never stops counting, and a damaged one is repaired.
    """
    try:
        present = read_manifest(location, step)
        same = present["files"] == manifest["files"] and present["score"] == manifest["score"]
    except Refused:
        same = False
    if not same:
        location.delete(MANIFEST)
    for name, data in files.items():
        location.write(name, data)
    location.write(MANIFEST, to_json(manifest))


def load(source: Storage | str | Path) -> Checkpoint:
    """Return the checkpoint in the given folder.

    Raises:
        UserError: it cannot be read, is not a checkpoint, is incomplete or altered, or has a newer format.
    """
    storage = source if isinstance(source, Storage) else open_storage(source)
    try:
        return read(storage)
    except Refused as error:
        raise UserError(f"checkpoint {storage.uri()}: {error}") from None
    except StorageError as error:
        raise UserError(f"checkpoint: {error}") from None


def latest(storage: Storage) -> Checkpoint | None:
    """Return the newest valid checkpoint below ``storage``; log why any newer one is refused.

    Raises:
        StorageError: the storage does not answer. That does not count as "there is none".
    """
    return next(valid(storage, steps_in(storage)[::-1]), None)


def best(storage: Storage) -> Checkpoint | None:
    """Return the valid checkpoint with the lowest score, the first on ties; ``None`` if none is scored.

    Raises:
        StorageError: the storage does not answer.
    """
    scores: dict[int, float] = {}
    for step in steps_in(storage):
        with contextlib.suppress(Refused):
            if (score := read_manifest(storage.child(folder_of(step)), step)["score"]) is not None:
                scores[step] = score
    return next(valid(storage, sorted(scores, key=lambda step: (scores[step], step))), None)


def newest_step(storage: Storage) -> int | None:
    """Return the step of the newest completed checkpoint, without reading its files.

    Raises:
        StorageError: the storage does not answer.
    """
    keys = set(storage.list())
    return max((step for step in steps_in(storage) if f"{folder_of(step)}/{MANIFEST}" in keys), default=None)


def export(stored: Checkpoint, folder: Path) -> Path:
    """Write a checkpoint of the weights alone, without the state that only training needs; return ``folder``.

    Raises:
        StorageError: ``folder`` cannot be written.
    """
    state = {key: stored.state[key] for key in ("best_step", "best", "corpus", "vocabulary") if key in stored.state}
    files = {
        "config.json": to_json(stored.config),
        "state.json": to_json(state | {"evaluations": [{"step": stored.step, **stored.evaluation}]}),
        "model.safetensors": safetensors.torch.save(stored.tensors("model")),
    }
    commit(open_storage(folder), stored.step, files, manifest_of(stored.step, stored.score, files))
    return folder
