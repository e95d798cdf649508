"""The primary's disk fails while the secondary has everything: clients see nothing of it, and nothing is lost."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable

import pytest

from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.e2e.relay import Relay
from tests.e2e.test_block_device import stage_pid
from tests.faultdisk import FaultDisk
from tests.nbdclient import EIO, FLUSH, READ, TRIM, WRITE, WRITE_ZEROES, RawClient

EXTENT = 2 * MIB
OLD, NEW, NEWER = b"old " * 1024, b"new " * 1024, b"newer.  " * 512
END = 1 << 40

MakePair = Callable[..., Pair]


def prepare(make_pair: MakePair, policy: str, timeout: int = 5, **keywords: object) -> tuple[Pair, FaultDisk, int]:
    """Connected, in sync, with old data in some extents; the primary's disk, and where its data begins."""
    pair = make_pair({"disk": 64 * MIB}, conf=f"timeout {timeout}\non-io-error {policy}", hooks=True, **keywords)
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as raw:
        write(raw, OLD, 4)
    pair.wait_in_sync(pair.a)
    return pair, disk, int(pair.a.dump()["localoff"])


def write(raw: RawClient, data: bytes, extents: int) -> None:
    for extent in range(extents):
        assert raw.write(extent * EXTENT, data) == 0
        assert raw.read(extent * EXTENT, 4096) == data
        assert raw.do(FLUSH).error == 0


def check(pair: Pair, data: bytes, extents: int) -> None:
    with RawClient(pair.a.socket()) as raw:
        for extent in range(extents):
            assert raw.read(extent * EXTENT, 4096) == data, extent


def back(pair: Pair, disk: FaultDisk) -> None:
    """The disk is well again, and taken back."""
    disk.heal()
    pair.a.set_role("init")
    pair.a.set_role("primary")


@pytest.mark.parametrize("policy", ["detach", "pass"])
@pytest.mark.parametrize("fault", ["write", "read", "flush", "map", "data", "all"])
def test_clients_do_not_notice(make_pair: MakePair, fault: str, policy: str) -> None:
    pair, disk, start = prepare(make_pair, policy)
    if fault == "map":
        disk.fail("write", errno.EIO, within=(4096, start))
    elif fault == "data":
        disk.fail("write", errno.ENOSPC, within=(start, END))
    elif fault == "all":
        disk.fail("all", errno.EIO)
    elif fault == "read":
        disk.fail("read", errno.EIO, count=5)
    else:
        disk.fail(fault, errno.EIO, count=3, within=(start, END) if fault == "write" else None)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 6)
    check(pair, NEW, 6)
    status = pair.a.status()
    assert status["stat_write_error"] + status["stat_read_error"] + status["stat_flush_error"] > 0 or fault == "map"
    if policy == "detach" or fault in ("flush", "map", "all"):
        assert status["syncing"] == 2 and status["status"] == "degraded"
    back(pair, disk)
    check(pair, NEW, 6)
    pair.wait_in_sync(pair.a)
    eventually(lambda: not pair.a.dump()["syncing"], "it is not out of date any more")
    assert pair.differing() is None
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEWER, 2)
    assert pair.data(pair.b)[:4096] == NEWER


def test_deletes_that_the_component_cannot_do_are_not_offered(make_pair: MakePair) -> None:
    """Most disks with spinning plates. It is no failure of theirs that a client asks all the same."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 5")
    pair.create()
    disk = FaultDisk.under(pair.a)
    disk.fail("delete", errno.EOPNOTSUPP)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, NEW) == 0
        assert raw.do(TRIM, 0, 4096).error == errno.EINVAL
        assert raw.do(WRITE_ZEROES, 8192, 4096).error == 0
        assert raw.read(0, 4096) == NEW
    assert pair.a.status()["syncing"] == 0 and "lost" not in pair.a.said()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_a_delete_that_the_component_cannot_do_any_more_is_written(make_pair: MakePair) -> None:
    pair, disk, _ = prepare(make_pair, "detach")
    disk.fail("delete", errno.EOPNOTSUPP)
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(TRIM, 0, 4096).error == 0
        assert raw.read(0, 4096) == bytes(4096)
    assert disk.stats().failed > 0
    assert pair.a.status()["syncing"] == 0 and "lost" not in pair.a.said()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_pass_mends_what_could_not_be_written(make_pair: MakePair) -> None:
    """Bad sectors that a later write finds good: the secondary's data is copied there, and the disk is as before."""
    pair, disk, start = prepare(make_pair, "pass")
    disk.fail("write", errno.EIO, count=2, within=(start, END))
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 3)
    pair.wait_in_sync(pair.a)
    eventually(lambda: not pair.a.dump()["syncing"], "it is not out of date any more")
    assert pair.a.status()["syncing"] == 0
    assert pair.differing() is None


def test_disk_that_took_nothing_and_comes_back_is_known_to_be_old(
    make_relayed: Callable[..., tuple[Pair, Relay]],
) -> None:
    """It could not even be told that it is out of date. The connection is lost and made again meanwhile: the secondary
    has to keep the map which says that this node lacks everything, for this node cannot keep it."""
    relays: list[Relay] = []

    def make(*arguments: object, **keywords: object) -> Pair:
        pair, relay = make_relayed(*arguments, **keywords)
        relays.append(relay)
        return pair

    pair, disk, _ = prepare(make, "detach")
    disk.fail("all", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 1)
        relays[0].cut()
        write(raw, NEW, 8)
        for extent in range(20, 24):
            assert raw.write(extent * EXTENT, NEW) == 0
    back(pair, disk)
    assert not pair.a.dump()["syncing"] or "connected" in pair.a.said()
    check(pair, NEW, 8)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_disk_stage_and_worker_die_while_only_the_secondary_knows_that_it_is_ahead(make_pair: MakePair) -> None:
    """A flush has failed too: each new disk stage notes that, which must not take the place of the other note."""
    pair, disk, _ = prepare(make_pair, "detach")
    disk.fail("write", errno.EIO)
    disk.fail("flush", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
    assert "cannot be written: everything is done by the secondary" in pair.a.said()
    os.kill(stage_pid(pair.a, "disk"), signal.SIGKILL)
    eventually(lambda: "its stages run again" in pair.a.said(), "its stages run again")
    worker = int(pair.a.status()["workerpid"])
    pair.b.stop()
    disk.heal()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: pair.a.said().count(" serves ") == 2, "there is another worker")
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(READ, 0, 4096).error == EIO
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    check(pair, NEW, 4)
    assert pair.differing() is None


def test_secondary_that_is_made_anew_is_not_taken_for_the_one_that_has_everything(make_pair: MakePair) -> None:
    """Neither the first time nor later, though both have the counters with which they began. The one that has
    everything is, when it is there again."""
    pair, disk, start = prepare(make_pair, "detach")
    assert pair.a.dump()["localcnt"] == pair.b.dump()["localcnt"] == 0
    disk.fail("write", errno.EIO, count=1, within=(start, END))
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
    assert pair.a.status()["syncing"] == 2
    pair.b.set_role("init")
    kept = pair.b.component().read_bytes()
    pair.b.create()
    pair.b.set_role("secondary")
    eventually(lambda: pair.b.said().count("is out of date") > 0, "it refuses")
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(READ, 0, 4096).error == EIO
    assert "older still" in pair.a.said()
    assert pair.b.dump()["resuid"] == 0 and not pair.b.dump()["syncing"]
    pair.b.set_role("init")
    pair.b.component().write_bytes(kept)
    pair.b.set_role("secondary")
    pair.wait_connected(pair.a)
    check(pair, NEW, 4)
    back(pair, disk)
    pair.wait_in_sync(pair.a)
    check(pair, NEW, 4)
    assert pair.differing() is None


def test_worker_dies_while_the_disk_that_was_given_up_holds_its_disk_stage(make_pair: MakePair) -> None:
    """One request has failed, and another one hangs: the old stage, and the lock on the component, stay for as long as
    that takes. The secondary has everything, and goes on doing it; when the lock is free the component is told what it
    has missed."""
    pair, disk, start = prepare(make_pair, "detach")
    disk.hang("read")
    with RawClient(pair.a.socket()) as client, RawClient(pair.a.socket()) as raw:
        client.start(READ, 0, 4096)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        disk.fail("write", errno.EIO, count=1, within=(start, END))
        assert raw.write(EXTENT, NEW) == 0
        eventually(lambda: pair.a.status()["syncing"] == 2, "it is given up")
        os.kill(int(pair.a.status()["workerpid"]), signal.SIGKILL)
    eventually(lambda: pair.a.said().count(" serves ") == 2, "there is another worker")
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEWER, 6)
    disk.release()
    eventually(lambda: "takes writes again" in pair.a.said(), "it knows that it is out of date")
    back(pair, disk)
    check(pair, NEWER, 6)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


@pytest.mark.parametrize("well", [True, False], ids=["a disk that is well again", "a disk that takes nothing still"])
def test_worker_dies_while_only_the_secondary_knows_that_it_is_ahead(make_pair: MakePair, well: bool) -> None:
    """And the secondary is not there when the next worker comes: that one must not take the component for current."""
    pair, disk, _ = prepare(make_pair, "detach")
    disk.fail("write", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
    assert "cannot be written: everything is done by the secondary" in pair.a.said()
    worker = int(pair.a.status()["workerpid"])
    pair.b.stop()
    if well:
        disk.heal()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: pair.a.said().count(" serves ") == 2, "there is another worker")
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(READ, 0, 4096).error == EIO
    pair.b.start()
    pair.b.set_role("secondary")
    eventually(lambda: pair.a.said().count("connected to") > 1, "they are connected again")
    check(pair, NEW, 4)
    back(pair, disk)
    check(pair, NEW, 4)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


@pytest.mark.parametrize(
    "first", ["all", "data", "write"], ids=["nothing could be stored", "it is stored", "it could be read for a while"]
)
def test_worker_dies_while_the_disk_is_gone(make_pair: MakePair, first: str) -> None:
    """The component was given up before, everything is done by the secondary. By now it cannot even be read: the next
    worker goes on without it, and tells it what it has missed when it is there again."""
    pair, disk, start = prepare(make_pair, "detach")
    if first == "data":
        disk.fail("write", errno.EIO, within=(start, END))
    else:
        disk.fail(first, errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
    eventually(lambda: pair.a.status()["syncing"] == 2, "it is given up")
    workers = 1
    for fault in ("write", "all") if first == "write" else ("all",):
        disk.fail(fault, errno.EIO)
        os.kill(int(pair.a.status()["workerpid"]), signal.SIGKILL)
        workers += 1
        eventually(lambda count=workers: pair.a.said().count(" serves ") == count, "there is another worker")
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEWER, 6)
    status = pair.a.status()
    assert status["role"] == "primary" and status["syncing"] == 2
    assert "it was given up before: going on without it" in pair.a.said()
    disk.heal()
    eventually(lambda: "takes writes again" in pair.a.said(), "it is told")
    assert pair.a.dump()["syncing"]
    back(pair, disk)
    check(pair, NEWER, 6)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_without_the_secondary_the_error_is_the_clients(make_pair: MakePair) -> None:
    pair, disk, start = prepare(make_pair, "detach")
    pair.b.stop()
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, NEW) == 0
        disk.fail("write", errno.EIO, count=1, within=(start, END))
        assert raw.write(EXTENT, NEW) == EIO
        assert raw.read(EXTENT, 4096) == OLD
        assert raw.write(EXTENT, NEW) == 0
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    check(pair, NEW, 2)
    assert pair.differing() is None


@pytest.mark.parametrize("who", ["disk stage", "worker"])
def test_who_comes_after_knows_of_a_flush_that_failed(make_pair: MakePair, who: str) -> None:
    """The kernel tells of lost pages once: a flush that succeeds afterwards says nothing about them."""
    pair, disk, _ = prepare(make_pair, "pass")
    pair.b.set_role("init")
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, NEW) == 0
        disk.fail("flush", errno.EIO, count=1)
        assert raw.do(FLUSH).error == EIO
    kill_and_wait(pair, who)
    with RawClient(pair.a.socket()) as raw:
        assert raw.read(0, 4096) == NEW
        assert raw.do(FLUSH).error == EIO
    back(pair, disk)
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(FLUSH).error == 0
    kill_and_wait(pair, "worker")
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(FLUSH).error == 0, "who took the role anew has settled it"


def test_who_comes_after_copies_what_a_failed_flush_has_lost(make_pair: MakePair) -> None:
    """The secondary has it, and it is known that the component is out of date: the next worker makes it whole."""
    pair, disk, _ = prepare(make_pair, "pass")
    disk.fail("flush", errno.EIO, count=1)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 2)
    assert pair.a.dump()["syncing"]
    kill_and_wait(pair, "worker")
    pair.wait_in_sync(pair.a)
    assert not pair.a.dump()["syncing"] and pair.differing() is None
    check(pair, NEW, 2)


def test_flush_of_metadata_that_has_failed_is_not_made_good_by_the_next(make_pair: MakePair) -> None:
    """The worker stores that this node writes alone, and what was in the disk's cache is lost by that. Clients are
    told, and nothing is copied over what the secondary has."""
    pair, disk, start = prepare(make_pair, "pass")
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, NEW) == 0
        pair.b.kill()
        eventually(lambda: "lost" in pair.a.said().rpartition("connected to")[2], "the secondary is gone")
        disk.fail("flush", errno.EIO, count=1)
        assert raw.write(4096, NEW) == EIO  # in an extent that is marked already: the map has no part in this
        assert raw.do(FLUSH).error == EIO
        with disk.backing.open("r+b") as file:
            file.seek(start)
            file.write(bytes(4096))
        pair.b.start()
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        assert raw.write(8192, NEWER) == 0
    data = pair.data(pair.b)
    assert data[8192:12288] == NEWER, "requests go there"
    assert data[:4096] == NEW


@pytest.mark.slow
def test_flush_of_metadata_that_has_failed_is_hidden_by_the_secondary(make_pair: MakePair) -> None:
    """The worker stores that both have everything: so the secondary has what was in the disk's cache."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 5\non-io-error pass\nsyncrate 16777216")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as raw:
        write(raw, OLD, 4)
        pair.b.set_role("secondary")
        eventually(lambda: "extents to synchronise" in pair.a.said(), "they are connected")
        disk.fail("write", errno.EIO, count=3, within=(0, 4096))
        eventually(lambda: "cannot be written" in pair.a.said(), "it cannot be stored that both are in sync")
        disk.fail("flush", errno.EIO, count=1)

        def given_up() -> bool:
            assert raw.read(0, 4096) == OLD  # in a quiet moment the sequencer would ask for a flush of its own
            return "is given up" in pair.a.said()

        eventually(given_up, "the component is not used any more")
        write(raw, NEW, 6)
    assert pair.a.status()["syncing"] == 2
    back(pair, disk)
    check(pair, NEW, 6)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_component_fails_before_it_is_stored_that_both_are_in_sync(make_pair: MakePair) -> None:
    """What is stored then must not say that this node's data is the newer: only the secondary has what follows."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 5\non-io-error detach\nsyncrate 16777216")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, OLD) == 0
        pair.b.set_role("secondary")
        eventually(lambda: "extents to synchronise" in pair.a.said(), "they are connected")
        disk.fail("write", errno.EIO, within=(0, 4096))
        eventually(lambda: "cannot be written" in pair.a.said(), "it cannot be stored that both are in sync")
        assert pair.a.dump()["localcnt"] > pair.b.dump()["remotecnt"]
        disk.heal()
        disk.fail("flush", errno.EIO, count=1)
        assert raw.do(FLUSH).error == 0
        write(raw, NEW, 2)
    dump = pair.a.dump()
    assert dump["syncing"] and dump["localcnt"] <= pair.b.dump()["remotecnt"]
    pair.a.set_role("init")
    pair.b.set_role("primary")
    pair.a.set_role("secondary")
    pair.wait_in_sync(pair.b)
    with RawClient(pair.b.socket()) as raw:
        assert raw.read(0, 4096) == NEW
    assert pair.differing() is None


def kill_and_wait(pair: Pair, who: str) -> None:
    """Until it is served again."""
    stage, worker = stage_pid(pair.a, "disk"), pair.a.status()["workerpid"]
    served = pair.a.said().count(" serves ")
    os.kill(stage if who == "disk stage" else worker, signal.SIGKILL)
    if who == "worker":
        eventually(lambda: pair.a.said().count(" serves ") > served, "a new worker serves")
    eventually(lambda: stage_pid(pair.a, "disk") not in (0, stage), "a new disk stage")


def test_out_of_date_and_with_a_secondary_that_fails_whatever_it_is_asked(make_pair: MakePair) -> None:
    """It takes each connection, and none lasts: clients wait no longer for it than for one that is not there. (The
    timeout is longer than the pauses between connections.)"""
    others: list[FaultDisk] = []

    def make(*arguments: object, **keywords: object) -> Pair:
        pair = make_pair(*arguments, **keywords)
        pair.create()
        others.append(FaultDisk.under(pair.b))
        return pair

    pair, disk, _ = prepare(make, "detach", timeout=8)
    other = others[0]
    disk.fail("write", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 1)
        eventually(lambda: pair.a.status()["syncing"] == 2, "everything is done by the secondary")
        other.fail("write", errno.EIO)
        assert raw.write(EXTENT, NEW) == EIO
    other.heal()
    with RawClient(pair.a.socket()) as raw:
        eventually(lambda: raw.write(EXTENT, NEW) == 0, "it is well again")


@pytest.mark.slow
def test_out_of_date_and_with_a_link_that_comes_and_goes(make_relayed: Callable[..., tuple[Pair, Relay]]) -> None:
    """For longer than clients would wait for a secondary that is gone: it does what it is asked each time. (The timeout
    is longer than the pauses between connections.)"""
    relays: list[Relay] = []

    def make(*arguments: object, **keywords: object) -> Pair:
        pair, relay = make_relayed(*arguments, **keywords)
        relays.append(relay)
        return pair

    pair, disk, _ = prepare(make, "detach", timeout=8)
    disk.fail("write", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 1)
        end = time.monotonic() + 20
        while time.monotonic() < end:
            relays[0].cut()
            write(raw, NEWER, 2)
    assert pair.a.said().count(" lost: ") > 2


def test_out_of_date_and_alone_waits_for_the_secondary_and_then_says_so(
    make_relayed: Callable[..., tuple[Pair, Relay]],
) -> None:
    """After its disk has failed, a primary does nothing without the secondary: it waits for it, and when that takes
    too long the client gets an error. It has never written alone, so there is no split-brain."""
    relays: list[Relay] = []

    def make(*arguments: object, **keywords: object) -> Pair:
        pair, relay = make_relayed(*arguments, **keywords)
        relays.append(relay)
        return pair

    pair, disk, start = prepare(make, "pass")
    disk.fail("write", errno.EIO, within=(start, END))
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 2)
        relays[0].cut()
        write(raw, NEWER, 2)  # waits until it is connected again
        pair.b.kill()
        cookie = raw.start(WRITE, 0, 4096, 0, NEW)
        assert raw.wait()[cookie].error == EIO
        pair.b.start()
        pair.b.set_role("secondary")
        eventually(lambda: raw.write(0, NEW) == 0, "the secondary is back")
        assert raw.read(0, 4096) == NEW
        assert raw.read(EXTENT, 4096) == NEWER
    disk.heal()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    assert not any("split-brain" in event for event in pair.events(pair.a))


def test_a_disk_that_was_ill_for_a_moment_is_told_that_it_is_out_of_date(make_pair: MakePair) -> None:
    """It took nothing when that was to be stored; as soon as it takes writes again, it says so itself, and whoever
    boots from it knows."""
    pair, disk, _ = prepare(make_pair, "detach")
    disk.fail("all", errno.EIO)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 2)
        assert "cannot be written: everything is done by the secondary" in pair.a.said()
        disk.heal()
        assert not pair.a.dump()["syncing"] or "takes writes again" in pair.a.said()
        eventually(lambda: pair.a.dump()["syncing"], "the component says that it is out of date")
        write(raw, NEWER, 3)
    assert pair.a.dump()["dirtyextents"] == 32
    back(pair, disk)
    check(pair, NEWER, 3)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
