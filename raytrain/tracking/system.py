"""System tags and metrics of a run: code, versions and machine, and the machine's load."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import raytrain
from raytrain.tracking.client import LOG
from raytrain.tracking.metric_writer import MetricWriter
from raytrain.utils.process import user_name


def code_tags() -> dict[str, str]:
    """Return the versions, the user, and the git commit if raytrain is a checkout. Reads no environment variable."""
    tags = {
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": _command(),
        "mlflow.user": user_name(),
        "raytrain.version": raytrain.__version__,
        "raytrain.python": platform.python_version(),
    }
    for package in ("torch", "ray", "mlflow"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # torchrun needs no Ray
            tags[f"raytrain.{package}"] = importlib.metadata.version(package)
    folder = Path(raytrain.__file__).parent
    # An installed package can lie inside a checkout of something else: check that git tracks this file.
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py") is not None
    if tracked and (commit := _git(folder, "rev-parse", "HEAD")):
        tags["mlflow.source.git.commit"] = commit
        tags["raytrain.git_changed"] = str(bool(_git(folder, "status", "--porcelain", "--", "."))).lower()
    return tags


def host_tags() -> dict[str, str]:
    """Describe the machine that this process runs on: name, CPU, usable cores, memory, GPUs."""
    import psutil

    tags = {
        "raytrain.host": socket.gethostname(),
        "raytrain.cpu": _cpu_model(),
        "raytrain.cores": str(len(os.sched_getaffinity(0))),
        "raytrain.memory_gb": f"{psutil.virtual_memory().total / 1e9:.1f}",
    }
    if gpus := _gpu_names():
        tags["raytrain.gpus"] = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    return tags


def _command() -> str:
    """Return the module that was started with ``python -m``, or the script."""
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).name or "python"


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of git, or ``None`` if there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu_names() -> list[str]:
    """Return the names of the machine's NVIDIA GPUs, as given by the driver, so that no CUDA context is created."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]


class SystemMetrics:
    """Samples CPU, memory, disk, network and GPUs every ``interval_s`` into a run's writer.

    The samplers and names are MLflow's own, so that its page of system metrics shows them. MLflow's monitor is not
    used, since it writes by itself and stops for good after a single outage of the server. The step is the number of
    seconds since the run was created, which keeps increasing across restarts.
    """

    def __init__(self, writer: MetricWriter, created_ms: int, *, node: str = "", interval_s: float = 10.0) -> None:
        """Start sampling. ``node`` distinguishes the machines of one run: ``system/NODE/...``."""
        self._writer = writer
        self._created_ms = created_ms
        self._prefix = f"system/{node}/" if node else "system/"
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_closed, name="raytrain-system", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join(self._interval_s)

    def _sample_until_closed(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            monitors.append(GPUMonitor())
        except (RuntimeError, ImportError) as error:  # raised if there is no NVIDIA driver
            LOG.debug("no GPU metrics: %s", error)
        monitors[0].collect_metrics()  # the first reading of the CPU load has nothing to compare with
        monitors[0].clear_metrics()
        while not self._stop.wait(self._interval_s):
            metrics = {}
            for monitor in monitors:
                monitor.collect_metrics()
                metrics.update({self._prefix + key: value for key, value in monitor.aggregate_metrics().items()})
                monitor.clear_metrics()
            now_ms = time.time_ns() // 1_000_000
            self._writer.log(max(0, now_ms - self._created_ms) // 1000, metrics, now_ms)
