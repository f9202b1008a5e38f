"""A search on GPUs that are only numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.simulated import simulate


def test_a_search_ends_on_gpus_that_are_only_numbers(tmp_path: Path) -> None:
    """Few of them: the machine's start of as many processes is most of the time."""
    result = simulate(tmp_path, gpus=4, nodes=2, num_samples=8, seconds=(5.0, 10.0))
    assert result.at_once == 4
    assert result.statuses == {"finished": 8}
    assert result.most_reserved == 4


@pytest.mark.long
def test_a_search_keeps_64_gpus_busy_until_its_last_wave(tmp_path: Path) -> None:
    result = simulate(tmp_path, gpus=64, nodes=4, num_samples=128, seconds=(200.0, 600.0))
    assert result.at_once == 64
    assert result.statuses == {"finished": 128}
    assert result.most_reserved == 64
    assert result.reserved >= 0.95
