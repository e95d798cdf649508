"""Main's side of the peers: whoever connects, until two connections are in the hands of a worker
(docs/protocol.md section 3).

    main -> worker   {"cmd": "disconnect"}: the primary begins anew, the connections that there are are given up
                     {"cmd": "connection", "version": n, "request": {step 2, see handshake.request_to_dict()},
                      "peer": address} + connection 1, connection 2: they take the place of what there was
                     {"cmd": "notice", "token": hex, "word": see hast/notice.py, "peer": address} + its connection

Invariants:
- Nothing of a peer is read before its address was found to be some resource's `remote`.
- A peer that is slow, silent, sends garbage or floods costs its own connections: each has a deadline, their number
  is bounded in total and for each address, and the oldest makes room for the newest.
- A resource has at most one first connection that waits for its second one. A new first connection cancels it.
- Not a byte that follows step 2 is read here: what is passed on is as the worker expects it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from hast import handshake, listening
from hast.address import Address
from hast.channel import Message
from hast.complaints import Complaints
from hast.config import Resource
from hast.control import Role
from hast.errors import HastError, TemporaryError
from hast.listening import Listening
from hast.messages import TOKEN_SIZE, Handshake1Request, Handshake2Request, Refusal
from hast.notice import Notice
from hast.nv import printable
from hast.peeraccess import PeerAccess
from hast.sockio import read_message, write_all

log = logging.getLogger(__name__)

ADDRESS_LIMIT = 16  # connections of one address that have not said what they want, and two more for each resource
TOTAL_LIMIT = 512  # of all addresses together
PAUSE_SECONDS = 1.0  # before the next attempt to accept when the system has no descriptors left


class Target(Protocol):
    """A resource as the listener needs it: hast.supervisor.Supervisor."""

    @property
    def resource(self) -> Resource: ...
    @property
    def role(self) -> Role: ...
    def hand_over(self, message: Message, fds: Sequence[int]) -> None:
        """Give the worker a message with descriptors. Raises HastError."""

    def disconnect(self) -> None:
        """Have the worker give up its connections, if it has any."""


@dataclass
class HalfOpen:
    """A first connection that was answered and waits for the second one."""

    socket: socket.socket
    peer: str
    version: int
    token: bytes
    timer: asyncio.TimerHandle

    def close(self) -> None:
        self.timer.cancel()
        self.socket.close()


class PeerListener:
    """`targets` are the resources by name, looked at anew for each connection."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._targets = targets
        self._access = PeerAccess(lambda: [target.resource for target in targets.values()])
        self._complaints = Complaints(log)
        self._listening: dict[Listening, asyncio.Task[None] | None] = {}
        self._greeting: dict[asyncio.Task[None], str] = {}  # by age, with the address that each comes from
        self._half_open: dict[str, HalfOpen] = {}

    # Listening.

    def bind(self, addresses: Sequence[Address]) -> None:
        """Open the listening sockets. Peers wait from now on until start(). Raises as listening.listen_all()."""
        self._listening |= dict.fromkeys(listening.listen_all(addresses))

    def start(self) -> None:
        """Hear peers from now on."""
        for at, task in self._listening.items():
            if task is None:
                self._listening[at] = asyncio.get_running_loop().create_task(self._accept(at))
                log.debug("listening for peers on %s", at.address)

    async def relisten(self, addresses: Sequence[Address]) -> None:
        """Listen on these addresses only; when one of them cannot be, all stays as it is. Raises as bind()."""
        present = {at.address for at in self._listening}
        added = [address for address in addresses if address not in present]
        gone = [at for at in self._listening if at.address not in addresses]
        try:
            await self._bind_more(added)
        except TemporaryError:
            if not gone:
                raise
            # Maybe it is we who are in the way: 0.0.0.0 has the port of every address.
            await self._exchange(gone, added)
        for at in gone:
            if at in self._listening:
                await self._stop_listening(at)
        self.start()

    async def _bind_more(self, addresses: Sequence[Address]) -> None:
        opened = await asyncio.get_running_loop().run_in_executor(None, listening.listen_all, addresses)
        self._listening |= dict.fromkeys(opened)

    async def _exchange(self, gone: Sequence[Listening], added: Sequence[Address]) -> None:
        """Close sockets first, then open others; go back when they cannot be had. Raises as bind()."""
        for at in gone:
            await self._stop_listening(at)
        try:
            await self._bind_more(added)
        except HastError:
            try:
                await self._bind_more(list(dict.fromkeys(at.address for at in gone)))
            except HastError as error:
                log.error("not listening any more: %s", error)
            self.start()
            raise

    async def _stop_listening(self, at: Listening) -> None:
        task = self._listening.pop(at)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})
        at.close()

    async def close(self) -> None:
        """Hear no more peers, and drop those that were heard but not handed over. Also when it was never started."""
        for at in list(self._listening):
            await self._stop_listening(at)
        tasks = list(self._greeting)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for name in list(self._half_open):
            self.forget(name)

    def forget(self, name: str) -> None:
        """Drop the first connection of a resource that waits for its second one: its role or settings changed."""
        half = self._half_open.pop(name, None)
        if half is not None:
            half.close()

    async def _accept(self, at: Listening) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(0)  # a flood of connections must not stop everything else
            try:
                sock, address = await loop.sock_accept(at.socket)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._complaints.warning("cannot accept a peer on %s: %s", at.address, error.strerror)
                    await asyncio.sleep(PAUSE_SECONDS)
                continue  # else it was gone before it was accepted
            self._admit(sock, None if at.address.is_unix else address)

    # Greeting.

    def _admit(self, sock: socket.socket, address: tuple[Any, ...] | None) -> None:
        """Begin with a connection. When there are too many already, the oldest one has to go."""
        host = str(address[0]) if address is not None else ""
        same = [task for task, other in self._greeting.items() if other == host]
        if len(same) >= ADDRESS_LIMIT + 2 * len(self._targets):
            self._drop(same[0])
        elif len(self._greeting) >= TOTAL_LIMIT:
            self._drop(next(iter(self._greeting)))
        task = asyncio.get_running_loop().create_task(self._greet(sock, address))
        self._greeting[task] = host
        task.add_done_callback(lambda done: self._greeting.pop(done, None))

    def _drop(self, task: asyncio.Task[None]) -> None:
        self._complaints.warning("too many unfinished connections from %s", self._greeting[task] or "a Unix socket")
        del self._greeting[task]
        task.cancel()

    async def _greet(self, sock: socket.socket, address: tuple[Any, ...] | None) -> None:
        """One connection, until it is closed, waits for another one, or is handed over."""
        peer = peer_text(address)
        try:
            if await self._serve(sock, address, peer):
                return
        except TimeoutError:
            self._complaints.warning("%s connected and sent no whole request in time", peer)
        except OSError as error:
            self._complaints.warning("%s connected, but: %s", peer, error.strerror)
        except HastError as error:
            self._complaints.warning("%s connected, but: %s", peer, error)
        except BaseException:
            sock.close()
            raise
        sock.close()

    async def _serve(self, sock: socket.socket, address: tuple[Any, ...] | None, peer: str) -> bool:
        """Whether the socket is used from now on. Raises HastError, OSError."""
        if address is None:
            if not _is_own_user(sock):
                self._complaints.warning("%s: another user connected, and is not let in", peer)
                return False
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        names = await self._access.resources_of(None if address is None else str(address[0]))
        if not names:
            self._complaints.warning("%s connected, but is no resource's remote: it is not let in", peer)
            return False
        timeouts = [target.resource.timeout for name in names if (target := self._targets.get(name)) is not None]
        async with asyncio.timeout(max(timeouts, default=0)):
            hello = handshake.read_hello((await read_message(sock))[1])
            target = self._targets.get(hello.resource)
            refusal = handshake.refuse(target.role if target is not None else None, hello.resource in names)
            if target is None or refusal is not None:
                assert refusal is not None
                return await self._refuse(sock, peer, hello.resource, refusal)
            if isinstance(hello, Notice):
                message = {"cmd": "notice", "token": hello.token.hex(), "word": hello.word, "peer": peer}
                target.hand_over(message, [sock.fileno()])
                return False
            if isinstance(hello, Handshake1Request):
                return await self._first(sock, peer, target, hello)
            return await self._second(sock, peer, target, hello)

    async def _refuse(self, sock: socket.socket, peer: str, resource: str, refusal: Refusal) -> bool:
        self._complaints.warning("%s: connection of %s refused: %s", printable(resource[:64]), peer, refusal.errmsg)
        await write_all(sock, handshake.refusal_message(refusal))
        return False

    async def _first(self, sock: socket.socket, peer: str, target: Target, request: Handshake1Request) -> bool:
        """Step 1: whatever there was is over, and this connection waits for the second one."""
        name, seconds = target.resource.name, target.resource.timeout
        self.forget(name)
        target.disconnect()
        token = secrets.token_bytes(TOKEN_SIZE)
        version, message = handshake.accept_first(request, token)
        timer = asyncio.get_running_loop().call_later(seconds, self._expired, name)
        # Before the answer is sent: whoever has it may connect again at once.
        self._half_open[name] = half = HalfOpen(sock, peer, version, token, timer)
        log.debug("%s: first connection of %s, version %d", name, peer, version)
        try:
            await write_all(sock, message)
        except BaseException:
            if self._half_open.get(name) is half:
                self.forget(name)
            raise
        return True

    def _expired(self, name: str) -> None:
        half = self._half_open[name]
        self._complaints.warning("%s: %s did not open its second connection in time", name, half.peer)
        self.forget(name)

    async def _second(self, sock: socket.socket, peer: str, target: Target, request: Handshake2Request) -> bool:
        """Step 2: with the right token, both connections go to the worker."""
        name = target.resource.name
        half = self._half_open.get(name)
        refusal = handshake.check_token(request, half.token if half is not None else None)
        if half is None or refusal is not None:
            assert refusal is not None
            return await self._refuse(sock, peer, name, refusal)
        message = {
            "cmd": "connection",
            "version": half.version,
            "request": handshake.request_to_dict(request),
            "peer": peer,
        }
        try:
            target.hand_over(message, [half.socket.fileno(), sock.fileno()])
        finally:
            self.forget(name)  # the worker has copies, or nobody has
        log.debug("%s: %s asks for a connection, protocol version %d", name, peer, half.version)
        return False


def peer_text(address: tuple[Any, ...] | None) -> str:
    """A peer's address for messages; None is one on a Unix socket."""
    if address is None:
        return "a peer on a Unix socket"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_own_user(sock: socket.socket) -> bool:
    """Whether the process at the other end is root's or of the user that owns the listening socket's file."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # the mode of the socket has to do
    with suppress(OSError):
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return uid in (0, os.geteuid())
    return False
