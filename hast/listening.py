"""The sockets at which a node waits for its peers: `listen` of hast.conf.

Invariants:
- An address that cannot be listened on is an error with a reason, but for a protocol that this kernel lacks when the
  address was not asked for: then the other default has to do.
- A Unix socket that a hastd left behind is replaced, one that answers is not; and it is open to its owner alone.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hast.address import Address
from hast.config import DEFAULT_LISTEN
from hast.errors import HastError, PermissionDeniedError, SystemCallError, TemporaryError, UnavailableError

log = logging.getLogger(__name__)

BACKLOG = 128
NO_PROTOCOL = (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.EADDRNOTAVAIL)


@dataclass(frozen=True)
class Listening:
    """One listening socket, non-blocking, and the `listen` that asked for it."""

    address: Address
    socket: socket.socket
    inode: int = 0  # of a Unix socket's file

    def close(self) -> None:
        """Close it; the file of a Unix socket goes too, unless it is somebody else's by now."""
        if self.address.is_unix:
            path = Path(self.address.path)
            with suppress(OSError):
                if path.lstat().st_ino == self.inode:
                    path.unlink()
        self.socket.close()


def listen_all(addresses: Sequence[Address]) -> list[Listening]:
    """Sockets for all of `addresses`; none is open when one cannot be. Names are looked up, which may block.

    Raises TemporaryError (in use), UnavailableError (not an address of this machine), PermissionDeniedError,
    SystemCallError.
    """
    defaults = tuple(addresses) == DEFAULT_LISTEN
    opened: list[Listening] = []
    missing: list[HastError] = []
    try:
        for address in addresses:
            try:
                opened += listen(address)
            except UnavailableError as error:
                if not defaults:
                    raise
                log.debug("%s", error)
                missing.append(error)
        if missing and not opened:
            raise missing[0]
    except BaseException:
        close_all(opened)
        raise
    return opened


def close_all(opened: Sequence[Listening]) -> None:
    """Close each of them."""
    for listening in opened:
        listening.close()


def listen(address: Address) -> list[Listening]:
    """The sockets for one `listen`: more than one where a name has several addresses. Raises as listen_all()."""
    if address.is_unix:
        return [_listen_unix(address)]
    try:
        found = socket.getaddrinfo(
            address.host, address.port, address.family, socket.SOCK_STREAM, 0, socket.AI_PASSIVE
        )
    except OSError as error:
        raise UnavailableError(f"cannot listen on {address}: {error.strerror}") from error
    opened: list[Listening] = []
    try:
        for family, _, _, _, sockaddr in dict.fromkeys(found):
            opened.append(_listen_tcp(address, family, sockaddr))
    except BaseException:
        close_all(opened)
        raise
    return opened


def _listen_tcp(address: Address, family: int, sockaddr: tuple[Any, ...]) -> Listening:
    try:
        sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    except OSError as error:
        raise _error(address, error) from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Else [::] would be 0.0.0.0 as well, which has a socket of its own.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(sockaddr)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise _error(address, error) from error
    return Listening(address, sock)


def _listen_unix(address: Address) -> Listening:
    path = Path(address.path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    previous = os.umask(0o177)  # never reachable for others, not even between bind and chmod
    try:
        _remove_stale(path)
        sock.bind(address.path)
        path.chmod(0o600)
        sock.listen(BACKLOG)
        return Listening(address, sock, path.lstat().st_ino)
    except OSError as error:
        sock.close()
        raise _error(address, error) from error
    finally:
        os.umask(previous)


def _remove_stale(path: Path) -> None:
    """Take away the socket of a hastd that is gone. Raises OSError when it is not gone, or that is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "something else is there, no socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
            probe.setblocking(False)
            with suppress(BlockingIOError):  # a full backlog is an answer as well
                probe.connect(str(path))
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        with suppress(FileNotFoundError):
            path.unlink()


def _error(address: Address, error: OSError) -> HastError:
    text = f"cannot listen on {address}: {error.strerror}"
    if error.errno == errno.EADDRINUSE:
        return TemporaryError(f"{text}: another hastd, or another program, listens there")
    if error.errno in NO_PROTOCOL:
        return UnavailableError(f"{text}: check 'listen' in hast.conf")
    if isinstance(error, PermissionError):
        return PermissionDeniedError(text)
    return SystemCallError(text)
