"""Checks of a config against its corpus and its workers, before anything starts."""

from __future__ import annotations

from typing import Any

from raytrain.config.schema import RunConfig
from raytrain.data.batches import EvaluationBatches, TrainingBatches, rank_groups
from raytrain.data.corpus import Corpus
from raytrain.data.pools import part_of
from raytrain.models import build_empty
from raytrain.utils.errors import UserError


def check_samples(config: RunConfig[Any], corpus: Corpus, workers: int) -> None:
    """Check that training and evaluation have samples, and that every worker has a share of each batch.

    Raises:
        UserError: a model that cannot be built, a split shorter than one sample, or more workers than sample groups.
    """
    try:
        build_empty(config)
    except (RuntimeError, OverflowError, MemoryError) as error:
        raise UserError(f"the model of this config cannot be built: {str(error).splitlines()[0]}") from None
    TrainingBatches(corpus, config)
    EvaluationBatches(part_of(corpus, "valid", config), config, config.evaluate_samples)
    rank_groups(config, 0, workers)
