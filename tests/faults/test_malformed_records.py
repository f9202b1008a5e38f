"""Configs, records of runs and searches, and search spaces that say what cannot be: one line each."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import from_dict, to_dict
from raytrain.data.corpus import Corpus
from raytrain.metrics import SearchObjective
from raytrain.runs.records import OUTCOME, read_outcome
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.algorithms import add_to_study
from raytrain.search.space import check_space, read_space
from raytrain.storage import open_storage
from raytrain.tracking.__main__ import main as send
from raytrain.training.checks import check_samples
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.faults.malformed.stock import small_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return small_corpus(tmp_path / "corpus")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model": {"name": ["hybrid"]}}, "model.name must be one of"),
        ({"model": {"name": "byte_lstm", "layers": 10**9}}, r"model.layers is 1000000000: must be in \[1, 256\]"),
        ({"optimizer": {"learning_rate": 10**400}}, "must be a finite number"),
        ({"steps": 2**63}, "steps is a number of 64 bits"),
        ({"data": "\ud800"}, "config: data is not valid UTF-8"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        from_dict({**to_dict(tiny_config("hybrid")), **change})


def test_a_model_that_cannot_be_built_is_one_line(corpus: Corpus) -> None:
    config = dataclasses.replace(tiny_config("byte_lstm"), model=ByteLstmConfig(1, 2**40, 0.0))
    with pytest.raises(UserError, match="the model of this config cannot be built"):
        check_samples(config, corpus, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "../../x"},
        {"number": "1"},
        {"best": {"bits_per_byte": "low"}},
        {"status": "gone"},
        {"run": [1]},
        {"best": {"bits_per_byte": 2.0}},
        {"history": [{"bits_per_byte": 2.0}]},
        {"step": -1},
        {"unheard": 1},
    ],
)
def test_a_record_with_a_value_that_cannot_be_is_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    values = json.loads(
        Trial(
            number=0, identity="0" * 16, config=tiny_config("hybrid"), params={}, distributions={}, fields={}
        ).to_json()
    )
    file = tmp_path / "trials" / "0" / "trial.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(values | change))
    with pytest.raises(UserError, match="is not the record of a trial"):
        TrialStore(open_storage(tmp_path)).read()


def test_a_record_with_a_point_that_no_space_has_is_one_line() -> None:
    kind = '{"name": "FloatDistribution", "attributes": {"step": null, "low": 0.0, "high": 1.0, "log": false}}'
    trial = Trial(
        number=0,
        identity="0" * 16,
        config=tiny_config("hybrid"),
        params={"a": 0.5},
        distributions={"a": kind},
        fields={},
        status="finished",
    )
    add_to_study(optuna.create_study(), trial, SearchObjective())
    for params, kinds in (({"a": 7.0}, {"a": kind}), ({"a": 0.5}, {}), ({"a": 0.5}, {"a": "{}"})):
        trial.params, trial.distributions = params, kinds
        with pytest.raises(UserError, match="the record of trial 000 has no point of a search"):
            add_to_study(optuna.create_study(), trial, SearchObjective())


FIGURES_OF_A_RUN = {"bound": 9.0, "bits_per_byte": 2.0, "reconstruction": 8.0, "kl": math.nan, "active_units": 1.0}
ENDED = {"best_step": 5, "best": FIGURES_OF_A_RUN, "precision": "float32", "device": "cpu", "samples": ["a"]}


def test_an_outcome_is_read_back(tmp_path: Path) -> None:
    assert read_outcome(str(tmp_path)) is None
    for whole in (ENDED, {"early_stopped": "it diverged", "last_good": 3, "unsent": 2}, {"error": "ValueError"}):
        (tmp_path / OUTCOME).write_text(json.dumps(whole))
        assert repr(read_outcome(str(tmp_path))) == repr(whole)


@pytest.mark.parametrize(
    "text",
    [
        b"", b"[]", b"\xff", b"[" * 5000, b'{"error": 1}', b"{}", b'{"early_stopped": "x", "unsent": "2"}',
        *(json.dumps({**ENDED, name: None}).encode() for name in ENDED),
        json.dumps({**ENDED, "best": {"bound": 9.0}}).encode(),
    ],
)  # fmt: skip
def test_an_outcome_that_is_none_is_one_line(tmp_path: Path, text: bytes) -> None:
    (tmp_path / OUTCOME).write_bytes(text)
    with pytest.raises(UserError, match=r"outcome\.json is not the outcome of a run .*: delete it"):
        read_outcome(str(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "raise SystemExit(0)\n",
        "def space(trial):\n    return {'model.latent': trial.suggest_int('z', 1, 10**15)}\n",
        "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', 0, 1, step=1e-15)}\n",
    ],
)
def test_a_space_that_ends_python_or_has_no_end_is_one_line(source: str) -> None:
    with pytest.raises(UserError, match=r"SystemExit|the grid has more than 10,000 points"):
        check_space(read_space("mine", source), {"hybrid": tiny_config("hybrid")}, None, "grid", 0)


@pytest.mark.parametrize("change", [{"step": 2**70}, {"step": -1}, {"timestamp_ms": 1.5}, {"run_id": "../x"}])
def test_metrics_that_no_store_can_hold_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    record = {"run_id": "0" * 32, "step": 1, "timestamp_ms": 1, "metrics": {"a": 1.0}}
    (tmp_path / "unsent.jsonl").write_text(json.dumps(record | change))
    with pytest.raises(UserError, match="line 1: not a record"):
        send(["send", str(tmp_path / "unsent.jsonl")])
