"""The registry of metrics: a metric that is registered from outside is computed, recorded and shown everywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from raytrain import metrics
from raytrain.analysis.evaluation import evaluate
from raytrain.analysis.figures.records import read_trials
from raytrain.analysis.figures.tables import trial_cells
from raytrain.analysis.tables import evaluation_summary, markdown_table, search_summary
from raytrain.data.batches import EvaluationBatches
from raytrain.data.corpus import Corpus
from raytrain.metrics import (
    COLLAPSED,
    METRIC,
    METRICS,
    REQUIRED_METRICS,
    Metric,
    SearchObjective,
    collapse_warning,
    headline,
    shown_metrics,
)
from raytrain.models.ladder import Ladder
from raytrain.runs.records import OUTCOME, read_outcome
from raytrain.runs.trials import Trial
from raytrain.search.finish import write_table
from raytrain.training.trainer import Trainer, World
from tests.conftest import tiny_config


def test_every_metric_is_registered_under_its_key() -> None:
    assert all(key == metric.key for key, metric in METRICS.items())
    assert set(REQUIRED_METRICS) <= METRICS.keys()
    # a metric that is added here would make every search of before unreadable
    assert REQUIRED_METRICS == ("bound", "bits_per_byte", "reconstruction", "kl")


def test_a_value_has_the_digits_of_its_metric() -> None:
    values = {"bits_per_byte": 1.69149, "kl": 2.678, "bound": math.inf}
    assert METRICS["bits_per_byte"].format(values) == "1.691"
    assert METRICS["kl"].format(values) == "2.68"
    assert METRICS["bound"].format(values) == METRICS["active_units"].format(values) == ""
    assert headline(values) == "negative ELBO 1.691 bits/byte, KL 2.68 nats"
    assert headline({"bits_per_byte": 2.0, "nll_bits_per_byte": 1.9, "kl": 1.0}).endswith(", NLL 1.900 bits/byte")
    assert headline({"bits_per_byte": 2.0}) == "negative ELBO 2.000 bits/byte"


def test_a_table_has_columns_for_what_any_trial_has_in_one_order() -> None:
    found = shown_metrics([{"kl": 1.0}, {"active_units": 2.0, "bits_per_byte": 2.0, "reconstruction": 3.0}, {}])
    assert [metric.key for metric in found] == ["bits_per_byte", "kl", "active_units"]
    assert shown_metrics([]) == []


@pytest.fixture
def share() -> Iterator[Metric]:
    """A metric that is not the package's: the share of the KL in the negative ELBO, in percent."""
    metric = Metric(
        "kl_share",
        label="KL share",
        unit="percent",
        digits=1,
        better="neither",
        compute=lambda model, values: 100 * values["kl"] / values["bound"],
    )
    METRICS[metric.key] = metric
    yield metric
    del METRICS[metric.key]


def a_trial(number: int, best: dict[str, float]) -> Trial:
    return Trial(
        number=number,
        identity=f"id{number}",
        config=tiny_config("hybrid"),
        params={},
        distributions={},
        fields={},
        best=best,
        status="finished",
    )


def test_a_registered_metric_is_in_every_evaluation_record_and_table(
    share: Metric, corpus: Corpus, tmp_path: Path
) -> None:
    config = tiny_config("hybrid")
    trainer = Trainer(config, corpus, World())
    found = trainer.evaluate()
    assert found["kl_share"] == pytest.approx(100 * found["kl"] / found["bound"])
    # one of before, and one that has it
    before = {name: value for name, value in found.items() if name != "kl_share"}
    trials = [a_trial(0, metrics.known_metrics(before)), a_trial(1, metrics.known_metrics(found | {"other": 1.0}))]
    assert trials[1].best == found
    text = f"{found['kl_share']:.1f}"
    for table in (search_summary(trials, SearchObjective(), None), markdown_table(trials)):
        assert "KL share" in table
        assert text in table
    write_table(trials, SearchObjective(), tmp_path / "trials.parquet")
    rows = read_trials(tmp_path / "trials.parquet")
    assert [row.metrics.get("kl_share") for row in rows] == [None, found["kl_share"]]
    head, cells = trial_cells(rows)
    assert [line[head.index("KL share")] for line in cells] == ["", text]

    totals = evaluate(trainer.model, EvaluationBatches(corpus.split("valid"), config, config.evaluate_samples), 1)
    assert "kl_share" not in totals.metrics()
    measured = totals.metrics(trainer.model)
    assert measured["kl_share"] == pytest.approx(found["kl_share"], rel=1e-5)
    ladder = Ladder((5.0, 4.0, 3.5, 3.0, 3.1, 3.2, 3.3, 3.4), 8_000_000, 9_000_000, 0.5)
    result: dict[str, Any] = {
        "model": "hybrid", "step": 0, "corpus": {"name": "c"}, "split": "valid", "over_long_left_out": 0,
        "metrics": measured, "texts": None, "ngrams": asdict(ladder),
    }  # fmt: skip
    summary = evaluation_summary(result)
    assert "KL share" in summary
    bits = measured[METRIC]
    assert "of byte n-grams, n = 1 to 8: 5.000, 4.000, 3.500, 3.000, 3.100, 3.200, 3.300, 3.400" in summary
    comparison = f"model {bits:.3f}, byte 4-gram 3.000, entropy 0.500 bits per byte; n-grams fitted on 8 of 9 MB"
    assert comparison in summary
    warning = f"warning: the model has learnt less than counting: it needs {bits / 3 - 1:.1%} more than a byte 4-gram"
    assert warning in " ".join(summary.split())
    better = evaluation_summary(result | {"metrics": measured | {METRIC: 2.9}})
    assert "model 2.900, byte 4-gram 3.000" in better
    assert "less than counting" not in better
    pieces = replace(ladder, bits=(4.0, 2.5, 2.6), vocabulary="bpe:300")
    both = evaluation_summary(result | {"ngrams": asdict(replace(ladder, pieces=pieces))})
    assert "bits/byte of bpe:300 n-grams, n = 1 to 3: 4.000, 2.500, 2.600" in both
    assert f"model {bits:.3f}, byte 4-gram 3.000, bpe:300 2-gram 2.500, entropy 0.500 bits per byte" in both
    assert f"it needs {bits / 2.5 - 1:.1%} more than a bpe:300 2-gram" in " ".join(both.split())


def test_a_value_that_is_not_finite_is_left_out(share: Metric, corpus: Corpus) -> None:
    METRICS[share.key] = replace(share, compute=lambda model, values: math.nan)
    assert "kl_share" not in Trainer(tiny_config("hybrid"), corpus, World()).evaluate()


@pytest.mark.parametrize("missing", sorted(METRICS.keys() - set(REQUIRED_METRICS)))
def test_a_record_that_lacks_a_newer_metric_is_read(share: Metric, tmp_path: Path, missing: str) -> None:
    best = dict.fromkeys(METRICS.keys() - {missing, share.key}, 2.0)
    assert Trial.from_json(a_trial(0, best).to_json()).best == best
    outcome = {"best_step": 1, "best": best, "precision": "float32", "device": "cpu", "samples": []}
    (tmp_path / OUTCOME).write_text(json.dumps(outcome))
    assert read_outcome(str(tmp_path)) == outcome
    assert "trials, best first" in search_summary([a_trial(0, best)], SearchObjective(), None)


@pytest.mark.parametrize("missing", REQUIRED_METRICS)
def test_a_record_that_lacks_a_required_metric_is_refused(missing: str) -> None:
    best = dict.fromkeys(METRICS.keys() - {missing}, 2.0)
    with pytest.raises(ValueError, match=f"best has no {missing}"):
        Trial.from_json(a_trial(0, best).to_json())


def test_a_collapsed_posterior_is_warned_of_only_where_there_is_a_latent_code() -> None:
    assert collapse_warning({"kl": 0.01}, has_latent=True) == (
        "the posterior has collapsed (KL 0.010 nats): the decoder ignores the latent code"
    )
    assert collapse_warning({"kl": 6.0, "used": -0.001}, has_latent=True, whose="the best trial's") == (
        "the best trial's posterior has collapsed (KL 6.000 nats, of which 0.000 are used): "
        "the decoder ignores the latent code"
    )
    assert collapse_warning({"kl": 0.0}, has_latent=False) is None
    for nats in (COLLAPSED, 3.0, math.nan):
        assert collapse_warning({"kl": nats}, has_latent=True) is None
        assert collapse_warning({"kl": 0.0, "used": nats}, has_latent=True) is None
