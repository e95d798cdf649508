"""A node's disk as the simulation sees it: what each sector holds, in the cache and for certain.

A value is a number that grows with each write of a sector (the order of the mutation that wrote it), 0 is what was
there in the beginning. Who read an older number than one that was acknowledged has read stale data.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

from tests.sim.harness import SECTOR


def sectors(offset: int, length: int) -> range:
    return range(offset // SECTOR, (offset + length) // SECTOR)


@dataclass
class Cached:
    """A value that is in the cache and perhaps on the medium."""

    value: int
    when: int  # counts completed writes of this disk


@dataclass
class Flushing:
    """Covers what had completed when it began, and (the secondary's barrier) what was under way then."""

    upto: int
    before: set[int]  # slots under way, that have to complete first
    extra: set[int] = field(default_factory=set)  # when they did


@dataclass
class Disk:
    """Writes complete into the cache; a flush makes durable what had completed when it began."""

    durable: dict[int, int] = field(default_factory=dict)
    cache: dict[int, list[Cached]] = field(default_factory=dict)
    writing: dict[int, dict[int, int]] = field(default_factory=dict)  # under way: by slot, sector -> value
    flushing: dict[int, Flushing] = field(default_factory=dict)  # by slot
    count: int = 0

    def value(self, sector: int) -> int:
        """What a read returns now."""
        entries = self.cache.get(sector)
        return entries[-1].value if entries else self.durable.get(sector, 0)

    def touched(self) -> set[int]:
        """All sectors that may hold something else than in the beginning."""
        found = set(self.durable) | set(self.cache)
        for values in self.writing.values():
            found.update(values)
        return found

    def write(self, slot: int, values: dict[int, int]) -> None:
        self.writing[slot] = values

    def written(self, slot: int, error: int, rng: Random) -> None:
        """Completed. After an error each sector may have been written or not."""
        self.count += 1
        for sector, value in self.writing.pop(slot).items():
            if not error or rng.random() < 0.5:
                self.cache.setdefault(sector, []).append(Cached(value, self.count))
        for flush in self.flushing.values():
            if slot in flush.before:
                flush.before.remove(slot)
                flush.extra.add(self.count)

    def flush(self, slot: int, ordered: bool) -> None:
        """Begun. ordered: writes under way are covered too, and complete first (the secondary's barrier)."""
        self.flushing[slot] = Flushing(self.count, set(self.writing) if ordered else set())

    def may_flush(self, slot: int) -> bool:
        return not self.flushing[slot].before

    def flushed(self, slot: int, error: int, rng: Random) -> dict[int, int]:
        """Completed. After an error its data may be lost: returns the sectors that fell back, and to what."""
        flush = self.flushing.pop(slot)
        lost: dict[int, int] = {}
        for sector, entries in list(self.cache.items()):
            covered = [entry for entry in entries if entry.when <= flush.upto or entry.when in flush.extra]
            if not covered:
                continue
            if not error:
                self.durable[sector] = covered[-1].value
            elif rng.random() < 0.5:
                continue
            rest = entries[len(covered) :]
            if rest:
                self.cache[sector] = rest
            else:
                del self.cache[sector]
                if error:
                    lost[sector] = self.value(sector)
        return lost

    def abandon(self, rng: Random) -> None:
        """Nobody waits for what is under way any more: each write happens or does not."""
        for slot in list(self.writing):
            self.written(slot, 1, rng)
        self.flushing.clear()

    def power_cut(self, rng: Random) -> None:
        """Each sector that was written and not flushed holds any of its values."""
        for sector in self.touched():
            chances = [self.durable.get(sector, 0)]
            chances += [entry.value for entry in self.cache.get(sector, [])]
            chances += [values[sector] for values in self.writing.values() if sector in values]
            self.durable[sector] = rng.choice(chances)
        self.cache.clear()
        self.writing.clear()
        self.flushing.clear()

    def differs(self, other: Disk) -> set[int]:
        """Sectors that would be read differently on the two disks, cache and all."""
        return {n for n in self.touched() | other.touched() if self.value(n) != other.value(n)}


@dataclass
class MapOnDisk:
    """The activemap's part of the component. An update that fails or is cut off has changed some of its sectors."""

    content: int = 0  # bitmap
    sure: int = 0  # what it says whatever happens to the update under way, and as far as anybody can know
    flight: tuple[int, int, int, int] | None = None  # mask of the part, new content, offset and length in bytes

    def start(self, offset: int, data: bytes) -> None:
        assert self.flight is None, "two map updates at once"
        mask = ((1 << 8 * len(data)) - 1) << 8 * offset
        new = int.from_bytes(data, "little") << 8 * offset
        self.flight = (mask, new, offset, len(data))
        self.sure &= ~mask | new

    def finish(self) -> None:
        assert self.flight is not None
        mask, new, _, _ = self.flight
        self.content = self.content & ~mask | new
        self.sure = self.sure & ~mask | new
        self.flight = None

    def tear(self, rng: Random) -> None:
        """The update fails: some sectors of it are written."""
        assert self.flight is not None
        mask, new, offset, length = self.flight
        self.flight = None
        for at in range(offset, offset + length, SECTOR):
            part = ((1 << 8 * SECTOR) - 1) << 8 * at & mask
            if rng.random() < 0.5:
                self.content = self.content & ~part | new & part

    def power_cut(self, rng: Random) -> None:
        if self.flight is not None:
            self.tear(rng)
        self.sure = self.content

