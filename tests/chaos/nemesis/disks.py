"""Faults: of a node's local disk, where that is a fault disk (see common.py and tests/faultdisk.py)."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from collections.abc import Callable

from tests.chaos.nemesis.cluster import Cluster, wait
from tests.chaos.nemesis.common import Inject, one_primary, safe, sides
from tests.chaos.nemesis.operator import DETACHED, Operator
from tests.chaos.nemesis.story import ViolationError
from tests.e2e.pair import PairNode
from tests.faultdisk import FaultDisk

Harm = Callable[[FaultDisk, random.Random], None]


def fail(kinds: str, *, some: bool = False) -> Harm:
    """Operations of these kinds fail: all of them, or just a few (some of them half done)."""

    def harm(disk: FaultDisk, rng: random.Random) -> None:
        if some:
            disk.fail(kinds, errno.EIO, count=rng.randint(1, 5), half=rng.random() < 0.5)
        else:
            disk.fail(kinds, errno.EIO)

    return harm


def lose(disk: FaultDisk, rng: random.Random) -> None:
    """The next flush fails, or the next few; what was not flushed before the first one that fails is gone, or not."""
    disk.fail("flush", errno.EIO, count=rng.choice([1, 1, 3]), lose=True)


def full(disk: FaultDisk, rng: random.Random) -> None:
    disk.full()


def readonly(disk: FaultDisk, rng: random.Random) -> None:
    disk.readonly()


def slow(disk: FaultDisk, rng: random.Random) -> None:
    disk.delay("all", rng.choice([5, 20, 100]))


def hang(disk: FaultDisk, rng: random.Random) -> None:
    disk.hang(rng.choice(["all", "write", "flush"]))


def under(cluster: Cluster, node: PairNode) -> FaultDisk | None:
    """The node's fault disk, unless it has a fault already."""
    busy = any(name.startswith(f"disk of {node.node}") for name, _ in cluster.cures)
    return None if busy or not node.disks else node.disks[0]


def has_all(cluster: Cluster) -> bool:
    """The primary can do without what its secondary's disk loses."""
    node = cluster.primary
    return cluster.usable(node) and not cluster.metadata(node).syncing and not cluster.behind(node)


def of_secondary(harm: Harm) -> Inject:
    """Clients are not to notice; it may last until the round's end."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = cluster.secondary
        disk = under(cluster, node)
        if disk is None or len(cluster.clients) > 1 or not cluster.alive(node):
            return False
        if harm is lose and not has_all(cluster):
            return False
        harm(disk, rng)
        seconds = rng.choice([rng.uniform(0.05, 1), cluster.setup.timeout + rng.uniform(0.5, 2)])
        cluster.story.tell(f"  for {seconds:.2f} s")
        if rng.random() < 0.3:
            cluster.cures.append((f"disk of {node.node}", disk.heal))
            time.sleep(min(seconds, 1))
        else:
            time.sleep(seconds)
            disk.heal()
        return True

    return inject


def lost_in_death(kind: str) -> Inject:
    """A flush of the secondary fails, and one of its processes is killed at about the same time. The disk stage is the
    only one that is told (docs/reliability.md, Not promised), so that one dies before."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = cluster.secondary
        disk = under(cluster, node)
        if disk is None or len(cluster.clients) > 1 or not cluster.usable(node) or not has_all(cluster):
            return False
        if early := kind != "disk" and rng.random() < 0.5:
            lose(disk, rng)
            time.sleep(rng.choice([0, 0.01, 0.05]))
        killed = cluster.kill(node, kind)
        if not early:
            lose(disk, rng)
        time.sleep(rng.uniform(0.2, 2))
        disk.heal()
        return killed

    return inject


def of_primary(harm: Harm, excused: bool = False) -> Inject:
    """With a secondary that has everything, clients are not to get an error; excused: they have to wait, though."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = cluster.primary
        disk = under(cluster, node)
        if disk is None or not one_primary(cluster) or not (excused or safe(cluster)):
            return False
        with cluster.excused(node) if excused else contextlib.nullcontext():
            harm(disk, rng)
            seconds = rng.choice([rng.uniform(0.05, 1), cluster.setup.timeout + rng.uniform(0.5, 2)])
            cluster.story.tell(f"  for {seconds:.2f} s")
            time.sleep(seconds)
            disk.heal()
        after(cluster, operator)
        return True

    return inject


def after(cluster: Cluster, operator: Operator) -> None:
    """The primary's disk is well again. Whether it is used is seen to at the round's end."""
    node = cluster.primary
    cluster.story.tell(f"  {cluster.describe(node)}, syncing {node.status()['syncing']}")
    if cluster.role(node) != "primary":
        raise ViolationError(f"{node.node} has become {cluster.role(node)}: its disk failed, the other one is well")


def unplugged(side: str) -> Inject:
    """The disk is gone, and back: it is used again after the operator has had it opened anew."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        node = sides(cluster, side)
        disk = under(cluster, node)
        if disk is None or len(cluster.clients) > 1 or not cluster.usable(node):
            return False
        if side == "primary" and not safe(cluster):
            return False
        disk.die()
        time.sleep(rng.uniform(0, cluster.setup.timeout))
        disk.start()
        cluster.caches[node].begin()  # that it was recorded went with it
        if side == "primary":
            wait(lambda: node.status()["syncing"] == DETACHED, f"{node.node} gives its disk up", 20)
            after(cluster, operator)
            operator.open_anew(rng)
        else:
            operator.ensure_role(node, "init")
            operator.ensure_role(node, "secondary")
        return True

    return inject
