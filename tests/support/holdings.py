"""What processes hold: memory, open files and threads of everything below a process."""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass

import psutil

PROGRAMS = {
    r"/gcs_server ": "GCS",
    r"/raylet/raylet .*--head": "raylet",
    r"/raylet/raylet ": "raylet of the worker node",
    r"/dashboard/dashboard\.py": "dashboard and its modules",
    r"/log_monitor\.py": "log monitor",
    r"/autoscaler/_private/monitor\.py": "autoscaler",
    r" mlflow server ": "MLflow server",
    r" raytrain\.tune ": "raytrain.tune",
}
"""What is looked for in a command line -> what the process is; one that has none of it belongs to its parent."""
TITLE = re.compile(r"ray::(\w+)")


@dataclass(frozen=True)
class Holding:
    """What one process holds."""

    pid: int
    role: str
    memory: int
    """Bytes of heap and stacks; not mapped files or shared memory, which come and go with other processes."""
    files: int
    """Open descriptors."""
    threads: int


def holdings(root: int) -> list[Holding]:
    """What the process ``root`` and all below it hold; those that end meanwhile are left out."""
    found: list[Holding] = []
    with suppress(psutil.NoSuchProcess):
        _collect(psutil.Process(root), _children(root), "", found)
    return found


def _children(root: int) -> dict[int, list[psutil.Process]]:
    """Parent's id -> its children, for all below ``root``, looked up once: the tree is asked for often."""
    children: dict[int, list[psutil.Process]] = {}
    for process in psutil.Process(root).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            children.setdefault(process.ppid(), []).append(process)
    return children


def _collect(
    process: psutil.Process, children: dict[int, list[psutil.Process]], inherited: str, found: list[Holding]
) -> None:
    role = inherited
    with suppress(psutil.NoSuchProcess), process.oneshot():
        role = _role(" ".join(process.cmdline()), inherited)
        memory = process.memory_info()
        if role:
            found.append(
                Holding(process.pid, role, memory.rss - memory.shared, process.num_fds(), process.num_threads())
            )
    for child in children.get(process.pid, []):
        _collect(child, children, role, found)


def _role(command: str, inherited: str) -> str:
    """What a process is, by its command line, and by what its parent is."""
    if title := TITLE.match(command):
        return f"{title[1]} of the worker node" if inherited.endswith("of the worker node") else title[1]
    return next((role for pattern, role in PROGRAMS.items() if re.search(pattern, command)), inherited)
