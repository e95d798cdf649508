"""A flush of the disk is going to fail, and whoever waits for it is gone before: who comes after knows it all the same.

The disk tells it once, to the disk stage, which therefore ends only when it has heard it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hast import spawner, workers
from hast.activemap import METADATA_SIZE
from hast.pipeline import END_SECONDS
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.e2e.test_block_device import stage_pid
from tests.e2e.test_primary_disk import EXTENT, NEW, NEWER, back, check, kill_and_wait, prepare, write
from tests.e2e.test_reload import reload
from tests.e2e.test_role_disk import BLOCK, TEXT, in_sync, primary_lost
from tests.faultdisk import FaultDisk
from tests.nbdclient import EIO, FLUSH, WRITE, RawClient

MakePair = Callable[..., Pair]
EX_UNAVAILABLE = 69
PATIENCE = 1.5  # seconds: longer than a stage is waited for that is to leave its resource to the next hastd
LONGER = END_SECONDS + 3  # than a stage is waited for that is to end: an ill disk may hang before it fails


def take_away(node: PairNode, who: str) -> None:
    """The process that is meant is killed, or all of hastd is started anew in good order."""
    assert node.hastd is not None
    if who == "restart":
        node.hastd.send_signal(signal.SIGUSR2)
    elif who == "main":
        node.hastd.kill()
        node.hastd.wait()
        node.hastd = None
    elif who == "spawner":
        os.kill(next(pid for pid, title in node.titles().items() if title == "hastd: spawner"), signal.SIGKILL)
    else:
        os.kill(stage_pid(node, "ggate") if who == "ggate stage" else int(node.status()["workerpid"]), signal.SIGKILL)


def flush(pair: Pair) -> None:
    """A client that may go without an answer."""
    with contextlib.suppress(OSError, AssertionError), RawClient(pair.a.socket()) as client:
        assert client.do(FLUSH).error != 0


@contextlib.contextmanager
def failing_flush(pair: Pair, disk: FaultDisk, start: int, patience: float = PATIENCE) -> Iterator[None]:
    """Of what was written to the second extent, which it loses; it ends so many seconds after those who are taken away
    in the body."""
    with RawClient(pair.a.socket()) as client, ThreadPoolExecutor() as pool:
        assert client.write(EXTENT, NEW) == 0
        disk.hang("flush")
        pool.submit(flush, pair)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        yield
        time.sleep(patience)
        with disk.backing.open("r+b") as file:
            file.seek(start + EXTENT)
            file.write(bytes(len(NEW)))
        disk.fail("flush", errno.EIO, count=1)
        disk.release()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("who", "patience"),
    [(who, PATIENCE) for who in ("ggate stage", "worker", "spawner", "main", "restart")]
    + [(who, LONGER) for who in ("ggate stage", "main", "restart")],
)
def test_primary(make_pair: MakePair, who: str, patience: float) -> None:
    """No client was told, and the secondary may have what was lost: nothing older is shown here, nor copied there."""
    pair, disk, start = prepare(make_pair, "pass", timeout=30)
    node, ggate = pair.a, stage_pid(pair.a, "ggate")
    with failing_flush(pair, disk, start, patience):
        take_away(node, who)
        eventually(lambda: ggate not in node.pids(), "nobody waits for it any more")
    if who == "main":
        node.start()
    eventually(lambda: "a mix of old and new" in node.said(), "it may not be primary")
    eventually(lambda: node.status()["role"] == "init", "it serves nobody")
    assert "lost what the other node may have" in node.status()["errmsg"], "it is said why, and what to do"
    assert node.role("primary", check=False).returncode == EX_UNAVAILABLE
    assert pair.data(pair.b)[EXTENT : EXTENT + len(NEW)] == NEW, "nothing is copied from what has lost it"
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert client.read(EXTENT, len(NEW)) == NEW
    node.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None


@pytest.mark.parametrize("who", ["disk stage", "worker"])
def test_primary_whose_client_was_told(make_pair: MakePair, who: str) -> None:
    """The secondary is away, and has all that the disk has lost: who comes after does not show what is left."""
    pair, disk, start = prepare(make_pair, "pass")
    with RawClient(pair.a.socket()) as client:
        assert client.write(EXTENT, NEW) == 0
        pair.b.kill()
        eventually(lambda: "lost" in pair.a.said().rpartition("connected to")[2], "the secondary is gone")
        disk.fail("flush", errno.EIO, count=1)
        assert client.do(FLUSH).error == EIO
    with disk.backing.open("r+b") as file:
        file.seek(start + EXTENT)
        file.write(bytes(len(NEW)))
    os.kill(stage_pid(pair.a, "disk") if who == "disk stage" else int(pair.a.status()["workerpid"]), signal.SIGKILL)
    eventually(lambda: pair.a.status()["role"] == "init", "it serves nobody")
    pair.b.start()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert client.read(EXTENT, len(NEW)) == NEW
    pair.a.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None


def test_primary_that_was_about_to_write_alone(make_pair: MakePair) -> None:
    """Its disk has not taken that yet, and then fails the flush with which its stages begin: the next attempt to store
    it would say that this node has written alone, and so lacks nothing."""
    pair, disk, start = prepare(make_pair, "pass", timeout=30)
    node, ggate = pair.a, stage_pid(pair.a, "ggate")
    with RawClient(node.socket()) as client:
        assert client.write(EXTENT, NEW) == 0
        disk.hang("flush")
        disk.fail("write", errno.EIO, count=1, within=(0, 4096))
        pair.b.kill()
        eventually(lambda: "lost" in node.said().rpartition("connected to")[2], "the secondary is gone")
        client.start(WRITE, EXTENT, len(NEW), payload=NEW)
        eventually(lambda: "writes wait for it" in node.said(), "it could not be stored")
        os.kill(ggate, signal.SIGKILL)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        time.sleep(PATIENCE)  # for the next attempt to be due
        with disk.backing.open("r+b") as file:
            file.seek(start + EXTENT)
            file.write(bytes(len(NEW)))
        disk.fail("flush", errno.EIO, count=1)
        disk.release()
    eventually(lambda: node.status()["role"] == "init", "it serves nobody")
    assert node.role("primary", check=False).returncode == EX_UNAVAILABLE


@pytest.mark.parametrize("how", ["stages anew", "switched on", "demoted"])
def test_map_that_was_lost_as_well(make_pair: MakePair, how: str) -> None:
    """Without `metaflush` it is durable no sooner than what it speaks of: all of it is copied then."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 30\nmetaflush off")
    pair.create()
    disk = FaultDisk.under(pair.a)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    node, start = pair.a, int(pair.a.dump()["localoff"])
    with RawClient(node.socket()) as client, ThreadPoolExecutor() as pool:
        assert client.do(FLUSH).error == 0
        before, flushes = disk.backing.read_bytes()[:start], disk.stats().flushes
        assert client.write(20 * EXTENT, NEW) == 0
        disk.hang("flush")
        if how == "demoted":
            pair.b.kill()
            eventually(lambda: "lost" in node.said().rpartition("connected to")[2], "the secondary is gone")
            pool.submit(flush, pair)
        elif how == "switched on":  # it is written once more because of that, and nobody knows yet that it is durable
            reload(node, node.conf.read_text().replace("metaflush off", "metaflush on"))
        if how != "demoted":
            os.kill(stage_pid(node, "ggate"), signal.SIGKILL)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        assert disk.stats().flushes == flushes, "nothing has been flushed since"
        with disk.backing.open("r+b") as file:
            file.seek(METADATA_SIZE)
            file.write(before[METADATA_SIZE:])
            file.seek(start + 20 * EXTENT)
            file.write(bytes(len(NEW)))
        disk.fail("flush", errno.EIO, count=1)
        disk.release()
    if how == "demoted":
        node.set_role("secondary")
        pair.b.start()
    else:
        eventually(lambda: node.status()["role"] == "init", "it serves nobody")
    pair.b.set_role("primary")
    node.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.data(pair.b)[20 * EXTENT : 20 * EXTENT + len(NEW)] == NEW
    assert pair.differing() is None


def test_worker_dies_while_the_disk_takes_no_map(make_pair: MakePair) -> None:
    """It was given up because of a flush, without `metaflush`, so that its map is not believed, and takes no other
    one by now. The secondary has everything, and goes on doing it."""
    pair, disk, _ = prepare(make_pair, "detach\nmetaflush off")
    disk.fail("flush", errno.EIO, count=1)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEW, 4)
    eventually(lambda: pair.a.dump()["syncing"], "it is stored that it is out of date")
    disk.fail("write", errno.EIO)
    kill_and_wait(pair, "worker")
    check(pair, NEW, 4)
    with RawClient(pair.a.socket()) as raw:
        write(raw, NEWER, 6)
    back(pair, disk)
    check(pair, NEWER, 6)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_worker_dies_while_the_disk_of_a_node_that_is_alone_takes_no_map(make_pair: MakePair) -> None:
    """The same where nobody has more: what there is can be read, and all of it is copied once the role is new."""
    pair, disk, _ = prepare(make_pair, "detach\nmetaflush off")
    pair.b.stop()
    with RawClient(pair.a.socket()) as raw:
        assert raw.write(0, NEW) == 0
        disk.fail("flush", errno.EIO, count=1)
        assert raw.do(FLUSH).error == EIO
    disk.fail("write", errno.EIO)
    kill_and_wait(pair, "worker")
    check(pair, NEW, 1)
    kill_and_wait(pair, "disk stage")
    check(pair, NEW, 1)
    assert pair.a.ctl("role", "init", pair.a.name()).returncode == 0
    assert pair.a.role("primary", check=False).returncode != 0, "the map has to be marked before that is forgotten"
    disk.heal()
    pair.a.set_role("primary")
    assert pair.a.status()["dirty"] == 64 * MIB
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    check(pair, NEW, 1)
    assert pair.differing() is None


def test_secondary_is_not_promoted(make_pair: MakePair) -> None:
    """It had acknowledged what it has lost, and the primary is gone."""
    pair, disk = in_sync(make_pair, "b")
    start, recv = int(pair.b.dump()["localoff"]), stage_pid(pair.b, "recv")
    with failing_flush(pair, disk, start):
        take_away(pair.b, "worker")
        eventually(lambda: recv not in pair.b.pids(), "nobody waits for it any more")
        pair.a.kill()
    eventually(lambda: pair.b.status()["workerpid"], "another worker")
    assert pair.b.role("primary", check=False).returncode == EX_UNAVAILABLE


@pytest.mark.slow
def test_secondary_whose_disk_hangs_before_it_fails_is_not_promoted(make_pair: MakePair) -> None:
    """Neither of its stages ends in time."""
    pair, disk = in_sync(make_pair, "b")
    start = int(pair.b.dump()["localoff"])
    with failing_flush(pair, disk, start, END_SECONDS + LONGER):
        pair.a.kill()
    eventually(lambda: "connection from" in pair.b.said(), "the connection has ended")
    assert pair.b.role("primary", check=False).returncode == EX_UNAVAILABLE


def fails(disk: FaultDisk, start: int) -> None:
    """The flush that hangs does, once, and has lost what was written."""
    with disk.backing.open("r+b") as file:
        file.seek(start + BLOCK)
        file.write(bytes(BLOCK))
    disk.fail("flush", errno.EIO, count=1)
    disk.release()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stopped", "main killed"])
def test_worker_that_waits_for_its_own_flush_is_not_killed(make_pair: MakePair, how: str) -> None:
    """It was to be primary, the disk hangs, and hastd is ended: the next one knows what the disk has lost."""
    pair, disk = primary_lost(make_pair)
    node, start = pair.b, int(pair.b.dump()["localoff"])
    assert node.hastd is not None
    with ThreadPoolExecutor() as pool:
        disk.hang("flush")
        pool.submit(node.role, "primary", check=False)
        eventually(lambda: disk.stats().waiting, "the disk is asked")
        node.hastd.send_signal(signal.SIGTERM if how == "stopped" else signal.SIGKILL)
        time.sleep(max(workers.STOP_SECONDS + workers.TERM_SECONDS, spawner.LAST_SECONDS) + PATIENCE)
        fails(disk, start)
        node.hastd.wait()
    node.start()
    assert node.role("primary", check=False).returncode == EX_UNAVAILABLE


@pytest.mark.slow
def test_role_that_is_forced_while_the_disk_hangs(make_pair: MakePair) -> None:
    """Nobody waits for it any more; what the disk has lost is not copied over what the secondary has."""
    pair, disk = in_sync(make_pair, "a")
    node, start, before = pair.a, int(pair.a.dump()["localoff"]), pair.a.dump()["localcnt"]
    with RawClient(node.socket()) as client:
        assert client.write(BLOCK, TEXT) == 0
    node.set_role("init")
    disk.hang("flush")
    assert node.ctl("role", "-f", "primary", node.name(), check=False).returncode != 0
    fails(disk, start)
    eventually(lambda: not any(title.endswith(": metadata") for title in node.titles().values()), "it has ended")
    assert node.role("primary", check=False).returncode == EX_UNAVAILABLE
    assert node.dump()["localcnt"] == before
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        assert client.read(BLOCK, BLOCK) == TEXT
    node.set_role("secondary")
    pair.wait_in_sync(pair.b)
    assert pair.differing() is None


@pytest.mark.parametrize("who", ["ggate stage", "worker"])
def test_disk_stage_that_is_stopped_ends_all_the_same(pair: Pair, who: str) -> None:
    """It is not killed, and must not keep its component from who comes next."""
    stage, ggate = stage_pid(pair.a, "disk"), stage_pid(pair.a, "ggate")
    os.kill(stage, signal.SIGSTOP)
    take_away(pair.a, who)
    eventually(lambda: stage not in pair.a.pids(), "it is gone")
    eventually(lambda: stage_pid(pair.a, "ggate") not in (0, ggate), "other stages")
    pair.wait_in_sync(pair.a)
    assert "does not end" not in pair.a.said()
