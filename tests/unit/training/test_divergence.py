"""Numbers that are not finite: one bad step leaves no trace, several end the run, and none of them is ever saved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, RunConfig
from raytrain.data.batches import Batch
from raytrain.data.corpus import Corpus
from raytrain.models.normalisation import GroupBatchNorm
from raytrain.models.terms import Terms
from raytrain.runs import checkpoint
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.storage import open_storage
from raytrain.training.divergence import MOST_IN_ROW, DivergedError
from raytrain.training.step_inputs import StepInputs
from raytrain.training.trainer import Trainer, World
from tests.conftest import tiny_config
from tests.unit.training.test_loop import final, on_workers, run


def _loss(trainer: Trainer, terms: Terms) -> Terms:
    return replace(terms, reconstruction=terms.reconstruction * math.nan)


def _kl_alone(trainer: Trainer, terms: Terms) -> Terms:
    """Its gradients are those that they would be."""
    return replace(terms, kl=terms.kl + math.inf)


def _gradients_alone(trainer: Trainer, terms: Terms) -> Terms:
    """The square root of 0 adds nothing to the loss and has no derivative."""
    return replace(terms, reconstruction=terms.reconstruction + (terms.reconstruction * 0).sqrt())


def _statistics_alone(trainer: Trainer, terms: Terms) -> Terms:
    for layer in trainer.raw.modules():
        if isinstance(layer, GroupBatchNorm) and layer.batch_statistics is not None:
            layer.batch_statistics = layer.batch_statistics.clone()  # of which a kernel may have kept the first
            layer.batch_statistics[1, 0] = math.inf
    return terms


FAULTS = [_loss, _kl_alone, _gradients_alone, _statistics_alone]


@contextmanager
def poisoned(steps: set[int], rank: int = 0, fault: Callable[[Trainer, Terms], Terms] = _loss) -> Iterator[None]:
    """The given training steps go wrong on one rank."""
    real_inputs, real_terms = Trainer.step_inputs, Trainer.step_terms
    newest = 0

    def step_inputs(self: Trainer, batch: Batch, step: int) -> StepInputs:
        nonlocal newest
        newest = step
        return real_inputs(self, batch, step)

    def step_terms(self: Trainer, inputs: StepInputs) -> Terms:
        terms = real_terms(self, inputs)
        return fault(self, terms) if newest in steps and self.world.rank == rank else terms

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "step_inputs", step_inputs)
        patch.setattr(Trainer, "step_terms", step_terms)
        yield


def flat(trainer: Trainer) -> dict[str, Tensor]:
    return {f"{stem} {name}": tensor for stem, group in trainer.tensors().items() for name, tensor in group.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# ------------------------------------------------------------------------------------------- one step


def _skips(world: World, corpus: Corpus, out: Path, rank: int, clip: float) -> None:
    for fault in FAULTS:
        with poisoned({2}, rank, fault):
            settings = OptimizerConfig(clip=clip, weight_decay=0.1, ema=0.9)
            trainer = Trainer(tiny_config("hybrid", optimizer=settings), corpus, world)
            trainer.train_step(0)
            trainer.train_step(1)
            before = flat(trainer)
            trainer.train_step(2)
            assert same(before, flat(trainer)), fault
            assert trainer.skipped.counts() == [1, 1, 1]
            trainer.train_step(3)
            after = flat(trainer)
            assert trainer.skipped.counts() == [1, 0, 1]
            assert all(bool(tensor.isfinite().all()) for tensor in after.values())
            assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("model"))
            assert {float(tensor) for name, tensor in after.items() if name.startswith("optimizer step.")} == {3.0}
            torch.save(after, out / f"{fault.__name__}-{world.rank}")


def test_a_step_that_is_not_finite_changes_nothing_also_with_clipping(corpus: Corpus, tmp_path: Path) -> None:
    _skips(World(), corpus, tmp_path, rank=0, clip=1.0)


@pytest.mark.slow
def test_what_one_rank_cannot_use_no_rank_uses(bad_runs: tuple[int, Path]) -> None:
    size, folder = bad_runs
    for fault in FAULTS:
        first = torch.load(folder / f"{fault.__name__}-0")
        assert all(same(first, torch.load(folder / f"{fault.__name__}-{rank}")) for rank in range(size))


@pytest.mark.parametrize(
    ("model", "sampling", "rate"),
    [
        ("hybrid", "windows", 0.0),
        ("hybrid", "windows", 4.0),
        ("lstm_vae", "windows", 0.0),
        ("lstm_vae", "windows", 4.0),
        ("byte_lstm", "windows", 0.0),
        ("byte_lstm", "stream", 0.0),
    ],
)
def test_a_step_brings_no_number_to_the_host(corpus: Corpus, model: str, sampling: str, rate: float) -> None:
    """On a GPU that would be a wait at each step."""

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert func is not torch.ops.aten._local_scalar_dense.default, "the host asked the device for a number"
            return func(*args, **(kwargs or {}))

    objective = ObjectiveConfig(annealing="constant", rate=rate)
    settings = OptimizerConfig(clip=1.0, weight_decay=0.1, ema=0.9)
    config = tiny_config(model, sampling=sampling, objective=objective, optimizer=settings)
    trainer = Trainer(config, corpus, World())
    with NoWaiting():
        trainer.train_step(0)
        with pytest.raises(AssertionError, match="asked the device"):
            float(trainer.skipped.counters[0])


# -------------------------------------------------------------------------------------------- the run


@pytest.mark.parametrize("model", ["hybrid", "byte_lstm"])
def test_a_resumed_run_with_skipped_steps_is_bit_identical(corpus: Corpus, tmp_path: Path, model: str) -> None:
    config = tiny_config(model, steps=60, evaluate_every=30, checkpoint_every=30)
    with poisoned({4, 12, 13, 28, 29, 30, 31, 47}):
        whole = run(config, corpus, World(), tmp_path / "whole").records
        run(config, corpus, World(), tmp_path / "parts", stop_at=30)
        # what was counted before comes from the checkpoint
        parts = run(config, corpus, World(), tmp_path / "parts").records
    ended, resumed = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert ended.state["skipped"] == resumed.state["skipped"] == [8, 0, 4]
    for stem in ("model", "optimizer"):
        assert same(ended._tensors[stem], resumed._tensors[stem])
    counted = {step: metrics["train/skipped_steps"] for step, metrics in whole.items()}
    assert counted == {5: 1, 10: 1, 15: 3, 20: 3, 25: 3, 30: 5, 35: 7, 40: 7, 45: 7, 50: 8, 55: 8, 60: 8}
    assert {step: metrics["train/skipped_steps"] for step, metrics in parts.items()} == counted
    # step 4 is the batch that is logged at 5: what is not finite is left out, the record is there
    assert "train/bound" in whole[10]
    assert not {"train/bound", "train/gradient_norm"} & whole[5].keys()
    assert all(math.isfinite(value) for metrics in whole.values() for value in metrics.values())


def test_a_checkpoint_without_counters_is_gone_on_from(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm")
    run(config, corpus, World(), tmp_path, stop_at=10)
    stored = final(tmp_path)
    state = {name: value for name, value in stored.state.items() if name != "skipped"}
    with CheckpointWriter(open_storage(tmp_path)) as writer:
        writer.save(Snapshot(10, stored._tensors, state, stored.config), stored.score)
    run(config, corpus, World(), tmp_path)
    assert final(tmp_path).state["skipped"] == [0, 0, 0]


def test_a_row_across_a_restart_is_one_row(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", steps=40)
    with poisoned(set(range(18, 18 + MOST_IN_ROW))):
        run(config, corpus, World(), tmp_path, stop_at=20)
        assert final(tmp_path).state["skipped"] == [2, 2, 2]
        with pytest.raises(DivergedError, match=r"at step 25.* the last good checkpoint is that of step 20"):
            run(config, corpus, World(), tmp_path)


def _fails(world: World, corpus: Corpus, folder: Path, config: RunConfig[Any]) -> None:
    with pytest.raises(DivergedError) as caught:
        run(config, corpus, world, folder)
    (folder / f"said-{world.rank}").write_text(json.dumps([str(caught.value), caught.value.last_good]))


def _bad_runs(world: World, corpus_path: str, out: str) -> None:
    """All that goes wrong here, on the last of the ranks where it is one that goes wrong."""
    corpus, folder, rank = Corpus.open(corpus_path), Path(out), world.size - 1
    _skips(world, corpus, folder, rank, clip=0.0)
    with poisoned(set(range(22, 22 + MOST_IN_ROW)), rank):
        _fails(world, corpus, folder / "row", tiny_config("hybrid", steps=40))
    # the first update takes the weights out of range, with all gradients finite
    config = tiny_config("byte_lstm", checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=1e39))
    _fails(world, corpus, folder / "overflow", config)


@pytest.fixture(scope="module", params=[1, 2])
def bad_runs(request: pytest.FixtureRequest, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The number of ranks that ran ``_bad_runs``, and where."""
    folder = tmp_path_factory.mktemp("bad")
    for name in ("row", "overflow"):
        (folder / name).mkdir()
    if request.param == 1:
        _bad_runs(World(), str(corpus.path), str(folder))
    else:
        on_workers(request.param, _bad_runs, str(corpus.path), str(folder))
    return request.param, folder


def test_several_in_a_row_end_the_run_with_the_last_good_checkpoint(bad_runs: tuple[int, Path]) -> None:
    size, folder = bad_runs
    for rank in range(size):
        said, last_good = json.loads((folder / "row" / f"said-{rank}").read_text())
        assert said.startswith("5 steps in a row had a loss or gradients not finite at step 30: try a lower ")
        assert said.endswith("; the last good checkpoint is that of step 20")
        assert last_good == 20
    assert final(folder / "row").step == 20


def test_a_state_that_is_not_finite_ends_the_run_on_all_ranks_and_is_not_saved(bad_runs: tuple[int, Path]) -> None:
    size, folder = bad_runs
    for rank in range(size):
        said, last_good = json.loads((folder / "overflow" / f"said-{rank}").read_text())
        assert "the state after step 1 is not finite" in said
        assert said.endswith("; there is no good checkpoint")
        assert last_good is None
    said, _ = json.loads((folder / "overflow" / "said-0").read_text())
    assert " and is not saved: layers.0.weight_ih_l0 of model" in said
    assert checkpoint.latest(open_storage(folder / "overflow")) is None
