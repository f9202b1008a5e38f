"""Environment variables set in this process for Ray, gloo and the import of libraries, each with the reason.

Other modules write none, except those that MLflow's client reads (``tracking/client.py``), ``RAYTRAIN_PLUGINS``
(``config/plugins.py``) and ``COLUMNS`` of a terminal too narrow to draw for (``utils/output.py``).
"""

from __future__ import annotations

import os
import tempfile

from raytrain.utils.errors import UserError
from raytrain.utils.files import private_folder

TUNE_THREAD_TIMEOUT_S = "600"
"""Time that a stopped trial has to upload its last checkpoint before the next one begins in its process."""


def set_up_imports() -> None:
    """Set what libraries read when they are imported; ``import raytrain`` calls this before any of them can be."""
    # MLflow reports its use to its makers otherwise, and writes an identity for that into the home folder
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # learning pieces of text would take threads, of which processes that are forked later have none
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Ray advises older programs to switch this off, and then has none of the worker groups of this package
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    if os.path.expanduser("~") == "~":
        # as in a container whose user is in no password file: MLflow cannot be imported there, and Ray has no place
        # for its token
        os.environ["HOME"] = _made_up_home()


def _made_up_home() -> str:
    """Return the user's own folder among the temporary files, or a new one where somebody else has its name."""
    try:
        return str(private_folder())
    except (UserError, OSError):
        return tempfile.mkdtemp(prefix="raytrain-home-")


def set_up_join() -> None:
    """Set what must be set before Ray is joined."""
    # Ray Train's watcher is a process for each worker group; workers ask themselves whether their node is draining
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def set_up_search() -> None:
    """Set what Ray Tune reads in the driver of a search."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own output; the user sees the live table instead
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would end the search as if it had run to its end
    # a trial that ends before its first evaluation would end the whole search; and the score that ASHA compares is
    # made by the scheduler, not by the trial
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    # nothing is read from the files that Tune writes about a search, and a full disk under them would end it
    os.environ["TUNE_GLOBAL_CHECKPOINT_S"] = "inf"
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"


def set_up_trial() -> None:
    """Set what Ray Tune reads in the process of a trial."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = TUNE_THREAD_TIMEOUT_S


def set_up_worker_group(gcs_address: str, start_timeout_s: str) -> None:
    """Set what Ray Train reads where a worker group is started.

    Args:
        gcs_address: the cluster that this process has joined.
        start_timeout_s: longest that the group waits for its resources.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # how often workers are checked to be alive
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", start_timeout_s)
    # Ray's cleaner of placement groups asks "the" cluster of its host which nodes are alive; with two clusters on one
    # host it gives up, unless it is told which one is its own
    os.environ["RAY_ADDRESS"] = gcs_address


def set_up_network(interface: str) -> None:
    """Name the network interface of a worker to gloo and NCCL, unless the user has."""
    # by itself gloo may take the loopback interface, and NCCL any of several: then workers on two hosts never meet
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, interface)
