"""A role is to be taken, and the disk fails just then: once, and is well again. What it has lost is known, and the
node is a secondary as soon as it can be one: nobody may ask for that again."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable

import pytest

from hast import boot
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.faultdisk import FaultDisk
from tests.nbdclient import FLUSH, RawClient

BLOCK = 4096
OFFSETS = range(2 * MIB - BLOCK, 16 * MIB, 2 * MIB)
TEXT = b"cached".ljust(BLOCK, b".")
EX_IOERR = 74
EX_TEMPFAIL = 75
EX_UNAVAILABLE = 69

MakePair = Callable[..., Pair]


def in_sync(make_pair: MakePair, which: str) -> tuple[Pair, FaultDisk]:
    """`a` is primary; the disk of the node with that letter."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4")
    pair.create()
    disk = FaultDisk.under(pair.a if which == "a" else pair.b)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    return pair, disk


def primary_lost(make_pair: MakePair) -> tuple[Pair, FaultDisk]:
    """In sync, a write on both that neither has flushed, and the primary is gone; the disk of the other one."""
    pair, disk = in_sync(make_pair, "b")
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


def test_component_that_is_still_in_use_is_secondary_later(make_pair: MakePair) -> None:
    """A process of the last hastd waits for the disk. The other node gets its second copy without anybody asking again;
    a primary is nobody who was not one in time."""
    pair, _ = in_sync(make_pair, "b")
    node = pair.a
    node.set_role("init")
    with node.component().open("r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for asked, then in (("primary", "init"), ("secondary", "secondary"), ("-f primary", "secondary")):
            done = node.ctl("role", *asked.split(), node.name(), check=False)
            assert done.returncode == EX_TEMPFAIL and "waits for the disk" in done.stderr
            status = node.status()
            assert status["role"] == then and "waits for the disk" in status["errmsg"], asked
        pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    assert node.status()["errmsg"] is None


def test_flush_that_a_forced_promotion_has_failed_is_known(make_pair: MakePair) -> None:
    """The disk says once what it has lost, to `role -f`."""
    pair, disk = primary_lost(make_pair)
    disk.fail("flush", errno.EIO, count=1)
    role_fails(pair.b, "-f", "primary")
    for _ in range(2):  # a cluster manager tries again
        assert pair.b.role("primary", check=False).returncode == EX_UNAVAILABLE
    mended(pair)


def test_primary_that_fails_a_flush_when_it_is_demoted_is_a_secondary(make_pair: MakePair) -> None:
    pair, disk = in_sync(make_pair, "a")
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
    pair, disk = in_sync(make_pair, "a")
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
    assert pair.a.role("primary", check=False).returncode in (EX_IOERR, EX_UNAVAILABLE)
    disk.heal()
    pair.a.set_role("secondary")
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    with RawClient(pair.b.socket()) as client:
        assert client.read(BLOCK, BLOCK) == TEXT
    assert pair.differing() is None


def test_primary_that_fails_a_flush_when_it_is_started_anew_lacks_what_the_other_one_has(make_pair: MakePair) -> None:
    pair, disk = in_sync(make_pair, "a")
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


@pytest.mark.parametrize("who", ["disk", "ggate", "worker"])
def test_primary_that_fails_a_flush_when_its_stages_are_started_anew_shows_nothing_old(
    make_pair: MakePair, who: str
) -> None:
    """One of its processes is killed, and the disk loses what is in its cache when the next one begins: no client has
    asked for that flush, so none is told, and the secondary has everything."""
    pair, disk = in_sync(make_pair, "a")
    start = int(pair.a.dump()["localoff"])
    with RawClient(pair.a.socket()) as client:
        assert client.write(BLOCK, TEXT) == 0
    disk.fail("flush", errno.EIO, count=1)
    title = f"hastd: {pair.a.name()} (primary)" + ("" if who == "worker" else f": {who}")
    os.kill(next(pid for pid, of in pair.a.titles().items() if of == title), signal.SIGKILL)
    eventually(lambda: "cannot be flushed" in pair.a.said(), "it has lost something")
    with disk.backing.open("r+b") as file:
        file.seek(start + BLOCK)
        file.write(bytes(BLOCK))
    eventually(lambda: pair.a.status()["role"] == "init", "it serves nobody")
    assert pair.a.role("primary", check=False).returncode == EX_UNAVAILABLE
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert client.read(BLOCK, BLOCK) == TEXT
    pair.a.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None


def in_doubt(make_pair: MakePair) -> tuple[Pair, FaultDisk]:
    """fullsync; `b` has lost its cache with its power and is being brought up to date, slowly; a client has flushed on
    `a` since. The counters say "in sync", `a` has not written alone, and `b` knows that it is a target."""
    pair = make_pair({"disk": 16 * MIB}, conf="timeout 4\nreplication fullsync\nsyncrate 1048576")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.b)
    pair.wait_in_sync(pair.b)
    eventually(lambda: pair.b.dump()["localcnt"] == 0, "it has stored that both are in sync")
    pair.b.kill()  # `a` writes alone, and is secondary before `b` has it: its localcnt is 1 from then on
    pair.a.set_role("primary")
    with RawClient(pair.a.socket()) as client:
        assert client.write(0, TEXT) == 0
    pair.a.set_role("secondary")
    pair.b.start()
    pair.b.set_role("primary")
    pair.wait_in_sync(pair.b)
    eventually(lambda: pair.b.dump()["remotecnt"] == 1, "the counters are in step")
    pair.swap(pair.b)
    pair.wait_in_sync(pair.a)
    start = int(pair.b.dump()["localoff"])
    with RawClient(pair.a.socket()) as client:
        for offset in OFFSETS:
            assert client.write(offset, TEXT) == 0
        pair.b.kill()
        boot.note(pair.b.rundir, pair.b.name()).unlink()  # it was the power
        with pair.b.component().open("r+b") as file:
            for offset in OFFSETS:
                file.seek(start + offset)
                file.write(bytes(BLOCK))
        pair.b.start()
        pair.b.set_role("secondary")
        pair.wait_connected(pair.a)
        assert client.do(FLUSH).error == 0
    assert pair.b.status()["syncing"] and pair.a.dump()["localcnt"] == pair.b.dump()["remotecnt"] == 1
    return pair, disk


@pytest.mark.parametrize("stored", [True, False], ids=["", "not stored"])
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_neither_node_is_believed_to_have_everything(make_pair: MakePair, role: str, stored: bool) -> None:
    """The secondary is not up to date yet after a loss of power, by counters that say "in sync"; the primary leaves its
    role and fails a flush: what the secondary lacks must not be copied over what was flushed here."""
    pair, disk = in_doubt(make_pair)
    pair.a.set_role("init")
    if stored:
        disk.fail("flush", errno.EIO, count=1)
    else:
        disk.fail("flush", errno.EIO)
        disk.fail("write", errno.EIO, within=(0, 4096))
    role_fails(pair.a, role)
    pair.a.set_role("init")
    disk.heal()
    for node in pair.nodes:
        assert node.role("primary", check=False).returncode == EX_UNAVAILABLE
    pair.a.ctl("role", "-f", "primary", pair.a.name())
    with RawClient(pair.a.socket()) as client:
        for offset in OFFSETS:
            assert client.read(offset, BLOCK) == TEXT
    eventually(lambda: "run 'hastctl" in pair.a.said(), "it is for an administrator to give up what the other one has")


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
