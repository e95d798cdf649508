"""A secondary that plays a script, for tests of the primary's connections (hast/connect.py): captured messages, or
whatever else it is to say."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hast.config import Resource, parse
from hast.connect import Established, connect
from hast.handshake import PeerError, RefusedError
from hast.metadata import Metadata
from tests import vectors

STEP1 = vectors.load("hs1_secondary_to_primary")
VIRGIN = vectors.load("hs2_secondary_to_primary_virgin")
MAP = vectors.load("hs2_secondary_to_primary_activemap")
NEWER = vectors.load("hs2_secondary_to_primary_activemap_syncsrc_secondary")
CAPTURED = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=1650819838102974576)
SECONDS = 20.0  # for a script to end
CONFIG = "resource data {{ local /dev/null timeout {timeout}\non a {{ remote {remote}\n {source}\n }} }}"


def resource(remote: str, timeout: int = 20, source: str = "") -> Resource:
    text = CONFIG.format(remote=remote, timeout=timeout, source=f"source {source}" if source else "")
    return parse(text, "hast.conf", ["a"]).resources["data"]


class Secondary:
    """A listening socket, and a script that plays the secondary on what comes in."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self.socket.bind((address, 0))
        self.socket.listen(8)
        host = f"[{address}]" if ":" in address else address
        self.port = self.socket.getsockname()[1]
        self.address = f"{host}:{self.port}"
        self.said: list[bytes] = []  # what the primary sent, message by message
        self.peers: list[Any] = []
        self.connections: list[socket.socket] = []

    async def accept(self) -> socket.socket:
        sock, peer = await asyncio.get_running_loop().sock_accept(self.socket)
        self.connections.append(sock)
        self.peers.append(peer)
        return sock

    async def hear(self, sock: socket.socket) -> None:
        """One message without data."""
        loop = asyncio.get_running_loop()
        message = b""
        while len(message) < 5 or len(message) < 5 + int.from_bytes(message[1:5], "little"):
            part = await loop.sock_recv(sock, 4096)
            assert part, f"closed after {len(message)} bytes"
            message += part
        self.said.append(message)

    async def say(self, sock: socket.socket, message: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, message)

    def close(self) -> None:
        for sock in [self.socket, *self.connections]:
            sock.close()


Script = Callable[[Secondary], Awaitable[None]]


def playing(first: bytes = STEP1.raw, second: bytes = VIRGIN.raw, on_second: bytes = b"") -> Script:
    """Say first and second where they belong, and on_second on connection 2."""

    async def script(secondary: Secondary) -> None:
        one = await secondary.accept()
        await secondary.hear(one)
        await secondary.say(one, first)
        two = await secondary.accept()
        await secondary.hear(two)
        await secondary.say(two, on_second)
        await secondary.say(one, second)

    return script


def stopping(where: int, then: Callable[[Secondary], Awaitable[None]]) -> Script:
    """Play the handshake up to a point, then do something else."""

    async def script(secondary: Secondary) -> None:
        one = await secondary.accept()
        if where >= 1:
            await secondary.hear(one)
        if where >= 2:
            await secondary.say(one, STEP1.raw[:3] if where == 2 else STEP1.raw[:20] if where == 3 else STEP1.raw)
        if where >= 5:
            two = await secondary.accept()
        if where >= 6:
            await secondary.hear(two)
        if where >= 7:
            cuts = {7: 4, 8: 100, 9: len(NEWER.raw) - len(NEWER.data), 10: len(NEWER.raw) - 1}
            await secondary.say(one, NEWER.raw[: cuts[where]])
        await then(secondary)

    return script


WHERE = {
    0: "handshake step 1",
    1: "handshake step 1",
    2: "handshake step 1",
    3: "handshake step 1",
    4: "handshake step 2",
    5: "handshake step 2",
    6: "handshake step 2",
    7: "handshake step 2",
    8: "handshake step 2",
    9: "the activemap of handshake step 2",
    10: "the activemap of handshake step 2",
}


async def play(
    secondary: Secondary,
    script: Script,
    body: Callable[[], Awaitable[Established]],
) -> Established:
    """Run body() while the script plays. The secondary's sockets stay open."""
    task = asyncio.get_running_loop().create_task(script(secondary))  # type: ignore[arg-type]
    try:
        made = await body()
        async with asyncio.timeout(SECONDS):
            await task
        return made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def established(
    script: Script,
    metadata: Metadata = CAPTURED,
    *,
    address: str = "127.0.0.1",
    check: Callable[[Secondary, Established], None] = lambda _secondary, _made: None,
    **options: Any,
) -> Secondary:
    """Connect, hand what came of it to check, and close everything."""

    async def body() -> Secondary:
        with contextlib.closing(Secondary(address)) as secondary:
            made = await play(
                secondary, script, lambda: connect(resource(secondary.address), metadata, **options)
            )
            with contextlib.closing(made):
                check(secondary, made)
            return secondary

    return asyncio.run(body())


def failure(
    script: Script, metadata: Metadata = CAPTURED, *, timeout: int = 20, **options: Any
) -> PeerError | RefusedError:
    """Connect in vain: the error. No descriptor is left by that."""

    async def body() -> PeerError | RefusedError:
        with contextlib.closing(Secondary()) as secondary:
            before = descriptors()
            with pytest.raises((PeerError, RefusedError)) as raised:
                await play(
                    secondary, script, lambda: connect(resource(secondary.address, timeout), metadata, **options)
                )
            assert descriptors() - before <= inodes(secondary.connections)
            assert "\n" not in str(raised.value)
            assert str(raised.value).startswith("data: ") and secondary.address in str(raised.value)
            return raised.value

    return asyncio.run(body())


def descriptors() -> set[str]:
    """Sockets and pipes that this process has open."""
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(entry.readlink()))
    return {name for name in found if name.startswith(("socket:", "pipe:", "anon_inode:"))}


def inodes(sockets: list[socket.socket]) -> set[str]:
    return {str(Path(f"/proc/self/fd/{sock.fileno()}").readlink()) for sock in sockets}


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    """Look-ups are children: none may be left, not even as a zombie."""
    yield
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
