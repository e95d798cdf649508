"""The connection breaks in every step of the handshake, is half-open, or ends in a disk that hangs: the primary serves,
and connects again as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.load import Load
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair
from tests.e2e.relay import Relay, Way
from tests.faultdisk import FaultDisk
from tests.nbdclient import FLUSH, RawClient

SIZE = 32 * MIB
CONF = "timeout 3\ncompression none"
POINTS = 6  # where the handshake is cut, in each direction

MakeRelayed = Callable[..., tuple[Pair, Relay]]


def places(step: int = MIB) -> list[int]:
    return list(range(0, SIZE, step))


def in_sync(pair: Pair, load: Load) -> None:
    pair.wait_in_sync(pair.a)
    load.check(pair.a)
    assert pair.differing() is None


@pytest.mark.slow
def test_connect_abort(make_relayed: MakeRelayed) -> None:
    """Cut after so many bytes in either direction, from none to all of the handshake, with something written alone
    every other time, so that the next one has a map to merge."""
    pair, relay = make_relayed({"disk": SIZE}, conf=CONF, hooks=True)
    pair.create()
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    load = Load(1, places())
    pair.a.set_role("init")
    relay.reset()
    pair.a.set_role("primary")
    pair.wait_connected(pair.a)
    there, back = relay.sent, relay.received
    for n in range(POINTS):
        for way, all_ in (("there", there), ("back", back)):
            pair.a.set_role("init")
            relay.cut()
            relay.trouble(**{way: Way(cut_after=n * all_ // (POINTS - 1))})
            pair.a.set_role("primary")
            if n % 2:
                with load.on(pair.a):
                    pass
            relay.heal()
    in_sync(pair, load)
    assert not any(event.startswith("split-brain") for event in pair.events(pair.a))


@pytest.mark.parametrize("told", ["primary", "secondary"])
def test_half_open_connection(make_relayed: MakeRelayed, told: str) -> None:
    """One of them sees the end of its connections, the other one goes on talking to nobody."""
    pair, relay = make_relayed({"disk": SIZE}, conf=CONF, hooks=True)
    pair.up()
    load = Load(2, places())
    with load.on(pair.a):
        load.progress(20)
        relay.forget(near=told == "primary")
        lost = f"disconnect {pair.a.name()}"
        eventually(lambda: lost in pair.events(pair.a), "the primary finds out")
        load.progress(20)
        # The old connections are still open at one end: new ones take their place.
        eventually(lambda: pair.events(pair.a).count(f"connect {pair.a.name()}") > 1, "it connects again")
    relay.heal()
    in_sync(pair, load)


@pytest.mark.parametrize("replication", ["fullsync", "memsync", "async"])
def test_secondarys_disk_hangs(make_pair: Callable[..., Pair], replication: str) -> None:
    """It answers nothing that needs its disk: the primary goes on without it, and has it back when the disk goes on."""
    pair = make_pair({"disk": SIZE}, conf=f"{CONF}\nreplication {replication}", hooks=True)
    pair.create()
    disk = FaultDisk.under(pair.b)
    pair.start()
    pair.roles(pair.a)
    pair.wait_in_sync(pair.a)
    load = Load(3, places())
    with load.on(pair.a):
        load.progress(20)
        disk.hang("write,flush,delete")
        eventually(lambda: f"disconnect {pair.a.name()}" in pair.events(pair.a), "the primary goes on without it")
        load.progress(20)
        with RawClient(pair.a.socket()) as raw:
            assert raw.do(FLUSH).error == 0
    assert pair.b.status()["role"] == "secondary"
    disk.heal()
    in_sync(pair, load)
