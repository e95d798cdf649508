"""A fault that lasts: at the end of some histories, when both nodes have the same, the primary's disk takes nothing any
more, neither data nor map nor metadata; and before that has come to light, or after, other things happen.

The secondary has everything and goes on to have it, as nothing can be acknowledged without it. So, whenever the network
is there for long enough, they have to be connected, and whatever clients ask for is done, without an error.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from tests.chaos.sim.actions import notice
from tests.chaos.sim.ggate import DOWN, UP, Op
from tests.chaos.sim.oracle import Broken
from tests.chaos.sim.primary import Primary
from tests.sim.harness import DELETE, FLUSH, READ, WRITE

if TYPE_CHECKING:
    from tests.chaos.sim.secondary import Secondary
    from tests.chaos.sim.world import World

Move = Callable[["World", Primary, "Secondary", bool], bool]

ROUNDS = 2000
PATIENCE = 12  # rounds in which nothing moves


def outlive(w: World, node: int, move: Move) -> None:
    """move: tests.chaos.sim.heal.move()."""
    random = Random(w.how)
    if w.disks[1 - node].map:
        return  # it has not cleared its own map, which could not be merged here: then it is not used
    w.dead = node
    if w.tells:
        w.say(f"-- the disk of {w.name(node)} takes nothing any more --")
    for _ in range(random.randrange(8)):
        happen(w, node, random)
        for _ in range(random.randrange(20)):
            move(w, primary(w, node), secondary(w, 1 - node), True)
    w.partition = False
    if w.tells:
        w.say("-- the network is there --")
    calm(w, node, move)
    if not primary(w, node).s.connected:
        raise Broken("not connected, although the secondary has everything")
    for _ in range(6):
        op = request(w, random)
        if not primary(w, node).submit(op):
            raise Broken("no slot is free, and nothing is under way")
        calm(w, node, move)
        if op.result != 0:
            raise Broken(f"error {op.result} for a request that the secondary could do")
    w.dead = None
    w.counts["dead disk outlived"] += 1
    w.fail(node, well=True)


def primary(w: World, node: int) -> Primary:
    part = w.parts[node]
    if not isinstance(part, Primary):
        raise Broken("a worker ended because of a disk that its node could do without")
    return part


def secondary(w: World, node: int) -> Secondary:
    part = w.parts[node]
    if part is None or isinstance(part, Primary):
        raise Broken("the secondary's worker ended without a fault")
    return part


def request(w: World, random: Random) -> Op:
    cmd = random.choice((WRITE, WRITE, WRITE, READ, DELETE, FLUSH))
    first = random.randrange(w.sectors)
    return Op(cmd, first, 1 + random.randrange(min(4, w.sectors - first)))


def happen(w: World, node: int, random: Random) -> None:
    """Something, while the disk is dead."""
    part, what = primary(w, node), random.randrange(10)
    if what < 5:
        part.submit(request(w, random))
    elif what == 5:
        w.partition = not w.partition
        if w.tells:
            w.say("network: " + ("gone" if w.partition else "back"))
        cut(w)
    elif what == 6:
        cut(w)
    elif what == 7:
        part.restart_stages()
    elif what == 8:
        w.fail(random.randrange(2))
    elif part.patient and part.stage == DOWN:
        part.give_up()


def cut(w: World) -> None:
    for n in (0, 1):
        notice(w, n)


def calm(w: World, node: int, move: Move) -> None:
    """Until nothing is under way, and there is nothing more to be done."""
    still = 0
    for _ in range(ROUNDS):
        part = primary(w, node)
        if move(w, part, secondary(w, 1 - node), False):
            continue
        s = part.s
        if part.stage == UP and s.connected and s.inuse == 0 and not s.sync_on and not part.app:
            return
        still += 1
        if still > PATIENCE:
            raise Broken(f"nothing moves any more with a dead disk: stage {part.stage}, {part.s.inuse} requests")
        if s.sync_on:
            part.lib.hast_seq_sync_tick(part.arena, 1000)
            part.look()
        elif part.unstored or part.retry is not None:
            part.try_again()
    raise Broken("never calm with a dead disk")
