"""How the workers of a gang find each other: over the network card whose address Ray knows."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

GLOO_CARD = "GLOO_SOCKET_IFNAME"


class ProcessGroup(TorchConfig):
    """Ray Train's process group, for gloo on the card of the node's address.

    Gloo by itself takes the address that the host's own name stands for, or the loopback card where that cannot be
    used. Debian lets that name stand for 127.0.1.1, and then workers on two hosts never meet.
    """

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _OnTheCard


class _OnTheCard(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_name_card)
        super().on_start(worker_group, backend_config)


def _name_card() -> None:
    """Tell gloo in this worker which card to use, unless the user has."""
    card = card_of(ray.util.get_node_ip_address())
    if card is not None:
        os.environ.setdefault(GLOO_CARD, card)


def card_of(address: str) -> str | None:
    """The name of this host's network card that has ``address``; ``None`` if none has, as behind a port mapping."""
    cards = psutil.net_if_addrs().items()
    return next((name for name, entries in cards if any(entry.address == address for entry in entries)), None)
