"""All rules together, and what a file without mistakes amounts to."""

from __future__ import annotations

from raytrain.cluster.check.aws import aws_mistakes
from raytrain.cluster.check.commands import command_mistakes
from raytrain.cluster.check.common import common_mistakes
from raytrain.cluster.check.file import ClusterFile, at, schema_mistakes
from raytrain.cluster.check.onprem import onprem_mistakes

PROVIDERS = {"aws": aws_mistakes, "local": onprem_mistakes}


def check(file: ClusterFile) -> list[str]:
    """The mistakes in ``file``, a line each: the field, what is wrong, how to fix it.

    Where Ray's schema refuses the file, its mistakes are the only ones: the rest could not be read reliably.
    """
    if mistakes := list(schema_mistakes(file)):
        return mistakes
    rules = PROVIDERS.get(file.provider)
    if rules is None:
        return [f"provider.type: {file.provider!r} is not known here; use aws or local, or a cluster that runs already"]
    return [*common_mistakes(file), *rules(file), *command_mistakes(file)]


def summary(file: ClusterFile) -> str:
    """What the file amounts to at most, and how to start it."""
    if file.provider == "local":
        workers = at(file.config, "provider", "worker_ips")
        return (
            f"{file.path}: no mistake found. A head and at most {len(workers)} workers.\n"
            f"start it: RAY_UP_enable_autoscaler_v2=0 ray up {file.path}"
        )
    lines = [f"{file.path}: no mistake found. At most, in {at(file.config, 'provider', 'region')}:"]
    for name, kind in file.types.items():
        node = kind["node_config"]
        market = at(node, "InstanceMarketOptions", "MarketType") or "on-demand"
        count = 1 if name == file.config["head_node_type"] else kind.get("max_workers", file.config.get("max_workers"))
        gpus = int(at(kind, "resources", "GPU") or 0)
        lines.append(f"  {count} x {node['InstanceType']}, {market}, {gpus} GPUs each ({name})")
    return "\n".join([*lines, f"start it: ray up {file.path}"])
