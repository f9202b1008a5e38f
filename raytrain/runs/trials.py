"""Trials of a search: the stored record of each, from which the search can be resumed after anything has died."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from raytrain.config.schema import RunConfig, from_dict, to_dict
from raytrain.metrics import METRIC, REQUIRED_METRICS, SearchObjective, code_use
from raytrain.runs.records import CHECKPOINTS
from raytrain.storage import open_storage
from raytrain.storage.base import Storage, StorageError, checked_key, retry_storage
from raytrain.utils.errors import UserError
from raytrain.utils.validation import parse_json, validate_object, validate_type

Status = Literal["waiting", "running", "interrupted", "finished", "stopped", "early_stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "early_stopped", "failed")
"""Final statuses: a trial with one of these is not run again when its search is resumed."""
TRIALS = "trials"
"""Folder of a search's trials, each in a subfolder named by its identity."""
RECORD = "trial.json"
READERS = 10
"""Records to read concurrently: as many as the connections that an S3 client keeps."""
_log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Trial:
    """One trial of a search: its config, and its results so far."""

    number: int
    identity: str
    config: RunConfig[Any]
    params: dict[str, Any]
    """The values of the space's parameters, as Optuna drew them; empty if the space cannot express the config."""
    distributions: dict[str, str]
    """Their distributions, in Optuna's JSON."""
    fields: dict[str, Any]
    """The fields of the config that the space set."""
    run: dict[str, Any] = field(default_factory=dict)
    """The address of its MLflow run: the fields of ``tracking.runs.Run`` without the tracking store's address."""
    status: Status = "waiting"
    reason: str = ""
    """Why it ended before its last step."""
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """The metrics of its best evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Its evaluations as reported to Tune: step, metric and, while it could be stopped, the rung's step."""
    seconds: float = 0.0
    """Running time in seconds, summed over all resumptions."""
    started_at: float = 0.0
    """Unix time of its first start; 0 before it."""
    ended_at: float = 0.0
    baseline: float | None = None
    """Bits per byte of the n-gram that early stopping compares it with; ``None`` without such a comparison."""
    origin: str = ""
    """Reference in ``--warm-start`` that gave its config; empty for a config that was drawn."""
    confirms: int | None = None
    """Number of the trial whose config it repeats with a new seed; ``None`` for a trial of the search itself."""
    member: int | None = None
    """Number of the population member whose run it is a part of; ``None`` without a population."""
    end: int | None = None
    """Step after which such a part ends."""
    continues: str = ""
    """Identity of the trial from whose last state such a part continues; empty for a part that begins at step 0."""

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.number:03}"

    @property
    def last_step(self) -> int:
        """Step after which it ends, unless something ends it earlier."""
        return self.config.steps if self.end is None else self.end

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def point(self) -> tuple[float, float]:
        """Return the negative ELBO of its best evaluation and its use of the code; NaN for a missing value."""
        return self.best.get(METRIC, math.nan), code_use(self.best)

    def to_json(self) -> bytes:
        """Return the record as JSON. Non-finite metrics are stored as text."""
        values = {**vars(self), "config": to_dict(self.config)}
        return json.dumps(_encoded(values), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Trial:
        """Return the trial that a record describes.

        Raises:
            ValueError: it is not a record.
        """
        values = validate_type(_decoded(parse_json(text)), dict[str, Any], "it")
        try:
            config = from_dict(values.get("config", {}))
        except UserError as error:
            raise ValueError(str(error)) from None
        trial = validate_object(cls, {**values, "config": config})
        _check(trial)
        return trial

    @property
    def on_the_space(self) -> bool:
        """True if it is a drawn point of the search space, and its result depends on that point alone.

        The config of a warm start need not be a point, and a repeat is none. The result of a part that continues from
        another state also depends on that state.
        """
        return self.confirms is None and not self.continues and (not self.origin or bool(self.distributions))


def _check(trial: Trial) -> None:
    """Make sure that a record has the values that readers of trials expect.

    Raises:
        ValueError: a value is wrong; the message names it.
    """
    for name in ("number", "step", "confirms", "member", "end"):
        if (getattr(trial, name) or 0) < 0:
            raise ValueError(f"{name} is {getattr(trial, name)}")
    if (trial.member is None) != (trial.end is None) or not 0 < trial.last_step <= trial.config.steps:
        raise ValueError(f"end is {trial.end}, member is {trial.member}, of {trial.config.steps} steps")
    checked_key(trial.identity)
    if trial.continues:
        checked_key(trial.continues)
    if trial.best and (missing := set(REQUIRED_METRICS) - trial.best.keys()):
        raise ValueError(f"best has no {min(missing)}")
    validate_type(trial.run.get("run_id", ""), str, "run.run_id")
    for entry in trial.history:
        validate_type(entry.get("step"), int, "history.step")
        validate_type(entry, dict[str, float], "history")


_NOT_FINITE = ("nan", "inf", "-inf")


def _encoded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encoded(item) for item in value]
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"float"} and value["float"] in _NOT_FINITE:
            return float(value["float"])
        return {key: _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def trial_location(search: Storage, identity: str) -> Storage:
    """Return the storage of one trial, below that of its search."""
    return search.child(f"{TRIALS}/{identity}")


def trial_of(uri: str) -> Trial | None:
    """Return the trial that wrote the checkpoint at ``uri``; ``None`` if no trial did.

    Raises:
        UserError: its record cannot be read.
        StorageError: the storage does not answer.
    """
    location, _, folder = uri.rpartition("/")[0].rpartition("/")  # .../TRIAL/checkpoints/step-N
    if folder != CHECKPOINTS or uri.startswith("models:/"):
        return None
    storage = open_storage(location or "/")
    return read_record(storage, RECORD) if storage.exists(RECORD) else None


def read_record(storage: Storage, key: str) -> Trial:
    """Return the trial whose record is under ``key``.

    Raises:
        UserError: it is not the record of a trial.
    """
    try:
        return Trial.from_json(storage.read(key))
    except ValueError as error:
        raise UserError(f"{storage.uri(key)} is not the record of a trial: {error}") from None


class TrialStore:
    """Stores the records of a search's trials, keeping the newest state of each.

    ``heard`` is called with each recorded trial, in the thread that records it.
    """

    def __init__(self, storage: Storage, heard: Callable[[Trial], None] | None = None) -> None:
        self._storage = storage
        self._heard = heard
        self._waiting: dict[str, bytes] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-records")
        self._last: Future[None] | None = None

    def read(self, known: Iterable[Trial] = ()) -> list[Trial]:
        """Return all recorded trials, by number; do not read again those in ``known`` that have ended.

        Raises:
            UserError: a record cannot be read.
        """
        ended = {self._key(trial): trial for trial in known if trial.ended}
        keys = [key for key in self._storage.list(TRIALS) if key.endswith(f"/{RECORD}")]
        with ThreadPoolExecutor(READERS, thread_name_prefix="read-records") as readers:
            others = readers.map(partial(read_record, self._storage), [key for key in keys if key not in ended])
            trials = [*others, *(ended[key] for key in keys if key in ended)]
        return sorted(trials, key=lambda trial: trial.number)

    def add(self, trial: Trial) -> None:
        """Write the record of a new trial before it runs; from then on it is never drawn again.

        Raises:
            StorageError: the storage did not accept it within ``patience()`` seconds.
        """
        self._write(self._key(trial), trial.to_json())
        if self._heard is not None:
            self._heard(trial)

    def update(self, trial: Trial) -> None:
        """Write the new state of a trial in the background soon."""
        self._waiting[self._key(trial)] = trial.to_json()
        self._last = self._thread.submit(self._write_waiting)
        if self._heard is not None:
            self._heard(trial)

    def close(self) -> None:
        """Block until everything is written.

        Raises:
            StorageError: the storage did not accept it.
        """
        self._thread.shutdown()
        if self._last is not None:
            self._last.result()

    def location(self, identity: str) -> Storage:
        """Return the storage of one trial."""
        return trial_location(self._storage, identity)

    def _key(self, trial: Trial) -> str:
        return f"{TRIALS}/{trial.identity}/{RECORD}"

    def _write_waiting(self) -> None:
        for key in list(self._waiting):
            text = self._waiting.pop(key)
            try:
                self._write(key, text)
            except StorageError:
                self._waiting.setdefault(key, text)  # sent with the next one
                raise

    def _write(self, key: str, text: bytes) -> None:
        retry_storage(lambda: self._storage.write(key, text))


def rank(trials: list[Trial], search_objective: SearchObjective) -> list[Trial]:
    """Return the trials from best to worst, those without metrics last."""
    return sorted(trials, key=lambda trial: search_objective.score(trial.best))
