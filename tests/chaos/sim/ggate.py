"""The ggate stage of a simulated primary, and what is behind it: the sequencer of production, the disk stage, the ends
of the connection; and its clients, who are answered here, and whose promises are checked here.

Messages between worker and ggate are queues: `mail` to the worker, `orders` to ggate (hast/stages/ggate.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from hast.handshake import Agreement
from tests.chaos.sim.arena import Arena
from tests.chaos.sim.oracle import Broken
from tests.chaos.sim.parts import Conn, Part, Request
from tests.sim.harness import (
    ASYNC,
    CLAIMED,
    CONNECTED,
    DELETE,
    DONE,
    FLAG_DURABLE,
    FLUSH,
    FREE,
    MAP,
    MEMSYNC,
    NONE,
    READ,
    RECEIVED,
    REMOTE_FAILED,
    RING_DISK,
    RING_SEND,
    SYNC_DONE,
    WRITE,
)

if TYPE_CHECKING:
    from tests.chaos.sim.world import World

EIO = 5
DOWN, ASKED, ANSWERED, UP, PARTING = range(5)  # of the connection

DECISIONS = {
    "grant": "hast_seq_grant_degraded",
    "refuse_grant": "hast_seq_refuse_degraded",
    "outdated": "hast_seq_outdated",
    "detach": "hast_seq_detach",
    "refused": "hast_seq_local_refused",
    "flush_failed": "hast_seq_local_flush_failed",
    "current": "hast_seq_current",
    "give_up": "hast_seq_give_up",
}


class Op:
    """A client's request."""

    __slots__ = (
        "acked", "cmd", "conn", "count", "era", "failed", "first", "floors", "mask", "promise", "refused", "result",
        "slot", "there", "value",
    )  # fmt: skip

    def __init__(self, cmd: int, first: int, count: int) -> None:
        self.cmd, self.first, self.count = cmd, first, count
        self.value = 0
        self.mask = 0
        self.there = self.acked = False  # the secondary's disk has it; the client was told
        self.failed = False  # something of the local component failed for it
        self.refused = False  # the secondary could not do it
        self.result: int | None = None


class Ggate(Part):
    """seq: its arena. conn: the connection that it uses. detached, unrecorded: see hast.outage."""

    role = "primary"

    def __init__(self, world: World, node: int, arena: Arena) -> None:
        super().__init__(world, node)
        self.seq, self.s, self.lib, self.arena = arena, arena.s, arena.lib, arena.arena
        self.map_slot, self.own_flush, self.nclient = arena.map_slot, arena.own_flush_slot, arena.geometry.nclient
        self.stage = DOWN
        self.conn: Conn | None = None
        self.mail: deque[tuple[str, int, int, int, int]] = deque()
        self.orders: deque[tuple[str, Any]] = deque()
        self.from_remote = False
        self.fetched: set[int] = set()  # what the source of the synchronisation had written alone when it began
        self.detached = self.unrecorded = False
        self.gone: set[int] = set()  # sectors that a failed flush has lost
        self.ill = False  # a flush has failed: the disk stage fails all later ones, also when it is another one
        self.ops: dict[int, Op] = {}
        self.owner: dict[int, Op] = {}  # the last request of a slot
        self.data: dict[int, Any] = {}
        self.disk_q: list[int] = []
        self.marks: dict[int, int] = {}
        self.ring: list[int] = []  # to be sent, while there is no connection
        self.seen = 0

    # ---- the stages start and end ----

    def start_stages(self) -> None:
        s = self.s
        if self.detached:
            self.seq.reset(None, self.world.dirty_max)
        else:
            self.disk.settle()
            self.seq.reset(self.disk.map, self.world.dirty_max)
        s.detach_on_error = self.world.detach
        s.mode = self.world.mode
        s.metaflush = self.world.metaflush
        s.degraded_ok = self.meta.alone and not self.attempts
        s.sync_remote = self.meta.syncing
        s.no_source = self.ill
        if self.detached:
            self.lib.hast_seq_detach(self.arena)
        self.from_remote = False
        self.ops.clear()
        self.data.clear()
        self.disk_q.clear()
        self.marks.clear()
        self.ring.clear()
        self.mail.clear()
        self.orders.clear()
        self.seen = 0

    def abandon(self) -> None:
        """The stages are gone; what the disk had may happen or not. The disk stage has heard of a flush that fails."""
        fate, disk = self.world.fate, self.disk
        for slot in self.disk_q:
            bio = self.seq.bio[slot]
            cmd = bio.cmd
            if cmd == MAP:
                if fate.draw(3) == 2:
                    disk.put_map(self.seq.map_slab[0])
                else:
                    disk.map_failed(self.seq.map_slab[0], fate)
            elif cmd in (WRITE, DELETE):
                disk.may_happen(bio.offset >> 9, self.data[slot], fate)
            elif cmd == FLUSH and not self.ill and self.world.fails_flush[self.node] and fate.chance(2):
                self.flush_fails(self.marks[slot])
        self.disk_q.clear()
        self.oracle.lost_alone(self.node, self.gone, self.world.whole(self.node) or self.oracle.counted(self.node))
        self.world.soften()
        self.gone.clear()
        if self.conn is not None:
            self.conn.here = False
            self.conn = None

    # ---- clients ----

    def submit(self, op: Op) -> bool:
        slot = self.lib.hast_seq_claim(self.arena)
        if slot == NONE:
            return False
        oracle, node, cmd, first, count = self.oracle, self.node, op.cmd, op.first, op.count
        op.slot = slot
        # What may fail because of an earlier failure: a component that is being given up has no good copy for certain.
        op.failed = bool(self.s.turning and (cmd == FLUSH or self.s.turn_detach))
        op.conn = self.conn if self.s.connected and self.stage == UP else None
        if cmd == FLUSH:
            op.promise = oracle.since[node].copy()
            first = count = 0
        elif cmd == READ:
            op.floors = oracle.lo[node][first : first + count]
            op.era = oracle.era[node]
            op.mask = self.world.mask(first, count)
        else:
            op.value = value = oracle.new()
            op.mask = self.world.mask(first, count)
            self.data[slot] = (value,) * count
            oracle.appears(node, first, self.data[slot])
        if self.world.tells:
            name = {READ: "read", WRITE: "write", DELETE: "delete", FLUSH: "flush"}[cmd]
            what = f" of {op.value}" if op.value else ""
            self.world.say(f"client of {self.world.name(node)}: {name}{what} at {first}+{count} (slot {slot})")
        self.ops[slot] = self.owner[slot] = op
        if self.seq.submit(slot, cmd, first << 9, count << 9) != 0:
            raise Broken("a request was refused")
        self.look()
        return True

    def answered(self, slot: int) -> None:
        op = self.ops.pop(slot)
        bio = self.seq.bio[slot]
        op.result = error = int(bio.result)
        cmd = op.cmd
        if self.world.tells:
            self.world.say(f"client of {self.world.name(self.node)}: slot {slot} answered, error {error}")
        oracle, node = self.oracle, self.node
        if error:
            self.check_error(op, error, bio)
        elif cmd == READ:
            oracle.check_read(node, op.first, self.data[slot], op.floors, op.era)
        elif cmd == FLUSH:
            oracle.flushed(node, op.promise, bool(self.s.sync_remote) or self.unrecorded)
        else:
            self.acknowledged(op, bio)
        self.lib.hast_seq_release(self.arena, slot)

    def acknowledged(self, op: Op, bio: Any) -> None:
        """Invariants 5 and 7."""
        oracle, node, mode = self.oracle, self.node, self.s.mode
        op.acked = True
        oracle.holds(node, op.first, op.count, op.value)
        if self.s.sync_remote and not self.s.settling and self.world.disks[1 - node].meta.resuid == self.meta.resuid:
            dur = self.world.disks[1 - node].dur
            if min(dur[op.first : op.first + op.count]) < op.value:
                raise Broken(f"write {op.value} is acknowledged out of date, and not durable on the other node")
        there = self.world.disks[1 - node].cur
        if op.there or min(there[op.first : op.first + op.count]) >= op.value:  # as itself, or copied
            oracle.holds(1 - node, op.first, op.count, op.value)
            return
        with_secondary = bio.used & 2 and bio.error[1] == 0
        if with_secondary and (mode == ASYNC or (mode == MEMSYNC and bio.received) or not bio.pending & 2):
            oracle.early.add(op.value)
            return
        oracle.alone[node].add(op.value)
        if not oracle.counted(node):
            raise Broken(
                f"invariant 7: write {op.value} is acknowledged without the other node, and the counters do not say so"
            )

    def check_error(self, op: Op, error: int, bio: Any) -> None:
        """(d)"""
        if op.cmd == FLUSH and self.gone:
            self.oracle.lost(self.node, self.gone)  # and the client has been told
            self.world.soften()
        if not op.failed and not self.s.sync_remote:
            raise Broken(f"error {error} for a request that nothing failed for")
        s, conn = self.s, self.conn
        done_there = bio.used & 2 and not bio.pending & 2 and not bio.error[1]
        # What needs to be stored for that is stored, or nothing has kept it from being stored on this connection.
        whole = (s.sync_remote and not s.settling) or (s.peer_whole and not s.no_turn)
        if op.cmd != READ and done_there and whole and s.connected and not s.asked & REMOTE_FAILED:
            raise Broken(f"error {error} although the secondary has everything, and this as well")
        if op.cmd != READ or op.refused or conn is None or op.conn is not conn or not conn.there:
            return
        if s.connected and not s.asked & REMOTE_FAILED and not self.seq.sync_map[0] & op.mask:
            raise Broken(f"error {error} although the secondary could be read")

    # ---- the sequencer's output ----

    def look(self) -> None:
        s, seq = self.s, self.seq
        pushed = s.pushed
        if pushed:
            s.pushed = 0
            if pushed & 1:
                for slot in seq.take(RING_DISK):
                    self.begin(slot)
            if pushed & 2:
                for slot in seq.take(RING_SEND):
                    self.send(slot)
        while (slot := self.lib.hast_seq_acked(self.arena)) != NONE:
            self.answered(slot)
        events = s.events
        new, self.seen = events & ~self.seen, events
        if new & (CONNECTED | SYNC_DONE):
            self.turning_point(new)
        if events and not self.world.lazy:
            self.tell()

    def begin(self, slot: int) -> None:
        """The disk stage has it."""
        bio = self.seq.bio[slot]
        cmd = bio.cmd
        if cmd == FLUSH:
            self.marks[slot] = self.disk.mark()
        elif cmd in (WRITE, DELETE):
            self.check_dirty(bio, "this")
        self.disk_q.append(slot)

    def check_dirty(self, bio: Any, which: str) -> None:
        """Invariant 1."""
        mask = self.world.mask(bio.offset >> 9, bio.length >> 9)
        if not self.disk.map_says(mask) and not (self.unrecorded and self.world.disks[1 - self.node].map_says(mask)):
            raise Broken(f"invariant 1: a write to {which} node before its extents are dirty on disk")

    def send(self, slot: int) -> None:
        """It goes out."""
        bio = self.seq.bio[slot]
        cmd = bio.cmd
        conn = self.conn
        if cmd in (WRITE, DELETE) and conn is not None and conn.there:
            self.check_dirty(bio, "the other")
        if conn is None:
            self.ring.append(slot)  # there is no connection: it stays in its ring
            return
        data = self.data[slot] if cmd in (WRITE, DELETE) else None
        chunk = slot >= self.nclient
        op = None if chunk or slot == self.own_flush else self.owner[slot]
        memsync = bool(bio.flags & 8)
        conn.req.append(Request(slot, cmd, bio.offset >> 9, bio.length >> 9, data, op, memsync, chunk))

    def turning_point(self, new: int) -> None:
        """What the sequencer has just decided for itself."""
        oracle, node = self.oracle, self.node
        if new & CONNECTED:
            if self.world.tells:
                self.world.say(f"{self.world.name(node)}: requests go to the other node now")
            if self.conn is None or not self.conn.there:
                pass  # it has gone its own way since
            elif not self.from_remote:
                oracle.leads(node)
            else:
                oracle.follows(node)
                self.world.soften()
                oracle.mixed[node] = True
                self.fetched = oracle.alone[1 - node].copy()
                for slot, op in self.ops.items():
                    if op.cmd in (WRITE, DELETE):
                        # Begun before, and not before what the other node's clients wrote in the meantime.
                        op.value = oracle.new()
                        self.data[slot] = (op.value,) * op.count
                        oracle.appears(node, op.first, self.data[slot])
        if new & SYNC_DONE:
            busy = 0
            for bio in self.seq.bio:
                if bio.state not in (FREE, CLAIMED, DONE) and bio.cmd in (WRITE, DELETE):
                    busy |= ((1 << (bio.length >> 9)) - 1) << (bio.offset >> 9)
            if self.world.tells:
                self.world.say(f"{self.world.name(node)}: everything is copied")
            self.world.counts["synchronised"] += 1
            other = self.world.parts[1 - node]
            if self.conn is not None:
                self.conn.complete = True
            if self.conn is not None and other is not None and other.conn is self.conn:
                oracle.synchronised(node, busy)
            else:
                oracle.parted(node, self.fetched if self.s.sync_remote else None, self.conn or self.session)

    def tell(self) -> None:
        """ggate tells the worker, and begins to copy when there is a connection."""
        s = self.s
        bits = s.events
        s.events = self.seen = 0
        self.mail.append(("seq", bits, s.ndirty, s.turn_detach, s.sync_number, s.join_failed))
        if bits & CONNECTED:
            self.lib.hast_seq_sync_start(self.arena, self.from_remote)
            self.look()

    # ---- completions ----

    def complete(self, which: int) -> None:
        """The disk stage is done with one."""
        slot = self.disk_q.pop(which)
        bio = self.seq.bio[slot]
        error = self.execute(slot, bio)
        if error:
            op = self.ops.get(slot)
            if op is not None:
                op.failed = True
            elif (slot != self.own_flush and bio.cmd == FLUSH) or bio.cmd == MAP:
                for op in self.ops.values():
                    op.failed = True
            if self.world.tells:
                self.world.say(f"{self.world.name(self.node)}: that failed")
        bio.error[0] = error
        if self.lib.hast_seq_complete(self.arena, 0, slot) != 0:
            raise Broken("a completion was refused (invariant 9)")
        if error and self.s.turning:
            # A component that is being given up may fail flushes, also those that it has done.
            for op in self.ops.values():
                op.failed = op.failed or op.cmd == FLUSH or bool(self.s.turn_detach)
        self.look()

    def execute(self, slot: int, bio: Any) -> int:
        world, fate, disk, node = self.world, self.world.fate, self.disk, self.node
        cmd = bio.cmd
        if cmd == MAP:
            new = self.seq.map_slab[0]
            if world.tells:
                world.say(f"{world.name(node)}: map {new:b}")
            if world.dead == node:
                return EIO
            if (self.ill and bio.flags & FLAG_DURABLE) or (world.fails_map[node] and fate.chance(6)):
                disk.map_failed(new, fate)
                return EIO
            disk.put_map(new)
            return 0
        if cmd == FLUSH:
            if world.tells:
                world.say(f"{world.name(node)}: disk flushed (slot {slot})")
            mark = self.marks.pop(slot)
            if self.ill:
                self.all_failed()
                return EIO
            if world.fails_flush[node] and fate.chance(6):
                self.all_failed()
                self.flush_fails(mark)
                self.oracle.lost(node, self.gone, self.served())
                world.soften()
                return EIO
            disk.flush(mark)
            return 0
        first, count = bio.offset >> 9, bio.length >> 9
        if cmd == READ:
            if world.fails_read[node] and fate.chance(8):
                return EIO
            self.data[slot] = disk.cur[first : first + count]
            if world.tells:
                world.say(f"{world.name(node)}: disk reads {self.data[slot]} at {first} (slot {slot})")
            return 0
        values = self.data[slot]
        if world.tells:
            world.say(f"{world.name(node)}: disk stores {values} at {first} (slot {slot})")
        if world.dead == node:
            return EIO
        if slot >= self.nclient:
            self.oracle.appears(node, first, values)
        if world.fails_write[node] and fate.chance(8):
            disk.may_happen(first, values, fate)
            return EIO
        disk.write(first, values)
        return 0

    def flush_fails(self, mark: int) -> None:
        """The disk stage notes it before anybody is told."""
        world, node = self.world, self.node
        self.ill = world.doubt[node] = world.lost[node] = True
        self.gone.update(self.disk.flush_failed(mark, world.fate))

    def served(self) -> bool:
        """Does the other node stand in for what is lost here? Where it can't, the flush is going to fail, and what is
        read from now on may be the older data, as with any disk: also before the flush has its answer."""
        s = self.s
        return bool(s.connected and not s.asked & REMOTE_FAILED and (s.peer_whole or s.sync_remote))

    def all_failed(self) -> None:
        """Also those that wait for nothing but their answer."""
        for op in self.ops.values():
            op.failed = True

    def reply(self) -> None:
        """The recv stage has a reply, ggate takes it."""
        conn = self.conn
        assert conn is not None
        request, received, error = conn.rep.popleft()
        slot = request.slot
        bio = self.seq.bio[slot]
        if self.world.tells:
            what = "received" if received else f"done, error {error}"
            self.world.say(f"{self.world.name(self.node)}: reply for slot {slot}: {what}")
        if received:
            entry = slot | RECEIVED
        else:
            entry = slot
            bio.error[1] = error
            if error and request.op is not None:
                request.op.failed = request.op.refused = True
            if request.cmd == READ and error == 0:
                self.data[slot] = request.data
        if self.lib.hast_seq_complete(self.arena, 1, entry) != 0:
            raise Broken("a reply was refused (invariant 9)")
        self.look()

    # ---- ggate: orders of the worker ----

    def order(self) -> None:
        """hast.stages.ggate.Ggate.command()."""
        word, what = self.orders.popleft()
        lib, arena = self.lib, self.arena
        if self.world.tells:
            self.world.say(f"{self.world.name(self.node)}: ggate: {word}")
        if word == "grant" and what != self.s.sync_number:
            pass
        elif word in DECISIONS:
            if word == "flush_failed":
                self.all_failed()
            if word == "refuse_grant":
                for op in self.ops.values():
                    op.failed = True
            if word == "refused":
                self.give_way()
            if word in ("outdated", "detach"):
                self.oracle.mixed[self.node] = True
            getattr(lib, DECISIONS[word])(arena)
        elif word == "connect":
            if self.s.events:  # ggate tells before it takes a command; here it may be late with all others
                self.tell()
            self.connect(*what)
        else:
            if self.conn is not None:
                self.conn.here = False
                self.conn = None
            self.ring.clear()
            self.give_way()
            lib.hast_seq_disconnect(arena)
            self.mail.append(("parted", 0, 0, 0, 0, 0))
        self.look()

    def give_way(self) -> None:
        """The other node does not stand in for what this one has lost: clients are told at their next flush."""
        if self.gone and not self.s.sync_remote:
            self.oracle.lost(self.node, self.gone)
            self.world.soften()

    def connect(self, agreement: Agreement, from_remote: bool) -> None:
        s = self.s
        s.served = 0
        s.awaited = s.mapwait_head != NONE or s.flushq_head != NONE
        if from_remote and not s.sync_remote and (s.nactive or s.grant_head != NONE):
            self.mail.append(("unjoined", 0, 0, 0, 0, 0))
            return
        if self.conn is not None and self.conn.there:
            self.oracle.meets(self.node, self.conn.outcome, from_remote)
        s.mode = self.world.mode
        self.from_remote = from_remote
        self.fetched = set()
        s.sync_remote = from_remote
        bits = agreement.map
        self.lib.hast_seq_connect(self.arena, self.seq.ffi.NULL if bits is None else bits)
