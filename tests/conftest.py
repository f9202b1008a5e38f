"""What the tests share: a small corpus, tiny configs."""

from __future__ import annotations

import os
from typing import Any

import pytest

# before any test starts a process: one thread each, no telemetry, no network services
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.storage import base as storage

# a test whose storage fails for good need not wait as long as a run does
storage.DEFAULT_PATIENCE_S = 2.0

pytest_plugins = [
    "tests.support.browser",
    "tests.support.machine",
    "tests.support.metadata_server",
    "tests.support.mlflow_server",
    "tests.support.postgres_server",
    "tests.support.s3_server",
]
"""Servers and machines that tests ask for by a fixture's name."""

TINY_MODELS = {
    "hybrid": HybridConfig((16, 32), (32, 16), latent=8, hidden=32),
    "lstm_vae": LstmVaeConfig(latent=8, hidden=32),
    "byte_lstm": ByteLstmConfig(layers=2, hidden=32, dropout=0.3),
}


def tiny_config(model: str, **changes: Any) -> RunConfig[Any]:
    """A config that trains in seconds, in float32 so that nothing is hidden by rounding."""
    settings = {
        "length": 24,
        "batch_size": 64,
        "steps": 20,
        "log_every": 5,
        "evaluate_every": 10,
        "checkpoint_every": 10,
        "evaluate_samples": 64,
        "precision": "float32",
    }
    return RunConfig(model=TINY_MODELS[model], **{**settings, **changes})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A small synthetic corpus."""
    from raytrain.data import synthetic

    folder = tmp_path_factory.mktemp("corpus") / "synthetic"
    with CorpusWriter(folder, name="synthetic", source="tests") as writer:
        for seed, (split, num) in enumerate({"train": 4000, "valid": 500}.items()):
            for text, _ in synthetic.documents(seed, num):
                writer.add(split, text)  # type: ignore[arg-type]
    return Corpus.open(folder)
