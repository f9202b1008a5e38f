"""Free memory of this machine that this process may use: a container's limit counts, not memory outside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_UNLIMITED = 2**60
"""cgroups version 1 writes limits of this size or more when there is no limit."""


def free_memory(root: Path = Path("/")) -> float:
    """Return the bytes that this process and its children can still allocate; ``root`` contains /proc and /sys."""
    return float(min([_free_in_machine(), *_free_in_groups(root)]))


def _free_in_machine() -> int:
    """Return the bytes that the kernel could provide without swapping; the total memory if it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_groups(root: Path) -> list[int]:
    """Return the bytes that each limit of this process's cgroups leaves free, including those of parent cgroups."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux, or /proc is not there
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # a container sees its own cgroup as the root, whatever path the machine has for it
        group = Path(path.lstrip("/"))
        for folder in {base, *(base / part for part in (group, *group.parents))}:
            # a cgroup without a limit has no number in its file, and the root cgroup has no such file
            with contextlib.suppress(OSError, ValueError, KeyError):
                found.append(_free(folder, *names))
    return [free for free in found if free < _UNLIMITED]


def _free(folder: Path, limit: str, usage: str, reclaimable: str) -> int:
    """Return the bytes left below the limit of a cgroup; file pages that the kernel can drop count as free."""
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    used = int((folder / usage).read_text()) - int(statistics[reclaimable])
    return max(0, int((folder / limit).read_text()) - max(0, used))
