"""Faults: of the link between the nodes, where that is a relay (see common.py)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

from tests.chaos.nemesis.cluster import Cluster
from tests.chaos.nemesis.common import Inject
from tests.chaos.nemesis.operator import Operator
from tests.e2e.relay import Way

Choice = Callable[[random.Random], Way]
Trouble = Callable[[random.Random], tuple[Way | None, Way | None]]


def link(trouble: Trouble) -> Inject:
    """Trouble for a while, on the relay that the primary connects through; it may last until the round's end."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        if any(name.startswith("link") for name, _ in cluster.cures):
            return False
        there, back = trouble(rng)
        seconds = rng.choice([rng.uniform(0.05, 1), cluster.setup.timeout + rng.uniform(0.5, 2)])
        cluster.story.tell(f"  there {there or 'well'}, back {back or 'well'}, for {seconds:.2f} s")
        relays = list(cluster.relays.values())
        for relay in relays:
            relay.trouble(there, back)

        def cure() -> None:
            for relay in relays:
                relay.heal()

        if rng.random() < 0.3:
            cluster.cures.append(("link trouble", cure))
            time.sleep(min(seconds, 1))
        else:
            time.sleep(seconds)
            cure()
        return True

    return inject


def both_ways(way: Choice) -> Trouble:
    return lambda rng: (way(rng), way(rng))


def one_way(way: Choice, there: bool) -> Trouble:
    return lambda rng: (way(rng), None) if there else (None, way(rng))


def cut(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    for relay in cluster.relays.values():
        relay.cut()
    return True


def cut_inside(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """All connections end after so many bytes more in one direction: in the middle of a message, most likely."""
    relay = cluster.relays[cluster.primary.node]
    way = Way(cut_after=rng.randrange(200_000))
    if rng.random() < 0.5:
        relay.trouble(there=way)
    else:
        relay.trouble(back=replace(way, cut_after=rng.randrange(20_000)))
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline and any(w.cut_after is not None for w in (relay.there, relay.back)):
        time.sleep(0.01)
    relay.heal()
    return True


def flap(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """It comes and goes."""
    for _ in range(rng.randint(3, 6)):
        for relay in cluster.relays.values():
            relay.cut()
        time.sleep(rng.uniform(0.05, 1))
    return True


def half_open(near: bool) -> Inject:
    """One side sees its connections end, the other one hears nothing."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        for relay in cluster.relays.values():
            relay.forget(near)
        time.sleep(rng.uniform(0, cluster.setup.timeout + 1))
        for relay in cluster.relays.values():
            relay.heal()
        return True

    return inject


def hold(rng: random.Random) -> Way:
    return Way(hold=True)


def swallow(rng: random.Random) -> Way:
    return Way(swallow=True)


def delay(rng: random.Random) -> Way:
    return Way(delay=rng.uniform(0.001, 0.2))


def throttle(rng: random.Random) -> Way:
    return Way(rate=rng.choice([50e3, 500e3, 4e6]))
