"""The other node and the way to it fail: it accepts and never answers, its disk fails, the connection comes and goes.
Clients of the primary notice nothing for longer than `timeout`, and in the end both nodes have the same data."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from hast.activemap import METADATA_SIZE
from hast.handshake import accept_first, answer_second
from hast.messages import Handshake1Reply, Handshake1Request, Handshake2Request, pack_message
from hast.metadata import Metadata, unpack
from tests.e2e.node import MIB, eventually, loopback
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay
from tests.faultdisk import FaultDisk
from tests.nbdclient import FLUSH, TRIM, WRITE_ZEROES, RawClient

SIZE = 16 * MIB
EXTENT = 2 * MIB

MakePair = Callable[..., Pair]


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay(loopback(random.randrange(1 << 20)))
    yield relay
    relay.close()


def relayed(make_pair: MakePair, relay: Relay) -> Pair:
    """`a` reaches `b` through the relay."""
    pair = make_pair({"disk": SIZE}, remotes={"hasta": relay.url}, conf="timeout 5\ncompression none", hooks=True)
    relay.target(pair.b.address, pair.a.address)
    return pair


def write(node: PairNode, fill: bytes, *offsets: int) -> None:
    with RawClient(node.socket()) as client:
        for offset in offsets:
            assert client.write(offset, fill * 4096) == 0
        assert client.do(FLUSH).error == 0


# ---- a peer that hangs ----


class Hanging:
    """A secondary that answers so many messages of the handshake, then nothing, and keeps its connections open."""

    def __init__(self, address: str, answers: int) -> None:
        self.server = socket.create_server((address, 8457))
        self.answers = answers
        self.accepted = 0
        self.open: list[socket.socket] = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.server.accept()
                self.open.append(sock)
                self.accepted += 1
                if self.answers:
                    sock.recv(4096)
                    sock.sendall(pack_message(2, Handshake1Reply(2, bytes(16)).to_nv()))
                    self.open.append(self.server.accept()[0])

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)
        for sock in (self.server, *self.open):
            sock.close()


@pytest.mark.parametrize("answers", [0, 1])
def test_a_peer_that_accepts_and_never_answers(make_pair: MakePair, answers: int) -> None:
    """It costs the start a second, and then nobody anything; where the node is known to write alone, not even that."""
    pair = make_pair({"disk": SIZE}, conf="timeout 2")
    pair.a.create()
    hanging = Hanging(pair.b.address, answers)
    try:
        pair.a.start()
        pair.a.set_role("primary")
        assert pair.a.said().count("does not answer, starting without it") == 1
        before = hanging.accepted
        with RawClient(pair.a.socket()) as client:
            eventually(lambda: hanging.accepted > before, "it tries again")
            while "it took more than 2 s" not in pair.a.said():
                assert client.write(0, b"x" * 4096) == 0
            eventually(lambda: hanging.accepted > before + 1, "and again")
        assert pair.a.dump()["localcnt"] == 1
        pair.a.set_role("init")
        pair.a.set_role("primary")
        assert pair.a.said().count("does not answer, starting without it") == 1
    finally:
        hanging.close()


# ---- an attempt that is overtaken by a write ----


def test_a_newer_secondary_is_found_while_a_write_is_under_way(make_pair: MakePair, relay: Relay) -> None:
    """The attempt is given up, the write is acknowledged alone, and the next attempt finds a split-brain. The node does
    not take itself for a target then: its own data is all that it will ever serve."""
    pair = relayed(make_pair, relay)
    pair.up()
    write(pair.a, b"-", 0)
    pair.wait_in_sync(pair.a)
    relay.allowed = 0
    relay.cut()
    eventually(lambda: pair.a.status()["status"] == "degraded", "the connection is lost")
    pair.b.set_role("primary")
    write(pair.b, b"b", EXTENT)
    pair.b.set_role("secondary")
    (disk,) = (pid for pid, title in pair.a.titles().items() if title.endswith(": disk"))
    os.kill(disk, signal.SIGSTOP)
    with RawClient(pair.a.socket()) as client:
        client.start(WRITE_ZEROES, 0, 4096)  # the disk stage's: a write with data may not need it
        relay.allowed = None
        eventually(lambda: "the secondary has newer data, and writes are under way" in pair.a.said(), "it is found")
        os.kill(disk, signal.SIGCONT)
        assert [answer.error for answer in client.wait().values()] == [0]
    eventually(lambda: f"split-brain {pair.a.name()}" in pair.events(pair.a), "a split-brain is found")
    assert not pair.a.dump()["syncing"] and not pair.a.status()["syncing"]
    # Also after a restart.
    pair.a.kill()
    pair.a.start()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as client:
        assert client.read(0, 4096) == bytes(4096)


# ---- the secondary's disk ----


@pytest.mark.parametrize("what", ["map", "metadata", "flush"])
def test_a_secondary_that_cannot_store_what_the_handshake_asks_for(make_pair: MakePair, what: str) -> None:
    """It accepts nothing, says so, stays secondary, and takes the primary as soon as its disk is well."""
    pair = make_pair({"disk": SIZE}, hooks=True)
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.a.set_role("primary")
    write(pair.a, b"a", 0, EXTENT)
    pair.a.set_role("init")
    pair.b.set_role("secondary")
    if what == "flush":
        disk.fail("flush", errno.EIO)
    else:
        disk.fail("write", errno.EIO, within=(0, 4096) if what == "metadata" else (4096, 4608))
    pair.a.set_role("primary")
    eventually(lambda: "refuses the connection: The secondary's component failed." in pair.a.said(), "it is refused")
    write(pair.a, b"A", 0)
    failed = disk.stats().failed
    eventually(lambda: disk.stats().failed > failed, "it is tried again")
    assert pair.b.status()["role"] == "secondary" and "connect" not in " ".join(pair.events(pair.a))
    assert pair.b.said().count("the primary is refused") == 1
    disk.heal()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


@pytest.mark.parametrize("kind", ["write", "delete", "flush"])
def test_a_secondary_whose_disk_fails_a_request(make_pair: MakePair, kind: str) -> None:
    """It is dropped, its client's request is done without it, and what it lacks stays marked until it has it. Its own
    node says what its disk has failed."""
    pair = make_pair({"disk": SIZE}, hooks=True)
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    write(pair.a, b"-", *range(0, SIZE, EXTENT))
    pair.wait_in_sync(pair.a)
    offset = pair.b.dump()["localoff"]
    if kind == "flush":
        disk.fail("flush", errno.EIO)
    else:
        disk.fail("write,delete", errno.EIO, within=(offset + EXTENT, offset + 2 * EXTENT))
    with RawClient(pair.a.socket()) as client:
        if kind == "delete":
            assert client.do(TRIM, EXTENT, EXTENT).error == 0
        else:
            assert client.write(EXTENT, b"x" * 4096) == 0
        assert client.do(FLUSH).error == 0
    assert pair.a.dump()["dirty"] >= EXTENT
    # It is tried again, fails again, and is left alone for longer each time.
    eventually(lambda: f"disconnect {pair.a.name()}" in pair.events(pair.a), "it is dropped")
    failed = disk.stats().failed
    eventually(lambda: disk.stats().failed > failed, "it fails again")
    assert f"component {pair.b.component()} has failed requests ({kind}: " in pair.b.said()
    status = pair.b.status()
    assert status[f"stat_{kind}_error"] >= 1 and status["stat_read_error"] == 0
    write(pair.a, b"y", EXTENT + MIB)
    assert pair.a.dump()["dirty"] >= EXTENT
    disk.heal()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


# ---- a connection that comes and goes ----


@pytest.mark.slow
def test_a_connection_that_is_cut_as_soon_as_the_handshake_is_done(make_pair: MakePair, relay: Relay) -> None:
    """Before the stages that use it have begun to: they say it once, and somebody has to be listening. The secondary
    sees it as well, without being asked for another connection."""
    pair = relayed(make_pair, relay)
    pair.up()
    write(pair.a, b"x", 0)
    for _ in range(3):
        pair.wait_in_sync(pair.a)
        for node in pair.nodes:
            node.seen = node.said().count("connection ")  # type: ignore[attr-defined]
        relay.allowed = 0
        relay.cut()
        eventually(lambda: pair.a.status()["status"] == "degraded", "the connection is lost")
        a, b = (metadata(node) for node in pair.nodes)
        request = Handshake2Request(a.resource, bytes(16), a.resuid, a.pair.localcnt, a.pair.remotecnt, hast=True)
        bits = bytes(b.mapsize)
        answer = answer_second(request, 2, b, lambda bits=bits: bits, "none", "none")
        relay.back.cut_after = len(accept_first(Handshake1Request(a.resource, 2), bytes(16))[1]) + len(answer.message)
        relay.allowed = 2
        for node in pair.nodes:
            eventually(lambda node=node: node.said().count("connection ") >= node.seen + 2, "both see that it is cut")
        relay.allowed = None
        write(pair.a, b"y", 0)


def metadata(node: PairNode) -> Metadata:
    return unpack(node.component().read_bytes()[:METADATA_SIZE], node.name())


def test_a_connection_that_is_cut_again_and_again(make_pair: MakePair, relay: Relay) -> None:
    """Every 0.2 s, in the middle of handshakes, resynchronisations and writes; then it holds."""
    pair = relayed(make_pair, relay)
    pair.up()
    stop = threading.Event()

    def cut() -> None:
        for _ in range(50):
            relay.cut()
            if stop.wait(0.2):
                return

    cutter = threading.Thread(target=cut)
    cutter.start()
    try:
        with RawClient(pair.a.socket()) as client:
            number = 0
            while cutter.is_alive():
                number += 1
                offset = number * 7919 * 4096 % SIZE
                assert client.write(offset, number.to_bytes(4, "little") * 1024) == 0
    finally:
        stop.set()
        cutter.join()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    events = [event.split()[0] for event in pair.events(pair.a) if not event.startswith("role ")]
    assert events[-1] in ("connect", "syncdone")
    assert 2 <= events.count("connect") == events.count("disconnect") + 1 <= 15
    assert events.count("syncstart") == events.count("syncdone") + events.count("syncintr")
    assert pair.a.said().count("connection to ") <= 15
