"""One small search from the command to its result: the end-to-end test of the default suite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient

import raytrain
from raytrain.metrics import REQUIRED_METRICS, SearchObjective
from raytrain.runs.records import OUTCOME, PLAN
from raytrain.runs.repeats import winner
from raytrain.runs.trials import TrialStore
from raytrain.storage import open_storage
from tests.support.ray_instance import assert_nothing_left
from tests.support.tiny import SPACE, TINY, mlflow_runs, run, write_text


class Finished(NamedTuple):
    """A search that has ended: its working directory and what it printed."""

    home: Path
    output: str


@pytest.fixture(scope="session")
def finished_search(ray_cpu: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A search of two trials of one worker, with the command that a user types."""
    home = tmp_path_factory.mktemp("search")
    write_text(home / "text.txt")
    (home / "space.py").write_text(SPACE)
    output = run(
        ray_cpu, home, "raytrain.tune", "hybrid", *TINY, "--data", "text.txt", "--space", "space.py", "--name", "first",
        "--num-samples", "2", "--workers-per-trial", "1",
    )  # fmt: skip
    assert_nothing_left(ray_cpu)
    return Finished(home, output)


@pytest.mark.slow
def test_the_notebook_runs_on_the_champion(finished_search: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    file = Path(raytrain.__file__).parents[1] / "examples" / "quickstart.ipynb"
    notebook = nbformat.read(file, as_version=4)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel's own backend puts figures into the outputs
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(finished_search.home)}}).execute()
    text = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "TrainedModel(hybrid, step " in text
    assert text.count(" nats  ") == 8
    assert "bits/byte, KL " in text
    assert "image/png" in text


def test_it_says_what_it_does_and_what_came_of_it(finished_search: Finished) -> None:
    output = finished_search.output
    assert "search first: 2 trials (space, tpe), each 1 x (1 CPU) on CPUs, kept in " in output
    assert "concurrent trials: 2, 2 of 2 CPUs (2 CPUs online)" in output
    assert "objective: lowest negative ELBO" in output
    assert "best trial 00" in output
    assert "\nreference: byte 3-gram " in output
    assert re.search(r"\nmodel \d\.\d{3}, byte \d-gram \d\.\d{3} bits per byte\n", output)
    # of what is learnt in a few steps
    assert "\nwarning: the best trial's model has learnt less than counting: it needs " in output
    assert "model: models:/raytrain-hybrid@champion" in output
    assert output.count("mlflow ui ") == 3  # of the search twice, and of its trials


def test_every_trial_leaves_a_record_an_outcome_and_a_checkpoint(finished_search: Finished) -> None:
    storage = open_storage(finished_search.home / "runs" / "first")
    assert json.loads(storage.read(PLAN))["num_samples"] == 2
    trials = TrialStore(storage).read()
    assert [trial.number for trial in trials] == [0, 1]
    for trial in trials:
        assert trial.ended
        assert set(REQUIRED_METRICS) <= trial.best.keys()
        own = storage.child(f"trials/{trial.identity}")
        assert own.exists(OUTCOME) or trial.status == "stopped"
        assert any(key.endswith("manifest.json") for key in own.list("checkpoints"))


def test_mlflow_has_one_run_a_trial_and_the_champion(finished_search: Finished) -> None:
    home = finished_search.home
    runs = mlflow_runs(home)
    (parent,) = [item for item in runs if "mlflow.parentRunId" not in item.data.tags]
    children = [item for item in runs if "mlflow.parentRunId" in item.data.tags]
    assert len(children) == 2
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["raytrain.kind"] == "search"
    best = winner(TrialStore(open_storage(home / "runs" / "first")).read(), SearchObjective())
    assert best is not None
    assert parent.data.tags["raytrain.best_trial"] == best.name
    client = MlflowClient(f"sqlite:///{home}/mlflow.db")
    version = client.get_model_version_by_alias("raytrain-hybrid", "champion")
    assert int(version.version) == 1
    for child in children:
        assert child.data.metrics["valid/bits_per_byte"] > 0
        assert child.data.tags["raytrain.location"].endswith(child.data.tags["raytrain.identity"])


def test_the_champion_writes_and_scores_from_python(finished_search: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished_search.home)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    model = raytrain.load_model("models:/raytrain-hybrid@champion")
    same = raytrain.load_model("runs/first")
    samples = model.sample(4, seed=3)
    assert [item.text for item in samples] == [item.text for item in same.sample(4, seed=3)]
    assert str(samples[0]) == samples[0].text.decode("utf-8", "replace").replace("\ufffd", " ")
    texts = ["line 7 of a te", b"says 919 in wo"]
    assert model.encode(texts).shape == (2, model.latent)
    assert len(model.reconstruct(texts)) == 2
    between = model.interpolate(*texts, steps=3)
    assert [between[0].text, between[2].text] == [item.text for item in model.reconstruct(texts)]
    scores = model.score(texts)
    assert all(score.bound == score.reconstruction + score.kl > 0 for score in scores)
    assert scores[1] == model.score(texts[::-1] + texts[1:])[2] or scores[1].bits_per_byte > 0
    with pytest.raises(ValueError, match="has 17 bytes: the model takes 16 symbols"):
        model.score(["x" * (model.length + 1)])
