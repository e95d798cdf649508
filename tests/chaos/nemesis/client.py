"""An NBD client for a hunt: several connections, many requests under way, every answer held against a model.

It connects again when a connection dies, and takes what was unanswered for what may have happened or not. What it
cannot forgive is a complaint, after which it stops: wrong data, an error, an answer that is late.

Invariants:
- One thread sends, receives and keeps the model, so that what the model is told has the order in which it happened:
  a request is begun before its first byte is sent, and ended after its last byte has come.
- Time is held against the node only while nobody has it excused: excused().
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.nemesis.model import MUTATIONS, Kind, Model, Op, WrongDataError
from tests.nbdclient import FUA, RawClient, request

SIMPLE, STRUCTURED = 0x67446698, 0x668E33EF
NEGOTIATE_SECONDS = 3.0
RETRY_SECONDS = 0.05
TICK = 0.05
CHUNK = 1 << 20
JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class Load:
    """What the client does: requests under way on each connection, requests per second at most, the share of requests
    that go to the first `hot` cells, and how many cells the largest has."""

    connections: int = 2
    depth: int = 6
    pace: float = 600.0
    hot: int = 64
    hot_share: float = 0.4
    largest: int = 48


class Wire:
    """One connection: what is to be sent, what has come, what is under way."""

    def __init__(self, path: Path) -> None:
        raw = RawClient(path, negotiate=False)
        try:
            raw.sock.settimeout(NEGOTIATE_SECONDS)
            raw.negotiate(structured=True)
            raw.sock.setblocking(False)
        except BaseException:
            raw.close()
            raise
        self.sock = raw.sock
        self.out = bytearray()
        self.into = bytearray()
        self.open: dict[int, Op] = {}
        self.sent_at: dict[int, float] = {}
        self.chunks: dict[int, bytearray] = {}
        self.errors: dict[int, int] = {}

    def start(self, op: Op, cookie: int, offset: int, length: int, payload: bytes) -> None:
        self.open[cookie] = op
        self.sent_at[cookie] = time.monotonic()
        if op.kind == Kind.READ:
            self.chunks[cookie] = bytearray(length)
        flags = FUA if op.fua else 0
        self.out += request(op.kind, offset, length, cookie, flags) + payload

    def flush(self) -> None:
        if self.out:
            with contextlib.suppress(BlockingIOError):
                del self.out[: self.sock.send(self.out)]

    def receive(self) -> None:
        """All that is there. Raises EOFError, OSError."""
        with contextlib.suppress(BlockingIOError):
            data = self.sock.recv(CHUNK)
            if not data:
                raise EOFError("closed by the server")
            self.into += data

    def answers(self, offset_of: Callable[[Op], int]) -> Iterator[tuple[int, int, bytes]]:
        """Cookie, error and data of each request whose answer is complete."""
        while len(self.into) >= 16:
            (magic,) = struct.unpack_from(">I", self.into)
            if magic == SIMPLE:
                error, cookie = struct.unpack_from(">IQ", self.into, 4)
                assert error or cookie not in self.chunks, "a simple reply to a read"
                del self.into[:16]
                yield self._done(cookie, error)
                continue
            assert magic == STRUCTURED, f"magic {magic:#x}"
            if len(self.into) < 20:
                return
            flags, kind, cookie, length = struct.unpack_from(">HHQI", self.into, 4)
            if len(self.into) < 20 + length:
                return
            body = bytes(self.into[20 : 20 + length])
            del self.into[: 20 + length]
            if kind >= 0x8000:
                self.errors[cookie] = struct.unpack_from(">I", body)[0]
            elif kind:
                at = struct.unpack_from(">Q", body)[0] - offset_of(self.open[cookie])
                piece = body[8:] if kind == 1 else bytes(struct.unpack_from(">I", body, 8)[0])
                self.chunks[cookie][at : at + len(piece)] = piece
            if flags & 1:
                yield self._done(cookie, self.errors.pop(cookie, 0))

    def _done(self, cookie: int, error: int) -> tuple[int, int, bytes]:
        self.sent_at.pop(cookie)
        return cookie, error, bytes(self.chunks.pop(cookie, b""))


@dataclass
class Errors:
    """Answers with an error, for the checker to judge: when (monotonic), what it was, what was asked for."""

    found: list[tuple[float, int, str]] = field(default_factory=list)


class Client(threading.Thread):
    """Works on one resource of one node until stop(). `limit`: seconds that an answer, or a new connection, may take.

    `complaint` is the first thing that is wrong. `forgive(error)` says at once whether an error is legitimate.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        model: Model,
        seed: str,
        load: Load,
        limit: float,
        forgive: Callable[[int, str], bool],
        numbers: Iterator[int],
    ) -> None:
        super().__init__(daemon=True, name=name)
        self.path, self.model, self.load, self.limit, self.forgive = path, model, load, limit, forgive
        self.numbers = numbers
        self.rng = random.Random(seed)
        self.complaint = ""
        self.done = dict.fromkeys((Kind.READ, Kind.WRITE, Kind.FLUSH, Kind.TRIM, Kind.ZEROES), 0)
        self.reconnects = self.lost = self.errors = 0
        self.slowest = 0.0
        self._cookie = 0
        self._wires: list[Wire | None] = [None] * load.connections
        self._ending = threading.Event()
        self._quiet = threading.Event()  # start nothing more
        self._idle = threading.Event()
        self._lock = threading.Lock()
        self._excuses = 0
        self._excused_until = time.monotonic()
        self._unconnected_since = time.monotonic()

    # ---- for others ----

    @property
    def mutations(self) -> int:
        """How many were acknowledged."""
        return sum(self.done[kind] for kind in MUTATIONS)

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """While somebody does what keeps the node from answering, no answer is late."""
        with self._lock:
            self._excuses += 1
        try:
            yield
        finally:
            with self._lock:
                self._excuses -= 1
                self._excused_until = time.monotonic()

    def drain(self) -> bool:
        """Start nothing more, wait for what is under way; False when there was a complaint."""
        self._quiet.set()
        self._idle.wait(JOIN_SECONDS + self.limit)
        return not self.complaint

    def go_on(self) -> None:
        self._idle.clear()
        self._quiet.clear()

    def stop(self) -> None:
        """What is under way will never be answered."""
        self._ending.set()
        self.join(JOIN_SECONDS)
        assert not self.is_alive(), "the client's thread hangs"

    # ---- the thread ----

    def run(self) -> None:
        try:
            pause = 1.0 / self.load.pace
            turn = time.monotonic()
            while not self._ending.is_set() and not self.complaint:
                self._connect()
                if not self._quiet.is_set():
                    turn = self._fill(turn, pause)
                self._exchange(TICK if self._quiet.is_set() else min(TICK, pause * 4))
                self._judge_time()
                if self._quiet.is_set() and not any(wire and wire.open for wire in self._wires):
                    self._idle.set()
        except WrongDataError as error:
            self.complaint = f"wrong data: {error}"
        except Exception as error:  # a mistake of ours is told like one of theirs
            self.complaint = f"the client failed: {error!r}"
        finally:
            for n in range(len(self._wires)):
                self._drop(n)
            self._idle.set()

    def _connect(self) -> None:
        for n, wire in enumerate(self._wires):
            if wire is not None:
                continue
            try:
                self._wires[n] = Wire(self.path)
                self._unconnected_since = time.monotonic()
                self.reconnects += 1
            except (OSError, EOFError, AssertionError):
                if not any(self._wires):
                    time.sleep(RETRY_SECONDS)
                return

    def _drop(self, n: int) -> None:
        wire, self._wires[n] = self._wires[n], None
        if wire is not None:
            wire.sock.close()
            for op in wire.open.values():
                self.lost += 1
                self.model.lost(op)
            self._unconnected_since = time.monotonic()

    def _fill(self, turn: float, pause: float) -> float:
        """Start requests, no more than the pace allows. When the next one is due."""
        now = time.monotonic()
        turn = max(turn, now - TICK)
        ready = [w for w in self._wires if w is not None and len(w.open) < self.load.depth]
        while ready and turn <= now:
            wire = self.rng.choice(ready)
            self._start(wire)
            turn += pause
            ready = [w for w in ready if len(w.open) < self.load.depth]
        return turn

    def _start(self, wire: Wire) -> None:
        op = self._choose()
        self._cookie += 1
        self.model.begin(op)
        cell = self.model.cell
        payload = self.model.data(op) if op.kind == Kind.WRITE else b""
        wire.start(op, self._cookie, op.first * cell, op.count * cell, payload)
        with contextlib.suppress(OSError):
            wire.flush()

    def _choose(self) -> Op:
        rng, load = self.rng, self.load
        kind = rng.choices([Kind.WRITE, Kind.READ, Kind.FLUSH, Kind.TRIM, Kind.ZEROES], [56, 31, 4, 4, 5])[0]
        if kind == Kind.FLUSH:
            return Op(kind)
        count = rng.choices([1, rng.randint(2, 16), rng.randint(16, load.largest)], [60, 32, 8])[0]
        size = load.hot if rng.random() < load.hot_share else self.model.size
        first = rng.randrange(max(1, size - count))
        fua = kind != Kind.READ and rng.random() < 0.05
        value = next(self.numbers) if kind == Kind.WRITE else 0
        return Op(kind, first, min(count, self.model.size - first), fua, value)

    def _exchange(self, seconds: float) -> None:
        wires = {wire.sock.fileno(): n for n, wire in enumerate(self._wires) if wire is not None}
        if not wires:
            return
        poll = select.poll()
        for fd, n in wires.items():
            wire = self._wires[n]
            assert wire is not None
            poll.register(fd, select.POLLIN | (select.POLLOUT if wire.out else 0))
        for fd, _ in poll.poll(seconds * 1000):
            wire = self._wires[wires[fd]]
            assert wire is not None
            try:
                wire.flush()
                wire.receive()
            except (EOFError, OSError):
                self._take(wire)  # what came before the end counts
                self._drop(wires[fd])
                continue
            self._take(wire)

    def _take(self, wire: Wire) -> None:
        for cookie, error, data in wire.answers(lambda op: op.first * self.model.cell):
            op = wire.open.pop(cookie)
            if error:
                self.errors += 1
                self.model.lost(op)
                if not self.forgive(error, str(op)):
                    self.complaint = f"{op} was answered with error {error}"
            else:
                self.done[op.kind] += 1
                self.model.end(op, data)

    def _judge_time(self) -> None:
        now = time.monotonic()
        with self._lock:
            if self._excuses:
                return
            since = self._excused_until
        for wire in self._wires:
            if wire is None:
                if not any(self._wires) and now - max(self._unconnected_since, since) > self.limit:
                    self.complaint = f"no connection to {self.path.name} for {self.limit:g} s"
                continue
            for cookie, sent in wire.sent_at.items():
                late = now - max(sent, since)
                self.slowest = max(self.slowest, late)
                if late > self.limit:
                    self.complaint = f"{wire.open[cookie]} is not answered for {self.limit:g} s"
                    return


def read_all(path: Path, size: int, piece: int = CHUNK) -> bytes:
    """All data, by a connection of its own; AssertionError for an error."""
    with RawClient(path) as raw:
        return b"".join(raw.read(at, min(piece, size - at)) for at in range(0, size, piece))


def one_socket(path: Path) -> bool:
    """Whether somebody serves the socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(NEGOTIATE_SECONDS)
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True
