"""Split-brain, and the way out of it as hastd(8) has it: `hastctl discard` on the node whose changes are to be thrown
away. Only what either side has changed travels, and the data afterwards is the other node's."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from hast.activemap import dirty_ranges
from hast.component import open_component
from tests.e2e.node import MIB, Node, eventually, loopback
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay
from tests.nbdclient import FLUSH, RawClient

SIZE = 256 * MIB
EXTENT = 2 * MIB

MakePair = Callable[..., Pair]


@pytest.fixture
def relayed(make_pair: MakePair) -> Iterator[tuple[Pair, Relay, Relay]]:
    """A pair, and the relays by which `a` and `b` are reached. Each node knows the other one by its relay's address."""
    hosts = [loopback(random.randrange(1 << 20)) for _ in range(2)]
    to_a, to_b = relays = [Relay(host) for host in hosts]
    remotes = {"hasta": to_b.url, "hastb": to_a.url}
    pair = make_pair({"disk": SIZE}, remotes=remotes, conf="timeout 5\ncompression none", hooks=True)
    to_a.target(pair.a.address, hosts[1])
    to_b.target(pair.b.address, hosts[0])
    yield pair, to_a, to_b
    for relay in relays:
        relay.close()


def write(node: PairNode, fill: bytes, *offsets: int) -> None:
    with RawClient(node.socket()) as client:
        for offset in offsets:
            assert client.write(offset, fill * 4096) == 0
        assert client.do(FLUSH).error == 0


def split(pair: Pair) -> None:
    """Both have the same, then `a` changes extents 1 and 2 alone, then `b` extents 2 and 3. `b` is primary then."""
    pair.roles(pair.a)
    write(pair.a, b"-", *range(0, SIZE, EXTENT))
    pair.wait_in_sync(pair.a)
    eventually(lambda: len(marked(pair.a)) == 1, "a quiet moment clears what both have, but for the last one written")
    pair.b.set_role("init")
    write(pair.a, b"a", 1 * EXTENT, 2 * EXTENT)
    pair.a.set_role("init")
    pair.b.set_role("primary")
    write(pair.b, b"b", 2 * EXTENT + MIB, 3 * EXTENT)


def marked(node: PairNode) -> set[int]:
    """The extents that are marked in the node's activemap, on its disk."""
    with closing(open_component(node.name(), str(node.component()), write=False)) as component:
        bits = component.read_map(component.read_metadata())
    return {extent for part in dirty_ranges(bits, SIZE // EXTENT) for extent in part}


def check(node: PairNode, winner: bytes) -> None:
    expected = {1 * EXTENT: b"a", 2 * EXTENT: b"a", 2 * EXTENT + MIB: b"b", 3 * EXTENT: b"b", 4 * EXTENT: b"-"}
    with RawClient(node.socket()) as client:
        for offset, fill in expected.items():
            there = b"\0" if offset % EXTENT else b"-"  # before anybody wrote alone
            assert client.read(offset, 4096) == (fill if fill in (winner, b"-") else there) * 4096


@pytest.mark.parametrize("loser", ["a", "b"])
def test_discard_on_either_node(relayed: tuple[Pair, Relay, Relay], loser: str) -> None:
    pair, to_a, to_b = relayed
    gives_up, keeps, relay = (pair.a, pair.b, to_a) if loser == "a" else (pair.b, pair.a, to_b)
    pair.create("-k", "1")
    pair.start()
    split(pair)
    name = pair.a.name()
    pair.b.set_role("init")
    changed = marked(pair.a) | marked(pair.b)
    assert {1, 2, 3} <= changed and len(changed) < SIZE // EXTENT // 2
    gives_up.set_role("secondary")
    keeps.set_role("primary")
    for node in pair.nodes:
        eventually(lambda node=node: f"split-brain {name}" in pair.events(node), "both find a split-brain")
        assert f"'hastctl discard {name}'" in node.said()
    # Where it is used it is not thrown away.
    done = keeps.ctl("discard", name, check=False)
    assert done.returncode == 69 and "hastctl role secondary" in done.stderr
    relay.reset()
    gives_up.ctl("discard", name)
    pair.wait_in_sync(keeps)
    # Extents 1, 2 and 3, and what was not yet known to be durable on both when the nodes parted.
    assert len(changed) * EXTENT <= relay.sent < (len(changed) + 1) * EXTENT, (relay.sent / EXTENT, changed)
    assert pair.differing() is None
    check(keeps, b"b" if loser == "a" else b"a")
    dump = gives_up.dump()
    assert not dump["discard"] and not dump["syncing"]
    assert pair.events(gives_up).count(f"split-brain {name}") == 1
    # Once more there is nothing to discard.
    done = gives_up.ctl("discard", name, check=False)
    assert done.returncode == 69 and "no changes of its own" in done.stderr


def test_discard_without_a_worker_and_what_ends_it(make_node: Callable[..., Node]) -> None:
    node = make_node({"disk": 4 * MIB})
    node.create()
    node.start()
    name = node.name()
    node.ctl("discard", name)
    assert node.dump()["discard"] and "discard: yes\n" in node.ctl("dump", name).stdout
    node.role("secondary")
    assert node.dump()["discard"]
    node.ctl("discard", name)
    node.role("primary")
    assert not node.dump()["discard"]
    assert f"{name}: 'hastctl discard' is void" in node.said()
    done = node.ctl("discard", "nosuch", check=False)
    assert done.returncode == 1 and "has no such resource" in done.stderr
    for words in ((), ("all",)):
        assert node.ctl("discard", *words, check=False).returncode == 64
