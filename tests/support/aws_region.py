"""A region of AWS in a lab: moto answers for EC2 and IAM, and each instance that it says runs is a host.

As on AWS, an instance has a private address in its subnet and a public one that the gateway translates; from outside
only what its security groups open is reached; its metadata service gives it the keys of its profile's role, and tells
it when it is about to be taken; and what it asks AWS for must be in that role's policies. Which resources a policy
means, and on what conditions, is not looked at: ``requests`` keeps all that was asked for.
"""

from __future__ import annotations

import logging
import subprocess
import threading
import urllib.parse
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from io import BytesIO
from typing import Any

import boto3

from tests.support.lab import Host, Lab
from tests.support.metadata_server import ACTION, MetadataServer

NAME = "us-west-2"
GATEWAY = "172.31.0.1"
"""The router of the subnet in which moto places the instances of the first zone."""
PREFIX = 20
METADATA = "169.254.169.254"
PORT = 5000
ENDPOINT = f"http://{GATEWAY}:{PORT}"
RUN = "ec2:RunInstances"
NOTICE_S = 120
"""Seconds from EC2's notice to the end of a spot instance."""
_ROLE = "/latest/meta-data/iam/security-credentials/"
_NETWORK = """
table inet region {
  map public { type ipv4_addr : ipv4_addr; }
  set open { type ipv4_addr . inet_service; flags interval; }
  chain addresses {
    type nat hook prerouting priority dstnat;
    dnat ip to ip daddr map @public
  }
  chain groups {
    type filter hook forward priority filter; policy drop;
    ct state established,related accept
    iifname br0 accept
    ct status dnat ip daddr . tcp dport @open accept
  }
}
"""
_REFUSAL = """<?xml version="1.0" encoding="UTF-8"?>
<Response><Errors><Error><Code>{code}</Code><Message>{message}</Message></Error></Errors><RequestID>1</RequestID></Response>
"""


@dataclass(frozen=True)
class Request:
    """What somebody asked AWS for."""

    role: str
    """The role of the instance that asked; empty for others."""
    action: str
    """As policies write it, such as ec2:RunInstances."""
    parameters: dict[str, str]
    refused: str
    """Why it was refused, empty if it was not."""


@dataclass(frozen=True)
class Role:
    """What an instance may do."""

    name: str
    allowed: tuple[str, ...]
    """The actions of its policies, with their wildcards."""


class Region:
    """Everything that is AWS's, from the first request to ``close``."""

    def __init__(self, lab: Lab, furnish: Callable[[Host], None], keys: dict[str, str]) -> None:
        """``furnish`` makes a host what its image says; ``keys`` are what the metadata service gives to instances."""
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
        from werkzeug.serving import make_server

        self.requests: list[Request] = []
        self.spot_capacity = True
        """Whether there are spot instances to be had."""
        self.hosts: dict[str, Host] = {}
        """Instance -> the host that it is."""
        self._lab, self._furnish, self._keys = lab, furnish, keys
        self._roles: dict[str, Role] = {}
        self._ends = threading.Event()
        logging.getLogger("werkzeug").setLevel(logging.WARNING)
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("0.0.0.0", PORT, self._serve, threaded=True, request_handler=MotoRequestHandler)
        subprocess.run(["ip", "addr", "add", f"{GATEWAY}/{PREFIX}", "dev", "br0"], check=True)
        subprocess.run(["ip", "addr", "add", f"{METADATA}/32", "dev", "br0"], check=True)
        subprocess.run(["nft", "-f", "-"], input=_NETWORK, text=True, check=True)
        self.metadata = _Metadata(self)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def client(self, service: str) -> Any:
        """A client that may do everything."""
        return boto3.session.Session().client(
            service,
            region_name=NAME,
            endpoint_url=f"http://127.0.0.1:{PORT}",
            aws_access_key_id="region",
            aws_secret_access_key="region",
        )

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """The instances in one of ``states``, or all, oldest first."""
        filters = [{"Name": "instance-state-name", "Values": list(states)}] if states else []
        found = self.client("ec2").describe_instances(Filters=filters)["Reservations"]
        return [instance for reservation in found for instance in reservation["Instances"]]

    def notify(self, instance: str) -> None:
        """Tell a spot instance that it will be taken."""
        at = datetime.now(UTC) + timedelta(seconds=NOTICE_S)
        self.metadata.ends[self.hosts[instance].address] = f"{at:%Y-%m-%dT%H:%M:%SZ}"

    def take(self, instance: str) -> None:
        """Take an instance, as EC2 does with a spot instance whether it was told or not."""
        self.client("ec2").terminate_instances(InstanceIds=[instance])

    def role(self, address: str) -> Role | None:
        """The role of the instance at an address, ``None`` if there is none, or it has no profile."""
        return self._roles.get(address)

    def close(self) -> None:
        """Stop all servers; the hosts die with the process that encloses them."""
        self._ends.set()
        self._follower.join(60)
        self._server.shutdown()
        self.metadata.close()

    # ------------------------------------------------------------------------------------------ requests

    def _serve(self, environment: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        body = environment["wsgi.input"].read(int(environment.get("CONTENT_LENGTH") or 0))
        environment["wsgi.input"] = BytesIO(body)
        address = environment["REMOTE_ADDR"]
        if address != "127.0.0.1":
            action, parameters = _read(environment, body)
            role = self.role(address)
            refused = self._refusal(address, role, action, parameters)
            self.requests.append(Request(role.name if role else "", action, parameters, refused))
            if refused:
                # what EC2 has too little of is its own fault, and not the client's
                status = "500 Server Error" if refused.startswith("Insufficient") else "403 Forbidden"
                start_response(status, [("Content-Type", "text/xml")])
                return [_REFUSAL.format(code=refused, message=f"{refused} for {action}").encode()]
            if action == RUN:
                # EC2 starts as many as it can, moto the fewest that will do
                more = {**parameters, "Action": "RunInstances", "MinCount": parameters["MaxCount"]}
                body = urllib.parse.urlencode(more).encode()
                environment |= {"wsgi.input": BytesIO(body), "CONTENT_LENGTH": str(len(body))}
        return self._moto(environment, start_response)

    def _refusal(self, address: str, role: Role | None, action: str, parameters: dict[str, str]) -> str:
        """The code of the error that AWS would answer with, if any."""
        if address.startswith("172.31.") and not (role and any(fnmatch(action, pattern) for pattern in role.allowed)):
            return "UnauthorizedOperation"
        spot = parameters.get("InstanceMarketOptions.MarketType") == "spot"
        return "InsufficientInstanceCapacity" if spot and not self.spot_capacity else ""

    # ------------------------------------------------------------------------------------------ instances

    def _follow(self) -> None:
        """Keep the hosts what moto says of the instances; those without a key pair are nobody's to log in to."""
        while not self._ends.wait(0.5):
            running = {one["InstanceId"]: one for one in self.instances("pending", "running") if "KeyName" in one}
            for name in set(self.hosts) - set(running):
                self._lab.stop(self.hosts.pop(name))
            for name in running.keys() - self.hosts.keys():
                self.hosts[name] = self._start(running[name])

    def _start(self, instance: dict[str, Any]) -> Host:
        ec2, address = self.client("ec2"), instance["PrivateIpAddress"]
        (pair,) = ec2.describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)["KeyPairs"]
        self._roles.pop(address, None)
        self.metadata.ends.pop(address, None)
        if "IamInstanceProfile" in instance:
            self._roles[address] = self.read_role(instance["IamInstanceProfile"]["Arn"].rpartition("/")[2])
        groups = ec2.describe_security_groups(GroupIds=[group["GroupId"] for group in instance["SecurityGroups"]])
        opened = [f"{address} . {ports}" for group in groups["SecurityGroups"] for ports in _opened(group)]
        rules = [f"add element inet region open {{ {', '.join(opened)} }}"] if opened else []
        rules += [f"add element inet region public {{ {instance['PublicIpAddress']} : {address} }}"]
        subprocess.run(["nft", "-f", "-"], input="\n".join(rules), text=True, check=True)
        # no more than 13 characters: it is part of its card's name, too
        name = instance["InstanceId"][:13]
        key = pair["PublicKey"].strip()
        return self._lab.start(name, f"{address}/{PREFIX}", GATEWAY, key, furnish=self._furnish)

    def read_role(self, profile: str) -> Role:
        iam = self.client("iam")
        (role,) = iam.get_instance_profile(InstanceProfileName=profile)["InstanceProfile"]["Roles"]
        name = role["RoleName"]
        policies = iam.list_role_policies(RoleName=name)["PolicyNames"]
        documents = [iam.get_role_policy(RoleName=name, PolicyName=policy)["PolicyDocument"] for policy in policies]
        actions = [one["Action"] for document in documents for one in document["Statement"]]
        return Role(name, tuple(one for action in actions for one in ([action] if isinstance(action, str) else action)))

    def credentials(self) -> dict[str, str]:
        """Keys as the metadata service gives them out."""
        expiration = datetime.now(UTC) + timedelta(hours=6)
        return {"Code": "Success", "Type": "AWS-HMAC", "Expiration": f"{expiration:%Y-%m-%dT%H:%M:%SZ}", **self._keys}


class _Metadata(MetadataServer):
    """What the instances are told of themselves; who asks is known by the address."""

    def __init__(self, region: Region) -> None:
        self.ends: dict[str, str] = {}
        """Address of an instance that is about to be taken -> when."""
        self._region = region
        super().__init__(METADATA, 80)

    def page(self, path: str, client: str) -> dict[str, Any] | str | None:
        role = self._region.role(client)
        if path == ACTION and client in self.ends:
            return {"action": "terminate", "time": self.ends[client]}
        if path == _ROLE and role is not None:
            return role.name
        if role is not None and path == f"{_ROLE}{role.name}":
            return self._region.credentials()
        return None


def _read(environment: dict[str, Any], body: bytes) -> tuple[str, dict[str, str]]:
    """The action of a request, as policies write it, and its parameters where the protocol is the query one."""
    signed = environment.get("HTTP_AUTHORIZATION", "")
    service = signed.partition("Credential=")[2].split("/")[3] if "Credential=" in signed else "?"
    parameters: dict[str, str] = {}
    with suppress(UnicodeDecodeError):
        parameters = dict(urllib.parse.parse_qsl(body.decode(), keep_blank_values=True))
    named = parameters.pop("Action", "") or environment.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
    return f"{service}:{named or environment['REQUEST_METHOD']}", parameters


def _opened(group: dict[str, Any]) -> list[str]:
    """The ports, as nft writes them, that a security group opens to the world."""
    found = []
    for rule in group["IpPermissions"]:
        if any(source["CidrIp"] == "0.0.0.0/0" for source in rule.get("IpRanges", ())):
            every = rule["IpProtocol"] == "-1"
            found.append("0-65535" if every else f"{rule['FromPort']}-{rule['ToPort']}")
    return found
