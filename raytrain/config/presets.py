"""Presets: configs that are known to work, by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig, ModelName, find_model
from raytrain.config.schema import ObjectiveConfig, OptimizerConfig, RunConfig
from raytrain.utils.errors import UserError

PresetName = str
"""One of ``PRESET_NAMES``."""
PRESET_NAMES: tuple[PresetName, ...] = ("laptop", "paper-ptb", "paper-tweets", "bios", "stream")
SMALL_BUDGET: dict[str, Any] = {
    "batch_size": 32,
    "steps": 2000,
    "log_every": 50,
    "evaluate_every": 500,
    "evaluate_samples": 1024,
    "checkpoint_every": 1000,
    "optimizer.learning_rate": 4e-3,
    "optimizer.decay_start": 0.3,
    "optimizer.clip": 10.0,
}
"""Fields with which a trial of the paper's grids takes minutes: ``--budget small`` of search_spaces/paper_*.py."""


def paper_ptb(model: Any) -> RunConfig[Any]:
    """Return a config for windows of 60 characters of Penn Treebank.

    As in Semeniuta et al. 2017, section 5.1, and their code.
    """
    return RunConfig(
        model=model,
        optimizer=OptimizerConfig(clip=0.0),
        data="ptb",
        sampling="windows",
        length=60,
        batch_size=64,
        steps=100_000,
        log_every=100,
        evaluate_every=1000,
        checkpoint_every=1000,
    )


def paper_tweets(model: Any) -> RunConfig[Any]:
    """Return a config for whole tweets of at most 127 bytes.

    As in Semeniuta et al. 2017, section 5.4, and their code.
    """
    return RunConfig(
        model=model,
        objective=ObjectiveConfig(start=0.5, end=0.6),
        optimizer=OptimizerConfig(decay_start=0.7, clip=0.0),
        data="tweets",
        sampling="documents",
        length=128,
        batch_size=32,
        steps=100_000,
        log_every=100,
        evaluate_every=1000,
        evaluate_samples=10_000,
        checkpoint_every=1000,
    )


def lstm_vae(config: RunConfig[Any], start: float, end: float) -> RunConfig[Any]:
    """Return ``config`` with the changes that the paper makes for its baseline.

    Annealing runs from ``start`` to ``end``, later than the hybrid's. There is input dropout and clipping, and no
    auxiliary loss.
    """
    return replace(
        config,
        objective=replace(config.objective, start=start, end=end, alpha=0.0, input_dropout=0.2),
        optimizer=replace(config.optimizer, clip=100.0),
    )


def laptop(model: Any, learning_rate: float = 1.6e-2) -> RunConfig[Any]:
    """Return a config that trains in a minute or two on one CPU core.

    Batches are small and the learning rate stays high for long. In so short a run, the number of steps with fast
    learning matters most.
    """
    return RunConfig(
        model=model,
        objective=ObjectiveConfig(annealing="constant", alpha=0.0),
        optimizer=OptimizerConfig(learning_rate=learning_rate, decay=0.92, decay_start=0.6),
        sampling="windows",
        length=64,
        batch_size=32,
        steps=768,
        log_every=32,
        evaluate_every=128,
        evaluate_samples=512,
        checkpoint_every=128,
    )


def auxiliary_first(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return ``config`` with an auxiliary loss that first teaches the hybrid's features, and then ends."""
    return replace(config, objective=replace(config.objective, alpha=1.0, alpha_end=0.4))


PRESETS: dict[tuple[PresetName, ModelName], RunConfig[Any]] = {
    ("laptop", "hybrid"): auxiliary_first(
        laptop(HybridConfig((16, 32), (32, 16), latent=8, hidden=256, skip=True, mean_norm=0.7))
    ),
    ("laptop", "lstm_vae"): laptop(
        LstmVaeConfig(latent=8, hidden=256, pool="max", code_to_inputs=True, mean_norm=0.7), 1.2e-2
    ),
    ("laptop", "byte_lstm"): laptop(ByteLstmConfig(layers=1, hidden=256, dropout=0.0)),
    ("paper-ptb", "hybrid"): paper_ptb(HybridConfig()),
    ("paper-ptb", "lstm_vae"): lstm_vae(paper_ptb(LstmVaeConfig()), 0.1, 0.17),
    # a plain language model beside the paper's two models: only the decoder of its baseline
    ("paper-ptb", "byte_lstm"): paper_ptb(ByteLstmConfig(layers=1, hidden=500, dropout=0.0)),
    ("paper-tweets", "byte_lstm"): paper_tweets(ByteLstmConfig(layers=1, hidden=1000, dropout=0.0)),
    ("paper-tweets", "hybrid"): paper_tweets(
        HybridConfig((128, 256, 512, 512, 512), (512, 512, 256, 128, 200), latent=100, hidden=1000)
    ),
    ("paper-tweets", "lstm_vae"): lstm_vae(paper_tweets(LstmVaeConfig(latent=100, hidden=1000)), 0.5, 0.6),
    ("bios", "byte_lstm"): RunConfig(
        model=ByteLstmConfig(),
        data="bios",
        sampling="documents",
        length=201,
        batch_size=64,
        steps=30_000,
        log_every=100,
        evaluate_every=1000,
        evaluate_samples=4096,
        checkpoint_every=1000,
    ),
    # results per character that are comparable to published ones: the whole validation text, read without a break
    ("stream", "byte_lstm"): RunConfig(
        model=ByteLstmConfig(layers=1, hidden=512, dropout=0.0),
        optimizer=OptimizerConfig(learning_rate=8e-3, decay_start=0.3, clip=10.0),
        data="ptb_characters",
        sampling="stream",
        length=100,
        batch_size=32,
        steps=16_000,
        log_every=100,
        evaluate_every=1000,
        evaluate_samples=4096,
        checkpoint_every=1000,
    ),
}
"""The config of each preset and model. Plugins add those of their models."""


def preset(name: PresetName, model: ModelName) -> RunConfig[Any]:
    """Return the preset ``name`` of ``model``.

    Raises:
        UserError: the model has no such preset.
    """
    find_model(model)  # this loads the plugins, whose presets may be asked for
    if (name, model) not in PRESETS:
        known = [preset_name for preset_name, owner in PRESETS if owner == model]
        takes = f"--preset takes {', '.join(known)}" if known else "it has none: give a config with --config"
        raise UserError(f"there is no preset {name!r} for {model}; {takes}")
    return PRESETS[name, model]


def full_size(model: ModelName) -> PresetName:
    """Return the name of the preset with the sizes of the literature, for machines with GPUs."""
    return find_model(model).full_size


def for_source(config: RunConfig[Any], source: str) -> RunConfig[Any]:
    """Return ``config`` with another source of text, sampled to suit it: tweets and bios as whole documents.

    A stream stays a stream.
    """
    if source == config.data or config.sampling == "stream":
        return replace(config, data=source)
    documents = {"tweets": 128, "bios": 201}
    if source in documents:
        return replace(config, data=source, sampling="documents", length=documents[source])
    return replace(config, data=source)
