"""Rules for every cluster file: placeholders, secrets, shipped files, the token, the idle time."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from raytrain.cluster.check.file import ClusterFile, at
from raytrain.cluster.check.secrets import secret_mistakes
from raytrain.utils.files import expanded

PLACEHOLDER = "CHANGE-ME"
TOKEN = "~/.ray/auth_token"
"""Path at which Ray looks for the token, on every machine."""


def common_mistakes(file: ClusterFile, secrets: Mapping[str, str]) -> Iterator[str]:
    """Yield the mistakes that any cluster file may have.

    Args:
        file: the cluster file.
        secrets: secrets of the provider: name -> pattern.
    """
    yield from _placeholders(file.config, "")
    yield from secret_mistakes(file, secrets)
    yield from _docker(file)
    yield from _shipped(file)
    yield from _token(file)
    key = at(file.config, "auth", "ssh_private_key")
    if key is not None and not os.path.isfile(expanded(key)):
        yield f"auth.ssh_private_key: there is no {key} here; correct it; on AWS, Ray makes a pair if it is left out"
    idle = file.config.get("idle_timeout_minutes", 5)
    if not idle > 0:
        yield f"idle_timeout_minutes: {idle} ends workers between two trials; give minutes above 0, such as 5"


def _placeholders(value: Any, location: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _placeholders(inner, f"{location}.{name}" if location else str(name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _placeholders(inner, f"{location}[{number}]")
    elif PLACEHOLDER in str(value):
        yield f"{location}: {PLACEHOLDER} is still there; replace it by your own value"


def _docker(file: ClusterFile) -> Iterator[str]:
    """Yield a mistake for each image: no command here says what Python, Ray and CUDA are in it."""
    sections = {"docker": file.config.get("docker")}
    sections |= {f"available_node_types.{name}.docker": kind.get("docker") for name, kind in file.types.items()}
    for location, section in sections.items():
        for name in ("image", "head_image", "worker_image"):
            if image := at(section, name):
                yield (
                    f"{location}.{name}: the nodes would run in {image}, whose Python and Ray are not looked at here; "
                    "take the section out: setup_commands installs exact versions on the machines themselves"
                )


def _shipped(file: ClusterFile) -> Iterator[str]:
    for remote, local in file.mounts.items():
        if not os.path.exists(expanded(local)):
            fix = (
                "ray get-auth-token --generate > /dev/null makes it"
                if remote == TOKEN
                else "correct it, or run this where it is"
            )
            yield f"file_mounts.{remote}: there is no {local} here; {fix}"
    for module in ("raytrain", "search_spaces"):
        if not any(Path(remote).name == module for remote in file.mounts):
            yield f"file_mounts: {module} is not shipped; add ~/project/{module}: {module}"


def _token(file: ClusterFile) -> Iterator[str]:
    commands = "\n".join(file.commands("setup_commands", "head_setup_commands", "worker_setup_commands"))
    modes = re.findall(r"RAY_AUTH_MODE=(\w+)", file.text)
    if "RAY_AUTH_MODE=token" not in commands or set(modes) != {"token"}:
        yield (
            "setup_commands: without RAY_AUTH_MODE=token anyone who reaches a port of Ray can run code; "
            "export it on every node, and no other mode"
        )
    if file.mounts.get(TOKEN) is None:
        yield f"file_mounts: Ray's token reaches no node; add {TOKEN}: {TOKEN}"
    elif os.path.isfile(token := expanded(file.mounts[TOKEN])) and stat.S_IMODE(token.stat().st_mode) & 0o077:
        yield f"file_mounts.{TOKEN}: others on this machine can read {token}; chmod 600 it"
