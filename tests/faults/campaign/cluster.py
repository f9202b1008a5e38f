"""A Ray cluster of a head and two workers in a lab, an S3 and an MLflow server beside it, and a command on the head."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from tests.support.fault_proxy import FaultProxy
from tests.support.lab import GATEWAY, HERE, Host, Lab, wait_until
from tests.support.metadata_server import MetadataServer
from tests.support.mlflow_server import MlflowServer
from tests.support.s3_server import S3Server

ROOT = Path(__file__).parents[3]
HOOK = Path(__file__).parent / "hook"
WORKERS = ("one", "two")
S3_PORT, MLFLOW_PORT, RAY_PORT = 9000, 5000, 6379
PACE_S = 0.03
"""What a step lasts at least: wall-clock time for faults to hit, without work for the processor."""
START_ATTEMPTS = 5
"""Ray gives its own processes 30 s to start, which a loaded machine may not keep."""
BUCKET = "raytrain"
WATCHER = "raytrain.spot"
FILL = "fill"
"""File that takes all the space of a host's disk."""
KEEPER = "_AutoscalingCoordinator"
"""Ray Train's detached actor, the one that may outlive a run."""


class Cluster:
    """All that a fault can hit."""

    def __init__(self, work: Path, seed: int = 0) -> None:
        self.work = work
        self.steps = work / "steps"
        self.steps.mkdir(parents=True, exist_ok=True)
        (work / "s3").mkdir(exist_ok=True)
        self.set_pace(PACE_S)
        self.lab = Lab(["head", *WORKERS])
        self.head = self.lab.hosts["head"]
        self.workers = [self.lab.hosts[name] for name in WORKERS]
        self.metadata = {host.name: MetadataServer(GATEWAY) for host in self.workers}
        """What EC2 says to each worker's host."""
        self.s3 = S3Server(work / "s3")
        self.mlflow = MlflowServer(work / "mlflow", start_timeout_s=600)
        self.s3.start()
        self.mlflow.start()
        client = self.s3.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):
            client.create_bucket(Bucket=BUCKET)
        port = int(self.s3.endpoint.rpartition(":")[2])
        self.s3_proxy = FaultProxy(("127.0.0.1", port), GATEWAY, S3_PORT, seed)
        self.mlflow_proxy = FaultProxy(("127.0.0.1", self.mlflow.port), GATEWAY, MLFLOW_PORT, seed)
        self.driver: subprocess.Popen[str] | None = None
        self.output = work / "output.txt"
        self.command: list[str] = []
        self.name = ""
        self.last_step = 0

    def set_pace(self, seconds: float) -> None:
        """What a step of runs that begin from now on lasts at least."""
        self.pace_s = seconds
        (self.steps / "pace").write_text(str(seconds))

    # ------------------------------------------------------------------------------------------- Ray

    def environment(self) -> dict[str, str]:
        """The variables of every process on the hosts."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_", "RAY"))}
        return {
            **kept,
            **self.s3.environment(AWS_ENDPOINT_URL_S3=f"http://{GATEWAY}:{S3_PORT}"),
            "MLFLOW_TRACKING_URI": f"http://{GATEWAY}:{MLFLOW_PORT}",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "RAYTRAIN_STORAGE": f"s3://{BUCKET}/campaign",
            "RAYTRAIN_CACHE": f"{HERE}/cache",
            "RAYTRAIN_STEPS": str(self.steps),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # else all that runs on the machine beside goes first
            "HOME": f"{HERE}/home",
            "TMPDIR": f"{HERE}/tmp",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HOOK}:{ROOT}",
        }

    def user_environment(self) -> dict[str, str]:
        """The variables of a command."""
        return {**self.environment(), "RAY_ADDRESS": f"{self.head.address}:{RAY_PORT}"}

    def start_ray(self) -> None:
        """Start Ray on all hosts, whatever was there before."""
        for host in self.lab.hosts.values():
            host.kill_all()
        head = [
            "--head",
            f"--port={RAY_PORT}",
            "--num-cpus=0",
            "--include-dashboard=true",
            "--dashboard-host=127.0.0.1",
        ]
        self._ray(self.head, *head, "--dashboard-host=127.0.0.1", f"--temp-dir={HERE}/ray")
        for host in self.workers:
            self.join(host)

    def join(self, host: Host) -> None:
        """Make a worker a node of the cluster, unless it is one, with the watcher of spot instances on it."""
        if not host.processes("raylet/raylet "):
            host.kill_all()
            metadata = self.metadata[host.name]
            metadata.pages.clear()
            self._ray(host, f"--address={self.head.address}:{RAY_PORT}", "--num-cpus=1")
            with (self.work / f"watcher-{host.name}.txt").open("a") as said:
                subprocess.Popen(
                    host.command(sys.executable, "-m", WATCHER, f"--address={self.head.address}:{RAY_PORT}"),
                    env={**self.environment(), "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.uri},
                    stdout=said, stderr=said,
                )  # fmt: skip

    def _ray(self, host: Host, *arguments: str) -> None:
        ray = str(Path(sys.executable).with_name("ray"))
        settings = [f"--node-ip-address={host.address}", "--object-store-memory=80000000", "--disable-usage-stats"]
        settings.append("--include-log-monitor=false")
        for _ in range(START_ATTEMPTS):
            done = subprocess.run(
                host.command(ray, "start", *arguments, *settings),
                env=self.environment(), capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return
            host.kill_all()
        raise RuntimeError(f"Ray did not start on {host.name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

    def repair(self) -> None:
        """Mend all that a fault may have left behind, and start Ray anew."""
        for proxy in (self.s3_proxy, self.mlflow_proxy):
            proxy.mode = "pass"
        for server in (self.s3, self.mlflow):
            server.kill()
            server.start()
        for host in self.lab.hosts.values():
            self.lab.plug(host)
            (host.disk / FILL).unlink(missing_ok=True)
        self.lab.join(*self.workers)
        self.start_ray()

    # ---------------------------------------------------------------------------------------- driver

    def begin(self, folder: Path, command: list[str], name: str, last_step: int) -> None:
        """Start ``command`` on the head, in ``folder``."""
        self.last_step = last_step
        self.output = folder / "output.txt"
        self.command, self.name = command, name
        self._start(*command, "--name", name, "--experiment", name)

    def resume(self) -> None:
        """Start the command again that has been killed, with nothing but its names."""
        self._start(self.command[0], "--resume", self.name, "--experiment", self.name)

    def _start(self, *arguments: str) -> None:
        with self.output.open("a") as output:
            print("$", *arguments, file=output, flush=True)
            self.driver = subprocess.Popen(
                self.head.command(sys.executable, "-m", *arguments, folder=self.output.parent),
                env=self.user_environment(), stdout=output, stderr=output, text=True,
            )  # fmt: skip

    def ended(self) -> int | None:
        """The exit status of the command, ``None`` while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def run(self, *arguments: str, timeout: float = 180) -> str:
        """Run a command on the head to its end.

        Raises:
            subprocess.CalledProcessError, subprocess.TimeoutExpired: it failed, or hangs.
        """
        return subprocess.run(
            self.head.command(sys.executable, *arguments, folder=self.output.parent), env=self.user_environment(),
            capture_output=True, text=True, timeout=timeout, check=True,
        ).stdout  # fmt: skip

    # -------------------------------------------------------------------------------------- processes

    def drivers(self) -> list[psutil.Process]:
        """The command that runs the training, without what it has started."""
        return [process for process in self.head.processes("-m raytrain.") if process.name() != "nsenter"]

    def watchers(self, host: Host) -> list[psutil.Process]:
        """Those that ask whether ``host`` is taken away."""
        return host.processes(f"-m {WATCHER}")

    def train_workers(self) -> list[psutil.Process]:
        """Workers of the worker group, and trials that train in their own process."""
        return [process for host in self.workers for process in host.processes("ray::RayTrainWorker")]

    def controllers(self) -> list[psutil.Process]:
        """Ray Train's controllers, wherever they are."""
        hosts = self.lab.hosts.values()
        return [process for host in hosts for process in host.processes("ray::TrainController")]

    def coordinators(self) -> list[psutil.Process]:
        """Coordinators, which connect drivers with their worker groups: one a group."""
        return [process for host in self.lab.hosts.values() for process in host.processes("ray::Coordinator")]

    def busy(self) -> list[str]:
        """What works on something on the hosts: all that Ray does not keep while it is idle."""
        idle = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", f"ray::{KEEPER}")
        lines = []
        for host in self.lab.hosts.values():
            for process in host.processes():
                with suppress(psutil.Error):
                    line = " ".join(process.cmdline())
                    if (line.startswith("ray::") and not line.startswith(idle)) or is_command(line):
                        lines.append(f"{host.name}: {line[:100]}")
        return lines

    def wait_idle(self, seconds: float) -> None:
        """Wait until nothing works any more.

        Raises:
            TimeoutError: something does.
        """
        wait_until(lambda: not self.busy(), seconds, f"end of {self.busy()}")

    def close(self) -> None:
        """Stop the servers; the lab dies with the process that encloses it."""
        for host in self.lab.hosts.values():
            host.kill_all()
        for proxy in (self.s3_proxy, self.mlflow_proxy):
            proxy.close()
        for metadata in self.metadata.values():
            metadata.close()
        self.s3.kill()
        self.mlflow.kill()


def is_command(line: str) -> bool:
    """Whether a process with this command line is one that a user has started."""
    return "-m raytrain." in line and WATCHER not in line
