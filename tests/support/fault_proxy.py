"""A proxy between clients and a server that drops, delays or alters what passes through it."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
import threading
from contextlib import suppress
from typing import Literal

Mode = Literal["pass", "drop", "delay", "corrupt"]
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close() send a reset."""
_SMALLEST = 2048
"""Bodies shorter than this are never altered: listings and error messages are not what is tried here."""


_BEGIN = re.compile(rb"HTTP/1\.[01] \d{3} |[A-Z]{3,7} \S+ HTTP/1\.[01]\r\n")
"""How an HTTP message begins."""


class FaultProxy:
    """Passes TCP connections on to ``target``; what goes wrong is set at any time by ``mode``.

    - ``drop``: a connection is reset after a random number of bytes, three of four times.
    - ``delay``: each piece of data waits for up to ``delay_s``.
    - ``corrupt``: one bit of each of the next ``budget`` HTTP bodies of some size, in either direction.
    """

    def __init__(self, target: tuple[str, int], host: str = "127.0.0.1", port: int = 0, seed: int = 0) -> None:
        self.mode: Mode = "pass"
        self.delay_s = 0.5
        self.budget = 0
        self.touched = 0
        """Connections dropped, pieces delayed, bodies altered so far."""
        self._target = target
        self._chance = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, host, port))
        self.host, self.port = self._server.sockets[0].getsockname()[:2]
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and end all connections."""

        async def stop() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        others: list[asyncio.StreamWriter] = []
        try:
            upstream_reader, upstream = await asyncio.open_connection(*self._target)
            others.append(upstream)
            directions = [
                asyncio.create_task(self._pass_on(reader, upstream)),
                asyncio.create_task(self._pass_on(upstream_reader, writer)),
            ]
            try:
                await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in directions:
                    task.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
        except OSError:
            _reset(writer)  # there is no server behind
        except asyncio.CancelledError:
            pass  # asyncio's streams log a cancelled connection as an error
        finally:
            for end in (writer, *others):
                end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        message = _Message()
        left = None
        with suppress(OSError):
            while data := await reader.read(65536):
                if self.mode == "drop":
                    if left is None:
                        left = self._chance.randrange(16384) if self._chance.random() < 0.75 else 2**62
                    left -= len(data)
                    if left < 0:
                        self.touched += 1
                        _reset(writer)
                        return
                elif self.mode == "delay":
                    self.touched += 1
                    await asyncio.sleep(self._chance.uniform(0, self.delay_s))
                where = message.middle(data)
                if self.mode == "corrupt" and where is not None and self.budget > 0:
                    self.budget -= 1
                    self.touched += 1
                    data = data[:where] + bytes([data[where] ^ 0x10]) + data[where + 1 :]
                writer.write(data)
                await writer.drain()


class _Message:
    """Where in a stream of HTTP messages the bodies are."""

    def __init__(self) -> None:
        self._left = 0
        """Bytes of the present body that are still to come."""
        self._altered = True

    def middle(self, data: bytes) -> int | None:
        """An index in ``data`` that lies in a body of some size, once a body."""
        start = 0
        # the answer to HEAD tells the length of a body that does not follow
        if self._left <= 0 or _BEGIN.match(data):
            self._left = 0
            head, found, _ = data.partition(b"\r\n\r\n")
            length = re.search(rb"(?im)^content-length: *(\d+)", head) if found else None
            if length is None or b"xml" in head.lower():
                return None
            start, self._left = len(head) + 4, int(length[1])
            self._altered = self._left < _SMALLEST
        size = min(len(data) - start, self._left)
        self._left -= size
        if self._altered or size <= 0:
            return None
        self._altered = True
        return start + size // 2


def _reset(writer: asyncio.StreamWriter) -> None:
    connection = writer.get_extra_info("socket")
    if connection is not None:
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
