"""A search under load, with trials that fail in every way: ``python -m tests.faults.stress --repeat 10`` repeats it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.stress import search


@pytest.mark.long
def test_every_trial_is_accounted_for_and_nothing_is_left(ray_cpu: str, tmp_path: Path) -> None:
    search(ray_cpu, tmp_path)
