"""What a node had acknowledged and not flushed is lost with the power of its machine, or with a flush that fails; it is
the secondary when it is there again."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from hast import boot
from tests.chaos.powercut.cut import Disk, State
from tests.chaos.powercut.history import SECTOR, Shape, number_of, pattern
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.faultdisk import FaultDisk, entries
from tests.nbdclient import FLUSH, RawClient

EXTENT = MIB // 4
EXTENTS = 24
SECTORS = 256  # of each write


def content(number: int, sector: int) -> bytes:
    return b"".join(pattern(number, sector + n) for n in range(SECTORS))


def write(client: RawClient, number: int) -> None:
    """To the beginning of each extent."""
    for extent in range(EXTENTS):
        at = extent * EXTENT
        assert client.write(at, content(number, at // SECTOR)) == 0


def shown(client: RawClient, extent: int) -> int:
    return number_of(client.read(extent * EXTENT, SECTOR), extent * EXTENT // SECTOR)


def power_cut(node: PairNode, disk: FaultDisk, log: Path, shape: Shape) -> None:
    """The node is gone, and its disk has what was flushed, and nothing else."""
    node.kill()
    boot.note(node.rundir, node.name()).unlink(missing_ok=True)  # it was in memory
    replayed = Disk(list(entries(log)), shape)
    replayed.advance(float("inf"))
    state: State = replayed.base
    with disk.backing.open("r+b") as file:
        for at, sector in enumerate(state):
            file.write(
                sector if isinstance(sector, bytes) else pattern(sector, at - shape.offset) if sector else bytes(SECTOR)
            )


@pytest.mark.slow
def test_flush_while_it_lacks_what_it_lost_is_not_promised_by_it_alone(
    make_pair: Callable[..., Pair], tmp_path: Path
) -> None:
    """It is back before anything was written without it, so the counters say "in sync"; a client's flush is answered,
    and then the primary is gone. The secondary lacks what was flushed: it must not be promoted."""
    pair = make_pair({"disk": EXTENTS * EXTENT}, conf="timeout 5\nsyncrate 524288")
    disk, log = FaultDisk.under(pair.b), tmp_path / "log"
    disk.record(log)
    pair.create("-e", str(EXTENT))
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    dump = pair.b.dump()
    shape = Shape(int(dump["localoff"]) // SECTOR, int(dump["datasize"]) // SECTOR, EXTENT)
    with RawClient(pair.a.socket()) as client:
        write(client, 1)
        assert client.do(FLUSH).error == 0
        write(client, 2)
        power_cut(pair.b, disk, log, shape)
        pair.b.start()
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        assert client.do(FLUSH).error == 0
    pair.a.kill()
    with pytest.raises(AssertionError, match="mix of old and new"):
        pair.b.set_role("primary")
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    eventually(lambda: not pair.b.dump()["syncing"], "the secondary is told that it is complete")
    pair.swap(pair.a)
    with RawClient(pair.b.socket()) as client:
        assert [shown(client, extent) for extent in range(EXTENTS)] == [2] * EXTENTS


def test_no_doubt_after_a_restart_of_hastd(make_pair: Callable[..., Pair]) -> None:
    """What was only in the cache is still there: the secondary may be promoted at once."""
    pair = make_pair({"disk": EXTENTS * EXTENT}, conf="timeout 5\nsyncrate 524288")
    pair.create("-e", str(EXTENT))
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    with RawClient(pair.a.socket()) as client:
        write(client, 2)
        pair.b.kill()
        pair.b.start()
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        pair.a.kill()
        pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert [shown(client, extent) for extent in range(EXTENTS)] == [2] * EXTENTS


def test_no_doubt_of_the_one_that_has_everything(make_pair: Callable[..., Pair]) -> None:
    """The primary's component is out of date: nothing was acknowledged that is not durable on the secondary, which may
    be promoted also after its machine has started anew."""
    pair = make_pair({"disk": EXTENTS * EXTENT}, conf="timeout 5\non-io-error detach")
    disk = FaultDisk.under(pair.a)
    pair.create("-e", str(EXTENT))
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    disk.fail("write", errno.EIO, count=1, within=(int(pair.a.dump()["localoff"]), 1 << 40))
    with RawClient(pair.a.socket()) as client:
        write(client, 2)
    assert pair.a.dump()["syncing"] and pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"]
    pair.b.kill()
    boot.note(pair.b.rundir, pair.b.name()).unlink()  # it was in memory
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_connected(pair.a)
    pair.a.kill()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert [shown(client, extent) for extent in range(EXTENTS)] == [2] * EXTENTS


@pytest.mark.slow
def test_flush_fails_and_the_node_dies_before_it_can_say_so(make_pair: Callable[..., Pair]) -> None:
    """The primary's disk stage has failed a flush, and what was in the cache is lost; all processes of the node die
    before anything of it is stored. The other one is promoted, and the counters say that both have everything. Until
    it is copied, what is lost is on the other node only, also what was flushed by then."""
    pair = make_pair({"disk": EXTENTS * EXTENT}, conf="timeout 5\nsyncrate 524288")
    disk = FaultDisk.under(pair.a)
    pair.create("-e", str(EXTENT))
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    note = boot.note(pair.a.rundir, pair.a.name())
    eventually(note.exists, "the primary is known to be whole")
    assert not boot.lost(pair.a.rundir, pair.a.name())
    with RawClient(pair.a.socket()) as client:
        write(client, 2)
        os.kill(pair.a.status()["workerpid"], signal.SIGSTOP)
        disk.fail("flush", errno.EIO)
        client.start(FLUSH)
        eventually(lambda: boot.lost(pair.a.rundir, pair.a.name()), "the disk stage says that something may be lost")
        pair.a.kill()
    disk.heal()
    pair.b.set_role("primary")
    pair.a.start()
    pair.a.set_role("secondary")
    pair.wait_connected(pair.b)
    with RawClient(pair.b.socket()) as client:
        assert client.do(FLUSH).error == 0
    pair.b.kill()
    with pytest.raises(AssertionError, match="mix of old and new"):
        pair.a.set_role("primary")
    pair.b.start()
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    eventually(lambda: not pair.a.dump()["syncing"], "it is told that it is complete")
