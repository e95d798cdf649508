"""Invariant 10: a secondary that is the target of a synchronisation which is not complete knows that, refuses to become
primary unless it is forced to, and may become primary as soon as its primary has said that it is complete."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.node import MIB, eventually, loopback
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay, Way
from tests.e2e.test_block_device import stage_pid
from tests.e2e.test_reload import reload
from tests.nbdclient import FLUSH, WRITE, RawClient

SIZE = 32 * MIB
SLOW = "timeout 5\ncompression none\nsyncrate 65536"  # 8 minutes for all of it

MakePair = Callable[..., Pair]


def write(node: PairNode, fill: bytes, *offsets: int) -> None:
    with RawClient(node.socket()) as client:
        for offset in offsets:
            assert client.write(offset, fill * 4096) == 0
        assert client.do(FLUSH).error == 0


def refused(node: PairNode) -> None:
    """`hastctl role primary` says why, and what to do."""
    done = node.role("primary", check=False)
    assert done.returncode == 69
    for words in (node.name(), "not complete", "wait for it", f"'hastctl role -f primary {node.name()}'"):
        assert words in done.stderr


def make_target(pair: Pair) -> None:
    """`a` is primary; `b` gets its data from it, and that takes longer than any test."""
    pair.create()
    pair.start()
    pair.a.set_role("primary")
    write(pair.a, b"a", *range(0, SIZE, 2 * MIB))
    pair.b.set_role("secondary")
    pair.wait_connected(pair.a)
    eventually(lambda: pair.b.status()["syncing"], "b is a target")


def test_a_target_refuses_until_it_is_forced(make_pair: MakePair) -> None:
    pair = make_pair({"disk": SIZE}, conf=SLOW, hooks=True)
    make_target(pair)
    refused(pair.b)
    # It goes on being what it was.
    assert pair.b.status() == pair.b.status() | {"role": "secondary", "status": "degraded", "syncing": 1}
    assert "  syncing: yes\n" in pair.b.ctl("list", pair.b.name()).stdout
    pair.wait_connected(pair.a)
    # Its source is lost.
    pair.a.kill()
    refused(pair.b)
    # And it still knows after a restart, whatever role it had then.
    pair.b.kill()
    assert pair.b.dump()["syncing"]
    assert "syncing: yes\n" in pair.b.ctl("dump", pair.b.name()).stdout
    pair.b.start()
    refused(pair.b)
    assert pair.b.status()["role"] == "init"
    before = pair.b.dump()
    assert pair.b.ctl("role", "-f", "primary", pair.b.name()).returncode == 0
    after = pair.b.dump()
    assert not after["syncing"] and after["localcnt"] == before["localcnt"] + 1
    assert f"{pair.b.name()}: becomes primary by force" in pair.b.said()
    write(pair.b, b"b", 0)
    # Both have something of their own now, and find that out.
    pair.a.start()
    pair.a.set_role("secondary")
    eventually(lambda: f"split-brain {pair.a.name()}" in pair.events(pair.a), "the nodes find a split-brain")


def test_force_is_for_the_role_primary_only(make_pair: MakePair) -> None:
    pair = make_pair({"disk": SIZE})
    done = pair.a.ctl("role", "-f", "secondary", pair.a.name(), check=False)
    assert done.returncode == 64 and "only the role primary can be forced" in done.stderr


def test_force_does_nothing_where_nothing_has_to_be_forced(make_pair: MakePair) -> None:
    pair = make_pair({"disk": SIZE})
    pair.up()
    before = pair.b.dump()
    pair.a.stop()
    pair.b.ctl("role", "-f", "primary", pair.b.name())
    after = pair.b.dump()
    assert after == before | {"prevrole": "primary"}
    pair.b.ctl("role", "-f", "primary", pair.b.name())  # and once more, as primary


def test_a_target_that_is_complete_may_become_primary(make_pair: MakePair) -> None:
    """Also when the primary dies at once, and when the secondary was started anew in the middle."""
    pair = make_pair({"disk": SIZE}, conf="timeout 5\ncompression none")
    pair.create()
    pair.start()
    pair.a.set_role("primary")
    write(pair.a, b"a", *range(0, SIZE, 2 * MIB))
    pair.b.set_role("secondary")
    pair.b.kill()
    pair.b.start()
    pair.b.set_role("secondary")

    def complete() -> bool:
        dump = pair.b.dump()
        return bool(dump["resuid"]) and not dump["syncing"]

    eventually(complete, "b knows that it is complete")
    pair.a.kill()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as client:
        for offset in range(0, SIZE, 2 * MIB):
            assert client.read(offset, 4096) == b"a" * 4096


@pytest.fixture
def relay() -> Iterator[Relay]:
    relay = Relay(loopback(random.randrange(1 << 20)))
    yield relay
    relay.close()


def test_primary_that_ends_as_soon_as_it_has_met_its_secondary(
    make_relayed: Callable[..., tuple[Pair, Relay]],
) -> None:
    """What makes both the same takes a moment longer than the connection, longer still where the way is long. Without
    it the first one counts as having something of its own, and the two find a split-brain that is none."""
    pair, relay = make_relayed({"disk": SIZE}, hooks=True)
    pair.create()
    pair.start()
    pair.b.set_role("secondary")
    relay.trouble(there=Way(delay=0.05), back=Way(delay=0.05))
    pair.a.set_role("primary")
    pair.wait_connected(pair.a)
    pair.a.set_role("init")
    relay.heal()
    first, second = pair.a.dump(), pair.b.dump()
    assert (first["localcnt"], first["remotecnt"]) == (second["remotecnt"], second["localcnt"])
    assert not first["syncing"] and not second["syncing"]
    pair.b.set_role("primary")


def test_what_was_sent_just_before_the_role_ends_is_answered(make_pair: MakePair) -> None:
    """It is the first write without the secondary: what has to be stored for it is stored, where the disk takes it, and
    it is no error for the client that its question comes when the end has begun."""
    pair = make_pair({"disk": SIZE})
    pair.up()
    node = pair.a
    with RawClient(node.socket()) as client:
        assert client.write(0, b"-" * 512) == 0
        pair.b.set_role("init")
        eventually(lambda: "lost: the secondary closed the connection" in node.said(), "the secondary is lost")
        ggate = stage_pid(node, "ggate")
        os.kill(ggate, signal.SIGSTOP)
        client.start(WRITE, 0, 512, payload=b"x" * 512)
        ending = threading.Thread(target=node.set_role, args=("init",))
        ending.start()
        eventually(lambda: not node.socket().exists(), "the end has begun")
        os.kill(ggate, signal.SIGCONT)
        assert [answer.error for answer in client.wait().values()] == [0]
        ending.join()
    assert node.dump()["localcnt"] > pair.b.dump()["remotecnt"]
    node.set_role("primary")
    with RawClient(node.socket()) as client:
        assert client.read(0, 512) == b"x" * 512


def test_what_waits_for_the_secondary_to_be_complete_is_answered_when_the_role_ends(make_pair: MakePair) -> None:
    """A flush that covers what the secondary lacks is not refused if that is copied soon."""
    pair = make_pair({"disk": SIZE}, conf="replication memsync\nsyncrate 1M")
    pair.create("-k", "64")
    pair.start()
    pair.roles(pair.a)
    node = pair.a
    with RawClient(node.socket()) as client:
        for offset in range(0, 8 * MIB, MIB):
            assert client.write(offset, b"x" * MIB) == 0
    os.kill(stage_pid(node, "ggate"), signal.SIGKILL)
    eventually(lambda: ", 4 extents to synchronise" in node.said(), "it is copied once more")
    recv = int(eventually(lambda: stage_pid(pair.b, "recv"), "the secondary's recv stage"))
    os.kill(recv, signal.SIGSTOP)
    reload(node, node.conf.read_text().replace("syncrate 1M", "syncrate 0"))
    with RawClient(node.socket()) as client:
        client.start(FLUSH)
        ending = threading.Thread(target=node.set_role, args=("init",))
        ending.start()
        eventually(lambda: not node.socket().exists(), "the end has begun")
        os.kill(recv, signal.SIGCONT)
        assert [answer.error for answer in client.wait().values()] == [0]
        ending.join()
    assert node.dump()["localcnt"] == pair.b.dump()["remotecnt"] and pair.differing() is None


def test_a_notice_that_does_not_get_through_is_given_again(make_pair: MakePair, relay: Relay) -> None:
    pair = make_pair({"disk": SIZE}, remotes={"hasta": relay.url}, conf="timeout 5\ncompression none")
    relay.target(pair.b.address, pair.a.address)
    pair.create()
    pair.start()
    pair.a.set_role("primary")
    write(pair.a, b"a", 0)
    pair.a.set_role("init")
    pair.b.set_role("secondary")
    relay.allowed = 2  # those of the connection
    pair.a.set_role("primary")
    eventually(lambda: "cannot be given the notice 'synced'" in pair.a.said(), "the notice does not get through")
    assert pair.a.status()["dirty"] == 0 and pair.a.status()["status"] == "complete"
    assert pair.b.dump()["syncing"]
    refused(pair.b)
    relay.allowed = None
    pair.wait_in_sync(pair.a)
    pair.a.set_role("init")
    pair.b.set_role("primary")
