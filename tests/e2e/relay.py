"""A TCP relay to put between two nodes: counts what goes through it, and can be the network that fails.

Invariants:
- Bytes arrive in order or not at all: a connection that has lost some does not outlive the trouble, heal() ends it.
- What was held back arrives late, also when who sent it is gone, as packets do after a partition.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass

CHUNK = 256 << 10


@dataclass
class Way:
    """What becomes of bytes in one direction. hold: nothing is taken (the sender's buffers fill), it arrives after
    heal(). swallow: it is taken and thrown away. delay: seconds for each portion. rate: bytes per second, 0: as fast as
    can be. cut_after: so many bytes more, and all connections are cut, in the middle of whatever comes then."""

    hold: bool = False
    swallow: bool = False
    delay: float = 0.0
    rate: float = 0.0
    cut_after: int | None = None


class Relay:
    """Listens on `address`, a loopback one of its own: `url` is what a node's `remote` is to be.

    target() says whom to connect to, and from which address, so that the other node knows its peer. `sent` and
    `received` are bytes from and to the one who connected, over all connections; `there` and `back` what happens to
    them: trouble() and heal(). `allowed`: how many more connections get through, None: all.
    """

    def __init__(self, address: str) -> None:
        self._server = socket.create_server((address, 0), backlog=64)
        self.address = address
        self.url = f"tcp4://{address}:{self._server.getsockname()[1]}"
        self._target: tuple[str, int] | None = None
        self._source = ""
        self._changed = threading.Condition()
        self._pairs: set[tuple[socket.socket, socket.socket]] = set()
        self._spoilt: set[tuple[socket.socket, socket.socket]] = set()  # these have lost bytes
        self._closed = False
        self.there, self.back = Way(), Way()
        self.sent = self.received = 0
        self.allowed: int | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def target(self, address: str, source: str, port: int = 8457) -> None:
        self._target, self._source = (address, port), source

    def reset(self) -> None:
        """Count from nothing."""
        with self._changed:
            self.sent = self.received = 0

    # ---- trouble ----

    def cut(self) -> None:
        """End all connections there are, in the middle of whatever they carry."""
        with self._changed:
            pairs, self._pairs = self._pairs, set()
            self._spoilt.clear()
            self._changed.notify_all()
        for pair in pairs:
            for sock in pair:
                _end(sock)

    def trouble(self, there: Way | None = None, back: Way | None = None) -> None:
        """From now on, until heal()."""
        with self._changed:
            self.there, self.back = there or self.there, back or self.back
            self._changed.notify_all()

    def heal(self) -> None:
        """All is well: what was held back arrives; connections that have lost bytes end."""
        with self._changed:
            self.there, self.back = Way(), Way()
            spoilt, self._spoilt = self._spoilt, set()
            self._pairs -= spoilt
            self._changed.notify_all()
        for pair in spoilt:
            for sock in pair:
                _end(sock)

    def forget(self, near: bool) -> None:
        """Half-open: the one who connected (near), or the other one, sees the end of its connections; its peer hears
        nothing of that, and what it sends is swallowed, until heal()."""
        with self._changed:
            pairs = list(self._pairs)
            self._spoilt |= self._pairs
            self._changed.notify_all()
        for pair in pairs:
            _end(pair[0] if near else pair[1])

    def close(self) -> None:
        with self._changed:
            self._closed = True
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    # ---- what it does all day ----

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                if self.allowed is not None:
                    self.allowed -= 1
                    if self.allowed < 0:
                        near.close()
                        continue
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            with self._changed:  # in trouble, who connects waits: it takes that for a peer that hangs
                self._changed.wait_for(self._passes)
            try:
                assert self._target is not None, "nobody said whom to connect to"
                far = socket.create_connection(self._target, 10, source_address=(self._source, 0))
            except OSError:
                return  # nobody is there: the one who connected sees it end
            with far:
                far.settimeout(None)
                pair = (near, far)
                with self._changed:
                    self._pairs.add(pair)
                for sock in pair:
                    with contextlib.suppress(OSError):
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                other = threading.Thread(target=self._pump, args=(pair, False), daemon=True)
                other.start()
                self._pump(pair, True)
                other.join()
                with self._changed:
                    self._pairs.discard(pair)
                    self._spoilt.discard(pair)

    def _passes(self) -> bool:
        ways = (self.there, self.back)
        return self._closed or not any(way.hold or way.swallow for way in ways)

    def _pump(self, pair: tuple[socket.socket, socket.socket], there: bool) -> None:
        source, sink = pair if there else pair[::-1]
        with contextlib.suppress(OSError):
            while self._ready(there) and (data := source.recv(CHUNK)):
                # Held back also when it came in just now.
                if self._ready(there) and not self._carry(data, pair, sink, there):
                    break
        with self._changed:
            spoilt = pair in self._spoilt
        if spoilt:  # the other one is not to know yet
            with self._changed:
                self._changed.wait_for(lambda: self._closed or pair not in self._spoilt)
        for sock in (source, sink):
            _end(sock)

    def _way(self, there: bool) -> Way:
        return self.there if there else self.back

    def _ready(self, there: bool) -> bool:
        """Wait while bytes are held back."""
        with self._changed:
            return bool(self._changed.wait_for(lambda: self._closed or not self._way(there).hold))

    def _carry(self, data: bytes, pair: tuple[socket.socket, socket.socket], sink: socket.socket, there: bool) -> bool:
        """One portion; False: the connections are cut."""
        way, cut = self._way(there), False
        with self._changed:
            if there:
                self.sent += len(data)
            else:
                self.received += len(data)
            if way.swallow or pair in self._spoilt:
                self._spoilt.add(pair)
                return True
            if way.cut_after is not None:
                if len(data) > way.cut_after:
                    data, cut, way.cut_after = data[: way.cut_after], True, None
                else:
                    way.cut_after -= len(data)
        if way.delay or way.rate:
            time.sleep(way.delay + (len(data) / way.rate if way.rate else 0.0))
        sink.sendall(data)
        if cut:
            self.cut()
        return not cut


def _end(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
