"""The control socket: a client that sends any bytes, in any pieces, then hangs up. The server itself, on a socket pair.

Input: size of the pieces, whether the client reads, bytes.
"""

from __future__ import annotations

import asyncio
import socket
import tempfile
from pathlib import Path

from hast import control_server
from hast.control import (
    CMD_SET_ROLE,
    CMD_STATUS,
    ERROR_UNIMPLEMENTED,
    ControlRequest,
    RoleEntry,
    RoleReply,
    StatusEntry,
    StatusReply,
    error_reply,
)
from hast.control_server import ControlServer
from hast.messages import HANDSHAKE_LIMIT, REQUEST_LIMIT, unpack_message
from hast.nv import Nv


async def answer(request: ControlRequest) -> Nv:
    """As hastd answers, with the client's own names."""
    if request.cmd == CMD_STATUS:
        return StatusReply(tuple(StatusEntry(name, role="init") for name in request.resources)).to_nv()
    if request.cmd == CMD_SET_ROLE:
        return RoleReply(tuple(RoleEntry(name, role="init") for name in request.resources)).to_nv()
    return error_reply(ERROR_UNIMPLEMENTED)


LOOP = asyncio.new_event_loop()
# It has a socket, as it must, that nobody can find: libFuzzer ends a process without taking anything away.
with tempfile.TemporaryDirectory(prefix="hast-fuzz-") as directory:
    SERVER = ControlServer(control_server.bind(str(Path(directory) / "control")), answer)


def let_go(_: object) -> None:
    """As the end of hastd does: a client that asked for it reads until then."""
    while SERVER._held:
        SERVER._held.pop().close()


async def converse(data: bytes, piece: int) -> bytes:
    """What the server answered."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=ours, limit=REQUEST_LIMIT)
    SERVER._connected(reader, writer)
    (task,) = SERVER._clients
    task.add_done_callback(let_go)
    got = b""
    try:
        for at in range(0, len(data), piece):
            theirs.send(data[at : at + piece])
            await asyncio.sleep(0)
        theirs.shutdown(socket.SHUT_WR)
        while part := await asyncio.get_running_loop().sock_recv(theirs, 1 << 20):
            got += part
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        theirs.close()
    await task  # raises what it should have dealt with
    await asyncio.sleep(0)
    assert not SERVER._clients and not SERVER._silent, "a client is not forgotten"
    assert not SERVER._held
    return got


def check(data: bytes) -> None:
    if len(data) < 2:
        return
    piece = data[0] + 1 if data[0] < 250 else 1 << 16
    got = LOOP.run_until_complete(asyncio.wait_for(converse(data[1:], piece), 30))
    if got:
        _, _, rest = unpack_message(got, HANDSHAKE_LIMIT)
        assert not rest
