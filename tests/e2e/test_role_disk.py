"""A role is to be taken, and the disk fails just then: once, and is well again. What it has lost is known, and the
node is a secondary as soon as it can be one: nobody may ask for that again."""

from __future__ import annotations

import errno
from collections.abc import Callable

from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.faultdisk import FaultDisk
from tests.nbdclient import RawClient

BLOCK = 4096
EX_IOERR = 74
EX_UNAVAILABLE = 69

MakePair = Callable[..., Pair]


def primary_lost(make_pair: MakePair) -> tuple[Pair, FaultDisk]:
    """In sync, a write on both that neither has flushed, and the primary is gone; the disk of the other one."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, b"cached".ljust(BLOCK, b".")) == 0
    pair.a.kill()
    eventually(lambda: "connection from" in pair.b.said(), "the connection has ended")
    return pair, disk


def mended(pair: Pair) -> None:
    """`a` is primary again, and `b` gets from it what it lacks."""
    pair.a.start()
    pair.a.set_role("primary")
    pair.wait_in_sync(pair.a)
    eventually(lambda: not pair.b.dump()["syncing"], "it is complete")
    with RawClient(pair.a.socket()) as client:
        assert client.read(BLOCK, BLOCK) == b"cached".ljust(BLOCK, b".")
    assert pair.differing() is None


def role_fails(node: PairNode, *args: str) -> None:
    done = node.ctl("role", *args, node.name(), check=False)
    assert done.returncode == EX_IOERR and "cannot be flushed" in done.stderr


def test_secondary_that_could_not_be_promoted_goes_on(make_pair: MakePair) -> None:
    pair, disk = primary_lost(make_pair)
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.b, "primary")
    assert pair.b.status()["role"] == "secondary"
    mended(pair)


def test_flush_that_a_forced_promotion_has_failed_is_known(make_pair: MakePair) -> None:
    """The disk says once what it has lost, to `role -f`."""
    pair, disk = primary_lost(make_pair)
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.b, "-f", "primary")
    for _ in range(2):  # a cluster manager tries again
        assert pair.b.role("primary", check=False).returncode == EX_UNAVAILABLE
    mended(pair)


def test_primary_that_fails_a_flush_when_it_is_demoted_is_a_secondary(make_pair: MakePair) -> None:
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.a, "secondary")
    assert pair.a.status()["role"] == "secondary"
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None


def test_component_that_was_never_used_lacks_nothing(make_pair: MakePair) -> None:
    """Nobody has anything that it could lack: it need not be forced, and is the first primary."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.a, "secondary")
    assert pair.a.status()["role"] == "init"  # it was nothing before
    pair.a.set_role("secondary")
    pair.a.set_role("primary")
