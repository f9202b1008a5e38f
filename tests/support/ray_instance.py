"""Ray instances that tests share, each in a process of its own, which a test joins by its address."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ray

from tests.support.leftovers import leftovers

CODE = """
import sys
import ray
ray.init(
    address="local", num_cpus=2, num_gpus=int(sys.argv[1]), include_dashboard=True, dashboard_host="127.0.0.1",
    log_to_driver=False, _memory=int(sys.argv[2]) or None,
)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
"""In a process of its own, the instance leaves no trace in the process of the tests, some of which need none."""


@contextmanager
def ray_instance(gpus: int = 0, memory: int = 0) -> Iterator[str]:
    """Start an instance of two CPUs and ``gpus`` GPUs that no machine has; give its address.

    It has ``memory`` bytes of memory to reserve; by default what the machine has free.

    It has the dashboard, which Ray's cleaner of placement groups asks who is alive.
    """
    variables = {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(gpus), str(memory)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | variables,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if re.fullmatch(r"[\d.]+:\d+\n", line):
                break
        else:
            pytest.fail("no Ray instance started")
        yield line.strip()
    finally:
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def joined(address: str) -> Iterator[None]:
    """Join the instance at ``address`` in this process, and leave it again."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="session")
def ray_cpu() -> Iterator[str]:
    """Address of a Ray instance with two CPUs, for the whole session."""
    with ray_instance() as address:
        yield address


@pytest.fixture(scope="module")
def ray_gpu() -> Iterator[str]:
    """Address of a Ray instance with two CPUs and two GPUs that are only numbers: the defaults are those for GPUs."""
    with ray_instance(gpus=2) as address:
        yield address


def assert_nothing_left(address: str, seconds: float = 60) -> None:
    """Fail if anything is left after ``seconds`` on the instance at ``address``, which this process has not joined."""
    with joined(address):
        deadline = time.monotonic() + seconds
        while left := leftovers():
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
