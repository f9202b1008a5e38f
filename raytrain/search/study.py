"""Optuna's study of a search, in a file beside it, for ``optuna-dashboard`` and Optuna's visualisations.

The trials' records are the source of truth, and the file is derived from them. Each state that is written to a trial's
record is written to the study too. A driver that takes the search over first brings the file in line with the records,
or recreates it if that is not possible. The search never reads the file, so it continues whatever happens to it.

The sampler's own study stays in memory. If it used Optuna's journal instead, each parameter and report would be a line
that the driver writes and waits for (measured: docs/develop/log.md). Here a thread does the waiting.

In a folder, Optuna's ``JournalFileBackend`` appends the lines, so that a dashboard can follow the search. S3 objects
cannot be appended to: there, the whole file is written every ``WHOLE_S`` seconds, and when the driver ends.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial

from raytrain.metrics import SearchObjective
from raytrain.runs.records import STUDY
from raytrain.runs.repeats import searched
from raytrain.runs.trials import Trial
from raytrain.search.algorithms import optuna_trial
from raytrain.search.plan import Plan
from raytrain.storage.lease import LeaseLostError
from raytrain.utils.errors import UserError

if TYPE_CHECKING:
    from raytrain.storage.base import Storage
    from raytrain.storage.lease import Fence

WHOLE_S = 60.0
"""Pause between two writes of the whole file."""
AGAIN_S = 60.0
"""Pause after a failure; the next attempt brings the whole file in line."""
LOCK_S = 3
"""Age after which the lock of a process that died while appending is broken. An append takes milliseconds."""
RELEASED_S = 1.0
"""Age after which a lock that was renamed for removal must be from a dead process: a live one removes it at once."""
IDENTITY = "identity"
"""User attribute of the study and of its trials: the identity of the search or trial."""
_log = logging.getLogger(__name__)


class StudyFile:
    """Keeps a search's study in ``study.journal``, in a thread of its own; never raises, and logs a failure once.

    The trials of earlier searches that the sampler knows come first. Trials that confirm a winner are left out: they
    are other seeds at the same points.
    """

    def __init__(self, name: str, plan: Plan, location: Storage, fence: Fence) -> None:
        self._name, self._plan, self._location, self._fence = name, plan, location, fence
        self._trials: dict[str, Trial] = {}
        self._changed: dict[str, None] = {}
        self._journal: Journal | None = None
        self._again = self._whole_at = -math.inf
        self._failed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="study")

    def begin(self, known: Sequence[Trial]) -> None:
        """Bring the file in line, in the background, with the trials of a search that is begun or resumed."""
        self._trials = {trial.identity: _copy(trial) for trial in searched(known)}
        self._thread.submit(self._write)

    def keep(self, trial: Trial) -> None:
        """Write the new state of a trial in the background soon."""
        if trial.confirms is None:
            self._trials[trial.identity] = _copy(trial)
            self._changed[trial.identity] = None
            self._thread.submit(self._write)

    def close(self) -> None:
        """Block until everything is written, or has failed."""
        self._thread.submit(self._write, last=True)
        self._thread.shutdown()

    def _write(self, last: bool = False) -> None:
        """Bring the file in line with everything kept so far."""
        if time.monotonic() < self._again and not last:
            return
        try:
            self._fence.check()
            # somebody may have deleted it
            if self._journal is None or not self._journal.is_there():
                self._journal = self._open()
            for identity in list(self._changed):
                del self._changed[identity]
                self._journal.write(self._stored(self._trials[identity]))
            if self._location.folder is None and (last or time.monotonic() >= self._whole_at):
                self._location.write(STUDY, self._journal.content())
                self._whole_at = time.monotonic() + WHOLE_S
        except LeaseLostError:  # the driver notices it too, and ends
            self._again = math.inf
        except Exception as error:  # anything that Optuna or a file system raises: the search can do without the file
            self._journal, self._again = None, time.monotonic() + AGAIN_S
            if not self._failed:
                reason = " ".join(str(error).split()) or type(error).__name__
                _log.warning("%s is not kept now, the search goes on: %s", self._location.uri(STUDY), reason)
            self._failed = True

    def _open(self) -> Journal:
        """Return a journal in line with all trials: an earlier driver's if it can be continued, or else a new one."""
        path = None if self._location.folder is None else self._location.folder / STUDY
        if path is not None and path.exists():
            try:
                cut_partial_line(path)
                journal = Journal(JournalFileBackend(str(path), _lock(path)), path)
                journal.find(self._plan.identity)
                self._write_all(journal)
                return journal
            except (OSError, LeaseLostError):
                raise
            except Exception as error:  # anything that Optuna raises for a damaged or unrelated file
                _log.info("%s does not agree with the records, and is made anew: %s", path, error)
        # not in place, so that a dashboard reads either the old file or the new one
        journal = Journal(Lines())
        journal.create(self._name, self._plan.identity, self._plan.search_objective)
        self._write_all(journal)
        if path is None:
            return journal
        self._location.write(STUDY, journal.content())
        journal = Journal(JournalFileBackend(str(path), _lock(path)), path)
        journal.find(self._plan.identity)
        return journal

    def _write_all(self, journal: Journal) -> None:
        """Bring a journal in line with all trials of the search.

        Raises:
            ValueError: it holds a trial that ended differently, or one that the search does not have.
        """
        own = [self._stored(trial) for trial in list(self._trials.values())]
        trials = [*self._earlier(), *own]
        if others := journal.identities - {trial.user_attrs[IDENTITY] for trial in trials}:
            raise ValueError(f"it has a trial {min(others)}, of which there is no record")
        for trial in trials:
            journal.write(trial)

    def _earlier(self) -> Iterable[FrozenTrial]:
        """Return the trials of earlier searches that the sampler knows."""
        for search in self._plan.earlier:
            for trial in search.trials:
                found = self._stored(trial)
                found.set_user_attr("search", search.name)
                yield found

    def _stored(self, trial: Trial) -> FrozenTrial:
        return stored_trial(trial, self._plan.search_objective)


def _copy(trial: Trial) -> Trial:
    """Return a copy of a trial as it is now, since the driver keeps changing it."""
    return dataclasses.replace(trial, history=list(trial.history))


class Lines(BaseJournalBackend):
    """The lines of a journal, in memory."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self.lines += [json.dumps(log, separators=(",", ":")) for log in logs]

    def read_logs(self, log_number_from: int) -> Iterable[dict[str, Any]]:
        return map(json.loads, self.lines[log_number_from:])


class Journal:
    """An Optuna journal with the study of one search, whose trials are found by identity.

    A dashboard may add lines of its own, such as notes, and trials that are not the search's; they are left alone.
    """

    def __init__(self, backend: BaseJournalBackend, path: Path | None = None) -> None:
        self._backend, self._path = backend, path
        self._storage = JournalStorage(backend)
        self._study = -1
        self._ids: dict[str, int] = {}

    def is_there(self) -> bool:
        """Return whether its file still exists."""
        return self._path is None or self._path.exists()

    def content(self) -> bytes:
        """Return all lines of an in-memory journal."""
        assert isinstance(self._backend, Lines)
        return "".join(f"{line}\n" for line in self._backend.lines).encode()

    def create(self, name: str, identity: str, search_objective: SearchObjective) -> None:
        """Begin a study without trials."""
        study = optuna.create_study(storage=self._storage, study_name=name, directions=search_objective.directions)
        study.set_user_attr(IDENTITY, identity)
        study.set_user_attr("objective", str(search_objective))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([search_objective.metric, "used"][: len(search_objective.directions)])
        self._study = study._study_id

    def find(self, identity: str) -> None:
        """Find the study of the search ``identity``, and its trials.

        Raises:
            ValueError: the study is not there.
        """
        for study in self._storage.get_all_studies():
            if study.user_attrs.get(IDENTITY) == identity:
                self._study = study._study_id
                trials = self._storage.get_all_trials(self._study, deepcopy=False)
                self._ids = {
                    each.user_attrs[IDENTITY]: each._trial_id for each in trials if IDENTITY in each.user_attrs
                }
                return
        raise ValueError("it has no study of this search")

    @property
    def identities(self) -> set[str]:
        """Return the identities of its trials."""
        return set(self._ids)

    def write(self, wanted: FrozenTrial) -> None:
        """Bring a trial of the study in line with ``wanted``; add it if it is new.

        Raises:
            ValueError: the study's trial ended differently, or is at another point.
        """
        identity = wanted.user_attrs[IDENTITY]
        if identity not in self._ids:
            self._ids[identity] = self._storage.create_new_trial(self._study, wanted)
            return
        own, has = self._ids[identity], self._storage.get_trial(self._ids[identity])
        if has.params != wanted.params or (has.state.is_finished() and _result(has) != _result(wanted)):
            raise ValueError(f"its trial {identity} is not that of the record")
        if has.state.is_finished():
            return
        for step, value in wanted.intermediate_values.items():
            if has.intermediate_values.get(step) != value:
                self._storage.set_trial_intermediate_value(own, step, value)
        for key, value in wanted.user_attrs.items():
            if has.user_attrs.get(key) != value:
                self._storage.set_trial_user_attr(own, key, value)
        for key, value in wanted.system_attrs.items():  # its constraints
            self._storage.set_trial_system_attr(own, key, value)
        if has.state != wanted.state:
            self._storage.set_trial_state_values(own, wanted.state, wanted.values)


def _result(trial: FrozenTrial) -> tuple[Any, ...]:
    return trial.state, trial.values, trial.intermediate_values, trial.constraints


def stored_trial(trial: Trial, search_objective: SearchObjective) -> FrozenTrial:
    """Return a trial as the study holds it.

    State, values and constraints are those that the sampler is given for an ended trial. An interrupted trial is
    running, since it continues when the search is resumed. A config that is not a point of the space has no parameters,
    nor has a trial that failed at a point that Optuna cannot represent. Reports are the plain metric, without the
    penalty in ASHA's score; non-finite numbers are left out.
    """
    try:
        found = optuna_trial(trial, search_objective)
    except UserError:
        found = optuna_trial(dataclasses.replace(trial, params={}, distributions={}), search_objective)
    if len(search_objective.directions) == 1:
        reports = {entry["step"]: entry.get(search_objective.metric, math.nan) for entry in trial.history}
        found.intermediate_values = {step: value for step, value in reports.items() if math.isfinite(value)}
    if trial.started_at:
        found.datetime_start = datetime.fromtimestamp(trial.started_at)
    if trial.ended:
        ended_at = trial.ended_at or trial.started_at
        found.datetime_complete = datetime.fromtimestamp(ended_at) if ended_at else found.datetime_complete
    # as a list, for which Optuna uses the indices as names: optuna-dashboard 0.21 reads nothing else
    missed = list(found.constraints.values())
    found.system_attrs = {"constraints": missed} if missed else {}
    attributes: dict[str, Any] = {IDENTITY: trial.identity, "trial": trial.name, "status": trial.status}
    attributes |= {"reason": trial.reason} if trial.reason else {}
    attributes |= {"started_from": trial.origin} if trial.origin else {}
    attributes |= {} if trial.member is None else {"member": trial.member, "end": trial.end}
    metrics: dict[str, Any] = {key: value for key, value in trial.best.items() if math.isfinite(value)}
    found.user_attrs = attributes | (metrics if trial.status not in ("waiting", "running") else {})
    return found


def cut_partial_line(path: Path) -> None:
    """Remove a partial last line from a journal whose writer died, and the locks that dead processes left.

    Optuna releases a lock by renaming it and then removing the renamed file. A process that dies in between leaves the
    file for ever.
    """
    lock = _lock(path)
    lock.acquire()
    try:
        for released in path.parent.glob(f"{path.name}.lock*.rename"):
            if time.time() - released.lstat().st_ctime > RELEASED_S:
                released.unlink(missing_ok=True)
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _lock(path: Path) -> JournalFileSymlinkLock:
    """Return the lock that Optuna's own readers and writers of the file use by default."""
    return JournalFileSymlinkLock(str(path), LOCK_S)
