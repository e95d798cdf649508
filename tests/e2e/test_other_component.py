"""A node's component is exchanged for another one, and put back later: what its counters say is of another time."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from hast.messages import STRANGERS
from tests.e2e.node import MIB, ROOT, Node, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_reload import reload
from tests.nbdclient import FLUSH, RawClient

SIZE = 16 * MIB
OPTIONS = ("-e", "64K", "-k", "1")  # so that what was written stays marked for a moment only


def with_new_component(node: Node) -> str:
    """Make one; the node's configuration with it in the place of the one that it has."""
    new = node.components / "new"
    with new.open("wb") as file:
        file.truncate(node.component().stat().st_size)
    text = node.conf.read_text().replace(f"local {node.component()}\n", f"local {new}\n")
    conf = node.directory / "new.conf"
    conf.write_text(text)
    node.run(ROOT / "bin" / "hastctl", "create", *OPTIONS, "-c", conf, node.name())
    return text


def write(pair: Pair, value: int) -> None:
    """All of it, on both nodes, and hardly anything is marked afterwards."""
    with RawClient(pair.a.socket()) as client:
        for offset in range(0, SIZE, MIB):
            assert client.write(offset, bytes([value]) * MIB) == 0
        assert client.do(FLUSH).error == 0
        pair.wait_in_sync(pair.a)
        eventually(lambda: pair.a.dump()["dirty"] <= MIB, "the map is cleared")


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """In sync, `a` is primary; another component has taken the place of the one that `b` had before, which is there
    still."""
    pair = make_pair({"disk": SIZE})
    pair.create(*OPTIONS)
    pair.start()
    pair.roles(pair.a)
    write(pair, 1)
    reload(pair.b, with_new_component(pair.b))
    pair.wait_connected(pair.a)
    pair.wait_in_sync(pair.a)
    write(pair, 2)
    return pair


def put_back(pair: Pair) -> str:
    """The configuration of `b` with the component that it had before."""
    return pair.b.conf.read_text().replace(f"local {pair.b.components / 'new'}\n", f"local {pair.b.component()}\n")


def test_component_that_was_put_back_is_not_taken_for_the_one_that_took_its_place(pair: Pair) -> None:
    reload(pair.b, put_back(pair))
    eventually(lambda: STRANGERS in pair.a.said(), "the primary is refused")
    eventually(lambda: f"run 'hastctl create {pair.b.name()}'" in pair.b.said(), "what to do is said")
    assert pair.a.status()["status"] == "degraded"
    pair.b.role("init")
    pair.b.create(*OPTIONS)
    pair.b.role("secondary")
    pair.wait_connected(pair.a)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_component_that_was_put_back_and_is_primary_takes_nothing_over(pair: Pair) -> None:
    """What it lacks is neither shown as if it were complete, nor overwritten: the other node is not its secondary."""
    reload(pair.b, put_back(pair))
    eventually(lambda: STRANGERS in pair.a.said(), "the primary is refused")
    pair.a.set_role("secondary")
    pair.b.set_role("primary")
    eventually(lambda: STRANGERS in pair.b.said(), "the other one is refused as well")
    with RawClient(pair.b.socket()) as client:
        assert client.write(0, b"\3" * MIB) == 0
    assert pair.b.status()["status"] == pair.a.status()["status"] == "degraded"
    assert pair.data(pair.a) == b"\2" * SIZE


def test_the_one_that_took_its_place_goes_on(pair: Pair) -> None:
    """Whatever the two go through together, they belong together."""
    for primary in (pair.a, pair.b):
        pair.swap(primary)
    pair.b.stop()
    with RawClient(pair.a.socket()) as client:
        assert client.write(0, b"\3" * MIB) == 0
    pair.b.start()
    pair.b.set_role("secondary")
    pair.wait_connected(pair.a)
    pair.wait_in_sync(pair.a)
    pair.swap(pair.a)
    with RawClient(pair.b.socket()) as client:
        assert client.read(0, 2 * MIB) == b"\3" * MIB + b"\2" * MIB
