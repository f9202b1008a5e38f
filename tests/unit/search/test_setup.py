"""The plan of a search as it is printed, and what its result says beside its metrics."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytrain.data.corpus import Corpus
from raytrain.metrics import METRIC
from raytrain.models.ladder import validation_ladder
from raytrain.search.finish import description, model_card
from raytrain.search.setup import reference_lines
from tests.conftest import tiny_config
from tests.unit.search.test_search_objective import a_plan, a_trial, figures


def test_the_plan_shows_what_counting_reaches(corpus: Corpus) -> None:
    windows, documents = tiny_config("hybrid"), tiny_config("byte_lstm", sampling="documents", length=64)
    one = a_plan(bases={"hybrid": windows, "byte_lstm": tiny_config("byte_lstm")})
    (line,) = reference_lines(one, corpus)
    assert line == str(validation_ladder(corpus, windows))
    assert line.startswith("reference: byte 3-gram ")
    two = reference_lines(a_plan(bases={"hybrid": windows, "byte_lstm": documents}), corpus)
    assert [each.partition(":")[0] for each in two] == ["reference on windows of 24", "reference on documents of 64"]
    assert two[1].endswith(str(validation_ladder(corpus, documents)).removeprefix("reference"))
    pieces = tiny_config("byte_lstm", sampling="windows", vocabulary="bpe:300")
    three = reference_lines(a_plan(bases={"hybrid": windows, "byte_lstm": pieces}), corpus)
    assert [each.partition(":")[0] for each in three] == [
        "reference on windows of 24", "reference on windows of 24 in bpe",
    ]  # fmt: skip
    assert "; bpe:300 " in three[1]


@pytest.mark.parametrize("factor", [0.9, 1.25])
def test_card_and_description_hold_the_winner_against_counting(corpus: Corpus, tmp_path: Path, factor: float) -> None:
    plan = a_plan()
    best = a_trial(0)
    ladder = validation_ladder(corpus, best.config)
    best.best = figures(factor * ladder.bits[ladder.best], 3.0)
    search: Any = SimpleNamespace(name="s", plan=plan, workspace=SimpleNamespace(corpus=corpus))
    comparison = ladder.comparison(best.best[METRIC])
    assert f"- {comparison}\n" in model_card(search, best, ["a text"], comparison)
    text = description(search, [best], best, ladder, "models:/m@champion", "#/", 5.0)
    assert f"\nCompared with counting: {comparison}.\n" in text
    assert ("warning: the best trial's model has learnt less than counting: it needs 25.0% more" in text) == (
        factor > 1
    )
