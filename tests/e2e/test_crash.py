"""kill -9 of every process of a node in the middle of random writes, and what is found after the restart."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable

import pytest

from tests.e2e.node import MIB, Node, eventually
from tests.nbdclient import FLUSH, WRITE, RawClient

EXTENT = 2 * MIB
BLOCK = 4096
SIZE = 64 * MIB
ROUNDS = 20
DEPTH = 8


class Writer:
    """A client that keeps DEPTH writes and now and then a flush under way, and knows what it may find afterwards.

    acked: block -> number of the last acknowledged write; flying: cookie -> block and number of a write not answered.
    Each block has at most one write under way: after a crash it holds the acknowledged number or that one.
    """

    def __init__(self, node: Node, seed: int, acked: dict[int, int]) -> None:
        self.client = RawClient(node.socket())
        self.rng = random.Random(seed)
        self.acked = acked
        self.flying: dict[int, tuple[int, int]] = {}  # cookie -> block, number
        self.flushes = 0
        self.progress = threading.Event()  # a hundred answers are in

    def run(self, first_number: int) -> None:
        """Until the connection breaks."""
        number, answers = first_number, 0
        try:
            while True:
                while len(self.flying) < DEPTH:
                    number += 1
                    self._start(number)
                for cookie, answer in self.client.wait(1).items():
                    assert answer.error == 0
                    block, written = self.flying.pop(cookie)
                    if block < 0:
                        self.flushes += 1
                    else:
                        self.acked[block] = written
                answers += 1
                if answers >= 100:
                    self.progress.set()
        except (EOFError, ConnectionError):
            self.client.close()

    def _start(self, number: int) -> None:
        if self.rng.random() < 0.05:
            cookie, block = self.client.start(FLUSH), -1
        else:
            busy = {block for block, _ in self.flying.values()}
            while (block := self.rng.randrange(SIZE // BLOCK)) in busy:
                pass
            # Known to be under way before it is sent: half of it may arrive.
            cookie = self.client.cookie + 1
            self.flying[cookie] = (block, number)
            self.client.start(WRITE, block * BLOCK, BLOCK, payload=content(number))
            return
        self.flying[cookie] = (block, number)


def content(number: int) -> bytes:
    return number.to_bytes(8, "little") * (BLOCK // 8)


def sectors(data: bytes) -> list[bytes]:
    return [data[at : at + 512] for at in range(0, len(data), 512)]


def check(node: Node, writer: Writer) -> None:
    """Straight from the component, before any hastd has touched it again: contents and map."""
    dump = node.dump()
    raw = node.component().read_bytes()
    activemap, data = raw[4096 : dump["localoff"]], raw[dump["localoff"] :]
    flying = {block: number for block, number in writer.flying.values() if block >= 0}
    for block, number in writer.acked.items():
        found = sectors(data[block * BLOCK : (block + 1) * BLOCK])
        allowed = {content(number)[:512]}
        if block in flying:
            allowed.add(content(flying[block])[:512])
        assert set(found) <= allowed, f"block {block}: acknowledged write {number} is not there"
    touched = {block * BLOCK // EXTENT for block in [*writer.acked, *flying] if any(_block(data, block))}
    for extent in touched:
        assert activemap[extent // 8] >> (extent % 8) & 1, f"extent {extent} was written and is not dirty"
    dirty = sum(byte.bit_count() for byte in activemap)
    assert dump["dirtyextents"] == dirty
    assert dirty >= len(touched)


def _block(data: bytes, block: int) -> bytes:
    return data[block * BLOCK : (block + 1) * BLOCK]


@pytest.mark.slow
def test_kill_everything_during_random_writes(make_node: Callable[..., Node]) -> None:
    """Twenty times, at a different moment each: every acknowledged write is there, every extent that was written is
    dirty in the map, and `hastctl dump` says how many; then the node goes on with it."""
    node = make_node({"disk": SIZE}, memory=False)
    node.create()
    acked: dict[int, int] = {}
    rng = random.Random(4)
    flushes = 0
    for round_ in range(ROUNDS):
        node.start()
        node.role("primary")
        writer = Writer(node, round_, acked)
        thread = threading.Thread(target=writer.run, args=(round_ << 32,))
        thread.start()
        try:
            assert writer.progress.wait(60), "the writer makes no progress"
            thread.join(rng.random() * 0.3)  # the moment: nothing is waited for
        finally:
            node.kill()
            thread.join(60)
        assert not thread.is_alive()
        check(node, writer)
        flushes += writer.flushes
        # What was under way may be there or not, from now on for good: the next round must know which.
        settle(node, writer)
    assert flushes > ROUNDS


def settle(node: Node, writer: Writer) -> None:
    offset = node.dump()["localoff"]
    with node.component().open("rb") as file:
        for block, _ in writer.flying.values():
            if block < 0:
                continue
            file.seek(offset + block * BLOCK)
            found = set(sectors(file.read(BLOCK)))
            if len(found) == 1:
                writer.acked[block] = int.from_bytes(found.pop()[:8], "little")
            else:
                writer.acked.pop(block, None)  # torn: nothing was promised


def test_killed_node_cleans_up_at_its_next_start(make_node: Callable[..., Node]) -> None:
    """After kill -9 of everything sockets may be there that nobody serves; the next start takes their place."""
    node = make_node()
    node.primary()
    with RawClient(node.socket()) as client:
        assert client.write(0, b"x" * 512) == 0
    node.kill()
    if not node.socket().exists():  # the worker saw its hastd die, and had the time to remove it
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(node.socket()))
    node.start()
    assert not node.socket().exists()
    node.role("primary")
    with RawClient(node.socket()) as client:
        assert client.read(0, 512) == b"x" * 512


@pytest.mark.parametrize("stage", ["disk", "ggate"])
def test_a_killed_stage_is_replaced(node: Node, stage: str) -> None:
    """kill -9 of one stage: NBD clients lose their connection, a new one is served at once, nothing is lost."""
    with RawClient(node.socket()) as client:
        assert client.write(0, b"before" * 512) == 0
    worker = node.status()["workerpid"]
    (pid,) = (pid for pid, title in node.titles().items() if title.endswith(f": {stage}"))
    node.run("kill", "-9", str(pid))

    def served() -> bool:
        new = [pid for pid, title in node.titles().items() if title.endswith(f": {stage}")]
        return bool(new) and new != [pid] and "its stages run again" in node.said()

    eventually(served, f"a new {stage} stage runs")
    with RawClient(node.socket()) as client:
        assert client.read(0, 3072) == b"before" * 512
        assert client.write(0, b"after!" * 512) == 0
        assert client.read(0, 3072) == b"after!" * 512
    assert node.status()["workerpid"] == worker
