"""What the sequencer has to do, said a second time: the oracle of the random histories.

Written from the invariants and not from the C code. It keeps no epochs, lists or counters of blockers, but sets that
say what is so: which mutations hold their ranges, which extents differ or may, which the activemap on disk says for
certain. After every single event everything that came out of the sequencer is compared with what these sets ask for
(tests/sim/oracle.py): each push, each answer, each event, the state of each slot, the bitmaps and the counters.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tests.sim.disks import MapOnDisk
from tests.sim.harness import (
    ASYNC,
    DELETE,
    FLUSH,
    LOCAL,
    MAP_FAILED,
    MEMSYNC,
    NEED_DEGRADED,
    READ,
    REMOTE,
    REMOTE_FAILED,
    WRITE,
    Sequencer,
)

L, R = 1 << LOCAL, 1 << REMOTE


class Broken(AssertionError):
    """The sequencer did something else than the invariants ask for."""


def require(ok: object, what: str) -> None:
    if not ok:
        raise Broken(what)


@dataclass(eq=False, slots=True)
class Op:
    """A request in the sequencer, or a chunk of a resynchronisation, or a flush of the sequencer's own."""

    slot: int
    cmd: int
    offset: int
    length: int
    mask: int  # its extents
    number: int  # never used twice
    held: bool = True
    chunk: bool = False
    order: int = 0  # among those who hold or wait for a range; 0: it does neither
    entered: bool = False  # no earlier overlapping one is left: counted in on its extents
    started: bool = False  # given to the components
    pending: int = 0
    used: int = 0
    error: list[int] = field(default_factory=lambda: [0, 0])
    received: bool = False
    memsync: bool = False
    result: int | None = None  # the answer that is due
    told: bool = False  # and has been taken
    granting: bool = False  # waits for the grant
    over: bool = False  # nothing more to be done for it
    value: int = 0  # what a mutation writes
    generation: int = 0  # of the resynchronisation that a chunk belongs to

    @property
    def mutation(self) -> bool:
        return self.cmd in (WRITE, DELETE) and not self.chunk

    def overlaps(self, other: Op) -> bool:
        return self.offset < other.offset + other.length and other.offset < self.offset + self.length


class Model:
    """Follows one sequencer. One method for each event; Oracle.observe() then compares."""

    def __init__(self, seq: Sequencer, mode: int, disk_map: MapOnDisk) -> None:
        self.seq, self.geometry, self.mode, self.map = seq, seq.geometry, mode, disk_map
        self.nextents = -(-self.geometry.datasize // self.geometry.extentsize)
        self.all = (1 << self.nextents) - 1
        self.ops: dict[int, Op] = {}
        self.claimed: set[int] = set()
        self.locks: list[Op] = []
        self.flush_batch: list[Op] = []
        self.flush_queue: list[Op] = []
        self.flush_whole = False
        self.fresh = 0  # extents written on both nodes since the flush under way began, or since ever
        self.covered = 0  # extents that the flush under way makes durable on both
        self.copies_fresh = self.copies_covered = 0  # the same, of extents that were copied
        self.out = disk_map.content & self.all  # may differ between the nodes
        self.merged = 0  # of these, those that the map on disk need not say yet
        self.dirty = self.out
        self.kept: OrderedDict[int, None] = OrderedDict()  # the most recently used last
        self.connected = self.joining = self.degraded = False
        self.sync_on = self.sync_remote = False
        self.generation = 0  # of resynchronisations
        self.asked = 0
        self.events = 0  # expected of this event
        self.raised = 0  # by this event
        self.pushes: tuple[set[int], set[int]] = (set(), set())  # expected of this event
        self.begun: list[tuple[Op, int]] = []  # the same, until somebody clears it
        self.entered_now: list[Op] = []
        self.chunks: dict[int, Op] = {}
        self.waiting_answers: set[int] = set()
        self.synced = 0  # extents copied by this event
        self.numbers = 0
        self.sync_slots = range(self.geometry.nclient, self.geometry.nclient + self.geometry.nsync)

    # ---- helpers ----

    def mask(self, offset: int, length: int) -> int:
        first = offset // self.geometry.extentsize
        last = (offset + length - 1) // self.geometry.extentsize
        return ((1 << last - first + 1) - 1) << first

    def lock(self, op: Op) -> None:
        op.order = self.seq.bio[op.slot].order
        require(not self.locks or op.order > max(o.order for o in self.locks), "arrival is not in order")
        self.locks.append(op)

    def unlock(self, op: Op) -> None:
        self.locks.remove(op)

    def eligible(self, op: Op) -> bool:
        return not any(other.order < op.order and other.overlaps(op) for other in self.locks)

    def raise_once(self, event: int) -> None:
        if not self.asked & event:
            self.asked |= event
            self.events |= event

    def answer(self, op: Op, result: int) -> None:
        require(op.result is None, "answered twice")
        op.result = result
        if op.held:
            self.waiting_answers.add(op.slot)

    def finish(self, op: Op) -> None:
        op.over = True
        if not op.held and op.slot not in self.waiting_answers:
            self.ops.pop(op.slot, None)

    def readable(self, op: Op, out: int) -> bool:
        """May the secondary be asked for it?"""
        if not self.connected or self.asked & REMOTE_FAILED:
            return False
        return self.sync_remote or not op.mask & out

    def push(self, op: Op, component: int) -> None:
        op.pending |= 1 << component
        op.used |= 1 << component
        self.pushes[component].add(op.slot)
        self.begun.append((op, component))

    # ---- the device ----

    def submitted(self, slot: int) -> Op:
        """After hast_seq_submit()."""
        bio = self.seq.bio[slot]
        self.numbers += 1
        mask = self.mask(bio.offset, bio.length) if bio.cmd != FLUSH else 0
        op = Op(slot, bio.cmd, bio.offset, bio.length, mask, self.numbers)
        self.claimed.discard(slot)
        self.ops[slot] = op
        if op.cmd == FLUSH:
            self.flush_in(op)
        elif op.mutation or (self.sync_remote and op.mask & self.out):
            self.lock(op)
        else:
            op.started = True
            self.push(op, LOCAL)
        return op

    def released(self, slot: int) -> None:
        if slot in self.claimed:
            self.claimed.discard(slot)
            return
        op = self.ops[slot]
        op.held = False
        if op.over and slot not in self.waiting_answers:
            del self.ops[slot]

    # ---- the components ----

    def complete(self, op: Op, component: int, error: int) -> None:
        op.pending &= ~(1 << component)
        op.error[component] = error
        if op.chunk:
            self.chunk_complete(op, component, error)
        elif op.cmd == READ:
            self.read_complete(op, component, error)
        elif op.cmd == FLUSH:
            if error:
                self.flush_failed(component, error)
            if not op.pending:
                self.flush_complete(op)
        else:
            self.mutation_progress(op)

    def read_complete(self, op: Op, component: int, error: int) -> None:
        if error and component == LOCAL and self.readable(op, self.out):
            op.started = False
            self.lock(op)
            return
        self.answer(op, 0 if not error else op.error[LOCAL] or 5)
        if op.order:
            self.unlock(op)
        self.finish(op)

    def chunk_complete(self, op: Op, component: int, error: int) -> None:
        if error and component == REMOTE and self.connected:
            self.raise_once(REMOTE_FAILED)
        if not error and op.cmd == READ and self.current(op):
            op.cmd = WRITE
            self.push(op, 1 - component)
            return
        self.unlock(op)
        op.over = True
        del self.chunks[op.slot]

    def current(self, op: Op) -> bool:
        """Does the chunk belong to the resynchronisation that runs now?"""
        return self.sync_on and self.connected and op.generation == self.generation

    def mutation_progress(self, op: Op) -> None:
        self.try_answer(op)
        if op.pending:
            return
        both = bool(op.used & R) and not op.error[REMOTE]
        if not both and not self.degraded:
            self.raise_once(NEED_DEGRADED)
        if self.connected and op.error[REMOTE]:
            self.raise_once(REMOTE_FAILED)
        self.fresh |= op.mask
        if not both or op.error[LOCAL]:
            self.out |= op.mask
        self.unlock(op)
        if not op.granting:
            self.finish(op)

    def try_answer(self, op: Op) -> None:
        """Invariants 5 and 7."""
        if op.result is not None or op.granting or op.pending & L:
            return
        if op.error[LOCAL]:
            if not op.pending:
                self.answer(op, op.error[LOCAL])
            return
        if op.pending & R:
            if self.mode == ASYNC or (self.mode == MEMSYNC and op.received):
                self.answer(op, 0)
        elif (op.used & R and not op.error[REMOTE]) or self.degraded:
            self.answer(op, 0)
        else:
            op.granting = True

    def received(self, op: Op) -> None:
        op.received = True
        self.try_answer(op)

    def map_complete(self, error: int) -> None:
        """Before: map.flight is still there. The caller has let the disk model fail or finish it."""
        assert self.seq.map_slot not in self.ops
        if not error:
            self.asked &= ~MAP_FAILED
            return
        self.joining = False
        self.raise_once(MAP_FAILED)

    def map_refuse(self, wanted: int, error: int) -> None:
        """Those go whose extents that very update was to make dirty. wanted: the bits that it has failed to set."""
        waiting = [op for op in self.locks if op.mutation and op.entered and not op.started]
        for op in waiting:
            if op.mask & ~self.map.sure & wanted:
                self.answer(op, error)
                self.unlock(op)
                self.finish(op)

    # ---- flushes ----

    def flush_in(self, op: Op) -> None:
        if self.flush_batch:
            self.flush_queue.append(op)
        else:
            self.flush_start([op])

    def flush_start(self, batch: list[Op]) -> None:
        self.flush_batch = batch
        self.flush_whole = self.connected
        self.covered, self.fresh = self.fresh, 0
        self.copies_covered, self.copies_fresh = self.copies_fresh, 0
        head = batch[0]
        head.started = True
        self.push(head, LOCAL)
        if self.connected:
            self.push(head, REMOTE)

    def flush_complete(self, op: Op) -> None:
        error = op.error[LOCAL]
        if error or op.error[REMOTE] or not self.flush_whole:
            self.fresh |= self.covered
            self.copies_fresh |= self.copies_covered
        self.covered = self.copies_covered = 0
        batch, self.flush_batch = self.flush_batch, []
        for one in batch:
            self.answer(one, error)
            self.finish(one)
        if self.flush_queue:
            queue, self.flush_queue = self.flush_queue, []
            self.flush_start(queue)

    def flush_failed(self, component: int, error: int) -> None:
        """A cache may be lost, and with it what was written here and is not answered yet."""
        if component == REMOTE and self.connected:
            self.raise_once(REMOTE_FAILED)
        for op in self.ops.values():
            if component == LOCAL and op.mutation and op.result is None and op.started and not op.pending & L:
                op.error[LOCAL] = op.error[LOCAL] or error
        self.distrust()

    def distrust(self) -> None:
        """A cache may be lost: all that the nodes have not both flushed may differ."""
        self.out |= self.fresh | self.covered
        for op in self.locks:
            if (op.mutation or op.chunk) and op.cmd != READ and op.used != op.pending:
                self.out |= op.mask

    # ---- the worker ----

    def grant(self) -> None:
        self.degraded = not self.connected
        self.asked &= ~NEED_DEGRADED
        for op in [op for op in self.ops.values() if op.granting]:
            op.granting = False
            self.answer(op, op.error[LOCAL])
            self.finish(op)

    def connect(self, bitmap: int) -> None:
        self.asked = 0
        self.joining = True
        bitmap &= self.all
        self.merged |= bitmap & ~self.map.sure
        self.out |= bitmap
        self.dirty |= bitmap

    def sync_start(self, from_remote: bool) -> None:
        self.sync_on, self.sync_remote = True, from_remote
        self.generation += 1

    def disconnect(self) -> None:
        self.connected = self.joining = self.degraded = self.flush_whole = self.sync_on = False
        self.asked = 0
        known = [op for op in [*self.ops.values(), *self.chunks.values()] if op.used & R and op.pending]
        for op in sorted(known, key=lambda op: op.slot):
            op.error[REMOTE] = 107
            if op.pending & R:
                self.complete(op, REMOTE, 107)
        self.distrust()
