"""Which network card workers meet on; that workers on two hosts do is tested by the campaign."""

from __future__ import annotations

import socket

from raytrain.training.worker_group import card_of


def test_the_card_of_an_address_is_found() -> None:
    assert card_of("127.0.0.1") in {name for _, name in socket.if_nameindex()}
    assert card_of("192.0.2.1") is None
