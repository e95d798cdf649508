"""What the model of the sequencer knows (tests/sim/model.py): sets that say what is so, and what follows from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from errno import EOPNOTSUPP

from tests.sim.disks import MapOnDisk
from tests.sim.harness import DELETE, FULLSYNC, LOCAL, READ, REMOTE, REMOTE_FAILED, WRITE, Sequencer

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


class State:
    """Follows one sequencer: what is so. What happens is in the classes that are made of this one."""

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
        self.merging = False  # the secondary's own map says something
        self.merged = 0  # of these, those that the map on disk need not say yet
        self.dirty = self.out
        self.kept: OrderedDict[int, None] = OrderedDict()  # the most recently used last
        self.connected = self.joining = self.degraded = self.join_failed = False
        self.sync_on = self.sync_remote = self.sync_begun = False
        self.generation = 0  # of resynchronisations
        # The local component out of date, or failing: hast/ffi/seq_local.c.
        self.peer_whole = self.turning = self.turn_told = self.turn_detach = self.turn_covered = False
        self.no_turn = self.settling = self.given_up = self.detached = self.cache_lost = False
        self.no_source = False  # a local flush has failed: nothing is copied from here
        self.detach_on_error = False
        self.no_deletes = False  # the secondary is not one of ours
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
    def parked(self) -> bool:
        """Those who need a map update are told nothing: it is being decided that the secondary does everything."""
        return self.join_failed and self.held_up

    @property
    def reads_held(self) -> bool:
        """Nor a read that only the secondary could answer, until it is known that this node can after all."""
        return self.held_up or (self.turning and not self.sync_remote and not self.peer_there)

    @property
    def hopeless(self) -> bool:
        return self.sync_remote and self.given_up and not self.connected

    def impossible(self, op: Op) -> int:
        """Why the mutation is not going to be possible, or 0."""
        if self.hopeless:
            return 5
        wanted = self.sync_remote and self.connected and op.cmd == DELETE
        return EOPNOTSUPP if wanted and self.no_deletes else 0

    @property
    def strict(self) -> bool:
        return self.sync_remote or self.turning

    @property
    def has_source(self) -> bool:
        return self.sync_remote or not self.no_source

    @property
    def lacking(self) -> bool:
        """Perhaps the secondary lacks something that was acknowledged, and only the map speaks of it."""
        return bool(self.out) and not self.peer_whole and self.mode != FULLSYNC

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

    def turn(self, detach: bool) -> bool:
        """The secondary takes its place, if it can."""
        known = self.sync_remote and not self.settling and not detach
        if self.detached or (known and (not self.detach_on_error or self.no_turn)):
            return True
        if not self.peer_there or self.no_turn or not (self.peer_whole or self.sync_remote):
            return False
        if not (self.turning and self.turn_told and self.map.flight is not None):  # else its map is going to be written
            self.turn_detach |= detach or self.detach_on_error
        if not self.turning:
            self.turning, self.turn_told, self.turn_covered = True, False, False
            self.sync_on = False
        return True

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
