"""Random histories: a device, two disks, a worker and fate play against the sequencer, the model watches.

One seed gives one history, whatever the machine. A history is a row of episodes, each a new arena over the disks
that the last one left behind: it ends when the power fails, and then the nodes may differ only where the map says so.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.sim.disks import sectors
from tests.sim.episodes import Episodes, Odds
from tests.sim.harness import (
    DELETE,
    FLAG_ZERO,
    FLUSH,
    LOCAL,
    NONE,
    READ,
    RECEIVED,
    REMOTE,
    RING_DISK_DONE,
    RING_RECV_DONE,
    RING_SEND_DONE,
    SECTOR,
    WRITE,
)
from tests.sim.model_state import Op, require


class History(Episodes):
    """play() runs one; Broken is raised when the sequencer breaks a promise."""

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
        if rng.random() < 0.01:
            actions = [(self.settings, 3), (self.sync_end, 1)]
        elif rng.random() < self.odds.error / 50:
            actions = [(self.flush_of_the_worker_failed, 1)]
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

    # ---- what the components do ----

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
        if self.ill and op.cmd == FLUSH and component == LOCAL:
            error = 5
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
        """As ggate does it: not while something is being copied."""
        if self.seq.s.sync_on:
            return
        self.note("idle")
        self.seq.idle()
        self.observe()

    def tick(self) -> None:
        if self.model.sync_on:
            self.note("tick")
            self.seq.lib.hast_seq_sync_tick(self.seq.arena, self.rng.choice((0, 50, 50, 1000)))
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
        self.seq.s.no_deletes = self.model.no_deletes = rng.random() < 0.2
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

    def settings(self) -> None:
        """Other ones, while it runs."""
        self.note("settings")
        self.seq.s.detach_on_error = self.model.detach_on_error = self.rng.random() < 0.5
        self.observe()

    def sync_end(self) -> None:
        """The role is to end. (Here it goes on after all.)"""
        self.note("end of the copying")
        self.seq.lib.hast_seq_sync_end(self.seq.arena)
        self.model.sync_end()
        self.observe()

    def flush_of_the_worker_failed(self) -> None:
        """The disk stage, which is told first, fails all that come after it."""
        if self.model.detached or any(op.cmd == FLUSH and op.pending & 1 << LOCAL for op in self.everything()):
            return  # one that is under way has to fail as well, and this would be seen before that
        self.note("worker's flush failed")
        self.observe(take=True)
        self.ill = True
        self.disks[LOCAL].flush(-1, ordered=False)
        for sector, value in self.disks[LOCAL].flushed(-1, 5, self.rng).items():
            self.lost_here[sector] = min(self.lost_here.get(sector, value), value)
        self.seq.local_flush_failed()
        self.model.flush_failed(LOCAL, 5)
        self.admit_losses()
        self.observe()

    def give_up(self) -> None:
        self.note("give up")
        self.seq.give_up()
        self.model.give_up()
        self.observe()

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
        for _ in range(20000):
            self.odds = Odds()  # a power cut has other ones
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
            elif model.detached or self.ill or (model.sync_on and not model.has_source):
                self.power_cut()
            elif self.sync_due:
                self.sync_start()
            elif not self.seq.s.sync_on and self.seq.idle():
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
