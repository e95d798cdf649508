"""A raw NBD client for tests: says what it is told to, right or wrong, and reads replies of both kinds."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW = 1, 5, 22, 28, 75
OPT_STRUCTURED, OPT_GO, OPT_ABORT = 8, 7, 2
OPTION_MAGIC, REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
DEADLINE = 60.0  # seconds: for any single receive


@dataclass
class Answer:
    """What came back for one request: `chunks` are (offset, data) of a structured reply; offset -1: simple."""

    error: int = 0
    chunks: list[tuple[int, bytes]] = field(default_factory=list)

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in sorted(self.chunks))


def option(number: int, data: bytes = b"") -> bytes:
    return OPTION_MAGIC + struct.pack(">II", number, len(data)) + data


def go(name: bytes = b"", *infos: int) -> bytes:
    wanted = struct.pack(f">H{len(infos)}H", len(infos), *infos)
    return option(OPT_GO, struct.pack(">I", len(name)) + name + wanted)


def request(kind: int, offset: int, length: int, cookie: int, flags: int = 0, magic: int = 0x25609513) -> bytes:
    return struct.pack(">IHHQQI", magic, flags, kind, cookie, offset, length)


class RawClient:
    """A connection in the transmission phase (or before it, with negotiate=False)."""

    def __init__(
        self, path: Path | str, structured: bool = True, negotiate: bool = True, receive_buffer: int = 0
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.connect(str(path))
        self.structured = False
        self.size = self.flags = 0
        self.lengths: dict[int, int] = {}  # of reads under way, which simple replies do not tell
        self.cookie = 0
        if negotiate:
            self.negotiate(structured)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def negotiate(self, structured: bool) -> None:
        assert self.receive(18) == b"NBDMAGIC" + OPTION_MAGIC + b"\0\3"
        self.sock.sendall(struct.pack(">I", 3))
        if structured:
            self.sock.sendall(option(OPT_STRUCTURED))
            self.structured = self.option_reply()[0] == 1
        self.sock.sendall(go())
        while True:
            kind, data = self.option_reply()
            if kind == 1:
                return
            assert kind == 3, f"option reply {kind:#x}: {data!r}"
            if data[:2] == b"\0\0":
                self.size, self.flags = struct.unpack(">QH", data[2:])

    def option_reply(self) -> tuple[int, bytes]:
        magic, _, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == REPLY_MAGIC
        return kind, self.receive(length)

    def receive(self, count: int) -> bytes:
        """Exactly so many bytes. Raises EOFError when the server closes before."""
        buffer = bytearray(count)
        view, have = memoryview(buffer), 0
        while have < count:
            n = self.sock.recv_into(view[have:])
            if n == 0:
                raise EOFError(f"closed after {have} of {count} bytes")
            have += n
        return bytes(buffer)

    def closed_by_server(self) -> bool:
        """Whether the server closes; whatever it still had to say is read away."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass
        return True

    # ---- requests ----

    def start(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> int:
        """Send a request; its cookie."""
        self.cookie += 1
        if kind == READ:
            self.lengths[self.cookie] = length
        self.sock.sendall(request(kind, offset, length, self.cookie, flags) + payload)
        return self.cookie

    def wait(self, count: int = 1) -> dict[int, Answer]:
        """Replies until `count` requests are answered, by cookie."""
        open_: dict[int, Answer] = {}
        done: dict[int, Answer] = {}
        while len(done) < count:
            cookie, last = self._message(open_)
            if last:
                done[cookie] = open_.pop(cookie)
        assert not open_, "a reply is not complete while others are asked for"
        return done

    def _message(self, open_: dict[int, Answer]) -> tuple[int, bool]:
        (magic,) = struct.unpack(">I", self.receive(4))
        if magic == 0x67446698:
            error, cookie = struct.unpack(">IQ", self.receive(12))
            length = self.lengths.pop(cookie, 0) if not error else 0
            assert not (length and self.structured), "a simple reply with data"
            open_[cookie] = Answer(error, [(-1, self.receive(length))] if length else [])
            return cookie, True
        assert magic == 0x668E33EF and self.structured, f"magic {magic:#x}"
        flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        answer = open_.setdefault(cookie, Answer())
        body = self.receive(length)
        if kind == 1:
            answer.chunks.append((struct.unpack(">Q", body[:8])[0], body[8:]))
        elif kind >= 0x8000:
            answer.error = struct.unpack(">I", body[:4])[0]
        else:
            assert kind == 0 and flags & 1 and not body
        return cookie, bool(flags & 1)

    def do(self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b"") -> Answer:
        """One request and its answer."""
        cookie = self.start(kind, offset, length, flags, payload)
        return self.wait()[cookie]

    def read(self, offset: int, length: int) -> bytes:
        answer = self.do(READ, offset, length)
        assert answer.error == 0
        assert len(answer.data) == length
        return answer.data

    def write(self, offset: int, data: bytes, flags: int = 0) -> int:
        return self.do(WRITE, offset, len(data), flags, data).error
