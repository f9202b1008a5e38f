"""Fixtures and rules of all tests: a small corpus, tiny configs, markers, and a limit of time for the default suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# before any test starts a process: one thread each, no network services
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from raytrain.config.models import ByteLstmConfig, HybridConfig, LstmVaeConfig
from raytrain.config.schema import RunConfig
from raytrain.data.corpus import Corpus, CorpusWriter
from raytrain.storage import base as storage

# a test whose storage fails for good need not wait as long as a run does
storage.DEFAULT_PATIENCE_S = 2.0

pytest.register_assert_rewrite("tests.support")
pytest_plugins = [
    "tests.support.browser",
    "tests.support.machine",
    "tests.support.metadata_server",
    "tests.support.mlflow_database",
    "tests.support.mlflow_server",
    "tests.support.postgres_server",
    "tests.support.ray_instance",
    "tests.support.s3_server",
    "tests.support.tiny",
]
"""Servers and machines that tests ask for by a fixture's name."""

FOLDER = Path(__file__).parent
SERVERS = {"machines", "mlflow_server", "page", "postgres_server", "s3", "s3_server"}
"""Fixtures that start a real server or a browser: what asks for one is not in the default suite."""
FAST_FAULTS = ("test_malformed_records.py", "test_malformed_checkpoints.py", "test_storage_faults.py")
"""Files of tests/faults that kill nothing and take seconds."""
LONGEST = ("test_first_search.py", "test_loop.py")
"""Files of the default suite that take longest."""
MOST_SECONDS = 20.0
"""A test of the default suite that takes longer fails. RAYTRAIN_TESTS_SLOWNESS multiplies it on slow machines."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start Ray, servers or a browser, or that kill something, as ``slow``."""
    for item in items:
        if item.get_closest_marker("long") or item.get_closest_marker("campaign"):
            continue
        folder, name = item.path.relative_to(FOLDER).parts[0], item.path.name
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if SERVERS & set(getattr(item, "fixturenames", ())) or any(str(value).startswith("s3") for value in values):
            item.add_marker("server")
            item.add_marker("slow")
        elif folder == "cluster" or (folder == "faults" and name not in FAST_FAULTS):
            item.add_marker("slow")
    # the files that take longest begin, so that neither of the two processes ends with one of them alone
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Fail a test of the default suite that takes too long."""
    report = yield
    most = MOST_SECONDS * float(os.environ.get("RAYTRAIN_TESTS_SLOWNESS", "1"))
    slow = any(item.get_closest_marker(name) for name in ("slow", "long", "campaign"))
    if call.when == "call" and report.passed and call.duration > most and not slow:
        report.outcome = "failed"
        report.longrepr = (
            f"{item.nodeid} took {call.duration:.1f} s, and the default suite allows {most:g} s a test: make it "
            "faster, or mark it slow"
        )
    return report


TINY_MODELS = {
    "hybrid": HybridConfig((16, 32), (32, 16), latent=8, hidden=32),
    "lstm_vae": LstmVaeConfig(latent=8, hidden=32),
    "byte_lstm": ByteLstmConfig(layers=2, hidden=32, dropout=0.3),
}
TINY_VARIANTS = {
    "hybrid, normalised": HybridConfig((16, 32), (32, 16), latent=8, hidden=32, skip=True, mean_norm=0.6),
    "lstm_vae, normalised": LstmVaeConfig(latent=8, hidden=32, mean_norm=0.6, pool="mean", code_to_inputs=True),
    "lstm_vae, pooled": LstmVaeConfig(latent=8, hidden=32, pool="max"),
    "hybrid, fixed": HybridConfig((16, 32), (32, 16), latent=8, hidden=32, mean_norm=0.6, fixed_variance=True),
    "lstm_vae, fixed": LstmVaeConfig(latent=8, hidden=32, mean_norm=0.6, fixed_variance=True),
    "hybrid, regularised": HybridConfig((16, 32), (32, 16), latent=8, hidden=32, weight_dropout=0.3),
    "lstm_vae, regularised": LstmVaeConfig(latent=8, hidden=32, weight_dropout=0.3),
    "byte_lstm, regularised": ByteLstmConfig(layers=2, hidden=32, dropout=0.3, weight_dropout=0.3),
    "hybrid, layer-normalised": HybridConfig((16, 32), (32, 16), latent=8, hidden=32, layer_norm=True),
    "lstm_vae, layer-normalised": LstmVaeConfig(latent=8, hidden=32, layer_norm=True),
    "byte_lstm, layer-normalised": ByteLstmConfig(layers=2, hidden=32, dropout=0.3, layer_norm=True),
}
"""The same models with the remedies against posterior collapse, and with regularised and normalised LSTMs."""


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
    return RunConfig(model=(TINY_MODELS | TINY_VARIANTS)[model], **{**settings, **changes})


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
