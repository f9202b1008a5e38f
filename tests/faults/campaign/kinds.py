"""What can break: one class a kind, each of which breaks one thing of a cluster and mends it."""

from __future__ import annotations

import errno
import random
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import IO, ClassVar

import psutil

from tests.faults.campaign.cluster import BUCKET, FILL, Cluster
from tests.support.fault_proxy import Mode
from tests.support.lab import Host, wait_until
from tests.support.metadata_server import ACTION

NOTICE_S = 25.0
"""Of the two minutes that EC2 gives: what the watcher tells Ray without a time."""


class NotNow(Exception):
    """There is nothing that could break at this moment."""


class Kind:
    """One kind of fault. ``inject`` is called at a random moment of training, ``heal`` some seconds later."""

    name: ClassVar[str]
    what: ClassVar[str]
    """For the table of results."""
    quota: ClassVar[int] = 10
    """How often it is to be injected in a campaign."""
    hold_s: ClassVar[tuple[float, float]] = (0.0, 0.0)
    """Shortest and longest time from ``inject`` to ``heal``."""
    another_group: ClassVar[bool] = False
    """Whether other processes must go on with the run."""
    retried: ClassVar[bool] = False
    """Whether it spends one of the retries that a command has between two checkpoints."""
    hits_storage: ClassVar[bool] = False
    """Whether checkpoints wait meanwhile."""
    intervals: ClassVar[int] = 1
    """How many checkpoint intervals of work may be done again."""

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        raise NotImplementedError

    def heal(self, cluster: Cluster) -> None:
        """Nothing is to be mended where the product mends it."""


def one_of(processes: list[psutil.Process], chance: random.Random) -> psutil.Process:
    """One of them.

    Raises:
        NotNow: there is none.
    """
    if not processes:
        raise NotNow
    return chance.choice(processes)


def kill(processes: list[psutil.Process], chance: random.Random) -> None:
    """SIGKILL to one of them.

    Raises:
        NotNow: there is none, or it has just ended.
    """
    try:
        one_of(processes, chance).kill()
    except psutil.NoSuchProcess:
        raise NotNow from None


class WorkerKilled(Kind):
    name, what = "worker", "SIGKILL to a worker"
    another_group = retried = True

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        kill(cluster.train_workers(), chance)


class RayletKilled(Kind):
    name, what = "raylet", "SIGKILL to a node's raylet, the node joins again"
    another_group = retried = True
    hold_s = (2.0, 8.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        self.host = chance.choice(cluster.workers)
        kill(self.host.processes("raylet/raylet "), chance)

    def heal(self, cluster: Cluster) -> None:
        # what was on the node ends without its raylet, by itself
        wait_until(lambda: not self.host.processes("ray::RayTrainWorker"), 60, f"end of workers on {self.host.name}")
        cluster.join(self.host)


class ControllerKilled(Kind):
    name, what = "controller", "SIGKILL to the Train controller"
    another_group = retried = True

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        kill(cluster.controllers(), chance)


class DriverKilled(Kind):
    name, what = "driver", "SIGKILL to the command, then `--resume`"
    another_group = True
    hold_s = (0.0, 5.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        kill(cluster.drivers(), chance)

    def heal(self, cluster: Cluster) -> None:
        cluster.resume()


class HeadLost(Kind):
    name, what, quota = "head", "SIGKILL to all on the head, the cluster started again, `--resume`", 3
    another_group = True
    hold_s = (1.0, 5.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.head.kill_all()

    def heal(self, cluster: Cluster) -> None:
        cluster.start_ray()
        cluster.resume()


class WorkerStopped(Kind):
    name, what, quota = "stopped worker", "SIGSTOP to a worker for 90 s", 3
    hold_s = (90.0, 90.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        self.process = one_of(cluster.train_workers(), chance)
        self.process.suspend()

    def heal(self, cluster: Cluster) -> None:
        with suppress(psutil.NoSuchProcess):
            self.process.resume()


class LinkCut(Kind):
    name, what = "cut", "the two workers do not reach each other for 5 to 25 s"
    hold_s = (5.0, 25.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.lab.cut(*cluster.workers)

    def heal(self, cluster: Cluster) -> None:
        cluster.lab.join(*cluster.workers)


class HostPreempted(Kind):
    name, what = "preempted", "notice that a worker's host is taken, which ends once the run has left or after 25 s"
    another_group = True
    intervals = 0

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        self.host = chance.choice(cluster.workers)
        if not cluster.watchers(self.host) or not self.host.processes("ray::RayTrainWorker"):
            raise NotNow
        at = datetime.now(UTC) + timedelta(seconds=NOTICE_S)
        cluster.metadata[self.host.name].pages[ACTION] = {"action": "terminate", "time": f"{at:%Y-%m-%dT%H:%M:%SZ}"}

    def heal(self, cluster: Cluster) -> None:
        with suppress(TimeoutError):
            wait_until(lambda: not self.host.processes("ray::RayTrainWorker"), NOTICE_S, "leave of the run")
        self.host.kill_all()
        cluster.join(self.host)


class HostUnplugged(Kind):
    name, what, quota = "unplugged", "a worker's host is off the network for 90 s", 3
    retried = True
    hold_s = (90.0, 90.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        self.host = chance.choice(cluster.workers)
        cluster.lab.unplug(self.host)

    def heal(self, cluster: Cluster) -> None:
        cluster.lab.plug(self.host)
        # its raylet hears that it was given up, and ends; one that does not hear it was not given up
        with suppress(TimeoutError):
            wait_until(lambda: not self.host.processes("raylet/raylet "), 60, f"end of the raylet on {self.host.name}")
        cluster.join(self.host)


class StorageKilled(Kind):
    name, what, hits_storage = "S3 killed", "the S3 server is killed, and back after 5 to 20 s", True
    hold_s = (5.0, 20.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.s3.kill()

    def heal(self, cluster: Cluster) -> None:
        cluster.s3.start()


class StorageProxied(Kind):
    """The proxy in front of S3 does something for a while."""

    hits_storage = True
    hold_s = (10.0, 20.0)
    mode: ClassVar[Mode]

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.s3_proxy.mode = self.mode

    def heal(self, cluster: Cluster) -> None:
        cluster.s3_proxy.mode = "pass"


class StorageDrops(StorageProxied):
    name, what, mode = "S3 drops", "3 of 4 connections to S3 are reset half-way, for 10 to 20 s", "drop"


class StorageDelays(StorageProxied):
    name, what, mode = "S3 delays", "all that passes between S3 and clients waits up to 0.5 s, for 10 to 20 s", "delay"


class StorageCorrupts(StorageProxied):
    name, what, mode = "S3 corrupts", "two uploads and the next read of a checkpoint are altered on the way", "corrupt"
    another_group = retried = True
    intervals = 2
    hold_s = (0.0, 0.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.s3_proxy.budget = 2
        super().inject(cluster, chance)
        time.sleep(chance.uniform(3, 6))
        # checkpoints are read when another worker group starts
        kill(cluster.train_workers(), chance)
        cluster.s3_proxy.budget = 1

    def heal(self, cluster: Cluster) -> None:
        with suppress(TimeoutError):
            wait_until(lambda: cluster.s3_proxy.budget == 0, 60, "read of a checkpoint")
        cluster.s3_proxy.budget = 0
        super().heal(cluster)


class CheckpointAltered(Kind):
    name, what = "altered checkpoint", "the newest checkpoint is cut short in the store, and a worker killed"
    another_group = retried = True
    intervals = 2

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        client = cluster.s3.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"campaign/{cluster.name}/")
        written = {item["Key"]: item["LastModified"] for page in pages for item in page.get("Contents", ())}
        whole = [
            key.removesuffix("manifest.json")
            for key in written
            # of a run that goes on: nothing would read it again in one that has ended
            if key.endswith("/manifest.json")
            and f"step-{cluster.last_step:08d}" not in key
            and f"{key.partition('/checkpoints/')[0]}/outcome.json" not in written
        ]
        if not whole or not cluster.train_workers():
            raise NotNow
        newest = max(whole, key=lambda folder: written[f"{folder}manifest.json"])
        key = f"{newest}{chance.choice(['model', 'optimizer'])}.safetensors"
        data = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        client.put_object(Bucket=BUCKET, Key=key, Body=data[: len(data) // 2])
        kill(cluster.train_workers(), chance)


class TrackingKilled(Kind):
    name, what = "MLflow killed", "the MLflow server is killed, and back after 5 to 30 s"
    hold_s = (5.0, 30.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        cluster.mlflow.kill()

    def heal(self, cluster: Cluster) -> None:
        cluster.mlflow.start()


class DiskFull(Kind):
    name, what = "disk full", "no space on a host's disk (Ray's and temporary files) for 10 to 25 s"
    hold_s = (10.0, 25.0)

    def inject(self, cluster: Cluster, chance: random.Random) -> None:
        self.host: Host = chance.choice(list(cluster.lab.hosts.values()))
        with (self.host.disk / FILL).open("wb", buffering=0) as file:
            for size in (2**20, 2**12, 1):
                fill(file, bytes(size))

    def heal(self, cluster: Cluster) -> None:
        (self.host.disk / FILL).unlink()


def fill(file: IO[bytes], piece: bytes) -> None:
    """Write ``piece`` until there is no space for another."""
    try:
        while True:
            file.write(piece)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


KINDS: dict[str, type[Kind]] = {
    kind.name: kind
    for kind in (
        WorkerKilled, RayletKilled, ControllerKilled, DriverKilled, HeadLost, HostPreempted, WorkerStopped, LinkCut,
        HostUnplugged, StorageKilled, StorageDrops, StorageDelays, StorageCorrupts, CheckpointAltered, TrackingKilled,
        DiskFull,
    )
}  # fmt: skip
"""All kinds by name. A new kind is a class with ``name``, ``what``, ``inject`` and ``heal``, and its place here."""
