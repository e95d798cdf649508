"""The model of the sequencer (tests/sim/model.py): what a flush promises, and who waits for one of the secondary."""

from __future__ import annotations

from tests.sim.harness import LOCAL, LOCAL_FAILED, NEED_DEGRADED, REMOTE, REMOTE_FAILED
from tests.sim.model_state import L, Op, R
from tests.sim.model_writes import Writes


class Flushes(Writes):
    """Flushes, and whatever waits until the secondary has it durably."""

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

    def settle_go_on(self) -> None:
        settlers, self.settlers = self.settlers, []
        for op in settlers:
            out_of_date = self.sync_remote and not self.turning and not self.settling
            if op.durable and (not op.error[LOCAL] or out_of_date):
                self.settled(op, 0)
            elif op.never and not self.turning:
                self.resolve(op)
            elif op.error[LOCAL] and (not self.strict or (self.settling and self.no_turn and not self.turning)):
                self.settled(op, op.error[LOCAL])
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

    def resolve(self, op: Op) -> None:
        """The secondary has not done it, as if that came to light now."""
        op.settling = op.never = False
        if op.mutation:
            op.error[REMOTE] = op.error[REMOTE] or 107
            self.mutation_progress(op)
        else:
            self.flush_over(op, op.error[LOCAL], False)
