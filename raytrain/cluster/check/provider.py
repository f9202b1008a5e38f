"""Provider: the rules for one ``provider.type`` of the machines that ``ray up`` starts Ray on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raytrain.cluster.check.file import ClusterFile


@dataclass(frozen=True, kw_only=True)
class Provider:
    """Rules for the cluster files of one provider."""

    mistakes: Callable[[ClusterFile], Iterator[str]]
    """Yields the mistakes in the provider's own fields: the field, what is wrong, how to fix it."""
    summary: Callable[[ClusterFile], str]
    """Describes a file without mistakes: the most machines that it may start, and the command that starts it."""
    spot_types: Callable[[ClusterFile], list[str]]
    """Names the node types that the provider may take away."""
    schema: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of the fields that the rules read and Ray's schema leaves open."""
    ignored: tuple[str, ...] = ()
    """Fields that Ray removes before it checks the file."""
    secrets: Mapping[str, str] = field(default_factory=dict)
    """Secrets of the provider that must not be in the file: name -> pattern."""
