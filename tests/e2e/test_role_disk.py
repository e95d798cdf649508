"""A role is to be taken, and the disk fails just then: once, and is well again. What it has lost is known, and the
node is a secondary as soon as it can be one: nobody may ask for that again."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.faultdisk import FaultDisk
from tests.nbdclient import RawClient

BLOCK = 4096
TEXT = b"cached".ljust(BLOCK, b".")
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
        assert client.write(BLOCK, TEXT) == 0
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
        assert client.read(BLOCK, BLOCK) == TEXT
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


@pytest.mark.parametrize("role", ["secondary", "init"])
@pytest.mark.parametrize("force", [False, True], ids=["", "forced"])
def test_demotion_whose_loss_could_not_be_stored_is_known_at_the_next_promotion(
    make_pair: MakePair, role: str, force: bool
) -> None:
    """It was primary, says its disk: the other one has what it has lost, and it must not be copied over that."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4", hooks=True)
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    start = int(pair.a.dump()["localoff"])
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, TEXT) == 0
    disk.fail("flush", errno.EIO)
    disk.fail("write", errno.EIO, within=(0, 4096))
    role_fails(pair.a, "secondary")
    pair.a.set_role(role)
    with disk.backing.open("r+b") as file:  # what it has lost
        file.seek(start + BLOCK)
        file.write(bytes(BLOCK))
    if role == "init":
        disk.heal()
    if force:
        disk.heal()
        pair.a.set_role("init")
        assert pair.a.ctl("role", "-f", "primary", pair.a.name()).returncode == 0
        eventually(lambda: "nothing in common" in pair.a.said(), "the nodes find that both have something of their own")
        return
    if pair.a.role("primary", check=False).returncode == 0:  # what it lacks is read from the other one
        with RawClient(pair.a.socket()) as client:
            assert client.read(BLOCK, BLOCK) == TEXT
        pair.a.role("secondary", check=False)  # that its disk refuses
    disk.heal()
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    with RawClient(pair.b.socket()) as client:
        assert client.read(BLOCK, BLOCK) == TEXT
    assert pair.differing() is None


def test_primary_that_fails_a_flush_when_it_is_started_anew_lacks_what_the_other_one_has(make_pair: MakePair) -> None:
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    start = int(pair.a.dump()["localoff"])
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, TEXT) == 0
    pair.a.set_role("init")
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.a, "primary")
    with disk.backing.open("r+b") as file:
        file.seek(start + BLOCK)
        file.write(bytes(BLOCK))
    assert pair.a.role("primary", check=False).returncode == EX_UNAVAILABLE
    pair.a.set_role("secondary")
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    with RawClient(pair.b.socket()) as client:
        assert client.read(BLOCK, BLOCK) == TEXT
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
