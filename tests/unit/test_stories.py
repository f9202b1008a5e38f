"""What the stories of the cluster rely on, checked without a cluster."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support import leftovers
from tests.support.story import LOOK


def test_what_is_sent_to_a_cluster_runs_there_alone() -> None:
    tree = ast.parse(Path(leftovers.__file__).read_text() + LOOK)
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} == {"__future__", "time", "ray"}
