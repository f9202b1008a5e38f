"""From `ray up` to `ray down` on docs/onprem.yaml, with a search between in which a host's Ray is killed.

python -m tests.cluster.onprem_story FOLDER

Writes what was seen to FOLDER/story.json, which tests/cluster/test_onprem.py holds against what must be.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from tests.support import lab
from tests.support.lab import wait_until
from tests.support.onprem import BUCKET, FILE, HOSTS, OnPrem
from tests.support.site import PROJECT, ROOT
from tests.support.story import LOOK, PATIENCE_S, WORKER, Parts, line, objects, raylet, runs, trained
from tests.support.tiny import TINY

TRIALS = 4
STAYS = "ray/_private/log_monitor.py"
"""Ray's reader of logs outlives the raylet that nobody has told to stop."""
AGENTS_S = 240.0
"""Longest that a raylet's agents may outlive it: they first try to tell the directory, which is gone, for a minute."""
JOIN = 'python -c \'import ray; ray.init(address="{address}:6379"); print("inside")\''


@dataclass
class Story(Parts):
    """What was seen, as plain values."""

    check: str = ""
    worker_spec: dict[str, int] = field(default_factory=dict)
    """Workers of the worker group on each host."""
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


def play(site: OnPrem, story: Story) -> None:
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
        s3 = site.s3.client()
        wait_until(lambda: len(trained(s3, BUCKET)) >= 2 or search.poll() is not None, PATIENCE_S, "second trial")
    look_at_ports(site, story)
    with story.part("raylet killed until there is another"):
        story.worker_spec = {name: len(site.lab.hosts[name].processes(WORKER)) for name in HOSTS}
        dead = raylet(site.one)
        assert dead is not None
        dead.kill()
        wait_until(lambda: raylet(site.one) not in (None, dead), PATIENCE_S, "another raylet")
    with story.part("search until its end"):
        story.search = search.wait(PATIENCE_S), output.read_text()
    with story.part("tokens"):
        ask_ray(site, story)
    with story.part("looking for what is left"):
        story.runs = runs(site.head.address)
        (site.home(site.laptop) / PROJECT.name / "look.py").write_text(
            (ROOT / "tests/support/leftovers.py").read_text() + LOOK
        )
        story.left = site.user(f"ray submit {FILE} look.py")
    with story.part("ray down"):
        site.user(f"ray down --yes {FILE}")
    with story.part("workers until they have ended"):
        wait_until(lambda: not any(raylet(site.lab.hosts[name]) for name in HOSTS), PATIENCE_S, "end of Ray")
    # if it takes too long, the test names what is left
    with story.part("their other processes until they have ended"), suppress(TimeoutError):
        wait_until(lambda: not rays(site), AGENTS_S, "end of Ray's processes")
    story.after_down = {name: [line(process) for process in site.lab.hosts[name].processes()] for name in HOSTS}
    story.objects = objects(s3, BUCKET)
    variables = f"AWS_REGION=us-east-1 AWS_ENDPOINT_URL_S3={site.endpoint}"
    story.sample = site.user(f"{variables} python -m raytrain.sample s3://{BUCKET}/raytrain/first --num 1")


# ------------------------------------------------------------------------------------------- the search


def search_command() -> str:
    """A search of the hybrid whose trials need both hosts: a worker takes more than half of one."""
    cpus = (psutil.cpu_count() or 1) / 2 + 0.1
    options = [
        *TINY, "--model.hidden", "32",  # fewer, and the baseline rule may end the first trial
        "--steps", "1500", "--checkpoint-every", "100", "--evaluate-every", "250", "--space", "quick",
        "--num-samples", str(TRIALS), "--workers-per-trial", "2", "--cpus-per-worker", str(cpus), "--name", "first",
    ]  # fmt: skip
    return f"ray exec {FILE} 'cd project && python -m raytrain.tune hybrid {' '.join(options)}'"


# ---------------------------------------------------------------------------------------- the processes


def status(site: OnPrem) -> str:
    return site.user(f"ray exec {FILE} 'ray status'")


def rays(site: OnPrem) -> list[str]:
    """Command lines of Ray's processes on all hosts, but for those that stay without their raylet."""
    found = [line(process) for name in HOSTS for process in site.lab.hosts[name].processes()]
    return [text for text in found if (text.startswith("ray") or "/ray/" in text) and STAYS not in text]


# ---------------------------------------------------------------------------------------- who gets in


def look_at_ports(site: OnPrem, story: Story) -> None:
    """What listens on the hosts, and what of it answers the laptop with and without the firewall."""
    hosts = {name: site.lab.hosts[name] for name in HOSTS}
    story.listening = {name: site.listening(host) for name, host in hosts.items()}
    ports = {name: sorted({port for *_, port in found}) for name, found in story.listening.items()}
    for case in ("firewall", "none"):
        if case == "none":
            site.open_firewall()
        story.answering[case] = {name: site.answering(host.address, ports[name]) for name, host in hosts.items()}
    site.close_firewall()


def ask_ray(site: OnPrem, story: Story) -> None:
    """Submit a job through the dashboard's forward, and join the cluster from one of its hosts."""
    nothing = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    dashboard = site.start(site.laptop, f"exec ray dashboard --port 8265 {FILE}", **nothing)
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
    for process in site.laptop.processes("8265"):  # the command, its ssh, and with that what it runs on the head
        process.terminate()
    dashboard.wait(60)


def main() -> int:
    work = Path(sys.argv[1]).resolve()
    if not lab.enclosed():
        return lab.enclose("-m", "tests.cluster.onprem_story", str(work))
    story = Story()
    with story.part("machines"):
        site = OnPrem(work)
        site.close_firewall()
    try:
        play(site, story)
    finally:
        (work / "story.json").write_text(json.dumps(asdict(story), indent=1))
        site.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
