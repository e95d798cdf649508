"""What both roles of a node have in common: the connection between them, the ends of a worker, storing metadata."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hast.metadata import Metadata
    from tests.chaos.sim.world import World


class WorkerFailed(Exception):
    """The worker cannot go on; hastd starts it anew."""


class StoreFailed(WorkerFailed):
    """The disk does not take the metadata now."""


class Died(Exception):
    """The node's processes, or the node, died in the middle of it."""

    def __init__(self, node: int, power: bool) -> None:
        super().__init__()
        self.node, self.power = node, power


class Request:
    """On its way to the secondary and through it. op: the client's, or None (a copy, the sequencer's own flush)."""

    __slots__ = ("blockers", "chunk", "cmd", "count", "data", "first", "mark", "memsync", "op", "slot")

    def __init__(
        self, slot: int, cmd: int, first: int, count: int, data: Any, op: Any, memsync: bool, chunk: bool
    ) -> None:
        self.slot, self.cmd, self.first, self.count = slot, cmd, first, count
        self.data, self.op, self.memsync, self.chunk = data, op, memsync, chunk
        self.blockers = 0
        self.mark = 0


class Conn:
    """Two streams of messages. here, there: the primary's and the secondary's ends live, each as far as it knows.
    complete: everything was copied."""

    __slots__ = ("complete", "here", "outcome", "rep", "req", "target", "there")

    def __init__(self) -> None:
        self.here = self.there = True
        self.req: deque[Request] = deque()
        self.rep: deque[tuple[Request, bool, int]] = deque()
        self.target = self.complete = False
        self.outcome = ""


class Part:
    """A worker in a role; meta is its metadata in memory."""

    role = ""

    def __init__(self, world: World, node: int) -> None:
        self.world, self.node = world, node
        self.disk = world.disks[node]
        self.oracle = world.oracle
        self.meta: Metadata = self.disk.meta
        self.attempts: list[Metadata] = []  # each may be on disk instead of meta

    def store(self, meta: Metadata) -> None:
        """Make it durable. Raises StoreFailed, Died."""
        if meta == self.meta and not self.attempts:
            return
        if meta not in self.attempts:
            self.attempts.append(meta)
        world, disk = self.world, self.disk
        fate = world.fate
        if world.dead == self.node:
            raise StoreFailed
        if world.fails_meta[self.node] and fate.chance(12):
            disk.meta_failed(meta, fate)
            if world.tells:
                world.say(f"{world.name(self.node)}: storing the metadata fails")
            raise StoreFailed
        if world.dies_storing and fate.chance(24):
            power = world.power_storing and fate.draw(2) == 1
            if fate.draw(2):
                disk.put_meta(meta)
            else:
                disk.meta_failed(meta, fate)
            raise Died(self.node, power)
        disk.put_meta(meta)
        self.meta, self.attempts = meta, []
        world.counts["store"] += 1
        if world.tells:
            pair = meta.pair
            flags = "".join(f" {name}" for name in ("syncing", "alone", "discard") if getattr(meta, name, False))
            world.say(f"{world.name(self.node)}: stores {meta.prevrole.text} {pair.localcnt}/{pair.remotecnt}{flags}")
