"""Three hosts and the S3 server of a network of their own, and a laptop in another: what docs/onprem.yaml is for.

The laptop has a checkout and does what a user does. Where it cannot, the hosts are as a user has to hand them over:
Python's packages are there already, since nothing can be fetched.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.fault_proxy import FaultProxy
from tests.lab import GATEWAY, NETWORK, USER, Host, Lab
from tests.s3_server import S3Server
from tests.test_search import SPACE

ROOT = Path(__file__).parents[1]
HOSTS = ("head", "one", "two")
HOME = Path("/home") / USER
PROJECT = HOME / "raytrain"
"""The checkout on the laptop."""
FILE, FIREWALL = "docs/onprem.yaml", "docs/onprem.nft"
BUCKET = "team"
S3_PORT = 9000
_RAY = f"#!{HOME}/venv/bin/python\nfrom ray.scripts.scripts import main\nmain()\n"
_LISTENING = """
import json, psutil
found = [(c.pid, c.laddr.ip, c.laddr.port) for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
print(json.dumps([(" ".join(psutil.Process(p).cmdline()) if p else "", ip, port) for p, ip, port in found]))
"""
_ANSWERS = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor
def answers(port):
    with socket.socket() as probe:
        probe.settimeout(3)
        return probe.connect_ex((sys.argv[1], port)) == 0
ports = json.load(sys.stdin)
with ThreadPoolExecutor(200) as pool:
    print(json.dumps([port for port, yes in zip(ports, pool.map(answers, ports)) if yes]))
"""


class Site:
    """All machines, as they are before the first command of the user."""

    def __init__(self, work: Path) -> None:
        work.mkdir(exist_ok=True)
        self.work = work
        key = work / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        seen = [Path(sys.prefix), Path(sys.base_prefix)]
        self.lab = Lab(HOSTS, ["laptop"], key.with_suffix(".pub").read_text().strip(), seen)
        self.head, self.one, self.two = (self.lab.hosts[name] for name in HOSTS)
        self.laptop = self.lab.hosts["laptop"]
        make_environment(work / "venv")
        for host in self.lab.hosts.values():
            shutil.copytree(work / "venv", self.home(host) / "venv", symlinks=True)
        (work / "s3").mkdir()
        self.s3 = S3Server(work / "s3")
        self.s3.start()
        self.s3.client().create_bucket(Bucket=BUCKET)
        self.proxy = FaultProxy(("127.0.0.1", int(self.s3.endpoint.rpartition(":")[2])), GATEWAY, S3_PORT)
        self.endpoint = f"http://{GATEWAY}:{S3_PORT}"
        self._furnish_laptop(key)
        for host in self.lab.hosts.values():
            subprocess.run(["chown", "-R", "1000:1000", str(self.home(host))], check=True)

    @staticmethod
    def home(host: Host) -> Path:
        """The user's home, as the lab reaches it."""
        return Path(f"/proc/{host.pid}/root{HOME}")

    def _furnish_laptop(self, key: Path) -> None:
        """A checkout with the files filled in, the key to the hosts, and those to the bucket."""
        home = self.home(self.laptop)
        project = home / PROJECT.name
        for folder in ("raytrain", "search_spaces"):
            shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
        (project / "docs").mkdir()
        (project / FILE).write_text(filled_in((ROOT / FILE).read_text(), [self.head, self.one, self.two]))
        (project / FIREWALL).write_text((ROOT / FIREWALL).read_text().replace("10.0.0.0/24", f"{NETWORK}.0/24"))
        (project / "search_spaces" / "quick.py").write_text(SPACE)
        (project / "cluster-requirements.txt").write_text(installed((ROOT / "cluster-requirements.txt").read_text()))
        (home / ".aws").mkdir(mode=0o700)
        shutil.copy(key, home / ".ssh" / "id_ed25519")
        keys = self.s3.environment()
        (home / ".aws" / "credentials").write_text(
            f"[default]\naws_access_key_id={keys['AWS_ACCESS_KEY_ID']}\n"
            f"aws_secret_access_key={keys['AWS_SECRET_ACCESS_KEY']}\n"
        )

    # ------------------------------------------------------------------------------------------ commands

    def start(self, host: Host, line: str, **options: Any) -> subprocess.Popen[str]:
        """Start a line of bash as ``USER``, on the laptop in the checkout, with nothing but a user's variables."""
        variables = {
            "HOME": str(HOME), "PATH": f"{HOME}/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "TERM": "dumb",
            "LANG": "C.UTF-8", "RAY_UP_enable_autoscaler_v2": "0",
        }  # fmt: skip
        place = PROJECT if host is self.laptop else HOME
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
        command = host.command(*user, "bash", "-c", f"cd {place} && {line}", folder=Path("/"))
        return subprocess.Popen(command, env=variables, text=True, **options)

    def run(self, host: Host, line: str, timeout: float = 300, give: str = "") -> subprocess.CompletedProcess[str]:
        """Run a line of bash on ``host`` to its end, whatever comes of it, all that it says in ``stdout``.

        Raises:
            TimeoutExpired: it hangs; it has been killed.
        """
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self.start(host, line, **pipes) as process:
            try:
                said, _ = process.communicate(give, timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(line, process.returncode, said)

    def user(self, line: str, timeout: float = 300) -> str:
        """Run a command of the user's on the laptop; returns what it says."""
        done = self.run(self.laptop, line, timeout)
        assert done.returncode == 0, f"{line}: status {done.returncode}\n{done.stdout[-3000:]}"
        return done.stdout

    # --------------------------------------------------------------------------------------------- ports

    def close_firewall(self) -> None:
        """Load the rules that the documentation gives, on every host."""
        rules = (self.home(self.laptop) / PROJECT.name / FIREWALL).read_text()
        for name in HOSTS:
            subprocess.run(self.lab.hosts[name].command("nft", "-f", "-"), input=rules, text=True, check=True)

    def open_firewall(self) -> None:
        for name in HOSTS:
            subprocess.run(self.lab.hosts[name].command("nft", "delete", "table", "inet", "raytrain"), check=True)

    def listening(self, host: Host) -> list[tuple[str, str, int]]:
        """(command line, address, port) of all that listens on ``host``."""
        command = host.command(sys.executable, "-c", _LISTENING)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [(line, address, port) for line, address, port in json.loads(done.stdout)]

    def answering(self, host: Host, ports: list[int], source: Host | None = None) -> list[int]:
        """Those of ``ports`` of ``host`` that take a connection from ``source``, by default the laptop."""
        command = (source or self.laptop).command(sys.executable, "-c", _ANSWERS, host.address, folder=Path("/"))
        done = subprocess.run(command, input=json.dumps(ports), capture_output=True, text=True, check=True)
        return [int(port) for port in json.loads(done.stdout)]

    def close(self) -> None:
        """Stop the server; the hosts die with the process that encloses them."""
        self.proxy.close()
        self.s3.kill()


def make_environment(folder: Path) -> None:
    """A virtual environment with the packages of this one, that can be copied to ``~/venv``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    ray = folder / "bin" / "ray"
    ray.write_text(_RAY)
    ray.chmod(0o755)


def filled_in(text: str, hosts: list[Host]) -> str:
    """The on-prem file with a user's values in place of what is marked CHANGE."""
    head, *workers = (host.address for host in hosts)
    for old, new in {
        "CHANGE-ME-HEAD": head,
        "CHANGE-ME-1, CHANGE-ME-2": ", ".join(workers),
        "s3://CHANGE-ME": f"s3://{BUCKET}",
        "http://CHANGE-ME:9000": f"http://{GATEWAY}:{S3_PORT}",
        "# ~/.aws/credentials": "~/.aws/credentials",
    }.items():
        assert old in text, old
        text = text.replace(old, new)
    return text


def installed(requirements: str) -> str:
    """The same packages in the versions that are here: pip finds each of them."""
    names = [line.partition("==")[0] for line in requirements.splitlines() if "==" in line]
    return "".join(f"{name}=={version(name)}\n" for name in names)
