from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.workers import WorkerOptions
from raytrain.data.corpus import Corpus
from raytrain.runs.records import PLAN, RUN, check_free, check_name, claim_name, known_claim, read_claim
from raytrain.search.setup import stored_plan
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.storage.lease import take
from raytrain.storage.local import FolderStorage
from raytrain.tracking.runs import Experiment
from raytrain.train import read_resumption
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.support.mlflow_server import new_store
from tests.unit.storage.test_lease import RACES

GANG = WorkerOptions("2:3", 0.5, 0, "cpu")


def test_a_name_keeps_its_run_and_the_experiment_that_it_was_begun_in(corpus: Corpus, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    first = claim_name(storage, "mine", tiny_config("hybrid"), corpus, experiment="tweets", worker_options=GANG)
    again = claim_name(
        storage, "mine", tiny_config("hybrid"), corpus, experiment="raytrain", worker_options=WorkerOptions()
    )
    assert again == first == read_claim(storage, "mine")
    assert (first.experiment, first.worker_options) == ("tweets", GANG)
    with pytest.raises(UserError, match="belongs to a run with another config"):
        claim_name(storage, "mine", tiny_config("hybrid", steps=7), corpus, experiment="tweets", worker_options=GANG)


def claim_at_once(storage: Storage, seed: int, corpus: Corpus, start: Any, answers: Any) -> None:
    """Claim a name for a config of its own at the same moment as others."""
    start.wait(60)
    try:
        config = tiny_config("hybrid", seed=seed)
        answers.put(
            claim_name(storage, "x", config, corpus, experiment="e", worker_options=WorkerOptions()).config.seed
        )
    except UserError as error:
        answers.put(str(error))


def claims(storage: Storage, corpus: Corpus) -> list[Any]:
    """What two processes are told that claim one name for two configs."""
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(2), context.Queue()
    racers = [context.Process(target=claim_at_once, args=(storage, seed, corpus, start, answers)) for seed in (1, 2)]
    for racer in racers:
        racer.start()
    told = [answers.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join(60)
    return sorted(told, key=lambda answer: isinstance(answer, int))


def assert_one_owner(storage: Storage, told: list[Any]) -> None:
    owner = read_claim(storage, "x").config.seed
    assert told == [
        f"--name x belongs to a run with another config (seed was {owner}, is {3 - owner}); choose another name, or "
        "give the same config to resume that run",
        owner,
    ]


def test_of_two_claims_of_a_name_at_the_same_moment_one_has_it(corpus: Corpus, tmp_path: Path) -> None:
    for number in range(8):
        storage = FolderStorage(tmp_path / str(number))
        assert_one_owner(storage, claims(storage, corpus))


@pytest.mark.parametrize(("kind", "times"), RACES)
def test_of_two_claims_at_the_same_moment_one_has_the_name_many_times(
    kind: str,
    times: int,
    corpus: Corpus,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "s3":
        request.getfixturevalue("s3_server").use(monkeypatch)
    for number in range(times):
        root = tmp_path / str(number) if kind == "folder" else f"s3://raytrain/{tmp_path.name}/{number}"
        storage = open_storage(root)
        assert_one_owner(storage, claims(storage, corpus))


def test_the_same_config_under_another_name_or_in_another_storage_is_another_run(
    corpus: Corpus, tmp_path: Path
) -> None:
    found = [
        claim_name(
            FolderStorage(tmp_path / folder), name, tiny_config("hybrid"), corpus,
            experiment="e", worker_options=WorkerOptions(),
        )
        for folder, name in (("here", "a"), ("here", "b"), ("there", "a"), ("here", "a"))
    ]  # fmt: skip
    assert found[3] == found[0]
    experiment = Experiment.open(new_store(tmp_path), "e", str(tmp_path / "artifacts"))
    runs = [experiment.open_run(claim.identity, "a", parameters={}, tags={}).run_id for claim in found]
    assert runs[3] == runs[0]
    assert len(set(runs)) == len({claim.identity for claim in found}) == 3


def test_leases_alone_do_not_take_a_name(corpus: Corpus, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    take(storage.child("mine"), 0, "mine").release()
    check_free(storage, "mine")
    assert known_claim(storage, "mine", tiny_config("hybrid"), corpus) is None


@pytest.mark.parametrize("key", [PLAN, "corpus.json", "checkpoints/step-00000002/manifest.json"])
def test_a_name_of_something_else_is_not_taken_for_a_run(corpus: Corpus, tmp_path: Path, key: str) -> None:
    """Otherwise ``sample runs/mine`` would give the search's winner, never the run's model."""
    storage = FolderStorage(tmp_path)
    storage.write(f"mine/{key}", b"{}")
    line = "belongs to a search" if key == PLAN else "there is something else at .*mine already"
    for claim in (
        lambda: check_free(storage, "mine"),
        lambda: claim_name(storage, "mine", tiny_config("hybrid"), corpus, experiment="x", worker_options=GANG),
    ):
        with pytest.raises(UserError, match=f"--name mine.*{line}"):
            claim()
    assert storage.list() == [f"mine/{key}"]
    check_free(storage, "free")


def test_the_wrong_command_to_resume_names_the_right_one(corpus: Corpus, tmp_path: Path) -> None:
    storage = FolderStorage(tmp_path)
    storage.write(f"search/{PLAN}", b"{}")
    with pytest.raises(
        UserError, match=r"no such run in .*; search is a search: python -m raytrain.tune --resume search"
    ):
        read_claim(storage, "search")
    claim_name(storage, "mine", tiny_config("hybrid"), corpus, experiment="x", worker_options=GANG)
    with pytest.raises(UserError, match=r"no such search in .*; mine is a run: python -m raytrain.train --resume mine"):
        stored_plan("mine", str(tmp_path))


@pytest.mark.parametrize("name", ["mlflow-artifacts", "corpora", ".cache", "a/b", ""])
def test_names_of_what_a_storage_holds_otherwise_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="use letters, digits"):
        check_name(name)


def test_a_read_resumption_asks_for_the_workers_that_it_was_begun_with(corpus: Corpus, tmp_path: Path) -> None:
    claim_name(FolderStorage(tmp_path), "mine", tiny_config("hybrid"), corpus, experiment="tweets", worker_options=GANG)
    arguments = ["--resume", "mine", "--storage", str(tmp_path)]
    options, claim = read_resumption("mine", str(tmp_path), arguments)
    assert (options.workers, options.cpus_per_worker, options.gpus_per_worker) == ("2:3", 0.5, 0)
    assert options.device == "cpu"
    assert claim.config == tiny_config("hybrid")
    options, _ = read_resumption("mine", str(tmp_path), [*arguments, "--workers", "1"])
    assert (options.workers, options.cpus_per_worker) == ("1", 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"experiment": 3}, {"experiment": "\ud800"}, {"identity": 1}, {"identity": "x"},
        {"corpus": "../.."}, {"unheard": 1},
        {"worker_options": 1},
        {"worker_options": {"workers": 2}}, {"worker_options": {"workers": "0x2"}},
        {"worker_options": {"cpus_per_worker": "1"}},
        {"worker_options": {"device": "tpu"}},
    ],
)  # fmt: skip
def test_a_claim_that_cannot_be_read_is_one_line(corpus: Corpus, tmp_path: Path, change: dict[str, object]) -> None:
    storage = FolderStorage(tmp_path)
    claim_name(storage, "mine", tiny_config("hybrid"), corpus, experiment="raytrain", worker_options=WorkerOptions())
    values = json.loads(storage.read(f"mine/{RUN}"))
    storage.write(f"mine/{RUN}", json.dumps(values | change).encode())
    with pytest.raises(UserError, match="does not say whose the name is"):
        read_claim(storage, "mine")


def test_a_run_that_was_begun_before_experiments_were_and_workers_were_noted_is_resumed(
    corpus: Corpus, tmp_path: Path
) -> None:
    storage = FolderStorage(tmp_path)
    claim_name(storage, "mine", tiny_config("hybrid"), corpus, experiment="tweets", worker_options=GANG)
    values = json.loads(storage.read(f"mine/{RUN}"))
    del values["experiment"], values["worker_options"]
    storage.write(f"mine/{RUN}", json.dumps(values).encode())
    claim = read_claim(storage, "mine")
    assert (claim.experiment, claim.worker_options) == ("raytrain", WorkerOptions())
