from __future__ import annotations

import json
from typing import Any

import pytest

from raytrain.config.models import MODELS
from raytrain.config.presets import PRESET_NAMES, preset
from raytrain.config.schema import ObjectiveConfig, flatten, from_dict, identity, override, to_dict
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
]


@pytest.mark.parametrize(("name", "model"), ALL_PRESETS)
def test_presets_survive_json(name: Any, model: Any) -> None:
    config = preset(name, model)
    assert config.model_name == model
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


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
        ({"objective": {"alpha": float("nan")}}, r"objective\.alpha is nan: must be a finite number"),
        ({"objective": 3}, "objective must be an object"),
        (
            {"model": {"name": "gpt"}},
            "model.name must be one of hybrid, .*, not 'gpt'; .* RAYTRAIN_PLUGINS",
        ),
        ({"model": {"name": "hybrid", "feature_maps": "128"}}, r"model\.feature_maps is '128': must be a list"),
        ({"batch_size": 60}, "batch_size is 60: must be a multiple of group_size"),
        (
            {"objective": {"rate": 4.0}, "model": {"name": "hybrid", "mean_norm": 0.4, "fixed_variance": True}},
            r"objective\.rate is 4\.0: model\.fixed_variance fixes the KL",
        ),
    ],
)
def test_a_bad_config_is_one_line_that_names_the_field(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        from_dict({**to_dict(tiny_config("hybrid")), **change})


def test_flat_names_are_those_that_override_takes() -> None:
    config = tiny_config("hybrid")
    for name, value in flatten(config).items():
        if name != "model.name":
            assert override(config, {name: value}) == config
    assert override(config, {"objective.alpha": 0.7}).objective == ObjectiveConfig(alpha=0.7)
    for name in ("model.name", "objective", "objective.beta", "beta", ""):
        with pytest.raises(UserError, match="unknown field"):
            override(config, {name: 1})


def test_identity_follows_what_decides_the_result() -> None:
    config = tiny_config("hybrid")
    same = override(config, {"data_path": "/elsewhere"})
    assert identity(config, "digest") == identity(same, "digest")
    others = [
        identity(override(config, {"seed": 1}), "digest"),
        identity(override(config, {"objective.alpha": 0.3}), "digest"),
        identity(config, "another digest"),
        identity(config, "digest", repeat=1),
    ]
    assert len({identity(config, "digest"), *others}) == 5
