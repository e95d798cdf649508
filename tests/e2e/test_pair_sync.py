"""A node was away: what it missed is copied, nothing else, in the right direction, while clients go on."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.load import PAUSE
from tests.e2e.node import DEADLINE, MIB, Node, eventually, loopback
from tests.e2e.pair import Pair
from tests.e2e.relay import Relay
from tests.nbdclient import FLUSH, WRITE, RawClient

EXTENT = 2 * MIB
GIB = 1 << 30
EXTENTS = GIB // EXTENT
KEEPDIRTY = 4  # what is hot when a node goes away is copied as well
OUTAGE = EXTENTS // 20  # five percent
BLOCK = 4096

MakePair = Callable[..., Pair]


@pytest.fixture
def relayed(make_pair: MakePair) -> Iterator[Callable[..., tuple[Pair, Relay]]]:
    """Makes a pair whose node `a` reaches `b` through a relay."""
    relays: list[Relay] = []

    def make(resources: dict[str, int], **keywords: object) -> tuple[Pair, Relay]:
        relay = Relay(loopback(random.randrange(1 << 20)))
        relays.append(relay)
        pair = make_pair(resources, remotes={"hasta": relay.url}, **keywords)
        relay.target(pair.b.address, pair.a.address)
        return pair, relay

    yield make
    for relay in relays:
        relay.close()


class Client:
    """Writes blocks of 4 KiB, and knows what the disk holds."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.blocks: dict[int, bytes] = {}  # offset -> content
        self.bytes = 0

    def write(self, raw: RawClient, extent: int) -> None:
        offset = extent * EXTENT + self.rng.randrange(EXTENT // BLOCK) * BLOCK
        data = self.rng.randbytes(BLOCK)
        assert raw.write(offset, data) == 0
        self.blocks[offset] = data
        self.bytes += BLOCK

    def check(self, raw: RawClient) -> None:
        for offset, data in self.blocks.items():
            assert raw.read(offset, BLOCK) == data, f"offset {offset}"

    @contextmanager
    def going_on(self, node: Node, extents: list[int]) -> Iterator[None]:
        """Write to these extents meanwhile, and fail when that fails."""
        stop, errors = threading.Event(), []

        def run() -> None:
            try:
                with RawClient(node.socket()) as raw:
                    while not stop.is_set():
                        self.write(raw, self.rng.choice(extents))
                        stop.wait(PAUSE)
            except (OSError, EOFError, AssertionError) as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(DEADLINE)
        assert not thread.is_alive() and not errors, errors


def touch_everything(node: Node, client: Client) -> None:
    """Data in every extent, so that nothing is clean because it was never used; then only what is hot is not clean."""
    with RawClient(node.socket()) as raw:
        for extent in range(EXTENTS):
            client.write(raw, extent)
        # A memsync write may complete on the secondary after the first flush has begun.
        for _ in range(2):
            assert raw.do(FLUSH).error == 0
    eventually(lambda: node.dump()["dirtyextents"] <= KEEPDIRTY, "the map is clean")


def start_large(pair: Pair) -> None:
    pair.create("-k", str(KEEPDIRTY))
    pair.start()
    pair.roles(pair.a)
    assert pair.events(pair.a).count(f"syncstart {pair.a.name()}") == 0  # both were new


SETTINGS = {"conf": "timeout 5\ncompression none", "hooks": True}


@pytest.mark.slow
def test_only_what_was_written_meanwhile_travels(relayed: Callable[..., tuple[Pair, Relay]]) -> None:
    pair, relay = relayed({"disk": GIB}, **SETTINGS)
    start_large(pair)
    client = Client(1)
    touch_everything(pair.a, client)
    pair.b.stop()
    eventually(lambda: pair.a.status()["status"] == "degraded", "the primary notices")
    written = client.rng.sample(range(EXTENTS), OUTAGE)
    with RawClient(pair.a.socket()) as raw:
        for extent in written:
            client.write(raw, extent)
    assert pair.a.status()["dirty"] == OUTAGE * EXTENT
    relay.reset()
    before = client.bytes
    with client.going_on(pair.a, written):
        pair.b.start()
        pair.b.set_role("secondary")
        eventually(lambda: f"syncdone {pair.a.name()}" in pair.events(pair.a), "the synchronisation")
    travelled = relay.sent - (client.bytes - before)  # at most: not all that the client wrote has to travel
    assert relay.sent > 0.9 * OUTAGE * EXTENT
    assert travelled < 1.02 * OUTAGE * EXTENT
    pair.wait_in_sync(pair.a)
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(FLUSH).error == 0
        client.check(raw)
    assert pair.differing() is None
    assert [event.split()[0] for event in pair.events(pair.a)][-3:] == ["connect", "syncstart", "syncdone"]


@pytest.mark.slow
def test_roles_changed_in_between(relayed: Callable[..., tuple[Pair, Relay]]) -> None:
    """The node that was away is primary again at once: it reads from the other one what it does not have, and gets
    it."""
    pair, relay = relayed({"disk": GIB}, **SETTINGS)
    start_large(pair)
    client = Client(2)
    touch_everything(pair.a, client)
    pair.a.stop()
    pair.b.set_role("primary")
    written = client.rng.sample(range(EXTENTS), OUTAGE)
    with RawClient(pair.b.socket()) as raw:
        for extent in written:
            client.write(raw, extent)
    relay.reset()
    pair.a.start()
    pair.roles(pair.a)
    with RawClient(pair.a.socket()) as raw:
        client.check(raw)  # before anybody waits for the synchronisation
    read = len(client.blocks) * BLOCK
    with client.going_on(pair.a, written):
        eventually(lambda: f"syncdone {pair.a.name()}" in pair.events(pair.a), "the synchronisation")
    assert relay.received > 0.9 * OUTAGE * EXTENT
    assert relay.received < 1.02 * (OUTAGE + KEEPDIRTY) * EXTENT + read
    pair.wait_in_sync(pair.a)
    with RawClient(pair.a.socket()) as raw:
        assert raw.do(FLUSH).error == 0
        client.check(raw)
    assert pair.differing() is None


@pytest.mark.parametrize("replication", ["fullsync", "memsync", "async"])
def test_connection_cut_in_the_middle_of_writes(relayed: Callable[..., tuple[Pair, Relay]], replication: str) -> None:
    """What was under way when the connection broke may be on one node only: it is copied when it is back."""
    pair, relay = relayed({"disk": 64 * MIB}, conf=f"timeout 5\nreplication {replication}")
    pair.up()
    client = Client(3)
    for _ in range(2):
        with client.going_on(pair.a, list(range(32))):
            start = client.bytes
            eventually(lambda start=start: client.bytes - start > 4 * MIB, "writes")
            relay.cut()
            start = client.bytes
            eventually(lambda start=start: client.bytes - start > 4 * MIB, "writes after the cut")
            pair.wait_connected(pair.a)
        pair.wait_in_sync(pair.a)
        with RawClient(pair.a.socket()) as raw:
            assert raw.do(FLUSH).error == 0
            client.check(raw)
        assert pair.differing() is None


def test_secondary_that_dies_in_the_middle_of_a_synchronisation(make_pair: MakePair) -> None:
    """A fresh secondary gets everything; killed in the middle of that, it gets the rest when it is back."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 5\ncompression none\nsyncrate 16M", hooks=True)
    pair.create()
    pair.start()
    pair.a.set_role("primary")
    client = Client(4)
    with RawClient(pair.a.socket()) as raw:
        for extent in range(32):
            client.write(raw, extent)
    pair.b.set_role("secondary")
    name = pair.a.name()
    eventually(lambda: f"syncstart {name}" in pair.events(pair.a), "the synchronisation begins")
    eventually(lambda: 0 < pair.a.status()["dirty"] < 56 * MIB, "it goes on")
    pair.b.kill()
    eventually(lambda: f"syncintr {name}" in pair.events(pair.a), "it is interrupted")
    assert f"syncdone {name}" not in pair.events(pair.a)
    assert pair.a.status()["status"] == "degraded"
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_in_sync(pair.a)
    eventually(lambda: f"syncdone {name}" in pair.events(pair.a), "the hook is told")
    with RawClient(pair.a.socket()) as raw:
        client.check(raw)
    assert pair.differing() is None


@pytest.mark.parametrize("replication", ["fullsync", "memsync", "async"])
def test_peer_that_hangs_stalls_clients_no_longer_than_timeout(make_pair: MakePair, replication: str) -> None:
    """SIGSTOP for all of the secondary: its kernel still takes data, nobody answers. The primary goes on alone, and has
    it back when it goes on."""
    pair = make_pair({"disk": 64 * MIB}, conf=f"timeout 2\nreplication {replication}")
    pair.up()
    client = Client(5)
    pair.freeze(pair.b)
    with RawClient(pair.a.socket()) as raw:
        # More than there are slots for, each answered in the end.
        for n in range(1000):
            raw.start(WRITE, n * 4096, 4096, 0, client.rng.randbytes(4096))
        done = 0
        while done < 1000:
            answers = raw.wait(1)
            assert all(answer.error == 0 for answer in answers.values())
            done += len(answers)
        assert raw.do(FLUSH).error == 0
    assert pair.a.status()["status"] == "degraded"
    pair.thaw(pair.b)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_primary_that_dies_while_it_gets_its_data_from_the_secondary(make_pair: MakePair) -> None:
    """What it was asked to write meanwhile is on both: the secondary, promoted, has everything."""
    pair = make_pair({"disk": 64 * MIB}, conf="timeout 5\ncompression none\nsyncrate 16M", hooks=True)
    pair.up()
    client = Client(6)
    pair.a.stop()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        for extent in range(32):
            client.write(raw, extent)
    pair.a.start()
    pair.roles(pair.a)
    with client.going_on(pair.a, list(range(32))):
        eventually(lambda: 0 < pair.a.status()["dirty"] < 56 * MIB, "the synchronisation goes on")
    assert f"syncdone {pair.a.name()}" not in pair.events(pair.a)
    pair.a.kill()
    pair.b.set_role("primary")
    with RawClient(pair.b.socket()) as raw:
        client.check(raw)
        with client.going_on(pair.b, list(range(32))):
            pair.a.start()
            pair.a.set_role("secondary")
            pair.wait_connected(pair.b)
    pair.wait_in_sync(pair.b)
    with RawClient(pair.b.socket()) as raw:
        assert raw.do(FLUSH).error == 0
        client.check(raw)
    assert pair.differing() is None
