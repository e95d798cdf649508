"""A primary that is alone, and whose disk does not take its metadata or is slow: who writes waits, and is told."""

from __future__ import annotations

import errno
import os
import select
import signal
from collections.abc import Callable

import pytest

from hast import boot
from hast.outage import DETACHED
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.faultdisk import FaultDisk
from tests.nbdclient import EIO, FLUSH, READ, WRITE, RawClient

OLD, NEW = b"old " * 1024, b"new " * 1024
METADATA = (0, 4096)  # bytes of the component
MAP = (4096, 4608)  # and of the activemap
TIMEOUT = 5  # seconds
PATIENT = 60  # seconds: longer than anything takes that a write waits for here

MakePair = Callable[..., Pair]


def prepare(make_pair: MakePair, timeout: int) -> tuple[Pair, FaultDisk]:
    """Connected and in sync, with old data at the beginning."""
    pair = make_pair({"disk": 16 * MIB}, conf=f"timeout {timeout}")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, OLD) == 0
    pair.wait_in_sync(pair.a)
    return pair, disk


@pytest.fixture
def prepared(make_pair: MakePair) -> tuple[Pair, FaultDisk]:
    return prepare(make_pair, TIMEOUT)


@pytest.fixture
def patient(make_pair: MakePair) -> tuple[Pair, FaultDisk]:
    return prepare(make_pair, PATIENT)


def start_alone(pair: Pair, disk: FaultDisk, raw: RawClient) -> None:
    """The secondary is gone, and a write waits because it cannot be stored that this node writes alone."""
    disk.fail("write", errno.EIO, within=METADATA)
    pair.b.stop()
    raw.start(WRITE, 0, len(NEW), payload=NEW)
    eventually(lambda: "writes wait for it" in pair.a.said(), "the metadata cannot be written")


def told(raw: RawClient) -> list[int]:
    return [answer.error for answer in raw.wait(1).values()]


def test_write_waits_until_the_metadata_can_be_stored(patient: tuple[Pair, FaultDisk]) -> None:
    pair, disk = patient
    with RawClient(pair.a.socket()) as raw:
        start_alone(pair, disk, raw)
        assert pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"]
        disk.heal()
        assert told(raw) == [0]
    assert pair.a.dump()["localcnt"] > pair.b.dump()["remotecnt"]
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None and pair.data(pair.b)[: len(NEW)] == NEW


def test_write_is_told_when_the_metadata_cannot_be_stored(prepared: tuple[Pair, FaultDisk]) -> None:
    """After `timeout`. Nothing was acknowledged alone, so the secondary may take over; the primary goes on later."""
    pair, disk = prepared
    with RawClient(pair.a.socket()) as raw:
        start_alone(pair, disk, raw)
        assert told(raw) == [EIO]
        assert pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"]
        assert raw.read(MIB, 4096) == bytes(4096)
        disk.heal()
        assert raw.write(0, NEW) == 0
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_write_is_told_when_the_role_ends(patient: tuple[Pair, FaultDisk]) -> None:
    """Nobody waits for the disk then."""
    pair, disk = patient
    with RawClient(pair.a.socket()) as raw:
        start_alone(pair, disk, raw)
        pair.a.set_role("init")
        assert told(raw) == [EIO]
    assert pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"]
    disk.heal()


def test_secondary_comes_back_before_the_metadata_can_be_stored(patient: tuple[Pair, FaultDisk]) -> None:
    """There is nothing new to be stored for it: it is used, and who waits is answered when it has the write."""
    pair, disk = patient
    with RawClient(pair.a.socket()) as raw:
        start_alone(pair, disk, raw)
        pair.b.start()
        pair.b.set_role("secondary")
        assert told(raw) == [0]
        assert pair.data(pair.b)[: len(NEW)] == NEW
        assert raw.write(MIB, NEW) == 0
        assert raw.do(FLUSH).error == 0
        assert pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"]
        disk.heal()
    pair.wait_in_sync(pair.a)
    assert "cannot go on" not in pair.a.said()
    assert pair.differing() is None and pair.data(pair.b)[: len(NEW)] == NEW


@pytest.mark.parametrize("offset", [MIB, 10 * MIB], ids=["a dirty extent", "a clean one"])
def test_secondary_comes_back_to_a_disk_that_takes_nothing(prepared: tuple[Pair, FaultDisk], offset: int) -> None:
    """Neither data nor map nor metadata: from then on the secondary does everything."""
    pair, disk = prepared
    with RawClient(pair.a.socket()) as raw:
        disk.fail("write", errno.EIO)
        pair.b.stop()
        assert raw.write(offset, NEW) == EIO  # there is no good copy that it could be written to
        pair.b.start()
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        # A client that writes again and again, in vain, to what is being copied would hold that up.
        eventually(lambda: pair.a.status()["dirty"] == 0, "it has everything")
        eventually(lambda: raw.write(0, NEW) == 0, "the secondary is used")
        assert raw.read(0, len(NEW)) == NEW and pair.data(pair.b)[: len(NEW)] == NEW
        assert raw.write(offset, NEW) == 0
        assert raw.do(FLUSH).error == 0
        # And so it does when it was away, though what was stored in vain may be on that disk.
        pair.b.stop()
        pair.b.start()
        pair.b.set_role("secondary")
        eventually(lambda: raw.write(2 * MIB, NEW) == 0, "the secondary is used again")
        disk.heal()
    pair.a.kill()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        assert raw.read(0, len(NEW)) == NEW and raw.read(2 * MIB, len(NEW)) == NEW


@pytest.mark.parametrize("how", ["worker", "power", "power, and alone"])
@pytest.mark.parametrize("within", [None, MAP], ids=["nothing", "no map"])
def test_newer_secondary_of_a_disk_that_takes_nothing(
    prepared: tuple[Pair, FaultDisk], how: str, within: tuple[int, int] | None
) -> None:
    """The other node was primary meanwhile (or has stored that it is ahead, and nobody has heard it). This disk does
    not take that its component is out of date, or not where: the secondary does everything. Its counters say so also
    when this node has lost all that it knew; and its map, that they may differ anywhere."""
    pair, disk = prepared
    pair.a.kill()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        assert raw.write(9 * MIB, NEW) == 0  # clean at the other node
    pair.b.set_role("secondary")
    disk.fail("write", errno.EIO, within=within)
    pair.a.start()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as raw:
        if within is None:
            eventually(lambda: raw.write(5 * MIB, NEW) == 0, "the secondary is used")
        assert raw.write(5 * MIB, NEW) == 0
        assert raw.read(9 * MIB, len(NEW)) == NEW and pair.data(pair.b)[5 * MIB :][: len(NEW)] == NEW
        assert raw.do(FLUSH).error == 0
    assert pair.a.status()["role"] == "primary" and pair.a.status()["syncing"] == DETACHED
    if how == "worker":
        os.kill(int(pair.a.status()["workerpid"]), signal.SIGKILL)
        eventually(lambda: pair.a.said().count(" serves ") == 3, "there is another worker")
    else:
        pair.a.kill()
        for note in (boot.note, boot.outdated_note, boot.detached_note):  # they were in memory
            note(pair.a.rundir, pair.a.name()).unlink(missing_ok=True)
        disk.heal()
        if how == "power, and alone":
            if within is None:
                return  # docs/reliability.md, Not promised
            pair.b.stop()
            pair.a.start()
            pair.a.set_role("primary")
            with RawClient(pair.a.socket()) as raw:
                assert raw.do(READ, 5 * MIB, len(NEW)).error == EIO
            return
        pair.a.start()
        pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as raw:
        for at in (9 * MIB, 5 * MIB):
            assert raw.read(at, len(NEW)) == NEW
    if how == "power":
        pair.wait_in_sync(pair.a)
        assert pair.differing() is None
    disk.heal()


@pytest.mark.slow
def test_slow_disk_of_the_primary(prepared: tuple[Pair, FaultDisk]) -> None:
    """Slower than `timeout`: the local component has no deadline, the connection is kept, and nothing fails."""
    pair, disk = prepared
    with RawClient(pair.a.socket()) as raw:
        disk.delay("write", 1500 * TIMEOUT)
        assert raw.write(0, NEW) == 0
        disk.delay("write", 0)
        disk.delay("flush", 1500 * TIMEOUT)
        assert raw.do(FLUSH).error == 0
        disk.heal()
        assert raw.read(0, len(NEW)) == NEW
    assert "lost" not in pair.a.said() and pair.a.status()["syncing"] == 0
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_secondary_is_lost_while_the_disk_of_the_primary_is_slow(prepared: tuple[Pair, FaultDisk]) -> None:
    pair, disk = prepared
    with RawClient(pair.a.socket()) as raw:
        disk.delay("all", 300)
        for extent in range(4):
            raw.start(WRITE, extent * 2 * MIB, len(NEW), payload=NEW)
        pair.b.kill()
        assert [answer.error for answer in raw.wait(4).values()] == [0] * 4
        disk.heal()
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_disk_of_the_primary_hangs(prepared: tuple[Pair, FaultDisk]) -> None:
    """Nobody knows what it will do: clients wait for it, longer than `timeout`, and are not told anything; hastctl
    answers. When this node is ended the other one takes over."""
    pair, disk = prepared
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(MIB, NEW) == 0
        disk.hang()
        raw.start(WRITE, 0, len(NEW), payload=NEW)
        eventually(lambda: disk.stats().waiting, "the disk has it")
        assert select.select([raw.sock], [], [], TIMEOUT + 1) == ([], [], [])
        assert "role: primary" in pair.a.ctl("list", pair.a.name()).stdout
        assert "lost" not in pair.a.said()
        pair.a.kill(disk.heal)
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        assert raw.read(MIB, len(NEW)) == NEW and raw.read(0, len(OLD)) in (OLD, NEW)
        assert raw.write(0, NEW) == 0
    pair.a.start()
    pair.a.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None
