"""Steps as a recorder of CUDA graphs asks for them, without a GPU: everything that changes is a tensor."""

from __future__ import annotations

import warnings
from dataclasses import fields
from itertools import islice
from typing import Any

import pytest
import torch

from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, RunConfig
from raytrain.data.corpus import Corpus
from raytrain.models.noise import Noise, draw_keys
from raytrain.models.terms import Terms
from raytrain.training.precision import resolve_precision
from raytrain.training.recorder import detached, noted_waits
from raytrain.training.step_inputs import Schedule, StepInputs, schedule_of, scheduled
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import TINY_MODELS, tiny_config

MODELS = pytest.mark.parametrize("model", TINY_MODELS)


def config_of(model: str, **changes: Any) -> RunConfig[Any]:
    """Values of schedules that float32 has exactly."""
    return tiny_config(
        model,
        objective=ObjectiveConfig(annealing="constant", weight=0.5, alpha=0.25, input_dropout=0.25),
        optimizer=OptimizerConfig(learning_rate=2.0**-8, schedule="constant", ema=0.5, clip=1.0),
        **changes,
    )


def inputs_as_tensors(trainer: Trainer, step: int, draws: int) -> StepInputs:
    batch = trainer.train_batches.batch(step)
    keys = torch.tensor(list(islice(draw_keys(trainer.config.seed, step), draws)))
    values = torch.tensor(scheduled(trainer.config, step))
    noise = trainer.recorded_noise(batch, keys)
    return StepInputs(batch.tokens, batch.previous, batch.groups, noise, Schedule(*values.unbind()))


def state_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {f"{stem} {name}": tensor for stem, part in trainer.tensors().items() for name, tensor in part.items()}


@pytest.mark.parametrize("model", [*TINY_MODELS, "byte_lstm of a stream"])
def test_a_step_from_tensors_has_the_bits_of_the_plain_one(corpus: Corpus, model: str) -> None:
    config = config_of(model.split()[0], sampling="stream" if "stream" in model else "windows")
    plain, other = (Trainer(config, corpus, World()) for _ in range(2))
    for step in range(12):  # the average of the weights moves by other shares at first
        inputs = plain.step_inputs(plain.train_batches.batch(step), step)
        plain.network.train()
        plain.compute_step(inputs)
        other.network.train()
        if step < 9:
            other.compute_step(other.step_inputs(other.train_batches.batch(step), step))
        else:
            other.compute_step(inputs_as_tensors(other, step, inputs.noise.draws))
    expected = state_of(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(other).items())


def test_noise_from_keys_is_that_of_seed_and_step() -> None:
    plain = Noise(3, 5, range(2), 16)
    keyed = Noise(0, 0, range(2), 16, keys=torch.tensor(list(islice(draw_keys(3, 5), 3))))
    for _ in range(3):
        assert torch.equal(plain.normal(7), keyed.normal(7))
    assert plain.draws == 3
    with pytest.raises(StopIteration):
        keyed.normal(7)


def test_schedules_of_gpus_are_those_of_float32() -> None:
    config = tiny_config("hybrid", optimizer=OptimizerConfig(learning_rate=1e-3))
    on_cpu, on_gpu = (schedule_of(config, 0, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert on_cpu.learning_rate == 1e-3
    assert on_gpu.learning_rate == torch.tensor(1e-3).item() != 1e-3


@MODELS
def test_terms_lose_their_gradient_and_nothing_else(corpus: Corpus, model: str) -> None:
    trainer = Trainer(config_of(model), corpus, World())
    trainer.network.train()
    terms = trainer.step_terms(trainer.step_inputs(trainer.train_batches.batch(0), 0))
    assert terms.reconstruction.requires_grad
    found = detached(terms)
    for field in fields(Terms):
        one, other = getattr(found, field.name), getattr(terms, field.name)
        assert (one is other) if not isinstance(one, torch.Tensor) else torch.equal(one, other)
        assert not isinstance(one, torch.Tensor) or not one.requires_grad


def test_waits_are_noted_by_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with noted_waits() as waits:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("Synchronization debug mode does not yet detect all synchronizing operations", stacklevel=1)
        assert modes == ["warn"]
    assert [place.partition(":")[0] for place in waits] == ["test_recorder.py"] * 2
    with pytest.raises(ValueError, match="lost"), noted_waits():
        raise ValueError("lost")
    assert modes == ["warn", "default"] * 2


@MODELS
def test_a_scaled_loss_has_the_same_gradients(corpus: Corpus, model: str) -> None:
    found = []
    for scale in (1.0, 64.0):
        trainer = Trainer(config_of(model, precision="float32"), corpus, World())
        trainer.loss_scale = scale
        trainer.network.train()
        trainer.forward_backward(trainer.step_inputs(trainer.train_batches.batch(0), 0))
        found.append([parameter.grad for parameter in trainer.raw.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_that_does_not_fit_a_gpu_says_so(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Trainer, inputs: StepInputs) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "compute_step", full)
    trainer = Trainer(config_of("byte_lstm", batch_size=32), corpus, World())
    with pytest.raises(UserError, match=r"a step on 32 samples of \d+ symbols does not fit .* smaller --batch-size"):
        trainer.train_step(0)


@pytest.mark.parametrize(
    ("brain_float", "capability", "expected"),
    [(True, (9, 0), "bfloat16"), (False, (7, 5), "float16"), (False, (6, 1), "float32")],
)
def test_a_gpu_computes_in_the_narrowest_type_that_it_has(
    monkeypatch: pytest.MonkeyPatch, brain_float: bool, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: brain_float)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected
    assert resolve_precision("tf32", torch.device("cuda")) == "tf32"


@pytest.mark.parametrize("precision", ["tf32", "float16"])
def test_a_cpu_refuses_types_of_gpus(corpus: Corpus, precision: str) -> None:
    with pytest.raises(UserError, match=f"precision is '{precision}': only GPUs"):
        Trainer(config_of("byte_lstm", precision=precision), corpus, World())
