"""Free memory: the least of what the machine and each of the process's cgroups leave."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from raytrain.utils import memory
from raytrain.utils.memory import free_memory

GB = 2**30


def make_group(folder: Path, limit: str, usage: int, inactive: int, version: int = 2) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {inactive}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GB free."""
    monkeypatch.setattr(memory, "_free_in_machine", lambda: 64 * GB)
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def test_without_a_limit_it_is_what_the_machine_has(root: Path) -> None:
    assert free_memory(root) == 64 * GB
    (root / "proc/self/cgroup").write_text("0::/a/b\n")
    make_group(root / "sys/fs/cgroup/a/b", "max", GB, 0)
    assert free_memory(root) == 64 * GB
    (root / "proc/self/cgroup").write_text("3:cpu,memory:/a\n")
    make_group(root / "sys/fs/cgroup/memory/a", str(2**63 - 4096), GB, 0, version=1)
    assert free_memory(root) == 64 * GB


def test_a_container_has_its_limit_less_what_it_uses(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/\n")
    make_group(root / "sys/fs/cgroup", str(2 * GB), int(1.5 * GB), GB)
    assert free_memory(root) == 1.5 * GB, "pages of files that can be dropped are free"


def test_the_tightest_of_nested_groups_counts(root: Path) -> None:
    """Also where the group's own files are not under its path, as in a container that sees the machine's paths."""
    (root / "proc/self/cgroup").write_text("0::/slice/job\n")
    make_group(root / "sys/fs/cgroup/slice", str(3 * GB), GB, 0)
    make_group(root / "sys/fs/cgroup/slice/job", "max", GB, 0)
    assert free_memory(root) == 2 * GB
    make_group(root / "sys/fs/cgroup", str(GB), GB // 2, 0)
    assert free_memory(root) == GB // 2


def test_version_1_of_cgroups_counts_too(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("12:cpuset:/x\n4:memory:/job\n0::/\n")
    make_group(root / "sys/fs/cgroup/memory/job", str(2 * GB), 3 * GB, 0, version=1)
    assert free_memory(root) == 0


def test_the_machine_has_what_the_kernel_could_give() -> None:
    assert memory._free_in_machine() == pytest.approx(psutil.virtual_memory().available, rel=0.1)
