"""Every replication mode with every compression and checksum: what a client writes is the same on both components."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from tests.e2e.node import MIB
from tests.e2e.pair import Pair
from tests.nbdclient import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawClient

SECTOR = 512
SIZE = 8 * MIB
LARGEST = 300 << 10  # bytes: more than twice of what goes into one request to the peer
DEPTH = 8
COMPRESSIONS = ("none", "hole", "lzf")
CHECKSUMS = ("none", "crc32", "sha256")


def payload(rng: random.Random, length: int) -> bytes:
    """Random, zero, compressible, or all of it in one."""
    kind = rng.choice(["random", "zero", "text", "mixed"])
    if kind == "random":
        return rng.randbytes(length)
    if kind == "zero":
        return bytes(length)
    if kind == "text":
        return (b"%d lines of text, " % rng.randrange(1000) * (length // 8))[:length]
    half = length // 2
    return bytes(half) + rng.randbytes(length - half)


class Client:
    """Keeps DEPTH requests under way, none of them overlapping, and knows what the disk holds."""

    def __init__(self, raw: RawClient, rng: random.Random) -> None:
        self.raw, self.rng = raw, rng
        self.disk = bytearray(SIZE)
        self.flying: dict[int, range] = {}

    def free_range(self) -> range:
        while True:
            length = self.rng.choice([1, 2, 3, 7, 8, self.rng.randrange(1, LARGEST // SECTOR)]) * SECTOR
            start = self.rng.randrange((SIZE - length) // SECTOR + 1) * SECTOR
            if all(start >= r.stop or start + length <= r.start for r in self.flying.values()):
                return range(start, start + length)

    def step(self) -> None:
        if len(self.flying) == DEPTH:
            self.settle(1)
        r = self.free_range()
        if self.rng.random() < 0.2:
            data, kind, body = bytes(len(r)), self.rng.choice([TRIM, WRITE_ZEROES]), b""
        else:
            kind = WRITE
            data = body = payload(self.rng, len(r))
        flags = FUA if self.rng.random() < 0.05 else 0
        self.flying[self.raw.start(kind, r.start, len(r), flags, body)] = r
        self.disk[r.start : r.stop] = data

    def settle(self, count: int) -> None:
        for cookie, answer in self.raw.wait(count).items():
            assert answer.error == 0
            del self.flying[cookie]

    def finish(self) -> None:
        while self.flying:
            self.settle(1)
        assert self.raw.do(FLUSH).error == 0


def overlap(raw: RawClient, rng: random.Random) -> None:
    """Writes to the same few sectors, all under way at once: which one wins is not said, but it is the same one."""
    count = 24
    for _ in range(count):
        start, length = rng.randrange(8), rng.randrange(1, 9)
        raw.start(WRITE, start * SECTOR, length * SECTOR, 0, rng.randbytes(length * SECTOR))
    done = 0
    while done < count:
        done += len(raw.wait(1))
    assert raw.do(FLUSH).error == 0


@pytest.mark.slow
@pytest.mark.parametrize("replication", ["fullsync", "memsync", "async"])
def test_both_components_are_the_same_after_a_flush(make_pair: Callable[..., Pair], replication: str) -> None:
    settings = {f"{c}-{h}": (c, h) for c, h in itertools.product(COMPRESSIONS, CHECKSUMS)}
    pair = make_pair(
        dict.fromkeys(settings, SIZE),
        conf=f"timeout 5\nreplication {replication}",
        resource_conf={name: f"compression {c}\nchecksum {h}" for name, (c, h) in settings.items()},
    )
    pair.create()
    pair.start()
    for seed, name in enumerate(settings):
        pair.roles(pair.a, name)
        rng = random.Random(seed)
        with RawClient(pair.a.socket(name)) as raw:
            client = Client(raw, rng)
            for _ in range(300):
                client.step()
            client.finish()
            assert pair.differing(name) is None, name
            assert pair.data(pair.b, name) == client.disk, name
            overlap(raw, rng)
            assert pair.differing(name) is None, name
            assert raw.do(READ, 0, MIB).data == pair.data(pair.b, name)[:MIB]
        status = pair.wait_in_sync(pair.a, name)
        assert status["replication"] == replication
        assert (status["compression"], status["checksum"]) == settings[name]
        for node in pair.nodes:
            node.set_role("init", name)
