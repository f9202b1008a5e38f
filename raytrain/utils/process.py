"""This process and others of the machine: whose it is, and whether a recorded one is still alive."""

from __future__ import annotations

import getpass
import os
import secrets
from pathlib import Path


def user_name() -> str:
    """Return the name of the user, or the user id if there is no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        return str(os.getuid())


def visible_processes() -> str:
    """Return a key that is equal for processes that can see each other: the machine's boot and the pid namespace.

    If these cannot be read, the key differs for every call.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return secrets.token_hex(8)


def started(pid: int) -> str:
    """Return when a process began, in ticks since the boot; empty if it has ended, or cannot be inspected."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def is_alive(pid: int, start: str) -> bool:
    """Return whether the process that began at ``start`` is still alive, and not another process with its number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # it belongs to another user
        pass
    # if other users' processes are hidden, there is no such folder
    return not Path(f"/proc/{pid}").exists() or started(pid) == start
