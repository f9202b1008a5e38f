"""Hosts with a user's account, one of them the laptop with a checkout, and what the user does on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.support.lab import USER, Host, Lab
from tests.support.tiny import SPACE

ROOT = Path(__file__).parents[2]
HOME = Path("/home") / USER
PROJECT = HOME / "raytrain"
"""The checkout on the laptop."""
SEEN = [Path(sys.prefix), Path(sys.base_prefix)]
"""What of this machine all hosts see, so that their environments work."""
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
    """The hosts of a lab that has a ``laptop``, and what is done there by hand."""

    def __init__(self, work: Path, lab: Lab, variables: Mapping[str, str] | None = None) -> None:
        """``variables``: what the user has set everywhere."""
        self.work = work
        self.lab = lab
        self.laptop = lab.hosts["laptop"]
        self._variables = dict(variables or {})
        make_environment(work / "venv")

    @staticmethod
    def home(host: Host) -> Path:
        """The user's home, as the lab reaches it."""
        return Path(f"/proc/{host.pid}/root{HOME}")

    def furnish(self, host: Host, files: Mapping[str, str]) -> None:
        """Give ``host`` an environment with all packages, and ``files`` that only the user can read, by their paths."""
        home = self.home(host)
        shutil.copytree(self.work / "venv", home / "venv", symlinks=True)
        for name, text in files.items():
            (home / name).parent.mkdir(exist_ok=True)
            (home / name).write_text(text)
            (home / name).chmod(0o600)
        subprocess.run(["chown", "-R", "1000:1000", str(home)], check=True)

    def check_out(self, files: Mapping[str, str]) -> None:
        """Give the laptop a checkout with the user's versions of ``files``, and a search space that takes seconds."""
        project = self.home(self.laptop) / PROJECT.name
        for folder in ("raytrain", "search_spaces"):
            shutil.copytree(ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__"))
        packages = installed((ROOT / "cluster-requirements.txt").read_text())
        for name, text in {"search_spaces/quick.py": SPACE, "cluster-requirements.txt": packages, **files}.items():
            (project / name).parent.mkdir(exist_ok=True, parents=True)
            (project / name).write_text(text)
        subprocess.run(["chown", "-R", "1000:1000", str(project)], check=True)

    # ------------------------------------------------------------------------------------------ commands

    def start(self, host: Host, line: str, **options: Any) -> subprocess.Popen[str]:
        """Start a line of bash as ``USER``, on the laptop in the checkout, with nothing but a user's variables."""
        variables = {
            "HOME": str(HOME), "PATH": f"{HOME}/venv/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin", "TERM": "dumb",
            "LANG": "C.UTF-8", **self._variables,
        }  # fmt: skip
        location = PROJECT if host is self.laptop else HOME
        user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
        command = host.command(*user, "bash", "-c", f"cd {location} && {line}", folder=Path("/"))
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
        said = done.stdout if len(done.stdout) < 8000 else f"{done.stdout[:4000]}\n...\n{done.stdout[-4000:]}"
        assert done.returncode == 0, f"{line}: status {done.returncode}\n{said}"
        return done.stdout

    # --------------------------------------------------------------------------------------------- ports

    def listening(self, host: Host) -> list[tuple[str, str, int]]:
        """(command line, address, port) of all that listens on ``host``."""
        done = subprocess.run(
            host.command(sys.executable, "-c", _LISTENING), capture_output=True, text=True, check=True
        )
        return [(line, address, port) for line, address, port in json.loads(done.stdout)]

    def answering(self, address: str, ports: list[int], source: Host | None = None) -> list[int]:
        """Those of ``ports`` at ``address`` that take a connection from ``source``, by default the laptop."""
        command = (source or self.laptop).command(sys.executable, "-c", _ANSWERS, address, folder=Path("/"))
        done = subprocess.run(command, input=json.dumps(ports), capture_output=True, text=True, check=True)
        return [int(port) for port in json.loads(done.stdout)]


def make_environment(folder: Path) -> None:
    """A virtual environment with the packages of this one, that can be copied to ``~/venv``."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    ray = folder / "bin" / "ray"
    ray.write_text(_RAY)
    ray.chmod(0o755)


def installed(requirements: str) -> str:
    """The same packages in the versions that are here: pip finds each of them."""
    names = [line.partition("==")[0] for line in requirements.splitlines() if "==" in line]
    return "".join(f"{name}=={version(name)}\n" for name in names)


def changed(text: str, changes: Mapping[str, str]) -> str:
    """``text`` with each of ``changes`` made wherever it is to be made, which must be somewhere."""
    for old, new in changes.items():
        assert old in text, old
        text = text.replace(old, new)
    return text
