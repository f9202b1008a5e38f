"""Environment variables: one module writes them, and Ray still reads each."""

from __future__ import annotations

import ast
import os
import pwd
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

import raytrain
from raytrain.cluster import environment

ROOT = Path(raytrain.__file__).parent
WRITERS = {"cluster/environment.py", "config/plugins.py", "tracking/client.py", "utils/output.py"}
"""Modules that may write environment variables: those for Ray, our own plugins, those for MLflow, and the terminal's
width for what prints."""

CHANGES = {"setdefault", "update", "pop", "clear", "popitem"}


def writes(path: Path) -> Iterator[int]:
    """Lines of a file that write to ``os.environ``."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Subscript(value=ast.Attribute(attr="environ"), ctx=ast.Store() | ast.Del()):
                yield node.lineno
            case ast.Call(func=ast.Attribute(value=ast.Attribute(attr="environ"), attr=call)) if call in CHANGES:
                yield node.lineno
            case ast.Call(func=ast.Attribute(attr="putenv" | "unsetenv")):
                yield node.lineno


def test_no_other_module_writes_environment_variables() -> None:
    found = {str(path.relative_to(ROOT)): list(writes(path)) for path in ROOT.rglob("*.py")}
    assert {path for path, lines in found.items() if lines} == WRITERS


def test_ray_still_reads_each_variable() -> None:
    """Ray ignores a name that it has given up, without a word."""
    names = set(re.findall(r'"((?:RAY|TUNE)_[A-Z0-9_]+)"', Path(environment.__file__).read_text()))
    assert len(names) == 11
    folder = Path(ray.__file__).parent
    parts = ("train", "tune", "air", "_private")
    sources = "".join(path.read_text() for part in parts for path in sorted((folder / part).rglob("*.py")))
    missing = sorted(name for name in names if not re.search(rf"\b{name}\b", sources))
    assert not missing, f"Ray {ray.__version__} does not know {missing}"


@pytest.fixture
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an environment of its own."""
    monkeypatch.setattr(os, "environ", {})


@pytest.mark.usefixtures("no_variables")
def test_what_the_user_sets_stays() -> None:
    own = {
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_AIR_NEW_OUTPUT": "1",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5",
        "GLOO_SOCKET_IFNAME": "eth7",
        "NCCL_SOCKET_IFNAME": "eth8",
    }
    os.environ.update(own)
    environment.set_up_join()
    environment.set_up_search()
    environment.set_up_worker_group("10.0.0.5:6379", "3600")
    environment.set_up_network("lo")
    assert own.items() <= os.environ.items()
    assert os.environ["RAY_ADDRESS"] == "10.0.0.5:6379"


@pytest.mark.usefixtures("no_variables")
def test_a_worker_group_waits_as_long_as_it_is_told() -> None:
    environment.set_up_worker_group("10.0.0.5:6379", "30")
    assert os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] == "30"


def test_ray_train_v2_stays_on_whatever_the_user_has_set_for_older_programs() -> None:
    """Ray reads the variable where ``ray.train`` is imported, and its errors advise to set it to 0."""
    code = "import raytrain, ray.train; print(ray.train.UserCallback)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "RAY_TRAIN_V2_ENABLED": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr  # the older one has no such name


@pytest.mark.usefixtures("no_variables")
def test_a_user_without_a_home_gets_one_among_the_temporary_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in a container whose user is in no password file: ``import mlflow`` fails without one."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.environ["HOME"] = "/home/of/mine"
    environment.set_up_imports()
    assert os.environ.pop("HOME") == "/home/of/mine"
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    environment.set_up_imports()
    assert os.environ.pop("HOME") == str(tmp_path / f"raytrain-{os.getuid()}")
    (tmp_path / f"raytrain-{os.getuid()}").chmod(0o777)  # no longer the user's own
    environment.set_up_imports()
    assert Path(os.environ["HOME"]).parent == tmp_path
    assert stat.S_IMODE(Path(os.environ["HOME"]).stat().st_mode) == 0o700
