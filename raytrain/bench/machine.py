"""Machine of a benchmark: its description, its cores, its noise, and the memory that a process takes."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raytrain.bench.rounds import Series

QUIET_SPREAD = 0.1
"""Largest spread of the rate of one matrix product, as a share of its median, on a machine that counts as quiet."""
QUIET_LOAD = 0.5
"""Largest number of processes waiting to run before the benchmark (load average) on a quiet machine."""
QUIET_SWITCHES = 50.0
"""Largest number of involuntary context switches of this process per second."""
QUIET_STEAL = 0.02
"""Largest share of the cores' time that the host may have given to other machines (steal)."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The part of this machine that a benchmark uses."""

    threads: int
    """Total threads of all workers."""
    cores: list[int]
    """Cores that the processes are pinned to."""
    device: torch.device

    def threads_of(self, workers: int) -> int:
        """Return the threads of each of ``workers``: a share on CPUs, all of the threads on GPUs."""
        return self.threads if self.device.type == "cuda" else max(1, self.threads // workers)


@contextmanager
def pinned(threads: int, cores: list[int]) -> Iterator[None]:
    """Compute with ``threads`` threads pinned to ``cores`` inside the context."""
    before, threads_before = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)  # threads that start from now on are pinned there too
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads_before)


def describe(device: torch.device, threads: int) -> dict[str, Any]:
    """Return the hardware and the software of a measurement."""
    named = [line for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    features = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if _capability(name)]
    machine: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "cpu": named[0].partition(":")[2].strip() if named else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "cpu_features": features,
        "device": device.type,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def _capability(name: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(name, False))


class NoiseWatch:
    """Watches other activity on the machine, from its construction to ``report``."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0]
        self.began = time.perf_counter()
        self.switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self.ticks = _cpu_ticks()

    def report(self, ceilings: dict[str, Series]) -> dict[str, Any]:
        """Return the observations, and the reasons as text why the machine counts as noisy; none if it was quiet.

        Args:
            ceilings: rates of the best matrix products, by type.
        """
        seconds = time.perf_counter() - self.began
        switches = (resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self.switches) / seconds
        ticks = [after - before for before, after in zip(self.ticks, _cpu_ticks(), strict=True)]
        steal = ticks[7] / max(1, sum(ticks))
        spreads = {name: series.spread for name, series in ceilings.items()}
        reasons = [
            f"the rate of one {name} matrix product varied by {spread:.0%}"
            for name, spread in spreads.items()
            if spread > QUIET_SPREAD
        ]
        if self.load > QUIET_LOAD:
            reasons.append(f"{self.load:.1f} other processes were running before it began (load average)")
        if switches > QUIET_SWITCHES:
            reasons.append(f"this process was preempted {switches:.0f} times a second")
        if steal > QUIET_STEAL:
            reasons.append(f"the host gave {steal:.0%} of the cores to other machines")
        return {
            "load_before": self.load,
            "ceiling_spread": spreads,
            "involuntary_switches_per_second": switches,
            "steal": steal,
            "noisy": reasons,
        }


def _cpu_ticks() -> list[int]:
    """Return the time of all cores by kind, from the first line of /proc/stat; the eighth is steal."""
    return [int(value) for value in _lines("/proc/stat")[0].split()[1:9]]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process in bytes: resident, without mapped files, and on its GPU."""
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status"))
    peak, file, shared = (int(status[name].split()[0]) * 1024 for name in ("VmHWM", "RssFile", "RssShmem"))
    memory = {"resident": peak, "anonymous": peak - file - shared}
    if device.type == "cuda":
        memory["gpu"] = torch.cuda.max_memory_allocated(device)
    return memory


def _lines(path: str) -> list[str]:
    return Path(path).read_text("utf-8", "replace").splitlines()
