"""Rules for AWS: region and zones, images, profiles, ports, disks, GPUs, spot instances, number of nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from raytrain.cluster.check.file import TEXT, WHOLE, ClusterFile, at
from raytrain.cluster.check.provider import Provider

LEAST_DISK_GIB = 100
"""Smallest system disk: the image's toolkits take about 50 GB and the packages 6 GB."""
ARM = re.compile(r"[a-z]+\d+g[a-z]*\.|a1\.")
"""Instance types with AWS's own processors."""
GPUS = {
    f"{family}.{size}": count
    for families, sizes, count in (
        ("g4dn g5 g6 g6e", "xlarge 2xlarge 4xlarge 8xlarge 16xlarge", 1),
        ("g4dn", "12xlarge", 4),
        ("g5 g6 g6e", "12xlarge 24xlarge", 4),
        ("g5 g6 g6e", "48xlarge", 8),
        ("p3", "2xlarge", 1),
        ("p3", "8xlarge", 4),
        ("p3", "16xlarge", 8),
        ("p4d p4de", "24xlarge", 8),
        ("p5", "48xlarge", 8),
    )
    for family in families.split()
    for size in sizes.split()
}
"""Number of GPUs of the common instance types; for others, the number in the file is taken as it is."""
SECRETS = {
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "an AWS secret key": r"(?i)aws_?secret_?access_?key['\"]?\s*[:=]\s*['\"]?[^\s'\"$]",
}
_LISTS = {"properties": {name: {"type": "array"} for name in ("IpRanges", "Ipv6Ranges")}}
_DISK = {"properties": {"Ebs": {"properties": {"VolumeSize": WHOLE}}}}
_NODE = {"InstanceType": TEXT, "ImageId": TEXT, "BlockDeviceMappings": {"type": "array", "items": _DISK}}
SCHEMA = {
    "properties": {
        "provider": {"properties": {"security_group": {"properties": {"IpPermissions": {"items": _LISTS}}}}},
        "available_node_types": {"additionalProperties": {"properties": {"node_config": {"properties": _NODE}}}},
    }
}


def aws_mistakes(file: ClusterFile) -> Iterator[str]:
    """Yield the mistakes of a file for AWS."""
    yield from _region(file)
    if not file.types:
        yield "available_node_types: missing, and Ray's default is one m5.large; describe the head and the workers"
        return
    if not file.head:
        named = file.config.get("head_node_type")
        yield f"head_node_type: there is no node type {named!r}; name one of {', '.join(file.types)}"
        return
    yield from _head(file)
    yield from _counts(file)
    for name, kind in file.types.items():
        yield from _node(f"available_node_types.{name}", kind)
    images = {name: at(kind, "node_config", "ImageId") for name, kind in file.types.items()}
    if len(set(map(str, images.values()))) > 1 and all(images.values()):
        yield "available_node_types: the ImageIds differ, and so may Python; name one image everywhere"
    yield from _profiles(file)
    spot = aws_spot_types(file)
    if spot and at(file.config, "provider", "cache_stopped_nodes") is not False:
        yield f"provider.cache_stopped_nodes: must be false, since {spot[0]} is spot, which EC2 ends and never stops"


def _region(file: ClusterFile) -> Iterator[str]:
    region = at(file.config, "provider", "region")
    if not region:
        yield "provider.region: missing; write the region, such as us-west-2"
        return
    for zone in str(at(file.config, "provider", "availability_zone") or "").split(","):
        if zone.strip() and not re.fullmatch(rf"{re.escape(region)}[a-z]", zone.strip()):
            yield f"provider.availability_zone: {zone.strip()} is not in {region}; write {region}a or leave it out"
    for other in re.findall(r"AWS_REGION=([\w-]+)", "\n".join(file.commands("setup_commands"))):
        if other != region:
            yield f"setup_commands: AWS_REGION={other}, but provider.region is {region}; write {region}"
    for number, rule in enumerate(at(file.config, "provider", "security_group", "IpPermissions") or []):
        yield from _ports(f"provider.security_group.IpPermissions[{number}]", rule)
    if at(file.config, "auth", "ssh_private_key") is not None:
        for name, kind in file.types.items():
            if at(kind, "node_config", "KeyName") is None:
                yield f"available_node_types.{name}.node_config.KeyName: missing; name the pair of auth.ssh_private_key"


def _ports(location: str, rule: Any) -> Iterator[str]:
    ranges = [*(at(rule, "IpRanges") or []), *(at(rule, "Ipv6Ranges") or [])]
    sources = [str(at(entry, "CidrIp") or at(entry, "CidrIpv6")) for entry in ranges]
    ports = (at(rule, "FromPort"), at(rule, "ToPort"))
    if any(source.endswith("/0") for source in sources) and (ports != (22, 22) or at(rule, "IpProtocol") != "tcp"):
        shown = "all ports" if ports[0] in (None, -1) else f"ports {ports[0]} to {ports[1]}"
        yield f"{location}: {shown} are open to the world; take the rule out and use ray attach -p"


def _head(file: ClusterFile) -> Iterator[str]:
    location = f"available_node_types.{file.config['head_node_type']}"
    resources = file.head.get("resources") or {}
    if resources.get("CPU") != 0 or resources.get("GPU", 0) != 0:
        yield f"{location}.resources: trials would run on the head; write {{CPU: 0}}, and no GPU"
    if file.head.get("max_workers", 0) != 0:
        yield f"{location}.max_workers: {file.head['max_workers']} workers like the head, without GPUs; write 0"
    if at(file.head, "node_config", "InstanceMarketOptions") is not None:
        yield f"{location}.node_config.InstanceMarketOptions: the cluster ends with a head on spot; take it out"


def _counts(file: ClusterFile) -> Iterator[str]:
    most = file.config.get("max_workers", 2)
    total = 0
    for name, kind in file.workers.items():
        low, high = kind.get("min_workers", 0), kind.get("max_workers", most)
        if low > high:
            yield f"available_node_types.{name}.min_workers: {low} is more than max_workers, {high}; correct one"
        if low < 0 or high < 0:
            yield f"available_node_types.{name}: min_workers and max_workers must be at least 0"
        total += high
    if total > most:
        yield f"max_workers: {most}, but a search is sized by the types' max_workers, {total} in all; write {total}"
    if not file.workers or total == 0:
        yield "available_node_types: there can be no worker; add a type with max_workers above 0"


def _node(location: str, kind: dict[str, Any]) -> Iterator[str]:
    node, wanted = kind["node_config"], (kind.get("resources") or {}).get("GPU")
    name = str(node.get("InstanceType") or "")
    if not name:
        yield f"{location}.node_config.InstanceType: missing; write one, such as g5.2xlarge"
    elif name in GPUS and wanted != GPUS[name]:
        count = GPUS[name]
        yield f"{location}.resources: GPU is {wanted or 'not given'}, but {name} has {count}; write GPU: {count}"
    elif name not in GPUS and re.match(r"[gp]\d", name) and not wanted:
        yield f"{location}.resources: GPU is not given, but {name} has some; write GPU: and their number"
    elif wanted and re.match(r"[cmrti]\d", name):
        yield f"{location}.resources: GPU is {wanted}, but {name} has none; take it out or choose another InstanceType"
    image = str(node.get("ImageId") or "")
    if not re.fullmatch(r"ami-[0-9a-f]{8,17}|resolve:ssm:/\S+", image):
        known = f"{image!r} is no image" if image else "missing, and Ray would take Ubuntu 18.04"
        yield f"{location}.node_config.ImageId: {known}; write ami-... or resolve:ssm:/..."
    processor, other = ("arm64", "x86_64") if ARM.match(name) else ("x86_64", "arm64")
    if name and other in image:
        yield f"{location}.node_config.InstanceType: {name} is {processor}, but the ImageId is {other}; change one"
    roots = ["/dev/sda1"] if "ubuntu" in image else ["/dev/sda1", "/dev/xvda"]
    disks = {at(disk, "DeviceName"): at(disk, "Ebs", "VolumeSize") for disk in node.get("BlockDeviceMappings") or []}
    size = max((int(disks.get(root) or 0) for root in roots), default=0)
    if size < LEAST_DISK_GIB:
        fix = f"write VolumeSize: {LEAST_DISK_GIB} or more for {' or '.join(roots)}"
        yield f"{location}.node_config.BlockDeviceMappings: a system disk of {size} GiB is too small; {fix}"


def _profiles(file: ClusterFile) -> Iterator[str]:
    def profile(kind: dict[str, Any]) -> str:
        named = at(kind, "node_config", "IamInstanceProfile")
        return str(at(named, "Name") or at(named, "Arn") or "").rpartition("/")[2]

    head = profile(file.head)
    for name, kind in file.types.items():
        location = f"available_node_types.{name}.node_config.IamInstanceProfile"
        if not profile(kind):
            wanted = "write {Name: ...}, as docs/guides/cluster.md makes it"
            yield f"{location}: missing, so the node could not reach S3; {wanted}"
        elif kind is not file.head and profile(kind) == head:
            yield f"{location}: {head} is the head's, which may start instances; give workers a profile of their own"


def aws_spot_types(file: ClusterFile) -> list[str]:
    """Return the node types that run on spot instances."""
    return [name for name, kind in file.types.items() if at(kind, "node_config", "InstanceMarketOptions") is not None]


def aws_summary(file: ClusterFile) -> str:
    """Describe the most instances that the file may start, and how to start it."""
    lines = [f"{file.path}: no mistake found. At most, in {at(file.config, 'provider', 'region')}:"]
    for name, kind in file.types.items():
        node = kind["node_config"]
        market = at(node, "InstanceMarketOptions", "MarketType") or "on-demand"
        count = 1 if name == file.config["head_node_type"] else kind.get("max_workers", file.config.get("max_workers"))
        gpus = int(at(kind, "resources", "GPU") or 0)
        lines.append(f"  {count} x {node['InstanceType']}, {market}, {gpus} GPUs each ({name})")
    zones = [zone for zone in str(at(file.config, "provider", "availability_zone") or "").split(",") if zone.strip()]
    for name in aws_spot_types(file) if len(zones) == 1 else ():
        lines.append(
            f"warning: {name} is one instance type in one zone, {zones[0]}: while EC2 has none left there, none comes. "
            'Name more zones, or see "A node does not come" in docs/guides/cluster.md'
        )
    return "\n".join([*lines, f"start it: ray up {file.path}"])


PROVIDER = Provider(
    mistakes=aws_mistakes,
    summary=aws_summary,
    spot_types=aws_spot_types,
    schema=SCHEMA,
    secrets=SECRETS,
)
