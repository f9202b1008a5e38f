"""Checkpoint writer: saves a run's checkpoints in the background; training continues, even during a storage outage."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch

from raytrain.runs.checkpoint import MANIFEST, STEM, Snapshot, commit, folder_of, manifest_of, steps_in, to_json, valid
from raytrain.storage.base import Storage, StorageError
from raytrain.utils.retry import retry

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    """A snapshot in the queue."""

    step: int
    score: float | None
    tensors: dict[str, dict[str, torch.Tensor]]
    objects: dict[str, bytes]

    def files(self) -> dict[str, bytes]:
        files = dict(self.objects)
        for stem, tensors in self.tensors.items():
            contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
            files[f"{stem}.safetensors"] = safetensors.torch.save(contiguous)
        return files


class CheckpointWriter:
    """Writes snapshots below ``storage`` while training continues, and deletes old checkpoints.

    One save is in progress at a time. Meanwhile the newest snapshot waits, and so do those among the ``keep_best``
    lowest scores so far; others are dropped. So ``save`` never waits for the storage. At most ``keep_best`` + 2
    snapshots are in memory, one of them as the files being written. Snapshots are saved in the order of their steps. If
    a newer state names a step as its best, that step is therefore saved before the state.

    A failed save is retried for ``retry_seconds``. After that the next ``save``, ``wait`` or ``close`` raises
    ``StorageError``. Every error is retried, even "no permission": a storage also reports it while its user directory
    is down or a policy takes effect, and it cannot be told apart from a permanent refusal. The reason for each failed
    attempt is logged, and training continues meanwhile. The writer's thread calls ``on_commit(step)`` as soon as the
    manifest of a step is written.

    Use it in a ``with`` block: leaving the block normally closes the writer. Leaving it with an exception tries once to
    save what waits.
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
        """The newest step committed by this writer."""
        self.seconds_waiting = 0.0
        """Seconds that the caller spent in ``wait`` and ``close``."""
        self._storage = storage
        self._keep_last, self._keep_best = keep_last, keep_best
        self._retry_seconds = retry_seconds
        self._on_commit = on_commit
        self._scores: dict[int, float | None] = {}
        self._known_earlier = False
        self._giving_up = threading.Event()
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        """In the order of their steps. The lock guards this and ``_busy``."""
        self._best: list[tuple[float, int]] = []
        """Score and step of the ``keep_best`` best snapshots so far, whether saved yet or not."""
        self._busy = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, snapshot: Snapshot, score: float | None = None) -> None:
        """Queue ``snapshot`` and return. ``score`` ranks it, lower is better; a non-finite score counts as none.

        Raises:
            FloatingPointError: a tensor is not finite; nothing of the snapshot is saved.
            StorageError: an earlier save failed for good.
            TypeError, ValueError: the state or config is not JSON, or a file stem or the step is not allowed.
        """
        for stem in snapshot.tensors:
            if not STEM.fullmatch(stem):
                raise ValueError(f"{stem!r} cannot name a file of tensors")
        if not 0 <= snapshot.step < 10**18:
            raise ValueError(f"step {snapshot.step} is not a number of steps")
        check_finite(snapshot)
        # in the caller's thread: the caller may change these dictionaries afterwards
        objects = {"state.json": to_json(snapshot.state), "config.json": to_json(snapshot.config)}
        ranked = float(score) if score is not None and math.isfinite(score) else None
        newest = _Waiting(snapshot.step, ranked, snapshot.tensors, objects)
        with self._lock:
            if self._busy:
                self._put(newest)
                return
        self.wait()  # returns at once, since the thread is idle; raises if its last save failed
        with self._lock:
            self._put(newest)
            self._busy = True
        self._pending = self._thread.submit(self._save_waiting)

    def wait(self) -> None:
        """Block until everything in the queue is saved.

        Raises:
            StorageError: a save failed for good.
        """
        begin = time.monotonic()
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            self.seconds_waiting += time.monotonic() - begin

    def close(self) -> None:
        """Save everything in the queue, and end the thread."""
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

    def _put(self, newest: _Waiting) -> None:
        """Queue ``newest``; drop any snapshot that is now neither the newest nor among the best so far."""
        candidates = [*(other for other in self._waiting if other.step != newest.step), newest]
        if newest.score is not None:
            self._best = sorted([*self._best, (newest.score, newest.step)])[: self._keep_best]
        kept = {newest.step, *(step for _, step in self._best)}
        self._waiting = [other for other in candidates if other.step in kept]
        for other in candidates:
            if other.step not in kept:
                _log.info("no checkpoint of step %d: a newer came while one was still being saved", other.step)

    # ------------------------------------------------------------------------------- the background thread

    def _save_waiting(self) -> None:
        """Save until the queue is empty."""
        try:
            while True:
                with self._lock:
                    if not self._waiting:
                        self._busy = False
                        return
                    waiting = self._waiting.pop(0)
                step, score, files = waiting.step, waiting.score, waiting.files()
                del waiting  # do not keep its tensors in memory next to its files
                self._save(step, score, files)
        except BaseException:
            with self._lock:
                self._busy = False
            raise

    def _save(self, step: int, score: float | None, files: dict[str, bytes]) -> None:
        self._persist(step, files, manifest_of(step, score, files))
        self.committed = step
        self._scores[step] = score
        if self._on_commit is not None:
            self._on_commit(step)
        try:
            self._prune(step)
        except StorageError as error:
            _log.warning("old checkpoints stay until the next is saved: %s", error)

    def _persist(self, step: int, files: dict[str, bytes], manifest: dict[str, Any]) -> None:
        """Commit; retry with growing pauses for ``retry_seconds``."""
        location = self._storage.child(folder_of(step))
        try:
            retry(
                lambda: commit(location, step, files, manifest),
                StorageError,
                seconds=self._retry_seconds,
                log=lambda error: _log.warning(
                    "the checkpoint of step %d is not saved yet, trying again: %s", step, error
                ),
                first_pause=1.0,
                longest_pause=30.0,
                wait=self._giving_up.wait,
            )
        except StorageError as error:
            raise StorageError(
                f"the checkpoint of step {step} could not be saved within {self._retry_seconds:.0f} s: {error}"
            ) from None

    def _prune(self, step: int) -> None:
        """Delete the checkpoints that are neither among the latest nor among the best.

        Checkpoints ahead of ``step`` are kept and not counted. Either they were refused, so this run resumed from an
        earlier one and will write them again; or they belong to another process, which is ahead.
        """
        behind = [other for other in steps_in(self._storage) if other <= step]
        if not self._known_earlier:
            # once after resuming: an unreadable checkpoint must not displace a readable one
            earlier = valid(self._storage, sorted(set(behind) - set(self._scores)))
            self._scores |= {checkpoint.step: checkpoint.score for checkpoint in earlier}
            self._known_earlier = True
        usable = sorted(other for other in behind if other in self._scores)
        scores = {other: score for other in usable if (score := self._scores[other]) is not None}
        ranked = sorted(scores, key=lambda other: (scores[other], other))
        kept = {*usable[-self._keep_last :], *ranked[: self._keep_best]}
        for other in sorted(set(behind) - kept):
            self._scores.pop(other, None)
            # delete the manifest first: a half-deleted checkpoint does not count
            self._storage.delete(f"{folder_of(other)}/{MANIFEST}")
            self._storage.delete_prefix(folder_of(other))


def check_finite(snapshot: Snapshot) -> None:
    """Refuse a state from which no run could be resumed.

    Raises:
        FloatingPointError: a tensor holds a NaN or an infinity; the message names the first.
    """
    for stem, tensors in snapshot.tensors.items():
        for name, tensor in tensors.items():
            # check only the extremes: a NaN becomes both, and no memory of the tensor's size is allocated
            if tensor.is_floating_point() and tensor.numel() > 0 and not all(map(math.isfinite, tensor.aminmax())):
                raise FloatingPointError(
                    f"the state after step {snapshot.step} is not finite and is not saved: {name} of {stem}"
                )
