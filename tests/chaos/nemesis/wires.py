"""Faults: of the network between two nodes that have network namespaces of their own (see common.py, network.py)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.chaos.nemesis.cluster import Cluster
from tests.chaos.nemesis.common import Inject
from tests.chaos.nemesis.network import Network
from tests.chaos.nemesis.operator import Operator

Harm = Callable[[Network, Cluster, random.Random], None]


def pulled(network: Network, cluster: Cluster, rng: random.Random) -> None:
    network.pull(rng.choice(cluster.nodes).node)


def deaf(network: Network, cluster: Cluster, rng: random.Random) -> None:
    """The secondary hears nothing."""
    network.lose(cluster.primary.node)


def mute(network: Network, cluster: Cluster, rng: random.Random) -> None:
    """The primary hears nothing."""
    network.lose(cluster.secondary.node)


def narrow(network: Network, cluster: Cluster, rng: random.Random) -> None:
    for node in cluster.nodes:
        network.narrow(node.node, rng.choice(["300kbit", "3mbit", "30mbit"]))


def wire(harm: Harm) -> Inject:
    """For a moment, for longer than `timeout`, or until the round's end."""

    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        network = cluster.network
        if network is None or any(name.startswith("net:") for name, _ in cluster.cures):
            return False
        harm(network, cluster, rng)
        seconds = rng.choice([rng.uniform(0.05, 1), cluster.setup.timeout + rng.uniform(0.5, 2)])
        cluster.story.tell(f"  for {seconds:.2f} s")
        if rng.random() < 0.3:
            cluster.cures.append(("net: trouble", network.heal))
            time.sleep(min(seconds, 1))
        else:
            time.sleep(seconds)
            network.heal()
        return True

    return inject


def flaps(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The cable has a loose contact."""
    network = cluster.network
    if network is None:
        return False
    for _ in range(rng.randint(2, 5)):
        network.pull(rng.choice(cluster.nodes).node)
        time.sleep(rng.uniform(0, 0.5))
        network.heal()
        time.sleep(rng.uniform(0, 1))
    return True
