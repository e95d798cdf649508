"""A simulated secondary: the worker of hast/secondary.py step by step, and the order of hast/ffi/recv_secondary.c.

The order is re-stated here, because in production it is part of a pump that owns sockets: requests that overlap
start in the order in which they came, a flush starts when all before it are over, and nothing behind it starts
before it is.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from hast.control import Role
from hast.errors import DataError
from hast.handshake import first_request
from hast.notice import AHEAD, Notice, heed
from hast.promotion import discarding
from tests.chaos.sim.oracle import Broken
from tests.chaos.sim.parts import Conn, Died, Part, Request, StoreFailed, WorkerFailed
from tests.chaos.sim.shake import TOKEN, Shaken, shake

if TYPE_CHECKING:
    from hast.metadata import Metadata
    from tests.chaos.sim.primary import Primary
    from tests.chaos.sim.world import World

READ, FLUSH = 1, 4
EIO = 5


class Secondary(Part):
    """conn: the connection whose requests are here; lost: nothing more comes from it."""

    role = "secondary"

    def __init__(self, world: World, node: int) -> None:
        super().__init__(world, node)
        self.conn: Conn | None = None
        self.first = False
        self.keepmap = False
        self.ahead: tuple[int, int] | None = None  # the pair of the answer to such a notice
        self.mail: deque[str] = deque()
        self.queue: deque[Request] = deque()
        self.active: list[Request] = []
        self.disk_q: list[Request] = []
        self.flushing: Request | None = None
        self.unstored = 0  # memsync writes that were said to be received, and are not on the disk
        self.ill = False  # a flush has failed on this connection

    def start(self) -> None:
        self.disk.settle()
        self.store(replace(self.meta, prevrole=Role.SECONDARY))

    def store(self, meta: Metadata) -> None:
        """hast.secondary.Secondary._store(): it may be the flush that fails, and the cache is lost with it."""
        try:
            super().store(meta)
        except StoreFailed:
            if self.world.fails_flush[self.node] and self.world.fate.draw(2):
                self.flush_failed(self.disk.mark())
                self.lose()
            raise

    def flush_failed(self, mark: int) -> None:
        self.ill = self.conn is not None
        self.world.doubt[self.node] = self.world.lost[self.node] = True
        self.oracle.lost(self.node, self.disk.flush_failed(mark, self.world.fate))
        self.world.soften()

    @property
    def target(self) -> bool:
        """Of a synchronisation that is not complete, as its status says."""
        return self.meta.syncing

    # ---- the handshake ----

    def lose(self) -> None:
        """No more requests; what was received goes to the disk."""
        if self.conn is not None:
            self.conn.there = False

    def may_answer(self) -> bool:
        """The old connection's stages have ended."""
        return self.conn is None or not (self.queue or self.active or self.flushing)

    def answer(self, primary: Primary) -> Shaken:
        """Step 2. What it makes durable is so when this returns. Raises Died, WorkerFailed (the handshake fails)."""
        world, fate = self.world, self.world.fate
        self.part()
        made = shake(
            primary.shaking,
            primary.peering.version,
            primary.peering.virgin,
            primary.keepmap,
            self.meta,
            self.disk.map,
            world.doubt[self.node],
        )
        world.outcomes[made.outcome] += 1
        if world.tells:
            world.say(f"{world.name(self.node)}: decides {made.outcome}")
        if made.outcome == "STRANGERS":
            raise Broken("two components that belong together are taken for strangers")
        if made.discards:
            self.oracle.alone[self.node].clear()
        if made.map is not None:
            self.write_map(made.map)
        if world.dies_shaking and fate.chance(16):
            raise Died(self.node, bool(fate.draw(2)) and world.power_storing)
        self.store(made.metadata)
        if made.outcome not in ("SPLIT_BRAIN", "RESUID_MISMATCH", "OUTDATED", "STRANGERS"):
            world.doubt[self.node] = world.lost[self.node] = False
            world.outdated[self.node] = ""
        if world.dies_shaking and fate.chance(16):
            raise Died(self.node, bool(fate.draw(2)) and world.power_storing)
        return made

    def serve(self, conn: Conn, keepmap: bool) -> None:
        self.conn = conn
        self.keepmap = keepmap
        self.first = self.ill = False
        self.unstored = 0

    def drop(self) -> None:
        if self.conn is not None:
            self.conn.there = False
            self.conn = None

    def part(self) -> None:
        """hast.secondary.Secondary._drop(), once the stages have ended. Raises Died."""
        if self.conn is None:
            return
        self.drop()
        if self.unstored or self.ill:
            self.lacks()

    def lacks(self) -> None:
        """hast.secondary.Secondary._lacks()."""
        self.world.doubt[self.node] = self.world.lost[self.node] = True
        lacking = replace(self.meta, syncing=True, unsaid=True)
        if lacking == self.meta:
            return
        self.world.counts["lacks what it had received"] += 1
        try:
            self.store(lacking)
        except StoreFailed:
            self.meta = lacking

    def stages_die(self) -> None:
        """A stage was killed, and with it the others end. What the disk had may happen or not."""
        self.give_up_disk()
        self.queue.clear()
        self.active.clear()
        self.flushing = None
        self.mail.clear()
        self.part()

    def write_map(self, bits: int) -> None:
        """Raises WorkerFailed when that fails."""
        world = self.world
        if world.fails_map[self.node] and world.fate.chance(6):
            self.disk.map_failed(bits, world.fate)
            raise WorkerFailed
        self.disk.put_map(bits)

    def heed(self, word: str, conn: Conn | None) -> bool:
        """A notice of the primary whose session is conn. Whether it was heeded; raises WorkerFailed, Died."""
        session = TOKEN if self.conn is not None and self.conn is conn else b""
        try:
            heeded = heed(Notice("r", TOKEN, word), session, self.meta)
        except DataError:
            return False
        if heeded.map is not None:
            self.keepmap = True
            self.write_map(int.from_bytes(heeded.map, "little"))
        self.store(heeded.metadata)
        if word == AHEAD:
            # It may be given up no more: the other node's component is not what clients were told.
            self.oracle.alone[self.node].add(self.oracle.new())
            self.ahead = (heeded.metadata.pair.localcnt, heeded.metadata.pair.remotecnt)
        return True

    def discard(self) -> None:
        """hastctl discard."""
        self.store(discarding(self.meta))

    # ---- the worker ----

    def work(self) -> None:
        """One message of the stages."""
        word = self.mail.popleft()
        if word == "first" and not self.keepmap:
            try:
                self.store(first_request(self.meta))
                self.write_map(0)
            except WorkerFailed:
                return
            if self.world.tells:
                self.world.say(f"{self.world.name(self.node)}: clears its map")

    # ---- requests ----

    def receive(self) -> None:
        conn = self.conn
        assert conn is not None
        request = conn.req.popleft()
        if not self.first:
            self.first = True
            self.mail.append("first")
        if request.data is not None:
            self.oracle.appears(self.node, request.first, request.data)
            # After a complete synchronisation copies of single extents lack nothing but what was written without it.
            if conn.target and request.chunk and (not conn.complete or self.oracle.alone[1 - self.node]):
                self.oracle.mixed[self.node] = conn
        if request.memsync:
            self.unstored += 1
            conn.rep.append((request, True, 0))
        self.queue.append(request)
        self.run_queue()

    def run_queue(self) -> None:
        queue = self.queue
        while queue and self.flushing is None:
            request = queue[0]
            if request.cmd == FLUSH:
                if self.active:
                    return
                self.flushing = queue.popleft()
                request.mark = self.disk.mark()
                self.disk_q.append(request)
                return
            queue.popleft()
            request.blockers = sum(self.conflict(earlier, request) for earlier in self.active)
            self.active.append(request)
            if request.blockers == 0:
                self.disk_q.append(request)

    @staticmethod
    def conflict(x: Request, y: Request) -> bool:
        if x.cmd == READ and y.cmd == READ:
            return False
        return x.first < y.first + y.count and y.first < x.first + x.count

    def complete(self, which: int) -> None:
        """The disk is done with one of its requests."""
        request = self.disk_q.pop(which)
        error = self.execute(request)
        self.unstored -= request.memsync and not error
        if request.cmd == FLUSH:
            self.flushing = None
        else:
            self.active.remove(request)
            for later in self.active:
                if later.blockers and self.conflict(request, later):
                    later.blockers -= 1
                    if later.blockers == 0:
                        self.disk_q.append(later)
        conn = self.conn
        if conn is not None:
            conn.rep.append((request, False, error))
        self.run_queue()

    def execute(self, request: Request) -> int:
        world, fate, disk = self.world, self.world.fate, self.disk
        cmd = request.cmd
        if world.tells:
            what = "reads" if cmd == READ else "flushes" if cmd == FLUSH else f"stores {request.data} at"
            world.say(f"{world.name(self.node)}: {what} {request.first}+{request.count}")
        if cmd == READ:
            if world.fails_read[self.node] and fate.chance(8):
                return EIO
            request.data = disk.cur[request.first : request.first + request.count]
        elif cmd == FLUSH:
            if self.ill:
                return EIO
            if world.fails_flush[self.node] and fate.chance(6):
                self.flush_failed(request.mark)
                return EIO
            disk.flush(request.mark)
        else:
            if world.fails_write[self.node] and fate.chance(8):
                disk.may_happen(request.first, request.data, fate)
                return EIO
            disk.write(request.first, request.data)
            op = request.op
            if op is not None:
                op.there = True
                if op.acked:
                    self.oracle.holds(self.node, request.first, request.count, op.value)
        return 0

    # ---- the end ----

    def die(self) -> None:
        """Its processes are gone; what the disk had may happen or not."""
        self.give_up_disk()
        self.drop()

    def give_up_disk(self) -> None:
        fate = self.world.fate
        for request in self.disk_q:
            if request.cmd == FLUSH:
                if not self.ill and self.world.fails_flush[self.node] and fate.chance(6):
                    self.flush_failed(request.mark)  # which the disk stage has heard
            elif request.cmd != READ:
                self.disk.may_happen(request.first, request.data, fate)
        self.disk_q.clear()

    def finish(self) -> None:
        """The role ends in good order: what was received is on the component."""
        if self.conn is not None:
            self.conn.there = False
        while self.disk_q:
            self.complete(0)
        self.part()
        if self.attempts:  # hast.secondary.Secondary._store_now()
            with suppress(StoreFailed):
                self.store(self.meta)
