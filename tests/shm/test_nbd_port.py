"""NBD clients in the transmission phase (hast/ffi/nbd.c, nbd_reply.c), on real stages: right, wrong and hostile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nbdclient import (
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EOVERFLOW,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    RawClient,
    request,
)
from tests.shm.nbdserver import DATA_OFFSET, DEFAULTS

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
SIZE = DEFAULTS["datasize"]
DEADLINE = 60.0  # seconds


class Server:
    """nbdserver.py as a process."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.path = directory / "s"
        self.component = directory / "component"
        self.nclient = settings.get("nclient", DEFAULTS["nclient"])
        size = settings.pop("file_size", DATA_OFFSET + settings.get("datasize", SIZE))
        with self.component.open("wb") as file:
            file.truncate(size)
        command = [sys.executable, "-m", "tests.shm.nbdserver", str(self.path), str(self.component)]
        self.process = subprocess.Popen(
            [*command, json.dumps(settings)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.stdout, self.stdin = self.process.stdout, self.process.stdin
        assert self.stdout.readline() == "ready\n"

    def tell(self, **message: Any) -> None:
        self.stdin.write(json.dumps(message) + "\n")
        self.stdin.flush()

    def facts(self) -> dict[str, int]:
        self.tell(cmd="facts")
        return dict(json.loads(self.stdout.readline()))

    def stop(self) -> None:
        self.stdin.close()
        try:
            assert self.process.wait(DEADLINE) == 0
        finally:
            self.process.kill()
            self.process.wait()
            self.stdout.close()

    def client(self, **how: Any) -> RawClient:
        return RawClient(self.path, **how)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def make(**settings: Any) -> Server:
            server = Server(tmp_path, **settings)
            stack.callback(server.stop)
            return server

        yield make


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.005)


def all_given_back(server: Server, clients: int = 0) -> None:
    """No slot is held and no request is under way."""

    def calm() -> bool:
        facts = server.facts()
        return (facts["clients"], facts["quiet"], facts["inuse"]) == (clients, 1, 0)

    eventually(calm, "requests and slots come back")
    assert server.facts()["free"] == server.nclient


KINDS = pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
# Slots for many requests; for hardly more than one; slabs smaller than a small payload.
GEOMETRIES = pytest.mark.parametrize(
    "geometry",
    [{}, {"nclient": 8}, {"nclient": 16, "slab_size": 4096}],
    ids=["usual", "few slots", "small slabs"],
)


@KINDS
@GEOMETRIES
def test_any_length_comes_back(start: Callable[..., Server], structured: bool, geometry: dict[str, int]) -> None:
    server = start(**geometry)
    rng = random.Random(7)
    with server.client(structured=structured) as client:
        assert client.size == SIZE
        for length in (512, 4096, 32768, 33280, 65536, 131072, 131584, 2 * MIB, 2 * MIB + 512, 32 * MIB):
            offset = rng.randrange((SIZE - length) // 512 + 1) * 512
            data = rng.randbytes(length)
            assert client.write(offset, data) == 0
            assert client.read(offset, length) == data
    all_given_back(server)


@KINDS
@GEOMETRIES
def test_many_requests_in_one_breath(start: Callable[..., Server], structured: bool, geometry: dict[str, int]) -> None:
    """Requests of all lengths follow each other without a pause and come in pieces of any length."""
    server = start(**geometry)
    rng = random.Random(structured * 10 + len(geometry))
    with server.client(structured=structured) as client:
        image = bytearray(4 * MIB)
        stream, offset, count = b"", 0, 0
        while offset < len(image):
            length = min(rng.choice((512, 4096, 8192, 65536, 200704)), len(image) - offset)
            image[offset : offset + length] = rng.randbytes(length)
            stream += request(WRITE, offset, length, offset, rng.choice((0, FUA)))
            stream += image[offset : offset + length]
            offset += length
            count += 1
        send_in_pieces(client.sock, stream, rng)
        answers = client.wait(count)
        assert {answer.error for answer in answers.values()} == {0}
        reads = []
        offset = 0
        while offset < len(image):
            length = min(rng.choice((512, 4096, 131072, 300032)), len(image) - offset)
            reads.append((client.start(READ, offset, length), offset, length))
            offset += length
        replies = client.wait(len(reads))
        for cookie, offset, length in reads:
            assert replies[cookie].error == 0
            assert replies[cookie].data == image[offset : offset + length], (offset, length)
    all_given_back(server)


def send_in_pieces(sock: socket.socket, stream: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(stream):
        n = rng.choice((1, 5, 27, 28, 29, 512, 4096, 65536, 65537, 300000))
        sock.sendall(stream[at : at + n])
        at += n


@KINDS
def test_one_byte_at_a_time(start: Callable[..., Server], structured: bool) -> None:
    server = start()
    data = bytes(range(256)) * 2
    stream = request(WRITE, 1024, 512, 1) + data + request(READ, 1024, 512, 2) + request(FLUSH, 0, 0, 3)
    with server.client(structured=structured) as client:
        client.lengths[2] = 512
        for byte in stream[:540]:
            client.sock.send(bytes([byte]))
        assert client.wait()[1].error == 0
        for byte in stream[540:]:
            client.sock.send(bytes([byte]))
        answers = client.wait(2)
        assert answers[2].data == data
        assert answers[3].error == 0


@KINDS
def test_zeroes_and_trim(start: Callable[..., Server], structured: bool) -> None:
    """They have no payload and no limit but the end of the export, and they read back as zeros."""
    server = start()
    with server.client(structured=structured) as client:
        for kind, flags in (
            (WRITE_ZEROES, 0),
            (WRITE_ZEROES, NO_HOLE | FUA),
            (TRIM, 0),
            (TRIM, FUA),
        ):
            assert client.write(0, b"\xff" * MIB) == 0
            assert client.do(kind, 4096, 65536, flags).error == 0
            assert client.read(0, 131072) == b"\xff" * 4096 + bytes(65536) + b"\xff" * 61440
            assert client.do(kind, 0, SIZE, flags).error == 0
            assert not any(client.read(0, MIB))
            assert client.do(FLUSH).error == 0


BAD = [
    (READ, SIZE, 512, 0, EINVAL),
    (READ, SIZE - 512, 1024, 0, EINVAL),
    (READ, 2**64 - 512, 1024, 0, EINVAL),
    (READ, 1, 512, 0, EINVAL),
    (READ, 0, 511, 0, EINVAL),
    (READ, 0, 0, 0, EINVAL),
    (READ, 0, 32 * MIB + 512, 0, EINVAL),
    (READ, 0, 2**32 - 512, 0, EINVAL),
    (READ, 0, 512, NO_HOLE, EINVAL),
    (READ, 0, 512, 1 << 15, EINVAL),
    (WRITE, SIZE, 512, 0, ENOSPC),
    (WRITE, 2**64 - 512, 1024, 0, ENOSPC),
    (WRITE, 256, 512, 0, EINVAL),
    (WRITE, 0, 100, 0, EINVAL),
    (WRITE, 0, 0, 0, EINVAL),
    (WRITE, 0, 32 * MIB + 512, 0, EINVAL),
    (WRITE, 0, 512, DF, EINVAL),
    (WRITE, 0, 65536, REQ_ONE, EINVAL),
    (WRITE_ZEROES, SIZE - 512, 1024, 0, ENOSPC),
    (WRITE_ZEROES, 0, 512, FAST_ZERO, EINVAL),
    (WRITE_ZEROES, 0, 0, 0, EINVAL),
    (TRIM, SIZE, 512, 0, EINVAL),
    (TRIM, 512, 1, 0, EINVAL),
    (TRIM, 0, 512, NO_HOLE, EINVAL),
    (FLUSH, 512, 0, 0, EINVAL),
    (FLUSH, 0, 512, 0, EINVAL),
    (CACHE, 0, 512, 0, EINVAL),
    (BLOCK_STATUS, 0, 512, 0, EINVAL),
    (99, 0, 512, 0, EINVAL),
    (0xFFFF, 2**64 - 1, 2**32 - 1, 0xFFFF, EINVAL),
]


@KINDS
def test_bad_requests_are_answered(start: Callable[..., Server], structured: bool) -> None:
    """Each with the errno that the protocol asks for, and the next request is understood."""
    server = start()
    with server.client(structured=structured) as client:
        assert client.write(0, b"a" * 4096) == 0
        for kind, offset, length, flags, error in BAD:
            payload = bytes(length) if kind == WRITE else b""
            answer = client.do(kind, offset, length, flags, payload)
            assert answer.error == error, (kind, offset, length, flags)
            assert not answer.chunks
        assert client.read(0, 4096) == b"a" * 4096
    all_given_back(server)


def test_unfragmented_reads(start: Callable[..., Server]) -> None:
    server = start()
    data = os.urandom(4 * MIB)
    with server.client() as client:
        assert client.write(0, data) == 0
        for length in (512, 65536, 131072, 2 * MIB):
            answer = client.do(READ, 512, length, DF)
            assert [(offset, len(piece)) for offset, piece in answer.chunks] == [(512, length)]
            assert answer.data == data[512 : 512 + length]
        assert client.do(READ, 0, 4 * MIB, DF).error == EOVERFLOW
        assert client.do(READ, 0, 4 * MIB).data == data
    with server.client(structured=False) as client:
        assert client.do(READ, 0, 512, DF).error == EINVAL


def test_read_only(start: Callable[..., Server]) -> None:
    server = start(read_only=True)
    with server.client() as client:
        assert client.flags & 2
        assert client.write(0, bytes(4096)) == EPERM
        assert client.write(0, bytes(MIB)) == EPERM
        assert client.do(TRIM, 0, 512).error == EPERM
        assert client.do(WRITE_ZEROES, 0, 512).error == EPERM
        assert client.do(FLUSH).error == 0
        assert not any(client.read(0, 4096))


@pytest.mark.parametrize(
    "stream",
    [
        b"GET / HTTP/1.0\r\n\r\nand so on, long enough",
        bytes(28),
        request(FLUSH, 0, 0, 1, magic=0x67446698),
        request(WRITE, 0, 512, 1) + bytes(511) + request(FLUSH, 0, 0, 2) * 2,
        random.Random(1).randbytes(200_000),
    ],
    ids=["http", "zeros", "reply", "shifted", "noise"],
)
def test_garbage_closes_its_own_connection_only(start: Callable[..., Server], stream: bytes) -> None:
    server = start()
    with server.client() as other, server.client() as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.sock.sendall(stream)
            assert client.closed_by_server()
        assert other.write(0, b"b" * 512) == 0
        assert other.read(0, 512) == b"b" * 512
        all_given_back(server, clients=1)


@KINDS
@pytest.mark.parametrize("nclient", [8, 64])
def test_failed_reads(start: Callable[..., Server], structured: bool, nclient: int) -> None:
    """The component is shorter than it should be: EIO for what is missing, as long as that can still be said."""
    server = start(file_size=DATA_OFFSET + 16 * MIB, nclient=nclient)
    with server.client(structured=structured) as other:
        with server.client(structured=structured) as client:
            assert client.do(READ, 20 * MIB, 4096).error == EIO
            assert client.do(READ, 16 * MIB - 4096, 8192).error == EIO
            assert client.do(READ, 32 * MIB, 32 * MIB).error == EIO
            assert client.read(0, 4096) == bytes(4096)
            if structured:
                assert client.do(READ, 0, 32 * MIB).error == EIO
                assert client.read(0, 4096) == bytes(4096)
            else:
                client.start(READ, 0, 32 * MIB)
                with pytest.raises((EOFError, ConnectionResetError)):
                    client.wait()
        assert other.read(0, 8 * MIB) == bytes(8 * MIB)
    all_given_back(server)


@KINDS
@pytest.mark.parametrize("nclient", [8, 64])
def test_failed_writes(start: Callable[..., Server], structured: bool, nclient: int) -> None:
    """The first part fails while the payload is still under way: it is taken to its end, then the client is told."""
    limit = DATA_OFFSET + 16 * MIB
    server = start(file_size=limit, file_limit=limit, nclient=nclient)
    with server.client(structured=structured) as client:
        for offset, length in ((16 * MIB, 4096), (17 * MIB, 32 * MIB), (8 * MIB, 32 * MIB), (15 * MIB, 2 * MIB)):
            assert client.write(offset, b"c" * length) == ENOSPC
            assert client.write(0, b"d" * 4096, FUA) == 0
        assert client.read(0, 4096) == b"d" * 4096
        payload = os.urandom(4 * MIB)
        cookie = client.start(WRITE, 20 * MIB, len(payload), 0, payload[:MIB])
        client.sock.setblocking(False)
        eventually(lambda: server.facts()["inuse"] == 0, "the first parts have failed")
        with pytest.raises(BlockingIOError):
            client.sock.recv(1)
        client.sock.settimeout(DEADLINE)
        client.sock.sendall(payload[MIB:])
        assert client.wait()[cookie].error == ENOSPC
    all_given_back(server)


@KINDS
def test_leaving_in_good_order(start: Callable[..., Server], structured: bool) -> None:
    """What was asked before DISC, or before the end of the stream, is answered before the connection is closed."""
    server = start()
    for bye in (lambda c: c.start(DISC), lambda c: c.sock.shutdown(socket.SHUT_WR)):
        with server.client(structured=structured) as client:
            for n in range(32):
                client.start(WRITE, n * MIB, MIB, 0, bytes([n + 1]) * MIB)
            cookies = [client.start(READ, 48 * MIB, 131072) for _ in range(20)]
            bye(client)
            answers = client.wait(32 + len(cookies))
            assert {answer.error for answer in answers.values()} == {0}
            with pytest.raises(EOFError):
                client.receive(1)
        all_given_back(server)
        with server.client() as client:
            assert client.read(31 * MIB, MIB) == b"\x20" * MIB
            assert client.do(WRITE_ZEROES, 0, 32 * MIB).error == 0


@pytest.mark.parametrize("length", [4096, MIB, 32 * MIB])
@pytest.mark.parametrize("missing", [1, 100, 2000])
def test_leaving_in_the_middle_of_a_payload(start: Callable[..., Server], length: int, missing: int) -> None:
    server = start()
    with server.client() as other:
        for _ in range(3):
            with server.client() as client:
                client.start(WRITE, 0, length, 0, bytes(length - missing))
            with server.client() as client:
                client.sock.sendall(request(WRITE, 0, length, 1)[:27])
        assert other.write(0, b"e" * 512) == 0
        assert other.read(0, 512) == b"e" * 512
        all_given_back(server, clients=1)


@KINDS
def test_leaving_in_the_middle_of_replies(start: Callable[..., Server], structured: bool) -> None:
    server = start()
    with server.client() as other:
        for _ in range(5):
            with server.client(structured=structured) as client:
                for _ in range(4):
                    client.start(READ, 0, 32 * MIB)
                client.receive(100_000)
        assert other.write(0, b"f" * 512) == 0
        assert other.read(0, 512) == b"f" * 512
        all_given_back(server, clients=1)


@KINDS
def test_leaving_alone_with_a_reply_that_waits_for_slots(start: Callable[..., Server], structured: bool) -> None:
    """Nobody else is there to free a slot or to wake the stage."""
    server = start()
    with server.client(structured=structured) as client:
        client.start(READ, 0, 32 * MIB)
        client.start(READ, 0, 32 * MIB)
        limit = server.nclient // 4
        eventually(lambda: server.facts()["free"] == server.nclient - limit, "the client's slots are in use")
    all_given_back(server)


@KINDS
def test_who_never_reads_stops_nobody_else(start: Callable[..., Server], structured: bool) -> None:
    server = start()
    data = os.urandom(4 * MIB)
    with server.client(structured=structured) as other, server.client(structured=structured) as client:
        assert other.write(0, data) == 0
        client.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            for n in range(100_000):
                client.lengths[n] = 131072
                assert client.sock.send(request(READ, n % 32 * 131072, 131072, n)) == 28
        for n in range(50):
            assert other.read(n * 4096, 131072) == data[n * 4096 : n * 4096 + 131072]
            assert other.write(8 * MIB, bytes(MIB)) == 0
        # And it gets all of it when it reads after all.
        client.sock.settimeout(DEADLINE)
        for cookie, answer in client.wait(n).items():
            at = cookie % 32 * 131072
            assert answer.data == data[at : at + 131072]
    all_given_back(server)


@pytest.mark.parametrize("flags", [0, DF])
def test_reads_in_one_piece_do_not_wait_for_those_who_never_read(start: Callable[..., Server], flags: int) -> None:
    """Each of them leaves half of what the one before has left; what is read in one needs several slots at once."""
    server = start(nclient=64)
    data = os.urandom(MIB)
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(server.client(structured=bool(flags)))
        assert other.write(0, data) == 0
        for _ in range(6):
            client = stack.enter_context(server.client())
            client.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for n in range(1000):
                    assert client.sock.send(request(READ, 0, MIB, n)) == 28
        eventually(lambda: server.facts()["free"] <= server.nclient // 4 + 2, "others hold the slots")
        for n in range(20):
            answers = [other.start(READ, 0, MIB, flags) for _ in range(1 + n % 3)]
            found = other.wait(len(answers))
            assert all(found[cookie].data == data for cookie in answers)
            assert other.read(4096 * n, 65536) == data[4096 * n : 4096 * n + 65536]
    all_given_back(server)


def test_stalled_payloads_hold_at_most_half_of_the_slots(start: Callable[..., Server]) -> None:
    """More clients than slots stop in the middle of large writes; others work, and so do these in the end."""
    server = start(nclient=16)
    data = os.urandom(131072)
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(server.client()) for _ in range(20)]
        for n, client in enumerate(stalled):
            client.start(WRITE, n * 131072, 131072, 0, data[: 60000 + 100 * n])
        eventually(lambda: server.facts()["free"] <= 8, "payloads are taken")
        with server.client() as other:
            for n in range(20):
                assert other.write(32 * MIB, data) == 0
                assert other.read(32 * MIB, 131072) == data
                assert other.write(40 * MIB + 4096 * n, data[:4096]) == 0
        assert server.facts()["free"] >= 8
        for n, client in enumerate(stalled):
            client.sock.sendall(data[60000 + 100 * n :])
            assert client.wait()[1].error == 0
            assert client.read(n * 131072, 131072) == data
    all_given_back(server)


def test_idle_clients_cost_nobody_anything(start: Callable[..., Server]) -> None:
    server = start()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(server.client(structured=n % 2 == 0)) for n in range(100)]
        with server.client() as client:
            data = os.urandom(8 * MIB)
            assert client.write(0, data) == 0
            assert client.read(0, 8 * MIB) == data
        all_given_back(server, clients=100)
        assert all(client.do(FLUSH).error == 0 for client in idle)


def test_frozen_stage_finishes_what_has_begun(start: Callable[..., Server]) -> None:
    """While frozen no request is taken, but one whose payload is under way is; afterwards all others follow."""
    server = start()
    with server.client() as client, server.client() as waiting:
        cookie = client.start(WRITE, 0, MIB, 0, b"g" * (MIB // 2))
        eventually(lambda: not server.facts()["quiet"], "the write has begun")
        server.tell(cmd="freeze", on=1)
        server.facts()  # its answer comes after that
        client.sock.sendall(b"g" * (MIB // 2) + request(READ, 0, MIB, 99))
        client.lengths[99] = MIB
        assert client.wait()[cookie].error == 0
        eventually(lambda: bool(server.facts()["quiet"]), "quiet")
        early = waiting.start(WRITE, 4096, 512, 0, b"h" * 512)
        waiting.sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            waiting.sock.recv(1)
        waiting.sock.settimeout(DEADLINE)
        server.tell(cmd="freeze", on=0)
        assert waiting.wait()[early].error == 0
        assert len(client.wait()[99].data) == MIB
    all_given_back(server)


@pytest.mark.parametrize("engine", ["inline", "uring", "threads"])
def test_four_connections_see_one_disk(start: Callable[..., Server], engine: str) -> None:
    """Random requests over four connections against a model; each connection has its own quarter of each MiB."""
    server = start(engine=engine)
    rng = random.Random(11)
    image = bytearray(8 * MIB)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(server.client(structured=n % 2 == 0)) for n in range(4)]
        for _ in range(60):
            expected = []
            for n, client in enumerate(clients):
                for block in rng.sample(range(32), 8):
                    start_at = block * 262144 + n * 65536 + rng.randrange(64) * 512
                    length = rng.randrange(1, 65) * 512
                    expected.append((client, *step(client, rng, image, start_at, length)))
            answers = {id(client): client.wait(8) for client in clients}
            for client, cookie, wanted in expected:
                assert answers[id(client)][cookie].error == 0
                assert wanted is None or answers[id(client)][cookie].data == wanted
        assert clients[0].do(FLUSH).error == 0
        assert clients[1].read(0, len(image)) == image
    all_given_back(server)
    assert server.component.read_bytes()[DATA_OFFSET : DATA_OFFSET + len(image)] == image


def step(client: RawClient, rng: random.Random, image: bytearray, offset: int, length: int) -> tuple[int, bytes | None]:
    """Start one random request; its cookie, and what a read must bring."""
    end = offset + length
    match rng.choice(("read", "write", "write", "zero", "trim")):
        case "read":
            return client.start(READ, offset, length), bytes(image[offset:end])
        case "write":
            image[offset:end] = rng.randbytes(length)
            return client.start(WRITE, offset, length, 0, bytes(image[offset:end])), None
        case "zero":
            image[offset:end] = bytes(length)
            return client.start(WRITE_ZEROES, offset, length, rng.choice((0, NO_HOLE))), None
        case _:
            image[offset:end] = bytes(length)
            return client.start(TRIM, offset, length, rng.choice((0, FUA))), None
