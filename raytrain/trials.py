"""The trials of a search: what is known of each, written down so that a search can go on after anything died."""

from __future__ import annotations

import json
import logging
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from raytrain.config import RunConfig, from_dict, to_dict
from raytrain.errors import UserError
from raytrain.storage import Storage, StorageError

if TYPE_CHECKING:
    import optuna

METRIC = "bits_per_byte"
"""What trials are compared on: the full bound on the same validation samples, whatever their annealing."""
Status = Literal["waiting", "running", "interrupted", "finished", "stopped", "failed"]
ENDED: tuple[Status, ...] = ("finished", "stopped", "failed")
"""A trial in one of these is not run again when its search is resumed."""
TRIALS = "trials"
"""Where under a search's storage its trials are, each in a folder that its identity names."""
RECORD = "trial.json"
PATIENCE_S = 600.0
"""How long a record is tried to be written while the storage is away."""

_log = logging.getLogger(__name__)


@dataclass
class Trial:
    """One point of the search, and what is known of it."""

    number: int
    identity: str
    config: RunConfig[Any]
    params: dict[str, Any]
    """The values of the space's parameters, as Optuna drew them."""
    distributions: dict[str, str]
    """Their distributions, in Optuna's JSON."""
    fields: dict[str, Any]
    """The fields of the config that the space has set."""
    run: dict[str, Any] = field(default_factory=dict)
    """The address of its MLflow run: the fields of ``tracking.Run``, without the store's."""
    status: Status = "waiting"
    reason: str = ""
    """Why it ended before its last step."""
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """The figures of its best evaluation."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """Its evaluations as Tune got them: step, metric and, where it could be stopped, the rung's step."""
    seconds: float = 0.0
    """Time that it ran for, over all resumptions."""
    started_at: float = 0.0
    """Unix time of its first start; 0 before."""
    ended_at: float = 0.0

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.number:03}"

    @property
    def ended(self) -> bool:
        return self.status in ENDED

    def to_json(self) -> bytes:
        """The record; figures that are not finite are kept as text."""
        values = {**vars(self), "config": to_dict(self.config)}
        return json.dumps(_encoded(values), indent=1).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Trial:
        """The trial of a record.

        Raises:
            UserError, ValueError, TypeError, KeyError: not a record.
        """
        values = _decoded(json.loads(text))
        return cls(**{**values, "config": from_dict(values["config"])})

    def known_to(self, study: optuna.Study) -> None:
        """Tell Optuna of a trial that ended before the search was resumed."""
        import optuna

        distributions = optuna.distributions
        finished = self.status != "failed" and not math.isnan(self.best.get(METRIC, math.nan))
        study.add_trial(
            optuna.trial.create_trial(
                state=optuna.trial.TrialState.COMPLETE if finished else optuna.trial.TrialState.FAIL,
                params=self.params,
                distributions={
                    name: distributions.json_to_distribution(text) for name, text in self.distributions.items()
                },
                value=self.best[METRIC] if finished else None,
                intermediate_values={entry["step"]: entry[METRIC] for entry in self.history},
            )
        )


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


class Records:
    """Keeps the records of a search's trials under its storage, the newest state of each."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._waiting: dict[str, bytes] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trial-records")
        self._last: Future[None] | None = None

    def read(self) -> list[Trial]:
        """Every trial that was recorded, by number.

        Raises:
            UserError: a record cannot be read.
        """
        trials = []
        for key in self._storage.list(TRIALS):
            if key.endswith(f"/{RECORD}"):
                try:
                    trials.append(Trial.from_json(self._storage.read(key)))
                except (UserError, ValueError, TypeError, KeyError) as error:
                    raise UserError(f"{self._storage.uri(key)} is not the record of a trial: {error}") from None
        return sorted(trials, key=lambda trial: trial.number)

    def add(self, trial: Trial) -> None:
        """Write the record of a new trial, before it runs: from then on it is never drawn again.

        Raises:
            StorageError: the storage did not take it for ``PATIENCE_S``.
        """
        self._write(self._key(trial), trial.to_json())

    def update(self, trial: Trial) -> None:
        """Write the new state of a trial soon, in the background."""
        self._waiting[self._key(trial)] = trial.to_json()
        self._last = self._thread.submit(self._write_waiting)

    def close(self) -> None:
        """Return when all is written.

        Raises:
            StorageError: the storage did not take it.
        """
        self._thread.shutdown()
        if self._last is not None:
            self._last.result()

    def place(self, identity: str) -> Storage:
        """The storage of one trial."""
        return self._storage.child(f"{TRIALS}/{identity}")

    def _key(self, trial: Trial) -> str:
        return f"{TRIALS}/{trial.identity}/{RECORD}"

    def _write_waiting(self) -> None:
        for key in list(self._waiting):
            text = self._waiting.pop(key)
            try:
                self._write(key, text)
            except StorageError:
                self._waiting.setdefault(key, text)  # goes out with the next one
                raise

    def _write(self, key: str, text: bytes) -> None:
        deadline, pause = time.monotonic() + PATIENCE_S, 1.0
        while True:
            try:
                self._storage.write(key, text)
                return
            except StorageError as error:
                if time.monotonic() + pause > deadline:
                    raise
                _log.warning("the record of a trial is not written yet, trying again: %s", error)
            time.sleep(pause)
            pause = min(2 * pause, 15.0)


def rank(trials: list[Trial]) -> list[Trial]:
    """The trials from best to worst; those without figures last."""
    values = (trial.best.get(METRIC, math.nan) for trial in trials)
    order = [math.inf if math.isnan(value) else value for value in values]
    return [trials[index] for index in sorted(range(len(trials)), key=order.__getitem__)]


def table(trials: list[Trial]) -> dict[str, list[Any]]:
    """One row a trial, as columns: what ``trials.parquet`` holds."""
    rows = [_row(trial) for trial in trials]
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(trial: Trial) -> dict[str, Any]:
    row: dict[str, Any] = {
        "number": trial.number,
        "name": trial.name,
        "run_id": trial.run.get("run_id", ""),
        "status": trial.status,
        "reason": trial.reason,
        "model": trial.config.model_name,
        "length": trial.config.length,
        "seed": trial.config.seed,
        "step": trial.step,
        "steps": trial.config.steps,
        "seconds": trial.seconds,
        "started_at": trial.started_at,
        "ended_at": trial.ended_at,
    }
    row |= {name: trial.best.get(name) for name in ("bound", "bits_per_byte", "reconstruction", "kl", "active_units")}
    # a column has one type: values of several kinds, and lists, go in as text
    row |= {f"param/{name}": value for name, value in trial.params.items()}
    return row | {f"field/{name}": _plain(value) for name, value in trial.fields.items()}


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value
