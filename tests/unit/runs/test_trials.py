"""The records of a search's trials: what is known survives, whatever its figures are."""

from __future__ import annotations

import json
import math
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytrain.metrics import METRIC, REQUIRED_METRICS, SearchObjective
from raytrain.runs.trials import RECORD, TRIALS, Trial, TrialStore, rank
from raytrain.search.algorithms import add_to_study
from raytrain.search.finish import table, write_table
from raytrain.storage import base as storage_module
from raytrain.storage.base import StorageError
from raytrain.storage.local import FolderStorage
from raytrain.utils import retry as retry_module
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.examples import examples

CONFIG = tiny_config("hybrid")


def a_trial(number: int = 0, **changes: Any) -> Trial:
    values: dict[str, Any] = {"params": {}, "distributions": {}, "fields": {}}
    return Trial(number=number, identity=f"identity-{number}", config=CONFIG, **{**values, **changes})


def reached(value: float) -> dict[str, float]:
    """The figures of an evaluation with this metric."""
    return {**dict.fromkeys(REQUIRED_METRICS, 1.0), METRIC: value}


def same(first: Any, second: Any) -> bool:
    """Whether two values are equal and of the same types, NaN being equal to itself."""
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (math.isnan(first) and math.isnan(second))
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# -------------------------------------------------------------------------------------------- records

NAMES = st.text(max_size=6) | st.sampled_from(["float", "lr", "ä b", ""])
VALUES = st.floats() | st.integers(-(2**62), 2**62) | st.booleans() | st.none() | st.text(max_size=8)
DRAWN = st.dictionaries(NAMES, st.floats(), max_size=4)


@given(
    params=st.dictionaries(NAMES, VALUES, max_size=4),
    distributions=st.dictionaries(NAMES, st.text(max_size=8), max_size=4),
    fields=st.dictionaries(NAMES, VALUES | st.lists(VALUES, max_size=3), max_size=4),
    best=st.just({}) | DRAWN.map(lambda more: {**dict.fromkeys(REQUIRED_METRICS, math.nan), **more}),
    history=st.lists(DRAWN.map(lambda more: {**more, "step": 3}), max_size=4),
    seconds=st.floats(0, 1e9),
    status=st.sampled_from(["waiting", "running", "interrupted", "finished", "stopped", "failed"]),
    reason=st.text(max_size=10),
)
@settings(deadline=None, max_examples=examples(100))
def test_a_record_reads_back_as_it_was(**values: Any) -> None:
    trial = a_trial(3, step=7, run={"run_id": "r", "created_ms": 5}, **values)
    text = trial.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    found = Trial.from_json(text)
    assert found.config == CONFIG
    mine = vars(trial) | {"config": 0}
    assert same(vars(found) | {"config": 0}, mine)


@pytest.fixture
def storage(tmp_path: Path) -> FolderStorage:
    return FolderStorage(tmp_path)


def test_records_are_read_in_the_order_of_their_numbers(storage: FolderStorage) -> None:
    records = TrialStore(storage)
    assert records.read() == []
    for number in (10, 2, 0, 1):
        records.add(replace(a_trial(number), identity=f"{'zyx'[number % 3]}-{number}"))
    storage.write(f"{TRIALS}/x-1/checkpoints/step-00000001/state.json", b"{}")
    assert [trial.number for trial in TrialStore(storage).read()] == [0, 1, 2, 10]
    assert [trial.name for trial in TrialStore(storage).read()] == ["000", "001", "002", "010"]
    assert records.location("x-1").list("checkpoints") == ["checkpoints/step-00000001/state.json"]


def test_ended_trials_are_read_once(tmp_path: Path) -> None:
    """Not those that had not ended, nor new ones: another driver may have gone on before this one took the search."""

    class Watched(FolderStorage):
        def __init__(self, root: Path) -> None:
            super().__init__(root)
            self.keys = list[str]()

        def read(self, key: str) -> bytes:
            self.keys.append(key)
            return super().read(key)

    watched = Watched(tmp_path)
    store = TrialStore(watched)
    for number, status in enumerate(("finished", "running", "stopped")):
        store.add(a_trial(number, status=status))
    known = store.read()
    store.add(a_trial(1, status="finished"))
    store.add(a_trial(3))
    watched.keys.clear()
    assert [trial.status for trial in store.read(known)] == ["finished", "finished", "stopped", "waiting"]
    assert sorted(watched.keys) == ["trials/identity-1/trial.json", "trials/identity-3/trial.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text[:-9],
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: b"\xff",
        lambda text: text.replace(b'"number"', b'"nummer"'),
        lambda text: text.replace(b'"config"', b'"konfig"'),
        lambda text: text.replace(b'"length": 24', b'"length": "24"'),
        lambda text: text.replace(b'"length": 24', b'"length": 24, "unheard": 1'),
        lambda text: text.replace(b'"history": []', b'"history": [{}]'),
        lambda text: text.replace(b'"history": []', b'"history": [1]'),
        lambda text: text.replace(b'"history": []', b'"unheard": 1'),
    ],
)
def test_a_damaged_record_is_one_line_that_names_it(storage: FolderStorage, damage: Any) -> None:
    records = TrialStore(storage)
    records.add(a_trial(0))
    key = f"{TRIALS}/identity-0/{RECORD}"
    storage.write(key, damage(storage.read(key)))
    with pytest.raises(UserError, match=r"identity-0/trial\.json is not the record of a trial") as caught:
        records.read()
    assert "\n" not in str(caught.value)


class Slow(FolderStorage):
    """A storage that takes what it is given when it is let, and fails while it is broken."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()
        self.broken = False
        self.writes: list[tuple[str, int]] = []

    def write(self, key: str, data: bytes) -> None:
        assert self.open.wait(10)
        if self.broken:
            raise StorageError(f"cannot write {key}")
        self.writes.append((key.split("/")[1], json.loads(data)["step"]))
        super().write(key, data)


def test_updates_go_out_in_the_background_and_only_the_newest(tmp_path: Path) -> None:
    storage = Slow(tmp_path)
    records, trials = TrialStore(storage), [a_trial(0), a_trial(1)]
    for step in range(1, 51):
        for trial in trials:
            trial.step = step
            records.update(trial)  # returns though nothing can be written
    assert storage.writes == []
    storage.open.set()
    records.close()
    assert len(storage.writes) <= 4
    assert {trial.number: trial.step for trial in TrialStore(storage).read()} == {0: 50, 1: 50}


def test_a_state_that_was_not_taken_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage_module.PATIENCE, "0")
    storage = Slow(tmp_path)
    storage.open.set()
    storage.broken = True
    records = TrialStore(storage)
    records.update(a_trial(0, step=5))
    assert records._last is not None
    assert isinstance(records._last.exception(10), StorageError)
    storage.broken = False
    records.update(a_trial(1, step=6))
    records.close()
    assert {trial.number: trial.step for trial in TrialStore(storage).read()} == {0: 5, 1: 6}


def test_what_was_never_taken_is_said_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage_module.PATIENCE, "0")
    storage = Slow(tmp_path)
    storage.open.set()
    storage.broken = True
    records = TrialStore(storage)
    with pytest.raises(StorageError):
        records.add(a_trial(0))
    records.update(a_trial(0))
    with pytest.raises(StorageError, match="cannot write"):
        records.close()


def test_a_storage_that_comes_back_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Slow(tmp_path)
    storage.open.set()
    storage.broken = True

    def mend(seconds: float) -> None:
        storage.broken = False

    monkeypatch.setattr(retry_module.time, "sleep", mend)
    TrialStore(storage).add(a_trial(4))
    assert [trial.number for trial in TrialStore(storage).read()] == [4]


# ------------------------------------------------------------------------------------- order and table


def test_the_best_come_first_and_those_without_figures_last() -> None:
    values = [2.5, math.nan, 2.3, None, math.inf, 2.4]
    trials = [a_trial(number, best={} if value is None else {METRIC: value}) for number, value in enumerate(values)]
    ranked = [trial.number for trial in rank(trials, SearchObjective())]
    assert ranked[:3] == [2, 5, 0]
    assert set(ranked[3:]) == {1, 3, 4}


def test_what_has_ended() -> None:
    assert [a_trial(status=status).ended for status in ("waiting", "running", "interrupted")] == [False] * 3  # type: ignore[arg-type]
    assert [a_trial(status=status).ended for status in ("finished", "stopped", "failed")] == [True] * 3  # type: ignore[arg-type]


def test_the_table_has_one_row_a_trial_whatever_its_columns_hold(tmp_path: Path) -> None:
    figures = {"bound": 40.5, METRIC: 2.5, "reconstruction": 40.0, "kl": 0.5, "active_units": 2.0}
    trials = [
        a_trial(0, params={"lr": 0.1, "maps": "64-128", "depth": 2, "mixed": 1}, fields={"model.maps": [64, 128]}),
        a_trial(
            1,
            params={"lr": 1, "maps": None, "mixed": "one", "flag": True},
            fields={"model.maps": [64], "seed": 4},
            best=figures,
            status="finished",
            run={"run_id": "abc"},
        ),
        a_trial(2, params={"mixed": 1.5, "flag": 3}, best={METRIC: math.nan, "kl": math.inf}),
    ]
    columns = table(trials, SearchObjective())
    assert {len(values) for values in columns.values()} == {3}
    write_table(trials, SearchObjective(), tmp_path / "trials.parquet")
    found = pyarrow.parquet.read_table(tmp_path / "trials.parquet").to_pydict()
    assert list(found) == list(columns)
    assert found["number"] == [0, 1, 2]
    assert found["name"] == ["000", "001", "002"]
    assert found["model"] == ["hybrid"] * 3
    assert found["run_id"] == ["", "abc", ""]
    assert found["status"] == ["waiting", "finished", "waiting"]
    assert found["param/lr"] == [0.1, 1.0, None]
    assert found["param/maps"] == ["64-128", None, None]
    assert found["param/depth"] == [2, None, None]
    assert found["param/mixed"] == ["1", '"one"', "1.5"]
    assert found["param/flag"] == [None, "true", "3"]
    assert found["field/model.maps"] == ["[64, 128]", "[64]", None]
    assert found["field/seed"] == [None, 4, None]
    assert found["bound"] == [None, 40.5, None]
    assert same(found[METRIC], [None, 2.5, math.nan])
    assert found["kl"] == [None, 0.5, math.inf]


def test_a_table_of_nothing_can_be_read(tmp_path: Path) -> None:
    write_table([], SearchObjective(), tmp_path / "trials.parquet")
    assert pyarrow.parquet.read_table(tmp_path / "trials.parquet").num_rows == 0


# --------------------------------------------------------------------------------------------- Optuna


def test_optuna_is_told_the_best_of_what_ended() -> None:
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))

    def drawn(number: int, **changes: Any) -> Trial:
        point = source.ask()
        point.suggest_float("lr", 1e-4, 1e-1, log=True)
        point.suggest_categorical("maps", ["a", None, 3])
        point.suggest_int("depth", 2, 8, step=2)
        texts = {name: optuna.distributions.distribution_to_json(kind) for name, kind in point.distributions.items()}
        trial = a_trial(number, params=point.params, distributions=texts, **changes)
        return Trial.from_json(trial.to_json())

    history = [
        {"step": 5, METRIC: 2.5, "kl": 0.1},
        {"step": 10, METRIC: 2.2, "kl": 0.2},
        {"step": 15, METRIC: math.inf},
    ]
    trials = [
        drawn(0, status="finished", best=reached(2.2), history=history),
        drawn(1, status="stopped", best=reached(2.4)),
        drawn(2, status="failed", best=reached(1.0)),
        drawn(3, status="failed"),
        drawn(4, status="stopped"),
        drawn(5, status="finished", best=reached(math.nan), history=[{"step": 5, METRIC: math.nan}]),
    ]
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for trial in trials:
        add_to_study(study, trial, SearchObjective())
    states = optuna.trial.TrialState
    assert [told.state for told in study.trials] == [states.COMPLETE] * 2 + [states.FAIL] * 4
    assert [told.value for told in study.trials] == [2.2, 2.4, None, None, None, None]
    assert study.best_trial.number == 0
    assert [told.params for told in study.trials] == [trial.params for trial in trials]
    assert study.trials[0].intermediate_values == {5: 2.5, 10: 2.2, 15: math.inf}
    point = study.ask()  # and it draws on from them
    assert point.suggest_categorical("maps", ["a", None, 3]) in ("a", None, 3)
