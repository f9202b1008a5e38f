"""Three hosts and the S3 server of a network of their own, and a laptop in another: what docs/onprem.yaml is for.

The laptop has a checkout and does what a user does. Where it cannot, the hosts are as a user has to hand them over:
Python's packages are there already, since nothing can be fetched.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support.fault_proxy import FaultProxy
from tests.support.lab import GATEWAY, NETWORK, Host, Lab
from tests.support.s3_server import S3Server
from tests.support.site import PROJECT, ROOT, SEEN, Site, changed

HOSTS = ("head", "one", "two")
FILE, FIREWALL = "docs/onprem.yaml", "docs/onprem.nft"
BUCKET = "team"
S3_PORT = 9000


class OnPrem(Site):
    """All machines, as they are before the first command of the user."""

    def __init__(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        lab = Lab(HOSTS, ["laptop"], key.with_suffix(".pub").read_text().strip(), SEEN)
        super().__init__(work, lab, {"RAY_UP_enable_autoscaler_v2": "0"})
        self.head, self.one, self.two = (lab.hosts[name] for name in HOSTS)
        (work / "s3").mkdir()
        self.s3 = S3Server(work / "s3")
        self.s3.start()
        self.s3.client().create_bucket(Bucket=BUCKET)
        self.proxy = FaultProxy(("127.0.0.1", int(self.s3.endpoint.rpartition(":")[2])), GATEWAY, S3_PORT)
        self.endpoint = f"http://{GATEWAY}:{S3_PORT}"
        keys = {".ssh/id_ed25519": key.read_text(), ".aws/credentials": self.s3.credentials()}
        for host in lab.hosts.values():
            self.furnish(host, keys if host is self.laptop else {})
        firewall = changed((ROOT / FIREWALL).read_text(), {"10.0.0.0/24": f"{NETWORK}.0/24"})
        self.check_out({FILE: filled_in([self.head, self.one, self.two]), FIREWALL: firewall})

    def close_firewall(self) -> None:
        """Load the rules that the documentation gives, on every host."""
        rules = (self.home(self.laptop) / PROJECT.name / FIREWALL).read_text()
        for name in HOSTS:
            subprocess.run(self.lab.hosts[name].command("nft", "-f", "-"), input=rules, text=True, check=True)

    def open_firewall(self) -> None:
        for name in HOSTS:
            subprocess.run(self.lab.hosts[name].command("nft", "delete", "table", "inet", "raytrain"), check=True)

    def close(self) -> None:
        """Stop the server; the hosts die with the process that encloses them."""
        self.proxy.close()
        self.s3.kill()


def filled_in(hosts: list[Host]) -> str:
    """The on-prem file with a user's values in place of what is marked CHANGE."""
    head, *workers = (host.address for host in hosts)
    return changed(
        (ROOT / FILE).read_text(),
        {
            "CHANGE-ME-HEAD": head,
            "CHANGE-ME-1, CHANGE-ME-2": ", ".join(workers),
            "s3://CHANGE-ME": f"s3://{BUCKET}",
            "http://CHANGE-ME:9000": f"http://{GATEWAY}:{S3_PORT}",
            "# ~/.aws/credentials": "~/.aws/credentials",
        },
    )
