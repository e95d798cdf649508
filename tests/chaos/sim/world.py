"""Two nodes, the network between them, their clients and administrators, and what befalls them.

One seed is one history: a header says how it goes (which faults, how often, how large things are: each history has
its own few), then actions are drawn (actions.py). At the end everything heals, and what was promised has to be there
(heal.py). Faults are actions, or draws within the step that they hit (fate.py), so a history can be shortened by
leaving steps out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hast import boot, promotion
from hast.control import Role
from hast.errors import UnavailableError
from hast.metadata import Metadata, Pair
from tests.chaos.sim.actions import ACTIONS, drain, table
from tests.chaos.sim.arena import COLD, SHAPES, arena
from tests.chaos.sim.disk import Disk
from tests.chaos.sim.fate import Fate
from tests.chaos.sim.oracle import Broken, Oracle
from tests.chaos.sim.parts import Died, WorkerFailed
from tests.chaos.sim.primary import Primary
from tests.chaos.sim.secondary import Secondary
from tests.sim.harness import ASYNC, FLUSH, FULLSYNC, MEMSYNC, PRODUCTION, READ, Library

SECTOR = 512


class World:
    """A history under way."""

    def __init__(self, fate: Fate, library: Library = PRODUCTION, tells: bool = False) -> None:
        self.fate, self.library, self.tells = fate, library, tells
        self.told: list[str] = []
        self.counts: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.header()
        self.disks = [Disk(self.sectors, self.blank()) for _ in (0, 1)]
        self.oracle = Oracle(self.disks)
        self.parts: list[Primary | Secondary | None] = [None, None]
        self.doubt = [True, True]  # what hast.boot remembers
        self.outdated = ["", ""]  # the same: boot.OUTDATED or TARGET
        self.lost = [False, False]  # and that a flush has failed
        self.partition = False
        self.dead: int | None = None  # the node whose disk takes no writes
        self.resuids = 100
        self.begin()

    def header(self) -> None:
        """How this history goes."""
        draw = self.fate.draw
        self.mode = (FULLSYNC, MEMSYNC, ASYNC)[draw(3)]
        self.shape = draw(len(SHAPES))
        shape = SHAPES[self.shape]
        self.keepdirty, self.nclient = 1 + draw(4), 3 + draw(5)
        self.extent_sectors = shape["extentsize"] // SECTOR
        self.sectors = shape["extents"] * self.extent_sectors - shape.get("short", 0) // SECTOR
        self.used = draw(8) != 7  # else: never used before
        self.metaflush = draw(8) != 7
        self.lazy = draw(4) == 3  # ggate tells its events late
        self.longest = 1 + draw(4)
        bad = draw(8)
        faults = [draw(10) < bad for _ in range(22)]
        self.fails_meta = faults[0:2]
        self.fails_map = faults[2:4]
        self.fails_read = faults[4:6]
        self.fails_write = faults[6:8]
        self.fails_flush = faults[8:10]
        self.detach = draw(2)  # on-io-error
        self.dies_storing, self.dies_shaking = faults[10], faults[11]
        crash, power, stage, worker, link, half, roles, dual, self.forces, anew = faults[12:22]
        self.power_storing = power = power and self.metaflush
        self.dual = dual
        self.table = table(
            draw(4),
            crash=crash, power=power, stage=stage, worker=worker, link=link, half=half, roles=roles or dual,
            anew=anew,
        )  # fmt: skip
        self.steps = 30 + draw(110)
        self.place = draw(self.sectors)  # where clients mostly are
        self.spread = 1 + draw(self.sectors)
        self.dirty_max = (0, 4, COLD, COLD)[draw(4)]  # dirty extents from which on cold ones are cleared beside clients
        self.lasting, self.how = draw(4) == 3, draw(1 << 16)  # a fault that stays, at the end (dead_disk.py)

    def blank(self) -> Metadata:
        """Never used, or, in most histories, in sync. (keepdirty is the arena's here, so that handshakes are alike.)"""
        shape = SHAPES[self.shape]
        datasize = self.sectors * SECTOR
        meta = Metadata("r", datasize, shape["extentsize"], 1, 4096 + SECTOR)
        if not self.used:
            return meta
        return Metadata("r", datasize, shape["extentsize"], 1, 4096 + SECTOR, 1, Pair(1, 1))

    def new_resuid(self) -> int:
        self.resuids += 1
        return self.resuids

    def begin(self) -> None:
        """The usual: one is primary, the other one secondary."""
        for node, role in ((1, "secondary"), (0, "primary")):
            try:
                self.start_role(node, role)
            except Died as died:
                self.crash(died.node, died.power)

    # ---- small things ----

    @staticmethod
    def name(node: int) -> str:
        return "AB"[node]

    def say(self, what: str) -> None:
        self.told.append(what)

    def mask(self, first: int, count: int) -> int:
        """The extents of these sectors."""
        size = self.extent_sectors
        low, high = first // size, (first + count - 1) // size
        return ((1 << high - low + 1) - 1) << low

    def primaries(self) -> list[Primary]:
        return [part for part in self.parts if part is not None and part.role == "primary"]

    def other(self, part: Primary) -> Secondary | None:
        other = self.parts[1 - part.node]
        return other if other is not None and other.role == "secondary" else None

    def soften(self) -> None:
        """Something was lost for good: who has asked for it already is not promised more than there is."""
        for part in self.primaries():
            lo, there = self.oracle.lo[part.node], self.disks[1 - part.node].cur
            for op in part.owner.values():
                op.there = op.there and min(there[op.first : op.first + op.count]) >= op.value
            for op in part.ops.values():
                if op.cmd == READ:
                    op.floors = [min(a, b) for a, b in zip(op.floors, lo[op.first :], strict=False)]
                elif op.cmd == FLUSH:
                    op.promise = {s: value for s, value in op.promise.items() if value <= lo[s]}

    # ---- roles ----

    def start_role(self, node: int, role: str, force: bool = False, again: bool = False) -> bool:
        """hastd starts a worker. again: the role is not new. False when it refuses."""
        if self.tells:
            self.say(f"{self.name(node)}: becomes {role}{' by force' if force else ''}")
        self.counts[f"start {role}"] += 1
        if force:
            self.force(node)
        if not self.flushed(node, role, again):
            return True
        part: Primary | Secondary
        if role == "secondary":
            part = Secondary(self, node)
        else:
            part = Primary(self, node, arena(node, self.shape, self.keepdirty, self.nclient, self.library))
        before = self.disks[node].meta
        if self.outdated[node]:
            before = replace(before, syncing=True)
        self.parts[node] = part
        try:
            part.start()
        except WorkerFailed:
            self.parts[node] = None
        except UnavailableError:
            self.parts[node] = None
            self.counts["promotion refused"] += 1
            return False
        if role == "primary":
            self.lost[node] = self.lost[node] and again and not before.syncing
            self.promoted(node, before)
        return True

    def flushed(self, node: int, role: str, again: bool) -> bool:
        """hast.opening.flush(): whether the disk has done it; else there is no worker. What it has lost then, and the
        other node may have, must not be what a client is shown."""
        disk, fate = self.disks[node], self.fate
        meta = disk.meta
        primary = meta.prevrole is Role.PRIMARY
        if role == "primary" and ((meta.syncing and primary) or (again and primary and not self.lost[node])):
            return True
        target = replace(meta, syncing=True, unsaid=True, prevrole=Role.SECONDARY)
        whole = self.whole(node)
        if role == "secondary" and whole and meta.resuid != 0:
            self.lost[node] = False
        if not self.fails_flush[node] or not fate.chance(12):
            if role == "primary" and self.lost[node] and not (whole or meta.syncing):
                self.counts["a flush had failed before"] += 1
                if self.dead == node:
                    return False
                disk.put_meta(target)
            return True
        self.counts["flush for a role failed"] += 1
        lost = disk.flush_failed(disk.mark(), fate)
        self.lost[node] = True
        self.oracle.lost_alone(node, lost, whole or self.oracle.counted(node))
        if not whole:
            self.doubt[node] = True
            if self.dead == node or (self.fails_meta[node] and fate.draw(2)):
                disk.meta_failed(target, fate)
                self.outdated[node] = boot.TARGET
            else:
                disk.put_meta(target)
        self.soften()
        return False

    def whole(self, node: int) -> bool:
        """Nobody has more than this node's component (hast/opening.py)."""
        return promotion.whole(self.disks[node].meta)

    def force(self, node: int) -> None:
        """`hastctl role -f primary`, before the worker starts."""
        disk = self.disks[node]
        before = disk.meta
        if (self.outdated[node] or self.lost[node]) and not (before.syncing or self.whole(node)):
            before = replace(before, syncing=True, unsaid=True)
        elif before.syncing and (self.doubt[node] or self.lost[node]):
            before = replace(before, unsaid=True)
        if self.outdated[node]:
            self.oracle.accept(node)
        self.outdated[node], self.lost[node] = "", False
        after = promotion.forced(before, self.new_resuid())
        if after != disk.meta:
            disk.settle()
            self.oracle.gives_up(node)
            disk.put_meta(after)
            self.oracle.accept(node)
            self.oracle.alone[node].add(self.oracle.new())
            self.counts["forced"] += 1

    def promoted(self, node: int, before: Metadata) -> None:
        """What this node has is going to be shown to clients (a), (invariant 10)."""
        oracle, disk = self.oracle, self.disks[node]
        if oracle.mixed[node] and not (before.syncing and before.prevrole is Role.PRIMARY):
            raise Broken("invariant 10: promoted while its data is a mix of old and new")
        but, part = 0, self.parts[node]
        if part is not None and part.role == "primary" and part.unrecorded:
            but = (1 << self.sectors) - 1
        elif disk.meta.syncing:
            for s in range(self.sectors):
                if disk.map >> s // self.extent_sectors & 1:
                    but |= 1 << s
        oracle.check_node(node, "promoted", but)

    def stop_role(self, node: int) -> None:
        """In good order: what is under way is finished first, as far as it can be without the network."""
        part = self.parts[node]
        if part is None:
            return
        if part.role == "secondary":
            part.finish()
        else:
            if self.fate.draw(2) == 0:
                drain(self, part)
            if self.parts[node] is not part:
                return  # it died of that
            part.die()
        self.parts[node] = None

    # ---- catastrophes ----

    def crash(self, node: int, power: bool) -> None:
        """All processes of a node, or the node."""
        if self.tells:
            self.say(f"{self.name(node)}: {'POWER CUT' if power else 'CRASH'}")
        self.counts["power cut" if power else "crash"] += 1
        part = self.parts[node]
        if part is not None:
            part.die()
        self.parts[node] = None
        if power:
            self.lost[node] = False
            if self.outdated[node]:
                self.outdated[node] = ""
                self.oracle.accept(node)  # only the other node knows that this one is out of date
            self.disks[node].power_cut(self.fate)
            self.oracle.power_cut(node)
            self.doubt[node] = True
            self.soften()

    def fail(self, node: int, well: bool = False) -> None:
        """The worker ends with an error, and is started anew in the same role. well: an administrator has done that,
        and the disk works again; else the new worker knows of a flush that has failed, unless
        what that has lost is going to be copied."""
        part = self.parts[node]
        assert part is not None
        if self.tells:
            self.say(f"{self.name(node)}: worker ends, and starts anew")
        self.counts["worker restart"] += 1
        again = list(part.ops.values()) if part.role == "primary" else []
        part.die()
        self.parts[node] = None
        self.start_role(node, part.role, again=not well)
        new = self.parts[node]
        if new is not None and new.role == "primary":
            new.ill = part.ill and not well and not new.meta.syncing
        if new is not None and new.role == "primary" and self.fate.draw(2):
            new.keep_for_later(again)

    def make_anew(self, node: int) -> None:
        """hastctl create on it: what it had is given up. Its data is cleared, because in a pair of which neither was
        ever used what was never written is not the same on both."""
        if self.tells:
            self.say(f"{self.name(node)}: its component is made anew")
        self.counts["made anew"] += 1
        self.stop_role(node)
        disk = self.disks[node]
        used, self.used = self.used, False
        disk.settle()
        disk.put_meta(self.blank())
        self.used = used
        disk.put_map(0)
        disk.clear()
        for part in self.primaries():
            for op in part.owner.values():
                op.there = False
        self.outdated[node] = ""
        self.oracle.alone[node].clear()
        self.oracle.accept(node)
        if any(self.oracle.lo[1 - node]):  # what there is now is only there
            self.oracle.alone[1 - node].add(self.oracle.new())
        self.start_role(node, "secondary")

    # ---- a step ----

    def run(self) -> None:
        """All of it but the end."""
        fate, size = self.fate, len(self.table)
        random = fate.random
        table, begin, took = self.table, getattr(fate, "begin", None), getattr(fate, "took_place", None)
        left, tries = self.steps, 100 * self.steps
        while left > 0 and tries > 0:
            try:
                while left > 0 and tries > 0:
                    tries -= 1
                    number = table[int(random() * size)]
                    if begin is not None:
                        begin(number)
                    if ACTIONS[number](self):
                        left -= 1
                        if took is not None:
                            took()
            except Died as died:
                self.crash(died.node, died.power)
                left -= 1
                if took is not None:
                    took()

    def replay(self, steps: list[list[int]]) -> None:
        for step in steps:
            self.fate.begin(step, 1)
            self.act(step[0])

    def act(self, number: int) -> bool:
        try:
            return ACTIONS[number](self)
        except Died as died:
            self.crash(died.node, died.power)
        return True

    def guarded(self, part: Any, step: Callable[[], None]) -> None:
        """A worker's step, which may end it."""
        try:
            step()
        except WorkerFailed:
            self.fail(part.node)
