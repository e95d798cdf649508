"""The comparison after each event: everything that came out of the sequencer against what the model asks for."""

from __future__ import annotations

from collections import OrderedDict

from tests.sim.harness import (
    BLOCKED,
    CLAIMED,
    DELETE,
    DONE,
    DURABLEWAIT,
    FLAG_DURABLE,
    FLAG_MEMSYNC,
    FLAG_SYNC,
    FLUSH,
    FREE,
    GRANTWAIT,
    LOCAL,
    MAPWAIT,
    MEMSYNC,
    NONE,
    QUEUED,
    READ,
    REMOTE,
    RING_DISK,
    RING_SEND,
    RUNNING,
    SYNC_DONE,
    WRITE,
    each_extent,
)
from tests.sim.model import Model
from tests.sim.model_state import L, Op, require

FLAGS = (
    "sync_on",
    "sync_remote",
    "sync_begun",
    "peer_whole",
    "turning",
    "turn_detach",
    "cache_lost",
    "no_source",
    "no_turn",
    "settling",
    "given_up",
    "confirming",
    "detached",
)


class Oracle(Model):
    """A model that looks at its sequencer after each event."""

    def observe(self, *, take_answers: bool = True) -> list[Op]:
        """Compares; returns the ops whose answers were taken now."""
        seq = self.seq
        if seq.s.events & SYNC_DONE:
            self.grants_settled()
        given = (seq.take(RING_DISK), seq.take(RING_SEND))
        states, pending = seq.bio_bytes(2), seq.bio_bytes(3)
        dirty = int.from_bytes(seq.bitmap("dirty"), "little")
        sync = int.from_bytes(seq.bitmap("sync"), "little")
        self.find_chunks(states)
        self.map_started(given[LOCAL], dirty)
        self.copied(sync)
        self.advance()
        self.joined()
        self.own_flush(states)
        self.advance()
        self.launched_and_flushed()
        self.check_pushes(given)
        self.check_map(dirty, sync)
        self.check_states(states, pending)
        self.check_counters(states)
        self.raised = seq.events()
        self.check_events(self.raised)
        told = self.take_answers() if take_answers else []
        self.pushes = (set(), set())
        self.entered_now = []
        self.left_now = 0
        self.launched_now = False
        self.events = 0
        return told

    def find_chunks(self, states: bytes) -> None:
        """A resynchronisation issues its chunks itself: they are found in the bio table."""
        for slot in sorted(self.sync_slots, key=lambda slot: self.seq.bio[slot].order):
            if states[slot] == FREE:
                continue
            bio = self.seq.bio[slot]
            if slot in self.chunks:
                if self.chunks[slot].order == bio.order:
                    continue
                self.stale(slot)
            require(self.sync_on and self.connected, "a chunk without a resynchronisation")
            require(self.has_source, "a chunk of a component that has lost something")
            extents = self.mask(bio.offset, bio.length)
            require(not extents & ~self.map.sure, "a chunk of an extent that is not dirty on disk")
            require(bio.flags & FLAG_SYNC and bio.cmd == READ, "a chunk that is no read")
            require(0 < bio.length <= self.geometry.slab_size, "a chunk's length")
            require(bio.offset + bio.length <= self.geometry.datasize, "a chunk past the end")
            self.numbers += 1
            mask = self.mask(bio.offset, bio.length)
            require(not mask & ~(self.out | self.deleting()), "a chunk of an extent that does not differ")
            op = Op(slot, READ, bio.offset, bio.length, mask, self.numbers, held=False, chunk=True)
            op.generation = self.generation
            self.lock(op)
            self.chunks[slot] = op
            if self.eligible(op):
                op.started = True
                self.push(op, REMOTE if self.sync_remote else LOCAL)

    def deleting(self) -> int:
        """Extents of deletes that begin in this event, perhaps, and of which the secondary gets a copy."""
        mask = 0
        for op in self.locks:
            if self.no_deletes and op.cmd == DELETE and not op.started:
                mask |= op.mask
        return mask

    def stale(self, slot: int) -> None:
        """A chunk gave its slot to another one in one event: it waited for its range, for a copying that was over."""
        old = self.chunks.pop(slot)
        require(old.generation != self.generation and not old.started, f"chunk {slot} is gone before its time")
        self.locks.remove(old)

    def copied(self, sync: int) -> None:
        """Extents leave `sync` only by being copied. That they are equal then is for the disks to say."""
        self.synced = self.out & ~sync
        if self.synced:
            require(self.sync_on and self.connected, "extents stopped to differ without a resynchronisation")
            busy = 0
            for op in self.chunks.values():
                busy |= op.mask
            require(not self.synced & busy, "an extent counts as copied while a chunk of it is under way")
            self.out &= ~self.synced
            self.fresh |= self.synced
            self.copies_fresh |= self.synced

    def advance(self) -> None:
        """Who holds his range goes on."""
        self.flush_resume()
        again = True
        while again:
            again = False
            for op in list(self.locks):
                if op.started or not self.eligible(op):
                    continue
                if op.mutation:
                    again |= self.mutation_advance(op)
                elif op.chunk:
                    if self.current(op) and self.has_source:
                        op.started = True
                        self.push(op, REMOTE if self.sync_remote else LOCAL)
                    else:
                        self.unlock(op)
                        del self.chunks[op.slot]
                        again = True
                elif self.reads_held:
                    op.entered = True
                elif self.readable(op, self.out | self.synced if not self.seq.bio[op.slot].pending else self.out):
                    op.entered = op.started = True
                    self.push(op, REMOTE)
                else:
                    self.read_here(op)
                    again = again or op.over

    def mutation_advance(self, op: Op) -> bool:
        """Whether it is refused, and its range free."""
        if not op.entered:
            op.entered = True
            self.entered_now.append(op)
            self.dirty |= op.mask
        if self.impossible(op):
            self.refuse(op, self.impossible(op))
            return True
        if self.held_up or (not self.detached and op.mask & ~self.map.sure):
            return False
        op.started = True
        self.unflushed = self.launched_now = True
        if not self.detached:
            self.push(op, LOCAL)
        if self.connected and self.no_deletes and op.cmd == DELETE:
            self.out |= op.mask
        elif self.connected:
            self.push(op, REMOTE)
            op.memsync = self.mode == MEMSYNC and op.cmd == WRITE and not self.strict
        return False

    def joined(self) -> None:
        """The merged map is durable as soon as no update is left to be made. (One that began since was for somebody who
        could go on because of that.)"""
        if self.joining and (self.map.flight is None or self.seq.s.connected):
            require(not self.merged & ~self.map.sure, "no update for the merged map is under way")
            self.join()

    def map_started(self, given: list[int], dirty: int) -> None:
        slot = self.seq.map_slot
        if slot not in given:
            return
        bio = self.seq.bio[slot]
        durable = self.seq.s.metaflush or self.seq.s.joining
        require(bio.flags == (FLAG_DURABLE if durable else 0), "a map update that is not durable")
        require(bio.offset + bio.length <= self.geometry.mapsize, "a map update past the end")
        data = self.seq.slab(slot, bio.length)
        sure = self.map.sure  # what is there may be cleared while the update is under way
        self.map.start(bio.offset, data)
        _, new, _, _ = self.map.flight or (0, 0, 0, 0)
        require(not new & ~dirty & ~sure, "a map update sets what is not dirty")

    def own_flush(self, states: bytes) -> None:
        """The sequencer flushes for itself: when it does is its own affair, but for hast_seq_idle() (see there)."""
        slot = self.seq.own_flush_slot
        number = self.seq.bio[slot].seq
        old = self.ops.get(slot)
        if states[slot] == FREE or (old is not None and old.value == number):
            return
        require(old is None, "two own flushes")
        require(self.connected, "an own flush without the secondary")
        self.numbers += 1
        op = Op(slot, FLUSH, 0, 0, 0, self.numbers, held=False, value=number)
        self.ops[slot] = op
        over = self.synced | self.left_now
        late = over & self.uncovered(over) if over else 0
        launched = self.launched_with(slot)
        if launched:
            self.flush_batch.append(op)  # it was asked for before that batch began, in the same event
        else:
            self.flush_in(op)
        if late and (op.started or launched):
            self.covered &= ~late
            self.fresh |= late
            self.copies_covered &= ~(late & self.synced)
            self.copies_fresh |= late & self.synced
            self.unflushed |= bool(late & self.left_now)

    def launched_and_flushed(self) -> None:
        """A mutation and a flush went off in the same event: which of them was first is the sequencer's affair."""
        head = self.flush_batch[0] if self.flush_batch else None
        if self.launched_now and head is not None and head.slot in self.pushes[LOCAL] | self.pushes[REMOTE]:
            self.unflushed_covered = True
            self.unflushed = bool(self.seq.s.last_epoch > self.seq.s.flush_cover)

    def launched_with(self, slot: int) -> bool:
        """Is it in a batch that began in this very event?"""
        head = self.flush_batch[0] if self.flush_batch else None
        if head is None or head.slot not in self.pushes[LOCAL] | self.pushes[REMOTE]:
            return False
        at = self.seq.s.flush_running
        while at not in (NONE, slot):
            at = self.seq.bio[at].next
        return bool(at == slot)

    def uncovered(self, mask: int) -> int:
        """Which of the extents that were just copied or written the own flush of the same event came too early for."""
        ffi, arena = self.seq.ffi, self.seq.arena
        table = ffi.cast("struct hast_extent *", ffi.cast("char *", arena) + arena.extent_off)
        late = 0
        for n in each_extent(mask):
            if table[n].epoch > self.seq.s.flush_cover:
                late |= 1 << n
        return late

    # ---- comparisons ----

    def check_pushes(self, given: tuple[list[int], list[int]]) -> None:
        for component in (LOCAL, REMOTE):
            found = [slot for slot in given[component] if slot != self.seq.map_slot]
            wanted = self.pushes[component]
            require(
                len(found) == len(set(found)) and set(found) == wanted,
                f"component {component} was given {found}, to be given: {sorted(wanted)}",
            )
        for slot in given[REMOTE]:
            op = self.chunks.get(slot) or self.ops[slot]
            memsync = bool(self.seq.bio[slot].flags & FLAG_MEMSYNC)
            require(memsync == op.memsync, f"slot {slot}: two replies are expected, or not")

    def running(self) -> int:
        """Extents of mutations that are with a component."""
        mask = 0
        for op in self.locks:
            if op.started and (op.mutation or op.chunk):
                mask |= op.mask
        return mask

    def inflight(self) -> int:
        mask = 0
        for op in self.locks:
            if op.entered and op.mutation:
                mask |= op.mask
        return mask

    def check_map(self, dirty: int, sync: int) -> None:
        require(sync == self.out, f"out of sync: {sync:x}, to be {self.out:x}")
        inflight = self.inflight()
        needed = self.running() | self.fresh | self.covered | self.out & ~self.merged
        missing = needed & ~self.map.sure if not self.detached else 0
        require(not missing, f"may differ, and the map does not say so: {missing:x}")
        self.merged &= ~self.map.sure
        self.touch()
        kept = 0
        for n in self.kept:
            kept |= 1 << n
        gone = self.dirty & ~dirty
        if gone:
            require(self.connected, "cleared while disconnected")
            wrong = gone & (inflight | self.fresh | self.covered | self.out | kept)
            require(not wrong, f"cleared, and must not be: {wrong:x}")
            self.dirty &= ~gone
        require(dirty == self.dirty, f"dirty for no reason: {dirty & ~self.dirty:x}")
        ondisk = int.from_bytes(self.seq.bitmap("ondisk"), "little")
        require(ondisk == self.map.sure or self.detached, f"on disk: {ondisk:x}, and it says {self.map.sure:x}")
        unsure = ~self.map.sure
        waiting = any(op.entered and not op.started and op.mutation and op.mask & unsure for op in self.locks)
        if self.map.flight is None and not self.turn_detach and not self.detached:
            waiting = waiting and not self.parked
            require(not self.joining and not waiting, "somebody waits for the map, and no update is under way")
        ndirty = (self.out | inflight).bit_count()
        require(self.seq.s.ndirty == ndirty, f"ndirty is {self.seq.s.ndirty}, counted: {ndirty}")

    def touch(self) -> None:
        """The least recently written extents stop to be kept. Of several activations in one event the order is open."""
        writes = [op for op in self.entered_now if op.cmd == WRITE]
        for op in writes:
            for n in range(op.offset // self.geometry.extentsize, op.mask.bit_length()):
                self.kept.pop(n, None)
                self.kept[n] = None
        while len(self.kept) > self.geometry.keepdirty:
            self.kept.popitem(last=False)
        if len(writes) > 1:
            found = self.keep_list()
            require(len(found) == len(self.kept), "kept extents")
            self.kept = OrderedDict.fromkeys(reversed(found))
        elif writes:
            require(self.keep_list() == list(reversed(self.kept)), "kept extents")

    def keep_list(self) -> list[int]:
        ffi, arena = self.seq.ffi, self.seq.arena
        keep = ffi.cast("struct hast_keep *", ffi.cast("char *", arena) + arena.keep_off)
        found, at = [], keep[0].next
        while at:
            found.append(keep[at].extent)
            at = keep[at].next
        return found

    def state_of(self, op: Op) -> int:
        if op.over:
            return DONE
        if op.granting:
            return GRANTWAIT
        if op.settling:
            return DURABLEWAIT
        if op.cmd == FLUSH:
            return RUNNING if op.started else QUEUED
        if op.started:
            return RUNNING
        return MAPWAIT if op.entered else BLOCKED

    def check_states(self, states: bytes, pending: bytes) -> None:
        """Invariant 9."""
        wanted, with_whom = bytearray(len(states)), bytearray(len(states))
        for slot in self.claimed:
            wanted[slot] = CLAIMED
        for op in [*self.ops.values(), *self.chunks.values()]:
            wanted[op.slot] = self.state_of(op)
            with_whom[op.slot] = op.pending
        if self.map.flight is not None:
            wanted[self.seq.map_slot] = RUNNING
            with_whom[self.seq.map_slot] = L
        require(states == wanted, f"states are {list(states)}, to be {list(wanted)}")
        require(pending == with_whom, f"pending is {list(pending)}, to be {list(with_whom)}")

    def check_counters(self, states: bytes) -> None:
        s = self.seq.s
        inuse = sum(not op.over for op in self.ops.values()) + len(self.chunks) + (self.map.flight is not None)
        require(s.inuse == inuse, f"inuse is {s.inuse}, counted: {inuse}")
        require(self.seq.quiet() == (inuse == 0), "quiet")
        nclient = self.geometry.nclient
        require(s.nfree == states[:nclient].count(FREE), "nfree")
        free, slot = 0, s.free_head
        while slot != NONE and free <= nclient:
            require(states[slot] == FREE and slot < nclient, f"slot {slot} is in the free list")
            free, slot = free + 1, self.seq.bio[slot].next
        require(free == s.nfree, "length of the free list")
        remote = sum(op.pending >> REMOTE & 1 for op in [*self.ops.values(), *self.chunks.values()])
        require(s.nremote == remote, f"nremote is {s.nremote}, counted: {remote}")
        require(s.nactive == len(self.locks), "nactive")
        require((bool(s.connected), bool(s.joining)) == (self.connected, self.joining), "connected")
        require(bool(s.degraded_ok) == self.degraded, "degraded_ok")

    def check_events(self, events: int) -> None:
        if events & SYNC_DONE:
            require(self.sync_on and self.connected, "a resynchronisation ends that was not running")
            require(not self.out, "a resynchronisation ends, and extents differ")
            late = self.copies_fresh | self.copies_covered
            require(not late, f"a resynchronisation ends, and copies are not flushed: {late:x}")
            self.sync_on, self.peer_whole, self.settling = False, True, self.sync_remote
        events &= ~SYNC_DONE
        require(events == self.events, f"events are {events}, to be {self.events}")
        for name in FLAGS:
            require(bool(getattr(self.seq.s, name)) == getattr(self, name), name)

    def take_answers(self) -> list[Op]:
        found = self.seq.acked()
        require(len(found) == len(set(found)), "answered twice")
        wanted = {slot for slot in self.waiting_answers if self.ops[slot].held}
        require(set(found) == wanted, f"answered: {found}, to be answered: {sorted(wanted)}")
        told = []
        for slot in found:
            op = self.ops[slot]
            require(self.seq.bio[slot].result == op.result, f"slot {slot}: result {self.seq.bio[slot].result}")
            op.told = True
            told.append(op)
        for slot in self.waiting_answers - wanted:
            if self.ops[slot].over:
                del self.ops[slot]
        self.waiting_answers.clear()
        return told
