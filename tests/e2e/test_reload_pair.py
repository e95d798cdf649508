"""SIGHUP on one of two connected nodes: what concerns the connection makes it anew, and nothing is lost by that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.node import MIB, ROOT, Node, eventually
from tests.e2e.pair import Pair
from tests.e2e.test_reload import Writer, lines, reload, worker
from tests.nbdclient import RawClient

SIZE = 16 * MIB


@pytest.fixture
def pair(make_pair: Callable[..., Pair]) -> Pair:
    """In sync, `a` is primary, hooks note what happens."""
    pair = make_pair({"disk": SIZE}, hooks=True)
    pair.up()
    return pair


def with_settings(node: Node, settings: str) -> str:
    """The node's configuration with `settings` of its resource."""
    return node.conf.read_text().replace(f"on {node.node} {{", f"{settings}\non {node.node} {{")


def connections(node: Node) -> int:
    """How often the primary was connected."""
    return len(lines(node, f"{node.name()}: connected to"))


@pytest.mark.parametrize(
    ("side", "settings", "changed"),
    [
        ("a", "replication fullsync checksum crc32", "replication, checksum"),
        ("a", "compression lzf timeout 9", "compression, timeout"),
        ("b", "compression none checksum sha256", "checksum, compression"),
    ],
)
def test_connection_is_made_anew(pair: Pair, side: str, settings: str, changed: str) -> None:
    node: Node = getattr(pair, side)
    pids = {n.id: worker(n, "disk") for n in pair.nodes}
    with Writer(pair.a, "disk") as writer:
        before = connections(pair.a)
        assert reload(node, with_settings(node, settings)) == f"changed {node.name()} ({changed})"
        eventually(lambda: connections(pair.a) > before, "the connection is made anew")
        writer.goes_on()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None
    assert {n.id: worker(n, "disk") for n in pair.nodes} == pids
    for n in pair.nodes:
        eventually(lambda n=n: f"disconnect {n.name()}" in pair.events(n), "the hook of the disconnection")


@pytest.mark.parametrize("setting", ["syncrate 1048576", "exec /nowhere", "metaflush off"])
def test_what_does_not_concern_the_connection_leaves_it(pair: Pair, setting: str) -> None:
    with Writer(pair.a, "disk") as writer:
        before = connections(pair.a)
        for node in pair.nodes:
            assert reload(node, with_settings(node, setting)) == f"changed {node.name()} ({setting.split()[0]})"
        writer.goes_on()
        assert connections(pair.a) == before
    pair.wait_in_sync(pair.a)
    assert connections(pair.a) == before
    assert not [event for node in pair.nodes for event in pair.events(node) if event.startswith("disconnect")]


def test_primary_leaves_its_secondary_and_comes_back(pair: Pair) -> None:
    good = pair.a.conf.read_text()
    alone = good.replace(f"remote tcp4://{pair.b.address}", "remote none")
    with Writer(pair.a, "disk") as writer:
        assert reload(pair.a, alone.replace(f"source {pair.a.address}\n", "")) == (
            f"changed {pair.a.name()} (remote, source)"
        )
        eventually(lambda: pair.b.status()["status"] == "degraded", "the secondary has lost its primary")
        writer.goes_on()
        status = pair.a.status()
        assert (status["role"], status["status"]) == ("primary", "degraded") and status["dirty"] > 0
        reload(pair.a, good)
        pair.wait_connected(pair.a)
        writer.goes_on()
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_secondary_gets_another_primary(pair: Pair) -> None:
    """The one that it had is not let in any more, and its connection is over at once."""
    good = pair.b.conf.read_text()
    with Writer(pair.a, "disk") as writer:
        reload(pair.b, good.replace(f"remote tcp4://{pair.a.address}", f"remote tcp4://{pair.b.address}"))
        eventually(lambda: "it is not let in" in pair.b.said(), "the primary is not let in")
        assert pair.b.status()["status"] == "degraded"
        writer.goes_on()
        reload(pair.b, good)
        pair.wait_connected(pair.a)
    pair.wait_in_sync(pair.a)
    assert pair.differing() is None


def test_local_of_the_secondary(pair: Pair) -> None:
    """A new worker, the same role; the primary comes back by itself."""
    b, new = pair.b, pair.b.components / "new"
    with new.open("wb") as file:
        file.truncate(b.component().stat().st_size)
    text = b.conf.read_text().replace(f"local {b.component()}\n", f"local {new}\n")
    conf = b.directory / "new.conf"
    conf.write_text(text)
    b.run(ROOT / "bin" / "hastctl", "create", "-c", conf, b.name())
    pid = worker(b, "disk")
    with Writer(pair.a, "disk") as writer:
        before = connections(pair.a)
        assert reload(b, text) == f"changed {b.name()} (local)"
        assert worker(b, "disk", pid) and b.status()["role"] == "secondary"
        eventually(lambda: connections(pair.a) > before, "the primary comes back")
        writer.goes_on()
    pair.wait_in_sync(pair.a)
    assert f"role {b.name()} secondary init" not in pair.events(b)
    b.component().unlink()
    new.rename(b.component())
    assert pair.differing() is None


def test_syncrate_of_a_synchronisation_that_runs(pair: Pair) -> None:
    pair.b.role("init")
    reload(pair.a, with_settings(pair.a, "syncrate 1024"))  # 4 hours for all of it
    with RawClient(pair.a.socket()) as client:
        for offset in range(0, SIZE, MIB):
            assert client.write(offset, bytes([offset // MIB + 1]) * MIB) == 0
    pair.b.role("secondary")
    eventually(lambda: f"syncstart {pair.a.name()}" in pair.events(pair.a), "a synchronisation")
    assert pair.a.status()["dirty"] > SIZE // 2
    before = connections(pair.a)
    text = pair.a.conf.read_text().replace("syncrate 1024\n", "")
    assert reload(pair.a, text) == f"changed {pair.a.name()} (syncrate)"
    pair.wait_in_sync(pair.a)
    assert connections(pair.a) == before
    assert pair.differing() is None
