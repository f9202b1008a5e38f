"""Check of a file for ``ray up``: all rules together, and a summary of a file without mistakes.

It finds mistakes before money is spent, with no network and no cloud account.
"""

from __future__ import annotations

from raytrain.cluster.check import aws, onprem
from raytrain.cluster.check.commands import command_mistakes
from raytrain.cluster.check.common import common_mistakes
from raytrain.cluster.check.file import ClusterFile, schema_mistakes
from raytrain.cluster.check.provider import Provider

PROVIDERS: dict[str, Provider] = {"aws": aws.PROVIDER, "local": onprem.PROVIDER}
"""Providers by the ``provider.type`` of a cluster file."""
_UNKNOWN = Provider(mistakes=lambda file: iter(()), summary=lambda file: "", spot_types=lambda file: [])


def check(file: ClusterFile) -> list[str]:
    """Return the mistakes in ``file``, a line each: the field, what is wrong, how to fix it.

    If Ray's schema refuses the file, only its mistakes are returned: the rest could not be read reliably.
    """
    provider = PROVIDERS.get(file.provider, _UNKNOWN)
    if mistakes := list(schema_mistakes(file, provider.schema, provider.ignored)):
        return mistakes
    if provider is _UNKNOWN:
        known = " or ".join(PROVIDERS)
        return [f"provider.type: {file.provider!r} is not known here; use {known}, or a cluster that runs already"]
    return [
        *common_mistakes(file, provider.secrets),
        *provider.mistakes(file),
        *command_mistakes(file, provider.spot_types(file)),
    ]


def summary(file: ClusterFile) -> str:
    """Describe the most machines that a file without mistakes may start, and how to start it."""
    return PROVIDERS[file.provider].summary(file)
