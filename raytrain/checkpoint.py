"""What is saved of a run, in what form, and how it is read back.

A checkpoint is a folder ``step-00000250``: tensors as safetensors, the rest as JSON, and ``manifest.json``, written
last, with the size and the SHA-256 sum of each. Without a valid manifest there is no checkpoint. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from raytrain.errors import UserError
from raytrain.storage import NotFoundError, Storage, StorageError, open_storage

FORMAT = 1
"""Version of the form; a reader refuses what is newer than itself."""

_MANIFEST = "manifest.json"
_JSON_FILES = ("config.json", "state.json")
_FOLDER = re.compile(r"step-(\d{8,18})")
_STEM = re.compile(r"[a-z0-9_]{1,64}")

_log = logging.getLogger(__name__)


@dataclass
class Snapshot:
    """The state of a run after ``step`` steps."""

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    """File stem (``model``, ``optimizer``, ``average``) -> name -> tensor, on the CPU and not changed afterwards."""
    state: dict[str, Any]
    """Whatever else is needed to go on, as JSON. Copied when it is saved."""
    config: dict[str, Any]
    """The config of the run, as JSON."""


@dataclass(frozen=True)
class Checkpoint:
    """A snapshot that was read back, with all sums right."""

    step: int
    score: float | None
    """What it is ranked by, lower is better; None where it was not scored."""
    state: dict[str, Any]
    config: dict[str, Any]
    uri: str
    _tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)

    def tensors(self, stem: str) -> dict[str, torch.Tensor]:
        """Name -> tensor of one file.

        Raises:
            UserError: the checkpoint has no such file.
        """
        if stem not in self._tensors:
            raise UserError(f"checkpoint {self.uri}: it has no {stem}.safetensors; it has {', '.join(self._tensors)}")
        return self._tensors[stem]


# --------------------------------------------------------------------------------------------- read


def load(source: Storage | str | Path) -> Checkpoint:
    """The checkpoint in one given folder.

    Raises:
        UserError: it cannot be read, is no checkpoint, is incomplete or altered, or has a newer form.
    """
    storage = source if isinstance(source, Storage) else open_storage(source)
    try:
        return _read(storage)
    except _Refused as error:
        raise UserError(f"checkpoint {storage.uri()}: {error}") from None
    except StorageError as error:
        raise UserError(f"checkpoint: {error}") from None


def latest(storage: Storage) -> Checkpoint | None:
    """The newest valid checkpoint below ``storage``; those that are refused are logged with the reason.

    Raises:
        StorageError: the store does not answer. That is not taken for "there is none".
    """
    return next(_valid(storage, _steps(storage)[::-1]), None)


def best(storage: Storage) -> Checkpoint | None:
    """The valid checkpoint with the lowest score, the first of equals; None where none is scored.

    Raises:
        StorageError: the store does not answer.
    """
    scores: dict[int, float] = {}
    for step in _steps(storage):
        with contextlib.suppress(_Refused):
            if (score := _read_manifest(storage.child(_folder(step)), step)["score"]) is not None:
                scores[step] = score
    return next(_valid(storage, sorted(scores, key=lambda step: (scores[step], step))), None)


def newest_step(storage: Storage) -> int | None:
    """The step of the newest checkpoint that was completed; what is in it is not looked at.

    Raises:
        StorageError: the store does not answer.
    """
    keys = set(storage.list())
    steps = [step for step in _steps(storage) if f"{_folder(step)}/{_MANIFEST}" in keys]
    return steps[-1] if steps else None


def export(stored: Checkpoint, folder: Path) -> Path:
    """Write the weights of ``stored`` alone, without what only training needs, as a checkpoint; returns ``folder``.

    Raises:
        StorageError: ``folder`` cannot be written.
    """
    files = {
        "config.json": _json(stored.config),
        "state.json": _json({key: stored.state[key] for key in ("best_step", "best", "corpus") if key in stored.state}),
        "model.safetensors": safetensors.torch.save(stored.tensors("model")),
    }
    _commit(open_storage(folder), stored.step, files, _manifest(stored.step, stored.score, files))
    return folder


class _Refused(Exception):
    """Why a folder is not a checkpoint, in words."""


def _valid(storage: Storage, steps: list[int]) -> Iterator[Checkpoint]:
    for step in steps:
        place = storage.child(_folder(step))
        try:
            yield _read(place, step)
        except _Refused as error:
            _log.warning("checkpoint %s is not used: %s", place.uri(), error)


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _steps(storage: Storage) -> list[int]:
    """The steps of all folders that look like checkpoints, whole or not, in order."""
    folders = {key.partition("/")[0] for key in storage.list() if "/" in key}
    steps = {int(match[1]) for folder in folders if (match := _FOLDER.fullmatch(folder))}
    return sorted(step for step in steps if _folder(step) in folders)


def _read(place: Storage, step: int | None = None) -> Checkpoint:
    manifest = _read_manifest(place, step)
    data = {name: _read_file(place, name, entry) for name, entry in manifest["files"].items()}
    stems = [name.removesuffix(".safetensors") for name in data if name not in _JSON_FILES]
    return Checkpoint(
        step=manifest["step"],
        score=manifest["score"],
        state=_parse_object(data["state.json"], "state.json"),
        config=_parse_object(data["config.json"], "config.json"),
        uri=place.uri(),
        _tensors={stem: _parse_tensors(data[f"{stem}.safetensors"], stem) for stem in stems},
    )


def _read_manifest(place: Storage, step: int | None = None) -> dict[str, Any]:
    """The manifest, every field of it checked; ``step`` is the one that it must be of, if given."""
    try:
        manifest = _parse_object(place.read(_MANIFEST), _MANIFEST)
    except NotFoundError:
        raise _Refused(f"it has no {_MANIFEST}: not a checkpoint, or one that was not completed") from None
    version = manifest.get("format")
    if type(version) is not int or version < 1:
        raise _Refused(f"{_MANIFEST} is not one of a checkpoint")
    if version > FORMAT:
        raise _Refused(f"its form is {version} and this version reads up to {FORMAT}: upgrade raytrain")
    seal = manifest.pop("sha256", None)
    if seal != _seal(manifest):
        raise _Refused(f"{_MANIFEST} was altered")
    score, files = manifest.get("score"), manifest.get("files")
    if type(manifest.get("step")) is not int or not (score is None or (type(score) is float and math.isfinite(score))):
        raise _Refused(f"{_MANIFEST} has no valid step or score")
    if step is not None and manifest["step"] != step:
        raise _Refused(f"it is the checkpoint of step {manifest['step']}, in the folder of another")
    if not isinstance(files, dict) or not all(name in files for name in _JSON_FILES):
        raise _Refused(f"{_MANIFEST} does not name {' and '.join(_JSON_FILES)}")
    for name, entry in files.items():
        stem = name.removesuffix(".safetensors")
        if name not in _JSON_FILES and not (stem != name and _STEM.fullmatch(stem)):
            raise _Refused(f"{_MANIFEST} names {name!r}, which is no file of a checkpoint")
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            raise _Refused(f"{_MANIFEST} has no size and sum of {name}")
    return manifest


def _read_file(place: Storage, name: str, entry: dict[str, Any]) -> bytes:
    try:
        data = place.read(name)
    except NotFoundError:
        raise _Refused(f"{name} is missing") from None
    if len(data) != entry["size"]:
        raise _Refused(f"{name} has {len(data)} bytes instead of {entry['size']}")
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _Refused(f"{name} was altered: its SHA-256 sum is not the one of the manifest")
    return data


def _parse_object(data: bytes, name: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise _Refused(f"{name} is not JSON") from None
    if not isinstance(values, dict):
        raise _Refused(f"{name} is not a JSON object")
    return values


def _parse_tensors(data: bytes, stem: str) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, AssertionError) as error:
        raise _Refused(f"{stem}.safetensors is not a valid safetensors file ({' '.join(str(error).split())})") from None


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_json(manifest)).hexdigest()


def _json(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()


# -------------------------------------------------------------------------------------------- write


class CheckpointWriter:
    """Saves snapshots below ``storage`` while training goes on, and deletes what is no longer wanted.

    A save that fails is tried again for ``retry_seconds``; after that the next ``save``, ``wait`` or ``close`` raises
    ``StorageError``. ``on_commit(step)`` is called in the writer's thread as soon as the manifest of a step is there.

    In a ``with`` block: leaving it normally closes, leaving it by an exception gives up what does not succeed at once.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        keep_last: int = 2,
        keep_best: int = 1,
        retry_seconds: float = 600.0,
        on_commit: Callable[[int], None] | None = None,
    ) -> None:
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last is {keep_last} and keep_best {keep_best}: at least 1 and 0")
        self.committed: int | None = None
        """The newest step that this writer has committed."""
        self.seconds_waiting = 0.0
        """Seconds that ``save`` spent waiting for the save before."""
        self._storage = storage
        self._keep_last, self._keep_best = keep_last, keep_best
        self._retry_seconds = retry_seconds
        self._on_commit = on_commit
        self._scores: dict[int, float | None] = {}
        self._known_earlier = False
        self._giving_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, score: float | None = None) -> None:
        """Start saving ``snapshot`` and return. ``score`` ranks it, lower is better; one that is not finite is none.

        Raises:
            StorageError: the save before this one failed for good.
            TypeError, ValueError: state or config are not JSON, or a file stem or the step is not a possible one.
        """
        for stem in snapshot.tensors:
            if not _STEM.fullmatch(stem):
                raise ValueError(f"{stem!r} cannot name a file of tensors")
        if not 0 <= snapshot.step < 10**18:
            raise ValueError(f"step {snapshot.step} is not a number of steps")
        # Made here, in the caller's thread: the caller goes on to change these dictionaries.
        objects = {"state.json": _json(snapshot.state), "config.json": _json(snapshot.config)}
        ranked = float(score) if score is not None and math.isfinite(score) else None
        begin = time.monotonic()
        self.wait()
        self.seconds_waiting += time.monotonic() - begin
        self._pending = self._thread.submit(self._run, snapshot.step, snapshot.tensors, objects, ranked)

    def wait(self) -> None:
        """Return when everything is saved.

        Raises:
            StorageError: the last save failed for good.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """``wait``, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        self._giving_up.set()
        self._thread.shutdown()

    def _run(
        self, step: int, tensors: dict[str, dict[str, torch.Tensor]], objects: dict[str, bytes], score: float | None
    ) -> None:
        files = dict(objects)
        for stem, values in tensors.items():
            contiguous = {name: tensor.contiguous() for name, tensor in values.items()}
            files[f"{stem}.safetensors"] = safetensors.torch.save(contiguous)
        self._persist(step, files, _manifest(step, score, files))
        self.committed = step
        self._scores[step] = score
        if self._on_commit is not None:
            self._on_commit(step)
        try:
            self._prune(step)
        except StorageError as error:
            _log.warning("old checkpoints stay until the next is saved: %s", error)

    def _persist(self, step: int, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        """Commit, trying again with growing pauses for as long as was asked."""
        deadline, pause = time.monotonic() + self._retry_seconds, 1.0
        while True:
            try:
                _commit(self._storage.child(_folder(step)), step, files, manifest)
                return
            except StorageError as error:
                left = deadline - time.monotonic()
                if left <= 0 or self._giving_up.wait(min(pause, left)):
                    raise StorageError(
                        f"the checkpoint of step {step} could not be saved within {self._retry_seconds:.0f} s: {error}"
                    ) from None
                _log.warning("the checkpoint of step %d is not saved yet, trying again: %s", step, error)
                pause = min(2 * pause, 30.0)

    def _prune(self, step: int) -> None:
        """Delete what is neither among the last nor among the best.

        Checkpoints ahead of ``step`` are left alone and not counted: this run was resumed before them because they
        were refused, and will write them again; or another process is ahead, whose they are.
        """
        behind = [other for other in _steps(self._storage) if other <= step]
        if not self._known_earlier:
            # Once after a resume: one that cannot be read must not take the place of one that can.
            earlier = _valid(self._storage, sorted(set(behind) - set(self._scores)))
            self._scores |= {checkpoint.step: checkpoint.score for checkpoint in earlier}
            self._known_earlier = True
        usable = sorted(other for other in behind if other in self._scores)
        scores = {other: score for other in usable if (score := self._scores[other]) is not None}
        ranked = sorted(scores, key=lambda other: (scores[other], other))
        kept = {*usable[-self._keep_last :], *ranked[: self._keep_best]}
        for other in sorted(set(behind) - kept):
            self._scores.pop(other, None)
            # The manifest first: a checkpoint that is half deleted does not count.
            self._storage.delete(f"{_folder(other)}/{_MANIFEST}")
            self._storage.delete_prefix(_folder(other))


def _manifest(step: int, score: float | None, files: dict[str, bytes]) -> dict[str, Any]:
    sums = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    manifest: dict[str, Any] = {"format": FORMAT, "step": step, "score": score, "files": sums}
    return manifest | {"sha256": _seal(manifest)}


def _commit(place: Storage, step: int, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
    """Write the files, then the manifest that makes them count."""
    try:
        present = _read_manifest(place, step)
        if present["files"] == manifest["files"] and present["score"] == manifest["score"]:
            _read(place, step)
            return  # the very same checkpoint, whole: it never stops counting
    except _Refused:
        pass
    place.delete(_MANIFEST)
    for name, data in files.items():
        place.write(name, data)
    place.write(_MANIFEST, _json(manifest))
