"""Faults: a synchronisation, in either direction, and what happens in the middle of it (see common.py)."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import replace

from tests.chaos.nemesis.cluster import Cluster, Setup, wait
from tests.chaos.nemesis.common import Inject, leader, safe, well
from tests.chaos.nemesis.deaths import lose_primary, lose_secondary
from tests.chaos.nemesis.links import cut
from tests.chaos.nemesis.operator import Operator


@contextlib.contextmanager
def slow(cluster: Cluster) -> Iterator[None]:
    """Both nodes synchronise slowly meanwhile, so that there is a middle to break it off in."""
    before = dict(cluster.settings)

    def tell(settings: dict[str, Setup]) -> None:
        for node in cluster.nodes:
            cluster.write_conf(node, settings[node.node])
            if cluster.usable(node):
                assert node.hastd is not None
                node.hastd.send_signal(1)

    tell({name: replace(setup, syncrate="2M") for name, setup in before.items()})
    try:
        yield
    finally:
        tell({name: replace(cluster.settings[name], syncrate=setup.syncrate) for name, setup in before.items()})


def interrupted(what: str) -> Inject:
    """The secondary misses writes, is synchronised, and in the middle of that something happens."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        if not leader(cluster):
            return False
        node, primary = cluster.secondary, cluster.primary
        with slow(cluster):
            operator.ensure_role(node, "init")
            cluster.progress(primary, rng.randint(20, 150))
            operator.ensure_role(node, "secondary")
            wait(cluster.connected, f"{node.node} has its primary again")
            time.sleep(rng.uniform(0, 0.8))
            left = primary.status()["dirty"]
            cluster.story.tell(f"  {what} with {left} bytes to synchronise")
            if what == "cut":
                cut(cluster, operator, rng)
            elif what == "target dies":
                lose_secondary(cluster, operator, rng, cluster.power_off)
            elif what == "source dies":
                lose_primary(cluster, operator, rng, cluster.power_off)
            elif what == "source dies, target is asked":
                with cluster.excused(primary):
                    cluster.power_off(primary)
                    if cluster.metadata(node).syncing:
                        operator.refused(node)
                    operator.primary_gone(rng)
            elif what == "stage dies":
                cluster.kill(rng.choice(cluster.nodes), rng.choice(["disk", "ggate", "recv"]))
            elif what == "worker dies":
                cluster.kill(rng.choice(cluster.nodes), "worker")
        return True

    return inject


def backwards(what: str) -> Inject:
    """The primary is behind and gets its data from the secondary while it serves; in the middle of that something
    happens."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        if not well(cluster) or cluster.behind(cluster.secondary):
            return False
        old, new = cluster.primary, cluster.secondary
        with slow(cluster):
            with cluster.excused(old):
                operator.ensure_role(old, "init")
                cluster.rest(old)
            if cluster.behind(new):
                # The old one has written alone in its last moments: the new one would make a split-brain of that.
                cluster.model = cluster.model.fork(None)
                operator.promote(old, cluster.model, "it has everything")
                return True
            cluster.primary, cluster.model = new, operator.model_of(new, cluster.model)
            operator.promote(new, cluster.model, "the other one is not there")
            cluster.progress(new, rng.randint(20, 100))
            # Now the new one has written alone. The old one, which lacks that, becomes primary again.
            with cluster.excused(new):
                operator.ensure_role(new, "secondary")
                cluster.rest(new)
            if not operator.promote_stale(old, cluster.model.fork(None)):
                return True
            cluster.story.tell(f"  {what} while {old.node} gets its data: {cluster.describe(old)}")
            time.sleep(rng.uniform(0, 0.8))
            if what == "cut":
                cut(cluster, operator, rng)
            elif what == "target dies":
                lose_primary(cluster, operator, rng, cluster.power_off)
            elif what == "source dies":
                lose_secondary(cluster, operator, rng, cluster.power_off)
            elif what == "stage dies":
                cluster.kill(rng.choice(cluster.nodes), rng.choice(["disk", "ggate", "recv"]))
            elif what == "worker dies":
                cluster.kill(rng.choice(cluster.nodes), "worker")
        return True

    return inject


def forced(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The source dies in the middle of a synchronisation, for good as it seems, and its target is promoted by force.
    Then the source comes back, and one of the two gives its changes up."""
    if not leader(cluster) or not safe(cluster):  # what the target has then has to be known
        return False
    source, target = cluster.primary, cluster.secondary
    with slow(cluster):
        operator.ensure_role(target, "init")
        cluster.progress(source, rng.randint(20, 150))
        operator.ensure_role(target, "secondary")
        wait(cluster.connected, f"{target.node} has its primary again")
        time.sleep(rng.uniform(0, 0.8))
        with cluster.excused(source):
            cluster.power_off(source)
        if not cluster.metadata(target).syncing:
            cluster.story.tell("  it was complete already")
            operator.come_back(source)
            return True
        cluster.rest(source)
        operator.refused(target)
        cluster.story.tell(f"  {target.node} is promoted by force")
        target.ctl("role", "-f", "primary", target.name())
        mixed = cluster.model.fork(0)  # some of what it missed, and some not
        operator.check(target, mixed, "after it was promoted by force")
        cluster.work(target, mixed)
        cluster.progress(target)
    operator.start(source)
    operator.meet(winner=target, loser=source, model=mixed, rng=rng)
    return True
