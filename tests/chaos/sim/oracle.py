"""What the clients were promised, and whether it is kept.

Each write has a number, larger than all before it; what a sector holds is the number of the write that it comes
from. For each node and sector there is a list of the writes that it may show, in ascending order, and two floors in
it: `lo`, what it has to show at least, and `dlo`, what it has to show at least after a power cut.

- A write is acknowledged: the floor of every node that has it rises to it (c). Without the other node: only when the
  counters on disk say so (invariant 7), and it is remembered as written alone.
- A flush is answered: what was acknowledged before it was sent is on the medium of both nodes, or the counters on disk
  say that one of them lacks something (invariant 5).
- Two nodes meet: the one that is going to be overwritten has nothing that was written alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.chaos.sim.disk import Disk


class Broken(AssertionError):
    """A promise was broken."""


class Oracle:
    """Follows both nodes; disks: theirs."""

    def __init__(self, disks: list[Disk]) -> None:
        self.disks = disks
        self.size = size = disks[0].size
        self.may: list[list[list[int]]] = [[[0] for _ in range(size)] for _ in (0, 1)]
        self.lo = [[0] * size, [0] * size]
        self.dlo = [[0] * size, [0] * size]
        self.since: list[dict[int, int]] = [{}, {}]  # acknowledged, and no flush answered since
        self.alone: list[set[int]] = [set(), set()]  # acknowledged, and the other node lacks it
        self.mixed: list[Any] = [False, False]  # target of a synchronisation that is not complete; its connection
        self.era = [0, 0]  # counts what replaces `may` as a whole
        self.forced = [False, False]  # an administrator has called its data the truth, and the nodes have not met since
        self.early: set[int] = set()  # acknowledged before the other node's disk had it: `async`, `memsync`
        self.number = 0

    # ---- writes ----

    def new(self) -> int:
        self.number += 1
        return self.number

    def appears(self, node: int, first: int, values: Any) -> None:
        """From now on it may be read there."""
        may = self.may[node]
        for i, value in enumerate(values, first):
            known = may[i]
            if value > known[-1]:
                known.append(value)
            elif value not in known:
                known.append(value)
                known.sort()

    def holds(self, node: int, first: int, count: int, value: int) -> None:
        """It was acknowledged, and this node has it."""
        lo, since = self.lo[node], self.since[node]
        for s in range(first, first + count):
            if lo[s] < value:
                lo[s] = value
                since[s] = value

    def counted(self, node: int) -> bool:
        """Do the counters on this node's disk say, whatever happens, that the other node lacks something?"""
        mine, other = self.disks[node], self.disks[1 - node].meta
        if other.resuid == 0 or other.resuid != self.disks[node].meta.resuid:
            return True
        known = other.pair.remotecnt
        if mine.meta.pair.localcnt <= known:
            return False
        return mine.meta_alt is None or mine.meta_alt.pair.localcnt > known

    def outdated(self, node: int) -> bool:
        """Does this node know that it must not become primary?"""
        disk = self.disks[node]
        return disk.meta.syncing and (disk.meta_alt is None or disk.meta_alt.syncing)

    # ---- flushes ----

    def flushed(self, node: int, promise: dict[int, int], outdated: bool) -> None:
        """A client's flush was answered with success. outdated: it is known that this node lacks something, the other
        one is the truth."""
        for n in (node, 1 - node):
            if (n == node and outdated) or self.disks[n].meta.resuid != self.disks[node].meta.resuid:
                continue
            dur = self.disks[n].dur
            for s, value in promise.items():
                if dur[s] < value:
                    if n == node:
                        raise Broken(f"invariant 5: sector {s} of write {value} was flushed and is not on the medium")
                    if outdated or not (self.counted(node) or self.outdated(n) or self.forced[n]):
                        raise Broken(
                            f"invariants 5 and 7: flushed without the other node, which lacks write {value} of"
                            f" sector {s}, and the counters do not say so"
                        )
                    break
            else:
                self.durable(n, promise)
        since = self.since[node]
        for s, value in promise.items():
            if since.get(s) == value:
                del since[s]

    def durable(self, node: int, promise: dict[int, int]) -> None:
        dlo, lo, may = self.dlo[node], self.lo[node], self.may[node]
        for s, value in promise.items():
            if dlo[s] < value <= lo[s]:
                dlo[s] = value
                if may[s][0] < value:
                    may[s] = [v for v in may[s] if v >= value]

    # ---- reads ----

    def check_read(self, node: int, first: int, values: Any, floors: list[int], era: int) -> None:
        may = self.may[node]
        for i, value in enumerate(values):
            s = first + i
            if value < floors[i]:
                raise Broken(f"stale read: sector {s} is {value}, {floors[i]} was acknowledged before")
            if era == self.era[node] and value not in may[s]:
                raise Broken(f"sector {s} is {value}, which is none of {may[s]}")

    def check_node(self, node: int, why: str, but: int = 0) -> None:
        """All of its disk, but extents... sectors in the mask `but`."""
        cur, lo, may = self.disks[node].cur, self.lo[node], self.may[node]
        for s, value in enumerate(cur):
            if (value < lo[s] or value not in may[s]) and not but >> s & 1:
                what = "is missing" if value < lo[s] else f"is none of {may[s]}"
                raise Broken(f"{why}: sector {s} of node {'AB'[node]} is {value}, acknowledged {lo[s]} {what}")

    def check_clean(self, size: int) -> None:
        """(b), and more: what both maps on disk call clean is the same, at any time and after a power cut now."""
        a, b = self.disks
        if a.meta.resuid != b.meta.resuid or a.meta.resuid == 0:
            return
        if a.cur == b.cur and not a.log and not b.log:
            return
        dirty = a.map & (a.map if a.map_alt is None else a.map_alt)
        dirty |= b.map & (b.map if b.map_alt is None else b.map_alt)
        loose = a.unsettled() | b.unsettled()
        for s in range(self.size):
            if dirty >> s // size & 1:
                continue
            if a.cur[s] != b.cur[s]:
                raise Broken(f"sector {s} is {a.cur[s]} on A and {b.cur[s]} on B, and both call it clean")
            if s in loose:
                raise Broken(f"sector {s} is called clean on both nodes, and is not durable on one of them")

    # ---- what happens to nodes ----

    def power_cut(self, node: int) -> None:
        self.lo[node] = self.dlo[node].copy()
        self.since[node].clear()

    def lost(self, node: int, sectors: Iterable[int], served: bool = False) -> None:
        """A failed flush has lost what was in the cache. served: the other node stands in for this one."""
        here, there = self.disks[node].cur, self.disks[1 - node].cur
        for s in sectors:
            best = max(here[s], there[s])
            self.lower(node, s, best if served else here[s])
            self.lower(1 - node, s, best)

    def lost_alone(self, node: int, sectors: Iterable[int], whole: bool) -> None:
        """The same, in no role. It has to show what the other node was acknowledged to have, unless it is the whole."""
        here, there = self.disks[node].cur, self.lo[1 - node]
        for s in sectors:
            self.lower(node, s, here[s] if whole else max(here[s], there[s]))

    def lower(self, node: int, s: int, value: int) -> None:
        value = max(value, self.dlo[node][s])
        if self.lo[node][s] > value:
            self.lo[node][s] = value
            self.since[node].pop(s, None)

    def meets(self, primary: int, outcome: str, from_remote: bool) -> None:
        """The secondary has decided."""
        a, b = self.alone[primary], self.alone[1 - primary]
        if outcome in ("SPLIT_BRAIN", "RESUID_MISMATCH", "STRANGERS"):
            return
        if a and b:
            raise Broken(f"split-brain not found: both nodes wrote alone ({min(a)}, {min(b)}), and it is {outcome}")
        self.forced = [False, False]
        target = primary if from_remote else 1 - primary
        if self.alone[target]:
            raise Broken(f"write {min(self.alone[target])}, acknowledged alone, is going to be overwritten: {outcome}")

    def follows(self, node: int) -> None:
        """From now on it shows what the other node has."""
        other = 1 - node
        self.may[node] = [known.copy() for known in self.may[other]]
        self.lo[node] = self.lo[other].copy()
        self.dlo[node] = self.dlo[other].copy()
        self.since[node] = self.since[other].copy()
        self.era[node] += 1

    def leads(self, primary: int) -> None:
        """It is the source: what it has lost in a power cut the other node loses, too."""
        mine, theirs = self.lo[primary], self.lo[1 - primary]
        since = self.since[1 - primary]
        for s in range(self.size):
            if theirs[s] > mine[s]:
                theirs[s] = mine[s]
                since.pop(s, None)

    def synchronised(self, primary: int, busy: int) -> None:
        """The sequencer says that both nodes have the same data; busy: sectors of writes under way."""
        here, there = self.disks[primary].cur, self.disks[1 - primary].cur
        for s in range(self.size):
            if here[s] != there[s] and not busy >> s & 1:
                raise Broken(f"synchronised, and sector {s} differs: {here[s]} and {there[s]}")
        secondary = 1 - primary
        self.follows(secondary)
        lo = self.lo[secondary]
        for s in range(self.size):
            lo[s] = min(lo[s], there[s])
        since = self.since[secondary]
        self.since[secondary] = {s: value for s, value in since.items() if there[s] >= value}
        self.alone[0].clear()
        self.alone[1].clear()
        self.mixed[0] = self.mixed[1] = False

    def parted(self, primary: int, fetched: set[int] | None, conn: Any) -> None:
        """The same, but the secondary has gone its own way since. fetched: what it had written alone before, when it
        was the source; None when it was not."""
        if fetched is None:
            self.alone[primary].clear()
            if self.mixed[1 - primary] is conn:
                self.mixed[1 - primary] = False
        else:
            self.alone[1 - primary] -= fetched
            self.mixed[primary] = False

    def gives_up(self, node: int) -> None:
        """It is forced to be primary. What the other node has of what was acknowledged, and this one lacks, is not to
        be overwritten without a word; but for what it need not have had, with `async`, or only in memory."""
        here, there = self.disks[node], self.disks[1 - node]
        if here.meta.resuid != there.meta.resuid or there.meta.syncing:  # the other one's is given up already
            return
        lo = self.lo[1 - node]
        if any(here.cur[s] < lo[s] <= there.cur[s] and lo[s] not in self.early for s in range(self.size)):
            self.alone[1 - node].add(self.new())

    def accept(self, node: int) -> None:
        """An administrator says that this is the data."""
        cur = self.disks[node].cur
        self.may[node] = [[value] for value in cur]
        self.lo[node] = cur.copy()
        dur = self.disks[node].dur
        for first, values in self.disks[node].log:  # what the disk may have kept of it, when a flush fails
            for s, value in enumerate(values, first):
                self.may[node][s] = sorted({0, dur[s], value, *self.may[node][s]})
        self.dlo[node] = [0] * self.size
        self.since[node].clear()
        self.mixed[node] = False
        self.forced[node] = True
        self.era[node] += 1
