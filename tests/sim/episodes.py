"""What a random history (tests/sim/history.py) is played with: disks, an arena, a model; what clients were promised,
and what is looked at after each event.

A history is a row of episodes, each a new arena over the disks that the last one left behind.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from random import Random

from tests.sim.disks import Disk, MapOnDisk, sectors
from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    FLUSH,
    FULLSYNC,
    LOCAL,
    LOCAL_FAILED,
    MEMSYNC,
    NEED_DEGRADED,
    PRODUCTION,
    READ,
    REMOTE,
    REMOTE_FAILED,
    SECTOR,
    SYNC_DONE,
    WRITE,
    Library,
    Sequencer,
    each_extent,
    shape,
)
from tests.sim.model_state import Op, require
from tests.sim.oracle import Oracle

SHAPES = (
    {"extents": 20, "extentsize": 8192, "keepdirty": 4, "nclient": 8, "slab_size": 4096, "short": 1536},
    {"extents": 40, "extentsize": 1024, "keepdirty": 1, "nclient": 5, "slab_size": 4096},
    {"extents": 12, "extentsize": 16384, "keepdirty": 6, "nclient": 12, "slab_size": 4096, "short": 512},
    {"extents": 3 * 32768 + 9, "extentsize": 512, "keepdirty": 5, "nclient": 6, "slab_size": 4096},
)
COLD = 1 << 31  # so many dirty extents are allowed: they are cleared in quiet moments only


@dataclass
class Odds:
    """How an episode goes."""

    error: float = 0.0  # of a completion
    map_error: float = 0.0
    lazy: float = 0.0  # answers are not taken at once
    gone: float = 0.0  # the device releases a slot before it is answered
    through_rings: bool = False


@dataclass
class Episodes:
    """One seed gives one row of them. Broken is raised when the sequencer breaks a promise."""

    seed: int
    library: Library = PRODUCTION
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = Random(self.seed)
        self.disks = [Disk(), Disk()]
        self.value = 0
        self.log: list[str] = []
        self.steps = 0
        self.ask = SHAPES[self.rng.choices(range(4), (4, 3, 5, 1))[0]]
        self.geometry = shape(**self.ask)
        self.map = MapOnDisk()
        self.theirs = 0  # the secondary's own map: what it has and the primary has not
        self.sync_remote = False  # the metadata here says: out of date
        self.behind = False  # the secondary has newer data, and nobody here knows yet
        self.hot = self.hot_places()
        self.episode()

    def hot_places(self) -> list[int]:
        """Histories of a large device stay in a few places of it, so that things meet."""
        count = self.geometry.datasize // SECTOR
        if count < 1000:
            return [0]
        block = 32768
        return [self.rng.randrange(0, 20) + block * n for n in range(count // block)] + [count - 24]

    def episode(self) -> None:
        rng = self.rng
        self.seq = Sequencer(self.geometry, self.library, load=self.map.content)
        self.seq.s.direct = self.seed & 1
        self.seq.s.dirty_max = rng.choice((0, 0, 2 * self.geometry.keepdirty, COLD))
        self.mode = rng.choice((FULLSYNC, MEMSYNC, ASYNC))
        self.seq.s.mode = self.mode
        self.seq.s.metaflush = rng.random() < 0.8
        self.model = Oracle(self.seq, self.mode, self.map)
        self.seq.s.detach_on_error = self.model.detach_on_error = rng.random() < 0.3
        self.seq.s.sync_remote = self.model.sync_remote = self.sync_remote
        self.seq.s.degraded_ok = self.model.degraded = rng.random() < 0.2
        self.seq.s.no_source = self.model.no_source = rng.random() < 0.03
        if self.sync_remote and self.map.content == self.model.all and rng.random() < 0.5:
            self.seq.detach()  # given up, and not only out of date
            self.model.detach()
        bad = rng.random() < 0.6
        self.odds = Odds(
            error=rng.choice((0.01, 0.05, 0.2)) if bad else 0.0,
            map_error=rng.choice((0.0, 0.05, 0.3)) if bad else 0.0,
            lazy=rng.choice((0.0, 0.3, 0.9)),
            gone=rng.choice((0.0, 0.3)),
            through_rings=rng.random() < 0.5,
        )
        self.owes_grant = self.owes_local = self.owes_current = False
        # A flush has failed: the disk stage fails all later ones, also when it is another one.
        self.ill = bool(self.seq.s.no_source)
        self.grant_number = 0
        self.lost_here: dict[int, int] = {}  # by a flush that failed, while nobody is told yet
        self.remote_bad = False  # told to drop the secondary
        self.sync_due = False
        self.reads: dict[int, tuple[dict[int, int], dict[int, int]]] = {}  # slot -> floor, values
        self.copies: dict[int, dict[int, int]] = {}  # chunk -> what was read
        self.acked: dict[int, int] = {}  # sector -> value of the last write that was acknowledged in this episode
        self.promises: dict[int, dict[int, int]] = {}  # client flush -> what it is to make durable
        self.durable: dict[int, int] = {}  # what was promised to be there after a power cut
        if not self.sync_remote and self.rng.random() < 0.15:
            self.newer_there()
        self.floor = {}
        size = self.geometry.extentsize // SECTOR
        for n in self.disks[LOCAL].touched() | self.disks[REMOTE].touched():
            there = self.disks[REMOTE]
            newer = self.truth(n // size) == REMOTE  # what is only in its cache was not acknowledged by anybody
            self.floor[n] = min(there.durable.get(n, 0), there.value(n)) if newer else self.disks[LOCAL].value(n)

    def truth(self, extent: int) -> int:
        """The component whose data of the extent counts."""
        newer_there = (self.sync_remote or self.behind) and (self.map.content | self.theirs) >> extent & 1
        return REMOTE if newer_there else LOCAL

    def newer_there(self) -> None:
        """The other node was primary in the meantime, alone."""
        self.behind = True
        for _ in range(self.rng.randint(1, 5)):
            offset, length = self.place(4)
            self.theirs |= self.model.mask(offset, length)
            self.value += 1
            for n in sectors(offset, length):
                self.disks[REMOTE].durable[n] = self.value
                self.disks[REMOTE].cache.pop(n, None)

    def place(self, longest: int) -> tuple[int, int]:
        rng, size = self.rng, self.geometry.datasize // SECTOR
        count = rng.randint(1, longest)
        around = size if len(self.hot) == 1 else 24
        first = rng.choice(self.hot) + rng.randrange(around)
        if self.model.chunks and rng.random() < 0.5:  # into what is being copied
            chunk = rng.choice(sorted(self.model.chunks.values(), key=lambda op: op.slot))
            extent = self.geometry.extentsize // SECTOR
            first = chunk.offset // SECTOR // extent * extent + rng.randrange(extent)
        first = min(first, size - count)
        return first * SECTOR, count * SECTOR

    def note(self, what: str) -> None:
        self.steps += 1
        self.counts[what.split()[0]] += 1
        self.log.append(what)
        if len(self.log) > 200:
            del self.log[:100]

    def under_way(self) -> bool:
        return any(disk.writing for disk in self.disks)

    def everything(self) -> list[Op]:
        return [*self.model.ops.values(), *self.model.chunks.values()]

    # ---- after each event ----

    def observe(self, take: bool | None = None) -> None:
        take = self.rng.random() >= self.odds.lazy if take is None else take
        told = self.model.observe(take_answers=take)
        for op, component in self.model.begun:
            self.begin(op, component)
        self.model.begun.clear()
        if self.model.synced:
            self.check_copied(self.model.synced)
        for op in told:
            self.answered(op)
        raised = self.model.raised
        if raised & NEED_DEGRADED:
            self.owes_grant, self.grant_number = True, int(self.seq.s.sync_number)
        self.remote_bad |= bool(raised & REMOTE_FAILED)
        self.owes_local |= bool(raised & LOCAL_FAILED)
        if raised & CONNECTED:
            self.theirs = 0
            self.sync_due = True
        if raised & SYNC_DONE:
            self.owes_current = self.sync_remote
            require(not self.disks[LOCAL].differs(self.disks[REMOTE]) or self.under_way(), "synchronised, and differ")

    def check_copied(self, mask: int) -> None:
        """Extents that count as copied: equal on both, but for mutations under way."""
        busy: set[int] = set()
        for op in self.model.locks:
            if op.started:
                busy.update(sectors(op.offset, op.length))
        local, remote = self.disks
        size = self.geometry.extentsize // SECTOR
        for n in each_extent(mask):
            for sector in range(n * size, (n + 1) * size):
                require(
                    sector in busy or local.value(sector) == remote.value(sector),
                    f"extent {n} counts as copied, sector {sector} differs",
                )

    def answered(self, op: Op) -> None:
        """The client is told."""
        if op.cmd == READ:
            self.read_answered(op)
        elif op.cmd == FLUSH:
            self.flush_answered(op)
        elif op.result == 0:
            for n in sectors(op.offset, op.length):
                self.floor[n] = max(self.floor.get(n, 0), op.value)
                self.acked[n] = max(self.acked.get(n, 0), op.value)

    def read_answered(self, op: Op) -> None:
        """Invariant 6."""
        floor, values = self.reads[op.slot]
        if op.result == 0:
            stale = {n for n in floor if values[n] < floor[n]}
            require(not stale, f"read of sectors {sorted(stale)}: older than what was acknowledged")

    def flush_answered(self, op: Op) -> None:
        """Invariant 5: from now on this has to be there after a power cut."""
        if op.result != 0:
            return
        for sector, value in self.promises[op.slot].items():
            self.durable[sector] = max(self.durable.get(sector, 0), value)

    def admit_losses(self) -> None:
        """What a flush that failed has lost here is lost for the client, unless the secondary takes this node's place:
        that is not decided while it is turning."""
        if self.model.turning or not self.lost_here:
            return
        lost, self.lost_here = self.lost_here, {}
        if self.model.sync_remote:
            return
        for sector, value in lost.items():
            self.floor[sector] = min(self.floor.get(sector, 0), value)
            for promise in [self.acked, *self.promises.values()]:
                promise.pop(sector, None)
            for floor, _ in self.reads.values():
                floor.pop(sector, None)

    # ---- what the components do ----

    def begin(self, op: Op, component: int) -> None:
        disk = self.disks[component]
        if op.cmd == FLUSH:
            disk.flush(op.slot, ordered=component == REMOTE)
        elif op.chunk and op.cmd == WRITE:
            disk.write(op.slot, self.copies.pop(op.slot))
        elif op.mutation:
            disk.write(op.slot, dict.fromkeys(sectors(op.offset, op.length), op.value))

    def end(self, op: Op, component: int, error: int) -> None:
        """Before the sequencer is told."""
        disk = self.disks[component]
        if op.cmd == FLUSH:
            lost = disk.flushed(op.slot, error, self.rng)
            if component == LOCAL:
                for sector, value in lost.items():
                    self.lost_here[sector] = min(self.lost_here.get(sector, value), value)
        elif op.chunk and op.cmd == READ:
            self.copies[op.slot] = {n: disk.value(n) for n in sectors(op.offset, op.length)}
        elif op.cmd == READ:
            self.reads[op.slot][1].update({n: disk.value(n) for n in sectors(op.offset, op.length)})
        else:
            disk.written(op.slot, error, self.rng)
