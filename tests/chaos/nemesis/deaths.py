"""Faults: processes and nodes that die, or stop for a while (see common.py)."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable

from tests.chaos.nemesis.cluster import Cluster, wait
from tests.chaos.nemesis.common import Inject, one_primary, sides
from tests.chaos.nemesis.operator import Operator
from tests.e2e.pair import PairNode
from tests.e2e.relay import Way

# ---- deaths ----


def kill_process(side: str, kind: str) -> Inject:
    """kill -9 of one process; its node gets over it by itself."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = sides(cluster, side)
        if not cluster.usable(node):
            return False
        return cluster.kill(node, kind)

    return inject


def kill_twice(kind: str) -> Inject:
    """A stage of the primary, and at some moment after that the one in its place: maybe before that serves."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = cluster.primary
        if not cluster.usable(node) or not cluster.kill(node, kind):
            return False
        time.sleep(rng.choice([0, 0.02, 0.05, 0.1, 0.2, 0.3]))
        cluster.kill(node, kind)
        return True

    return inject


def lose_primary(cluster: Cluster, operator: Operator, rng: random.Random, how: Callable[[PairNode], None]) -> bool:
    node = cluster.primary
    if not one_primary(cluster):
        return False
    with cluster.excused(node):
        how(node)
        time.sleep(rng.choice([0, 0, 0.5]))
        operator.primary_gone(rng)
    return True


def lose_secondary(cluster: Cluster, operator: Operator, rng: random.Random, how: Callable[[PairNode], None]) -> bool:
    node = cluster.secondary
    if len(cluster.clients) > 1 or not cluster.alive(node):
        return False
    how(node)
    if rng.random() < 0.6:  # else it stays away until the round's end
        time.sleep(rng.uniform(0, 1.5))
        operator.revive(node, "secondary")
    return True


def kill_main(side: str) -> Inject:
    """kill -9 of hastd: the rest of the node ends by itself, and the operator sees to it."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        def how(node: PairNode) -> None:
            cluster.kill(node, "main")
            cluster.died(node)

        if not cluster.usable(sides(cluster, side)):
            return False
        return (lose_primary if side == "primary" else lose_secondary)(cluster, operator, rng, how)

    return inject


def kill_main_and_keeper(side: str) -> Inject:
    """Both who remember the role are gone at once: what is started then has none."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        def how(node: PairNode) -> None:
            for kind in rng.sample(["main", "keeper"], 2):
                cluster.kill(node, kind)
            cluster.died(node)

        if not cluster.usable(sides(cluster, side)):
            return False
        return (lose_primary if side == "primary" else lose_secondary)(cluster, operator, rng, how)

    return inject


def upgrade(side: str) -> Inject:
    """SIGUSR2: hastd begins anew in the same process, and goes on with its roles by itself."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = sides(cluster, side)
        if not cluster.usable(node) or len(cluster.clients) > 1:  # it does not go on beside another primary
            return False
        role, before = cluster.role(node), cluster.processes(node).get("worker")
        if role not in ("primary", "secondary"):
            return False
        assert node.hastd is not None
        node.hastd.send_signal(signal.SIGUSR2)

        def again() -> bool:
            return cluster.processes(node).get("worker", before) != before and cluster.role(node) == role

        wait(again, f"{node.node} is {role} again after its restart")
        return True

    return inject


def power_off(side: str, slaughter: bool) -> Inject:
    """The whole node, at once or one process after another."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        def how(node: PairNode) -> None:
            if slaughter:
                cluster.slaughter(node, rng)
            else:
                cluster.power_off(node)

        return (lose_primary if side == "primary" else lose_secondary)(cluster, operator, rng, how)

    return inject


def power_off_unheard(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The primary dies, and what it has sent in its last moments never arrives: only by that does an acknowledgement
    that came too early show. Not for as long as `timeout`, after which it would have gone on alone."""
    if not one_primary(cluster) or cluster.cures:
        return False
    node = cluster.primary
    if cluster.network is not None:
        cluster.network.lose(node.node)
    else:
        cluster.relays[node.node].trouble(there=Way(hold=True))
    time.sleep(rng.uniform(0.02, 0.7 * min(setup.timeout for setup in cluster.settings.values())))

    def how(node: PairNode) -> None:
        cluster.power_off(node)
        for relay in cluster.relays.values():
            relay.cut()
        cluster.heal_links()

    return lose_primary(cluster, operator, rng, how)


def power_off_both(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """First one, then the other; both come back."""
    if not one_primary(cluster):
        return False
    order = rng.sample(cluster.nodes, 2)
    with cluster.excused(cluster.primary):
        for node in order:
            cluster.power_off(node)
            time.sleep(rng.choice([0, 0.05, 0.3]))
        if rng.random() < 0.5:
            operator.revive(cluster.secondary, "secondary")
        operator.come_back(cluster.primary)
    return True


def restart(side: str) -> Inject:
    """hastd is stopped and started again, as an upgrade does."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = sides(cluster, side)
        if not one_primary(cluster) or not cluster.usable(node):
            return False

        def how(node: PairNode) -> None:
            code = node.stop()
            cluster.story.tell(f"hastd of {node.node} ended with {code}")

        return (lose_primary if side == "primary" else lose_secondary)(cluster, operator, rng, how)

    return inject


# ---- stops ----


def freeze(side: str, whole: bool, long: bool) -> Inject:
    """SIGSTOP for one process, or for all of a node; SIGCONT after a moment, or after longer than `timeout`."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = sides(cluster, side)
        if not cluster.usable(node):
            return False
        found = cluster.processes(node)
        kind = "all" if whole else rng.choice(sorted(found))
        pids = node.pids() if whole else [found[kind]]
        timeout = cluster.settings[node.node].timeout
        seconds = timeout + rng.uniform(0.5, 2) if long else rng.uniform(0.05, 0.8)
        cluster.story.tell(f"  {kind} of {node.node}, for {seconds:.2f} s")
        cure = cluster.stop_processes(node, pids)
        if long and rng.random() < 0.4:
            cluster.cures.append((f"SIGSTOP of {kind} of {node.node}", cure))
            time.sleep(min(seconds, 1))
        else:
            time.sleep(seconds)
            cure()
        return True

    return inject
