"""A synchronisation is disturbed: interrupted anywhere, in either direction, by whatever ends; killed at its very end;
under load. It is resumed where it was, it ends, and both nodes have the same then."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable

import pytest

from tests.e2e.load import Load
from tests.e2e.node import MIB, eventually
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay, Way
from tests.nbdclient import FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES, RawClient

SIZE = 64 * MIB
EXTENT = MIB // 2
EXTENTS = SIZE // EXTENT
CHANGED = 96  # extents that a node has missed: three seconds of copying
# What was copied in the last second and was not flushed when it was interrupted travels again, and what is kept dirty.
AGAIN = 36

MakeRelayed = Callable[..., tuple[Pair, Relay]]


def make(make_relayed: MakeRelayed, syncrate: str = "16M") -> tuple[Pair, Relay]:
    conf = f"timeout 5\ncompression none\nsyncrate {syncrate}"
    pair, relay = make_relayed({"disk": SIZE}, conf=conf, hooks=True)
    pair.create("-e", str(EXTENT), "-k", "2")
    pair.start()
    pair.roles(pair.a)
    return pair, relay


def change(node: PairNode, rng: random.Random, count: int = CHANGED) -> dict[int, bytes]:
    """Write something to so many extents: what was written."""
    written = {}
    with RawClient(node.socket()) as raw:
        for extent in rng.sample(range(EXTENTS), count):
            offset = extent * EXTENT + rng.randrange(EXTENT // 4096) * 4096
            written[offset] = rng.randbytes(4096)
            assert raw.write(offset, written[offset]) == 0
        assert raw.do(FLUSH).error == 0
    return written


def check(pair: Pair, primary: PairNode, written: dict[int, bytes]) -> None:
    with RawClient(primary.socket()) as raw:
        assert raw.do(FLUSH).error == 0
        for offset, data in written.items():
            assert raw.read(offset, 4096) == data, f"offset {offset}"
    assert pair.differing() is None


def behind(pair: Pair, target: PairNode, rng: random.Random, count: int = CHANGED) -> dict[int, bytes]:
    """The target has missed something. `a` is primary and `b` not there when the target is `b`; else the other way
    round."""
    source = pair.other(target)
    target.set_role("init")
    if source is pair.b:
        pair.b.set_role("primary")
    written = change(source, rng, count)
    if source is pair.b:
        pair.b.set_role("secondary")
    return written


COMPLETE = "synchronisation complete"


def begin(pair: Pair, target: PairNode) -> None:
    """`a` is primary, `b` secondary, and one of them is the target of a synchronisation."""
    if target is pair.b:
        pair.b.set_role("secondary")
        pair.a.set_role("init")  # at once, and not when it tries again
    done = pair.a.said().count(COMPLETE)
    pair.a.set_role("primary")
    eventually(lambda: target.dump()["syncing"] or pair.a.said().count(COMPLETE) > done, "the target knows, or did")


def left(pair: Pair) -> int:
    """Extents that are still to be copied."""
    return int(pair.a.status()["dirty"]) // EXTENT


def interrupt(pair: Pair, relay: Relay, how: str) -> None:
    """And what has to be done for it to go on."""
    node = pair.a if "primary" in how else pair.b
    if how == "cut":
        relay.cut()
    elif how == "cut inside a message":
        relay.trouble(there=Way(cut_after=12345), back=Way(cut_after=12345))
        eventually(lambda: pair.a.status()["status"] == "degraded" and not connected(pair), "it is cut")
        relay.heal()
    elif "node" in how:
        node.kill()
        node.start()
        node.set_role("primary" if node is pair.a else "secondary")
    else:
        title = {"primary": ": ggate", "secondary": ": disk"}[how.split()[0]]
        (pid,) = (pid for pid, name in node.titles().items() if name.endswith(title))
        os.kill(pid, signal.SIGKILL)


def connected(pair: Pair) -> bool:
    said = pair.a.said()
    return said.rfind(": connected to ") > said.rfind(f"{pair.a.name()}: connection to ")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a", "b"])
@pytest.mark.parametrize(
    "ways",
    [("cut", "cut inside a message", "primary stage"), ("secondary stage", "primary node", "secondary node")],
    ids=["connection", "processes"],
)
def test_interrupted_and_resumed(make_relayed: MakeRelayed, ways: tuple[str, str, str], target: str) -> None:
    """At a quarter, at the half, at three quarters: what has been copied does not travel again."""
    rng = random.Random(target)
    pair, relay = make(make_relayed)
    written = change(pair.a, rng, EXTENTS)
    pair.wait_in_sync(pair.a)
    node = pair.a if target == "a" else pair.b
    written |= behind(pair, node, rng)
    relay.reset()
    begin(pair, node)
    for quarters, how in zip((3, 2, 1), ways, strict=True):
        eventually(lambda quarters=quarters: left(pair) <= CHANGED * quarters // 4, f"{quarters} quarters are left")
        interrupt(pair, relay, how)
        pair.wait_connected(pair.a)
        assert node.dump()["syncing"], f"{how}: the target does not know any more that it is one"
    pair.wait_in_sync(pair.a)
    travelled = (relay.received if target == "a" else relay.sent) / EXTENT
    check(pair, pair.a, written)
    # Had it started over each time, it would be two and a half times as much as there is.
    assert CHANGED <= travelled < CHANGED + 3 * AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a", "b"])
def test_interrupted_at_the_very_end(make_relayed: MakeRelayed, target: str) -> None:
    """The connection is cut so many bytes before what a whole synchronisation and its notice need: either it is
    complete, and both know that, or the target goes on to be one. A node that may become primary has all the data."""
    rng = random.Random(target)
    pair, relay = make(make_relayed, "0")
    node = pair.a if target == "a" else pair.b
    written = change(pair.a, rng, EXTENTS)
    pair.wait_in_sync(pair.a)
    whole = 0
    for less in (None, 1, 130, 700, EXTENT // 2):
        written |= behind(pair, node, rng, 8)
        relay.reset()
        if less is not None:
            way = Way(cut_after=whole - less)
            relay.trouble(**({"back": way} if target == "a" else {"there": way}))
            relay.allowed = 3  # its two connections, and the notice
        before = pair.a.said().count(": connected to ")
        begin(pair, node)
        if less is None:
            pair.wait_in_sync(pair.a)
            whole = relay.received if target == "a" else relay.sent
            continue
        eventually(lambda before=before: pair.a.said().count(": connected to ") > before, "it begins")
        eventually(lambda: not connected(pair) or not node.dump()["syncing"], "it is cut, or was faster")
        relay.cut()
        eventually(lambda: not connected(pair), "it is cut")
        if not node.dump()["syncing"]:
            assert pair.differing() is None, f"{less} bytes before the end: complete, and they differ"
        relay.heal()
        relay.allowed = None
        pair.wait_in_sync(pair.a)
        check(pair, pair.a, written)


@pytest.mark.parametrize("target", ["a", "b"])
def test_busy_resync(make_relayed: MakeRelayed, target: str) -> None:
    """Clients write to all extents, those that are being copied, those that are not yet and those that have been; the
    synchronisation gets on and ends while they do."""
    rng = random.Random(target)
    pair, _ = make(make_relayed, "32M")
    node = pair.a if target == "a" else pair.b
    written = change(pair.a, rng, EXTENTS)
    pair.wait_in_sync(pair.a)
    written |= behind(pair, node, rng)
    done = pair.events(pair.a).count(f"syncdone {pair.a.name()}")
    load = Load(1, [place for place in range(0, SIZE, EXTENT // 8) if place not in written], depth=8)
    begin(pair, node)
    with load.on(pair.a):
        for quarters in (3, 2, 1):
            eventually(lambda quarters=quarters: left(pair) <= CHANGED * quarters // 4 + 20, "it gets on")
            load.progress(20)
        eventually(lambda: pair.events(pair.a).count(f"syncdone {pair.a.name()}") > done, "it ends")
    load.check(pair.a)
    pair.wait_in_sync(pair.a)
    check(pair, pair.a, written)


class Unusual:
    """A client whose requests are of every size and at every border, and what the disk has to hold."""

    def __init__(self, raw: RawClient, rng: random.Random) -> None:
        self.raw, self.rng = raw, rng
        self.disk = bytearray()
        for at in range(0, SIZE, 8 * MIB):
            self.disk += raw.read(at, 8 * MIB)

    def place(self, most: int) -> tuple[int, int]:
        """Offset and length, in whole sectors: at and around borders of extents and slabs, or anywhere."""
        rng = self.rng
        length = rng.choice([512, 1024, 4096, 4608, 128 << 10, (128 << 10) + 512, EXTENT, 3 * EXTENT + 512, most])
        length = min(length, most)
        unit = rng.choice([512, 4096, 128 << 10, EXTENT])
        offset = rng.randrange(SIZE // unit) * unit + rng.choice([-512, 0, 0, 512])
        return max(0, min(offset, SIZE - length)), length

    def one(self) -> None:
        rng = self.rng
        kind = rng.choice([WRITE, WRITE, WRITE_ZEROES, TRIM])
        offset, length = self.place(rng.choice([MIB, 4 * MIB, 32 * MIB]))
        data = rng.randbytes(length) if kind == WRITE else b""
        answer = self.raw.do(kind, offset, length, FUA * rng.randrange(2), data)
        assert answer.error == 0
        self.disk[offset : offset + length] = data or bytes(length)
        self.expect(max(0, offset - 4096), min(SIZE, offset + length + 4096))

    def expect(self, begin: int, end: int) -> None:
        end = min(end, begin + 32 * MIB)
        assert self.raw.read(begin, end - begin) == self.disk[begin:end], f"offset {begin}, {end - begin} bytes"

    def overlapping(self) -> None:
        """Many at once in one place, with a storm of flushes: each sector is one of them."""
        begin, _ = self.place(2 * MIB)
        begin = min(begin, SIZE - 2 * MIB)
        layers = [bytes(self.disk[begin : begin + 2 * MIB])]
        count = 0
        for _ in range(12):
            offset, length = self.rng.randrange(2000) * 512, self.rng.choice([512, 4096, 200 << 9, MIB])
            data = self.rng.randbytes(length)
            layers.append(layers[0][:offset] + data + layers[0][offset + length :])
            self.raw.start(WRITE, begin + offset, length, 0, data)
            for _ in range(5):
                self.raw.start(FLUSH)
            count += 6
        assert all(answer.error == 0 for answer in self.raw.wait(count).values())
        found = self.raw.read(begin, 2 * MIB)
        for at in range(0, 2 * MIB, 512):
            sector = found[at : at + 512]
            assert any(layer[at : at + 512] == sector for layer in layers), f"offset {begin + at}"
        self.disk[begin : begin + 2 * MIB] = found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["a", "b"])
def test_unusual_requests_during_a_resync(make_relayed: MakeRelayed, target: str) -> None:
    """Sizes from a sector to 32 MiB, borders of extents and slabs, trims and zeros over many extents, forced unit
    access, overlapping writes at once, storms of flushes."""
    rng = random.Random(target)
    pair, _ = make(make_relayed, "16M")
    node = pair.a if target == "a" else pair.b
    change(pair.a, rng, EXTENTS)
    pair.wait_in_sync(pair.a)
    behind(pair, node, rng)
    begin(pair, node)
    with RawClient(pair.a.socket()) as raw:
        unusual, rounds = Unusual(raw, rng), 0
        while rounds < 6 or (node.dump()["syncing"] and rounds < 200):
            for _ in range(4):
                unusual.one()
            unusual.overlapping()
            rounds += 1
        for at in range(0, SIZE, 32 * MIB):
            unusual.expect(at, at + 32 * MIB)
        pair.wait_in_sync(pair.a)
        for at in range(0, SIZE, 32 * MIB):
            unusual.expect(at, at + 32 * MIB)
        assert raw.do(FLUSH).error == 0
    assert pair.data(pair.b) == unusual.disk
    assert pair.differing() is None
