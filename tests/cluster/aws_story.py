"""From an empty AWS account to a finished search on cluster.yaml and back to nothing, with spot workers taken between.

python -m tests.cluster.aws_story FOLDER

Writes what was seen to FOLDER/story.json, which tests/cluster/test_aws.py holds against what must be.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support import lab
from tests.support.aws_box import (
    BUCKET,
    FILE,
    WORKERS,
    AwsBox,
    account_commands,
    fewer_spot_workers,
    left_command,
    moto_for_s3,
    tags_of,
)
from tests.support.lab import wait_until
from tests.support.site import ROOT
from tests.support.story import LOOK, PATIENCE_S, WORKER, Parts, objects, runs, trained
from tests.support.tiny import TINY

TRIALS = 3
TRIES = 5
"""Times that Ray asks EC2 in one launch."""


@dataclass
class Story(Parts):
    """What was seen, as plain values. An instance is what ``seen`` makes of it."""

    check: str = ""
    dry_run: str = ""
    account: dict[str, list[str]] = field(default_factory=dict)
    """Each role -> the actions that its policies allow."""
    head: dict[str, str] = field(default_factory=dict)
    first: list[dict[str, str]] = field(default_factory=list)
    """The workers with which the search began."""
    gpus: dict[str, float] = field(default_factory=dict)
    """GPUs that `ray status` counts, when these were up and after each replacement."""
    noticed: dict[str, str] = field(default_factory=dict)
    """The worker that was given notice, and what its watcher said."""
    after_notice: list[dict[str, str]] = field(default_factory=list)
    """The workers on which the search went on."""
    after_cut: list[dict[str, str]] = field(default_factory=list)
    """The same after another one was taken without notice, when there were no spot instances to be had."""
    without_spot: list[dict[str, str]] = field(default_factory=list)
    """What else the head asked for meanwhile by itself."""
    listening: list[int] = field(default_factory=list)
    """Ports of the head on which something listens for others."""
    answering: list[int] = field(default_factory=list)
    """Those of them that answer the laptop."""
    search: tuple[int, str] = (-1, "")
    runs: list[tuple[str, str]] = field(default_factory=list)
    """(trial, status) of MLflow's runs; the search's own has no trial."""
    left: str = ""
    requests: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)
    """(role, action, why it was refused, parameters) of all that instances asked AWS for."""
    instances: dict[str, list[str]] = field(default_factory=dict)
    """State -> ids of all the instances of the cluster, at the end."""
    other: str = ""
    """State of the instance that is not the cluster's."""
    running: str = ""
    """What the documented look for what runs finds."""
    objects: list[str] = field(default_factory=list)
    sample: str = ""
    """What the champion writes on the laptop when the cluster is gone."""


def play(box: AwsBox, story: Story) -> None:
    """All of it; an exception where it cannot go on."""
    with story.part("account, by the commands of the documentation"):
        box.user(f"export {moto_for_s3()}\n{account_commands()}")
    with story.part("check"):
        story.check = box.user(f"python -m raytrain.cluster check {FILE}")
    with story.part("ray up"):
        box.user(f"ray up --yes {FILE}", PATIENCE_S)
        (head,) = box.alive("head")
        story.head = seen(head)
        story.account = {name: list(box.region.read_role(f"raytrain-{name}").allowed) for name in ("head", "worker")}
    with story.part("dry run"):
        story.dry_run = box.user(search_command("--dry-run"))
    output = box.work / "search.txt"
    with output.open("w") as said:
        search = box.start(box.laptop, search_command(), stdin=subprocess.DEVNULL, stdout=said, stderr=said)
    end = search.poll
    with story.part("two workers asked for"):
        wait_until(lambda: len(box.alive("gpu_spot")) >= 2 or end() is not None, PATIENCE_S, "two workers")
    with story.part("both up"):
        wait_until(lambda: gpus(box) == 2 or end() is not None, PATIENCE_S, "two GPUs")
        story.gpus["first"] = gpus(box)
    with story.part("a trial trains on them"):
        s3 = box.s3.client()
        wait_until(
            lambda: (trained(s3, BUCKET) and len(worker_spec(box)) == 2) or end() is not None, PATIENCE_S, "a trial"
        )
        story.first = [seen(one) for one in worker_spec(box)]
    look_at_ports(box, story)
    with story.part("one has left after its notice"):
        give_notice(box, story)
    with story.part("another in its place"):
        gone = {story.noticed["id"]}
        wait_until(lambda: at_work(box, gone) or end() is not None, PATIENCE_S, "replacement")
        story.after_notice, story.gpus["after notice"] = [seen(one) for one in worker_spec(box)], gpus(box)
    with story.part("one taken without notice, and no spot instances to be had, until two launches are refused"):
        cut = story.after_notice[0]["id"]
        box.region.spot_capacity = False
        box.region.take(cut)
        before = len(box.launches(refused=False))
        wait_until(lambda: len(box.launches(refused=True)) > 2 * TRIES or end() is not None, PATIENCE_S, "two refusals")
        story.without_spot = box.launches(refused=False)[before:]
    with story.part("fewer spot workers written into the file, an on-demand one in its place"):
        box.write(FILE, fewer_spot_workers())
        box.user(f"ray up --yes --no-restart {FILE}", PATIENCE_S)
        wait_until(lambda: at_work(box, gone | {cut}) or end() is not None, PATIENCE_S, "on-demand worker")
        story.after_cut, story.gpus["after cut"] = [seen(one) for one in worker_spec(box)], gpus(box)
    with story.part("search until its end"):
        story.search = search.wait(PATIENCE_S), output.read_text()
    with story.part("looking for what is left"):
        story.runs = runs(head["PrivateIpAddress"])
        box.write("look.py", (ROOT / "tests/support/leftovers.py").read_text() + LOOK)
        story.left = box.user(f"ray submit {FILE} look.py")
    with story.part("no worker any more"):
        wait_until(lambda: not any(box.alive(kind) for kind in WORKERS), PATIENCE_S, "end of the workers")
    with story.part("ray down"):
        box.user(f"ray down --yes {FILE}")
    look_at_the_end(box, story)


# ------------------------------------------------------------------------------------------- the search


def search_command(*options: str) -> str:
    """A search of the hybrid whose trials take two GPUs and compute on CPUs."""
    words = [
        *TINY, "--steps", "4000", "--checkpoint-every", "200", "--evaluate-every", "500", "--space", "quick",
        "--num-samples", str(TRIALS), "--workers-per-trial", "2", "--max-concurrent", "1", "--device", "cpu",
        "--name", "first", *options,
    ]  # fmt: skip
    return f"ray exec {FILE} 'cd project && python -m raytrain.tune hybrid {' '.join(words)}'"


def gpus(box: AwsBox) -> float:
    """The GPUs of the cluster, as `ray status` counts them."""
    found = re.search(r"/([\d.]+) GPU", box.user(f"ray exec {FILE} 'ray status'"))
    return float(found[1]) if found else 0.0


def worker_spec(box: AwsBox) -> list[dict[str, Any]]:
    """The instances on which workers of a trial are."""
    hosts = [(one, box.host(one)) for kind in WORKERS for one in box.alive(kind)]
    return [one for one, host in hosts if host is not None and host.processes(WORKER)]


def at_work(box: AwsBox, gone: set[str]) -> bool:
    """Whether a trial's two workers are on instances that are not ``gone``."""
    return len({one["InstanceId"] for one in worker_spec(box)} - gone) == 2


# ----------------------------------------------------------------------------------------- the instances


def seen(instance: dict[str, Any]) -> dict[str, str]:
    """What of an instance is compared with the cluster file."""
    return {
        "id": instance["InstanceId"],
        "kind": tags_of(instance)["ray-user-node-type"],
        "type": instance["InstanceType"],
        "market": instance.get("InstanceLifecycle", "on-demand"),
        "profile": instance["IamInstanceProfile"]["Arn"].rpartition("/")[2],
        "image": instance["ImageId"],
        "zone": instance["Placement"]["AvailabilityZone"],
    }


def give_notice(box: AwsBox, story: Story) -> None:
    """Tell one of the workers that it will be taken, and take it when the trial has left it."""
    instance = worker_spec(box)[0]
    host = box.host(instance)
    assert host is not None
    box.region.notify(instance["InstanceId"])
    log = box.home(host) / "raytrain-spot.log"
    wait_until(lambda: not host.processes(WORKER), PATIENCE_S, "end of the workers on the instance")
    words = log.read_text() if log.exists() else ""
    box.region.take(instance["InstanceId"])
    story.noticed = {"id": instance["InstanceId"], "watcher": words}


def look_at_ports(box: AwsBox, story: Story) -> None:
    """What listens on the head for others than itself, and what of it answers the laptop."""
    (head,) = box.alive("head")
    host = box.host(head)
    assert host is not None
    ports = {port for _, address, port in box.listening(host) if address not in ("127.0.0.1", "::1")}
    story.listening = sorted(ports)
    story.answering = box.answering(head["PublicIpAddress"], story.listening)


def look_at_the_end(box: AwsBox, story: Story) -> None:
    """What AWS and the bucket have when all is over."""
    for instance in box.region.instances():
        if "ray-cluster-name" in tags_of(instance):
            story.instances.setdefault(instance["State"]["Name"], []).append(instance["InstanceId"])
        elif instance["InstanceId"] == box.others:
            story.other = instance["State"]["Name"]
    story.running = box.user(left_command())
    story.objects = objects(box.s3.client(), BUCKET)
    story.sample = box.user(f"python -m raytrain.sample s3://{BUCKET}/raytrain/first --num 1")


def main() -> int:
    work = Path(sys.argv[1]).resolve()
    if not lab.enclosed():
        return lab.enclose("-m", "tests.cluster.aws_story", str(work))
    story = Story()
    with story.part("machines"):
        box = AwsBox(work)
    try:
        play(box, story)
    except BaseException:
        box.keep_logs()
        raise
    finally:
        story.requests = [
            (request.role, request.action, request.refused, request.parameters)
            for request in box.region.requests
            if request.role
        ]
        (work / "story.json").write_text(json.dumps(asdict(story), indent=1))
        box.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
