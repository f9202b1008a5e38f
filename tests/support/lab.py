"""Hosts on one machine: each has its own network card, processes, ``/run`` and shared memory, and no way out.

Everything lives in namespaces nested in that of one process (``enclosed``): when that dies, all is gone. Hosts that
are reached by ssh have ``/tmp``, ``/root``, ``/home`` and a user of their own too.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support import s3_server
from tests.support.postgres_server import REQUIRE_ALL

NETWORK, OUTSIDE = "10.77.0", "10.78.0"
"""How addresses of the hosts begin, and those of hosts in another network."""
GATEWAY = f"{NETWORK}.1"
"""Address of the machine between the two, where the servers are."""
HERE = Path("/run/host")
"""On every host the same path of a disk of its own."""
USER = "ubuntu"
"""Who may log in, with the home /home/ubuntu."""
SSH_TOOLS = {"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "nft": "nftables"}
"""What a lab with ssh needs, and Debian's packages of it."""
DISK = "192m"
_INSIDE = "RAYTRAIN_LAB"
_NOBODY = "02:00:00:00:00:99"
"""A card that is nowhere: what is sent to it is lost without a word."""
_SPACES = ["--net", "--pid", "--mount", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc"]
_LAB = """
mount --make-rprivate /
mount -t tmpfs -o size=16m run /run
ip link set lo up
ip link add br0 address 02:00:00:00:00:01 type bridge
ip addr add {gateway}/24 dev br0
ip link set br0 up
ip route add unreachable default
{command}
"""
_HOST = """
mount --make-rprivate /
mount -t tmpfs -o size=16m run /run
mkdir {here} && mount -t tmpfs -o size={disk} host {here} && mkdir {here}/tmp {here}/home {here}/ray
mount -t tmpfs -o size={shm} shm /dev/shm
printf '{names}' > {here}/hosts && mount --bind {here}/hosts /etc/hosts
touch {here}/resolv && mount --bind {here}/resolv /etc/resolv.conf
hostname {name}
{login}
ip link set lo up
touch {here}/made
until ip link show dev eth0 > /dev/null 2>&1; do sleep 0.05; done
ip addr add {address}/{prefix} dev eth0
ip link set eth0 up
ip route add default via {gateway} src {address}
touch {here}/ready
while :; do sleep 3600 & wait $!; done
"""
_LOGIN = """
mkdir {here}/seen {here}/etc
for place in {seen}; do mkdir -p {here}/seen$place && mount --rbind $place {here}/seen$place; done
chmod 1777 {here}/tmp && mount --bind {here}/tmp /tmp
mount -t tmpfs -o size=16m,mode=755 root /root
mount --bind {here}/home /home
for place in {seen}; do mkdir -p $place && mount --rbind {here}/seen$place $place; done
{{ echo '{user}:x:1000:1000::/home/{user}:/bin/bash'; cat /etc/passwd; }} > {here}/etc/passwd
{{ echo '{user}:x:1000:'; cat /etc/group; }} > {here}/etc/group
{{ echo '{user}:*:19000:0:99999:7:::'; cat /etc/shadow; }} > {here}/etc/shadow
for file in passwd group shadow; do mount --bind {here}/etc/$file /etc/$file; done
cp -r /etc/skel /home/{user} && mkdir -m 700 /home/{user}/.ssh && echo '{key}' > /home/{user}/.ssh/authorized_keys
chown -R 1000:1000 /home/{user}
ssh-keygen -q -t ed25519 -N '' -f {here}/etc/hostkey
mkdir /run/sshd && `command -v sshd` -f /dev/null -h {here}/etc/hostkey -E {here}/sshd.log -o PidFile=none \
  -o UsePAM=no -o UseDNS=no -o PasswordAuthentication=no -o MaxStartups=50
"""
"""Beside what a host is anyway: what it does not see is empty and its own; the first entry for a name counts."""


def why_not(ssh: bool = False) -> str | None:
    """What keeps this machine from having a lab, with ``ssh`` if asked for, or ``None``."""
    tools = {"unshare": "util-linux", "nsenter": "util-linux", "mount": "mount", "ip": "iproute2"}
    tools |= SSH_TOOLS if ssh else {}
    missing = {tool: package for tool, package in tools.items() if not shutil.which(tool)}
    if missing:
        return f"{', '.join(missing)} not installed (Debian: {', '.join(sorted(set(missing.values())))})"
    if ssh and os.geteuid() != 0:
        return "only root can make hosts with users of their own"
    tried = subprocess.run([*_unshare(), "ip", "link", "add", "br0", "type", "bridge"], capture_output=True, text=True)
    return tried.stderr.strip() or "namespaces cannot be made" if tried.returncode else None


def needed(ssh: bool = False) -> None:
    """Skip the test where there can be no lab, and fail it where no test may be skipped."""
    if (reason := why_not(ssh)) is not None:
        if os.environ.get(REQUIRE_ALL):
            pytest.fail(f"no lab: {reason}")
        pytest.skip(f"no lab: {reason}")


def enclosed() -> bool:
    """Whether this process is in a lab."""
    return _INSIDE in os.environ


def enclose(*command: str) -> int:
    """Run ``command`` of this interpreter inside a new lab; returns its exit status."""
    s3_server.interpreter()  # inside there is no registry to install it from
    line = shlex.join([sys.executable, *command])
    # bash stays process 1: it takes care of those whose parent dies
    script = _LAB.format(gateway=GATEWAY, command=f"{line}\nexit $?")
    lab = subprocess.Popen([*_unshare(), "bash", "-euc", script], env={**os.environ, _INSIDE: "1"})
    try:
        return lab.wait()
    except BaseException:
        lab.kill()  # --kill-child: and with it all that is inside
        lab.wait()
        raise


def _unshare() -> list[str]:
    return ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), *_SPACES]


@dataclass
class Host:
    """One machine of the lab."""

    name: str
    address: str
    pid: int
    """Of its process 1, as the lab sees it."""

    @property
    def disk(self) -> Path:
        """Its disk, as the lab reaches it."""
        return Path(f"/proc/{self.pid}/root{HERE}")

    def command(self, *arguments: str, folder: Path | None = None) -> list[str]:
        """What runs ``arguments`` on the host, in ``folder``."""
        location = f"--wd={folder or Path.cwd()}"
        return ["nsenter", "-t", str(self.pid), "-n", "-p", "-m", "-u", "-i", location, "--", *arguments]

    def processes(self, sign: str = "") -> list[psutil.Process]:
        """Its processes but for the first and its sleep, those with ``sign`` in their command line, oldest first."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                line = " ".join(process.cmdline())
                mine = os.readlink(f"/proc/{process.pid}/ns/pid") == space and process.pid != self.pid
                if mine and sign in line and line and line != "sleep 3600":
                    found.append(process)
        return sorted(found, key=lambda process: process.create_time())

    def kill_all(self) -> None:
        """End all that runs on it at once, as when its power fails; the disk and the network card stay."""
        while processes := self.processes():
            for process in processes:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            psutil.wait_procs(processes, timeout=1)


class Lab:
    """The hosts and the wires between them."""

    def __init__(
        self,
        names: Sequence[str],
        outside: Sequence[str] = (),
        key: str = "",
        seen: Sequence[Path] | None = None,
    ) -> None:
        """``outside``: hosts in the other network, which the gateway leads to.

        ``seen``: gives each host a user and an sshd, and all that it sees of ``/tmp``, ``/root`` and ``/home`` but for
        its own. ``key``: the public key with which ``USER`` logs in.
        """
        self._seen = seen
        self._outer: dict[str, subprocess.Popen[bytes]] = {}
        self.hosts: dict[str, Host] = {}
        if outside:
            _ip("link", "add", "br1", "address", "02:00:00:00:00:02", "type", "bridge")
            _ip("addr", "add", f"{OUTSIDE}.1/24", "dev", "br1")
            _ip("link", "set", "br1", "up")
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
        addresses = {name: f"{NETWORK}.{11 + number}" for number, name in enumerate(names)}
        addresses |= {name: f"{OUTSIDE}.{11 + number}" for number, name in enumerate(outside)}
        for name, address in addresses.items():
            self.start(name, f"{address}/24", f"{address.rpartition('.')[0]}.1", key, addresses)

    def start(
        self,
        name: str,
        address: str,
        gateway: str,
        key: str = "",
        known: Mapping[str, str] | None = None,
        furnish: Callable[[Host], None] = lambda host: None,
    ) -> Host:
        """Add a host at ``address``, given with the length of its network's prefix, and return when it is up.

        ``known``: other hosts that it knows by name. ``furnish`` is called before anybody can reach the host.
        """
        address, prefix = address.split("/")
        # its own name as Debian writes it down: an address at which no other host finds it
        names = {"localhost": "127.0.0.1", **(known or {}), name: "127.0.1.1"}
        login = "" if self._seen is None else _LOGIN.format(
            here=HERE, user=USER, key=key, seen=shlex.join(map(str, self._seen))
        )  # fmt: skip
        script = _HOST.format(
            here=HERE, disk=DISK, name=name, address=address, prefix=prefix, gateway=gateway, login=login,
            names="".join(f"{location} {host}\\n" for host, location in names.items()), shm="50%" if login else "256m",
        )  # fmt: skip
        outer = subprocess.Popen(["unshare", *_SPACES, "bash", "-euc", script], start_new_session=True)
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        wait_until(lambda: bool(children.read_text().strip()), 10, f"processes of host {name}")
        host = Host(name, address, int(children.read_text()))
        mine = os.readlink("/proc/self/ns/net")
        wait_until(lambda: os.readlink(f"/proc/{host.pid}/ns/net") != mine, 10, f"a network of host {name}")
        wait_until((host.disk / "made").exists, 20, f"files of host {name}")
        furnish(host)
        _ip("link", "add", f"v-{name}", "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        _ip("link", "set", f"v-{name}", "master", "br1" if address.startswith(f"{OUTSIDE}.") else "br0", "up")
        wait_until((host.disk / "ready").exists, 20, f"host {name}")
        self.hosts[name], self._outer[name] = host, outer
        return host

    def stop(self, host: Host) -> None:
        """Take a host away at once: nobody who spoke with it hears of that."""
        _ip("link", "del", f"v-{host.name}")
        del self.hosts[host.name]
        outer = self._outer.pop(host.name)
        outer.kill()  # --kill-child: and with it all that is inside
        outer.wait()
        wait_until(lambda: not psutil.pid_exists(host.pid), 30, f"end of host {host.name}")

    def unplug(self, host: Host) -> None:
        """Pull its cable: what is sent to or from it is lost."""
        _ip("link", "set", f"v-{host.name}", "nomaster")

    def plug(self, host: Host) -> None:
        _ip("link", "set", f"v-{host.name}", "master", "br0")

    def cut(self, one: Host, other: Host) -> None:
        """Lose all that the two send to each other; each reaches everybody else."""
        for here, there in ((one, other), (other, one)):
            permanent = ["lladdr", _NOBODY, "nud", "permanent", "dev", "eth0"]
            subprocess.run(here.command("ip", "neigh", "replace", there.address, *permanent), check=True)

    def join(self, one: Host, other: Host) -> None:
        """Undo ``cut``, if it was done."""
        for here, there in ((one, other), (other, one)):
            subprocess.run(here.command("ip", "neigh", "flush", "nud", "permanent", "to", there.address), check=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Return when ``condition()`` holds.

    Raises:
        TimeoutError: it does not within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:.0f} s still no {what}")
        time.sleep(0.1)
