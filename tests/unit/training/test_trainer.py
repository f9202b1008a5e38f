"""The optimiser's weight decay, and the moving average of the weights that is the model of a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from raytrain.analysis.evaluation import evaluate
from raytrain.config.schedules import average_decay
from raytrain.config.schema import OptimizerConfig
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.models import build
from raytrain.runs import checkpoint
from raytrain.runs.trained_model import load
from raytrain.search import registry
from raytrain.storage import open_storage
from raytrain.training.trainer import Trainer, World, build_optimizer
from raytrain.utils.errors import UserError
from tests.conftest import TINY_MODELS, TINY_VARIANTS, tiny_config
from tests.unit.training.test_loop import run

# ---------------------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("model", [*TINY_MODELS, *TINY_VARIANTS])
def test_only_matrices_and_kernels_decay(model: str) -> None:
    network = build(tiny_config(model))
    settings = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer = build_optimizer(network, tiny_config(model, optimizer=settings))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = torch.zeros_like(value)
    optimizer.step()
    for name, value in network.named_parameters():
        plain = "bias" in name or "norm" in name
        torch.testing.assert_close(value.detach(), before[name] * (1.0 if plain else 0.95), rtol=1e-6, atol=0)


def test_a_skipped_step_of_the_fused_kernel_does_not_decay() -> None:
    network = build(tiny_config("hybrid"))
    settings = OptimizerConfig(learning_rate=0.5, weight_decay=0.1)
    optimizer: Any = build_optimizer(network, tiny_config("hybrid", optimizer=settings))
    before = {name: value.detach().clone() for name, value in network.named_parameters()}
    for value in network.parameters():
        value.grad = torch.ones_like(value)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in network.named_parameters())
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert not any(torch.equal(value, before[name]) for name, value in network.named_parameters())


def test_without_weight_decay_every_bit_is_adams(corpus: Corpus) -> None:
    config = tiny_config("hybrid, normalised")
    ours, theirs = Trainer(config, corpus, World()), Trainer(config, corpus, World())
    adam = torch.optim.Adam(
        theirs.raw.parameters(), config.optimizer.learning_rate, (config.optimizer.beta1, config.optimizer.beta2),
        fused=True,
    )  # fmt: skip
    adam.state = theirs.optimizer.state
    theirs.optimizer = adam  # type: ignore[assignment]
    for step in range(4):
        ours.train_step(step)
        theirs.train_step(step)
    for stem, group in ours.tensors().items():
        assert all(torch.equal(value, theirs.tensors()[stem][name]) for name, value in group.items())


# -------------------------------------------------------------------------------------------- average


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", [*TINY_MODELS, "hybrid, normalised"])
def test_the_model_of_a_run_is_the_average_of_its_weights(corpus: Corpus, name: str) -> None:
    config = tiny_config(name, optimizer=OptimizerConfig(ema=0.5))
    trainer = Trainer(config, corpus, World())
    plain = Trainer(tiny_config(name), corpus, World())
    expected = parameters(plain.raw)
    for step in range(12):
        trainer.train_step(step)
        plain.train_step(step)
        decay = average_decay(config.optimizer, step)
        for key, value in plain.raw.named_parameters():
            expected[key] = decay * expected[key] + (1 - decay) * value.detach()
    # the average does not change what is trained
    assert all(torch.equal(value, parameters(trainer.raw)[key]) for key, value in parameters(plain.raw).items())
    for key, value in parameters(trainer.model).items():
        torch.testing.assert_close(value, expected[key])
        assert not torch.equal(value, trainer.raw.get_parameter(key))
    assert all(one is other for one, other in zip(trainer.model.buffers(), trainer.raw.buffers(), strict=True))
    # and it is what is evaluated
    before, own = plain.evaluate(), trainer.evaluate()
    plain.model.load_state_dict(trainer.model.state_dict())
    assert plain.evaluate() == own != before


@pytest.mark.parametrize("sampling", ["windows", "documents"])
@pytest.mark.parametrize("model", TINY_MODELS)
def test_an_evaluation_is_the_same_however_many_groups_are_taken_at_once(
    corpus: Corpus, model: str, sampling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPUs take more."""
    found, sizes = [], []
    config = tiny_config(model, sampling=sampling, evaluate_samples=100, precision="float32", group_size=2)
    for groups in (1, 64):
        monkeypatch.setattr("raytrain.training.trainer.EVALUATION_GROUPS", groups)
        trainer = Trainer(config, corpus, World())
        sizes.append(len(list(trainer.valid_batches.batches())))
        found.append(trainer.evaluate())
    assert sizes[0] > sizes[1] == 1
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


def test_an_evaluation_builds_no_optimiser(corpus: Corpus) -> None:
    trainer = Trainer(tiny_config("hybrid"), corpus, World())
    trainer.evaluate()
    assert "optimizer" not in vars(trainer)
    trainer.train_step(1)
    assert "optimizer" in vars(trainer)


def test_what_reads_a_checkpoint_gets_the_average(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("hybrid, normalised", optimizer=OptimizerConfig(ema=0.9))
    run(config, corpus, World(), tmp_path / "run")
    stored = checkpoint.best(open_storage(tmp_path / "run"))
    assert stored is not None
    bound = stored.score
    weights, raw = stored.tensors("model"), stored.tensors("optimizer")
    assert not any(torch.equal(raw[f"raw.{name}"], weights[name]) for name, _ in build(config).named_parameters())
    checkpoint.export(stored, tmp_path / "exported")
    for location in (stored.uri, str(tmp_path / "exported")):
        model = load(location)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples)
        assert evaluate(model, batches, 1).metrics()["bound"] == pytest.approx(bound, rel=1e-5)
    assert registry._negative_elbo(stored, corpus) == pytest.approx(bound, rel=1e-6)


def test_a_run_with_an_average_does_not_go_on_without_one(corpus: Corpus, tmp_path: Path) -> None:
    averaged = OptimizerConfig(ema=0.9)
    run(tiny_config("byte_lstm", steps=10, optimizer=averaged), corpus, World(), tmp_path / "with")
    run(tiny_config("byte_lstm", steps=10), corpus, World(), tmp_path / "without")
    for folder, settings in (("with", OptimizerConfig()), ("without", averaged)):
        with pytest.raises(UserError, match=r"optimizer.safetensors differ in 'raw\."):
            run(tiny_config("byte_lstm", optimizer=settings), corpus, World(), tmp_path / folder)


def test_ranks_share_all_that_a_checkpoint_has(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config("hybrid", optimizer=OptimizerConfig(ema=0.9)), corpus, World())
    trainer.world = World(size=2)
    shared: set[int] = set()
    monkeypatch.setattr(dist, "broadcast", lambda tensor, source: shared.add(tensor.data_ptr()))
    assert trainer.share(3) == 3
    moments = [value for slots in trainer.optimizer.state.values() for value in slots.values()]
    models = [*trainer.model.state_dict().values(), *trainer.raw.state_dict().values()]
    assert {value.data_ptr() for value in [trainer.skipped.counters, *models, *moments]} <= shared


@pytest.mark.parametrize(
    ("model", "draws", "changes"),
    [
        ("hybrid", 0, {}),
        ("hybrid", 4, {}),
        ("lstm_vae", 0, {"sampling": "documents", "length": 64}),
        ("byte_lstm", 4, {"sampling": "stream"}),
        ("byte_lstm", 0, {"vocabulary": "char", "optimizer": OptimizerConfig(ema=0.9)}),
    ],
)
def test_single_samples_have_the_losses_whose_mean_is_reported(
    corpus: Corpus, model: str, draws: int, changes: dict[str, Any]
) -> None:
    trainer = Trainer(tiny_config(model, **changes), corpus, World())
    trainer.train_step(0)
    found, metrics = trainer.losses(draws), trainer.evaluate(draws)
    assert len(found["nats"]) == len(found["bytes"]) == 64
    assert sum(found["nats"]) / 64 == pytest.approx(metrics["nll" if draws else "bound"])
    bits = sum(found["nats"]) / math.log(2) / sum(found["bytes"])
    assert bits == pytest.approx(metrics["nll_bits_per_byte" if draws else "bits_per_byte"])
