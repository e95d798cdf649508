"""States of a disk after a power cut: everything that a flush covers that had completed, and of what came after it any
part, torn at sectors.

A state is a list of sectors: of metadata and map their bytes, of the data the number of the request that wrote them.

Invariants:
- A flush covers what had completed before it began. What had begun before the cut and is not covered may be there or
  not, each sector of it; of several that overlap, each sector shows one, or what was there before.
- Moments only move forward: advance().
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.chaos.powercut.history import DELETE, FLUSH, SECTOR, WRITE, Entry, Shape, number_of

Sector = bytes | int
State = list[Sector]


@dataclass(frozen=True)
class Change:
    """A write or a delete, as sectors."""

    begin: float
    end: float
    first: int
    sectors: tuple[Sector, ...]
    data: bool  # of the data, not of metadata or map


def change(entry: Entry, shape: Shape) -> Change:
    assert entry.offset % SECTOR == 0 and entry.stored % SECTOR == 0, "part of a sector was written"
    first, count = entry.offset // SECTOR, entry.stored // SECTOR
    data = first >= shape.offset
    sectors: list[Sector] = []
    for n in range(count):
        if entry.kind == DELETE:
            sectors.append(0 if data else bytes(SECTOR))
        else:
            content = entry.data[n * SECTOR : (n + 1) * SECTOR]
            sectors.append(number_of(content, first + n - shape.offset) if data else content)
    return Change(entry.begin, entry.end, first, tuple(sectors), data)


class Disk:
    """The disk of one node, at a moment that moves forward."""

    def __init__(self, entries: Sequence[Entry], shape: Shape, before: State | None = None) -> None:
        """before: what was on it when the recording began; zeros, unless it is given."""
        self.shape = shape
        blank: State = [bytes(SECTOR)] * shape.offset + [0] * shape.sectors
        self.base: State = blank if before is None else before.copy()  # what is on the disk for certain
        self.pending: list[Change] = []  # begun and not covered by a flush
        # Those to come, the next one last.
        changes = [change(e, shape) for e in entries if e.kind in (WRITE, DELETE) and _inside(e, shape)]
        self._changes = sorted(changes, key=lambda c: -c.begin)
        self._flushes = sorted((e for e in entries if e.kind == FLUSH and not e.error), key=lambda e: -e.end)

    def advance(self, moment: float) -> None:
        """Up to a cut at that moment."""
        while self._flushes and self._flushes[-1].end < moment:
            flush = self._flushes.pop()
            self._begun(flush.end)
            # In the order of completion, in which the covered ones come first.
            covered = [c for c in self.pending if c.end < flush.begin]
            self.pending = self.pending[len(covered) :]
            for one in covered:
                put(self.base, one)
        self._begun(moment)

    def _begun(self, moment: float) -> None:
        while self._changes and self._changes[-1].begin < moment:
            self.pending.append(self._changes.pop())
        self.pending.sort(key=lambda c: c.end)

    def everything(self) -> State:
        """Without a power cut: all that was begun is done."""
        return self._built(self.pending)

    def state(self, kind: str, rng: random.Random) -> State:
        """One that the cut could have left; kind is one of KINDS."""
        return KINDS[kind](self, rng)

    def _built(self, changes: Sequence[Change]) -> State:
        state = self.base.copy()
        for one in changes:
            put(state, one)
        return state

    def _some(self, rng: random.Random, share: float, torn: float) -> State:
        state = self.base.copy()
        for one in self.pending:
            if rng.random() < torn:
                for n, sector in enumerate(one.sectors):
                    if rng.random() < share:
                        state[one.first + n] = sector
            elif rng.random() < share:
                put(state, one)
        return state

    def _but(self, rng: random.Random) -> State:
        left_out = rng.randrange(len(self.pending)) if self.pending else -1
        return self._built([c for n, c in enumerate(self.pending) if n != left_out])

    def _only(self, rng: random.Random) -> State:
        return self._built([rng.choice(self.pending)] if self.pending else [])


KINDS: dict[str, Callable[[Disk, random.Random], State]] = {
    "nothing more": lambda disk, rng: disk.base.copy(),
    "everything": lambda disk, rng: disk.everything(),
    "half": lambda disk, rng: disk._some(rng, 0.5, 0.3),
    "little": lambda disk, rng: disk._some(rng, 0.1, 0.3),
    "most": lambda disk, rng: disk._some(rng, 0.9, 0.3),
    "torn": lambda disk, rng: disk._some(rng, 0.5, 1.0),
    "all but one": lambda disk, rng: disk._but(rng),
    "one": lambda disk, rng: disk._only(rng),
    "data only": lambda disk, rng: disk._built([c for c in disk.pending if c.data]),
    "metadata only": lambda disk, rng: disk._built([c for c in disk.pending if not c.data]),
}


def put(state: State, one: Change) -> None:
    state[one.first : one.first + len(one.sectors)] = one.sectors


def _inside(entry: Entry, shape: Shape) -> bool:
    """Not the question whether holes can be made, which is asked behind the end."""
    return entry.stored > 0 and entry.offset < (shape.offset + shape.sectors) * SECTOR
