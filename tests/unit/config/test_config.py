from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from raytrain.config.models import MODELS, ModelSpec
from raytrain.config.presets import PRESET_NAMES, for_source, preset
from raytrain.config.schema import ObjectiveConfig, RunConfig, fingerprint, flatten, from_dict, override, to_dict
from raytrain.utils.errors import UserError
from tests.conftest import tiny_config

ALL_PRESETS = [
    ("laptop", "hybrid"),
    ("laptop", "lstm_vae"),
    ("laptop", "byte_lstm"),
    ("paper-ptb", "hybrid"),
    ("paper-ptb", "lstm_vae"),
    ("paper-ptb", "byte_lstm"),
    ("paper-tweets", "hybrid"),
    ("paper-tweets", "lstm_vae"),
    ("paper-tweets", "byte_lstm"),
    ("bios", "byte_lstm"),
    ("stream", "byte_lstm"),
]


@pytest.mark.parametrize(("name", "model"), ALL_PRESETS)
def test_presets_survive_json(name: Any, model: Any) -> None:
    config = preset(name, model)
    assert config.model_name == model
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_gradients_are_clipped_but_as_the_paper_does() -> None:
    clips = {(name, model): preset(name, model).optimizer.clip for name, model in ALL_PRESETS}
    paper = {pair: clip for pair, clip in clips.items() if pair[0].startswith("paper")}
    assert {clip for pair, clip in paper.items() if pair[1] == "lstm_vae"} == {100.0}
    assert {clip for pair, clip in paper.items() if pair[1] != "lstm_vae"} == {0.0}
    assert {clip for pair, clip in clips.items() if pair not in paper} == {10.0}


def test_other_presets_are_refused() -> None:
    refused = {(name, model) for name in PRESET_NAMES for model in MODELS} - set(ALL_PRESETS)
    assert refused
    for name, model in refused:
        with pytest.raises(UserError, match="there is no preset"):
            preset(name, model)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": "ten"}, "steps is 'ten': must be int"),
        ({"steps": 0}, "steps is 0: must be positive"),
        ({"steps": True}, "steps is True: must be int"),
        ({"speed": 1}, "unknown field speed"),
        ({"objective": {"alhpa": 1}}, r"unknown field objective\.alhpa"),
        ({"objective": {"annealing": "cosine"}}, r"objective\.annealing is 'cosine': must be one of constant"),
        (
            {"optimizer": {"schedule": "step"}},
            r"optimizer\.schedule is 'step': must be one of exponential, constant, lin",
        ),
        ({"optimizer": {"warmup": 1.0}}, r"optimizer\.warmup is 1\.0: a fraction of the steps, in \[0, 1\)"),
        ({"optimizer": {"weight_decay": -0.1}}, r"optimizer\.weight_decay is -0\.1: must not be negative"),
        ({"optimizer": {"ema": 1.0}}, r"optimizer\.ema is 1\.0: must be in \[0, 1\)"),
        ({"objective": {"alpha": float("nan")}}, r"objective\.alpha is nan: must be a finite number"),
        ({"objective": 3}, "objective must be an object"),
        (
            {"model": {"name": "gpt"}},
            "model.name must be one of hybrid, .*, not 'gpt'; .* RAYTRAIN_PLUGINS",
        ),
        ({"model": {"name": "hybrid", "feature_maps": "128"}}, r"model\.feature_maps is '128': must be a list"),
        ({"batch_size": 60}, "batch_size is 60: must be a multiple of group_size"),
        (
            {"sampling": "stream"},
            r"sampling is 'stream': hybrid carries no state from one chunk of text to the next; use windows or "
            r"documents, or a model that does \(byte_lstm\)$",
        ),
        (
            {"objective": {"rate": 4.0}, "model": {"name": "hybrid", "mean_norm": 0.4, "fixed_variance": True}},
            r"objective\.rate is 4\.0: model\.fixed_variance fixes the KL",
        ),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_field(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        from_dict({**to_dict(tiny_config("hybrid")), **change})


@dataclass(frozen=True)
class ToyConfig:
    """A model from outside the package."""


@pytest.mark.parametrize(
    ("changes", "able", "message"),
    [
        ({"sampling": "stream"}, "carries_state", "carries no state .* a model that does \\(byte_lstm\\)"),
        ({"vocabulary": "bpe:300"}, "reads_pieces", "reads and writes single bytes; .* a model of pieces \\(hybrid, "),
    ],
)
def test_only_an_able_model_reads_a_stream_or_pieces(
    changes: dict[str, Any], able: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert to_dict(tiny_config("byte_lstm", **changes)).items() >= changes.items()
    toy: dict[str, Any] = {"model": ToyConfig(), **changes}
    with pytest.raises(ValueError, match=f"ToyConfig {message}"):
        RunConfig(**toy)
    spec = ModelSpec(config=ToyConfig, implementation="a:B", has_latent=False, label="toy", full_size="laptop")
    monkeypatch.setitem(MODELS, "toy", spec)
    with pytest.raises(ValueError, match=f"toy {message}"):
        RunConfig(**toy)
    monkeypatch.setitem(MODELS, "toy", replace(spec, **{able: True}))  # type: ignore[arg-type]
    assert RunConfig(**toy).model == ToyConfig()


@pytest.mark.parametrize(
    ("name", "source", "sampling"),
    [
        ("laptop", "ptb_characters", "windows"),
        ("laptop", "tweets", "documents"),
        ("stream", "tweets", "stream"),
        ("stream", "synthetic", "stream"),
    ],
)
def test_another_source_is_sampled_as_suits_it_unless_it_is_read_as_a_stream(
    name: str, source: str, sampling: str
) -> None:
    config = for_source(preset(name, "byte_lstm"), source)
    assert (config.data, config.sampling) == (source, sampling)


def test_flat_names_are_those_that_override_takes() -> None:
    config = tiny_config("hybrid")
    for name, value in flatten(config).items():
        if name != "model.name":
            assert override(config, {name: value}) == config
    assert override(config, {"objective.alpha": 0.7}).objective == ObjectiveConfig(alpha=0.7)
    for name in ("model.name", "objective", "objective.beta", "beta", ""):
        with pytest.raises(UserError, match="unknown field"):
            override(config, {name: 1})


def test_the_fingerprint_follows_what_decides_the_result() -> None:
    config = tiny_config("hybrid")
    same = override(config, {"data_path": "/elsewhere"})
    assert fingerprint(config, "digest") == fingerprint(same, "digest")
    others = [
        fingerprint(override(config, {"seed": 1}), "digest"),
        fingerprint(override(config, {"objective.alpha": 0.3}), "digest"),
        fingerprint(config, "another digest"),
    ]
    assert len({fingerprint(config, "digest"), *others}) == 4
