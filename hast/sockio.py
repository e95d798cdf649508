"""Messages on non-blocking sockets, for asyncio (docs/protocol.md section 2).

Invariants:
- Not one byte more is read than the message has: the socket can be given to another process afterwards.
- Nothing is allocated by a size that a peer names: that size is checked first, and memory grows with what has come.
- No thread is started, so that a process that uses only this may fork.
"""

from __future__ import annotations

import asyncio
import socket

from hast.errors import ProtocolError
from hast.framing import HANDSHAKE_LIMIT, MAIN_HEADER, MainHeader, parse_main_header
from hast.nv import Nv, decode

PROBE_SECONDS = 10  # of silence before the system asks whether the other end is still there
PROBES = 3
LONGEST_PROBE = 32767  # seconds: what Linux takes
CHUNK = 256 * 1024  # bytes asked for at once


def watch(sock: socket.socket, timeout: int) -> None:
    """Have the system end a TCP connection whose other end is gone without a word: data that it has not taken for
    `timeout` seconds, or no answer to a probe for as long. Raises OSError."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(PROBE_SECONDS, timeout))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(max(1, timeout // PROBES), LONGEST_PROBE))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, PROBES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, timeout * 1000)


class PeerClosedError(ProtocolError):
    """The connection ended before the message did."""


async def read_exactly(sock: socket.socket, size: int, what: str = "message") -> bytes:
    """`size` bytes. Raises PeerClosedError when the connection ends before, OSError."""
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < size:
        part = await loop.sock_recv(sock, min(size - len(data), CHUNK))
        if not part:
            raise PeerClosedError(f"the connection was closed after {len(data)} of {size} bytes of a {what}")
        data += part
    return bytes(data)


async def read_message(sock: socket.socket, limit: int = HANDSHAKE_LIMIT) -> tuple[MainHeader, Nv]:
    """A message's main header and nv; its data, if it has any, is left to be read.

    `limit` is the largest nv that is taken, in bytes. Raises DataError, ProtocolError, PeerClosedError, OSError.
    """
    main = parse_main_header(await read_exactly(sock, MAIN_HEADER.size), limit)
    return main, decode(await read_exactly(sock, main.size))


async def write_all(sock: socket.socket, data: bytes) -> None:
    """Send all of it. Raises OSError."""
    await asyncio.get_running_loop().sock_sendall(sock, data)
