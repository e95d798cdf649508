"""A node's disk: metadata block, activemap, data sectors, and a volatile cache.

Data writes complete into the cache. A flush makes durable what had completed when it began, and nothing else is
taken to do so. A power cut leaves any subset of the rest, each sector for itself. Map and metadata are small (one
sector each, written and flushed in one go); an update that fails or is cut off leaves the old or the new one, and
which one may still turn out at the next power cut.
"""

from __future__ import annotations

from typing import Any

from tests.chaos.sim.fate import Fate

Values = tuple[int, ...] | list[int]


class Disk:
    """A value is the number of the write that it comes from; 0 was there in the beginning."""

    __slots__ = ("base", "cur", "dur", "log", "map", "map_alt", "meta", "meta_alt", "size")

    def __init__(self, size: int, meta: Any) -> None:
        self.size = size
        self.cur = [0] * size
        self.dur = [0] * size
        self.log: list[tuple[int, Values]] = []  # completed and not flushed
        self.base = 0  # entries that left the log, ever
        self.map = 0
        self.map_alt: int | None = None
        self.meta = meta
        self.meta_alt: Any = None

    # ---- data ----

    def write(self, first: int, values: Values) -> None:
        self.cur[first : first + len(values)] = values
        self.log.append((first, values))

    def mark(self) -> int:
        """What has completed now, for a flush that begins."""
        return self.base + len(self.log)

    def flush(self, mark: int) -> None:
        n = mark - self.base
        if n <= 0:
            return
        dur = self.dur
        for first, values in self.log[:n]:
            dur[first : first + len(values)] = values
        del self.log[:n]
        self.base = mark

    def flush_failed(self, mark: int, fate: Fate) -> list[int]:
        """What it was to cover may be lost, now. The sectors that fell back."""
        n = mark - self.base
        if n <= 0 or fate.draw(2) == 0:
            return []
        before = self.cur
        kept = [entry for entry in self.log[:n] if fate.draw(2) == 0]
        rest = kept + self.log[n:]
        self.base += n - len(kept)  # flushes under way cover less than they might
        self.log = rest
        self.cur = self.dur.copy()
        for first, values in rest:
            self.cur[first : first + len(values)] = values
        return [s for s in range(self.size) if before[s] != self.cur[s]]

    def unsettled(self) -> set[int]:
        """Sectors of which the medium may hold something else than what is read."""
        return {s for first, values in self.log for s in range(first, first + len(values))}

    def clear(self) -> None:
        self.cur, self.dur = [0] * self.size, [0] * self.size
        self.base += len(self.log)
        self.log = []

    # ---- the end of everything ----

    def may_happen(self, first: int, values: Values, fate: Fate) -> None:
        """A write that was under way when its process died: done, not done, or torn."""
        how = fate.draw(4)
        if how == 1:
            self.write(first, values)
        elif how >= 2 and len(values) > 1:
            cut = 1 + fate.draw(len(values) - 1)
            if how == 2:
                self.write(first, values[:cut])
            else:
                self.write(first + cut, values[cut:])

    def power_cut(self, fate: Fate) -> None:
        how = fate.draw(4)  # nothing of the cache, all of it, whole writes, single sectors
        dur = self.dur
        if how == 1:
            for first, values in self.log:
                dur[first : first + len(values)] = values
        elif how == 2:
            for first, values in self.log:
                if fate.draw(2):
                    dur[first : first + len(values)] = values
        elif how == 3:
            for first, values in self.log:
                chosen = fate.draw(1 << len(values))
                for i, value in enumerate(values):
                    if chosen >> i & 1:
                        dur[first + i] = value
        self.base += len(self.log)
        self.log = []
        self.cur = dur.copy()
        if self.map_alt is not None:
            if fate.draw(2):
                self.map = self.map_alt
            self.map_alt = None
        if self.meta_alt is not None:
            if fate.draw(2):
                self.meta = self.meta_alt
            self.meta_alt = None

    # ---- map and metadata ----

    def put_map(self, new: int) -> None:
        self.map = new
        self.map_alt = None

    def map_failed(self, new: int, fate: Fate) -> None:
        """The update failed, or was cut off."""
        how = fate.draw(3)
        if how == 1:
            self.map, self.map_alt = new, self.map
        elif how == 2:
            self.map_alt = new

    def map_says(self, mask: int) -> bool:
        """Whether these extents are dirty on disk whatever happens."""
        return not mask & ~self.map and (self.map_alt is None or not mask & ~self.map_alt)

    def put_meta(self, new: Any) -> None:
        self.meta = new
        self.meta_alt = None

    def settle(self) -> None:
        """A flush when a worker or its stages start: what is read is what is on the medium."""
        self.map_alt = self.meta_alt = None

    def meta_failed(self, new: Any, fate: Fate) -> None:
        how = fate.draw(3)
        if how == 1:
            self.meta, self.meta_alt = new, self.meta
        elif how == 2:
            self.meta_alt = new
