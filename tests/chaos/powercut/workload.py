"""A recording is made: two real nodes on disks that record, a client over NBD, and what can happen to a pair.

Invariants:
- What clients are answered is noted as it comes; an error that a client got is a complaint, for one good copy can
  always be reached here.
- The nodes are healthy and in sync at the end, their roles are taken away, and their disks are there for more.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.powercut.history import SECTOR, History, Request, Shape, pattern
from tests.e2e.node import loopback
from tests.e2e.pair import Pair, PairNode
from tests.e2e.relay import Relay
from tests.faultdisk import FaultDisk, entries
from tests.nbdclient import FLUSH, FUA, TRIM, WRITE, WRITE_ZEROES, RawClient

DEPTH = 8  # requests under way
HOT = 0.4  # the share of requests that go to a few sectors
LARGEST = 64  # sectors
PAUSE = 0.0005  # seconds after each answer: what takes a second is not to fill the recording
HUGE = 300  # more than a slab: two bios


class Client(threading.Thread):
    """Writes to a node until it is stopped, or the connection ends. `done` counts answers."""

    def __init__(self, node: PairNode, history: History, numbers: Iterator[int], seed: int) -> None:
        super().__init__(daemon=True)
        self.rng = random.Random(seed)
        self.history, self.numbers = history, numbers
        self.raw = RawClient(node.socket())
        self.complaints: list[str] = []
        self.done = 0
        self._ending = threading.Event()
        self._open: dict[int, Request] = {}

    def run(self) -> None:
        try:
            while not self._ending.is_set():
                while len(self._open) < DEPTH:
                    self._send()
                self._receive()
                time.sleep(PAUSE)
            while self._open:
                self._receive()
        except (OSError, EOFError, AssertionError) as error:
            if not self._ending.is_set():
                self.complaints.append(f"the connection ended: {error}")
        finally:
            self.raw.close()

    def abandon(self) -> None:
        """The node is about to be killed: no more requests, and what is under way may stay without an answer."""
        self._ending.set()

    def finish(self) -> None:
        """No more requests; the answers of those under way."""
        self._ending.set()
        self.join(120)
        assert not self.is_alive(), "requests are not answered"
        assert not self.complaints, self.complaints

    def _send(self) -> None:
        rng = self.rng
        dice = rng.random()
        if dice < 0.08:
            request = Request(0, flush=True)
        else:
            count = HUGE if dice > 0.99 else min(LARGEST, int(rng.expovariate(1 / 6)) + 1)
            size = self.history.shape.sectors
            first = rng.randrange(size // 32) if rng.random() < HOT else rng.randrange(size)
            first = min(first, size - count)
            zeros = dice < 0.16
            request = Request(0 if zeros else next(self.numbers), False, first, count, zeros, rng.random() < 0.08)
        request.begin = time.monotonic_ns()
        self.history.requests.append(request)
        self._open[self._start(request)] = request

    def _start(self, request: Request) -> int:
        if request.flush:
            return self.raw.start(FLUSH)
        flags = FUA if request.fua else 0
        at, length = request.first * SECTOR, request.count * SECTOR
        if request.zeros:
            return self.raw.start(self.rng.choice((TRIM, WRITE_ZEROES)), at, length, flags)
        payload = b"".join(pattern(request.number, request.first + n) for n in range(request.count))
        return self.raw.start(WRITE, at, length, flags, payload)

    def _receive(self) -> None:
        ((cookie, answer),) = self.raw.wait(1).items()
        now = time.monotonic_ns()
        request = self._open.pop(cookie)
        self.done += 1
        if answer.error:
            self.complaints.append(f"error {answer.error} for {request}")
        else:
            request.ack = now


class Recorder:
    """Two nodes on recording disks, with a relay on each way. Take it down with close()."""

    def __init__(
        self,
        where: Path,
        replication: str,
        metaflush: bool,
        extentsize: int,
        size: int,
        keepdirty: int,
        seed: int,
        conf: str = "",
    ) -> None:
        self.where = where
        self.rng = random.Random(seed)
        base = self.rng.randrange(1 << 20)
        self.relays = {name: Relay(loopback(base + n)) for n, name in enumerate(("hasta", "hastb"))}
        self.pair = Pair(
            {"disk": size},
            conf=f"timeout 4\nreplication {replication}\nmetaflush {'on' if metaflush else 'off'}\n{conf}",
            remotes={name: relay.url for name, relay in self.relays.items()},
        )
        for node in self.pair.nodes:
            there = self.pair.other(node)
            self.relays[node.node].target(there.address, self.relays[there.node].address)
        self.disks: dict[str, FaultDisk] = {}
        self.logs: dict[str, Path] = {}
        self.numbers = iter(range(1, 1 << 40))
        self.create = ("-e", str(extentsize), "-k", str(keepdirty))
        try:
            for node in self.pair.nodes:
                self.disks[node.node] = FaultDisk.under(node)
                self.logs[node.node] = where / f"{node.node}.log"
                self.disks[node.node].record(self.logs[node.node])
            self.pair.create(*self.create)
        except BaseException:
            self.close()
            raise
        dump = self.pair.a.dump()
        offset = int(dump["localoff"])
        assert int(dump["datasize"]) % SECTOR == 0
        shape = Shape(offset // SECTOR, int(dump["datasize"]) // SECTOR, extentsize)
        self.history = History(self.pair.a.name(), shape, replication, metaflush)
        self.mark("created")

    def mark(self, text: str) -> None:
        self.history.marks.append((time.monotonic_ns(), text))

    def close(self) -> list[str]:
        for relay in self.relays.values():
            relay.heal()
        complaints = self.pair.close()
        for relay in self.relays.values():
            relay.close()
        return complaints

    @contextmanager
    def client(self, node: PairNode) -> Iterator[Client]:
        """A client at work meanwhile."""
        client = Client(node, self.history, self.numbers, self.rng.randrange(1 << 30))
        client.start()
        try:
            yield client
        finally:
            client.finish()

    def work(self, client: Client, answers: int) -> None:
        """Until the client has had so many more answers."""
        target, deadline = client.done + answers, time.monotonic() + 60
        while client.done < target:
            assert time.monotonic() < deadline, f"{self.history.marks[-1][1]}: the client is not served"
            assert not client.complaints, client.complaints
            time.sleep(0.002)

    def collect(self) -> History:
        """The history, once nothing runs any more."""
        for name, disk in self.disks.items():
            disk.record(None)
            self.history.disks[name] = list(entries(self.logs[name]))
        return self.history

    # ---- what happens ----

    def run(self, amount: int = 120) -> History:
        """All of it, with so many answered requests in each part."""
        a, b = self.pair.nodes
        self.mark("start")
        self.pair.start()
        self.pair.roles(a)
        self._link_fails(a, amount)
        self._secondary_dies(a, amount)
        self._primary_dies(a, amount)
        self._swap(a, b, amount)
        self._left_behind(b, a, amount)
        self.mark("end")
        for node in (b, a):
            node.set_role("init")
        return self.collect()

    def _link_fails(self, primary: PairNode, amount: int) -> None:
        relay = self.relays[primary.node]
        with self.client(primary) as client:
            self.mark("connected")
            self.work(client, 2 * amount)
            self.mark("the link is cut")
            relay.allowed = 0
            relay.cut()
            self.work(client, amount)
            self.mark("the link is back")
            relay.allowed = None
            self.pair.wait_connected(primary)
            self.work(client, amount)
            self.mark("the link is cut for a moment")
            relay.cut()
            self.work(client, amount)
        self._settle(primary)

    def _secondary_dies(self, primary: PairNode, amount: int) -> None:
        secondary = self.pair.other(primary)
        with self.client(primary) as client:
            self.work(client, amount)
            self.mark("the secondary is killed")
            secondary.kill()
            self.work(client, amount)
            self.mark("the secondary starts again")
            secondary.start()
            secondary.set_role("secondary")
            self.pair.wait_connected(primary)
            self.work(client, amount)
        self._settle(primary)

    def _primary_dies(self, primary: PairNode, amount: int) -> None:
        with self.client(primary) as client:
            self.work(client, amount)
            self.mark("the primary is killed")
            client.abandon()
            primary.kill()
        self.mark("the primary starts again")
        primary.start()
        primary.set_role("primary")
        with self.client(primary) as client:
            self.work(client, amount)
        self._settle(primary)

    def _swap(self, old: PairNode, new: PairNode, amount: int) -> None:
        self.mark("the roles change")
        old.set_role("secondary")
        new.set_role("primary")
        self.pair.wait_connected(new)
        with self.client(new) as client:
            self.work(client, amount)
        self._settle(new)

    def _left_behind(self, primary: PairNode, other: PairNode, amount: int) -> None:
        """The primary writes alone, then its role goes to the other one, which has the older data."""
        self.mark("the secondary stops")
        other.set_role("init")
        with self.client(primary) as client:
            self.work(client, amount)
        self.mark("the older node becomes primary")
        primary.set_role("secondary")
        other.set_role("primary")
        self.pair.wait_connected(other)
        with self.client(other) as client:
            self.work(client, amount)
        self._settle(other)

    def _settle(self, primary: PairNode) -> None:
        self.mark("nobody writes")
        self.pair.wait_connected(primary)
        self.pair.wait_in_sync(primary)
