"""What the sequencer has to do, said a second time: the oracle of the random histories.

Written from the invariants and not from the C code. It keeps no epochs, lists or counters of blockers, but sets that
say what is so: which mutations hold their ranges, which extents differ or may, which the activemap on disk says for
certain. After every single event everything that came out of the sequencer is compared with what these sets ask for
(tests/sim/oracle.py): each push, each answer, each event, the state of each slot, the bitmaps and the counters.

Here are the events. What is known is in model_state.py, what becomes of mutations in model_writes.py, of flushes in
model_flushes.py.
"""

from __future__ import annotations

from tests.sim.harness import FLUSH, LOCAL, LOCAL_FAILED, NEED_DEGRADED, READ, REMOTE, REMOTE_FAILED, WRITE
from tests.sim.model_flushes import Flushes
from tests.sim.model_state import Op, R


class Model(Flushes):
    """One method for each event; Oracle.observe() then compares."""

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

    def current(self, op: Op) -> bool:
        """Does the chunk belong to the resynchronisation that runs now?"""
        return self.sync_on and self.connected and op.generation == self.generation

    # ---- a local component that fails ----

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

    # ---- the worker ----

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
        self.given_up = self.no_turn = self.settling = self.join_failed = False
        self.joining = True
        bitmap &= self.all
        self.merging = bool(bitmap)
        self.merged |= bitmap & ~self.map.sure
        self.out |= bitmap
        self.dirty |= bitmap

    def sync_start(self, from_remote: bool) -> None:
        self.sync_begun = True
        if not self.turning:
            self.sync_on, self.sync_remote = not self.detached, from_remote
            self.generation += 1

    def sync_end(self) -> None:
        self.sync_on = self.sync_begun = False

    def disconnect(self) -> None:
        self.connected = self.joining = self.degraded = self.flush_whole = self.sync_on = False
        self.peer_whole = self.turning = self.turn_detach = self.sync_begun = self.confirming = False
        self.cache_lost = self.no_deletes = self.join_failed = False
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
