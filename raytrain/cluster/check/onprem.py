"""Rules for on-premises machines: ``provider.type: local``."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterator

from raytrain.cluster.check.common import PLACEHOLDER
from raytrain.cluster.check.file import TEXT, ClusterFile, at
from raytrain.cluster.check.provider import Provider


def onprem_mistakes(file: ClusterFile) -> Iterator[str]:
    """Yield the mistakes in the list of machines and in how they are reached."""
    head, workers = at(file.config, "provider", "head_ip"), at(file.config, "provider", "worker_ips")
    if not head or not workers:
        yield "provider: head_ip and worker_ips are needed; write the machines' private addresses"
        return
    if not re.fullmatch(r"[\d.]+|[\da-fA-F:]+", str(head)) and PLACEHOLDER not in str(head):
        yield f"provider.head_ip: {head} is a name, and MLflow listens on an address; write the machine's, in digits"
    for address, count in Counter([str(head), *map(str, workers)]).items():
        if count > 1:
            yield f"provider: {address} is named {count} times; each machine is one node"
        try:
            public = not ipaddress.ip_address(address).is_private
        except ValueError:
            public = False  # a host name
        if public:
            yield f"provider: {address} is a public address, and Ray listens on it; write the private one"
    least, most = file.config.get("min_workers", len(workers)), file.config.get("max_workers", len(workers))
    if not 0 <= least <= most:
        yield f"min_workers: {least} is below 0 or more than max_workers, {most}; correct one of them"
    if most != len(workers):
        yield f"max_workers: {most}, but there are {len(workers)} worker_ips; write {len(workers)}"
    if file.types:
        yield "available_node_types: Ray refuses them with provider local; take them out"
    for named in re.findall(r"\bHEAD_IP=([^\s'\";]+)", "\n".join(file.commands("setup_commands"))):
        if named != head:
            yield f"setup_commands: HEAD_IP={named}, but provider.head_ip is {head}; write the same"
    if not at(file.config, "auth", "ssh_user"):
        yield "auth.ssh_user: missing; write the user that ssh logs in as on every machine"


def onprem_summary(file: ClusterFile) -> str:
    """Describe the machines that the file starts Ray on, and how to start it."""
    workers = at(file.config, "provider", "worker_ips")
    return (
        f"{file.path}: no mistake found. A head and at most {len(workers)} workers.\n"
        f"start it: RAY_UP_enable_autoscaler_v2=0 ray up {file.path}"
    )


PROVIDER = Provider(
    mistakes=onprem_mistakes,
    summary=onprem_summary,
    spot_types=lambda file: [],
    schema={"properties": {"provider": {"properties": {"worker_ips": {"items": TEXT}}}}},
    ignored=("min_workers",),
)
