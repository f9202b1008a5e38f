"""The path that a GPU takes, without one: on the device ``meta`` nothing is computed and no value can be read.

A tensor of the CPU among those of the device is an error there, and so is every look at a value by the host: what would
stop a run on a GPU, or make it wait at each step. The launches that a step would need are counted by its operations.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raytrain.config.models import HybridConfig
from raytrain.config.schema import ObjectiveConfig, OptimizerConfig
from raytrain.data.corpus import Corpus
from raytrain.models import gpu_kernels, gpu_lstm, sampling
from raytrain.training.loss import BoundTotals
from raytrain.training.step_inputs import Schedule, StepInputs
from raytrain.training.trainer import Trainer, World
from tests.conftest import TINY_MODELS, tiny_config

META = torch.device("meta")
MODELS = pytest.mark.parametrize("model", [*TINY_MODELS, "hybrid, normalised"])


class Recurrent(torch.autograd.Function):
    """cuDNN's LSTM as it looks from outside."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, *others: Tensor) -> Tensor:
        assert {other.device for other in others} == {inputs.device}
        ctx.save_for_backward(inputs, *others)
        return inputs.new_empty(*inputs.shape[:2], others[0].shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors)


def recurrent(inputs: Tensor, state: Any, weights: Any, *_: Any) -> tuple[Tensor, Any, Any]:
    return Recurrent.apply(inputs, *state, *weights), *state


class Launches(Counter[str]):
    """The kernels of ``norm_triton`` and ``noise_triton`` as they look from outside."""

    def forward(self, features: Tensor, *others: Any) -> None:
        self["forward"] += 1
        assert {other.device for other in others if isinstance(other, Tensor)} == {features.device}

    def backward(self, *_: Any) -> None:
        self["backward"] += 1

    def fill(self, samples: Tensor, key: int, words: Tensor) -> None:
        self["fill"] += 1
        assert samples.device == words.device == META


class Watch(TorchDispatchMode):
    """Notes operations of which some tensors are on the CPU and some on the device, copies, and what needs a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        name = func.overloadpacket.__name__
        if META in {tensor.device for tensor in tensors}:
            views = any(part.alias_info and not part.alias_info.is_write for part in func._schema.returns)
            if not views and "empty" not in name:
                self.launches[name] += 1
            strangers = [tensor for tensor in tensors if tensor.device != META]
            if strangers and name in ("_to_copy", "copy_"):
                self.copies[name] += 1
            elif any(tensor.dim() > 0 for tensor in strangers):
                self.mixed.append(f"{func} {[(tuple(tensor.shape), tensor.device.type) for tensor in tensors]}")
        return result


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """What stands in for the libraries and the kernels that the device does not have."""
    found = Launches()
    monkeypatch.setattr(gpu_kernels, "norm", found)
    monkeypatch.setattr(gpu_kernels, "noise", found)
    monkeypatch.setattr(gpu_kernels, "available", lambda device: device == META)
    # as on GPUs: one operation for all gradients
    monkeypatch.setattr("torch.nn.utils.clip_grad._has_foreach_support", lambda *_: True)
    monkeypatch.setattr(Trainer, "autocast", lambda self: nullcontext())
    monkeypatch.setattr(gpu_lstm, "no_autocast", lambda device: nullcontext())
    monkeypatch.setattr(torch, "lstm", recurrent)
    return found


def trainer_of(corpus: Corpus, model: str, **changes: Any) -> Trainer:
    config = tiny_config(
        model,
        sampling="documents",
        length=32,
        optimizer=OptimizerConfig(clip=1.0),
        objective=ObjectiveConfig(input_dropout=0.2, free_bits=1.0),
        **changes,
    )
    return Trainer(config, corpus, World(device=META))


@MODELS
def test_a_step_mixes_no_devices_and_looks_at_no_value(corpus: Corpus, model: str, launches: Launches) -> None:
    trainer = trainer_of(corpus, model)
    trainer.rehearse()
    launches.clear()
    with Watch() as watch:
        trainer.train_step(1)
    assert not watch.mixed
    assert {value.device for slots in trainer.optimizer.state.values() for value in slots.values()} == {META}
    assert sum(watch.copies.values()) == 1  # the batch
    norms = 4 if model.startswith("hybrid") else 0
    draws = 3 if model == "byte_lstm" else 2  # input dropout, and a code or the dropout of two layers
    assert +launches == +Counter(forward=norms, backward=norms, fill=draws)


@MODELS
def test_a_recorded_step_takes_nothing_from_the_host(corpus: Corpus, model: str) -> None:
    """What a CUDA graph repeats is what was asked for when it was recorded."""
    trainer = trainer_of(corpus, model)
    trainer.rehearse()
    batch = replace(trainer.train_batches.batch(1), tokens=trainer.train_batches.batch(1).tokens.to(META))
    keys, values = torch.empty(8, dtype=torch.int64, device=META), torch.empty(3, device=META)
    schedule = Schedule(1e-3, *values.unbind())  # Adam takes a learning rate that is a tensor on real devices alone
    noise = trainer.recorded_noise(batch, keys)
    with Watch() as watch:
        trainer.compute_step(StepInputs(batch.tokens, None, batch.groups, noise, schedule))
    assert not watch.mixed
    assert not watch.copies
    assert watch.launches


@MODELS
def test_an_evaluation_looks_at_values_only_at_its_end(corpus: Corpus, model: str) -> None:
    trainer = trainer_of(corpus, model)
    trainer.network.eval()
    totals = BoundTotals(trainer.model.latent, META)
    with torch.no_grad(), Watch() as watch:
        for batch in trainer.valid_batches.batches():
            totals.add(trainer.evaluated_terms(batch, None), batch.text_bytes)
    assert not watch.mixed


@MODELS
def test_sampling_looks_at_no_value_between_its_checks(
    corpus: Corpus, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CHECK_EVERY", 10**9)
    network = trainer_of(corpus, model).model.eval()
    codes, uniform = torch.empty(8, network.latent, device=META), torch.empty(8, 16, device=META)
    with torch.no_grad(), Watch() as watch:
        sampling._generate(network, codes, uniform, b"", 1.0, 0.9)
    assert not watch.mixed


def launches_of_a_step(corpus: Corpus, model: str, launches: Launches, **changes: Any) -> int:
    trainer = trainer_of(corpus, model, **changes)
    trainer.train_step(0)
    launches.clear()
    with Watch() as watch:
        trainer.train_step(1)
    return sum(watch.launches.values()) + sum(launches.values())


@MODELS
def test_a_step_needs_as_many_launches_at_any_batch(corpus: Corpus, model: str, launches: Launches) -> None:
    few = launches_of_a_step(corpus, model, launches, batch_size=64)
    assert launches_of_a_step(corpus, model, launches, batch_size=512) == few


def test_a_hybrid_of_the_papers_depth_needs_few_launches(
    corpus: Corpus, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for depth in (4, 5):
        monkeypatch.setitem(TINY_MODELS, "hybrid", HybridConfig((8,) * depth, (8,) * depth, latent=8, hidden=32))
        found[depth] = launches_of_a_step(corpus, "hybrid", launches)
    # without a graph: recorded, a step is one launch
    assert found[5] <= 230
    # a convolution, a deconvolution and both normalisations
    assert found[5] - found[4] == 10
