"""Rules for the commands of the nodes: versions, storage, Ray, MLflow, the spot watcher."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from raytrain.cluster.check.common import PLACEHOLDER
from raytrain.cluster.check.file import ClusterFile

PINNED = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([A-Za-z0-9.!+_-]+)")
INDEX_OPTIONS = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--trusted-host")
"""Options of pip whose values are no requirements."""
EVERYWHERE = ("setup_commands", "head_setup_commands", "worker_setup_commands")


def command_mistakes(file: ClusterFile, spot_types: list[str]) -> Iterator[str]:
    """Yield the mistakes in the commands; ``spot_types`` are node types that the provider may take away."""
    yield from _versions(file)
    yield from _storage(file)
    yield from _ray(file)
    yield from _mlflow(file)
    spot = [name for name in file.workers if name in spot_types]
    if spot and not any("raytrain.spot" in command for command in file.commands("worker_start_ray_commands")):
        yield (
            f"worker_start_ray_commands: nothing tells Ray that a spot node of {spot[0]} will be taken away; "
            "add python -m raytrain.spot after ray start, as docs/reliability.md says"
        )


# ----------------------------------------------------------------------------------------- versions


def _versions(file: ClusterFile) -> Iterator[str]:
    if not file.commands("setup_commands"):
        yield "setup_commands: there are none, and Ray would install a nightly build of its own; pin all versions"
        return
    mistakes: list[str] = []
    head = _pins(file, file.commands("setup_commands", "head_setup_commands"), mistakes)
    kinds = {"workers": file.commands("setup_commands", "worker_setup_commands")}
    for name, kind in file.workers.items():
        if kind.get("worker_setup_commands"):
            kinds[name] = kind["worker_setup_commands"]  # Ray runs these instead
    for name, commands in kinds.items():
        theirs = _pins(file, commands, mistakes)
        for package in sorted(head.keys() | theirs.keys()):
            if head.get(package) != theirs.get(package):
                mistakes.append(
                    f"setup_commands: {package} is {head.get(package, 'missing')} on the head but "
                    f"{theirs.get(package, 'missing')} on {name}; install the same on every node"
                )
    yield from dict.fromkeys(mistakes)
    try:
        here = version("ray")
    except PackageNotFoundError:
        here = ""
    if not mistakes and head.get("ray") != here:
        yield (
            f"setup_commands: the nodes get Ray {head.get('ray', 'of no stated version')}, but ray up would run with "
            f"{here} here; pin the same version"
        )


def _pins(file: ClusterFile, commands: list[str], mistakes: list[str]) -> dict[str, str]:
    """Return package -> version of all that ``commands`` install, and of Python; add inexact ones to ``mistakes``."""
    pins = {}
    for command in commands:
        for python in re.findall(r"python(3\.\d+)(?:\s+-m\s+venv|-venv)", command):
            pins["python"] = python
        for words in re.findall(r"\bpip3? install\s+([^;&|)]*)", command):
            for requirement in _requirements(file, words, mistakes):
                if (match := PINNED.fullmatch(requirement)) is not None:
                    pins[match[1].lower().replace("_", "-")] = match[2]
                else:
                    shown = _without_user(requirement)
                    mistakes.append(f"setup_commands: {shown} has no exact version; write {shown}==VERSION")
    return pins


def _requirements(file: ClusterFile, words: str, mistakes: list[str]) -> list[str]:
    """Return the requirements in the arguments of a ``pip install``, those of its requirement files included."""
    try:
        arguments = iter(shlex.split(words))
    except ValueError as error:
        mistakes.append(f"setup_commands: pip install {words[:60]}: {error}; correct the quotes")
        return []
    found: list[str] = []
    for argument in arguments:
        if argument in ("-r", "--requirement"):
            remote = next(arguments, "")
            local = file.local_path(remote)
            if local is None or not os.path.isfile(local):
                mistakes.append(f"setup_commands: {remote} is not shipped by file_mounts; add it there")
                continue
            lines = (line.partition("#")[0].strip() for line in local.read_text(errors="replace").splitlines())
            found += [line for line in lines if line]
        elif argument in INDEX_OPTIONS:
            next(arguments, "")
        elif not argument.startswith(("-", ".", "/", "~")):
            found.append(argument)
    return found


def _without_user(address: str) -> str:
    """Return an address without what may be a password in it."""
    return re.sub(r"://\S*@", "://...@", address)


# ------------------------------------------------------------------------------------------ services


def _storage(file: ClusterFile) -> Iterator[str]:
    found = re.findall(r"RAYTRAIN_STORAGE=(\S+)", "\n".join(file.commands(*EVERYWHERE)))
    if not found:
        yield "setup_commands: RAYTRAIN_STORAGE is not set, so nothing would outlive the nodes; export s3://BUCKET/PREFIX"
    for uri in (uri.strip("'\"") for uri in found):
        if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w./-]*)?", uri) and PLACEHOLDER not in uri:
            yield (
                f"setup_commands: RAYTRAIN_STORAGE={_without_user(uri)} is not a bucket that all nodes reach; "
                "write s3://BUCKET/PREFIX"
            )


def _ray(file: ClusterFile) -> Iterator[str]:
    heads = [command for command in file.commands("head_start_ray_commands") if "ray start" in command]
    if not heads or "--head" not in heads[0]:
        yield "head_start_ray_commands: no ray start --head, and Ray's default opens the dashboard to all; write one"
        return
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in heads[0]:
        yield "head_start_ray_commands: no worker would start; add --autoscaling-config=~/ray_bootstrap_config.yaml"
    for host in re.findall(r"--dashboard-host[= ]+(\S+)", heads[0]):
        if not is_private(host):
            yield f"head_start_ray_commands: --dashboard-host={host} is open to others; use 127.0.0.1 and ray dashboard"
    workers = [command for command in file.commands("worker_start_ray_commands") if "ray start" in command]
    port = (re.findall(r"--port[= ](\d+)", heads[0]) or ["6379"])[0]
    if not workers or f"$RAY_HEAD_IP:{port}" not in workers[0]:
        yield f"worker_start_ray_commands: no worker would find the head; add ray start --address=$RAY_HEAD_IP:{port}"


def _mlflow(file: ClusterFile) -> Iterator[str]:
    addresses = re.findall(r"MLFLOW_TRACKING_URI=['\"]?(\S*)", "\n".join(file.commands(*EVERYWHERE)))
    if not addresses or not all(address.startswith(("http://", "https://", "$")) for address in addresses):
        yield "setup_commands: MLFLOW_TRACKING_URI is not set to http://..., and nodes cannot share a file; export it"
        return
    for command in file.commands("head_start_ray_commands"):
        if "raytrain.tracking serve" not in command and "mlflow server" not in command:
            continue
        for host in re.findall(r"(?:--host|-h)[= ]+(\S+)", command):
            if not is_private(host):
                yield (
                    f"head_start_ray_commands: MLflow asks no one for a password, and --host {host} lets everyone in; "
                    "give the head's private address"
                )
        if "mlflow server" in command and ("--backend-store-uri" not in command or "sqlite:" in command):
            yield (
                "head_start_ray_commands: MLflow's database would end with the head; "
                "use python -m raytrain.tracking serve, or a PostgreSQL server"
            )


def is_private(host: str) -> bool:
    """Return whether ``host`` is an address of one private network; a shell variable counts as one."""
    host = host.strip("'\"")
    if host.startswith("$") or host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_private and not address.is_unspecified
