"""A Ray cluster of several nodes on this machine, in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
from raytrain.cluster.draining import alive_nodes

cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 0, "object_store_memory": 80 * 2**20, "dashboard_port": int(sys.argv[1]), "include_dashboard": True,
})
print(cluster.address, flush=True)
nodes = {}
for line in sys.stdin:
    action, *values = line.split()
    if action == "add":
        name, cpus = values
        nodes[name] = cluster.add_node(num_cpus=int(cpus), object_store_memory=80 * 2**20)
        print(nodes[name].node_id, flush=True)
    elif action == "show":
        print(*alive_nodes(cluster.address), flush=True)
    else:
        cluster.remove_node(nodes[values[0]], allow_graceful=False)
        print("removed", flush=True)
cluster.shutdown()
"""
"""In a process of its own: how a process proves who it is follows from the environment that it began in."""


class Nodes:
    """A head without CPUs, and nodes that come and go. With a ``token``, the head asks everybody for it."""

    def __init__(self, folder: Path, token: str | None = None) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        proof = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
        # apart from other clusters of the machine; not in `folder`, where its sockets' paths can be too long
        self._scratch = tempfile.TemporaryDirectory(prefix="ray-")
        self.environment = {**kept, **proof, "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": self._scratch.name}
        with (folder / "cluster.log").open("w") as log, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._process = subprocess.Popen(
                [sys.executable, "-c", CLUSTER, str(probe.getsockname()[1])],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environment,
            )  # fmt: skip
        self.address = self._answer()

    @property
    def pid(self) -> int:
        """The process below which all of Ray's are."""
        return self._process.pid

    def add(self, name: str, cpus: int = 1) -> str:
        """Returns the node's id."""
        return self._tell(f"add {name} {cpus}")

    def remove(self, name: str) -> None:
        """End a node at once, as EC2 does."""
        self._tell(f"remove {name}")

    def alive(self) -> list[str]:
        return self._tell("show").split()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._scratch.cleanup()

    def _tell(self, line: str) -> str:
        assert self._process.stdin is not None
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline().strip()
        assert answer, "the cluster has ended: see cluster.log"
        return answer
