"""Which network card workers meet on; that workers on two hosts do is tested by the campaign."""

from __future__ import annotations

import socket

from raytrain.training.worker_group import interface_of


def test_the_interface_of_an_address_is_found() -> None:
    assert interface_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert interface_of("192.0.2.1") is None
