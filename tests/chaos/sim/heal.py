"""The end of a history: all faults end, both nodes get their roles, and what was promised has to come true.

They have to connect, synchronise and come to rest, in the order in which things happened and without chance; then
both hold the same, and what is held is what clients were told; then the other node takes over, and it is the same
there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hast.control import Role
from tests.chaos.sim.actions import a_net, connect_step, notice, say_synced
from tests.chaos.sim.dead_disk import outlive
from tests.chaos.sim.fate import Fate
from tests.chaos.sim.ggate import DOWN, UP
from tests.chaos.sim.oracle import Broken
from tests.chaos.sim.parts import WorkerFailed
from tests.chaos.sim.primary import Primary

if TYPE_CHECKING:
    from tests.chaos.sim.secondary import Secondary
    from tests.chaos.sim.world import World

ROUNDS = 3000
PATIENCE = 12  # rounds in which nothing moves


class Calm(Fate):
    """Nothing goes wrong, the oldest comes first."""

    def __init__(self) -> None:
        pass

    def draw(self, n: int) -> int:
        return 0

    def chance(self, n: int) -> int:
        return 0


def heal(w: World) -> None:
    w.fate = Calm()
    if w.tells:
        w.say("-- all faults end --")
    w.partition = False
    node = settle(w, roles(w).node)
    if w.lasting:
        outlive(w, node, move)
        settle(w, node)
    finish(w)


def roles(w: World) -> Primary:
    """One primary, one secondary."""
    primaries = w.primaries()
    if len(primaries) == 2:
        w.stop_role(1)
        primaries = w.primaries()
    if not primaries:
        # A node may find that it lacks something only when its connection ends.
        if not any(promote(w, n) for n in (0, 1) if may_lead(w, n)) and not promote(w, 0, force=True):
            raise Broken("no node can become primary, not even by force")
        primaries = w.primaries()
    part = primaries[0]
    if w.other(part) is None:
        w.start_role(1 - part.node, "secondary")
    return part


def promote(w: World, node: int, force: bool = False) -> bool:
    if w.parts[node] is not None:
        w.stop_role(node)
    return w.start_role(node, "primary", force=force)


def may_lead(w: World, node: int) -> bool:
    meta = w.disks[node].meta
    return not (meta.syncing or w.outdated[node]) or meta.prevrole is Role.PRIMARY


def settle(w: World, node: int) -> int:
    """Until both nodes are at rest and in sync. The primary, which need not be the one that it was."""
    still = 0
    for _ in range(ROUNDS):
        part = w.parts[node]
        if w.tells and len(w.told) > 2000:
            raise Broken("never at rest")
        if part is None or w.parts[1 - node] is None:
            raise Broken("a worker ended without a fault")
        assert isinstance(part, Primary)
        other: Secondary = w.parts[1 - node]
        before = part.stage
        if part.ill or (part.detached and part.seq.quiet()):
            w.fail(node, well=True)
            if w.parts[node] is None:  # the other one may have more
                node = roles(w).node
            continue
        if move(w, part, other, True):
            still = 0
            if before != DOWN and part.stage == DOWN:
                if part.refusal == "OUTDATED":
                    force(w, node)
                elif part.refusal:
                    give_up(w, 1 - node, part.refusal)
            continue
        if at_rest(part, other):
            return node
        part.lib.hast_seq_sync_tick(part.arena, 1000)
        part.look()
        if not part.s.sync_on:
            part.lib.hast_seq_idle(part.arena)
            part.look()
        still += 1
        if still > PATIENCE:
            raise Broken(f"nothing moves any more: {where(part, other)}")
    raise Broken(f"never at rest: {where(part, other)}")


def where(part: Primary, other: Secondary) -> str:
    s = part.s
    return (
        f"connection {part.stage}, sequencer connected {s.connected}, {s.inuse} requests in it, copying {s.sync_on},"
        f" marked {part.seq.sync_map[0]:b}, secondary {'with' if other.conn else 'without'} a connection"
    )


def move(w: World, part: Primary, other: Secondary, stores: bool) -> bool:
    """One thing that can be done. stores: what could not be stored is tried again."""
    if part.mail:
        w.guarded(part, part.work)
    elif part.stage == UP and part.lost:
        part.take_down()
    elif other.mail:
        w.guarded(other, other.work)
    elif part.orders:
        part.order()
    elif part.s.events:
        part.tell()
    elif part.disk_q:
        part.complete(0)
    elif other.disk_q:
        other.complete(0)
    elif a_net(w):
        pass
    elif part.conn is not None and part.conn.here and part.conn is not other.conn:
        notice(w, part.node)
    elif part.app and part.serving and (w.dead is None or part.s.nfree):
        op = part.app.pop(0)
        if not part.submit(op):
            raise Broken("no slot is free, and nothing is under way")
    elif stores and (part.unstored or part.retry is not None):
        part.try_again()
    elif part.asking:
        part.ask(other)
    elif part.teller and part.session is other.conn:
        return say_synced(w, part)
    else:
        return connect_step(w, part)
    return True


def at_rest(part: Primary, other: Secondary) -> bool:
    s = part.s
    return bool(
        part.stage == UP
        and s.connected
        and not s.sync_on
        and s.inuse == 0
        and not part.seq.sync_map[0]
        and part.peering.phase.name == "CONNECTED"
        and other.conn is part.conn
    )


def give_up(w: World, node: int, outcome: str) -> None:
    """The way out of a split-brain: this node's changes are thrown away."""
    part: Secondary = w.parts[node]
    if outcome == "SPLIT_BRAIN":
        if w.tells:
            w.say(f"{w.name(node)}: hastctl discard")
        w.counts["discard"] += 1
        part.discard()
    else:
        w.make_anew(node)


def force(w: World, node: int) -> None:
    """Nobody has all of the data: what this node has is to do."""
    w.stop_role(node)
    w.start_role(node, "primary", force=True)


def finish(w: World) -> None:
    """Both hold the same, and the other node can take over."""
    a, b = w.disks
    if a.cur != b.cur:
        differ = [s for s in range(w.sectors) if a.cur[s] != b.cur[s]]
        raise Broken(f"at rest, and sectors {differ} differ")
    w.oracle.check_clean(w.extent_sectors)
    w.oracle.check_node(0, "at rest")
    w.oracle.check_node(1, "at rest")
    node = w.primaries()[0].node
    w.stop_role(node)
    w.stop_role(1 - node)
    try:
        if not w.start_role(1 - node, "primary"):
            raise Broken("in sync and at rest, and the other node may not take over")
    except WorkerFailed:
        raise Broken("a worker ended without a fault") from None
