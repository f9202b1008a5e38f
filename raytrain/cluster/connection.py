"""Joining a Ray cluster: which one, whether it answers, and the environment passed to its processes."""

from __future__ import annotations

import os
import re

import grpc
import ray
from ray.exceptions import RayError

from raytrain.cluster.environment import set_up_join
from raytrain.cluster.ray_internals import CHECK_ALIVE, find_bootstrap_address
from raytrain.config.plugins import plugin_environment
from raytrain.storage import storage_environment
from raytrain.utils.errors import UserError

ANSWER_S = 10.0
"""How long a cluster has to answer; Ray itself would retry for a quarter of an hour."""
_HOST_AND_PORT = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^\s:/]+):(\d{1,5})")


def connect(address: str | None) -> None:
    """Join the Ray cluster at ``address``; if None, the one that Ray finds, or a new one on this machine.

    Raises:
        UserError: no cluster answers within ``ANSWER_S``, it cannot be joined, or none can be started here.
    """
    found, source = find_cluster(address)
    if found is not None:
        check_answers(found, source)
    settings = storage_environment() | plugin_environment()
    settings |= {name: os.environ[name] for name in ("RAYTRAIN_CPU_LSTM", "RAYTRAIN_CACHE_BYTES") if name in os.environ}
    set_up_join()
    try:
        ray.init(
            address=address,
            dashboard_host="127.0.0.1",
            include_dashboard=True if found is None and address != "auto" else None,
            # endpoint, region and RAYTRAIN_ variables reach every node this way; keys never do
            runtime_env={"env_vars": settings} if settings else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, RayError, RuntimeError, ValueError) as error:
        what = f"the Ray cluster at {found} ({source}) cannot be joined" if found else "Ray cannot be started here"
        at_home = isinstance(error, OSError) and str(error.filename).startswith(os.path.expanduser("~"))
        advice = "; set HOME to a folder that can be written: Ray keeps its token there" if at_home else ""
        raise UserError(f"{what}: {error}{advice}") from None


def find_cluster(address: str | None) -> tuple[str | None, str]:
    """Return the cluster that Ray would join for ``address``, as HOST:PORT, and the setting that names it.

    The address is None if Ray would start a cluster, or look for one among this machine's processes.
    """
    found: str | None
    if address not in (None, "auto"):
        found, source = address, "--address"
    elif found := os.environ.get("RAY_ADDRESS"):
        source = "RAY_ADDRESS"
    else:
        found, source = find_bootstrap_address(None), "the last one that `ray start` began here"
    return (None if found in ("", "auto", "local") else found), source


def check_answers(address: str, source: str) -> None:
    """Make sure that a Ray cluster answers at ``address``; ``source`` is the setting that names it.

    Raises:
        UserError: it is not HOST:PORT, or no cluster answers there within ``ANSWER_S``.
    """
    if address.startswith("ray://"):
        raise UserError(
            f"{source} is {address}, an address for Ray Client, over which no search or run can be followed: run the "
            "command on a machine of the cluster (ray exec, ray job submit), with HOST:6379 or no address"
        )
    match = _HOST_AND_PORT.fullmatch(address)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise UserError(f"{source} is {address!r}: write HOST:PORT, as `ray start` prints it, or local")
    if problem := _ask(address):
        stated = source in ("--address", "RAY_ADDRESS")
        advice = f"correct {source}" if stated else "`ray stop` forgets it, and --address local starts another"
        raise UserError(f"no Ray cluster answers at {address} ({source}): {problem}; {advice}")


def _ask(address: str) -> str:
    """Ask a cluster's GCS whether it is alive; return why there is none, or an empty text if it answers."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return ""  # only Ray has the certificates
    # like Ray, without the proxy of the environment
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(CHECK_ALIVE)(b"", timeout=ANSWER_S)
        except grpc.RpcError as error:
            match error.code():
                case grpc.StatusCode.DEADLINE_EXCEEDED:
                    return f"no answer in {ANSWER_S:g} s"
                case grpc.StatusCode.UNAVAILABLE if "HTTP/2" not in str(error.details()):
                    return str(error.details()).rpartition(": ")[2].rstrip("]")
                case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.UNIMPLEMENTED:
                    return "what listens there is something else"
    return ""  # also if it asks for a token, which Ray has
