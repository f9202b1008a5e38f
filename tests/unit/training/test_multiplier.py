"""The multiplier of a rate: its ascent, its bounds, and a KL that it holds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raytrain.config.schema import ObjectiveConfig
from raytrain.data.corpus import Corpus
from raytrain.training.multiplier import Multiplier
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.training.test_divergence import flat, poisoned, same
from tests.unit.training.test_loop import final, run

GOOD = torch.tensor(True)
RATE = ObjectiveConfig(annealing="constant", rate=4.0)


def test_it_ascends_as_rmsprop_does() -> None:
    multiplier = Multiplier(5.0)
    expected = torch.nn.Parameter(torch.tensor(1.01))
    optimizer = torch.optim.RMSprop([expected], lr=0.03, maximize=True)
    for kl in (0.0, 2.0, 9.0, 30.0, 30.0, 30.0, 30.0, 30.0, 3.0, 5.0):
        (expected.abs() * (5.0 - kl)).backward()
        optimizer.step()
        optimizer.zero_grad()
        multiplier.ascend(torch.tensor(kl), 0.03, GOOD)
        torch.testing.assert_close(multiplier.value, expected.detach())
    assert expected.item() < 1.01


def test_it_falls_to_0_above_the_rate_and_rises_by_a_learning_rate_below_it() -> None:
    multiplier = Multiplier(5.0)
    for _ in range(400):
        multiplier.ascend(torch.tensor(6.0), 0.01, GOOD)
    assert multiplier.value.abs().item() < 0.02
    for _ in range(600):
        multiplier.ascend(torch.tensor(1.0), 0.01, GOOD)
    before = multiplier.value.abs().item()
    multiplier.ascend(torch.tensor(1.0), 0.01, GOOD)
    assert multiplier.value.abs().item() - before == pytest.approx(0.01, rel=0.02)


def test_it_leaves_0_again() -> None:
    multiplier = Multiplier(5.0)
    multiplier.value.zero_()
    multiplier.ascend(torch.tensor(1.0), 0.01, GOOD)
    assert multiplier.value.abs() > 0


@pytest.mark.parametrize("kl", [3.0, math.nan, math.inf])
def test_a_skipped_step_leaves_it_alone(kl: float) -> None:
    multiplier = Multiplier(5.0)
    multiplier.ascend(torch.tensor(2.0), 0.01, GOOD)
    before = [tensor.clone() for tensor in multiplier.tensors().values()]
    multiplier.ascend(torch.tensor(kl), 0.01, torch.tensor(False))
    assert before == list(multiplier.tensors().values())


def test_a_skipped_step_of_a_run_leaves_it_alone(corpus: Corpus) -> None:
    trainer = Trainer(tiny_config("lstm_vae", objective=RATE), corpus, World())
    trainer.train_step(0)
    before = flat(trainer)
    assert before["optimizer multiplier"] != 1.01
    with poisoned({1}):
        trainer.train_step(1)
    assert same(before, flat(trainer))
    trainer.train_step(2)
    assert not torch.equal(before["optimizer multiplier"], flat(trainer)["optimizer multiplier"])


def test_it_reads_the_mean_kl_of_the_whole_batch(corpus: Corpus) -> None:
    trainer = Trainer(tiny_config("lstm_vae", objective=RATE), corpus, World())
    _, terms, _ = trainer.train_step(0)
    expected = Multiplier(4.0)
    expected.ascend(terms.kl.detach().sum(1).mean(), 1e-3, GOOD)
    assert trainer.multiplier is not None
    torch.testing.assert_close(trainer.multiplier.value, expected.value)


def settled(wish: float) -> tuple[float, float]:
    """KL and |u| that a posterior of one mean and rate 4 comes to, where a mean of ``wish`` would reconstruct best."""
    multiplier, mean = Multiplier(4.0), torch.full((1, 1), 0.5, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.05)
    nats, values = [], []
    for _ in range(700):
        kl = 0.5 * mean.square()
        optimizer.zero_grad()
        (5 * (mean - wish).square().sum() + kl.sum() + multiplier.term(kl)).backward()
        optimizer.step()
        multiplier.ascend(kl.detach().sum(), 0.05, GOOD)
        nats.append(kl.item())
        values.append(multiplier.value.abs().item())
    return sum(nats[-200:]) / 200, sum(values[-200:]) / 200


def test_a_rate_holds_a_kl_that_would_be_below_it_and_leaves_a_larger_one_alone() -> None:
    kl, value = settled(wish=1.0)
    assert kl == pytest.approx(4.0, rel=0.05)
    mean = math.sqrt(8)  # KL 4; there the gradients of reconstruction and KL are u times that of the KL
    assert value == pytest.approx((10 * (mean - 1) + mean) / mean, rel=0.1)
    kl, value = settled(wish=5.0)
    assert kl == pytest.approx(0.5 * (50 / 11) ** 2, rel=0.02)  # as without a rate
    assert value < 0.06


def test_it_is_logged_and_a_run_without_a_rate_has_none(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("lstm_vae", steps=10, objective=RATE)
    records = run(config, corpus, World(), tmp_path / "held").records
    stored = final(tmp_path / "held")
    assert records[10]["train/multiplier"] == stored.tensors("optimizer")["multiplier"].abs().item()
    plain = tiny_config("lstm_vae", steps=10)
    assert "train/multiplier" not in run(plain, corpus, World(), tmp_path / "plain").records[10]
    assert "multiplier" not in final(tmp_path / "plain").tensors("optimizer")
    with pytest.raises(UserError, match="differ in 'multiplier'"):
        run(tiny_config("lstm_vae", steps=20, objective=RATE), corpus, World(), tmp_path / "plain")
    # a language model has no code to hold
    assert Trainer(tiny_config("byte_lstm", objective=RATE), corpus, World()).multiplier is None
