"""What the autoscaler of a cluster may add, where Ray tells nobody: in the file that the autoscaler reads."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


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
