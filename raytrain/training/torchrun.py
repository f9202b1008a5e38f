"""Training without Ray: the same loop under torchrun or in one process.

It needs torch, NumPy and safetensors only:

    torchrun --nproc-per-node 2 -m raytrain.loop config.json --corpus CORPUS --storage FOLDER
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from raytrain.config.cli import OneLineParser, read_config
from raytrain.data.corpus import Corpus
from raytrain.storage import open_storage
from raytrain.storage.check import check_writable
from raytrain.storage.lease import driving, find_free
from raytrain.training.checks import check_samples
from raytrain.training.loop import train
from raytrain.training.reporters import PrintReporter
from raytrain.training.trainer import World
from raytrain.utils.files import expanded


@contextmanager
def torchrun_world() -> Iterator[World]:
    """Join the process group that torchrun's variables describe, or stay one process; NCCL on GPUs, gloo on CPUs."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(rank=rank, size=size, device=device)
        if dist.is_initialized():
            dist.barrier()  # rank 0 may still be saving: no rank leaves before all are done
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main() -> None:
    """Train the run of a config file on a prepared corpus."""
    # torchrun ends workers by SIGTERM: a worker that waits in a collective operation could not unwind
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parser = OneLineParser(prog="python -m raytrain.loop", description=__doc__)
    parser.add_argument("config", type=Path, help="config.json of a run")
    parser.add_argument("--corpus", required=True, help="folder of a prepared corpus")
    parser.add_argument("--storage", required=True, help="folder or s3:// address for checkpoints")
    arguments = parser.parse_args()
    config, corpus = read_config(arguments.config), Corpus.open(expanded(arguments.corpus))
    corpus.verify()
    storage = open_storage(arguments.storage)
    check_writable(storage)
    with torchrun_world() as world:
        if world.rank == 0:
            corpus.vocabulary(config.vocabulary)  # learnt once: the others read it beside the corpus
        if dist.is_initialized():
            dist.barrier()
        check_samples(config, corpus, world.size)
        with ExitStack() as stack:
            if world.rank == 0:  # only rank 0 writes
                what = f"--storage {arguments.storage}: the run"
                lease = stack.enter_context(driving(storage, find_free(storage, what), what))
                storage = lease.fence.guard(storage)
            outcome = train(config, corpus, world, storage, PrintReporter(config))
        if world.rank == 0:
            print(json.dumps(asdict(outcome)))
