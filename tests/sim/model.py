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
    FULLSYNC,
    LOCAL,
    LOCAL_FAILED,
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
    settling: bool = False  # waits until the secondary has it durably
    durable: bool = False  # and it has
    never: bool = False  # it has not done it: what that means is being decided
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
        self.flush_early = False  # sent while the secondary lacked something: what is copied later is not covered
        self.fresh = 0  # extents written on both nodes since the flush under way began, or since ever
        self.covered = 0  # extents that the flush under way makes durable on both
        self.copies_fresh = self.copies_covered = 0  # the same, of extents that were copied
        self.out = disk_map.content & self.all  # may differ between the nodes
        self.merged = 0  # of these, those that the map on disk need not say yet
        self.dirty = self.out
        self.kept: OrderedDict[int, None] = OrderedDict()  # the most recently used last
        self.connected = self.joining = self.degraded = False
        self.sync_on = self.sync_remote = self.sync_begun = False
        self.generation = 0  # of resynchronisations
        # The local component out of date, or failing: hast/ffi/seq_local.c.
        self.peer_whole = self.turning = self.turn_told = self.turn_detach = self.turn_covered = False
        self.no_turn = self.settling = self.given_up = self.detached = self.cache_lost = False
        self.no_source = False  # a local flush has failed: nothing is copied from here
        self.detach_on_error = False
        self.confirming = self.flush_confirms = False
        self.settlers: list[Op] = []  # those who wait until the secondary has them durably
        self.flush_settles: list[Op] = []  # of them, those that the flush under way makes durable there
        self.flush_turns = False  # it does so for all that a turning needs
        self.unflushed = True  # mutations since the last flush on both; nobody knows of those before
        self.unflushed_covered = False  # what the flush under way covers
        self.asked = 0
        self.events = 0  # expected of this event
        self.raised = 0  # by this event
        self.pushes: tuple[set[int], set[int]] = (set(), set())  # expected of this event
        self.begun: list[tuple[Op, int]] = []  # the same, until somebody clears it
        self.entered_now: list[Op] = []
        self.chunks: dict[int, Op] = {}
        self.waiting_answers: set[int] = set()
        self.synced = 0  # extents copied by this event
        self.launched_now = False  # a mutation, in this event
        self.left_now = 0  # extents of mutations that were over in this event
        self.numbers = 0
        self.sync_slots = range(self.geometry.nclient, self.geometry.nclient + self.geometry.nsync)

    # ---- helpers ----

    @property
    def peer_there(self) -> bool:
        return self.connected and not self.asked & REMOTE_FAILED

    @property
    def held_up(self) -> bool:
        """Nothing that needs the secondary may start."""
        return self.joining or (
            self.sync_remote and not self.given_up and (not self.peer_there or self.confirming)
        )

    @property
    def reads_held(self) -> bool:
        """Nor a read that only the secondary could answer, until it is known that this node can after all."""
        return self.held_up or (self.turning and not self.sync_remote and not self.peer_there)

    @property
    def hopeless(self) -> bool:
        return self.sync_remote and self.given_up and not self.connected

    @property
    def strict(self) -> bool:
        return self.sync_remote or self.turning

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
        return self.sync_remote or self.turning or self.peer_whole or not op.mask & out

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
        elif op.mutation or (self.strict and op.mask & self.out):
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
            if error and component == REMOTE and self.connected:
                self.raise_once(REMOTE_FAILED)
            self.mutation_progress(op)

    def read_complete(self, op: Op, component: int, error: int) -> None:
        if component == LOCAL:
            if error and self.turn(False):
                self.merged |= op.mask & ~self.map.sure
                self.dirty |= op.mask
                self.out |= op.mask
                self.sync_again()
            if self.readable(op, self.out) if error else self.strict and op.mask & self.out:
                op.started = False
                if not op.order:
                    self.lock(op)
            else:
                self.read_answer(op, error)
            return
        if not error and self.connected and self.asked & REMOTE_FAILED:
            error = 5  # what it has failed may be a flush, and this what was there before
        if error and self.reads_held:
            op.started = False
        elif error:
            self.read_here(op)
        else:
            self.read_answer(op, 0)

    def read_answer(self, op: Op, error: int) -> None:
        self.answer(op, error)
        if op.order:
            self.unlock(op)
        self.finish(op)

    def read_here(self, op: Op) -> None:
        """The secondary cannot be asked: where nothing has failed here, there is no need to."""
        if op.error[LOCAL] or self.strict:
            self.read_answer(op, op.error[LOCAL] or 5)
        else:
            op.entered = op.started = True
            self.push(op, LOCAL)

    def grants_settled(self) -> None:
        """Both have everything, durably."""
        self.asked &= ~NEED_DEGRADED
        self.events &= ~NEED_DEGRADED
        for op in [op for op in self.ops.values() if op.granting]:
            op.granting = False
            self.answer(op, op.error[LOCAL])
            self.finish(op)

    def grants_void(self) -> None:
        """This component alone has it, and is out of date: once more, with the secondary."""
        self.asked &= ~NEED_DEGRADED
        self.events &= ~NEED_DEGRADED
        for op in [op for op in self.ops.values() if op.granting]:
            op.granting = op.entered = op.started = op.received = op.memsync = False
            op.used, op.error = 0, [0, 0]
            if op.mutation:
                self.lock(op)
            else:
                self.flush_queue.append(op)

    def chunk_complete(self, op: Op, component: int, error: int) -> None:
        if error and component == REMOTE and self.connected:
            self.raise_once(REMOTE_FAILED)
        if error and component == LOCAL:
            self.turn(False)
        if op.cmd == READ and (not self.peer_there or (component == LOCAL and not self.has_source)):
            error = error or 5
        if not error and op.cmd == READ and self.current(op):
            op.cmd = WRITE
            self.push(op, 1 - component)
            return
        self.unlock(op)
        op.over = True
        del self.chunks[op.slot]

    @property
    def has_source(self) -> bool:
        return self.sync_remote or not self.no_source

    def current(self, op: Op) -> bool:
        """Does the chunk belong to the resynchronisation that runs now?"""
        return self.sync_on and self.connected and op.generation == self.generation

    def mutation_progress(self, op: Op) -> None:
        self.try_answer(op)
        if op.pending:
            return
        both = bool(op.used & R) and not op.error[REMOTE]
        if op.result is None and not op.granting and self.waits(op, both):
            return
        if not both:
            self.peer_whole = False
            if not self.degraded:
                self.raise_once(NEED_DEGRADED)
        self.left(op, clean=both and not op.error[LOCAL])
        if not op.granting:
            self.finish(op)

    def left(self, op: Op, *, clean: bool) -> None:
        """Over on both components."""
        if op.used:
            self.fresh |= op.mask
            self.left_now |= op.mask
            self.unflushed = True
        if not clean:
            self.out |= op.mask
            self.sync_again()
        self.unlock(op)

    def waits(self, op: Op, both: bool) -> bool:
        """Done on both sides, and nobody was told: is there something that it has to wait for?"""
        if self.sync_remote and not both:
            self.launch_again(op)
            return True
        if self.turning and not both:
            self.undecided(op)
            return True
        if op.error[LOCAL] and not (both and self.turn(False)):
            self.answer(op, op.error[LOCAL])
            return False
        if self.strict and both:
            if op.error[LOCAL]:
                self.out |= op.mask
            op.settling, op.durable = True, False
            self.settlers.append(op)
            return True
        self.answer_by_mode(op)
        return False

    def undecided(self, op: Op) -> None:
        op.settling = op.never = True
        op.durable = False
        self.settlers.append(op)

    def resolve(self, op: Op) -> None:
        """The secondary has not done it, as if that came to light now."""
        op.settling = op.never = False
        if op.mutation:
            op.error[REMOTE] = op.error[REMOTE] or 107
            self.mutation_progress(op)
        else:
            self.flush_over(op, op.error[LOCAL], False)

    def launch_again(self, op: Op) -> None:
        self.out |= op.mask
        op.started = op.received = op.memsync = False
        op.used, op.error = 0, [0, 0]
        if self.hopeless:
            self.refuse(op, 5)

    def refuse(self, op: Op, error: int) -> None:
        self.answer(op, error)
        self.unlock(op)
        self.finish(op)

    def try_answer(self, op: Op) -> None:
        """Invariants 5 and 7."""
        if op.result is None and not op.granting and not op.pending & L and not op.error[LOCAL] and not self.strict:
            self.answer_by_mode(op)

    def answer_by_mode(self, op: Op) -> None:
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

    def map_complete(self, error: int) -> bool:
        """Before: map.flight is still there. The caller has let the disk model fail or finish it. Whether those who
        needed it are refused."""
        assert self.seq.map_slot not in self.ops
        refused = False
        if not error:
            self.asked &= ~MAP_FAILED
        elif not self.turn(True):
            refused = True
            self.joining = False
            self.raise_once(MAP_FAILED)
        return refused

    def map_refuse(self, wanted: int, error: int) -> None:
        """Those go whose extents that very update was to make dirty. wanted: the bits that it has failed to set."""
        waiting = [op for op in self.locks if op.mutation and op.entered and not op.started]
        for op in waiting:
            if op.mask & ~self.map.sure & wanted:
                self.refuse(op, error)

    # ---- flushes ----

    def flush_in(self, op: Op) -> None:
        self.flush_queue.append(op)
        self.flush_resume()

    def flush_resume(self) -> None:
        if self.flush_batch or not self.flush_queue or (self.held_up and not (self.confirming and self.peer_there)):
            return
        queue, self.flush_queue = self.flush_queue, []
        if self.hopeless:
            for op in queue:
                self.answer(op, 5)
                self.finish(op)
        else:
            self.flush_start(queue)

    def flush_start(self, batch: list[Op]) -> None:
        self.flush_batch = batch
        self.flush_whole, self.flush_early = self.connected, self.lacking
        self.covered, self.fresh = self.fresh, 0
        self.copies_covered, self.copies_fresh = self.copies_fresh, 0
        self.unflushed_covered, self.unflushed = self.unflushed, False
        self.flush_settles, self.flush_turns = list(self.settlers), self.turning
        self.flush_confirms = self.confirming
        head = batch[0]
        head.started = True
        if not self.detached:
            self.push(head, LOCAL)
        if self.connected:
            self.push(head, REMOTE)

    def flush_complete(self, op: Op) -> None:
        error = op.error[LOCAL]
        if self.turning and self.cache_lost and not error:
            error = 5  # one that has failed a flush has lost something, also when it does not say so twice
        remote_ok = bool(op.used & R) and not op.error[REMOTE] and self.flush_whole and self.peer_there
        if remote_ok:
            for one in self.flush_settles:
                one.durable = True
            self.turn_covered |= self.flush_turns
            self.confirming &= not self.flush_confirms
        if error or not remote_ok or self.detached:
            self.fresh |= self.covered
            self.copies_fresh |= self.copies_covered
            self.unflushed |= self.unflushed_covered
        self.covered = self.copies_covered = 0
        self.unflushed_covered = False
        batch, self.flush_batch = self.flush_batch, []
        for one in batch:
            self.flush_over(one, error, remote_ok)
        self.flush_resume()
        self.settle_go_on()

    def flush_over(self, op: Op, error: int, remote_ok: bool) -> None:
        op.error[LOCAL] = error
        if op.slot == self.seq.own_flush_slot:
            self.answer(op, error)
            self.finish(op)
        elif self.sync_remote and not remote_ok:
            op.started, op.used, op.error = False, 0, [0, 0]
            self.flush_queue.append(op)
        elif error and remote_ok and self.strict:
            op.settling = op.durable = True
            self.settlers.append(op)
        elif self.turning and not remote_ok:
            self.undecided(op)
        elif not error and self.needs_grant(remote_ok):
            op.granting = True
            self.raise_once(NEED_DEGRADED)
        else:
            self.answer(op, error)
            self.finish(op)

    def needs_grant(self, remote_ok: bool) -> bool:
        """Would a flush promise something that is perhaps durable here alone?"""
        if self.degraded or self.sync_remote:
            return False
        return self.flush_early or self.lacking if remote_ok else self.unflushed or bool(self.out)

    @property
    def lacking(self) -> bool:
        """Perhaps the secondary lacks something that was acknowledged, and only the map speaks of it."""
        return bool(self.out) and not self.peer_whole and self.mode != FULLSYNC

    def flush_failed(self, component: int, error: int) -> None:
        """A cache may be lost, and with it what was written here and is not answered yet."""
        if component == REMOTE:
            if self.connected:
                self.raise_once(REMOTE_FAILED)
        else:
            self.no_source = True
            self.cache_lost = self.turn(True)
        for op in self.ops.values():
            if component == LOCAL and op.mutation and op.result is None and op.started and not op.pending & L:
                op.error[LOCAL] = op.error[LOCAL] or error
        self.distrust()
        self.sync_again()

    # ---- a local component that fails ----

    def turn(self, detach: bool) -> bool:
        """The secondary takes its place, if it can."""
        detach = detach or self.detach_on_error
        if self.detached or (self.sync_remote and not self.settling and not detach):
            return True
        if not self.peer_there or self.no_turn or not (self.peer_whole or self.sync_remote):
            return False
        self.turn_detach |= detach
        if not self.turning:
            self.turning, self.turn_told, self.turn_covered = True, False, False
            self.sync_on = False
        return True

    def settle_go_on(self) -> None:
        settlers, self.settlers = self.settlers, []
        for op in settlers:
            out_of_date = self.sync_remote and not self.turning and not self.settling
            if op.durable and (not op.error[LOCAL] or out_of_date):
                self.settled(op, 0)
            elif op.never and not self.turning:
                self.resolve(op)
            else:
                self.settlers.append(op)
        quiet_map = not self.turn_detach or self.map.flight is None
        if self.turning and not self.turn_told and self.turn_covered and quiet_map:
            self.turn_told = True
            self.raise_once(LOCAL_FAILED)

    def settled(self, op: Op, result: int) -> None:
        op.settling = False
        self.answer(op, result)
        if op.mutation:
            self.left(op, clean=not op.error[LOCAL] and not self.detached)
        self.finish(op)

    def turned(self) -> None:
        self.turning = self.turn_told = self.turn_detach = self.cache_lost = False
        self.asked &= ~LOCAL_FAILED

    def outdated(self) -> None:
        self.turned()
        self.settling = False
        self.sync_remote = True
        self.grants_void()
        self.settle_go_on()
        if self.connected:
            self.sync_start(True)

    def detach(self) -> None:
        self.detached = True
        self.dirty = self.out = self.all
        self.outdated()

    def local_refused(self) -> None:
        self.turned()
        self.no_turn = True
        settlers, self.settlers = self.settlers, []
        for op in settlers:
            if op.never:
                self.resolve(op)
            elif self.sync_remote and not self.settling:
                self.settlers.append(op)
            else:
                self.settled(op, op.error[LOCAL])
        self.settle_go_on()
        self.sync_again()

    def stored_current(self) -> None:
        if self.settling:
            self.settling = self.sync_remote = False
            self.settle_go_on()

    def give_up(self) -> None:
        if self.sync_remote and not self.connected and not self.joining:
            self.given_up = True

    def sync_again(self) -> None:
        busy = self.sync_on or self.turning or self.detached
        if self.sync_begun and self.connected and self.out and not busy:
            self.sync_on = True
            self.generation += 1

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

    def grant_refused(self) -> None:
        self.asked &= ~NEED_DEGRADED
        for op in [op for op in self.ops.values() if op.granting]:
            op.granting = False
            self.answer(op, 5)
            self.finish(op)

    def connect(self, bitmap: int) -> None:
        self.asked = 0
        self.given_up = self.no_turn = self.settling = False
        self.joining = True
        bitmap &= self.all
        self.merged |= bitmap & ~self.map.sure
        self.out |= bitmap
        self.dirty |= bitmap

    def sync_start(self, from_remote: bool) -> None:
        self.sync_begun = True
        if not self.turning:
            self.sync_on, self.sync_remote = not self.detached, from_remote
            self.generation += 1

    def disconnect(self) -> None:
        self.connected = self.joining = self.degraded = self.flush_whole = self.sync_on = False
        self.peer_whole = self.turning = self.turn_detach = self.sync_begun = self.confirming = False
        self.cache_lost = False
        self.asked = 0
        known = [op for op in [*self.ops.values(), *self.chunks.values()] if op.used & R and op.pending]
        for op in sorted(known, key=lambda op: op.slot):
            op.error[REMOTE] = 107
            if op.pending & R:
                self.complete(op, REMOTE, 107)
        settlers, self.settlers = self.settlers, []
        for op in settlers:
            self.resolve(op)
        self.distrust()
