"""What the stories of a cluster share: their parts are timed, and they look at hosts, trials and runs from outside."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support import lab
from tests.support.lab import Host
from tests.support.s3_server import interpreter

RAYLET = "raylet/raylet "
WORKER = "ray::RayTrainWorker"
PATIENCE_S = 600.0
"""For everything: on a quiet machine nothing takes a quarter of it."""
LOOK = """
import time, ray
ray.init(address="auto", log_to_driver=False)
deadline = time.monotonic() + 240
while (left := leftovers()) and time.monotonic() < deadline:
    time.sleep(0.5)
print("LEFT", left)
"""
"""What is left of a search, printed; goes after tests/support/leftovers.py.

What Ray Train asked an autoscaler for is forgotten after three minutes at the latest.
"""


@dataclass
class Parts:
    """The parts of a story."""

    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


def played(module: str, work: Path) -> dict[str, Any]:
    """What was seen when ``module`` played its story in ``work``; the test is skipped where it cannot be played."""
    lab.needed(ssh=True)
    interpreter()  # where there is a network yet
    status = lab.enclose("-m", module, str(work))
    found: dict[str, Any] = json.loads((work / "story.json").read_text())
    print(found["seconds"])
    assert status == 0, f"the story broke off after {found['seconds']}: {found['search'][1][-3000:]}"
    return found


def trained(client: Any, bucket: str, search: str = "first") -> set[str]:
    """The trials of ``search`` that have a checkpoint in the bucket."""
    found = client.list_objects_v2(Bucket=bucket, Prefix=f"raytrain/{search}/").get("Contents", ())
    return {item["Key"].partition("/checkpoints/")[0] for item in found if item["Key"].endswith("manifest.json")}


def objects(client: Any, bucket: str) -> list[str]:
    """The names of all that is in the bucket."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [item["Key"] for page in pages for item in page.get("Contents", ())]


def runs(address: str) -> list[tuple[str, str]]:
    """(trial, status) of the runs of the MLflow server at ``address``; the search's own has no trial."""
    from raytrain.tracking.client import connect

    client = connect(f"http://{address}:5000")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return sorted((run.data.tags.get("raytrain.trial", ""), run.info.status) for run in found)


def line(process: psutil.Process) -> str:
    """The command line of a process, empty if it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def raylet(host: Host) -> psutil.Process | None:
    """The host's raylet, the process that makes it a node."""
    return next(iter(host.processes(RAYLET)), None)
