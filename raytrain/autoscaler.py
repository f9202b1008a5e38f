"""What the autoscaler of a cluster may add, where Ray tells nobody: by the file that it reads, or as stated."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

from raytrain.errors import UserError
from raytrain.json_text import parse_json, typed

STATED = "RAYTRAIN_WORKER_NODES"
"""Kinds of worker as somebody states them, such as '[{"nodes": 8, "CPU": 7, "GPU": 1}]': this comes before all else."""


def node_types(gcs_address: str) -> tuple[tuple[dict[str, float], int], ...]:
    """Kinds of worker, and the most of each, that the autoscaler on this host may start for the cluster.

    Empty if none runs here: `ray up` starts it on the head, and what `ray exec` and `ray job submit` run is there, too.
    """
    file = config_file(gcs_address)
    if file is None:
        return ()
    import yaml

    # `ray up` has filled in what the instances of each type have, and replaces the file whenever it changes anything
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    limit = int(config["max_workers"])
    found = []
    for kind in config["available_node_types"].values():
        resources = {name: float(amount) for name, amount in (kind.get("resources") or {}).items()}
        most = min(limit, int(kind.get("max_workers", limit)))
        if resources and most > 0:
            found.append((resources, most))
    return tuple(found)


def stated_types() -> tuple[tuple[dict[str, float], int], ...]:
    """Kinds of worker, and the most of each, by the variable ``STATED``; empty without it.

    Raises:
        UserError: it says something else.
    """
    text = os.environ.get(STATED, "").strip()
    if not text:
        return ()
    try:
        kinds = typed(parse_json(text), list[dict[str, float]], "it")
        found = tuple(({name: kind[name] for name in kind if name != "nodes"}, int(kind["nodes"])) for kind in kinds)
        if any(count < 1 or not resources for resources, count in found):
            raise ValueError("there must be a node of each kind, and something on it")
        if not all(0 <= amount < math.inf for resources, _ in found for amount in resources.values()):
            raise ValueError("what is on a node must be a number of at least 0")
        return found
    except (ValueError, KeyError, OverflowError) as error:
        what = "a kind has no number of nodes" if isinstance(error, KeyError) else error
        example = '[{"nodes": 8, "CPU": 7, "GPU": 1}]'
        raise UserError(f"{STATED} is {text[:200]!r}: {what}; write, for example, {example}") from None


def config_file(gcs_address: str) -> Path | None:
    """The cluster file of the autoscaler that runs on this host for the cluster, ``None`` if none does."""
    import psutil

    wanted, prefix = f"--gcs-address={gcs_address}", "--autoscaling-config="
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if wanted in words and any(word.endswith("/monitor.py") for word in words):
                for word in words:
                    if word.startswith(prefix):
                        return Path(word.removeprefix(prefix)).expanduser()
    return None
