"""A verified client load: several connections that write, trim and read, and know what the disk has to hold.

Invariants:
- Each connection works on blocks of its own, so what a block holds is known whenever its connection waits for nothing.
- A request that fails, or data that is not what was acknowledged, is an error of the load: `errors`, and stop() raises.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.node import DEADLINE, Node, eventually
from tests.nbdclient import FLUSH, FUA, READ, TRIM, WRITE, WRITE_ZEROES, RawClient

BLOCK = 4096
PAUSE = 0.002  # seconds between what clients do while something else is waited for, which needs the processors as well


class Load:
    """`places`: offsets of blocks of 4 KiB that are written; `depth`: requests under way on each connection at most.

    start() on the node that is primary, stop() before it is another one; check() compares everything. The content of
    a block is known from one start() to the next.
    """

    def __init__(self, seed: int, places: list[int], connections: int = 2, depth: int = 4) -> None:
        self.rng = random.Random(seed)
        self.places = places
        self.connections, self.depth = connections, depth
        self.content: dict[int, int] = {}  # block -> the seed of its data; 0: zeros
        self.requests = 0
        self.errors: list[BaseException] = []
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    @staticmethod
    def data(number: int) -> bytes:
        return random.Random(number).randbytes(BLOCK) if number else bytes(BLOCK)

    # ---- life ----

    def start(self, node: Node) -> None:
        self._ending.clear()
        for n in range(self.connections):
            mine = self.places[n :: self.connections]
            arguments = (node, mine, random.Random(self.rng.random()))
            self._threads.append(threading.Thread(target=self._run, args=arguments))
            self._threads[-1].start()

    def stop(self) -> None:
        """End it; raises what went wrong."""
        self._ending.set()
        for thread in self._threads:
            thread.join(2 * DEADLINE)
            assert not thread.is_alive(), "a request is not answered"
        self._threads.clear()
        if self.errors:
            raise self.errors[0]

    @contextmanager
    def on(self, node: Node) -> Iterator[None]:
        """It runs meanwhile, and has to get on."""
        self.start(node)
        try:
            yield
            self.progress(20)
        finally:
            self.stop()

    def progress(self, count: int) -> None:
        """So many requests more are answered."""
        before = self.requests
        eventually(lambda: self.errors or self.requests - before >= count, f"{count} requests are answered")
        if self.errors:
            raise self.errors[0]

    # ---- work ----

    def _run(self, node: Node, places: list[int], rng: random.Random) -> None:
        try:
            with RawClient(node.socket()) as raw:
                while not self._ending.is_set():
                    self._batch(raw, places, rng)
                    self._ending.wait(PAUSE)
        except BaseException as error:
            self.errors.append(error)

    def _batch(self, raw: RawClient, places: list[int], rng: random.Random) -> None:
        """Several requests at once, for a different block each."""
        cookies: dict[int, tuple[int, int | None]] = {}
        for place in rng.sample(places, min(len(places), rng.randint(1, self.depth))):
            kind = rng.choices([WRITE, WRITE_ZEROES, READ, TRIM], [60, 5, 30, 5])[0]
            if kind == READ:
                cookies[raw.start(READ, place, BLOCK)] = place, self.content.get(place)
                continue
            number = rng.randrange(1, 1 << 40) if kind == WRITE else 0
            self.content[place] = number
            flags = FUA if rng.random() < 0.1 else 0
            cookies[raw.start(kind, place, BLOCK, flags, self.data(number) if kind == WRITE else b"")] = place, None
        if rng.random() < 0.1:
            cookies[raw.start(FLUSH)] = -1, None
        for cookie, answer in raw.wait(len(cookies)).items():
            place, number = cookies[cookie]
            assert answer.error == 0, f"offset {place}: errno {answer.error}"
            if number is not None:
                assert answer.data == self.data(number), f"offset {place}: what was read is not what was written"
        self.requests += len(cookies)

    def check(self, node: Node) -> None:
        """Everything that was acknowledged is there."""
        with RawClient(node.socket()) as raw:
            assert raw.do(FLUSH).error == 0
            for place, number in self.content.items():
                assert raw.read(place, BLOCK) == self.data(number), f"offset {place}: an acknowledged write is lost"
