"""Worker of a benchmark: obeys commands from a socket, alone or as one of a group under ``torchrun``.

torchrun ... -m raytrain.bench.worker SOCKET CORES
"""

from __future__ import annotations

import json
import os
import socket
import sys


def share_of(cores: list[int], rank: int, size: int) -> list[int]:
    """Return the cores of worker ``rank`` of ``size``: an even share, or one core if there are too few."""
    if size > len(cores):
        return [cores[rank % len(cores)]]
    return cores[len(cores) * rank // size : len(cores) * (rank + 1) // size]


def main() -> None:
    """Pin the process to its cores, connect, and obey commands until the socket is closed."""
    address, cores = sys.argv[1], [int(core) for core in sys.argv[2].split(",")]
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    os.sched_setaffinity(0, share_of(cores, rank, size))  # before torch makes its threads

    import torch

    from raytrain.bench.tasks import Worker
    from raytrain.training.torchrun import torchrun_world

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torchrun_world() as world, socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        stream = connection.makefile("rw")
        worker = Worker(world)
        while line := stream.readline():
            command = json.loads(line)
            answer = getattr(worker, command["do"])(command)
            stream.write(json.dumps(answer) + "\n")
            stream.flush()


if __name__ == "__main__":
    main()
