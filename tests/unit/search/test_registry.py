"""The champion: only a verified better model takes the alias, whoever else wants it at the same moment."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from raytrain import models
from raytrain import registry as registry_command
from raytrain.config.models import HybridConfig
from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Checkpoint, Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.references import load_logged_model
from raytrain.search import registry
from raytrain.search.registry import (
    CHALLENGER,
    CHAMPION,
    Candidate,
    Score,
    VerificationError,
    promote,
    rollback,
    versions,
)
from raytrain.storage import open_storage
from raytrain.tracking import client as tracking_server
from raytrain.tracking import logged_model
from raytrain.tracking.logged_model import log_model
from raytrain.tracking.runs import Experiment, Run
from raytrain.utils.errors import UserError, run_command
from tests.conftest import tiny_config
from tests.support.mlflow_server import MlflowServer, mlflow_server, new_store

__all__ = ["mlflow_server"]

METRIC = "valid/bits_per_byte, 64 windows of 12"
METRICS = {"bits_per_byte": 2.5, "kl": 1.25, "active_units": 2.0}


@dataclass(frozen=True)
class Logged:
    """A model that a search has logged, and the checkpoint that it was made of."""

    run: Run
    model_id: str
    stored: Checkpoint

    def candidate(self, corpus: Corpus, score: Score) -> Candidate:
        """The same as a candidate with this score, whatever it has reached."""
        return Candidate(
            run=self.run, model_id=self.model_id, stored=self.stored, corpus=corpus, score=score, metrics=METRICS,
            card="# A card",
        )  # fmt: skip

    @property
    def weights(self) -> Path:
        """The file of its weights, in a store whose artifacts are a folder of this machine."""
        location = MlflowClient(self.run.uri).get_logged_model(self.model_id).artifact_location
        return next(Path(location).rglob("model.safetensors"))


def candidate(experiment: Experiment, folder: Path, seed: int) -> Logged:
    """An untrained model of this seed, logged on a run of its own."""
    config = replace(tiny_config("hybrid"), model=HybridConfig((4,), (4,), latent=2, hidden=8), length=12, seed=seed)
    weights = dict(models.build(config).state_dict())
    with CheckpointWriter(open_storage(folder / str(seed))) as writer:
        writer.save(Snapshot(40, {"model": weights}, {}, to_dict(config)), 2.5)
    stored = checkpoint.load(folder / str(seed) / "step-00000040")
    run = experiment.open_run(f"search-{seed}", f"search-{seed}", parameters={"seed": seed}, tags={})
    exported = checkpoint.export(stored, folder / f"{seed}-exported")
    return Logged(run, log_model(run, exported, card="# A card", metrics={}, step=40), stored)


@pytest.fixture(autouse=True)
def same_store(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow itself looks for the source of a version in the store that the variable names."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", experiment.uri)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("store")
    return Experiment.open(new_store(folder), "search", str(folder / "mlflow-artifacts"))


@pytest.fixture(scope="module")
def candidates(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> list[Logged]:
    """Four models; what each is said to have reached is up to the test."""
    folder = tmp_path_factory.mktemp("candidates")
    return [candidate(experiment, folder, seed) for seed in range(4)]


_NAMES = count(1)


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> str:
    """A registered model of the test's own."""
    name = f"raytrain-test-{next(_NAMES)}"
    monkeypatch.setattr(registry, "registered_name", lambda model: name)
    return name


@pytest.fixture
def register_and_compete(candidates: list[Logged], corpus: Corpus, name: str) -> Callable[..., tuple[int, str]]:
    """Enters one of the candidates; returns its version and alias."""

    def register_and_compete(number: int, value: float, *, digest: str = "d", metric: str = METRIC) -> tuple[int, str]:
        chosen = candidates[number]
        entered = registry.register_and_compete(chosen.candidate(corpus, Score(digest, metric, value)))
        assert entered[0] == name
        return entered[1:]

    return register_and_compete


def aliases(uri: str, name: str) -> dict[str, int]:
    """Alias -> version, as anyone sees them."""
    return {alias: int(version) for alias, version in MlflowClient(uri).get_registered_model(name).aliases.items()}


# --------------------------------------------------------------------------------------- competition


def test_what_models_are_registered_as() -> None:
    assert registry.registered_name("hybrid") == "raytrain-hybrid"


def test_the_first_is_champion_and_then_the_better(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, candidates: list[Logged], name: str
) -> None:
    uri = experiment.uri
    assert register_and_compete(0, 2.5) == (1, CHAMPION)
    assert aliases(uri, name) == {CHAMPION: 1}
    assert register_and_compete(1, 2.6) == (2, CHALLENGER)
    assert aliases(uri, name) == {CHAMPION: 1, CHALLENGER: 2}
    assert register_and_compete(2, 2.5) == (3, CHALLENGER)  # as good is not better
    assert register_and_compete(3, 2.4) == (4, CHAMPION)
    assert aliases(uri, name) == {CHAMPION: 4, CHALLENGER: 3}

    version = MlflowClient(uri).get_model_version_by_alias(name, CHAMPION)
    assert version.source == f"models:/{candidates[3].model_id}"
    assert version.run_id == candidates[3].run.run_id
    assert version.description == "# A card"
    assert registry.read_score(version) == Score("d", METRIC, 2.4)
    assert logged_model.logged_model(version) == candidates[3].model_id


def test_what_was_measured_on_something_else_only_challenges(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    assert register_and_compete(0, 2.5) == (1, CHAMPION)
    assert register_and_compete(1, 1.0, digest="another corpus") == (2, CHALLENGER)
    assert register_and_compete(2, 1.0, metric="valid/bits_per_byte, 64 windows of 60") == (3, CHALLENGER)
    assert aliases(experiment.uri, name) == {CHAMPION: 1, CHALLENGER: 3}
    assert register_and_compete(3, 2.4) == (4, CHAMPION)


def test_the_same_model_again_is_the_same_version(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    assert register_and_compete(0, 2.5) == register_and_compete(0, 2.5) == (1, CHAMPION)
    assert register_and_compete(1, 2.6) == register_and_compete(1, 2.6) == (2, CHALLENGER)
    assert register_and_compete(0, 2.5) == (1, CHAMPION)
    assert [int(version.version) for version in versions(experiment.uri, name)] == [1, 2]
    assert aliases(experiment.uri, name) == {CHAMPION: 1, CHALLENGER: 2}


def test_a_challenger_that_wins_after_all_is_no_challenger_any_more(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    register_and_compete(0, 2.5)
    register_and_compete(1, 2.6)
    MlflowClient(experiment.uri).delete_registered_model_alias(name, CHAMPION)
    MlflowClient(experiment.uri).delete_model_version(name, "1")
    assert register_and_compete(1, 2.6) == (2, CHAMPION)
    assert aliases(experiment.uri, name) == {CHAMPION: 2}


def test_a_version_of_other_means_never_wins_and_is_never_beaten(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, candidates: list[Logged], name: str
) -> None:
    client = MlflowClient(experiment.uri)
    client.create_registered_model(name)
    client.create_model_version(name, f"models:/{candidates[0].model_id}", candidates[0].run.run_id)
    assert register_and_compete(1, 9.0) == (2, CHAMPION)
    with pytest.raises(UserError, match="version 1 was not registered by raytrain"):
        promote(experiment.uri, name, 1)
    assert aliases(experiment.uri, name) == {CHAMPION: 2}
    client.set_registered_model_alias(name, CHAMPION, "1")  # somebody's decision
    assert register_and_compete(2, 1.0) == (3, CHALLENGER)
    assert rollback(experiment.uri, name) == (1, 2)


# -------------------------------------------------------------------------------------- verification


def test_an_altered_artifact_gets_no_alias(
    experiment: Experiment,
    tmp_path: Path,
    corpus: Corpus,
    register_and_compete: Callable[..., tuple[int, str]],
    name: str,
) -> None:
    register_and_compete(0, 2.5)
    bad = candidate(experiment, tmp_path, 10)
    data = bytearray(bad.weights.read_bytes())
    data[-1] ^= 1
    bad.weights.write_bytes(bytes(data))
    with pytest.raises(VerificationError, match=rf"model {bad.model_id}.*model\.safetensors was altered"):
        registry.register_and_compete(bad.candidate(corpus, Score("d", METRIC, 1.0)))
    assert aliases(experiment.uri, name) == {CHAMPION: 1}
    # nor does it when others look, or by hand
    assert register_and_compete(1, 2.6) == (3, CHALLENGER)
    with pytest.raises(UserError, match=bad.model_id):
        promote(experiment.uri, name, 2)
    assert aliases(experiment.uri, name) == {CHAMPION: 1, CHALLENGER: 3}
    # the artifact mended, the same search enters the same version
    data[-1] ^= 1
    bad.weights.write_bytes(bytes(data))
    entered = registry.register_and_compete(bad.candidate(corpus, Score("d", METRIC, 1.0)))
    assert entered == (name, 2, CHAMPION)


def test_other_weights_than_the_checkpoint_s_get_no_alias(
    candidates: list[Logged], corpus: Corpus, experiment: Experiment, name: str
) -> None:
    logged, other = candidates[0], candidates[1].stored
    with pytest.raises(
        VerificationError, match=r"negative ELBO of [\d.]+ nats on 64 validation samples, its checkpoint .* has"
    ):
        registry.register_and_compete(replace(logged.candidate(corpus, Score("d", METRIC, 1.0)), stored=other))
    assert aliases(experiment.uri, name) == {}


def test_artifacts_that_are_gone_are_one_line(
    experiment: Experiment, tmp_path: Path, corpus: Corpus, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking_server, "PATIENCE_S", 0.0)
    gone = candidate(experiment, tmp_path, 11)
    gone.weights.parent.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"model {gone.model_id} holds no checkpoint") as caught:
        load_logged_model(experiment.uri, gone.model_id)
    whole = Path(MlflowClient(experiment.uri).get_logged_model(gone.model_id).artifact_location)
    whole.rename(tmp_path / "whole")
    with pytest.raises(UserError, match=f"model {gone.model_id} cannot be fetched") as caught:
        load_logged_model(experiment.uri, gone.model_id)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="model m-nothing cannot be fetched"):
        load_logged_model(experiment.uri, "m-nothing")


# -------------------------------------------------------------------------------------------- by hand


def test_rollback_goes_back_and_back_again(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    uri = experiment.uri
    for number, value in enumerate([2.5, 2.4, 2.3]):
        assert register_and_compete(number, value) == (number + 1, CHAMPION)
    assert rollback(uri, name) == (3, 2)
    assert rollback(uri, name) == (2, 1)
    assert aliases(uri, name)[CHAMPION] == 1
    with pytest.raises(UserError, match="version 1 is the only champion"):
        rollback(uri, name)
    # what was rolled back does not come back because something else enters, however bad that is
    assert register_and_compete(3, 2.6) == (4, CHALLENGER)
    assert register_and_compete(2, 2.3) == (3, CHALLENGER)
    assert aliases(uri, name)[CHAMPION] == 1


def test_what_is_better_than_the_one_rolled_back_to_wins(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    register_and_compete(0, 2.5)
    register_and_compete(1, 2.3)
    rollback(experiment.uri, name)
    assert register_and_compete(2, 2.4) == (3, CHAMPION)
    assert rollback(experiment.uri, name) == (3, 1)


def test_promoting_is_for_good_and_can_be_taken_back(
    register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    uri = experiment.uri
    register_and_compete(0, 2.5)
    register_and_compete(1, 2.4)
    register_and_compete(2, 2.6)
    promote(uri, name, 3)
    assert aliases(uri, name)[CHAMPION] == 3
    assert register_and_compete(3, 2.7) == (4, CHALLENGER)  # worse than 3, and 1 and 2 do not come back by themselves
    assert aliases(uri, name)[CHAMPION] == 3
    assert rollback(uri, name) == (3, 2)
    promote(uri, name, 1)
    assert rollback(uri, name) == (1, 2)


def test_a_champion_by_hand_counts_even_while_a_search_ends(
    register_and_compete: Callable[..., tuple[int, str]],
    experiment: Experiment,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_and_compete(0, 2.5)
    register_and_compete(1, 2.4)
    mark, times = registry._mark, count()

    def slow_mark(uri: str, model: str, version: int) -> None:
        """The search has chosen its version and is about to move the alias: the user is faster."""
        mark(uri, model, version)
        if next(times) == 0:
            promote(uri, model, 1)

    monkeypatch.setattr(registry, "_mark", slow_mark)
    assert register_and_compete(2, 2.3) == (3, CHALLENGER)
    assert aliases(experiment.uri, name)[CHAMPION] == 1


def test_an_interrupted_rollback_can_be_repeated(
    register_and_compete: Callable[..., tuple[int, str]],
    experiment: Experiment,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number, value in enumerate([2.5, 2.4, 2.3]):
        register_and_compete(number, value)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_decide", die)
        with pytest.raises(KeyboardInterrupt):
            rollback(experiment.uri, name)
    assert aliases(experiment.uri, name)[CHAMPION] == 3
    rollback(experiment.uri, name)
    rollback(experiment.uri, name)
    assert aliases(experiment.uri, name)[CHAMPION] == 1


# ------------------------------------------------------------------------------------- several at once


def test_one_that_moves_the_alias_too_late_puts_it_right(
    register_and_compete: Callable[..., tuple[int, str]],
    experiment: Experiment,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    register_and_compete(0, 2.5)
    mark, times = registry._mark, count()

    def slow_mark(uri: str, model: str, version: int) -> None:
        """The search has seen that it is best and is about to move the alias: a better one is faster."""
        mark(uri, model, version)
        if next(times) == 0:
            assert register_and_compete(2, 2.3) == (3, CHAMPION)

    monkeypatch.setattr(registry, "_mark", slow_mark)
    assert register_and_compete(1, 2.4) == (2, CHALLENGER)
    assert aliases(experiment.uri, name) == {CHAMPION: 3, CHALLENGER: 2}


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> list[Logged]:
    """Four models in a tracking server."""
    experiment = Experiment.open(mlflow_server.uri, "registry", "")
    folder = tmp_path_factory.mktemp("served")
    return [candidate(experiment, folder, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def fork(served: list[Logged], corpus: Corpus) -> Iterator[Callable[..., Any]]:
    """Starts a function in a process of its own; MLflow is imported already, as it takes seconds."""
    processes = []
    context = multiprocessing.get_context("fork")

    def start(target: Callable[..., None], *arguments: Any) -> Any:
        process = context.Process(target=target, args=arguments)
        process.start()
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.join()


def search_ends(
    chosen: Logged, corpus: Corpus, name: str, value: float, prepare: Callable[[], None], pause: float = 0.0
) -> None:
    """What a search does at its end, in a process of its own: exits with 0 as champion, with 1 as challenger."""
    tracking_server.connect.cache_clear()
    registry.registered_name = lambda model: name
    mark = registry._mark

    def slow_mark(uri: str, model: str, version: int) -> None:
        mark(uri, model, version)
        time.sleep(pause)  # between a look and the move that follows it, others do what they like

    registry._mark = slow_mark
    prepare()
    _, _, alias = registry.register_and_compete(chosen.candidate(corpus, Score("d", METRIC, value)))
    os._exit(0 if alias == CHAMPION else 1)


@pytest.mark.parametrize(("at_once", "rounds"), [(2, 4), (4, 4)])
def test_searches_that_end_at_the_same_moment_leave_the_best(
    served: list[Logged], corpus: Corpus, fork: Callable[..., Any], at_once: int, rounds: int
) -> None:
    uri = served[0].run.uri
    wrong = []
    for turn in range(rounds):
        name = f"raytrain-at-once-{at_once}-{turn}"
        barrier = multiprocessing.get_context("fork").Barrier(at_once)
        values = random.Random(turn).sample([2.1, 2.2, 2.3, 2.4], at_once)

        def together(late: float, barrier: Any = barrier, turn: int = turn) -> None:
            """They start together or, in every second round, come to the alias together, the best a little late."""

            def verify(*_: object) -> float:
                if turn % 2:
                    barrier.wait(60)
                time.sleep(late)
                return 0.0

            registry.verify = verify
            if turn % 2 == 0:
                barrier.wait(60)

        ended = []
        for number, value in enumerate(values):
            late, pause = (0.3, 0.0) if value == min(values) else (0.0, 0.7)
            prepare = partial(together, late if turn % 2 else random.Random(turn + number).uniform(0, 0.3))
            ended.append(fork(search_ends, served[number], corpus, name, value, prepare, pause))
        for process in ended:
            process.join(60)
        assert all(process.exitcode in (0, 1) for process in ended), [process.exitcode for process in ended]
        found = {int(version.version): registry.read_score(version).value for version in versions(uri, name)}
        assert sorted(found.values()) == sorted(values)
        wrong += [] if found[aliases(uri, name)[CHAMPION]] == min(values) else [(turn, found, aliases(uri, name))]
        assert ended[values.index(min(values))].exitcode == 0
    assert not wrong


@pytest.mark.parametrize("moment", ["verify", "update_champion"])
def test_a_search_that_is_killed_before_the_alias_leaves_the_champion(
    served: list[Logged], corpus: Corpus, fork: Callable[..., Any], moment: str
) -> None:
    uri, name = served[0].run.uri, f"raytrain-killed-{moment}"

    def die() -> None:
        setattr(registry, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    def search(number: int, value: float, prepare: Callable[[], None]) -> int:
        process = fork(search_ends, served[number], corpus, name, value, prepare)
        process.join(60)
        return int(process.exitcode)

    assert search(0, 2.5, lambda: None) == 0
    assert search(1, 2.4, die) == -signal.SIGKILL
    assert [int(version.version) for version in versions(uri, name)] == [1, 2]
    assert aliases(uri, name) == {CHAMPION: 1}
    load_logged_model(uri, logged_model.logged_model(versions(uri, name)[0]))
    assert search(1, 2.4, lambda: None) == 0  # as --resume does
    assert [int(version.version) for version in versions(uri, name)] == [1, 2]
    assert aliases(uri, name) == {CHAMPION: 2}


# -------------------------------------------------------------------------------------------- command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command as a user would; returns its status and what it printed to both streams."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["registry", *arguments])
        status = 0
        try:
            run_command(registry_command.main)
        except SystemExit as ended:
            status = int(ended.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_the_command_lists_promotes_and_rolls_back(
    command: Any,
    register_and_compete: Callable[..., tuple[int, str]],
    experiment: Experiment,
    name: str,
    candidates: list[Logged],
) -> None:
    register_and_compete(0, 2.5)
    register_and_compete(1, 2.6)
    status, text, errors = command("list", name)
    assert (status, errors) == (0, "")
    rows = [line for line in text.splitlines() if "windows of 12" in line]
    assert len(rows) == 2, text
    for word in ("1", "champion", "2.500", "1.25", "64 samples", candidates[0].run.run_id[:8]):
        assert word in rows[0]
    assert "challenger" in rows[1]
    assert name in command("list")[1]

    assert command("promote", name, "2") == (0, f"{name}: version 2 is champion\n", "")
    assert aliases(experiment.uri, name)[CHAMPION] == 2
    assert command("rollback", name) == (0, f"{name}: version 1 is champion again, in place of 2\n", "")
    assert aliases(experiment.uri, name)[CHAMPION] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("list", "raytrain-nothing"), "there is no registered model 'raytrain-nothing'; there are raytrain-"),
        (("promote", "raytrain-nothing", "1"), "there is no registered model 'raytrain-nothing'"),
        (("rollback", "raytrain-nothing"), "there is no registered model 'raytrain-nothing'"),
        (("promote", "NAME", "7"), "has no version 7"),
        (("promote", "NAME", "x"), "invalid int value: 'x'"),
        (("promote", "NAME"), "required: version"),
        (("rollback", "NAME"), "is the only champion that there has been"),
        (("sing",), "invalid choice: 'sing'"),
        ((), "required: command"),
    ],
)
def test_each_mistake_is_one_line(
    command: Any,
    register_and_compete: Callable[..., tuple[int, str]],
    name: str,
    arguments: tuple[str, ...],
    words: str,
) -> None:
    register_and_compete(0, 2.5)
    status, text, errors = command(*(name if word == "NAME" else word for word in arguments))
    assert (status, text) == (2, "")
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert words in errors


def test_a_registered_model_without_champion_has_its_line(
    command: Any, register_and_compete: Callable[..., tuple[int, str]], experiment: Experiment, name: str
) -> None:
    register_and_compete(0, 2.5)
    MlflowClient(experiment.uri).delete_registered_model_alias(name, CHAMPION)
    assert command("rollback", name) == (
        2,
        "",
        f"error: {name} has no champion: python -m raytrain.registry promote {name} VERSION makes one\n",
    )


def test_asking_where_nothing_is_makes_nothing(command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert command("list") == (0, "no model is registered yet: a search registers its best one\n", "")
    assert "there is no registered model 'raytrain-x'; there are none" in command("rollback", "raytrain-x")[2]
    assert list(tmp_path.iterdir()) == []
