"""Real nodes are started from what a power cut has left, and have to keep what was promised.

Invariants:
- What is written to the disks is a state that cut.py has built, byte by byte; hastd does all the rest.
- Each node takes both roles: what a client reads at it is held against the promises, and the components are the same
  when both are in sync; with `metaflush off`, but for sectors that were touched since the last flush.
"""

from __future__ import annotations

import random

from tests.chaos.powercut.cut import KINDS, State
from tests.chaos.powercut.history import SECTOR, number_of, pattern
from tests.chaos.powercut.judge import Judge, moments, promoted
from tests.chaos.powercut.workload import Recorder
from tests.e2e.pair import PairNode
from tests.nbdclient import RawClient

PORTION = 64 << 10  # bytes read at once
MET = "connected"  # the mark from which on both nodes know each other


def write_state(recorder: Recorder, node: PairNode, state: State) -> None:
    """The state becomes the content of the node's disk."""
    offset = recorder.history.shape.offset
    with recorder.disks[node.node].backing.open("r+b") as file:
        for at, sector in enumerate(state):
            if isinstance(sector, bytes):
                file.write(sector)
            else:
                file.write(pattern(sector, at - offset) if sector else bytes(SECTOR))


def read_state(node: PairNode, sectors: int) -> State:
    """What a client reads, by the requests that wrote it."""
    found: State = []
    with RawClient(node.socket()) as client:
        for at in range(0, sectors * SECTOR, PORTION):
            data = client.read(at, min(PORTION, sectors * SECTOR - at))
            for n in range(0, len(data), SECTOR):
                found.append(number_of(data[n : n + SECTOR], (at + n) // SECTOR))
    return found


class Reviver:
    """The pair of a recorder whose recording is over, started again and again."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.pair = recorder.pair
        self.shape = recorder.history.shape

    def some(self, judge: Judge, count: int, rng: random.Random, words: list[str]) -> None:
        """So many states of moments all over the history; words: what each was. AssertionError for a violation."""
        met = next(at for at, text in judge.history.marks if text == MET)
        chosen = [m for m in moments(judge.history, 4 * count, rng) if m > met]
        for moment in sorted(rng.sample(chosen, min(count, len(chosen)))):
            judge.advance(moment)
            words.append(self.one(judge, moment, rng))

    def one(self, judge: Judge, moment: float, rng: random.Random) -> str:
        """A state of both at the moment of the judge, and one of them as primary."""
        kinds = (rng.choice(list(KINDS)), rng.choice(list(KINDS)))
        states = judge.look(moment, kinds, rng)
        assert not judge.verdict.violations, judge.verdict.violations
        for node, state in zip(self.pair.nodes, states, strict=True):
            write_state(self.recorder, node, state)
        primary = rng.choice(self.pair.nodes)
        words = f"cut at {moment:.0f} ({judge.history.around(moment)}), {' / '.join(kinds)}"
        left = dict(zip(judge.disks, states, strict=True))
        if promoted(judge.node(primary.node, left[primary.node])) is None:
            words += f", {primary.node} must not be primary"
            self._refused(primary)
            primary = self.pair.other(primary)
        words += f", {primary.node} primary"
        try:
            self._bring_up(judge, primary)
        except AssertionError as error:
            raise AssertionError(f"{words}: {error}") from error
        return words

    def _refused(self, node: PairNode) -> None:
        try:
            node.set_role("primary")
        except AssertionError:
            return
        raise AssertionError(f"{node.node} became primary, which it must not")

    def _bring_up(self, judge: Judge, primary: PairNode) -> None:
        try:
            self.pair.roles(primary)
            self.pair.wait_in_sync(primary)
            first = read_state(primary, self.shape.sectors)
            self._held(judge, primary, first)
            other = self.pair.swap(primary)
            self.pair.wait_in_sync(other)
            second = read_state(other, self.shape.sectors)
            self._held(judge, other, second)
        finally:
            for node in self.pair.nodes:
                node.set_role("init")
        differ = [sector for sector, (one, two) in enumerate(zip(first, second, strict=True)) if one != two]
        if not judge.history.metaflush:
            excused = judge.promises.touched()
            differ = [sector for sector in differ if sector not in excused]
        assert not differ, f"the nodes differ in {len(differ)} sectors: {differ[:4]}"
        if judge.history.metaflush:
            assert self.pair.differing() is None, f"the components differ at {self.pair.differing()}"

    def _held(self, judge: Judge, node: PairNode, data: State) -> None:
        if old := judge.promises.broken(data, judge.promises.durable):
            shown = [(sector, data[sector]) for sector in old[:4]]
            raise AssertionError(f"{node.node} lacks what was promised in {len(old)} sectors: {shown}")
