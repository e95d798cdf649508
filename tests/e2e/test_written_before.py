"""A write is begun without the secondary, and done only when there is one, which has been told that it lacks nothing.

It must not be acknowledged before the secondary has it, or knows that it is a target (invariant 10).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hast.metadata import unpack
from tests.chaos.powercut.promise import is_metadata
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.faultdisk import FaultDisk, entries
from tests.nbdclient import WRITE, RawClient

OLD, NEW = b"old " * 1024, b"new " * 1024

Begun = tuple[Pair, FaultDisk, FaultDisk, RawClient]


@pytest.fixture
def begun(make_pair: Callable[..., Pair]) -> Iterator[Begun]:
    """Connected, in sync; a write hangs in the primary's disk since before that. Fullsync: what is answered can be read
    from the secondary's disk at once."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 20\nreplication fullsync")
    pair.create()
    disks = [FaultDisk.under(node) for node in pair.nodes]
    pair.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as raw:
        # Its extent is still marked, so that no update of the map comes before the data.
        eventually(lambda: left_marked(pair, raw), "the secondary is gone, and an extent is marked")
        disks[0].hang("write")
        raw.start(WRITE, 0, len(NEW), payload=NEW)
        eventually(lambda: disks[0].stats().waiting == 1, "the write has reached the disk")
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        yield pair, *disks, raw


def left_marked(pair: Pair, raw: RawClient) -> bool:
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    assert raw.write(0, OLD) == 0
    pair.b.set_role("init")
    eventually(lambda: "lost" in pair.a.said().rpartition("connected to")[2], "the primary knows it")
    return bool(pair.a.status()["dirty"])


def test_it_is_answered_when_the_secondary_has_it(begun: Begun, tmp_path: Path) -> None:
    """Nothing was acknowledged without the secondary, and the counters never say so."""
    pair, disk, _, raw = begun
    disk.record(tmp_path / "log")
    disk.release()
    assert [answer.error for answer in raw.wait(1).values()] == [0]
    assert pair.data(pair.b)[: len(NEW)] == NEW
    pair.wait_in_sync(pair.a)
    disk.record(None)
    blocks = [unpack(e.data, pair.a.name()) for e in entries(tmp_path / "log") if is_metadata(e)]
    assert not [block for block in blocks if block.alone]
    assert pair.differing() is None


def test_a_secondary_that_does_not_get_it_soon_is_a_target(begun: Begun) -> None:
    """The copying takes too long: the connection is left, and the next handshake says what the secondary lacks."""
    pair, disk, slow, raw = begun
    slow.delay("write", 3000)
    disk.release()
    assert [answer.error for answer in raw.wait(1).values()] == [0]
    assert pair.a.dump()["localcnt"] > pair.b.dump()["remotecnt"]
    eventually(lambda: pair.b.dump()["syncing"], "the secondary is known as a target")
    slow.heal()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
