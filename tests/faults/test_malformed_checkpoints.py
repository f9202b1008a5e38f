"""Checkpoints whose sums are right and whose contents are not: refused by a line, never used."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raytrain.config.schema import to_dict
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.models import build
from raytrain.models.sampling import sample
from raytrain.runs.checkpoint import Snapshot
from raytrain.runs.checkpoint_writer import CheckpointWriter
from raytrain.runs.trained_model import from_checkpoint
from raytrain.storage import open_storage
from raytrain.training import torchrun as loop
from raytrain.training.trainer import Trainer, World
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config
from tests.faults.malformed.mutate import overwrite
from tests.faults.malformed.stock import small_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return small_corpus(tmp_path / "corpus")


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    import torch

    from raytrain.models import build
    from raytrain.runs.checkpoint import Checkpoint

    config = tiny_config("byte_lstm")
    weights = dict(build(config).state_dict())

    def stored(changed: dict[str, torch.Tensor], model: dict[str, Any] | None = None) -> Checkpoint:
        values = to_dict(config)
        values["model"] |= model or {}
        return Checkpoint(1, None, {}, values, "here", {"model": changed})

    from_checkpoint(stored(weights))
    name = sorted(weights)[0]
    for changed, model, line in (
        ({**weights, "more": torch.zeros(1)}, None, r"model\.safetensors differ in 'more'"),
        ({key: value for key, value in weights.items() if key != name}, None, rf"safetensors differ in '{name}'"),
        ({**weights, name: weights[name][:1]}, None, f"{name} is "),
        ({**weights, name: weights[name].half()}, None, "float16"),
        (weights, {"hidden": 2**40}, "its config is not that of a model"),
        (weights, {"hidden": 2**20}, "the model of its config has"),
        (weights, {"layers": 0}, "its config is not that of a model"),
        ({**weights, name: weights[name] * math.inf}, None, f"{name} is not finite"),
    ):
        with pytest.raises(UserError, match=line):
            from_checkpoint(stored(changed, model))


def test_a_model_whose_predictions_are_no_numbers_writes_nothing() -> None:
    model = build(tiny_config("hybrid")).eval()
    for name, values in model.named_buffers():
        if name.endswith("running_var"):
            values.fill_(-1.0)  # finite, as what is stored must be
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="predictions are not finite"):
            sample(model, 2, temperature=temperature)


# ----------------------------------------------------------------------------- going on from a checkpoint


def checkpointed(corpus: Corpus, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> list[str]:
    """The arguments of the loop that goes on from a checkpoint whose state and tensors ``change`` has changed."""
    config = tiny_config("byte_lstm", steps=2)
    trainer = Trainer(config, corpus, World())
    tensors = trainer.tensors()
    state: dict[str, Any] = {
        "best_step": 1,
        "best": {"bound": 9.0},
        "evaluations": [{"step": 1, "bound": 9.0}],
        "pending": [],
    }
    state["corpus"] = corpus.digest
    change(state, tensors)
    with CheckpointWriter(open_storage(folder / "runs")) as writer:
        writer.save(Snapshot(1, tensors, state, to_dict(config)), score=9.0)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return [str(folder / "config.json"), "--corpus", str(corpus.path), "--storage", str(folder / "runs")]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda state, tensors: state.pop("corpus"), "of a run with another model or another corpus"),
        (lambda state, tensors: state.pop("best_step"), "best_step is None: must be int"),
        (lambda state, tensors: state.update(best={"bound": "low"}), "best.bound is 'low': must be a number"),
        (lambda state, tensors: state.update(evaluations=[1]), "evaluations is 1: must be an object"),
        (lambda state, tensors: state.update(pending={}), "pending is {}: must be a list"),
        (lambda state, tensors: tensors["optimizer"].popitem(), "optimizer.safetensors differ in"),
        (
            lambda state, tensors: tensors["optimizer"].update(
                {name: value.flatten()[:1] for name, value in tensors["optimizer"].items() if value.ndim}
            ),
            r"is \[1\] of torch.float32, the model of its config has",
        ),
    ],
)
def test_a_run_does_not_go_on_from_what_is_not_its_state(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, line: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["loop", *checkpointed(corpus, tmp_path, change)])
    with pytest.raises(UserError, match=line):
        loop.main()


def test_the_loop_refuses_what_it_cannot_train_on_in_one_line(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = checkpointed(corpus, tmp_path, lambda state, tensors: None)
    (tmp_path / "nested.json").write_text("[" * 5000)
    (tmp_path / "long.json").write_text(json.dumps(to_dict(tiny_config("byte_lstm", length=10**6))))
    overwrite(corpus.path / "train.bin")
    for location, value, line in (
        (0, str(tmp_path / "nested.json"), "cannot read the config .* nested too deeply"),
        (1, "--unknown", "arguments are required: --corpus"),
        (2, str(corpus.path), r"train\.bin was altered"),
    ):
        monkeypatch.setattr(sys, "argv", ["loop", *whole[:location], value, *whole[location + 1 :]])
        with pytest.raises(UserError, match=line):
            loop.main()
    with CorpusWriter(tmp_path / "small", name="c", source="tests") as writer:
        writer.add("train", b"few words")
        writer.add("valid", b"few words")
    monkeypatch.setattr(
        sys, "argv",
        ["loop", str(tmp_path / "long.json"), "--corpus", str(tmp_path / "small"), "--storage", str(tmp_path / "x")],
    )  # fmt: skip
    with pytest.raises(UserError, match="bytes"):
        loop.main()
