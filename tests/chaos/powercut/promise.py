"""What was promised to clients at a moment, sector by sector, and which node has to keep it alone.

A flush that was acknowledged promises everything that had been acknowledged before it was asked for; so does FUA for
its own write. A promised write ends all older values of its sectors: those that were acknowledged before it began. What
was never acknowledged may be there for ever.

Invariants:
- Moments only move forward: advance(). Nothing that was acknowledged at or after the moment counts.
- Who is good is told by the metadata that the primary has asked its disk to store, from the moment when it asked: what
  they say is true by then.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hast.activemap import METADATA_SIZE
from hast.control import Role
from hast.metadata import Metadata, unpack
from tests.chaos.powercut.cut import State
from tests.chaos.powercut.history import NEVER, WRITE, Entry, History, Request

ALWAYS = -1.0  # before everything
OWN_WRITE = -7  # the number of what a node writes alone after a cut


class Promises:
    """`floor` of each sector: a value that was acknowledged before it is older than what was promised."""

    def __init__(self, history: History) -> None:
        size = history.shape.sectors
        self.durable = [ALWAYS] * size  # by what was flushed
        self.acked = [ALWAYS] * size  # by what was acknowledged
        self.zeros = [0.0] * size  # until when zeros can have been acknowledged
        self.ack = {r.number: r.ack for r in history.requests if r.number} | {OWN_WRITE: NEVER}
        self.begin = {r.number: r.begin for r in history.requests if r.number}
        # Those to come, the next one last.
        self._begins = sorted((r for r in history.requests if not r.flush), key=lambda r: -r.begin)
        self._open: list[Request] = []  # mutations that were not acknowledged when they were last looked at
        self._moment = ALWAYS
        self._acks = sorted((r for r in history.requests if r.ack != NEVER), key=lambda r: -r.ack)
        self._unflushed: list[Request] = []  # acknowledged mutations, in order

    def advance(self, moment: float) -> None:
        while self._begins and self._begins[-1].begin < moment:
            request = self._begins.pop()
            self._open.append(request)
            for sector in range(request.first, request.first + request.count) if request.zeros else ():
                self.zeros[sector] = max(self.zeros[sector], request.ack)
        while self._acks and self._acks[-1].ack < moment:
            self._acknowledged(self._acks.pop())
        self._moment = moment
        self._open = [r for r in self._open if r.ack >= moment]

    def _acknowledged(self, request: Request) -> None:
        if request.flush:
            covered = [r for r in self._unflushed if r.ack < request.begin]
            self._unflushed = self._unflushed[len(covered) :]
            for one in covered:
                _raise(self.durable, one)
            return
        _raise(self.acked, request)
        if request.fua:
            _raise(self.durable, request)
        else:
            self._unflushed.append(request)

    def touched(self) -> set[int]:
        """Sectors with mutations that have begun and that no acknowledged flush covers."""
        requests = [*self._unflushed, *(r for r in self._open if r.ack >= self._moment)]
        return {sector for r in requests for sector in range(r.first, r.first + r.count)}

    def broken(self, data: State, floor: list[float]) -> list[int]:
        """Sectors of the data that hold something older than was promised."""
        ack, zeros = self.ack, self.zeros
        return [
            sector
            for sector, (value, least) in enumerate(zip(data, floor, strict=True))
            if (ack[value] if value else zeros[sector]) < least  # type: ignore[index]
        ]


def _raise(floor: list[float], request: Request) -> None:
    for sector in range(request.first, request.first + request.count):
        floor[sector] = max(floor[sector], request.begin)


@dataclass(frozen=True)
class Stored:
    """A metadata block that a node asked its disk for."""

    begin: float
    end: float
    node: str
    metadata: Metadata


def stored(history: History) -> list[Stored]:
    """All of them, by their beginnings."""
    return sorted(
        (
            Stored(entry.begin, entry.end, node, unpack(entry.data, history.resource))
            for node, entries in history.disks.items()
            for entry in entries
            if is_metadata(entry)
        ),
        key=lambda s: s.begin,
    )


def is_metadata(entry: Entry) -> bool:
    return entry.kind == WRITE and entry.offset == 0 and entry.stored == METADATA_SIZE and any(entry.data)


@dataclass(frozen=True)
class Turn:
    """From a moment on a node is good (it has everything) or not."""

    at: float
    node: str
    good: bool


def turns(history: History) -> list[Turn]:
    """When nodes stopped being good and became good again, in order."""
    found: list[Turn] = []
    for node in history.disks:
        other = next(n for n in history.disks if n != node)
        own = [s for s in stored(history) if s.node == node]
        for before, after in pairwise(own):
            old, new = before.metadata, after.metadata
            if new.prevrole is not Role.PRIMARY:
                continue
            if new.alone and not (old.alone and old.prevrole is Role.PRIMARY):
                found.append(Turn(after.begin, other, False))
            if new.syncing and not old.syncing:
                found.append(Turn(after.begin, node, False))
            if old.prevrole is Role.PRIMARY and (old.alone or old.syncing) and not (new.alone or new.syncing):
                found += [Turn(after.begin, node, True), Turn(after.begin, other, True)]
    return sorted(found, key=lambda t: t.at)
