"""Models over pieces of text: what they cost, write and keep is that of the text in bytes."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.analysis.evaluation import evaluate
from raytrain.config.models import find_model, model_name
from raytrain.config.schema import to_dict
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.data.vocabulary import NUM_OUTPUTS, PAD, SIZE, STOP
from raytrain.models import Model, build, sampling
from raytrain.models.heads import negative_log_likelihood
from raytrain.models.symbols import outputs_of, symbols_of
from raytrain.runs import checkpoint as checkpoints
from raytrain.runs.trained_model import TrainedModel
from raytrain.storage import open_storage
from raytrain.training.loop import train
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import TINY_MODELS, TINY_VARIANTS, tiny_config

ABLE = [name for name, config in (TINY_MODELS | TINY_VARIANTS).items() if find_model(model_name(config)).reads_pieces]
MODELS = pytest.mark.parametrize("name", ABLE)
VOCABULARY = "bpe:300"


@pytest.fixture(scope="module", autouse=True)
def _library() -> None:
    pytest.importorskip("tokenizers")


def drawn_model(name: str, corpus: Corpus, vocabulary: str = VOCABULARY, **changes: Any) -> Model:
    """A model with weights that make some texts end and others not."""
    config = tiny_config(name, vocabulary=vocabulary, **{"sampling": "documents", **changes})
    model = build(config).eval()
    model.vocabulary = corpus.vocabulary(vocabulary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def test_outputs_and_symbols_stand_for_each_other() -> None:
    outputs = torch.arange(NUM_OUTPUTS + 5)
    symbols = symbols_of(outputs)
    assert outputs_of(symbols).tolist() == outputs.tolist()
    assert symbols.tolist() == [*range(STOP + 1), *range(SIZE, SIZE + 5)]


def test_the_likelihoods_of_pieces_sum_to_that_of_the_text() -> None:
    logits = torch.randn(2, 4, NUM_OUTPUTS + 3)
    tokens = torch.tensor([[65, SIZE + 2, STOP, PAD], [SIZE, SIZE + 1, 66, STOP]])
    nats = negative_log_likelihood(logits, tokens)
    expected = -logits.log_softmax(-1)
    for row, output in enumerate([(65, NUM_OUTPUTS + 2, STOP), (NUM_OUTPUTS, NUM_OUTPUTS + 1, 66, STOP)]):
        for position, number in enumerate(output):
            assert nats[row, position].item() == pytest.approx(expected[row, position, number].item(), rel=1e-5)
    assert nats[0, 3] == 0


@MODELS
@pytest.mark.parametrize("sampling_of", ["documents", "windows"])
def test_a_samples_probability_is_its_score(name: str, sampling_of: str, corpus: Corpus) -> None:
    model = drawn_model(name, corpus, sampling=sampling_of)
    z = sampling.prior_codes(model, 30, seed=3)
    drawn = sampling.sample(model, 30, seed=3)
    texts, cut, symbols = zip(*((item.text, item.truncated, item.symbols) for item in drawn), strict=True)
    assert [model.vocabulary.decode(row) for row in symbols] == list(texts)
    scores = sampling.score(model, texts, z, cut, symbols).tolist()
    assert [item.log_probability for item in drawn] == pytest.approx(scores, abs=1e-3)
    # the text ends with the piece by which it has the model's length in bytes
    lengths = model.vocabulary.lengths
    for item in drawn:
        assert len(item.text) - (lengths[item.symbols[-1]] if item.symbols else 0) < model.length
    assert any(symbol >= SIZE for row in symbols for symbol in row)


@MODELS
def test_prediction_is_what_writing_step_by_step_gives(name: str, corpus: Corpus) -> None:
    model = drawn_model(name, corpus)
    z = sampling.prior_codes(model, 3, seed=1)
    tokens = torch.tensor([[SIZE + 4, 97, SIZE, STOP], [98, SIZE + 1, SIZE + 2, STOP], [STOP, PAD, PAD, PAD]])
    state: Any = model.begin(z)
    previous = torch.full((3,), STOP)
    with torch.inference_mode():
        expected = model.predict(tokens, z)
        for position in range(3):
            logits, state = model.advance(previous, state)
            known = tokens[:, position] != PAD
            torch.testing.assert_close(logits[known], expected[known, position], atol=1e-4, rtol=1e-4)
            previous = torch.where(known, tokens[:, position], 0)


@MODELS
def test_padding_changes_nothing(name: str, corpus: Corpus) -> None:
    model = drawn_model(name, corpus)
    z = sampling.prior_codes(model, 1, seed=1)
    short = torch.tensor([[SIZE + 4, 97, SIZE, STOP]])
    wide = torch.cat((short, torch.full((1, 7), PAD)), dim=1)
    with torch.inference_mode():
        costs = [negative_log_likelihood(model.predict(tokens, z), tokens).sum().item() for tokens in (short, wide)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-5)
        if model.latent:
            torch.testing.assert_close(model.encode(short)[0], model.encode(wide)[0], atol=1e-5, rtol=1e-5)


class Silent:
    """A reporter that nobody listens to; it stops the run after the checkpoint of one step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def pending(self) -> list[Any]:
        return []

    def replay(self, records: list[Any]) -> None:
        pass

    def resumed(self, evaluations: list[dict[str, float]]) -> None:
        pass

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.stop_at:
            raise KeyboardInterrupt

    def preemption_notice(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "vocabulary"), [("byte_lstm", "char:260"), *((name, VOCABULARY) for name in TINY_MODELS if name in ABLE)]
)
def test_a_run_over_pieces_resumes_scores_and_writes(
    name: str, vocabulary: str, corpus: Corpus, tmp_path: Path
) -> None:
    short = {"steps": 4, "log_every": 2, "evaluate_every": 2, "checkpoint_every": 2}
    config = tiny_config(name, vocabulary=vocabulary, sampling="documents", length=60, **short)
    train(config, corpus, World(), open_storage(str(tmp_path / "whole")), Silent())
    with contextlib.suppress(KeyboardInterrupt):
        train(config, corpus, World(), open_storage(str(tmp_path / "halves")), Silent(stop_at=2))
    train(config, corpus, World(), open_storage(str(tmp_path / "halves")), Silent())
    stored, halves = (checkpoints.latest(open_storage(str(tmp_path / folder))) for folder in ("whole", "halves"))
    assert stored is not None
    assert halves is not None
    for weight, tensor in stored.tensors("model").items():
        assert torch.equal(tensor, halves.tensors("model")[weight]), weight
    assert stored.state["vocabulary"] == corpus.vocabulary(vocabulary).values()
    model = TrainedModel(stored)
    texts = [b"a river", "é😀 and \xff".encode("latin-1", "replace"), b"\xff\xfe"]
    for text, score in zip(texts, model.score(texts), strict=True):
        assert score.bits_per_byte == pytest.approx(score.bound / (math.log(2) * len(text)))
    written = model.sample(3, seed=1)
    assert [item.text for item in written] == [model.network.vocabulary.decode(item.symbols) for item in written]
    # the bits per byte of an evaluation are those that training reported, over bytes of text
    batches = EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples, model.network.vocabulary)
    metrics = evaluate(model.network, batches, iw_samples=1).metrics()
    assert stored.score is not None
    assert metrics["bound"] == pytest.approx(stored.score, rel=1e-4)
    assert metrics["text_bytes"] == sum(batch.text_bytes for batch in batches.batches())
    assert sum(row["samples"] for row in metrics["by_length"]) == config.evaluate_samples


def test_a_checkpoint_without_its_vocabulary_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    config = tiny_config("byte_lstm", vocabulary=VOCABULARY, steps=2)
    train(config, corpus, World(), open_storage(str(tmp_path)), Silent())
    stored = checkpoints.latest(open_storage(str(tmp_path)))
    assert stored is not None
    for damage in ({}, {"vocabulary": corpus.vocabulary("char").values()}, {"vocabulary": {"format": 1}}):
        state = {key: value for key, value in stored.state.items() if key != "vocabulary"} | damage
        broken = checkpoints.Checkpoint(stored.step, stored.score, state, to_dict(config), "here", stored._tensors)
        with pytest.raises(UserError, match="checkpoint here: its vocabulary is"):
            TrainedModel(broken)


def test_a_trainer_goes_on_with_the_vocabulary_of_its_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    """Another version of the library may learn other pieces where the file was lost."""
    config = tiny_config("byte_lstm", vocabulary=VOCABULARY)
    trainer = Trainer(config, corpus, World())
    own = trainer.model.vocabulary
    other = type(own)(VOCABULARY, own.pieces, own._tokenizer_json.replace(" ", ""))
    trainer.use_vocabulary(other)
    assert trainer.train_batches.samples.vocabulary is trainer.model.vocabulary is other
    assert trainer.raw.vocabulary is other
