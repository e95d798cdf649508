"""What happens in a history, one action at a time: steps that any system does all day (a disk completes, a message
arrives, a worker takes its next step), and faults.

True is returned when something was done; nothing is drawn before that is clear, so that a story holds only what
took place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from hast.notice import SYNCED
from tests.chaos.sim.ggate import ANSWERED, ASKED, DOWN, UP, Op
from tests.chaos.sim.primary import Primary
from tests.sim.harness import DELETE, FLUSH, READ, WRITE

if TYPE_CHECKING:
    from tests.chaos.sim.world import World

Action = Callable[["World"], bool]


def a_submit(w: World) -> bool:
    ready = [p for p in w.primaries() if p.serving and not p.stopping]
    if not ready:
        return False
    part = ready[w.fate.draw(2) % len(ready)]
    if part.app:
        op = part.app.pop(0)
        if not part.submit(op):
            part.app.insert(0, op)
            return False
        w.counts["issued again"] += 1
        return True
    kind = w.fate.draw(16)
    cmd = WRITE if kind < 9 else FLUSH if kind < 12 else READ if kind < 15 else DELETE
    first = (w.place + w.fate.draw(w.spread)) % w.sectors
    count = min(1 + w.fate.draw(w.longest), w.sectors - first, 8)
    if not part.submit(Op(cmd, first, count)):
        return False
    w.counts[("", "read", "write", "delete", "flush")[cmd]] += 1
    return True


def a_disk(w: World) -> bool:
    parts = [p for p in w.parts if p is not None and p.disk_q]
    if not parts:
        return False
    part = parts[w.fate.draw(2) % len(parts)]
    part.complete(w.fate.draw(len(part.disk_q)))
    w.counts["disk"] += 1
    return True


def a_net(w: World) -> bool:
    """A message arrives."""
    if w.partition:
        return False
    ways: list[Callable[[], object]] = []
    for part in w.parts:
        conn = part.conn if part is not None else None
        if part is None or conn is None:
            continue
        if part.role == "secondary":
            if conn.there and conn.req:
                ways.append(part.receive)
            elif conn.there and not conn.here:
                ways.append(partial(notice, w, part.node))
        elif conn.here and conn.rep:
            ways.append(part.reply)
        elif conn.here and not conn.there:
            ways.append(partial(notice, w, part.node))
    if not ways:
        return False
    ways[w.fate.draw(2) % len(ways)]()
    w.counts["message"] += 1
    return True


def a_work(w: World) -> bool:
    """A worker or ggate takes a message."""
    ways: list[tuple[Any, Callable[[], None]]] = []
    for part in w.parts:
        if part is None:
            continue
        if part.mail:
            ways.append((part, part.work))
        if part.role == "primary":
            if part.orders:
                ways.append((part, part.order))
            if part.s.events:
                ways.append((part, part.tell))
    if not ways:
        return False
    part, step = ways[w.fate.draw(len(ways))]
    w.guarded(part, step)
    w.counts["worker"] += 1
    return True


def a_connect(w: World) -> bool:
    """The primary's keeper of the connection does its next step."""
    parts = w.primaries()
    if not parts:
        return False
    part = parts[w.fate.draw(2) % len(parts)]
    return connect_step(w, part)


def connect_step(w: World, part: Primary) -> bool:
    other = w.other(part)
    stage = part.stage
    if stage == DOWN:
        if other is None or w.partition:
            if part.first:
                part.attempt_failed()
                return True
            return False
        part.knock(other)
    elif stage == ASKED:
        if other is None or w.partition:
            part.attempt_failed()
        elif not other.may_answer():
            return False
        else:
            if w.tells:
                w.say(f"{w.name(part.node)}: handshake")
            w.counts["handshake"] += 1
            w.guarded(other, lambda: part.second(other))
    elif stage == ANSWERED:
        w.guarded(part, part.establish)
    elif stage == UP and part.lost:
        part.take_down()
    else:
        return False
    return True


def a_idle(w: World) -> bool:
    parts = w.primaries()
    if not parts:
        return False
    part = parts[w.fate.draw(2) % len(parts)]
    if part.s.sync_on:
        return False  # ggate does not, either
    part.lib.hast_seq_idle(part.arena)
    part.look()
    w.oracle.check_clean(w.extent_sectors)
    return True


def a_tick(w: World) -> bool:
    parts = w.primaries()
    if not parts:
        return False
    part = parts[w.fate.draw(2) % len(parts)]
    part.lib.hast_seq_sync_tick(part.arena, (50, 50, 200, 1000)[w.fate.draw(4)])
    part.look()
    return True


def a_crash(w: World) -> bool:
    node = w.fate.draw(2)
    if w.parts[node] is None:
        return False
    w.crash(node, False)
    return True


def a_power(w: World) -> bool:
    if w.parts[0] is None and w.parts[1] is None:
        return False
    which = w.fate.draw(3)  # one of them, or both
    for node in (0, 1):
        if which in (node, 2):
            w.crash(node, True)
    return True


def a_boot(w: World) -> bool:
    """A node that is down gets a role: secondary where the other one is primary."""
    for node in (0, 1):
        if w.parts[node] is None:
            other = w.parts[1 - node]
            role = "secondary" if other is not None and other.role == "primary" else "primary"
            if role == "primary" and w.fate.draw(2):
                role = "secondary"
            w.start_role(node, role)
            return True
    if w.primaries():
        return False
    return a_role(w)


def a_stage(w: World) -> bool:
    """A stage dies; its worker does not."""
    primaries = [p for p in w.primaries() if p.serving]
    parts = [*primaries, *(p for p in w.parts if p is not None and p.role == "secondary" and p.conn is not None)]
    if not parts:
        return False
    part = parts[w.fate.draw(2) % len(parts)]
    if w.tells:
        w.say(f"{w.name(part.node)}: a stage dies" + (", all are started anew" if part in primaries else ""))
    w.guarded(part, part.restart_stages if part in primaries else part.stages_die)
    w.counts["stages restarted" if part in primaries else "secondary's stages lost"] += 1
    return True


def a_worker(w: World) -> bool:
    node = w.fate.draw(2)
    if w.parts[node] is None:
        return False
    w.fail(node)
    return True


def a_cut(w: World) -> bool:
    """Both ends notice that the connection is gone."""
    done = notice(w, 0) | notice(w, 1)
    w.counts["cut"] += done
    return done


def a_half(w: World) -> bool:
    """One end notices, the other one does not."""
    done = notice(w, w.fate.draw(2))
    w.counts["half-open"] += done
    return done


def notice(w: World, node: int) -> bool:
    part = w.parts[node]
    if part is None or part.conn is None:
        return False
    if part.role == "secondary":
        if not part.conn.there:
            return False
        part.lose()
    else:
        if not part.conn.here:
            return False
        part.conn.here = False
        part.mail.append(("lost", 0, 0, 0, 0, 0))
    if w.tells:
        w.say(f"{w.name(node)}: connection lost")
    return True


def a_partition(w: World) -> bool:
    w.partition = not w.partition
    if w.tells:
        w.say("network: " + ("gone" if w.partition else "back"))
    w.counts["network"] += 1
    if w.partition and w.fate.draw(2):
        notice(w, 0)
        notice(w, 1)
    return True


def a_role(w: World) -> bool:
    """Somebody changes a role."""
    node = w.fate.draw(2)
    part = w.parts[node]
    if part is None:
        return False
    if part.role == "secondary":
        other = w.parts[1 - node]
        if other is not None and other.role == "primary" and not w.dual:
            return False
        force = part.target and w.forces and w.fate.draw(3) == 2
        if part.target and not force:
            w.counts["promotion refused"] += 1
            return True
        w.stop_role(node)
        w.start_role(node, "primary", force)
    else:
        w.stop_role(node)
        w.start_role(node, "secondary")
    w.counts["role change"] += 1
    return True


def a_notice(w: World) -> bool:
    """The primary tells the secondary something beside the connection."""
    if w.partition:
        return False
    for part in w.primaries():
        if part.teller:
            return say_synced(w, part)
    return False


def a_outage(w: World) -> bool:
    """What follows from a local component that takes not even its metadata, or from the loss of the other node."""
    for part in w.primaries():
        if part.asking:
            part.ask(w.other(part))
            return True
        if part.unstored or part.retry is not None:
            w.guarded(part, part.try_again)
            return True
        if part.patient and part.stage == DOWN and w.fate.draw(4) == 3:
            part.give_up()
            w.counts["given up"] += 1
            return True
    return False


def say_synced(w: World, part: Primary) -> bool:
    other = w.other(part)
    if other is None:
        return False

    def step() -> None:
        if other.heed(SYNCED, part.session):
            part.teller = False

    w.guarded(other, step)
    w.counts["notice"] += 1
    return True


def a_discard(w: World) -> bool:
    """hastctl discard, also where there is no split-brain."""
    node = w.fate.draw(2)
    part = w.parts[node]
    if part is None or part.role != "secondary":
        return False
    w.guarded(part, part.discard)
    w.counts["discard"] += 1
    return True


def a_anew(w: World) -> bool:
    """A secondary's component is made anew."""
    node = w.fate.draw(2)
    part = w.parts[node]
    if part is None or part.role != "secondary":
        return False
    w.make_anew(node)
    return True


def a_settings(w: World) -> bool:
    """on-io-error is another one from now on."""
    w.detach = 1 - w.detach
    for part in w.primaries():
        part.s.detach_on_error = w.detach
    w.counts["settings"] += 1
    return True


def drain(w: World, part: Primary) -> None:
    """A primary that ends answers what is under way, as far as the other node lets it."""
    part.stopping = True
    for _ in range(100):
        if part.seq.quiet() or w.parts[part.node] is not part:
            return
        if part.disk_q:
            part.complete(0)
        elif part.mail:
            w.guarded(part, part.work)
        elif part.orders:
            part.order()
        elif part.s.events:
            part.tell()
        elif not a_net(w):
            other = w.other(part)
            if other is not None and other.disk_q:
                other.complete(0)
            else:
                return


ACTIONS: list[Action] = [
    a_submit, a_disk, a_net, a_work, a_connect, a_idle, a_tick, a_crash, a_power, a_boot, a_stage, a_worker, a_cut,
    a_half, a_partition, a_role, a_notice, a_discard, a_anew, a_outage, a_settings,
]  # fmt: skip
NUMBER = {action.__name__[2:]: n for n, action in enumerate(ACTIONS)}


def table(pace: int, **faults: bool) -> list[int]:
    """Numbers of actions, each as often as it is likely. pace: how much clients do."""
    weights = {
        "submit": (20, 40, 80, 120)[pace], "disk": 110, "net": 110, "work": 80, "connect": 30, "idle": 6, "tick": 10,
        "crash": 4 * faults["crash"], "power": 4 * faults["power"], "stage": 4 * faults["stage"],
        "worker": 4 * faults["worker"], "cut": 5 * faults["link"], "half": 5 * faults["half"],
        "partition": 5 * faults["link"], "role": 4 * faults["roles"], "boot": 20,
        "notice": 20, "outage": 20, "discard": 2 * faults["roles"], "anew": 2 * faults["anew"],
        "settings": 1,
    }  # fmt: skip
    return [NUMBER[name] for name, weight in weights.items() for _ in range(weight)]
