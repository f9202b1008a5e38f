"""Searches of many trials in a row: nothing that their processes hold grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.soak import SETTLED, TRIALS, Soak, files, megabytes, one, soak, threads
from tests.support.mlflow_server import MlflowServer

GROWTH = {None: 0.01, "ImplicitFunc of the worker node": 0.05}
"""What all processes may hold more 30 trials later, and one that trains one trial after the other by itself."""
GROWTH_MB = 8.0
"""The same for each other kind of process, in megabytes."""


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_sixty_trials_leave_nothing_open_and_memory_as_it_was(
    mlflow_server: MlflowServer, tmp_path: Path, workers: int
) -> None:
    result = soak(tmp_path, mlflow_server, workers)
    assert_nothing_is_left(result)
    first, last = result.window(SETTLED, SETTLED + 10), result.window(TRIALS - 10, TRIALS)
    for role in (*result.roles(), None):
        before, after = (result.median(megabytes, role, samples) for samples in (first, last))
        assert after - before < max(GROWTH_MB, GROWTH.get(role, 0.0) * before), (role, before, after)


def assert_nothing_is_left(result: Soak) -> None:
    """As many processes, open files and threads after the last trials as after the first, and as many actors."""
    middle = (SETTLED + result.trials) // 2
    first, last = result.window(SETTLED, middle), result.window(middle, result.trials)
    for figure in (one, files, threads):
        before, after = (result.median(figure, None, samples) for samples in (first, last))
        assert abs(after - before) <= 0.01 * before, (figure.__name__, before, after)
    assert len({alive for alive, _ in result.actors.values()}) == 1, result.actors
