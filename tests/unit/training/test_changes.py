"""Configs that change during a run: when, what of, and that a run in parts is the run in one piece."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.config.changes import CHANGEABLE, Change
from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, RunConfig, from_dict, in_force, to_dict, with_steps
from raytrain.data.corpus import Corpus
from raytrain.runs.checkpoint import Checkpoint
from raytrain.runs.repeats import Confirm
from raytrain.storage import open_storage
from raytrain.train import read_command
from raytrain.training.loop import Part, train
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.training.test_loop import Recorder, Stop, final

OBJECTIVE = ObjectiveConfig(annealing="constant", alpha=0.5)
CHANGES = (
    Change(10, "objective.weight", 0.3),
    Change(10, "optimizer.learning_rate", 5e-3),
    Change(20, "objective.input_dropout", 0.4),
    Change(20, "objective.alpha", 0.1),
)
CONFIG = tiny_config(
    "hybrid", steps=40, objective=OBJECTIVE, optimizer=OptimizerConfig(schedule="constant"), changes=CHANGES
)


def trained(
    config: RunConfig[Any], corpus: Corpus, folder: Path, part: Part | None = None, stop_at: int | None = None
) -> Recorder:
    recorder = Recorder(stop_at)
    try:
        train(config, corpus, World(), open_storage(folder), recorder, part=part)
    except Stop:
        assert stop_at is not None
    return recorder


def tensors(stored: Checkpoint) -> dict[str, torch.Tensor]:
    return {f"{stem}.{name}": value for stem in ("model", "optimizer") for name, value in stored.tensors(stem).items()}


def assert_equal(folder: Path, other: Path) -> None:
    mine, theirs = tensors(final(folder)), tensors(final(other))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_config_holds_up_to_its_next_change() -> None:
    found = [in_force(CONFIG, step) for step in (0, 9, 10, 19, 20, 40)]
    assert [config.objective.weight for config in found] == [1.0, 1.0, 0.3, 0.3, 0.3, 0.3]
    assert [config.objective.input_dropout for config in found] == [0.0, 0.0, 0.0, 0.0, 0.4, 0.4]
    assert {config.changes for config in found} == {()}
    assert found[0] == replace(CONFIG, changes=())
    assert in_force(replace(CONFIG, changes=CHANGES[::-1]), 40) == found[-1]
    later = Change(30, "objective.weight", 0.9)
    assert in_force(replace(CONFIG, changes=(later, *CHANGES)), 40).objective.weight == 0.9


def test_changes_move_with_the_number_of_steps() -> None:
    longer = with_steps(CONFIG, 400)
    assert [change.step for change in longer.changes] == [100, 100, 200, 200]
    assert with_steps(longer, 40) == CONFIG
    assert [change.step for change in with_steps(CONFIG, 2).changes] == [1, 1, 1, 1]
    assert with_steps(CONFIG, 1).changes == ()
    rule = Confirm(configs=1, seeds=1, first_seed=1000, steps=20)
    assert rule.repeat(CONFIG, 1000) == replace(with_steps(CONFIG, 20), seed=1000)


def test_a_command_line_moves_changes_and_does_not_contradict_them(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(CONFIG)))
    given = ["hybrid", "--config", str(file)]
    assert read_command([*given, "--steps", "400"], False)[1] == with_steps(CONFIG, 400)
    assert read_command(given, False)[1] == CONFIG
    with pytest.raises(UserError, match=r"--objective.input-dropout: the config changes objective.input_dropout"):
        read_command([*given, "--objective.input-dropout", "0.1"], False)


def test_a_run_in_parts_is_the_run_in_one_piece(corpus: Corpus, tmp_path: Path) -> None:
    """Each part knows only the changes up to its end, and starts from what another run has left."""
    trained(CONFIG, corpus, tmp_path / "whole")
    origin = None
    for end in (10, 20, 40):
        known = tuple(change for change in CHANGES if change.step < end)
        recorder = trained(replace(CONFIG, changes=known), corpus, tmp_path / str(end), Part(end, origin))
        assert [entry["step"] for entry in recorder.heard] == list(range(10, end - end // 2 * (end > 10) + 1, 10))[
            : 0 if end == 10 else None
        ]
        assert max(recorder.records) == final(tmp_path / str(end)).step == end
        origin = open_storage(tmp_path / str(end))
    assert_equal(tmp_path / "40", tmp_path / "whole")


def test_a_part_whose_origin_is_lost_takes_all_steps(corpus: Corpus, tmp_path: Path) -> None:
    trained(CONFIG, corpus, tmp_path / "whole")
    trained(CONFIG, corpus, tmp_path / "part", Part(40, open_storage(tmp_path / "nothing")))
    assert_equal(tmp_path / "part", tmp_path / "whole")


def test_a_part_is_resumed_from_its_own_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    trained(CONFIG, corpus, tmp_path / "whole")
    trained(replace(CONFIG, changes=CHANGES[:2]), corpus, tmp_path / "first", Part(20, None))
    part = Part(40, open_storage(tmp_path / "first"))
    trained(CONFIG, corpus, tmp_path / "second", part, stop_at=30)
    recorder = trained(CONFIG, corpus, tmp_path / "second", part)
    assert [entry["step"] for entry in recorder.heard] == [10, 20, 30]
    assert_equal(tmp_path / "second", tmp_path / "whole")


def test_the_best_checkpoint_of_a_part_is_its_own(corpus: Corpus, tmp_path: Path) -> None:
    bad = replace(CONFIG, changes=(Change(20, "optimizer.learning_rate", 0.5),))
    trained(replace(bad, changes=()), corpus, tmp_path / "first", Part(20, None))
    trained(bad, corpus, tmp_path / "second", Part(40, open_storage(tmp_path / "first")))
    state = final(tmp_path / "second").state
    by_step = {entry["step"]: entry["bound"] for entry in state["evaluations"]}
    assert min(by_step, key=lambda step: by_step[step]) in (10, 20)
    assert state["best_step"] in (30, 40)


@pytest.mark.parametrize("field", CHANGEABLE)
def test_each_change_is_felt_from_its_step_on(corpus: Corpus, field: str) -> None:
    objective = replace(OBJECTIVE, rate=2.0) if field == "objective.rate" else OBJECTIVE
    section, _, name = field.partition(".")
    plain = replace(CONFIG, changes=(), objective=objective)
    value = 2.0 if field == "objective.free_bits" else 0.5 * (getattr(getattr(plain, section), name) or 0.8)
    trainers = [
        Trainer(config, corpus, World()) for config in (plain, replace(plain, changes=(Change(2, field, value),)))
    ]
    for step in range(4):
        for trainer in trainers:
            trainer.train_step(step)
        mine, theirs = (torch.cat([p.flatten() for p in trainer.raw.parameters()]) for trainer in trainers)
        if step != 2 or field != "objective.rate":  # which moves the multiplier, and that the weights a step later
            assert torch.equal(mine, theirs) == (step < 2), step


def test_recorded_steps_do_not_outlive_a_change(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps the input dropout that it was recorded with."""
    made: list[RunConfig[Any]] = []

    class Recording:
        works = True

        def run(self, batch: Any, step: int, plain: Any) -> Any:
            return trainer.compute_step(plain())

    trainer = Trainer(CONFIG, corpus, World())

    def new_recorder() -> Any:
        made.append(trainer.current)
        return Recording()

    monkeypatch.setattr(trainer, "new_recorder", new_recorder)
    trainer.recorder = new_recorder()
    for step in (0, 9, 10, 11, 20, 39):
        trainer.train_step(step)
    assert made == [in_force(CONFIG, step) for step in (0, 10, 20)]


def test_the_log_has_the_schedule_that_was_trained_with(corpus: Corpus, tmp_path: Path) -> None:
    records = trained(CONFIG, corpus, tmp_path).records
    assert [records[step]["train/kl_weight"] for step in (5, 10, 15, 40)] == [1.0, 1.0, 0.3, 0.3]
    assert [records[step]["train/learning_rate"] for step in (10, 15)] == [1e-3, 5e-3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [{"step": 8, "field": "model.hidden", "value": 1.0}],
            "changes.field is 'model.hidden': what may change during",
        ),
        ([{"step": 0, "field": "objective.weight", "value": 1.0}], "changes.step is 0: must be positive"),
        ([{"step": 8, "field": "objective.weight", "value": -1.0}], "objective.weight is -1.0: must not be negative"),
        ([{"step": 8, "field": "objective.weight"}], "changes has no value"),
        ([{"step": 8, "field": "objective.weight", "value": "a"}], "changes.value is 'a': must be a number"),
        ([{"step": 8, "field": "objective.rate", "value": 2.0}], "changes.value is 2.0: objective.rate may change"),
        ([{"step": 40, "field": "objective.weight", "value": 0.5}], "changes.step is 40: must be below steps"),
        ([3], "changes must be an object, got int"),
        ({}, "changes is {}: must be a list"),
    ],
)
def test_changes_that_cannot_be_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"config: {message}"):
        from_dict({**to_dict(CONFIG), "changes": changes})
    assert from_dict(to_dict(CONFIG)) == CONFIG
