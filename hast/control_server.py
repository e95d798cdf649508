"""The control socket: requests of hastctl, and of FreeBSD's (docs/protocol.md section 7).

Invariants:
- Only root and the user that hastd runs as are heard: the socket's mode is 0600, and the peer's uid is checked.
- A client that sends nothing, garbage, too much, or does not read costs its own connection, within CLIENT_SECONDS.
  When there are CLIENT_LIMIT connections, the one that has been silent for longest makes room for a new one. Whoever
  speaks at once is heard before a flood of others can have that effect on it.
- Nothing is allocated by a size that a client names before that size was checked.
- A request that was understood is carried out whether its client waits for the reply or not.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from hast.complaints import Complaints
from hast.control import CMD_RESTART, CMD_STOP, ERROR_INVALID, VERSION, ControlRequest, error_reply
from hast.errors import DataError, HastError, PermissionDeniedError, SystemCallError, TemporaryError
from hast.framing import HANDSHAKE_LIMIT, MAIN_HEADER, REQUEST_LIMIT, pack_message, parse_main_header
from hast.nv import Nv, decode

log = logging.getLogger(__name__)

CLIENT_SECONDS = 5.0  # for a request to arrive whole, and for a reply to be taken
CLIENT_LIMIT = 64
BACKLOG = 128
ACCEPT_AT_ONCE = 16  # then those are read who were accepted before

Handler = Callable[[ControlRequest], Awaitable[Nv]]


def bind(path: str) -> socket.socket:
    """The listening socket. A stale one of a hastd that is gone is replaced; one that answers is not.

    Raises TemporaryError when another hastd answers there, PermissionDeniedError, SystemCallError.
    """
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    previous = os.umask(0o177)  # never reachable for others, not even between bind and chmod
    try:
        sock.bind(path)
        Path(path).chmod(0o600)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise _bind_error(path, error) from error
    finally:
        os.umask(previous)
    return sock


def unbind(sock: socket.socket) -> None:
    """Take back bind(), before anybody serves the socket."""
    Path(sock.getsockname()).unlink(missing_ok=True)
    sock.close()


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(Path(path).lstat().st_mode):
            raise SystemCallError(f"cannot listen on control socket {path}: something else is there, no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)  # a full backlog is an answer as well
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            Path(path).unlink()
        return
    except BlockingIOError:
        pass
    except OSError as error:
        raise _bind_error(path, error) from error
    raise TemporaryError(f"another hastd is running: it answers on the control socket {path}")


def _bind_error(path: str, error: OSError) -> HastError:
    text = f"cannot listen on control socket {path}: {error.strerror}"
    return PermissionDeniedError(text) if isinstance(error, PermissionError) else SystemCallError(text)


class ControlServer:
    """Serves the clients of a listening socket; `handler` carries out what they ask."""

    def __init__(self, sock: socket.socket, handler: Handler) -> None:
        self._socket = sock
        self._path = Path(sock.getsockname())
        self._inode = self._path.lstat().st_ino
        self._handler = handler
        self._complaints = Complaints(log)
        self._server: asyncio.Server | None = None
        self._silent: dict[asyncio.Task[None], None] = {}  # clients that have not sent a whole request, by age
        self._clients: set[asyncio.Task[None]] = set()
        self._held: list[socket.socket] = []

    async def start(self) -> None:
        """Hear clients from now on."""
        self._server = await self._listen(self._socket)

    async def move(self, sock: socket.socket) -> None:
        """Hear clients at another listening socket. Those that the old one has brought still get their replies."""
        server = await self._listen(sock)
        self._stop_listening()
        self._socket, self._server = sock, server
        self._path = Path(sock.getsockname())
        self._inode = self._path.lstat().st_ino

    async def _listen(self, sock: socket.socket) -> asyncio.Server:
        """Accept clients from now on."""
        # To asyncio its `backlog` is also how many it accepts at once.
        server = await asyncio.start_unix_server(
            self._connected, sock=sock, limit=REQUEST_LIMIT, backlog=ACCEPT_AT_ONCE
        )
        sock.listen(BACKLOG)
        return server

    def _stop_listening(self) -> None:
        with suppress(OSError):
            if self._path.lstat().st_ino == self._inode:
                self._path.unlink()
        if self._server is not None:
            self._server.close()

    async def close(self) -> None:
        """Hear no more clients, and remove the socket. Requests that are being carried out are not waited for."""
        self._stop_listening()
        for task in list(self._clients):
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin with a client. Its task may be cancelled before it has run at all, so what it leaves is seen to in
        _done()."""
        if len(self._clients) >= CLIENT_LIMIT and not self._make_room():
            self._complaints.warning("control socket: %d requests are under way, one more was refused", CLIENT_LIMIT)
            writer.transport.abort()
            return
        task = asyncio.get_running_loop().create_task(self._client(reader, writer))
        self._clients.add(task)
        self._silent[task] = None
        task.add_done_callback(partial(self._done, writer))

    def _done(self, writer: asyncio.StreamWriter, task: asyncio.Task[None]) -> None:
        self._silent.pop(task, None)
        self._clients.discard(task)
        writer.transport.abort()  # everything was taken, or is not going to be
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("control socket: unexpected error", exc_info=error)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All of one client."""
        try:
            await self._serve(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            log.debug("control socket: a client went away in the middle")
        except TimeoutError:
            log.debug("control socket: a client was too slow")
        except HastError as error:
            self._complaints.warning("control socket: a client is refused: %s", error)

    def _make_room(self) -> bool:
        """Drop the client that has been silent for longest; whether there was one."""
        for task in self._silent:
            del self._silent[task]
            self._clients.discard(task)
            task.cancel()
            return True
        return False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request, one reply."""
        task = asyncio.current_task()
        assert task is not None
        writer.transport.set_write_buffer_limits(high=0)  # drain() waits until all of it was taken
        _check_peer(writer.get_extra_info("socket"))
        async with asyncio.timeout(CLIENT_SECONDS):
            main = parse_main_header(await reader.readexactly(MAIN_HEADER.size), REQUEST_LIMIT)
            header = await reader.readexactly(main.size)
        self._silent.pop(task, None)
        try:
            request = ControlRequest.from_nv(decode(header))
        except DataError as error:
            self._complaints.warning("control socket: a request is not valid: %s", error)
            reply = error_reply(ERROR_INVALID)
        else:
            reply = await self._handler(request)
            if request.cmd in (CMD_STOP, CMD_RESTART):
                # Open until this process is gone: so the client sees when.
                self._held.append(writer.get_extra_info("socket").dup())
        # A client that speaks an older version refuses a newer one.
        writer.write(pack_message(min(main.version, VERSION), reply, limit=HANDSHAKE_LIMIT))
        async with asyncio.timeout(CLIENT_SECONDS):
            await writer.drain()


def _check_peer(sock: socket.socket) -> None:
    """Raises PermissionDeniedError unless the peer is root or the user that this process runs as."""
    if not hasattr(socket, "SO_PEERCRED"):
        return  # the mode of the socket has to do
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    if uid not in (0, os.geteuid()):
        raise PermissionDeniedError(f"user {uid} may not control hastd")
