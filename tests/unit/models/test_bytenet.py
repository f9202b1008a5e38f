"""The hybrid with causal convolutions on top: what it sees, and that a step at a time is the same function."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from raytrain.config.models import HybridConfig
from raytrain.config.schema import RunConfig, from_dict, to_dict
from raytrain.data.vocabulary import PAD, STOP
from raytrain.models import build, build_empty
from raytrain.models.bytenet import ByteNet
from raytrain.models.hybrid import Hybrid
from raytrain.models.noise import Noise
from raytrain.models.normalisation import GroupBatchNorm, synchronise_statistics
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

TOP = HybridConfig((8, 16), (16, 8), latent=4, hidden=12, decoder="bytenet", decoder_layers=3)


def hybrid(layers: int = 3, length: int = 24) -> Hybrid:
    """A model in evaluation mode whose statistics and weights let every input be seen in the output."""
    model = build(RunConfig(model=replace(TOP, decoder_layers=layers), length=length, sampling="documents"))
    assert isinstance(model, Hybrid)
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, GroupBatchNorm):
            layer.running_mean.normal_(0, 0.1, generator=generator)
            layer.running_var.uniform_(0.1, 0.5, generator=generator)
    return model.eval()


def text(num: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (num, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("layers", "characters"), [(1, 2), (2, 3), (3, 4), (5, 6), (7, 8), (10, 11)])
def test_a_prediction_sees_as_many_characters_as_it_says(layers: int, characters: int) -> None:
    model = hybrid(layers)
    assert model.bytenet is not None
    assert model.bytenet.receptive_field == characters
    # in float64, so that the effect of the farthest character through ten gates is not rounded away
    model.double()
    tokens, z = text(1, 24), torch.randn(1, 4, dtype=torch.float64)
    logits = model.predict(tokens, z)[0]
    for position in range(24):
        changed = tokens.clone()
        changed[0, position] = (changed[0, position] + 7) % 256
        differs = (model.predict(changed, z)[0] != logits).any(-1)
        expected = torch.zeros(24, dtype=torch.bool)
        expected[position + 1 : position + 1 + characters] = True
        assert torch.equal(differs, expected)


def test_a_step_at_a_time_is_the_same_function() -> None:
    model = hybrid()
    tokens, z = text(5, 24), torch.randn(5, 4)
    expected = model.predict(tokens, z)
    state: Any = model.begin(z)
    previous = torch.full((5,), STOP)
    for position in range(24):
        logits, state = model.advance(previous, state)
        torch.testing.assert_close(logits, expected[:, position], rtol=1e-4, atol=1e-5)
        previous = tokens[:, position]
        if position == 10:
            kept = torch.tensor([3, 1, 4])
            expected, tokens, previous, state = expected[kept], tokens[kept], previous[kept], state.keep(kept)


def test_padding_costs_nothing_and_every_weight_learns() -> None:
    model = hybrid()
    tokens = torch.full((2, 24), PAD)
    tokens[:, :6], tokens[:, 6] = text(2, 6), STOP
    together = model(tokens, Noise(0, 0, range(2), 1))
    cut = model(tokens[:, :7], Noise(0, 0, range(2), 1))
    torch.testing.assert_close(together.reconstruction, cut.reconstruction)
    model = hybrid().train()
    terms = model(text(32, 24), Noise(0, 0, range(2), 16))
    (terms.reconstruction.sum() + terms.auxiliary.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    synchronise_statistics(model, 2, torch.tensor(True))


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = hybrid().train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    tokens = torch.tensor(list(b"abcabcabcabcabcabcabcabc")).repeat(16, 1)
    losses = []
    for step in range(30):
        terms = model(tokens, Noise(0, step, range(1), 16))
        synchronise_statistics(model, 1, torch.tensor(True))
        optimiser.zero_grad()
        terms.reconstruction.mean().backward()
        optimiser.step()
        losses.append(terms.reconstruction.mean().item())
    assert losses[-1] < 0.1 * losses[0]


def test_its_size_is_what_its_layers_say() -> None:
    full = RunConfig(model=HybridConfig(hidden=256, decoder="bytenet", decoder_layers=10), length=60)
    model = build_empty(full)
    assert isinstance(model, Hybrid)
    assert model.lstm is None
    assert isinstance(model.bytenet, ByteNet)
    resize = (200 + 259 + 1) * 512 + 2 * 512
    block = (2 * 256 + 1) * 768 + 2 * 768
    assert sum(parameter.numel() for parameter in model.bytenet.parameters()) == resize + 10 * block


def test_configs_and_checkpoints_from_before_still_load() -> None:
    values = to_dict(tiny_config("hybrid"))
    del values["model"]["decoder"], values["model"]["decoder_layers"]
    config = from_dict(values)
    assert config == tiny_config("hybrid")
    assert {name.split(".")[0] for name in build(config).state_dict()} == {
        "convolutions", "encoder_norms", "posterior", "expand", "deconvolutions", "decoder_norms", "auxiliary",
        "lstm", "output",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"decoder": "gru"}, "model.decoder"), ({"decoder_layers": 2}, "model.decoder_layers"),
     ({"decoder": "bytenet", "decoder_layers": 0}, "model.decoder_layers")],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    values = to_dict(tiny_config("hybrid"))
    values["model"].update(changes)
    with pytest.raises(UserError, match=field.replace(".", r"\.")):
        from_dict(values)
