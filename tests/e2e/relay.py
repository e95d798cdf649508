"""A TCP relay to put between two nodes: counts what goes through it, and can be the network that fails."""

from __future__ import annotations

import contextlib
import socket
import threading

CHUNK = 256 << 10


class Relay:
    """Listens on `address`, a loopback one of its own: `url` is what a node's `remote` is to be.

    target() says whom to connect to, and from which address, so that the other node knows its peer. `sent` and
    `received` are bytes from and to the one who connected, over all connections.
    """

    def __init__(self, address: str) -> None:
        self._server = socket.create_server((address, 0), backlog=64)
        self.url = f"tcp4://{address}:{self._server.getsockname()[1]}"
        self._target: tuple[str, int] | None = None
        self._source = ""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.sent = self.received = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def target(self, address: str, source: str, port: int = 8457) -> None:
        self._target, self._source = (address, port), source

    def reset(self) -> None:
        """Count from nothing."""
        with self._lock:
            self.sent = self.received = 0

    def cut(self) -> None:
        """End all connections there are, in the middle of whatever they carry."""
        with self._lock:
            cut, self._open = self._open, set()
        for sock in cut:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            try:
                assert self._target is not None, "nobody said whom to connect to"
                far = socket.create_connection(self._target, 10, source_address=(self._source, 0))
            except OSError:
                return  # nobody is there: the one who connected sees it end
            with far:
                far.settimeout(None)
                with self._lock:
                    self._open |= {near, far}
                for sock in (near, far):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                back = threading.Thread(target=self._pump, args=(far, near, "received"), daemon=True)
                back.start()
                self._pump(near, far, "sent")
                back.join()
                with self._lock:
                    self._open -= {near, far}

    def _pump(self, source: socket.socket, sink: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                with self._lock:
                    setattr(self, counter, getattr(self, counter) + len(data))
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
