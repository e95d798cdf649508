"""Control messages between a parent and its child: a SOCK_SEQPACKET Unix socket pair.

Invariants:
- One packet is one message: a JSON object of at most MAX_MESSAGE bytes, with at most MAX_FDS descriptors.
- A descriptor that is received is close-on-exec and belongs to the caller, or is closed here: none leaks.
- send() never waits: a child that does not read must not stop its parent.
- End of file means that the other process is gone. A process keeps its own end only, so that this stays true.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hast.errors import ProtocolError, TemporaryError, UnavailableError, refusal

MAX_MESSAGE = 64 * 1024  # bytes of JSON
MAX_FDS = 16  # descriptors attached to one message
SOCKET_BUFFER = 512 * 1024  # bytes asked for: several of the largest messages fit

_FD = struct.Struct("i")
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)

Message = dict[str, Any]
Received = tuple[Message, list[int]]


class ChannelClosedError(UnavailableError):
    """The process at the other end is gone, or this end was closed."""


class ChannelFullError(TemporaryError):
    """The process at the other end has stopped reading its messages."""


class DescriptorsLostError(ProtocolError):
    """Some descriptors of a message were lost: there were too many, or none is free here. `message` is the rest."""

    def __init__(self, name: str, message: Message) -> None:
        super().__init__(f"{name}: descriptors were lost: there were too many, or none is free")
        self.message = message


class Channel:
    """One end of a channel. `name` says in errors who is at the other end.

    A channel of a stage's C pump is watched there by fileno(); its messages are read here.
    """

    def __init__(self, sock: socket.socket, name: str = "control channel") -> None:
        sock.setblocking(False)
        self._sock = sock
        self.name = name

    @classmethod
    def pair(cls, name: str = "control channel") -> tuple[Channel, Channel]:
        """Two connected ends, both close-on-exec. Raises TemporaryError, SystemCallError."""
        try:
            ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise refusal(f"{name}: cannot make a socket pair: {error.strerror}", error.errno) from error
        for end in ends:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                # The system may give less; the default still holds one message of MAX_MESSAGE bytes.
                end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
        return cls(ends[0], name), cls(ends[1], name)

    @classmethod
    def from_fd(cls, fd: int, name: str = "control channel") -> Channel:
        """The end whose descriptor `fd` was received or inherited; the channel owns it from now on."""
        return cls(socket.socket(fileno=fd), name)

    def fileno(self) -> int:
        """The descriptor, for poll or to pass it on; -1 after close()."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        return self._sock.fileno() < 0

    def close(self) -> None:
        """Close this end; the other one reads end of file. May be called again."""
        self._sock.close()

    def detach(self) -> int:
        """Give the descriptor away; this object is closed afterwards."""
        return self._sock.detach()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message, and copies of the descriptors `fds`; never waits.

        Raises ChannelClosedError when the other end is gone, ChannelFullError when it does not read,
        ProtocolError when the message is too large, TemporaryError or SystemCallError for the rest.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MAX_MESSAGE or len(fds) > MAX_FDS:
            raise ProtocolError(
                f"{self.name}: message of {len(data)} bytes with {len(fds)} descriptors is too large,"
                f" {MAX_MESSAGE} and {MAX_FDS} are the limits"
            )
        if self.closed:
            raise ChannelClosedError(f"{self.name}: it is closed")
        rights = b"".join(_FD.pack(fd) for fd in fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if fds else []
        try:
            self._sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            raise ChannelFullError(f"{self.name}: the other process does not read its messages") from None
        except OSError as error:
            if error.errno in _GONE:
                raise ChannelClosedError(f"{self.name}: the other process is gone") from None
            raise refusal(f"{self.name}: cannot send: {error.strerror}", error.errno) from error

    def recv(self, timeout: float | None = None) -> Received | None:
        """The next message and its descriptors, which the caller closes; None at end of file.

        `timeout` in seconds: None waits for as long as it takes, 0 takes only what is there. Raises
        TimeoutError when it is over, ProtocolError for a packet that is no message (its descriptors are
        closed, later messages can still be read), ChannelClosedError after close(), SystemCallError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self.closed:
                raise ChannelClosedError(f"{self.name}: it is closed")
            try:
                return self._receive()
            except BlockingIOError:
                self._wait(deadline)

    async def arecv(self, loop: asyncio.AbstractEventLoop | None = None) -> Received | None:
        """recv() that waits in the event loop; one reader at a time. Cancelling it loses no message."""
        loop = loop or asyncio.get_running_loop()
        while True:
            if self.closed:
                raise ChannelClosedError(f"{self.name}: it is closed")
            try:
                return self._receive()
            except BlockingIOError:
                await _readable(loop, self.fileno())

    def _wait(self, deadline: float | None) -> None:
        """Wait until there is something to read. Raises TimeoutError."""
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        if not poll.poll(None if left is None else left * 1000):
            raise TimeoutError(f"{self.name}: no message in time")

    def _packet(self) -> Any:
        asked = MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * _FD.size), socket.MSG_CMSG_CLOEXEC
        try:
            return self._sock.recvmsg(*asked)
        except ConnectionResetError:
            # The other side went without reading all that it was sent. That is told once, and before its last words.
            return self._sock.recvmsg(*asked)

    def _receive(self) -> Received | None:
        """What is there now. Raises BlockingIOError when nothing is, else as recv() does."""
        try:
            data, ancillary, flags, _ = self._packet()
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno in _GONE:
                return None
            raise refusal(f"{self.name}: cannot receive: {error.strerror}", error.errno) from error
        fds = _descriptors(ancillary)
        try:
            if not data and not fds:
                return None  # messages are never empty: this is end of file
            return self._decode(data, flags), fds
        except ProtocolError:
            close_all(fds)
            raise

    def _decode(self, data: bytes, flags: int) -> Message:
        if flags & socket.MSG_TRUNC:
            raise ProtocolError(f"{self.name}: message is larger than {MAX_MESSAGE} bytes")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"{self.name}: message is not JSON: {error}") from None
        if not isinstance(message, dict):
            raise ProtocolError(f"{self.name}: message is not a JSON object")
        if flags & socket.MSG_CTRUNC:
            raise DescriptorsLostError(self.name, message)
        return message


def close_all(fds: Sequence[int]) -> None:
    """Close descriptors that nobody wants."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    """All descriptors of the control messages; the kernel's padding at the end is ignored."""
    fds: list[int] = []
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % _FD.size
            fds.extend(fd for (fd,) in _FD.iter_unpack(data[:whole]))
    return fds


async def _readable(loop: asyncio.AbstractEventLoop, fd: int) -> None:
    """Wait until fd can be read."""
    ready = loop.create_future()

    def is_readable() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(fd, is_readable)
    try:
        await ready
    finally:
        loop.remove_reader(fd)
