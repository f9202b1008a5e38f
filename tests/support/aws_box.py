"""A region of AWS and a laptop outside it, in a lab without a way out: what cluster.yaml is for.

The laptop has a checkout and does what docs/guides/cluster.md says. The image of the instances has what the set-up
commands would install, since nothing can be fetched, and a file that says where this AWS is.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from tests.support.aws_region import ENDPOINT, GATEWAY, NAME, PORT, RUN, Region
from tests.support.fault_proxy import FaultProxy
from tests.support.lab import Host, Lab
from tests.support.s3_server import S3Server
from tests.support.site import HOME, PROJECT, ROOT, SEEN, Site, changed

FILE = "cluster.yaml"
BUCKET = "my-raytrain"
S3_PORT = 9000
S3_ENDPOINT = f"http://{GATEWAY}:{S3_PORT}"
WORKERS = {"gpu_spot": 3, "gpu_on_demand": 1}
"""The most of each kind of worker: two are needed, and one that is taken counts until it has ended."""
_CONFIG = f"""
[default]
region = {NAME}
services = here
# instances of this AWS share the cores of one machine
metadata_service_timeout = 10
metadata_service_num_attempts = 5
[services here]
s3 =
  endpoint_url = {S3_ENDPOINT}
""" + "".join(f"{service} =\n  endpoint_url = {ENDPOINT}\n" for service in ("ec2", "iam", "sts", "ssm"))


class AwsBox(Site):
    """All there is before the user's first command: an account with nothing in it but somebody else's instance."""

    def __init__(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        super().__init__(work, Lab([], ["laptop"], seen=SEEN))
        (work / "s3").mkdir()
        self.s3 = S3Server(work / "s3", NAME)
        self.s3.start()
        self.s3.client().create_bucket(Bucket=BUCKET)
        self._proxy = FaultProxy(("127.0.0.1", int(self.s3.endpoint.rpartition(":")[2])), "0.0.0.0", S3_PORT)
        keys = {"AccessKeyId": "test:writer", "SecretAccessKey": self.s3.secret(), "Token": "of-the-instance"}
        self.region = Region(self.lab, lambda host: self.furnish(host, {".aws/config": _CONFIG}), keys)
        command = f"#!{HOME}/venv/bin/python\n{(ROOT / 'tests/support/aws_command.py').read_text()}"
        self.furnish(
            self.laptop,
            {".aws/config": _CONFIG, ".aws/credentials": self.s3.credentials(), "venv/bin/aws": command},
        )
        (self.home(self.laptop) / "venv/bin/aws").chmod(0o755)
        self.check_out(
            {FILE: filled_in()} | {f"docs/aws/{path.name}": path.read_text() for path in (ROOT / "docs/aws").iterdir()}
        )
        self.others = self.region.client("ec2").run_instances(
            ImageId="ami-0123456789abcdef0", InstanceType="t3.micro", MinCount=1, MaxCount=1
        )["Instances"][0]["InstanceId"]

    def alive(self, kind: str) -> list[dict[str, Any]]:
        """The instances of the cluster that are of a node type and have not ended."""
        tags = {"ray-cluster-name": "raytrain", "ray-user-node-type": kind}
        return [one for one in self.region.instances("pending", "running") if tags.items() <= tags_of(one).items()]

    def host(self, instance: dict[str, Any]) -> Host | None:
        """The host of an instance, ``None`` if it is not up yet or any more."""
        return self.region.hosts.get(instance["InstanceId"])

    def launches(self, refused: bool) -> list[dict[str, str]]:
        """What the head has asked for when it wanted instances, and was refused or given."""
        found = [one for one in self.region.requests if one.role == "raytrain-head" and one.action == RUN]
        return [one.parameters for one in found if bool(one.refused) == refused]

    def write(self, name: str, text: str) -> None:
        """Change a file of the laptop's checkout."""
        (self.home(self.laptop) / PROJECT.name / name).write_text(text)

    def keep_logs(self) -> None:
        """Copy what the instances that are still up have written to files, to see why a story broke off."""
        for name, host in self.region.hosts.items():
            ray = Path(f"/proc/{host.pid}/root/tmp/ray/session_latest/logs")
            logs = [*self.home(host).glob("*.log"), *ray.glob("*.*")]
            (self.work / name).mkdir(exist_ok=True)
            for path in logs:
                shutil.copy(path, self.work / name)

    def close(self) -> None:
        """Stop all servers; the hosts die with the process that encloses them."""
        self.region.close()
        self._proxy.close()
        self.s3.kill()


def tags_of(instance: dict[str, Any]) -> dict[str, str]:
    """The tags of an instance."""
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}


def filled_in() -> str:
    """cluster.yaml with a user's values: the bucket, fewer workers, and less time without work."""
    return changed(
        (ROOT / FILE).read_text(),
        {
            "s3://CHANGE-ME": f"s3://{BUCKET}",
            "\nmax_workers: 10 # CHANGE": f"\nmax_workers: {sum(WORKERS.values())} # CHANGE",
            "    max_workers: 2 # CHANGE": f"    max_workers: {WORKERS['gpu_on_demand']} # CHANGE",
            "    max_workers: 8 # CHANGE": f"    max_workers: {WORKERS['gpu_spot']} # CHANGE",
            "idle_timeout_minutes: 5": "idle_timeout_minutes: 1",
        },
    )


def fewer_spot_workers() -> str:
    """The same with one spot worker at most."""
    most = f"    max_workers: {WORKERS['gpu_spot']} # CHANGE"
    return changed(filled_in(), {most: "    max_workers: 1 # CHANGE"})


def account_commands() -> str:
    """What docs/guides/cluster.md has done once for an account, with the user's bucket."""
    section = (
        (ROOT / "docs/guides/cluster.md").read_text().partition("### Once for an account")[2].partition("\n### ")[0]
    )
    blocks = re.findall(r"```bash\n(.*?)```", section, re.S)
    return changed("\n".join(["set -eu", *blocks]), {"BUCKET=my-raytrain": f"BUCKET={BUCKET}"})


def left_command() -> str:
    """What docs/guides/cluster.md gives to see whether anything runs."""
    text = (ROOT / "docs/guides/cluster.md").read_text()
    (command,) = re.findall(r"```bash\n(aws ec2 describe-instances.*?)```", text, re.S)
    return f"REGION={NAME}\n{command}"


def moto_for_s3() -> str:
    """The variable with which S3's requests go to moto: the S3 server knows neither versions nor lifecycles."""
    return f"AWS_ENDPOINT_URL_S3=http://{GATEWAY}:{PORT}"
