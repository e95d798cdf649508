"""The secondary's disk fails: clients do not notice, it is not believed, and is brought up to date when it is well."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hast import boot
from tests import tools
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_block_device import stage_pid
from tests.e2e.test_pair_promotion import refused
from tests.faultdisk import FaultDisk
from tests.nbdclient import FLUSH, TRIM, WRITE, RawClient

EXTENT = 2 * MIB
EXTENTS = 8
BLOCK = 4096

MakePair = Callable[..., Pair]


def prepare(make_pair: MakePair, mode: str = "fullsync", size: int = 16 * MIB) -> tuple[Pair, FaultDisk, int]:
    """Connected and in sync; the secondary's disk, and where its data begins."""
    pair = make_pair({"disk": size}, conf=f"timeout 4\nreplication {mode}")
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as client:
        work(client, b"old")
    pair.wait_in_sync(pair.a)
    return pair, disk, int(pair.b.dump()["localoff"])


def work(client: RawClient, text: bytes) -> None:
    """Writes, a delete and flushes, none of which may fail."""
    for extent in range(EXTENTS):
        assert client.write(extent * EXTENT, text.ljust(BLOCK, b".")) == 0
    assert client.do(TRIM, EXTENT, BLOCK).error == 0
    assert client.do(FLUSH).error == 0


def held(client: RawClient, text: bytes) -> None:
    """What work() has written is read."""
    for extent in range(EXTENTS):
        expected = bytes(BLOCK) if extent == 1 else text.ljust(BLOCK, b".")
        assert client.read(extent * EXTENT, BLOCK) == expected, extent


def dropped(pair: Pair) -> bool:
    """Whether the primary has lost its secondary since they were in sync."""
    return f"connection to tcp4://{pair.b.address} lost" in pair.a.said()


def mended(pair: Pair, text: bytes) -> None:
    """All is well again: both are in sync, have the same, and the secondary may take over with it."""
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    eventually(lambda: not pair.b.dump()["syncing"], "the secondary is told that it is complete")
    new = pair.swap(pair.a)
    with RawClient(new.socket()) as client:
        held(client, text)


FAULTS: dict[str, Callable[[FaultDisk, int], None]] = {
    "one write": lambda disk, start: disk.fail("write", errno.EIO, count=1, within=(start, 1 << 40)),
    "half a write": lambda disk, start: disk.fail("write", errno.EIO, count=1, within=(start, 1 << 40), half=True),
    "all writes": lambda disk, start: disk.fail("write", errno.EIO),
    "one flush": lambda disk, start: disk.fail("flush", errno.EIO, count=1),
    "full": lambda disk, start: disk.full(),
    "read-only": lambda disk, start: disk.readonly(),
}


CASES = [(fault, "fullsync") for fault in FAULTS if not fault.startswith("one")]
CASES += [(fault, mode) for fault in ("one write", "one flush") for mode in ("memsync", "async")]


@pytest.mark.parametrize(("fault", "mode"), CASES)
def test_is_dropped_and_brought_up_to_date(make_pair: MakePair, fault: str, mode: str) -> None:
    """Whatever it could not do is marked on the primary's disk until it has been copied."""
    pair, disk, start = prepare(make_pair, mode)
    FAULTS[fault](disk, start)
    with RawClient(pair.a.socket()) as client:
        work(client, b"new")
        eventually(lambda: dropped(pair), "the secondary is dropped")
        assert pair.a.dump()["dirty"] > 0
        work(client, b"newer")
        held(client, b"newer")
    assert pair.a.status()["stat_write_error"] == 0
    disk.heal()
    mended(pair, b"newer")


def test_flush_that_has_failed_is_not_made_good_by_the_next(make_pair: MakePair) -> None:
    """What was in the cache then may be lost: all of it is copied, though nothing was written since."""
    pair, disk, start = prepare(make_pair)
    with RawClient(pair.a.socket()) as client:
        for extent in range(EXTENTS):
            assert client.write(extent * EXTENT + BLOCK, b"cached".ljust(BLOCK, b".")) == 0
        disk.fail("flush", errno.EIO, count=1)
        assert client.do(FLUSH).error == 0
        eventually(lambda: dropped(pair), "the secondary is dropped")
        # The disk has lost it.
        with disk.backing.open("r+b") as file:
            for extent in range(EXTENTS):
                file.seek(start + extent * EXTENT + BLOCK)
                file.write(bytes(BLOCK))
    pair.wait_in_sync(pair.a)
    eventually(lambda: pair.differing() is None, "what it has lost is copied")


def test_flush_of_metadata_that_has_failed_is_not_made_good_by_the_next(make_pair: MakePair) -> None:
    """The worker stores that it is complete: what was in the cache then is lost, and no later flush brings it back."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4\nsyncrate 4194304")
    pair.create()
    disks = [FaultDisk.under(node) for node in pair.nodes]
    pair.start()
    pair.a.set_role("primary")
    start = int(pair.b.dump()["localoff"])
    with RawClient(pair.a.socket()) as client:
        work(client, b"old")
        pair.b.set_role("secondary")
        eventually(lambda: "extents to synchronise" in pair.a.said(), "they are connected")
        # Until this is over the primary cannot store it either, and does not tell the secondary.
        disks[0].fail("write", errno.EIO, within=(0, 4096))
        eventually(lambda: "cannot be written" in pair.a.said(), "everything is copied")
        for extent in range(EXTENTS):
            assert client.write(extent * EXTENT + BLOCK, b"cached".ljust(BLOCK, b".")) == 0
        with disks[1].backing.open("r+b") as file:
            for extent in range(EXTENTS):
                file.seek(start + extent * EXTENT + BLOCK)
                file.write(bytes(BLOCK))
        disks[1].fail("flush", errno.EIO, count=1)
        disks[0].heal()

        def failed() -> bool:
            assert client.write(2 * BLOCK, bytes(BLOCK)) == 0  # no quiet moment, in which the primary asks for a flush
            return "cannot be flushed" in pair.b.said()

        eventually(failed, "the secondary cannot store that it is complete")
        assert client.do(FLUSH).error == 0
    eventually(lambda: dropped(pair), "the secondary is dropped")
    pair.wait_in_sync(pair.a)
    eventually(lambda: pair.differing() is None, "what it has lost is copied")


def received_while_its_disk_is_slow(
    make_pair: MakePair, timeout: int, slow: Callable[[FaultDisk], None], killed: str = ""
) -> Pair:
    """memsync: a write is acknowledged that waits on the secondary behind a flush, for a disk on which `slow` was put.
    Then the primary dies; before it that stage of the secondary, with everything frozen."""
    pair = make_pair({"disk": 16 * MIB}, conf=f"timeout {timeout}\nreplication memsync")
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as client:
        work(client, b"old")
        pair.wait_in_sync(pair.a)
        start = int(pair.b.dump()["localoff"])
        assert client.write(0, b"new".ljust(BLOCK, b".")) == 0
        assert client.do(FLUSH).error == 0
        begun = disk.stats().flushes
        slow(disk)
        client.start(FLUSH)
        eventually(lambda: disk.stats().flushes > begun or disk.stats().waiting, "the flush has come to the disk")
        disk.delay("flush", 0)  # the next ones
        assert client.write(BLOCK, b"received".ljust(BLOCK, b".")) == 0
        with disk.backing.open("rb") as file:  # reading the disk itself might wait for the flush
            file.seek(start + BLOCK)
            assert file.read(BLOCK) == bytes(BLOCK), "it is in memory"
        if killed:
            os.kill(stage_pid(pair.b, killed), signal.SIGKILL)
    pair.a.kill()
    return pair


@pytest.mark.slow
def test_what_was_received_is_stored_before_another_role_is_taken(make_pair: MakePair) -> None:
    """However slow the disk is, as long as that is less than `timeout`."""
    pair = received_while_its_disk_is_slow(make_pair, 30, lambda disk: disk.delay("flush", 13000))
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert client.read(0, 2 * BLOCK) == b"new".ljust(BLOCK, b".") + b"received".ljust(BLOCK, b".")


@pytest.mark.slow
def test_what_was_received_and_could_not_be_stored_is_known_to_be_missing(make_pair: MakePair) -> None:
    """The disk hangs. At the next contact this node counts as incomplete, until everything is copied that the primary
    calls dirty."""
    pair = received_while_its_disk_is_slow(make_pair, 5, lambda disk: disk.hang("flush"))
    eventually(lambda: boot.lost(pair.b.rundir, pair.b.name()), "what was received is given up, and that is noted")
    pair.b.disks[0].heal()
    eventually(lambda: pair.b.dump()["syncing"], "it has stored that it lacks something")
    refused(pair.b)
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["recv", "disk"])
def test_what_was_received_is_known_to_be_missing_when_a_stage_was_killed(make_pair: MakePair, stage: str) -> None:
    """The primary still has it, and dies before it can be asked: no surprise promotion."""
    pair = received_while_its_disk_is_slow(make_pair, 30, lambda disk: disk.delay("flush", 3000), stage)
    eventually(lambda: pair.b.dump()["syncing"], "it has stored that it lacks something")
    refused(pair.b)
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    eventually(lambda: not pair.b.dump()["syncing"], "it is complete")
    pair.a.kill()
    pair.b.set_role("primary")


@pytest.mark.parametrize("mode", ["memsync", "fullsync"])
def test_what_a_failed_flush_has_lost_is_known_to_be_missing(make_pair: MakePair, mode: str) -> None:
    """It was on the disk, in its cache. The primary has it, and is gone before it can be asked."""
    pair, disk, _ = prepare(make_pair, mode)
    with RawClient(pair.a.socket()) as client:
        work(client, b"old")
        pair.wait_in_sync(pair.a)
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
        disk.fail("flush", errno.EIO, count=1)
        assert client.do(FLUSH).error == 0
    pair.a.kill()
    eventually(lambda: pair.b.dump()["syncing"], "it has stored that it lacks something")
    refused(pair.b)
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


@pytest.mark.parametrize("stays", [True, False])
def test_who_could_not_store_that_it_lacks_something_does_when_its_disk_is_well(
    make_pair: MakePair, stays: bool
) -> None:
    """The disk fails the flush, and then the metadata; it is well before the worker ends, or when it does. Forced, it
    is not taken for one that has everything: the other node is not overwritten."""
    pair, disk, _ = prepare(make_pair, "fullsync")
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
        disk.fail("flush", errno.EIO, count=1)
        disk.fail("write", errno.EIO, within=(0, 4096))
        assert client.do(FLUSH).error == 0
        eventually(lambda: "this node is incomplete" in pair.b.said(), "it knows")
    pair.a.kill()
    assert not pair.b.dump()["syncing"], "it could not store it"
    refused(pair.b)
    disk.heal()
    if stays:
        eventually(lambda: pair.b.dump()["syncing"], "it is stored after all")
        refused(pair.b)
    assert pair.b.ctl("role", "-f", "primary", pair.b.name()).returncode == 0
    with RawClient(pair.b.socket()) as client:
        assert client.write(0, b"alone".ljust(BLOCK, b".")) == 0
    pair.a.start()
    pair.a.set_role("secondary")
    eventually(lambda: "nique ID mismatch" in pair.b.said() or "plit-brain" in pair.b.said(), "that is found")


def test_disk_that_fails_every_flush_holds_up_nothing_but_itself(make_pair: MakePair) -> None:
    """What it lacks it tries to store, and that fails, and that is no news: it once became more with each try."""
    pair, disk, _ = prepare(make_pair, "fullsync")
    disk.fail("flush", errno.EIO)
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
        assert client.do(FLUSH).error == 0
        eventually(lambda: "this node is incomplete" in pair.b.said(), "it knows")
    pair.a.kill()
    log = pair.b.log.read_text()
    eventually(lambda: pair.b.status()["status"] != "complete", "the connection has ended")
    refused(pair.b)
    pair.b.set_role("init")
    assert "killing it" not in pair.b.said()
    assert pair.b.log.read_text()[len(log) :].count("\n") < 20


def test_loss_that_could_not_be_stored_at_a_promotion_is_known_at_the_next(make_pair: MakePair) -> None:
    pair, disk, _ = prepare(make_pair, "fullsync")
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
    pair.a.kill()
    eventually(lambda: "connection from" in pair.b.said(), "the connection has ended")
    disk.fail("flush", errno.EIO, count=1)
    disk.fail("write", errno.EIO, within=(0, 4096))
    assert pair.b.role("primary", check=False).returncode == 74
    disk.heal()
    refused(pair.b)
    assert pair.b.dump()["syncing"]
    assert pair.b.ctl("role", "-f", "primary", pair.b.name()).returncode == 0


def test_primary_that_wrote_alone_and_fails_a_flush_when_it_leaves_may_be_primary_again(make_pair: MakePair) -> None:
    """Nobody has more than it has."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"alone".ljust(BLOCK, b".")) == 0
    disk.fail("flush", errno.EIO, count=1)
    assert pair.a.role("secondary", check=False).returncode == 74
    assert "cannot be flushed" in pair.a.said()
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as client:
        assert client.read(BLOCK, BLOCK) == b"alone".ljust(BLOCK, b".")


def test_flush_that_fails_when_it_is_to_become_primary(make_pair: MakePair) -> None:
    """What it had acknowledged and not flushed is lost then; the disk says so once, and the other node has it."""
    pair, disk, _ = prepare(make_pair, "fullsync")
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
    pair.a.kill()
    eventually(lambda: "connection from" in pair.b.said(), "the connection has ended")
    disk.fail("flush", errno.EIO, count=1)
    done = pair.b.role("primary", check=False)
    assert done.returncode == 74 and "cannot be flushed" in done.stderr
    for _ in range(2):  # a cluster manager tries again
        refused(pair.b)
    pair.b.set_role("secondary")
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    eventually(lambda: not pair.b.dump()["syncing"], "it is complete")


def test_disk_that_is_too_slow_lacks_nothing_that_was_acknowledged(make_pair: MakePair) -> None:
    """fullsync: nobody was told that the write is there."""
    pair, disk, _ = prepare(make_pair)
    disk.hang("write")
    with RawClient(pair.a.socket()) as client:
        client.start(WRITE, BLOCK, BLOCK, 0, b"n" * BLOCK)
        eventually(lambda: bool(disk.stats().waiting), "it is with the disk")
    pair.a.kill()
    eventually(lambda: "its disk is too slow" in pair.b.said(), "what was received is given up")
    disk.heal()
    pair.b.set_role("primary")


def test_stage_that_is_killed_while_nothing_is_under_way_makes_no_target(make_pair: MakePair) -> None:
    pair, _, _ = prepare(make_pair, "memsync")
    with RawClient(pair.a.socket()) as client:
        work(client, b"old")
        pair.wait_in_sync(pair.a)
    os.kill(int(eventually(lambda: stage_pid(pair.b, "recv"), "a recv stage")), signal.SIGKILL)
    eventually(lambda: "connection from" in pair.b.said(), "the connection has ended")
    assert not pair.b.dump()["syncing"] and "incomplete" not in pair.b.said()
    pair.a.kill()
    pair.b.set_role("primary")


@contextmanager
def hanging(disk: FaultDisk, kinds: str) -> Iterator[None]:
    disk.hang(kinds)
    try:
        yield
    finally:
        disk.release()


def test_hangs_for_longer_than_timeout(make_pair: MakePair) -> None:
    """Invariant 8: the primary goes on alone."""
    pair, disk, _ = prepare(make_pair)
    with RawClient(pair.a.socket()) as client:
        with hanging(disk, "all"):
            work(client, b"new")
            eventually(lambda: dropped(pair), "the secondary is dropped")
            work(client, b"newer")
            held(client, b"newer")
        mended(pair, b"newer")


@pytest.mark.parametrize("mode", ["fullsync", "async"])
def test_slow_is_not_lost(make_pair: MakePair, mode: str) -> None:
    pair, disk, _ = prepare(make_pair, mode)
    disk.delay("all", 40)
    with RawClient(pair.a.socket()) as client:
        for text in (b"one", b"two", b"three"):
            work(client, text)
    assert not dropped(pair)
    disk.heal()
    mended(pair, b"three")


def test_a_delete_that_it_cannot_do_is_no_failure(make_pair: MakePair) -> None:
    """mkfs and fstrim send them: zeros are written instead, and the connection stays."""
    pair, disk, _ = prepare(make_pair)
    disk.fail("delete", errno.EOPNOTSUPP)
    with RawClient(pair.a.socket()) as client:
        work(client, b"new")
        held(client, b"new")
    assert disk.stats().failed > 0
    assert not dropped(pair)
    assert pair.differing() is None
    mended(pair, b"new")


def test_deletes_come_in_parts(make_pair: MakePair) -> None:
    """Where they take as long as writing, a large one must not take longer than the timeout."""
    pair, disk, _ = prepare(make_pair, size=512 * MIB)
    before = disk.stats().deletes
    with RawClient(pair.a.socket()) as client:
        assert client.do(TRIM, 0, 512 * MIB).error == 0
    assert disk.stats().deletes - before == 8
    assert pair.differing() is None


@pytest.mark.root
def test_large_sectors_take_small_requests(make_pair: MakePair) -> None:
    """The primary's clients know nothing of them."""
    tools.need_root()
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    backing = pair.b.component().with_suffix(".img")
    with backing.open("wb") as file:
        file.truncate(16 * MIB + 8192)  # there the map takes a whole sector
    device = tools.loop_device(backing, "--sector-size", "4096")
    try:
        pair.b.component().unlink()
        pair.b.component().symlink_to(device)
        pair.create()
        pair.start()
        pair.roles(pair.a)
        pair.wait_in_sync(pair.a)
        with RawClient(pair.a.socket()) as client:
            for sector in (1, 6, 8, 4096):
                assert client.write(sector * 512, b"x" * 512) == 0
            assert client.do(TRIM, 512, 4096).error == 0
            assert client.do(FLUSH).error == 0
        assert not dropped(pair)
        pair.wait_in_sync(pair.a)
        assert pair.differing() is None
    finally:
        pair.b.stop()
        subprocess.run(["losetup", "-d", device], check=True)


def test_dies_and_is_replaced_by_itself(make_pair: MakePair) -> None:
    """A disk that is pulled, and put back: whoever had it open has to open it anew."""
    pair, disk, _ = prepare(make_pair)
    with RawClient(pair.a.socket()) as client:
        disk.die()
        work(client, b"new")
        eventually(lambda: dropped(pair), "the secondary is dropped")
        pair.b.set_role("init")
        disk.start()
        work(client, b"newer")
        pair.b.set_role("secondary")
    mended(pair, b"newer")
