"""From `ray up` to `ray down` on docs/onprem.yaml, with a search between in which a host's Ray is killed.

python -m tests.onprem_story FOLDER

Writes what was seen to FOLDER/story.json, which tests/test_onprem.py holds against what must be.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests import lab
from tests.lab import Host, wait_until
from tests.onprem import BUCKET, FILE, HOSTS, PROJECT, ROOT, Site
from tests.test_search import TINY

TRIALS = 4
RAYLET = "raylet/raylet "
WORKER = "ray::RayTrainWorker"
PATIENCE_S = 600.0
"""For everything: on a quiet machine nothing takes a quarter of it."""
LOOK = """
import time, ray
ray.init(address="auto", log_to_driver=False)
deadline = time.monotonic() + 60
while (left := leftovers()) and time.monotonic() < deadline:
    time.sleep(0.5)
print("LEFT", left)
"""
JOIN = 'python -c \'import ray; ray.init(address="{address}:6379"); print("inside")\''


@dataclass
class Story:
    """What was seen, as plain values."""

    seconds: dict[str, float] = field(default_factory=dict)
    """What each part took."""
    check: str = ""
    gang: dict[str, int] = field(default_factory=dict)
    """Workers of the gang on each host."""
    listening: dict[str, list[tuple[str, str, int]]] = field(default_factory=dict)
    """(command line, address, port) on each host, while a trial is trained."""
    answering: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Ports of each host that answer the laptop, behind the documented firewall and without one."""
    joined: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Exit status and words of those who asked Ray for something: with the token, without, with another."""
    search: tuple[int, str] = (-1, "")
    runs: list[tuple[str, str]] = field(default_factory=list)
    """(trial, status) of MLflow's runs; the search's own has no trial."""
    left: str = ""
    after_down: dict[str, list[str]] = field(default_factory=dict)
    """Command lines that are still there on each host."""
    objects: list[str] = field(default_factory=list)
    sample: str = ""
    """What the champion writes on the laptop when the cluster is gone."""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        print(f"{name} ...", flush=True)
        yield
        self.seconds[name] = round(time.monotonic() - began, 1)


def play(site: Site, story: Story) -> None:
    """All of it; an exception where it cannot go on."""
    with story.part("ray up"):
        site.user("ray get-auth-token --generate > /dev/null && chmod 600 ~/.ray/auth_token")
        story.check = site.user(f"python -m raytrain.cluster check {FILE}")
        site.user(f"ray up --yes {FILE}", PATIENCE_S)
    with story.part("all hosts up"):
        wait_until(lambda: all(raylet(site.lab.hosts[name]) for name in HOSTS), PATIENCE_S, "Ray on all hosts")
        wait_until(lambda: "3 local" in status(site), PATIENCE_S, "three nodes")
    output = site.work / "search.txt"
    with story.part("search until its second trial trains"):
        with output.open("w") as said:
            search = site.start(site.laptop, search_command(), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        wait_until(lambda: len(trained(site)) >= 2 or search.poll() is not None, PATIENCE_S, "second trial")
    look_at_ports(site, story)
    with story.part("raylet killed until there is another"):
        story.gang = {name: len(site.lab.hosts[name].processes(WORKER)) for name in HOSTS}
        dead = raylet(site.one)
        assert dead is not None
        dead.kill()
        wait_until(lambda: raylet(site.one) not in (None, dead), PATIENCE_S, "another raylet")
    with story.part("search until its end"):
        story.search = search.wait(PATIENCE_S), output.read_text()
    with story.part("tokens"):
        ask_ray(site, story)
    with story.part("looking for what is left"):
        story.runs = runs(site)
        (site.home(site.laptop) / PROJECT.name / "look.py").write_text((ROOT / "tests/leftovers.py").read_text() + LOOK)
        story.left = site.user(f"ray submit {FILE} look.py")
    with story.part("ray down"):
        site.user(f"ray down --yes {FILE}")
    with story.part("workers until they have ended"):
        wait_until(lambda: not any(raylet(site.lab.hosts[name]) for name in HOSTS), PATIENCE_S, "end of Ray")
        wait_until(lambda: not rays(site), 60, "end of Ray's processes")
    story.after_down = {name: [line(process) for process in site.lab.hosts[name].processes()] for name in HOSTS}
    pages = site.s3.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    story.objects = [item["Key"] for page in pages for item in page.get("Contents", ())]
    variables = f"AWS_REGION=us-east-1 AWS_ENDPOINT_URL_S3={site.endpoint}"
    story.sample = site.user(f"{variables} python -m raytrain.sample s3://{BUCKET}/raytrain/first --num 1")


# ------------------------------------------------------------------------------------------- the search


def search_command() -> str:
    """A search of the hybrid whose trials need both hosts: a worker takes more than half of one."""
    cpus = (psutil.cpu_count() or 1) / 2 + 0.1
    options = [
        *TINY, "--steps", "1500", "--checkpoint-every", "100", "--evaluate-every", "250", "--space", "quick",
        "--num-samples", str(TRIALS), "--workers-per-trial", "2", "--cpus-per-worker", str(cpus), "--name", "first",
    ]  # fmt: skip
    return f"ray exec {FILE} 'cd project && python -m raytrain.tune hybrid {' '.join(options)}'"


def trained(site: Site) -> set[str]:
    """The trials that have a checkpoint in the bucket."""
    found = site.s3.client().list_objects_v2(Bucket=BUCKET, Prefix="raytrain/first/").get("Contents", ())
    return {item["Key"].partition("/checkpoints/")[0] for item in found if item["Key"].endswith("manifest.json")}


def runs(site: Site) -> list[tuple[str, str]]:
    from raytrain.tracking.server import connect

    client = connect(f"http://{site.head.address}:5000")
    experiment = client.get_experiment_by_name("raytrain")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    return sorted((run.data.tags.get("raytrain.trial", ""), run.info.status) for run in found)


# ---------------------------------------------------------------------------------------- the processes


def status(site: Site) -> str:
    return site.user(f"ray exec {FILE} 'ray status'")


def line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def raylet(host: Host) -> psutil.Process | None:
    """The host's raylet, the process that makes it a node."""
    return next(iter(host.processes(RAYLET)), None)


def rays(site: Site) -> list[str]:
    """Command lines of Ray's processes on all hosts."""
    found = [line(process) for name in HOSTS for process in site.lab.hosts[name].processes()]
    return [text for text in found if text.startswith("ray") or "/ray/" in text]


# ---------------------------------------------------------------------------------------- who gets in


def look_at_ports(site: Site, story: Story) -> None:
    """What listens on the hosts, and what of it answers the laptop with and without the firewall."""
    hosts = {name: site.lab.hosts[name] for name in HOSTS}
    story.listening = {name: site.listening(host) for name, host in hosts.items()}
    ports = {name: sorted({port for *_, port in found}) for name, found in story.listening.items()}
    for case in ("firewall", "none"):
        if case == "none":
            site.open_firewall()
        story.answering[case] = {name: site.answering(host, ports[name]) for name, host in hosts.items()}
    site.close_firewall()


def ask_ray(site: Site, story: Story) -> None:
    """Submit a job through the dashboard's forward, and join the cluster from one of its hosts."""
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    dashboard = site.start(site.laptop, f"exec ray dashboard {FILE}", **nothing)
    wait_until(lambda: any(port == 8265 for *_, port in site.listening(site.laptop)), 120, "forward of port 8265")
    listing = "bash -c 'cd ~/project && python -m raytrain.registry list'"
    submit = f"ray job submit --address http://localhost:8265 -- {listing}"
    for who, mode in {
        "with the token": "RAY_AUTH_MODE=token",
        "without a token": "RAY_AUTH_MODE=disabled",
        "with another token": "RAY_AUTH_MODE=token RAY_AUTH_TOKEN=0123456789abcdef0123456789abcdef",
    }.items():
        join = JOIN.format(address=site.head.address)
        for what, host, command in (("job", site.laptop, submit), ("driver", site.one, join)):
            done = site.run(host, f"{mode} {command}")
            story.joined[f"{what} {who}"] = done.returncode, done.stdout
    dashboard.terminate()
    dashboard.wait(60)


def main() -> int:
    work = Path(sys.argv[1]).resolve()
    if not lab.enclosed():
        return lab.enclose("-m", "tests.onprem_story", str(work))
    story = Story()
    with story.part("machines"):
        site = Site(work)
        site.close_firewall()
    try:
        play(site, story)
    finally:
        (work / "story.json").write_text(json.dumps(asdict(story), indent=1))
        site.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
