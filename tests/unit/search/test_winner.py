"""The winner of a search, found in its storage or in MLflow, and what is refused beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.runs.records import BEST_CONFIG, PLAN
from raytrain.runs.repeats import Confirm
from raytrain.runs.trials import TrialStore
from raytrain.search.confirmation import new_repeats
from raytrain.search.winner import BEST_TRIAL, find_winner
from raytrain.storage import open_storage_root
from raytrain.tracking.runs import Experiment, Run
from raytrain.train import read_command
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import a_plan, a_trial, figures


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("RAYTRAIN_STORAGE", raising=False)
    return tmp_path


def record(name: str, **changes: Any) -> None:
    """A search in the storage whose two trials differ in bound and KL."""
    location = open_storage_root(None).child(name)
    location.write(PLAN, a_plan(**changes).to_json())
    records = TrialStore(location)
    for number, (bits, kl) in enumerate([(2.0, 0.0), (2.5, 3.0)]):
        config = replace(tiny_config("hybrid"), seed=number)
        records.add(replace(a_trial(number, figures(bits, kl)), config=config))
    records.close()


def test_the_winner_of_a_search_in_the_storage_is_the_one_it_looked_for(home: Path) -> None:
    record("s")
    found = find_winner("s", None, "raytrain")
    assert (found.trial, found.config.seed) == ("000", 0)
    # no tracking store was made by looking for it
    assert (found.parent, found.search, (home / "mlflow.db").exists()) == ("s", "s", False)
    assert (found.corpus, found.corpus_path) == ("0123456789abcdef", "/somewhere/corpus")
    record("latent", min_used=1.0)
    assert find_winner("latent", None, "raytrain").trial == "001"
    record("none", min_used=9.0)
    with pytest.raises(
        UserError, match="no trial of the search has been evaluated that uses at least 9 nats of its code yet"
    ):
        find_winner("none", None, "raytrain")


def test_a_search_whose_confirmation_nobody_passed_has_no_winner(home: Path) -> None:
    rule = Confirm(configs=1, seeds=1, first_seed=1003)
    record("s", min_used=1.0, confirm=rule)
    location = open_storage_root(None).child("s")
    records = TrialStore(location)
    (repeat,) = new_repeats(a_plan(min_used=1.0, confirm=rule), records.read())
    records.add(replace(repeat, status="finished", best=figures(2.4, 0.0)))
    records.close()
    with pytest.raises(UserError, match=r"--best-of s: no config of the search was confirmed; .* --num-samples N"):
        find_winner("s", None, "raytrain")


def track(home: Path, name: str, seed: int | None, experiment: str = "mine") -> Run:
    """A search in MLflow; it has a winner if it has a seed."""
    opened = Experiment.open(f"sqlite:///{home}/mlflow.db", experiment, str(home / "artifacts"))
    run = opened.open_run(f"search-{name}", name, parameters={}, tags={"kind": "search", "corpus": "c0ffee"})
    if seed is not None:
        run.log_dict(to_dict(replace(tiny_config("hybrid"), seed=seed)), BEST_CONFIG)
        run.set_tags({BEST_TRIAL: f"{seed:03}"})
    return run


def test_the_winner_is_found_in_mlflow_by_search_or_experiment(home: Path) -> None:
    first = track(home, "first", 4)
    second = track(home, "second", 5)
    track(home, "running", None)
    by_name = find_winner("first", None, "mine")
    assert (by_name.trial, by_name.config.seed, by_name.parent) == ("004", 4, first.run_id)
    assert (by_name.corpus, by_name.corpus_path) == ("c0ffee", "")
    newest = find_winner("mine", None, "raytrain")
    assert (newest.search, newest.trial, newest.parent) == ("second", "005", second.run_id)
    with pytest.raises(UserError, match="--best-of running: no search there has ended with a winner yet"):
        find_winner("running", None, "mine")


@pytest.mark.parametrize("tracked", [False, True])
def test_a_search_that_is_nowhere_is_one_line(home: Path, tracked: bool) -> None:
    if tracked:
        track(home, "other", 1)
    for name in ("nothing", "not a name", "it's"):
        with pytest.raises(UserError, match=r"there is no such search in .*/runs, nor such a search or") as caught:
            find_winner(name, None, "mine")
        assert "\n" not in str(caught.value)


def test_the_options_change_the_winners_config(home: Path) -> None:
    record("s")
    found = find_winner("s", None, "raytrain")
    arguments = ["--best-of", "s", "--steps", "70", "--objective.alpha", "0.9", "--workers", "2"]
    options, config = read_command(arguments, has_gpus=True, winner=found)
    objective = replace(found.config.objective, alpha=0.9)
    assert config == replace(found.config, steps=70, objective=objective)
    assert options.workers == "2"
    assert read_command(["hybrid", *arguments], has_gpus=False, winner=found) == (options, config)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lstm_vae"], "its winner is a hybrid, not a lstm_vae"),
        (["--preset", "laptop"], "give no --preset or --config beside it"),
        (["--config", "c.json"], "give no --preset or --config beside it"),
    ],
)
def test_two_places_to_start_from_are_refused(home: Path, arguments: list[str], words: str) -> None:
    record("s")
    found = find_winner("s", None, "raytrain")
    with pytest.raises(UserError, match=words):
        read_command([*arguments, "--best-of", "s"], has_gpus=False, winner=found)


def test_the_corpus_is_that_of_the_search(home: Path, corpus: Corpus) -> None:
    record("s", corpus=corpus.digest, corpus_path=str(corpus.path))
    found = find_winner("s", None, "raytrain")
    assert found.open_workspace(found.config, None).corpus.digest == corpus.digest
    (home / "text.txt").write_text("".join(f"a line that says {number}\n" for number in range(500)))
    other = replace(found.config, data="text.txt")
    assert found.open_workspace(other, None).corpus.digest != corpus.digest
    # the corpus is gone and the text has changed
    moved = replace(found, corpus="0" * 64, corpus_path="/nowhere", config=other)
    with pytest.raises(UserError, match=r"the text at text\.txt is not what the search was run on"):
        moved.open_workspace(other, None)


def test_a_config_artifact_that_is_lost_is_one_line(home: Path) -> None:
    run = track(home, "first", None)
    run.set_tags({BEST_TRIAL: "001"})
    with pytest.raises(UserError, match=f"has lost {BEST_CONFIG}"):
        find_winner("first", None, "mine")
