"""What is registered of a search: the figures are those of the checkpoint, whatever the record of its trial says."""

from __future__ import annotations

from pathlib import Path

from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.records import CHECKPOINTS
from raytrain.search.finish import best_checkpoint
from tests.unit.search.test_search_objective import a_plan, figures, searcher


def test_the_figures_of_the_best_model_are_those_of_its_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    """Of a better evaluation only the record is left: its checkpoint was lost."""
    found = searcher(a_plan(), corpus, tmp_path)
    found.suggest("0")
    (trial,) = found.trials
    trial.best = figures(1.5, kl=1.0)
    evaluations = [{"step": 10, **figures(1.5, kl=1.0)}, {"step": 20, **figures(1.75, kl=2.0)}]
    with CheckpointWriter(found.location(trial).child(CHECKPOINTS)) as writer:
        state = {"evaluations": evaluations, "best": evaluations[0], "best_step": 10}
        writer.save(Snapshot(20, {"model": {}}, state, to_dict(trial.config)), score=figures(1.75)["bound"])
    best = best_checkpoint(found.search, found.trials)
    assert best is not None
    assert (best[0].best, best[1].step) == (figures(1.75, kl=2.0), 20)
    assert best[0].identity == trial.identity
