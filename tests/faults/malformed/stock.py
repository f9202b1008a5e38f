"""The whole inputs that are damaged: made once, small, and never changed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain.config.models import ByteLstmConfig, HybridConfig
from raytrain.config.schema import RunConfig, to_dict
from raytrain.config.workers import WorkerOptions
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.metrics import METRIC
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import PLAN, claim_name, write_run_address
from raytrain.runs.trials import Trial, TrialStore
from raytrain.search.finish import write_table
from raytrain.search.plan import Plan, WarmStart
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.tracking.runs import Experiment
from raytrain.training.trainer import Trainer, World
from tests.support.mlflow_server import new_store

SPACE = """
def space(trial):
    alpha = trial.suggest_float("alpha", 0.1, 0.5)
    return {"objective.alpha": alpha, "model.latent": trial.suggest_categorical("z", [2, 4])}
"""
DOCUMENTS = [f"text {number} of a few words \N{SNOWMAN} #{number * 7}".encode() for number in range(240)]
TRIALS = ("0123456789abcdef", "fedcba9876543210")


def config(**changes: Any) -> RunConfig[Any]:
    """A config whose model has a few thousand weights."""
    model = HybridConfig((4,), (4,), latent=2, hidden=4)
    values: dict[str, Any] = {"length": 16, "batch_size": 16, "steps": 20, "evaluate_samples": 16}
    return RunConfig(**{"model": model, "precision": "float32", **values, **changes})


def small_corpus(folder: Path) -> Corpus:
    """A corpus of 200 short texts in ``folder``, which must not exist."""
    with CorpusWriter(folder, name="c", source="tests") as writer:
        for number in range(200):
            writer.add("valid" if number % 4 == 0 else "train", f"text {number} of a corpus".encode())
    return Corpus.open(folder)


@dataclass(frozen=True)
class Stock:
    """Where it all lies."""

    folder: Path

    @property
    def corpus(self) -> Path:
        return self.folder / "corpus"

    @property
    def checkpoint(self) -> Path:
        """One checkpoint; the run that it is of is ``folder / "runs" / "run"``."""
        return self.folder / "runs" / "run" / "checkpoints" / "step-00000020"

    @property
    def runs(self) -> Path:
        """A storage with the run ``run`` and the search ``search`` of two trials."""
        return self.folder / "runs"

    @property
    def tracking(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


def make_stock(folder: Path) -> Stock:
    """Make it in ``folder``, which must not exist."""
    stock = Stock(folder)
    folder.mkdir(parents=True)
    with CorpusWriter(stock.corpus, name="stock", source="tests") as writer:
        for number, text in enumerate(DOCUMENTS):
            writer.add("valid" if number % 4 == 0 else "train", text)
    corpus = Corpus.open(stock.corpus)
    new_store(folder)
    experiment = Experiment.open(stock.tracking, "raytrain", str(folder / "mlflow-artifacts"))
    given = config(data=str(stock.corpus))
    storage = open_storage(stock.runs)

    own = claim_name(storage, "run", given, corpus, experiment="raytrain", worker_options=WorkerOptions()).identity
    run = experiment.open_run(own, "run", config=to_dict(given), parameters={}, tags={"location": storage.uri("run")})
    write_run_address(storage.child("run"), run)
    _train(stock, given, corpus, "run")
    (folder / "run_id").write_text(run.run_id)
    _train(stock, config(model=ByteLstmConfig(1, 4, 0.0)), corpus, "other")

    parent = experiment.open_run("search-search", "search", parameters={}, tags={"kind": "search"})
    location = storage.child("search")
    plan = Plan(
        identity="0" * 16,
        space=read_space("mine", SPACE), bases={"hybrid": given}, budget=None, algorithm="tpe", corpus=corpus.digest,
        num_samples=2, seed=0, workers={"workers_per_trial": 1}, experiment="raytrain", corpus_path=str(corpus.path),
        warm_starts=(WarmStart(reference="given.json", config=given),),
    )  # fmt: skip
    location.write(PLAN, plan.to_json())
    records = TrialStore(location)
    trials = []
    for number, name in enumerate(TRIALS):
        child = experiment.open_run(name, name, parent=parent.run_id, parameters={}, tags={"kind": "trial"})
        figures = {"bound": 30.0 + number, METRIC: 3.0 + number, "reconstruction": 29.0, "kl": 1.0, "active_units": 1.0}
        trial = Trial(
            number=number, identity=name, config=given, params={"alpha": 0.2, "z": 2}, distributions={},
            fields={"objective.alpha": 0.2}, run=child.address(), status="finished",
            step=20, best=figures, history=[{"step": 20, METRIC: 3.0, "kl": 1.0}], seconds=1.5, started_at=1.0,
        )  # fmt: skip
        records.add(trial)
        write_run_address(records.location(name), child)
        _train(stock, given, corpus, f"search/trials/{name}")
        trials.append(trial)
    write_table(trials, plan.search_objective, folder / "trials.parquet")
    (folder / "config.json").write_text(json.dumps(to_dict(given), indent=2))
    return stock


def _train(stock: Stock, given: RunConfig[Any], corpus: Corpus, name: str) -> None:
    """Two checkpoints of an untrained model, as a run of that name leaves them."""
    tensors = Trainer(given, corpus, World()).tensors()
    with CheckpointWriter(open_storage(stock.runs / name / "checkpoints")) as writer:
        for step in (10, 20):
            best = {"bound": 30.0 - step, "bits_per_byte": 3.0, "kl": 1.0}
            state = {"best_step": step, "best": best, "pending": [[step, 1, {"a": 1.0}]], "corpus": corpus.digest}
            state["evaluations"] = [{"step": step, **best}]
            writer.save(Snapshot(step, tensors, state, to_dict(given)), score=30.0 - step)
