"""Cost of trials of several workers on a cluster's head: processes, memory and CPU time there.

    python benchmarks/head_cost.py --concurrent 1 2 4 --output head.json

The cluster has two nodes on this machine: a head without CPUs, and a node for the workers. On it run searches of the
hybrid whose trials have two workers, with each number of concurrent trials. Once all of them train, the head's
processes are measured: those of its node, its MLflow server, and the search itself. Memory is given twice: the part
that a process shares with no other, and that part plus its proportion of what it shares.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

TINY = (
    "--model.feature-maps 8 16 --model.decoder-maps 16 8 --model.latent 4 --model.hidden 16 --length 16 "
    "--batch-size 32 --steps 1000000 --log-every 50 --evaluate-every 1000 --evaluate-samples 32 "
    "--checkpoint-every 1000 --precision float32 --data text.txt"
).split()
START_S = 1800.0
"""Longest time until all trials train."""
WINDOW_S = 30.0
"""Seconds over which CPU time is counted."""


@contextmanager
def cluster() -> Iterator[tuple[str, Any]]:
    """Start a cluster of two nodes; give its address and its head."""
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    few = {"object_store_memory": 80 * 2**20}
    started = Cluster(True, head_node_args={"num_cpus": 0, "num_gpus": 0, "include_dashboard": True, **few})
    try:
        started.add_node(num_cpus=1, **few)
        yield started.address, started.head_node
    finally:
        started.shutdown()


@contextmanager
def tracking_server(home: Path) -> Iterator[psutil.Process]:
    """Start MLflow as a cluster's head runs it, and put its address into the environment; give the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "raytrain.tracking",
        "serve",
        "--port",
        str(port),
        "--folder",
        str(home / "mlflow"),
    ]
    os.environ |= {"RAYTRAIN_STORAGE": str(home / "runs"), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}"}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 300
            while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
                assert time.monotonic() < deadline, "MLflow does not start"
                time.sleep(0.5)
            yield psutil.Process(server.pid)
        finally:
            server.terminate()


def measure(home: Path, address: str, head: Any, server: psutil.Process, concurrent: int) -> dict[str, Any]:
    """Return the head's processes while ``concurrent`` trials train."""
    (home / "space.py").write_text(
        "def space(trial):\n    return {'objective.alpha': trial.suggest_float('a', 0, 1)}\n"
    )
    lines = (f"line {number} of a text that says {number * 7919 % 1000} in words\n" for number in range(2000))
    (home / "text.txt").write_text("".join(lines))
    sizes = ["--workers-per-trial", "2", "--cpus-per-worker", "0.05", "--num-samples", str(concurrent)]
    command = [sys.executable, "-m", "raytrain.tune", "hybrid", *TINY, "--space", "space.py", *sizes]
    with (home / f"output-{concurrent}.txt").open("w") as output:
        search = subprocess.Popen([*command, "--address", address], cwd=home, stdout=output, stderr=output)
    try:
        wait_for_training(home, search, concurrent)
        names = named(head, psutil.Process(search.pid), server)
        before = {process: sum(process.cpu_times()[:2]) for process in names}
        time.sleep(WINDOW_S)
        rows = [row(process, name, before[process]) for process, name in names.items() if process.is_running()]
    finally:
        search.send_signal(signal.SIGINT)
        search.wait(300)
    return {"concurrent": concurrent, "processes": rows}


def wait_for_training(home: Path, search: subprocess.Popen[bytes], concurrent: int) -> None:
    """Wait until every trial has saved a checkpoint."""
    deadline = time.monotonic() + START_S
    while len({path.parents[2] for path in home.glob("runs/*/trials/*/checkpoints/*/manifest.json")}) < concurrent:
        assert search.poll() is None, (home / f"output-{concurrent}.txt").read_text()
        assert time.monotonic() < deadline, "the trials do not begin"
        time.sleep(1)


def named(head: Any, search: psutil.Process, server: psutil.Process) -> dict[psutil.Process, str]:
    """Return the processes on the head, each with its name."""
    found = {}
    for kind, entries in head.all_processes.items():
        for entry in entries:
            process = psutil.Process(entry.process.pid)
            found[process] = kind
            for child in process.children(recursive=True):
                title = " ".join(child.cmdline()).strip()
                found[child] = title.split("(")[0] if title.startswith("ray::") else f"{kind}, below it"
    for name, process in (("search", search), ("MLflow", server)):
        found |= dict.fromkeys((process, *process.children(recursive=True)), name)
    return found


def row(process: psutil.Process, name: str, cpu_before: float) -> dict[str, Any]:
    """Return the measurements of a process: memory in bytes, CPU time in cores."""
    memory = process.memory_full_info()
    cpu = (sum(process.cpu_times()[:2]) - cpu_before) / WINDOW_S
    return {"name": name, "own": memory.uss, "proportional": memory.pss, "resident": memory.rss, "cores": cpu}


def summary(results: list[dict[str, Any]]) -> str:
    """Return a line for each kind of process, and the cost that a further trial adds to all of them together."""
    lines = []
    for result in results:
        rows, concurrent = result["processes"], result["concurrent"]
        counts = Counter(each["name"] for each in rows)
        for name, count in sorted(counts.items()):
            own, shared, cores = (
                sum(each[key] for each in rows if each["name"] == name) for key in ("own", "proportional", "cores")
            )
            figures = f"{own / 1e6:,.0f} MB of its own | {shared / 1e6:,.0f} MB | {cores:.3f} cores"
            lines.append(f"{concurrent} at once | {count} x {name} | {figures}")
    first, last = results[0], results[-1]
    more = last["concurrent"] - first["concurrent"]
    for key, scale in (("own", 1e6), ("proportional", 1e6), ("cores", 1.0)):
        totals = [sum(each[key] for each in result["processes"]) for result in (first, last)]
        added = f"{(totals[1] - totals[0]) / more / scale:,.3f}" if more else "?"
        lines.append(f"{key}: {totals[0] / scale:,.2f} with {first['concurrent']}, and {added} for each further trial")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="raytrain-head-") as folder, tracking_server(Path(folder)) as server:
        for concurrent in options.concurrent:
            with cluster() as (address, head):
                results.append(measure(Path(folder), address, head, server, concurrent))
            print(summary(results[-1:]), flush=True)
    print(summary(results))
    if options.output is not None:
        machine = {
            "cpu": platform.processor(),
            "python": platform.python_version(),
            "memory": psutil.virtual_memory().total,
        }
        options.output.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
