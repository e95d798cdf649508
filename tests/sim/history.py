"""Random histories: a device, two disks, a worker and fate play against the sequencer, the model watches.

One seed gives one history, whatever the machine. A history is a row of episodes, each a new arena over the disks
that the last one left behind: it ends when the power fails, and then the nodes may differ only where the map says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.sim.disks import Disk, MapOnDisk, sectors
from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    DELETE,
    FLAG_ZERO,
    FLUSH,
    FULLSYNC,
    LOCAL,
    LOCAL_FAILED,
    MEMSYNC,
    NEED_DEGRADED,
    NONE,
    PRODUCTION,
    READ,
    RECEIVED,
    REMOTE,
    REMOTE_FAILED,
    RING_DISK_DONE,
    RING_RECV_DONE,
    RING_SEND_DONE,
    SECTOR,
    SYNC_DONE,
    WRITE,
    Library,
    Sequencer,
    each_extent,
    shape,
)
from tests.sim.model import Op, require
from tests.sim.oracle import Oracle

SHAPES = (
    {"extents": 20, "extentsize": 8192, "keepdirty": 4, "nclient": 8, "slab_size": 4096, "short": 1536},
    {"extents": 40, "extentsize": 1024, "keepdirty": 1, "nclient": 5, "slab_size": 4096},
    {"extents": 12, "extentsize": 16384, "keepdirty": 6, "nclient": 12, "slab_size": 4096, "short": 512},
    {"extents": 3 * 32768 + 9, "extentsize": 512, "keepdirty": 5, "nclient": 6, "slab_size": 4096},
)


@dataclass
class Odds:
    """How an episode goes."""

    error: float = 0.0  # of a completion
    map_error: float = 0.0
    lazy: float = 0.0  # answers are not taken at once
    gone: float = 0.0  # the device releases a slot before it is answered
    through_rings: bool = False


@dataclass
class History:
    """play() runs one; Broken is raised when the sequencer breaks a promise."""

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
        self.mode = rng.choice((FULLSYNC, MEMSYNC, ASYNC))
        self.seq.s.mode = self.mode
        self.seq.s.metaflush = rng.random() < 0.8
        self.model = Oracle(self.seq, self.mode, self.map)
        self.seq.s.detach_on_error = self.model.detach_on_error = rng.random() < 0.3
        self.seq.s.sync_remote = self.model.sync_remote = self.sync_remote
        bad = rng.random() < 0.6
        self.odds = Odds(
            error=rng.choice((0.01, 0.05, 0.2)) if bad else 0.0,
            map_error=rng.choice((0.0, 0.05, 0.3)) if bad else 0.0,
            lazy=rng.choice((0.0, 0.3, 0.9)),
            gone=rng.choice((0.0, 0.3)),
            through_rings=rng.random() < 0.5,
        )
        self.owes_grant = self.owes_local = self.owes_current = False
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

    # ---- one step ----

    def play(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self.step()
            self.settle()
        except Exception as error:
            tail = "\n  ".join(self.log[-40:])
            error.add_note(f"seed {self.seed}, step {self.steps}, {self.ask}, last events:\n  {tail}")
            raise

    def step(self) -> None:
        rng = self.rng
        actions: list[tuple[Callable[[], None], int]] = [
            (self.submit, 30),
            (self.complete_something, 40),
            (self.release_something, 20),
            (self.idle, 2),
            (self.tick, 3),
        ]
        if self.owes_grant:
            actions.append((self.grant, 3))
        if self.owes_local:
            actions.append((self.local_decided, 6))
        if self.sync_remote and not (self.model.connected or self.model.joining):
            actions.append((self.give_up, 1))
        if self.sync_due:
            actions.append((self.sync_start, 5))
        if self.model.connected or self.model.joining:
            actions.append((self.disconnect, 4 if self.remote_bad else 1))
        else:
            actions.append((self.connect, 4))
        if self.owes_current and rng.random() < 0.7:
            self.stored_current()  # before whatever came later is dealt with
        elif self.behind and not (self.model.connected or self.model.joining):
            self.connect()  # a write on this node alone would make it a split brain
        elif rng.random() < 0.002:
            self.power_cut()
        else:
            rng.choices([a for a, _ in actions], [w for _, w in actions])[0]()

    def note(self, what: str) -> None:
        self.steps += 1
        self.counts[what.split()[0]] += 1
        self.log.append(what)
        if len(self.log) > 200:
            del self.log[:100]

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

    def under_way(self) -> bool:
        return any(disk.writing for disk in self.disks)

    def everything(self) -> list[Op]:
        return [*self.model.ops.values(), *self.model.chunks.values()]

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

    def complete_something(self) -> None:
        rng = self.rng
        choices: list[tuple[Op | None, int]] = []
        for one in self.everything():
            for component in (LOCAL, REMOTE):
                if not one.pending >> component & 1:
                    continue
                if one.cmd == FLUSH and not self.disks[component].may_flush(one.slot):
                    continue
                choices.append((one, component))
        if self.map.flight is not None:
            choices += [(None, LOCAL)] * 2
        if not choices:
            return
        op: Op | None
        op, component = choices[rng.randrange(len(choices))]
        if op is None:
            self.complete_map()
        elif op.memsync and component == REMOTE and not op.received and rng.random() < 0.6:
            self.note(f"received {op.slot}")
            self.tell(REMOTE, op.slot | RECEIVED, 0)
            self.model.received(op)
            self.observe()
        else:
            odds = self.odds.error
            if op.mutation and any(op.mask & chunk.mask for chunk in self.model.chunks.values()):
                odds *= 4  # beside a copy of the same extent, where it must not pass unnoticed
            self.complete(op, component, rng.choice((5, 28)) if rng.random() < odds else 0)

    def complete(self, op: Op, component: int, error: int) -> None:
        if error and op.cmd == FLUSH:
            self.observe(take=True)  # answered before the failure and told after it would be hard to judge
        self.note(f"complete slot {op.slot} cmd {op.cmd} component {component} error {error}")
        self.end(op, component, error)
        self.tell(component, op.slot, error)
        self.model.complete(op, component, error)
        self.admit_losses()
        self.observe()

    def tell(self, component: int, entry: int, error: int) -> None:
        seq = self.seq
        if self.odds.through_rings:
            ring = RING_DISK_DONE if component == LOCAL else RING_SEND_DONE if error == 28 else RING_RECV_DONE
            seq.post(ring, entry, error)
            require(seq.drain() == 1, "drain")
        else:
            require(seq.complete(component, entry, error) == 0, "a completion was refused")

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

    def complete_map(self) -> None:
        error = 5 if self.rng.random() < self.odds.map_error else 0
        self.note(f"complete map error {error}")
        assert self.map.flight is not None
        mask, new, _, _ = self.map.flight
        if error:
            self.map.tear(self.rng)
        else:
            self.map.finish()
        self.tell(LOCAL, self.seq.map_slot, error)
        if self.model.map_complete(error):
            self.model.map_refuse(new & mask, error)
        self.model.settle_go_on()
        self.observe()

    # ---- what the device does ----

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

    def submit(self) -> None:
        rng, seq = self.rng, self.seq
        slot = seq.claim()
        if slot == NONE:
            require(seq.s.nfree == 0, "no slot although some are free")
            return
        self.model.claimed.add(slot)
        if rng.random() < 0.02:
            self.note(f"claim {slot}")
            self.observe()
            return
        cmd = rng.choices((READ, WRITE, DELETE, FLUSH), (4, 12, 2, 2))[0]
        if cmd == READ and self.behind:
            cmd = WRITE  # the sequencer does not know yet who has the newer data
        offset = length = flags = 0
        if cmd != FLUSH:
            offset, length = self.place(20 if cmd == DELETE else min(8, self.geometry.slab_size // SECTOR))
            flags = FLAG_ZERO if cmd == WRITE and rng.random() < 0.1 else 0
        self.note(f"submit slot {slot} cmd {cmd} sectors {offset // SECTOR}+{length // SECTOR}")
        require(seq.submit(slot, cmd, offset, length, flags) == 0, "a request was refused")
        op = self.model.submitted(slot)
        if op.mutation:
            self.value += 1
            op.value = self.value
        elif cmd == READ:
            self.reads[slot] = ({n: self.floor.get(n, 0) for n in sectors(offset, length)}, {})
        else:
            self.promises[slot] = dict(self.acked)
        self.observe()

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

    def release_something(self) -> None:
        rng, model = self.rng, self.model
        able = [slot for slot, op in model.ops.items() if op.held and op.told]
        able += sorted(model.claimed)
        if rng.random() < self.odds.gone:
            able = [slot for slot, op in model.ops.items() if op.held]
        if able:
            self.release(able[rng.randrange(len(able))])

    def release(self, slot: int) -> None:
        self.note(f"release {slot}")
        self.seq.release(slot)
        self.model.released(slot)
        self.observe()

    # ---- what the worker does ----

    def idle(self) -> None:
        self.note("idle")
        self.seq.idle()
        self.observe()

    def tick(self) -> None:
        if self.model.sync_on:
            self.note("tick")
            self.seq.lib.hast_seq_sync_tick(self.seq.arena, 100)
            self.observe()

    def grant(self) -> None:
        self.owes_grant = False
        if self.grant_number != self.seq.s.sync_number:
            self.note("void grant")  # the counters were made equal since it was asked for
            return
        if self.rng.random() < 0.1:
            self.note("no grant")
            self.seq.lib.hast_seq_refuse_degraded(self.seq.arena)
            self.model.grant_refused()
            self.observe()
            return
        self.note("grant")
        self.seq.grant()
        self.model.grant()
        self.observe()

    def connect(self) -> None:
        rng = self.rng
        theirs = self.theirs
        if rng.random() < 0.3:
            for _ in range(rng.randint(1, 4)):
                theirs |= self.model.mask(*self.place(1))
        self.note(f"connect map {theirs:x}")
        self.remote_bad = False
        if self.behind:
            self.behind, self.sync_remote = False, True
            self.seq.s.sync_remote = self.model.sync_remote = True
        self.seq.connect(theirs if theirs or rng.random() < 0.5 else None)
        self.model.connect(theirs)
        self.observe()

    def sync_start(self) -> None:
        self.note("sync")
        self.sync_due = False
        self.seq.s.sync_rate = self.rng.choice((0, 0, 40960))
        self.seq.s.sync_credit = 4096
        self.seq.lib.hast_seq_sync_start(self.seq.arena, int(self.sync_remote))
        self.model.sync_start(self.sync_remote)
        self.observe()

    def disconnect(self) -> None:
        if self.sync_remote and self.theirs:
            self.power_cut()  # what the secondary has is not on the map here yet: nobody could say what is old
            return
        cut = self.rng.random() < 0.5
        self.note(f"disconnect {'power cut there' if cut else ''}")
        remote = self.disks[REMOTE]
        if cut:
            remote.power_cut(self.rng)
        else:
            remote.abandon(self.rng)
        self.sync_due = self.owes_local = False
        self.seq.disconnect()
        self.model.disconnect()
        self.admit_losses()
        self.observe()

    def local_decided(self) -> None:
        """The worker stores that this component is out of date, or cannot."""
        self.owes_local = False
        if self.owes_current:
            self.stored_current()  # what came first is done first
        # All of a large device is not copied here.
        if self.rng.random() < 0.15 or (self.model.turn_detach and self.model.nextents > 1000):
            self.note("refused")
            self.seq.local_refused()
            self.model.local_refused()
        else:
            self.sync_remote = True
            if self.model.turn_detach:
                self.note("detach")
                require(self.map.flight is None, "an update of the map while all of it is written")
                self.map.content = self.map.sure = self.model.all
                self.seq.detach()
                self.model.detach()
            else:
                self.note("outdated")
                self.seq.outdated()
                self.model.outdated()
        self.admit_losses()
        self.observe()

    def stored_current(self) -> None:
        self.note("current")
        self.owes_current = self.sync_remote = False
        self.seq.current()
        self.model.stored_current()
        self.observe()

    def give_up(self) -> None:
        self.note("give up")
        self.seq.give_up()
        self.model.give_up()
        self.observe()

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

    # ---- fate ----

    def power_cut(self) -> None:
        """The primary loses its power, the secondary perhaps too."""
        rng = self.rng
        self.note("power cut")
        local, remote = self.disks
        local.power_cut(rng)
        if rng.random() < 0.5:
            remote.power_cut(rng)
        else:
            remote.abandon(rng)
        self.map.power_cut(rng)
        size = self.geometry.extentsize // SECTOR
        known = self.map.content | self.theirs
        wrong = {n for n in local.differs(remote) if not known >> n // size & 1}
        require(not wrong, f"the nodes differ and the map does not say so: sectors {sorted(wrong)}")
        if self.sync_remote and self.theirs:
            self.behind = True  # the map that says where never got here, and nothing of it was served
        lost = {n for n, value in self.durable.items() if self.disks[self.truth(n // size)].value(n) < value}
        require(not lost, f"flushed, and lost by a power cut: sectors {sorted(lost)}")
        self.episode()

    # ---- the end ----

    def settle(self) -> None:
        """Liveness: with all completions delivered and grants given everything is answered, and quiet."""
        self.odds = Odds()
        for _ in range(20000):
            if self.remote_bad:
                self.disconnect()
            if not self.model.connected and not self.model.joining:
                self.connect()
            model = self.model
            busy = any(op.pending for op in self.everything()) or self.map.flight is not None
            if busy:
                self.complete_something()
            elif self.owes_current:
                self.stored_current()
            elif self.owes_local:
                self.local_decided()
            elif self.owes_grant:
                self.grant()
            elif model.detached or (model.sync_on and not model.has_source):
                self.power_cut()
            elif self.sync_due:
                self.sync_start()
            elif self.seq.idle():
                self.note("idle")
                self.observe()
            elif model.sync_on:
                self.tick()
            elif model.out:
                self.sync_start()
            else:
                break
        else:
            require(False, "it never comes to rest")
        self.observe(take=True)
        for slot in [slot for slot, op in model.ops.items() if op.held] + sorted(model.claimed):
            require(slot in model.claimed or model.ops[slot].told, f"slot {slot} was never answered")
            self.release(slot)
        require(self.seq.quiet() and self.seq.s.nfree == self.geometry.nclient, "not quiet in the end")
        require(not model.out, "extents are out of sync in the end")
        kept = sum(1 << n for n in model.kept)
        require(not self.map.content & ~kept, f"dirty for no reason in the end: {self.map.content & ~kept:x}")
        require(not self.disks[LOCAL].differs(self.disks[REMOTE]), "the nodes differ in the end")
