"""A run that reads a stream: its state goes from step to step, into checkpoints and over any number of workers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.config.models import ByteLstmConfig
from raytrain.config.schema import OptimizerConfig, RunConfig
from raytrain.data.corpus import Corpus
from raytrain.data.pieces import learn
from raytrain.data.vocabulary import STOP
from raytrain.models.sampling import sample
from raytrain.models.terms import Terms
from raytrain.runs.trained_model import TrainedModel, load
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.training.test_divergence import flat, poisoned, same
from tests.unit.training.test_loop import final, on_workers, run


def stream_config(**changes: Any) -> RunConfig[Any]:
    return tiny_config("byte_lstm", sampling="stream", **changes)


def frozen(**changes: Any) -> RunConfig[Any]:
    """A run without dropout whose weights do not change: a step is below the resolution of float32."""
    model = ByteLstmConfig(layers=2, hidden=32, dropout=0.0)
    return replace(stream_config(optimizer=OptimizerConfig(learning_rate=1e-30), **changes), model=model)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_cost_what_the_whole_text_costs_at_once(corpus: Corpus, precision: str) -> None:
    """Nothing is forgotten between two steps: as if each lane were one text of all chunks."""
    trainer = Trainer(frozen(precision=precision), corpus, World())
    trainer.rehearse()
    steps = [trainer.train_step(step)[:2] for step in range(3)]
    trainer.model.eval()
    tokens = torch.cat([batch.tokens for batch, _ in steps], dim=1)
    with trainer.autocast(), torch.no_grad():
        logits = trainer.model.predict(tokens, torch.zeros(len(tokens), 0)).float()
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction="none").split(24, 1)
    for (_, terms), expected in zip(steps, nats, strict=True):
        torch.testing.assert_close(terms.reconstruction, expected.sum(1), rtol=1e-5, atol=1e-4)


def test_training_does_not_go_back_beyond_a_chunk(corpus: Corpus) -> None:
    trainer = Trainer(stream_config(), corpus, World())
    _, terms, _ = trainer.train_step(0)
    assert terms.state is not None
    assert not any(state.requires_grad for state in (*terms.state.values(), *trainer.lanes.values()))
    assert {name: tuple(state.shape) for name, state in trainer.lanes.items()} == {
        f"{part}.{layer}": (64, 32) for layer in range(2) for part in ("hidden", "cell")
    }
    # windows and documents carry nothing
    other = Trainer(tiny_config("byte_lstm"), corpus, World())
    assert other.train_step(0)[1].state is None
    assert other.tensors().keys() == {"model", "optimizer"}


def test_gradients_of_slices_add_up_to_those_of_the_batch(corpus: Corpus) -> None:
    def gradients(size: int) -> list[torch.Tensor]:
        trainer = Trainer(stream_config(), corpus, World())
        trainer.train_step(0)
        trainer.train_step(1)  # the lanes have a state now
        for rank in range(size):
            trainer.forward_backward(trainer.step_inputs(trainer.train_batches.batch(2, rank, size), 2))
        return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]

    for whole, summed in zip(gradients(1), gradients(3), strict=True):
        torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()) + 1e-7)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(corpus: Corpus) -> None:
    def ruined(trainer: Trainer, terms: Terms) -> Terms:
        state = {name: part * math.nan for name, part in (terms.state or {}).items()}
        return replace(terms, reconstruction=terms.reconstruction * math.nan, state=state)

    with poisoned({2}, fault=ruined):
        trainer = Trainer(stream_config(), corpus, World())
        trainer.train_step(0)
        trainer.train_step(1)
        before = flat(trainer)
        trainer.train_step(2)
        assert trainer.skipped.counts() == [1, 1, 1]
        assert same(before, flat(trainer))
        trainer.train_step(3)
        after = flat(trainer)
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not any(torch.equal(before[name], after[name]) for name in before if name.startswith("stream"))


def test_an_evaluation_leaves_the_state_of_training_alone(corpus: Corpus) -> None:
    trainer = Trainer(stream_config(), corpus, World())
    trainer.train_step(0)
    before = flat(trainer)
    first = trainer.evaluate()
    assert trainer.evaluate() == first
    assert same(before, flat(trainer))


# ------------------------------------------------------------------------------------------- the run


def _undisturbed_and_resumed(world: World, corpus_path: str, out: str, vocabulary: str = "byte") -> None:
    corpus = Corpus.open(corpus_path)
    config = stream_config(steps=40, evaluate_every=20, checkpoint_every=20, vocabulary=vocabulary)
    records = run(config, corpus, world, Path(out, "whole")).records
    run(config, corpus, world, Path(out, "parts"), stop_at=20)
    run(config, corpus, world, Path(out, "parts"))
    if world.rank == 0:
        Path(out, "records.json").write_text(json.dumps(records))


def assert_same_run(folder: Path) -> None:
    whole, parts = final(folder / "whole"), final(folder / "parts")
    assert whole.step == parts.step == 40
    for stem in ("model", "optimizer", "stream"):
        assert same(whole.tensors(stem), parts.tensors(stem)), stem
    assert whole.tensors("stream")["hidden.1"].shape == (64, 32)


@pytest.mark.parametrize("vocabulary", ["byte", "bpe:300"])
def test_a_resumed_run_is_bit_identical_on_1_worker(corpus: Corpus, tmp_path: Path, vocabulary: str) -> None:
    _undisturbed_and_resumed(World(), str(corpus.path), str(tmp_path), vocabulary)
    assert_same_run(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "vocabulary"), [(2, "byte"), (3, "byte"), (3, "bpe:300")])
def test_several_workers_train_the_same_resume_alike_and_leave_the_state_of_all_lanes(
    corpus: Corpus, tmp_path: Path, size: int, vocabulary: str
) -> None:
    """Three workers get uneven shares of the four groups. One worker may continue what they began."""
    for folder in ("one", "several"):
        (tmp_path / folder).mkdir()
    _undisturbed_and_resumed(World(), str(corpus.path), str(tmp_path / "one"), vocabulary)
    on_workers(size, _undisturbed_and_resumed, str(corpus.path), str(tmp_path / "several"), vocabulary)
    assert_same_run(tmp_path / "several")
    one, several = (json.loads((tmp_path / name / "records.json").read_text()) for name in ("one", "several"))
    for step, metrics in one.items():
        for name, value in metrics.items():
            if name != "train/bytes_per_second":
                # Adam turns the rounding of gradients near 0 into full steps: differences grow with the steps
                assert several[step][name] == pytest.approx(value, rel=1e-2, abs=1e-5), f"{step} {name}"
    alone, together = (final(tmp_path / name / "whole").tensors("stream") for name in ("one", "several"))
    for name, state in alone.items():
        # every lane, whoever has computed it
        torch.testing.assert_close(together[name], state, rtol=0, atol=0.01)
        assert (state.abs().amax(1) > 0.05).all()
    longer = stream_config(steps=60, evaluate_every=20, checkpoint_every=20, vocabulary=vocabulary)
    for name in ("one", "several"):
        run(longer, corpus, World(), tmp_path / name / "whole")
    bits = [final(tmp_path / name / "whole").state["best"]["bits_per_byte"] for name in ("one", "several")]
    assert bits[0] == pytest.approx(bits[1], rel=1e-2)


def test_a_stream_that_goes_on_with_other_pieces_is_cut_into_those(corpus: Corpus) -> None:
    trainer = Trainer(stream_config(vocabulary="bpe:300"), corpus, World())
    before = trainer.train_batches.batch(0).text_bytes
    trainer.use_vocabulary(learn(corpus.split("valid"), "bpe:300"))
    assert trainer.train_batches.batch(0).text_bytes != before
    trainer.use_vocabulary(corpus.vocabulary("bpe:300"))
    assert trainer.train_batches.batch(0).text_bytes == before


def test_a_run_of_windows_cannot_go_on_as_a_stream(corpus: Corpus, tmp_path: Path) -> None:
    run(tiny_config("byte_lstm", steps=4), corpus, World(), tmp_path)
    with pytest.raises(UserError, match=r"it has no stream.safetensors; it has model, optimizer"):
        run(stream_config(steps=8), corpus, World(), tmp_path)


def test_a_model_of_a_stream_writes_and_scores_texts_that_begin(corpus: Corpus, tmp_path: Path) -> None:
    run(stream_config(steps=4), corpus, World(), tmp_path)
    model = load(final(tmp_path).uri)
    assert [len(text.text) for text in sample(model, 3, max_length=8)] == [8, 8, 8]
    # as the first chunk of a lane costs it
    stored = TrainedModel(final(tmp_path))
    text = corpus.split("valid").stream[:24].tobytes()
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits, _ = model.read(tokens, torch.tensor([STOP]), model.stream_state(1))
    nats = torch.nn.functional.cross_entropy(logits[0], tokens[0], reduction="sum").item()
    assert stored.score([text])[0].reconstruction == pytest.approx(nats, rel=1e-5)
