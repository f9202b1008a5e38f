"""Trials reserve memory of their nodes: as many run as fit, and on a machine with too little all run as before."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ray_instance import ray_instance
from tests.support.tiny import TINY, home, mlflow_runs, run

__all__ = ["home"]


RESERVED = "memory: about 0.5 GB a worker is reserved"
NOT_RESERVED = "memory: about 0.5 GB a worker may be used; none is reserved"


@pytest.mark.parametrize(
    ("workers", "memory", "said"),
    [
        (1, int(1.3e9), RESERVED),
        pytest.param(1, int(0.8e9), NOT_RESERVED, marks=pytest.mark.long),
        pytest.param(2, int(1.3e9), RESERVED, marks=pytest.mark.long),
        (2, int(0.8e9), NOT_RESERVED),
    ],
)
def test_a_search_ends_however_little_memory_there_is(home: Path, workers: int, memory: int, said: str) -> None:
    arguments = [*TINY, "--data", "text.txt", "--space", "space.py", "--num-samples", "3"]
    arguments += ["--workers-per-trial", str(workers), "--scheduler", "none"]
    with ray_instance(memory=memory) as cluster:
        output = run(cluster, home, "raytrain.tune", "hybrid", *arguments)
    assert said in output
    assert f"concurrent trials: {2 // workers}" in output
    assert [item.info.status for item in mlflow_runs(home)] == ["FINISHED"] * 4
