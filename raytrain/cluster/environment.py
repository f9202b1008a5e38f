"""Environment variables set in this process for Ray, gloo and library imports, with the reason for each.

Other modules set none, except those read by MLflow's client (``tracking/client.py``), ``RAYTRAIN_PLUGINS``
(``config/plugins.py``), and ``COLUMNS`` if a terminal is too narrow to draw for (``utils/output.py``).
"""

from __future__ import annotations

import os
import tempfile

from raytrain.utils.errors import UserError
from raytrain.utils.files import private_folder

TUNE_THREAD_TIMEOUT_S = "600"
"""Seconds that a stopped trial has to upload its last checkpoint before the next one starts in its process."""


def set_up_imports() -> None:
    """Set the variables that libraries read on import; ``import raytrain`` calls this before it can import any."""
    # otherwise MLflow reports its usage to its developers, and writes an id for that into the home folder
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # learning pieces of text would start threads, which processes forked later do not have
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Ray advises older programs to switch this off, but then it has none of the worker groups that this package uses
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    if os.path.expanduser("~") == "~":
        # for example in a container whose user is not in the password file: MLflow cannot be imported there, and Ray
        # has no place for its token
        os.environ["HOME"] = _made_up_home()


def _made_up_home() -> str:
    """Return the user's own folder among the temporary files, or a new one if somebody else has taken its name."""
    try:
        return str(private_folder())
    except (UserError, OSError):
        return tempfile.mkdtemp(prefix="raytrain-home-")


def set_up_join() -> None:
    """Set the variables needed before joining Ray."""
    # Ray Train's watcher would be a process per worker group; instead workers check whether their node is draining
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def set_up_search() -> None:
    """Set the variables that Ray Tune reads in the driver of a search."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own output; the user sees the live table instead
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the handler would end the search as if it were complete
    # otherwise a trial that ends before its first evaluation would end the whole search; and the scheduler, not the
    # trial, computes the score that ASHA compares
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # nothing reads the files that Tune writes about a search, and a full disk would end it
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"


def set_up_trial() -> None:
    """Set the variables that Ray Tune reads in the process of a trial."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = TUNE_THREAD_TIMEOUT_S


def set_up_worker_group(gcs_address: str, start_timeout_s: str) -> None:
    """Set the variables that Ray Train reads where a worker group is started.

    Args:
        gcs_address: the cluster that this process has joined.
        start_timeout_s: longest time that the group waits for its resources.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how often workers are checked for liveness
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", start_timeout_s)
    # Ray's cleaner of placement groups asks "the" cluster of its host which nodes are alive; with two clusters on one
    # host it gives up, unless it is told which is its own
    os.environ["RAY_ADDRESS"] = gcs_address


def set_up_network(interface: str) -> None:
    """Tell gloo and NCCL which network interface of a worker to use, unless the user has."""
    # by default gloo may choose the loopback interface, and NCCL any of several: then workers on two hosts never meet
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
