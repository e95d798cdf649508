"""A client of the control socket: one request, one reply (docs/protocol.md section 7).

Invariants:
- No call waits longer than its time limit, however hastd behaves.
- The reply is read whole or refused; nothing is allocated by a size that was not checked.
"""

from __future__ import annotations

import socket
import time

from hast.address import Address
from hast.control import VERSION, error_text
from hast.errors import ConfigError, HastError, ProtocolError, SystemCallError, UnavailableError
from hast.framing import HANDSHAKE_LIMIT, MAIN_HEADER, REQUEST_LIMIT, pack_message, parse_main_header
from hast.nv import Nv, decode

CHUNK = 65536
BUSY_SECONDS = 0.02  # between attempts while hastd has no room for more clients


class RefusedError(HastError):
    """hastd refused the request as a whole."""


class ControlClient:
    """A connection to hastd for one request. `timeout` in seconds, for all of it together."""

    def __init__(self, address: Address, timeout: float) -> None:
        if not address.is_unix:
            raise ConfigError(f"control {address}: hastd listens to hastctl on Unix sockets only")
        self.path = address.path
        self._deadline = time.monotonic() + timeout
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def __enter__(self) -> ControlClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def connect(self) -> None:
        """Raises SystemCallError, whose exit code is that of FreeBSD's hastctl."""
        try:
            while not self._try_connect():
                time.sleep(BUSY_SECONDS)
        except OSError as error:
            hint = ": is hastd running?" if isinstance(error, FileNotFoundError | ConnectionRefusedError) else ""
            raise SystemCallError(
                f"cannot connect to hastd through {self.path}: {error.strerror or error}{hint}"
            ) from error

    def _try_connect(self) -> bool:
        """Whether there was room for one more client. Raises OSError."""
        self._limit()
        try:
            self._socket.connect(self.path)
        except BlockingIOError:
            return False  # a Unix socket with a time limit does not wait for room
        return True

    def request(self, nv: Nv) -> Nv:
        """Send a request, return the reply.

        Raises UnavailableError when hastd hangs up or does not answer in time, ProtocolError or DataError
        when it answers something that is no reply, RefusedError when it refuses.
        """
        try:
            self._limit()
            self._socket.sendall(pack_message(VERSION, nv, limit=REQUEST_LIMIT))
            main = parse_main_header(self._read(MAIN_HEADER.size), HANDSHAKE_LIMIT, VERSION)
            reply = decode(self._read(main.size))
        except OSError as error:
            raise UnavailableError(f"no answer from hastd through {self.path}: {error.strerror or error}") from error
        error_number = reply.get_int16("error", 0)
        if error_number:
            why = reply.get_string("errmsg", "") or error_text(error_number)
            raise RefusedError(f"hastd refuses the request: {why} (error {error_number})")
        return reply

    def wait_closed(self) -> None:
        """Wait until hastd has closed the connection. Raises UnavailableError when that takes too long."""
        try:
            self._limit()
            if self._socket.recv(1):
                raise ProtocolError("hastd says more than a reply")
        except TimeoutError:
            raise UnavailableError("hastd does not end in time: see its log for what it waits for") from None
        except OSError:
            pass  # it was killed: that is an end as well

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._limit()
            part = self._socket.recv(min(size - len(data), CHUNK))
            if not part:
                raise ConnectionError(f"it hung up after {len(data)} of {size} bytes")
            data += part
        return bytes(data)

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
