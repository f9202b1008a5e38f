"""Encoders that runs start from: the same under any reference, kept once, refused where they do not fit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytrain.cluster.resources import Cluster
from raytrain.config.models import HybridConfig
from raytrain.config.schema import RunConfig, fingerprint
from raytrain.data.corpus import Corpus
from raytrain.models import build
from raytrain.runs.encoders import ENCODERS, Encoder, find_encoder, read_encoder
from raytrain.runs.workspace import Workspace
from raytrain.search import setup
from raytrain.search.earlier import WarmStarts
from raytrain.search.options import SearchOptions, SearchRequest
from raytrain.search.space import read_space
from raytrain.storage import open_storage
from raytrain.storage.base import Storage
from raytrain.training import launch
from raytrain.training.options import TrainOptions
from raytrain.training.trainer import World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.unit.training.test_loop import final, run


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(tiny_config("hybrid", steps=2, evaluate_every=2), corpus, World(), folder / "checkpoints")
    return folder


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "storage")


def starting(reference: str | Path, model: str = "hybrid", **changes: Any) -> RunConfig[Any]:
    return tiny_config(model, encoder_from=str(reference), **changes)


def found(reference: str | Path, storage: Storage) -> Encoder:
    encoder = find_encoder(starting(reference), storage)
    assert encoder is not None
    return encoder


def test_it_holds_what_the_model_declares(trained: Path, storage: Storage) -> None:
    weights = final(trained / "checkpoints").tensors("model")
    tensors = found(trained, storage).tensors
    assert {name.partition(".")[0] for name in tensors} == {"convolutions", "encoder_norms", "posterior"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())
    assert find_encoder(tiny_config("hybrid"), storage) is None


def test_a_run_is_the_same_from_wherever_its_encoder_was_read(trained: Path, storage: Storage, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "copy")
    first = found(trained, storage)
    config = first.start(starting(trained), storage)
    references = (tmp_path / "copy", trained / "checkpoints" / "step-00000002", first.digest)
    for reference in references:
        assert found(reference, storage).start(starting(reference), storage) == config
    assert storage.list() == [f"{ENCODERS}/{first.digest}.safetensors"]
    other = Encoder("x", {name: tensor + 1 for name, tensor in first.tensors.items()}).start(starting("x"), storage)
    names = {fingerprint(each, "corpus") for each in (tiny_config("hybrid"), config, other)}
    assert len(names) == 3


def test_what_was_kept_is_read_back_and_checked(trained: Path, storage: Storage) -> None:
    encoder = found(trained, storage)
    encoder.publish(storage)
    shutil.move(trained, trained.with_name("away"))
    try:
        tensors = read_encoder(storage, encoder.digest)
    finally:
        shutil.move(trained.with_name("away"), trained)
    assert tensors.keys() == encoder.tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.tensors.items())
    key = f"{ENCODERS}/{encoder.digest}.safetensors"
    storage.write(key, storage.read(key)[:-1] + b"\1")
    with pytest.raises(UserError, match=r"encoder_from: .* was altered"):
        read_encoder(storage, encoder.digest)
    with pytest.raises(
        UserError, match=r"encoder_from: there is no .*/encoders/0{64}\.safetensors; give --encoder-from"
    ):
        find_encoder(starting("0" * 64), storage)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            HybridConfig((16, 32), (32, 16), latent=6, hidden=32),
            r"posterior\.linear\.bias is \[16\] of torch\.float32 there, and \[12\] of torch\.float32 in the hybrid of",
        ),
        (
            HybridConfig((16, 32), (32, 16), latent=8, hidden=32, mean_norm=0.4),
            r"posterior\.norm\.bias is missing there, and \[8\] of torch\.float32 in the hybrid of this config",
        ),
        (tiny_config("lstm_vae").model, r"convolutions\.0\.bias is \[16\] of torch\.float32 there, and missing in the"),
        (tiny_config("byte_lstm").model, r"and missing in the byte_lstm of this config"),
    ],
)
def test_an_encoder_of_another_model_is_one_line_that_names_both(
    trained: Path, storage: Storage, model: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words) as caught:
        found(trained, storage).start(replace(starting(trained), model=model), storage)
    assert str(caught.value).startswith(f"--encoder-from {trained}: ")
    assert "\n" not in str(caught.value)
    assert storage.list() == []


def test_what_has_no_encoder_is_one_line(corpus: Corpus, storage: Storage, tmp_path: Path) -> None:
    run(tiny_config("byte_lstm", steps=1), corpus, World(), tmp_path / "lm" / "checkpoints")
    with pytest.raises(UserError, match=r"--encoder-from .*/lm: that model has no encoder"):
        find_encoder(starting(tmp_path / "lm", "lstm_vae"), storage)
    with pytest.raises(UserError, match=r"--encoder-from: .*nothing does not exist or is empty"):
        find_encoder(starting(tmp_path / "nothing"), storage)


# ------------------------------------------------------------------------------------ the training loop


def test_a_run_starts_from_it_with_a_new_decoder(
    trained: Path, corpus: Corpus, storage: Storage, tmp_path: Path
) -> None:
    """Bit-identical when it is stopped and resumed, without the encoder at hand."""
    encoder = found(trained, storage)
    config = encoder.start(starting(trained, steps=20, seed=7), storage)
    calls = []

    def read() -> Any:
        calls.append(len(calls))
        return read_encoder(storage, encoder.digest)

    # a rate of 0 would be refused; this one leaves the weights where they start
    still = replace(config, steps=1, optimizer=replace(config.optimizer, learning_rate=1e-30))
    run(still, corpus, World(), tmp_path / "still", encoder=read)
    weights, fresh = final(tmp_path / "still").tensors("model"), build(config).state_dict()
    for name, tensor in weights.items():
        if "running" not in name and name not in ("output.bias", "auxiliary.bias"):  # those are the text's frequencies
            expected = encoder.tensors.get(name, fresh[name])
            torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-9)
    assert not torch.equal(weights["posterior.linear.weight"], fresh["posterior.linear.weight"])

    run(config, corpus, World(), tmp_path / "whole", encoder=read)
    run(config, corpus, World(), tmp_path / "parts", stop_at=10, encoder=read)
    assert len(calls) == 3

    def gone() -> Any:
        raise AssertionError("a resumed run asked for the encoder")

    run(config, corpus, World(), tmp_path / "parts", encoder=gone)
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    for stem in ("model", "optimizer"):
        assert all(torch.equal(tensor, parts.tensors(stem)[name]) for name, tensor in whole.tensors(stem).items())
    with pytest.raises(UserError, match=r"encoder_from is '.*': only python -m raytrain\.train and tune can read it"):
        run(config, corpus, World(), tmp_path / "other")


# ------------------------------------------------------------------------------------------ the commands


def refuse_work(address: Any) -> Any:
    raise AssertionError("Ray was asked for")


def test_train_refuses_an_encoder_that_does_not_fit_before_it_takes_anything(
    trained: Path, corpus: Corpus, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "connect", refuse_work)
    config = starting(trained, "lstm_vae")
    with pytest.raises(UserError, match="in the lstm_vae of this config"):
        launch.train(config, config, TrainOptions(), Workspace(storage, corpus, ""))
    assert storage.list() == []


def test_train_claims_its_name_for_the_digest(
    trained: Path, corpus: Corpus, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed = []

    def claim(storage: Storage, name: str, config: RunConfig[Any], corpus: Corpus, **options: Any) -> Any:
        claimed.append(config)
        raise InterruptedError

    for name, fake in {
        "connect": lambda address: None,
        "read_cluster": lambda: Cluster(({"CPU": 1.0},)),
        "check_tracking": lambda *arguments: None,
        "claim_name": claim,
    }.items():
        monkeypatch.setattr(launch, name, fake)
    workspace = Workspace(storage, corpus, "")
    for options in (TrainOptions(), TrainOptions(resume="run", name="run")):
        config = claimed[0] if claimed else starting(trained)
        with pytest.raises(InterruptedError):
            launch.train(config, config, options, workspace)
        storage.delete_prefix(ENCODERS)  # a run that is resumed does without
    assert claimed == [found(trained, storage).named(starting(trained))] * 2


SPACE = "def space(trial):\n    return {'model.latent': trial.suggest_categorical('latent', [%s])}\n"


def request(trained: Path, source: str) -> SearchRequest:
    config = starting(trained)
    return SearchRequest(options=SearchOptions(), space=read_space("mine", source), bases={"hybrid": config}, size="")


def test_a_search_checks_every_point_of_its_space(trained: Path, corpus: Corpus, storage: Storage) -> None:
    encoder, workspace = found(trained, storage), Workspace(storage, corpus, "")
    fits = setup.with_encoder(request(trained, SPACE % "8"), encoder)
    assert setup.check_request(fits, workspace, encoder=encoder) == WarmStarts()
    plan = setup.make_plan(fits, workspace, WarmStarts())
    assert plan.bases["hybrid"].encoder_from == encoder.digest
    wide = setup.with_encoder(request(trained, SPACE % "8, 16"), encoder)
    with pytest.raises(UserError, match=r"posterior\.linear\.bias is \[16\] of torch\.float32 there, and \[32\]"):
        setup.check_request(wide, workspace, encoder=encoder)
    own = setup.with_encoder(request(trained, "def space(trial):\n    return {'encoder_from': 'runs/x'}\n"), encoder)
    with pytest.raises(UserError, match="search space mine sets encoder_from: give it by --encoder-from"):
        setup.check_request(own, workspace, encoder=encoder)
