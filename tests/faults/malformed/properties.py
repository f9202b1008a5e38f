"""What hypothesis draws: values of every shape where JSON, text or a name is expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from raytrain.config.schema import from_dict, override, to_dict
from raytrain.data.readers import read
from raytrain.data.reading import Reading, Selection
from raytrain.runs.checkpoint import load
from raytrain.runs.records import PLAN, read_values
from raytrain.runs.trials import Trial
from raytrain.storage import open_storage
from raytrain.tracking.unsent import read_file
from tests.faults.malformed.data_kinds import lines
from tests.faults.malformed.record_kinds import agrees
from tests.faults.malformed.stock import config

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
WHOLE = to_dict(config())
RECORD = json.loads(
    Trial(number=0, identity="0" * 16, config=config(), params={}, distributions={}, fields={}).to_json()
)
PATHS = st.sampled_from(list(WHOLE) + [f"{part}.{name}" for part in ("model", "objective", "optimizer")
                                                    for name in WHOLE[part]])  # fmt: skip
LINE = {"run_id": "0" * 32, "step": 1, "timestamp_ms": 1, "metrics": {"a": 1.0}}


@dataclass(frozen=True)
class Property:
    """An input of any shape, and what reads it."""

    values: st.SearchStrategy[Any]
    read: Callable[[Any, Path], None]
    """The value, and the folder to write it to as a file."""


def _changed(whole: dict[str, Any], at: str, value: Any) -> dict[str, Any]:
    section, _, key = at.rpartition(".")
    return {**whole, section: {**whole[section], key: value}} if section else {**whole, key: value}


def _config(drawn: tuple[str, Any], given: Path) -> None:
    values = _changed(WHOLE, *drawn)
    agrees(to_dict(from_dict(values)), values)


def _override(changes: dict[str, Any], given: Path) -> None:
    flat = to_dict(override(config(), changes))
    for name, value in changes.items():
        section, _, key = name.rpartition(".")
        agrees((flat[section] if section else flat)[key], json.loads(json.dumps(value)))


def _text(data: bytes, given: Path) -> None:
    (given / "a.txt").write_bytes(data)
    assert list(read(given / "a.txt", "a.txt", Reading())) == lines(data)


def _json_lines(items: list[Any], given: Path) -> None:
    (given / "a.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    found = list(read(given / "a.jsonl", "a.jsonl", Reading(Selection("text"))))
    assert found == [(item["text"] or "").encode("utf-8", "surrogatepass") for item in items]


def _trial(values: dict[str, Any], given: Path) -> None:
    from raytrain.runs.trials import TrialStore

    folder = given / "trials" / "0" / "trial.json"
    folder.parent.mkdir(parents=True)
    folder.write_text(json.dumps({**RECORD, **values}))
    (trial,) = TrialStore(open_storage(given)).read()
    assert Trial.from_json(trial.to_json()).to_json() == trial.to_json()


def _plan(value: Any, given: Path) -> None:
    (given / PLAN).write_text(json.dumps(value))
    read_values(open_storage(given))


def _unsent(items: list[dict[str, Any]], given: Path) -> None:
    (given / "unsent.jsonl").write_text("".join(json.dumps({**LINE, **item}) + "\n" for item in items))
    assert sum(map(len, read_file(given / "unsent.jsonl").values())) == len(items)


def _manifest(value: Any, given: Path) -> None:
    (given / "manifest.json").write_text(json.dumps(value))
    load(given)
    raise AssertionError("a checkpoint without files was read")


PROPERTIES: dict[str, Property] = {
    "drawn config": Property(st.tuples(PATHS, JSON), _config),
    "drawn override": Property(st.dictionaries(PATHS | st.text(max_size=9), JSON, max_size=2), _override),
    "drawn text": Property(st.binary(max_size=200), _text),
    "drawn jsonl": Property(st.lists(JSON | st.fixed_dictionaries({"text": SCALARS}), max_size=4), _json_lines),
    "drawn trial": Property(st.dictionaries(st.sampled_from(sorted(RECORD)), JSON, max_size=2), _trial),
    "drawn plan": Property(JSON, _plan),
    "drawn unsent": Property(
        st.lists(st.dictionaries(st.sampled_from(sorted(LINE)), JSON, max_size=2), max_size=3), _unsent
    ),
    "drawn manifest": Property(JSON, _manifest),
}
