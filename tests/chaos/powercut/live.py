"""Power cuts in life: one node loses its power while the other one goes on, comes back with what its disk was left
with, and in the middle of all that the other one loses its own.

Invariants:
- A node that was cut has a state that its disk could have been left in, and no note in its run directory.
- Who may be primary by itself keeps what was flushed, and where the mode says so what was acknowledged; both are the
  same in the end, and hold what was flushed.
"""

from __future__ import annotations

import contextlib
import random
import time

from hast import boot
from tests.chaos.powercut.cut import KINDS, Disk, State
from tests.chaos.powercut.promise import Promises
from tests.chaos.powercut.revive import read_state, write_state
from tests.chaos.powercut.workload import Recorder
from tests.e2e.node import eventually
from tests.e2e.pair import PairNode
from tests.faultdisk import entries

SYNCRATE = "syncrate 524288"  # bytes per second: seconds for what was left behind
AMOUNT = 60  # requests at a time


class Live:
    """One story with the pair of a recorder on which nothing runs yet. `words` tell it."""

    def __init__(self, recorder: Recorder, rng: random.Random) -> None:
        self.recorder, self.rng = recorder, rng
        self.pair = recorder.pair
        self.shape = recorder.history.shape
        self.words: list[str] = []
        self.before: dict[str, State | None] = dict.fromkeys(recorder.disks)
        self.lives = 0

    def story(self) -> str:
        """AssertionError, with the words, for a violation."""
        try:
            self._story()
        except AssertionError as error:
            raise AssertionError(f"{'; '.join(self.words)}: {error}") from error
        return "; ".join(self.words)

    def _story(self) -> None:
        first, second = self.pair.nodes
        self.pair.start()
        self.pair.roles(first)
        self.pair.wait_in_sync(first)
        if self.rng.random() < 0.5:
            with self.recorder.client(first) as client:
                self.recorder.work(client, AMOUNT)
                self.recorder.work(client, self.rng.randrange(AMOUNT))
                client.abandon()
                self._cut(first)
            second.set_role("primary")
            self.words.append("the other one takes over")
            self._held(second, acked=self.recorder.history.replication != "async")
            first, second = second, first
        else:
            idle = self.rng.random() < 0.6
            with self.recorder.client(first) as client:
                self.recorder.work(client, AMOUNT)
                if idle:
                    client.finish()
                self._cut(second)
                if not idle:
                    self.recorder.work(client, AMOUNT)
            self.words.append("nobody writes meanwhile" if idle else "the primary goes on alone")
        self._again(first, second)

    def _again(self, primary: PairNode, back: PairNode) -> None:
        """The one that was cut comes back as secondary; then the primary is cut."""
        back.start()
        back.set_role("secondary")
        self.pair.wait_connected(primary)
        with self.recorder.client(primary) as client:
            self.recorder.work(client, self.rng.randint(1, AMOUNT))
            time.sleep(self.rng.random() * 2)
            client.abandon()
            self._cut(primary)
        refused = ""
        try:
            back.set_role("primary")
        except AssertionError as error:
            refused = str(error)
            assert "mix of old and new" in refused, refused
        if refused:
            self.words.append(f"{back.node} refuses to be promoted")
            primary.start()
            primary.set_role("primary")
            self._held(primary, acked=False)
        else:
            self.words.append(f"{back.node} is promoted")
            self._held(back, acked=False)
            with self.recorder.client(back) as client:
                self.recorder.work(client, AMOUNT)
            primary, back = back, primary
            back.start()
            back.set_role("secondary")
        self._end(primary)

    def _end(self, primary: PairNode) -> None:
        self.pair.wait_in_sync(primary)
        self._held(primary, acked=False)
        other = self.pair.other(primary)
        eventually(lambda: not other.dump()["syncing"], f"{other.node} is told that it is complete")
        for node in (primary, other):
            node.set_role("init")
        assert self.pair.differing() is None, f"the components differ at {self.pair.differing()}"

    def _cut(self, node: PairNode) -> None:
        """Its power is gone; its disk has one of the states that are possible then."""
        node.kill()
        for note in (boot.note, boot.outdated_note):
            note(node.rundir, node.name()).unlink(missing_ok=True)
        disk = self.recorder.disks[node.node]
        disk.record(None)
        replayed = Disk(list(entries(self.recorder.logs[node.node])), self.shape, self.before[node.node])
        replayed.advance(time.monotonic_ns())
        kind = self.rng.choice(list(KINDS))
        state = replayed.state(kind, self.rng)
        write_state(self.recorder, node, state)
        self.before[node.node] = state
        self.lives += 1
        self.recorder.logs[node.node] = self.recorder.where / f"{node.node}.{self.lives}.log"
        disk.record(self.recorder.logs[node.node])
        self.words.append(f"{node.node} loses its power ({kind})")

    def _held(self, node: PairNode, acked: bool) -> None:
        """What a client reads now is what was promised. acked: acknowledgements count, flushed or not."""
        promises = Promises(self.recorder.history)
        promises.advance(time.monotonic_ns())
        data: State = []
        with contextlib.suppress(EOFError):
            data = read_state(node, self.shape.sectors)
        assert data, f"{node.node} cannot be read"
        if old := promises.broken(data, promises.acked if acked else promises.durable):
            shown = [(sector, data[sector]) for sector in old[:4]]
            what = "acknowledged" if acked else "flushed"
            raise AssertionError(f"{node.node} lacks what was {what} in {len(old)} sectors: {shown}")
