from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytrain.config.workers import WorkerOptions
from raytrain.data.corpus import Corpus
from raytrain.runs.records import PLAN, RUN, check_free, check_name, claim_name, read_claim
from raytrain.search.setup import stored_plan
from raytrain.storage.local import FolderStorage
from raytrain.train import read_resumption
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

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
        {"experiment": 3}, {"experiment": "\ud800"}, {"identity": 1}, {"corpus": "../.."}, {"unheard": 1},
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
