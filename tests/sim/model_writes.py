"""The model of the sequencer (tests/sim/model.py): how mutations are answered, and when they are over."""

from __future__ import annotations

from tests.sim.harness import ASYNC, CONNECTED, LOCAL, MAP_FAILED, MEMSYNC, NEED_DEGRADED, REMOTE
from tests.sim.model_state import L, Op, R, State


class Writes(State):
    """Mutations that the components have, and those that a map update has failed."""

    def mutation_progress(self, op: Op) -> None:
        self.try_answer(op)
        if op.pending:
            return
        both = bool(op.used & R) and not op.error[REMOTE]
        if op.result is None and not op.granting and self.waits(op, both):
            return
        if not both:
            self.peer_whole = False
            if not self.degraded and not op.result:
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

    def launch_again(self, op: Op) -> None:
        self.out |= op.mask
        op.started = op.received = op.memsync = False
        op.used, op.error = 0, [0, 0]
        if self.impossible(op):
            self.refuse(op, self.impossible(op))

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
        if not error:
            self.asked &= ~MAP_FAILED
            return False
        if self.joining and self.peers_map_kept():
            self.join()
        if self.turn(True):
            return False
        self.join_failed = self.join_failed or self.joining
        self.joining = False
        self.raise_once(MAP_FAILED)
        return not self.parked

    def peers_map_kept(self) -> bool:
        """Is what the secondary's own map says in the one on disk for certain?"""
        return not self.merging or (bool(self.seq.s.metaflush) and not self.out & ~self.map.sure)

    def join(self) -> None:
        """Requests go to the secondary from now on."""
        self.joining = self.degraded = False
        self.connected = True
        self.confirming = self.sync_remote
        self.events |= CONNECTED
        for op in self.locks:
            if op.mutation and op.started and not op.used & R:
                self.out |= op.mask

    def map_refuse(self, wanted: int, error: int) -> None:
        """Those go whose extents that very update was to make dirty. wanted: the bits that it has failed to set."""
        waiting = [op for op in self.locks if op.mutation and op.entered and not op.started]
        for op in waiting:
            if op.mask & ~self.map.sure & wanted:
                self.refuse(op, error)
