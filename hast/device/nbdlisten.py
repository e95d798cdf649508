"""The NBD socket of a resource: accepts clients, negotiates with each, hands the connection over.

Invariants:
- The socket appears under its name complete: bound, mode 0600, listening. It replaces a dead one, never one
  that somebody serves, and never a file that is no socket.
- Nothing is read from a client beyond the negotiation: what follows belongs to the ggate stage.
- At most `clients` negotiations run at once, each at most `timeout` seconds. The oldest makes room for one more when it
  has had `grace` seconds; until then those who come wait in the kernel's queue.
- A connection has one owner: this module until `on_client` has returned, from then on whoever was called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hast.complaints import Complaints
from hast.device.nbd import NbdExport, NbdLimits, NbdNegotiation, State
from hast.errors import ProtocolError, SystemCallError, TemporaryError, refusal

# Flags of a client that goes to the ggate stage; the same numbers as in hast/ffi/nbd.h.
CLIENT_STRUCTURED = 1
CLIENT_READONLY = 2

MAX_PATH = 107  # bytes: the room of sun_path, without its NUL
CHUNK = 4096
BACKLOG = 128
ACCEPT_AT_ONCE = 16  # then others have their turn
RETRY_ACCEPT = 1.0  # seconds, after accept failed: out of descriptors or memory

log = logging.getLogger(__name__)

ClientHandler = Callable[[socket.socket, int], None]


@dataclass
class NbdListener:
    """Serves negotiations for one export on the Unix socket `path`.

    `on_client(connection, flags)` is called for each client that enters the transmission phase, and owns
    the connection (non-blocking) unless it raises. `timeout` and `grace` are in seconds.
    """

    path: Path
    export: NbdExport
    on_client: ClientHandler
    limits: NbdLimits = field(default_factory=NbdLimits)
    clients: int = 64
    timeout: float = 10.0
    grace: float = 1.0
    _socket: socket.socket | None = None
    _inode: tuple[int, int] = (0, 0)
    _tasks: dict[asyncio.Task[bool], float] = field(default_factory=dict)  # by age: when each began
    _accepting: bool = False
    _retry: asyncio.TimerHandle | None = None
    _full: bool = False  # that is what _retry waits for: room
    _complaints: Complaints = field(default_factory=lambda: Complaints(log))

    async def start(self) -> None:
        """Make the socket and begin to accept. Raises TemporaryError when somebody serves it already, and
        SystemCallError when it cannot be made."""
        self._socket = bind_unix(self.path)
        made = self.path.lstat()
        self._inode = (made.st_dev, made.st_ino)
        self._accept_on()

    async def close(self) -> None:
        """Stop accepting, end the negotiations under way, remove the socket if it is still ours."""
        if self._socket is None:
            return
        self._accept_off()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        with contextlib.suppress(FileNotFoundError):
            found = self.path.lstat()
            if (found.st_dev, found.st_ino) == self._inode:
                self.path.unlink()
        self._socket.close()
        self._socket = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def negotiating(self) -> int:
        """Clients in negotiation now."""
        return len(self._tasks)

    def _accept_on(self) -> None:
        if self._socket is not None and not self._accepting:
            asyncio.get_running_loop().add_reader(self._socket, self._accept)
            self._accepting = True

    def _accept_off(self) -> None:
        if self._socket is not None and self._accepting:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._accepting = False

    def _accept(self) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        for _ in range(ACCEPT_AT_ONCE):
            if not self._make_room(loop.time()):
                return
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._accept_failed(error)
                return
            connection.setblocking(False)
            task = loop.create_task(self._client(connection))
            self._tasks[task] = loop.time()
            task.add_done_callback(partial(self._client_done, connection))

    def _make_room(self, now: float) -> bool:
        """Whether one more may negotiate: now, or else it is tried again when the oldest may be closed."""
        if len(self._tasks) < self.clients:
            return True
        task, began = next(iter(self._tasks.items()))
        if now - began < self.grace:
            self._accept_later(began + self.grace - now)
            self._full = True
            return False
        self._complaints.warning("%d NBD clients negotiate on %s: the oldest is closed", self.clients, self.path)
        del self._tasks[task]
        task.cancel()
        return True

    def _accept_failed(self, error: OSError) -> None:
        """The listening socket stays readable: without a pause this would spin."""
        log.warning("cannot accept NBD clients on %s: %s", self.path, error.strerror)
        self._accept_later(RETRY_ACCEPT)

    def _accept_later(self, seconds: float) -> None:
        self._accept_off()
        self._retry = asyncio.get_running_loop().call_later(seconds, self._accept_again)

    def _accept_again(self) -> None:
        self._retry, self._full = None, False
        self._accept_on()

    def _client_done(self, connection: socket.socket, task: asyncio.Task[bool]) -> None:
        """Also for a task that was cancelled before it has run at all."""
        self._tasks.pop(task, None)
        if self._full and self._retry is not None:
            self._retry.cancel()
            self._accept_again()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._complaints.warning("NBD client on %s: %s", self.path, error)
        if task.cancelled() or error is not None or not task.result():
            connection.close()

    async def _client(self, connection: socket.socket) -> bool:
        """Whether the connection was handed over."""
        negotiation = NbdNegotiation(self.export, self.limits)
        try:
            async with asyncio.timeout(self.timeout):
                await converse(connection, negotiation)
            if negotiation.result is not None:
                self.on_client(connection, client_flags(negotiation))
                return True
        except TimeoutError:
            self._complaints.warning(
                "NBD client on %s did not finish its negotiation in %g s", self.path, self.timeout
            )
        except ProtocolError as error:
            self._complaints.warning("%s (on %s)", error, self.path)
        except OSError as error:
            log.debug("NBD client on %s: %s", self.path, error.strerror)
        return False


def client_flags(negotiation: NbdNegotiation) -> int:
    """What the ggate stage has to know of a client (hast/ffi/nbd.h)."""
    assert negotiation.result is not None
    flags = CLIENT_STRUCTURED if negotiation.result.structured else 0
    return flags | (CLIENT_READONLY if negotiation.result.export.read_only else 0)


async def converse(connection: socket.socket, negotiation: NbdNegotiation) -> None:
    """Carry a negotiation over a non-blocking socket until it has ended; a client that leaves ends it too.

    Raises ProtocolError and OSError. Reads only what the client may send: plain receives and no stream, which
    would read ahead into the transmission phase.
    """
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, negotiation.greeting())
    while not negotiation.ended:
        data = await loop.sock_recv(connection, CHUNK)
        if not data:
            negotiation.state = State.ABORTED
            return
        replies = negotiation.feed(data)
        if replies:
            await loop.sock_sendall(connection, b"".join(replies))


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket, non-blocking, mode 0600, under `path`, whose directory must exist.

    Made under another name and renamed, so that no client meets it half made, and a dead socket of an
    earlier run is replaced in one step. Raises TemporaryError and SystemCallError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    if len(os.fsencode(temporary)) > MAX_PATH:
        raise SystemCallError(
            f"cannot make NBD socket {path}: the path is longer than {MAX_PATH} bytes "
            "with the name it is made under; choose a shorter rundir"
        )
    check_replaceable(path)
    listener = _unix_socket(path)
    try:
        temporary.unlink(missing_ok=True)
        listener.bind(os.fspath(temporary))
        temporary.chmod(0o600)  # before listen(): until then nobody can connect
        listener.listen(BACKLOG)
        listener.setblocking(False)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise refusal(f"cannot make NBD socket {path}: {error.strerror}", error.errno) from error
    return listener


def _unix_socket(path: Path) -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise refusal(f"cannot make NBD socket {path}: {error.strerror}", error.errno) from error


def check_replaceable(path: Path) -> None:
    """Raise unless `path` is free or a socket that nobody listens on."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise SystemCallError(f"cannot make NBD socket {path}: {error.strerror}") from error
    if not stat.S_ISSOCK(mode):
        raise SystemCallError(f"cannot make NBD socket {path}: there is a file that is no socket; remove it")
    with _unix_socket(path) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
        except OSError as error:
            raise SystemCallError(f"cannot make NBD socket {path}: {error.strerror}") from error
    raise TemporaryError(f"cannot make NBD socket {path}: another hastd is serving it")
