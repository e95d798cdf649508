"""A simulated primary: the worker of hast/primary.py, hast/link.py and hast/outage.py, step by step, above its ggate.

Each method is one step that in production happens without a pause; a crash, a message or another node's step may come
between any two.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hast import boot, peering, promotion
from hast.control import Role
from hast.handshake import Agreement
from hast.metadata import Pair
from hast.notice import AHEAD
from hast.peering import Peering
from tests.chaos.sim.arena import Arena
from tests.chaos.sim.ggate import ANSWERED, ASKED, DOWN, PARTING, UP, Ggate, Op
from tests.chaos.sim.parts import Conn, StoreFailed, WorkerFailed
from tests.sim.harness import (
    CONNECTED,
    LOCAL_FAILED,
    LOSS_TOLD,
    MAP_FAILED,
    NEED_DEGRADED,
    REMOTE_FAILED,
    SYNC_DONE,
)

if TYPE_CHECKING:
    from hast.metadata import Metadata
    from tests.chaos.sim.secondary import Secondary
    from tests.chaos.sim.world import World


class Primary(Ggate):
    """stage: of the connection. serving: clients may send requests."""

    def __init__(self, world: World, node: int, arena: Arena) -> None:
        super().__init__(world, node, arena)
        self.peering = Peering()
        self.lost = False
        self.first = True  # the first attempt to connect is not over
        self.serving = self.stopping = False
        self.keepmap = False
        self.shaking: Any = None  # the metadata that the handshake is about
        self.agreement: Agreement | None = None
        self.coming: Conn | None = None  # of the handshake
        self.session: Conn | None = None  # for notices
        self.refusal = ""  # the outcome for which the secondary has refused last
        self.teller = False  # the secondary is to be told that the synchronisation is complete
        self.asking = False  # or that it is ahead
        self.asked: Any = None  # the session in which it is to be asked that
        self.asked_meta: Any = None  # and what was stored when it was
        self.answer: tuple[Pair | None] | None = None  # what it has stored, on its way; None in it: nobody knows
        self.unstored = self.again = False  # "in sync" is to be stored; and was, when the component failed
        self.retry: int | None = None  # number of the question whose answer could not be stored
        self.void: int | None = None  # of one that is void if the connection turns out to be used
        self.patient = False  # hast.alone.Alone.patience
        self.app: list[Op] = []  # requests to be issued again
        self.running = False  # it has stages

    # ---- start and end ----

    def start(self) -> None:
        """Up to the stages; raises WorkerFailed, Died, UnavailableError."""
        self.read_note()
        meta, virgin = promotion.as_primary(self.meta, self.world.new_resuid())
        self.store(meta)
        self.peering = Peering(virgin=virgin)
        self.start_stages()
        self.running = True
        self.lonely()

    def store(self, meta: Metadata) -> None:
        """hast.primary.Primary._store(): it may be the flush that fails, and the cache is lost with it."""
        try:
            super().store(meta)
        except StoreFailed:
            if self.running and self.world.fails_flush[self.node] and self.world.fate.draw(2):
                self.flush_failed()
            raise

    def flush_failed(self) -> None:
        """hast.primary.Primary._flush_failed()."""
        world = self.world
        if self.ill or self.detached:
            return
        world.counts["flush of the worker failed"] += 1
        self.all_failed()
        self.ill = world.doubt[self.node] = world.lost[self.node] = True
        self.gone.update(self.disk.flush_failed(self.disk.mark(), world.fate))
        self.oracle.lost(self.node, self.gone, self.served())
        world.soften()
        self.s.loss = LOSS_TOLD
        self.orders.append(("flush_failed", None))

    def read_note(self) -> None:
        """hast.opening.read_note()."""
        world, node = self.world, self.node
        if not world.outdated[node]:
            return
        known = replace(self.meta, syncing=True, unsaid=True)
        if world.outdated[node] == boot.TARGET:
            known = replace(known, prevrole=Role.SECONDARY)
        try:
            self.fill_map()
            self.store(known)
        except WorkerFailed:
            self.meta, self.attempts = known, []
            if promotion.as_primary(known, 1)[0] != known:
                raise
            self.detached = self.unrecorded = True
            return
        world.outdated[node] = ""

    def start_stages(self) -> None:
        """hast.primary.Primary._start_stages()."""
        self.retry = self.void = None  # asked by stages that are gone
        if self.meta.unmapped and not self.detached:
            self.fill_map()
            self.store(replace(self.meta, unmapped=False))
        world, node = self.world, self.node
        if self.running and not self.detached:
            meta = self.disk.meta
            if not world.flushed(node, "primary", False) or self.disk.meta != meta:
                self.ill = True  # the next worker knows it, where it may be primary at all
                raise WorkerFailed
        super().start_stages()

    def fill_map(self) -> None:
        """Raises WorkerFailed."""
        world, disk = self.world, self.disk
        full = world.mask(0, world.sectors)
        if world.dead == self.node:
            raise WorkerFailed
        if world.fails_map[self.node] and world.fate.chance(6):
            disk.map_failed(full, world.fate)
            raise WorkerFailed
        disk.put_map(full)

    def restart_stages(self) -> None:
        """A stage has died; the device stays, its requests are issued again, in any order."""
        fate = self.world.fate
        self.down()
        again = list(self.ops.values())
        self.abandon()
        self.start_stages()
        self.lonely()
        self.keep_for_later(again)
        self.stage, self.first, self.serving = DOWN, False, True
        for _ in range(len(again)):
            self.app.append(self.app.pop(fate.draw(len(self.app))))

    def keep_for_later(self, ops: list[Op]) -> None:
        for op in ops:
            again = Op(op.cmd, op.first, op.count)
            self.app.append(again)

    # ---- worker: messages of the stages ----

    def work(self) -> None:
        """hast.primary.Primary._stage_message()."""
        word, bits, to_sync, detach, number, unjoined = self.mail.popleft()
        if word == "lost":
            self.lose()
            return
        if word == "unjoined":
            self.unused()
            self.lose()
            return
        if word == "parted":
            self.down()
            return
        if bits & SYNC_DONE:
            self.retry = self.void = None
        self.link_events(bits, to_sync, unjoined)
        if bits & SYNC_DONE:
            self.remember()
        if bits & LOCAL_FAILED:
            self.local_failed(bool(detach))
        if bits & NEED_DEGRADED:
            self.go_degraded(number)

    def go_degraded(self, number: int) -> None:
        """hast.alone.Alone.go_degraded()."""
        if self.meta.syncing:
            self.retry, self.void = None, number if self.session is not None else None
            return
        again, self.retry, self.unstored = self.retry is not None, None, False
        alone = peering.wrote_alone(self.peering, self.meta)
        if self.session is not None and alone != self.meta:
            self.retry = number
            if again:
                self.lose()
            return
        try:
            self.store(alone)
        except StoreFailed:
            if self.world.fate.draw(4) == 3:
                self.orders.append(("refuse_grant", None))
            else:
                self.retry = number
            return
        self.remember()
        self.orders.append(("grant", number))

    def remember(self) -> None:
        """hast.primary.Primary._remember()."""
        if not self.unrecorded:
            self.world.doubt[self.node] = self.world.lost[self.node] = self.ill

    def unused(self) -> None:
        """What the handshake said of the own data has had no consequence."""
        meta = peering.unused(self.meta, self.shaking.syncing)
        if meta != self.meta or not self.only_raised():
            self.store(meta)

    def only_raised(self) -> bool:
        """hast.link.Owner.only_raised()."""
        return self.unrecorded or peering.only_raised(self.meta, self.attempts)

    def try_again(self) -> None:
        """What could not be stored."""
        if self.unstored:
            self.in_sync()
        elif self.retry is not None:
            self.go_degraded(self.retry)

    def link_events(self, bits: int, to_sync: int, unjoined: int) -> None:
        """hast.link.Link.sequencer()."""
        if bits & CONNECTED and self.stage in (UP, PARTING):
            self.peering, _ = peering.joined(self.peering, to_sync)
            self.mapped()
        if bits & SYNC_DONE:
            self.in_sync()
        if bits & REMOTE_FAILED:
            self.lose()
        elif bits & MAP_FAILED and self.peering.phase is peering.Phase.JOINING:
            if unjoined:
                self.not_joined()
            self.lose()

    def not_joined(self) -> None:
        """hast.link.Link._not_joined()."""
        assert self.agreement is not None
        if self.meta.syncing and peering.found_newer(self.agreement, self.attempts or [self.meta]):
            self.world.counts["superseded when joining"] += 1
            self.superseded(self.meta)

    def superseded(self, meta: Metadata) -> None:
        """hast.outage.Outage.superseded()."""
        with suppress(StoreFailed):
            self.store(replace(meta, syncing=True, unmapped=True))
        self.not_recorded(meta)

    def mapped(self) -> None:
        """hast.link.Link._mapped()."""
        if self.meta.unmapped and not self.unrecorded:
            with suppress(StoreFailed):
                self.store(replace(self.meta, unmapped=False))

    def in_sync(self) -> None:
        """hast.link.Link._in_sync()."""
        self.unstored = False
        if not self.peering.connected:
            return
        state, meta, _ = peering.in_sync(self.peering, self.meta)
        before = self.meta
        try:
            self.store(meta)
        except StoreFailed:
            self.unstored = True
            return
        self.peering = state
        if before.syncing and not meta.syncing:
            self.orders.append(("current", None))
        if self.session is not None and state.connected:
            self.teller = True

    def lose(self) -> None:
        if self.stage != UP or self.lost:
            return
        self.lost = True

    # ---- worker: a local component that fails, hast.outage.Outage ----

    @property
    def linked(self) -> bool:
        return self.stage in (UP, PARTING) and not self.lost and self.peering.connected

    def local_failed(self, detach: bool) -> None:
        """Outage.failed()."""
        if not self.linked:
            self.orders.append(("refused", None))
            return
        self.again, self.unstored = self.unstored, False
        meta = peering.in_sync(self.peering, self.meta)[1] if self.again else self.meta
        try:
            if detach:
                self.fill_map()
            self.store(replace(meta, syncing=True, unsaid=True))
        except WorkerFailed:
            self.asking, self.asked, self.answer = True, self.session, None
            return
        if self.again:
            self.peering = peering.in_sync(self.peering, self.meta)[0]
            self.teller = True
        self.peering, _ = peering.outdated(self.peering)
        self.turned(detach)

    def turned(self, detach: bool) -> None:
        self.world.counts["detached" if detach else "outdated"] += 1
        self.retry = self.void = None
        self.detached = self.detached or detach
        self.orders.append(("detach" if detach else "outdated", None))

    def ask(self, secondary: Secondary | None) -> None:
        """Outage._ask(): the other node is to store that it is ahead. It may do so and not be heard, or only when the
        connection is another one."""
        same = self.session is self.asked
        if self.answer is None and same and peering.may_say_ahead(self.peering, self.meta):
            self.asked_meta, self.answer = self.meta, (self.say_ahead(secondary),)
            return
        answer, self.answer, self.asking = self.answer, None, False
        pair = answer[0] if answer is not None else None
        if not same:
            self.world.counts["asked in vain"] += 1
            return
        if pair is None or self.meta != self.asked_meta:
            if answer is not None:
                self.lose()
            self.orders.append(("refused", None))
            self.unstored = self.again and self.linked
            return
        self.peering = peering.said_ahead(self.peering, pair)
        self.peering, _ = peering.outdated(self.peering)
        self.not_recorded(self.meta)

    def say_ahead(self, secondary: Secondary | None) -> Pair | None:
        """What it has stored then, as far as that is heard."""
        pair = None
        if secondary is not None and not self.world.partition:
            self.world.guarded(secondary, lambda: secondary.heed(AHEAD, self.session) and None)
            pair = Pair(*secondary.ahead) if secondary.ahead else None
            secondary.ahead = None
        return None if pair is None or self.world.fate.chance(4) else pair

    def not_recorded(self, meta: Metadata) -> None:
        """Outage._unrecorded()."""
        self.meta = replace(meta, syncing=True, unmapped=True)
        self.unrecorded = self.world.doubt[self.node] = True
        self.world.outdated[self.node] = boot.OUTDATED
        self.turned(True)
        self.lonely()

    def lonely(self) -> None:
        self.patient = self.meta.syncing

    def give_up(self) -> None:
        self.patient = False
        self.orders.append(("give_up", None))

    # ---- worker: the connection ----

    def knock(self, secondary: Secondary) -> None:
        """Step 1: the other node answers, and lets its old connection go."""
        self.shaking, self.keepmap = self.meta, self.unrecorded
        secondary.lose()
        self.stage = ASKED

    def attempt_failed(self) -> None:
        self.stage = DOWN
        self.coming = None
        if self.first:
            self.first = False
            self.serving = True

    def second(self, secondary: Secondary) -> None:
        """Step 2, on the secondary."""
        try:
            made = secondary.answer(self)
        except WorkerFailed:
            secondary.drop()
            self.attempt_failed()
            return
        if made.agreement is None:
            self.refusal = made.outcome
            self.attempt_failed()
            return
        self.refusal = ""
        self.coming = conn = Conn()
        conn.target, conn.outcome = made.target, made.outcome
        self.agreement = made.agreement
        secondary.serve(conn, self.keepmap)
        self.stage = ANSWERED

    def establish(self) -> None:
        """hast.link.Link._checked() and _establish()."""
        if self.meta != self.shaking:
            self.coming.there = self.coming.here = False
            self.attempt_failed()
            return
        assert self.agreement is not None and self.coming is not None
        try:
            self.peering = peering.met(self.peering, self.agreement)
            agreed, meta = peering.agreed(self.peering, self.agreement, self.keepmap)
        except peering.OutdatedError:
            self.coming.there = self.coming.here = False
            self.refusal = "OUTDATED"
            self.attempt_failed()
            return
        if self.coming.there:
            self.oracle.meets(self.node, self.coming.outcome, meta.syncing)
        self.peering = agreed
        try:
            self.store(meta)
        except StoreFailed:  # hast.link.Link._store()
            if meta != self.meta or not self.only_raised():
                if peering.found_newer(self.agreement, self.attempts or [meta]):
                    self.world.counts["superseded"] += 1
                    self.superseded(meta)
                self.coming.there = self.coming.here = False
                self.attempt_failed()
                return
            self.world.counts["not stored anew"] += 1
        self.lost = False
        self.conn, self.coming = self.coming, None
        self.session = self.conn
        self.stage = UP
        self.orders.append(("connect", (self.agreement, self.meta.syncing)))
        if self.first:
            self.first = False
            self.serving = True

    def take_down(self) -> None:
        """hast.link.Link._take_down()."""
        self.orders.append(("disconnect", None))
        self.stage = PARTING

    def down(self) -> None:
        self.stage = DOWN
        self.lost = self.teller = self.unstored = False
        self.session = None
        if self.void is not None:
            self.retry, self.void = self.void, None
        self.peering, _ = peering.lost(self.peering, 0.0)
        self.lonely()

    def die(self) -> None:
        """All its processes are gone."""
        self.abandon()
        if self.coming is not None:
            self.coming.here = False
