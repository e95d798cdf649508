"""A primary's stages wired to a secondary's, with the disk stage on a file: what was written here is written there.

The test is the primary's sequencer; it lets overlapping writes be in flight, as an original primary does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hast.ffi import _hast
from hast.stages.context import RECV, SEND
from tests.shm.connrig import (
    DATA_OFFSET,
    DELETE,
    FLUSH,
    KIB,
    MEMSYNC,
    MIB,
    READ,
    WRITE,
    ZERO,
    Done,
    Primary,
    Secondary,
    pair,
)

lib = _hast.lib
SIZE = 4 * MIB
CHECKSUMS = pytest.mark.parametrize("checksum", ["none", "crc32", "sha256"])
COMPRESSIONS = pytest.mark.parametrize("compression", ["none", "hole", "lzf"])


class Pair:
    """Both nodes; what: compression, checksum, version and family of both."""

    def __init__(
        self, component: Path, family: str = "tcp", engine: str = "threads", slots: int = 64, **what: Any
    ) -> None:
        component.write_bytes(bytes(DATA_OFFSET + SIZE))
        (one, into), (two, back) = pair(family), pair(family)
        self.component = component
        disk = {"component": component, "engine": engine, "nclient": slots}
        self.secondary = Secondary(ends=(into, back), datasize=SIZE, **disk, **what)
        self.primary = Primary(ends=(one, two), datasize=SIZE, **what)

    def stored(self) -> bytes:
        return self.component.read_bytes()[DATA_OFFSET:]

    def close(self) -> None:
        self.primary.close()
        self.secondary.close()


@contextmanager
def running(made: Pair) -> Iterator[Pair]:
    try:
        yield made
    finally:
        made.close()


class Client:
    """Submits at random and keeps the model: what each byte must be, and what each read must bring."""

    def __init__(self, nodes: Pair, seed: int, memsync: bool) -> None:
        self.p, self.dice, self.memsync = nodes.primary, random.Random(seed), memsync
        self.model = bytearray(SIZE)
        self.expected: dict[int, bytes] = {}
        self.received: set[int] = set()
        self.finals = 0

    def payload(self, length: int) -> bytes:
        """Noise, text, zeros: what does not compress, what does, and holes."""
        kind = self.dice.randrange(4)
        if kind == 0:
            return bytes(length)
        if kind == 1:
            return (b"line %d of something\n" % self.dice.randrange(10**6) * (length // 20 + 1))[:length]
        return self.dice.randbytes(length)

    def submit(self) -> int:
        """A bio in a slot, not pushed yet."""
        dice = self.dice
        cmd = dice.choices((READ, WRITE, DELETE, FLUSH), (3, 6, 1, 0.5))[0]
        length = 512 * dice.choice((1, 1, 2, 3, 8, 8, 33, 64, 256))
        offset = dice.randrange(0, SIZE - length + 1, 512)
        flags = MEMSYNC if self.memsync and cmd == WRITE else 0
        if cmd == FLUSH:
            return self.p.fill(FLUSH)
        if cmd == READ:
            slot = self.p.fill(READ, offset, length)
            self.expected[slot] = bytes(self.model[offset : offset + length])
            return slot
        if cmd == DELETE or dice.random() < 0.1:
            self.model[offset : offset + length] = bytes(length)
            return self.p.fill(cmd, offset, length, flags=flags | (ZERO if cmd == WRITE else 0))
        data = self.payload(length)
        self.model[offset : offset + length] = data
        return self.p.fill(WRITE, offset, data=data, flags=flags)

    def take(self, done: Done) -> None:
        bio = self.p.bio(done.slot)
        if done.received:
            assert done.slot not in self.received
            self.received.add(done.slot)
            return
        assert done.error == 0
        self.finals += 1
        assert bool(bio.flags & MEMSYNC) == (done.slot in self.received)
        self.received.discard(done.slot)
        if bio.cmd == READ:
            assert done.data == self.expected.pop(done.slot)

    def run(self, total: int, depth: int = 48) -> None:
        submitted = 0
        while self.finals < total:
            batch = []
            while submitted - self.finals < depth and submitted < total and len(batch) < 16:
                batch.append(self.submit())
                submitted += 1
            if batch:
                self.p.push(lib.HAST_RING_SEND, RECV, batch)
            self.take(self.p.done()[0])
        assert self.p.nothing_done() and not self.received and not self.p.with_remote


def flushed(nodes: Pair) -> bytes:
    slot = nodes.primary.submit(FLUSH)
    assert [(d.slot, d.error) for d in nodes.primary.done()] == [(slot, 0)]
    return nodes.stored()


@COMPRESSIONS
@CHECKSUMS
def test_thousands_of_random_requests(compression: str, checksum: str, tmp_path: Path) -> None:
    seed = hash_of(compression, checksum)
    with running(Pair(tmp_path / "component", compression=compression, checksum=checksum)) as nodes:
        client = Client(nodes, seed, memsync=seed % 2 == 0)
        client.run(1500)
        assert flushed(nodes) == client.model
        nodes.secondary.all_slots_free()
        assert nodes.primary.alive() and nodes.secondary.alive()


def hash_of(*words: str) -> int:
    return sum(map(len, words))


@pytest.mark.parametrize("engine", ["inline", "threads"])
@pytest.mark.parametrize(("version", "family"), [(1, "tcp"), (2, "unix")])
def test_versions_engines_and_sockets(engine: str, version: int, family: str, tmp_path: Path) -> None:
    """In version 1 a memsync write has one answer, and nothing waits for a first one."""
    with running(Pair(tmp_path / "c", family, engine, compression="lzf", checksum="crc32", version=version)) as nodes:
        client = Client(nodes, 5, memsync=version == 2)
        client.run(800)
        assert flushed(nodes) == client.model


def test_few_slots_on_the_secondary(tmp_path: Path) -> None:
    """The primary has far more in flight than the secondary has slots: it waits, nothing else."""
    with running(Pair(tmp_path / "component", slots=6)) as nodes:
        client = Client(nodes, 9, memsync=True)
        client.run(800)
        assert flushed(nodes) == client.model
        nodes.secondary.all_slots_free()


def test_each_message_is_counted_once(tmp_path: Path) -> None:
    """What status shows: messages and bytes, the same on both sides."""
    with running(Pair(tmp_path / "component", engine="inline")) as nodes:
        p, s = nodes.primary, nodes.secondary
        for _ in range(20):
            p.push(lib.HAST_RING_SEND, RECV, [p.fill(WRITE, n * 4096, data=b"x" * 4096) for n in range(48)])
            p.done(48)
        assert p.line(SEND).ops == p.line(RECV).ops == s.line(RECV).ops == s.line(SEND).ops == 960
        # The last ones may be counted a moment after they have arrived.
        deadline = time.monotonic() + 30
        while p.line(SEND).bytes != s.line(RECV).bytes or s.line(SEND).bytes != p.line(RECV).bytes:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert s.arena.seq.stats.write == 960


def test_large_reads_and_writes_at_depth(tmp_path: Path) -> None:
    with running(Pair(tmp_path / "component", checksum="crc32")) as nodes:
        p = nodes.primary
        blocks = [random.Random(n).randbytes(128 * KIB) for n in range(32)]
        for _ in range(4):
            p.push(lib.HAST_RING_SEND, RECV, [p.fill(WRITE, n * 128 * KIB, data=b) for n, b in enumerate(blocks)])
            p.done(32)
            slots = [p.fill(READ, n * 128 * KIB, 128 * KIB) for n in range(32)]
            p.push(lib.HAST_RING_SEND, RECV, slots)
            data = {done.slot: done.data for done in p.done(32)}
            assert [data[slot] for slot in slots] == blocks
        assert nodes.stored() == b"".join(blocks)


def test_holes_make_holes(tmp_path: Path) -> None:
    """A write of zeros costs four bytes of data on the wire, and no space on a file that can do without."""
    with running(Pair(tmp_path / "component", engine="inline", compression="hole")) as nodes:
        p, s = nodes.primary, nodes.secondary
        p.push(lib.HAST_RING_SEND, RECV, [p.fill(WRITE, n * 128 * KIB, data=b"x" * 128 * KIB) for n in range(32)])
        p.done(32)
        before, used = s.line(RECV).bytes, nodes.component.stat().st_blocks
        p.push(lib.HAST_RING_SEND, RECV, [p.fill(WRITE, n * 128 * KIB, 128 * KIB, flags=ZERO) for n in range(32)])
        p.done(32)
        assert s.line(RECV).bytes - before < 32 * 256
        assert nodes.stored() == bytes(SIZE)
        with nodes.component.open("rb+") as component:
            can_punch = lib.hast_disk_can_punch(component.fileno()) == 1
        assert not can_punch or nodes.component.stat().st_blocks < used / 2
