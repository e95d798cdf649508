"""What the kinds of faults have in common.

Invariants of all of them:
- All chance comes from the generator that is given, so that the same seed means the same choice.
- What outlives the call has a cure in the cluster's list, and the clients are excused for as long as their node is
  kept from answering, and for no longer.
- A fault that does not apply as things are says so (False), and has done nothing then.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from tests.chaos.nemesis.cluster import Cluster, wait
from tests.chaos.nemesis.operator import DETACHED, Operator
from tests.e2e.pair import PairNode

Inject = Callable[[Cluster, Operator, random.Random], bool]


def sides(cluster: Cluster, side: str) -> PairNode:
    return cluster.primary if side == "primary" else cluster.secondary


def one_primary(cluster: Cluster) -> bool:
    """No split brain is under way, so that roles mean what they say."""
    return len(cluster.clients) == 1 and cluster.usable(cluster.primary)


def well(cluster: Cluster) -> bool:
    """Both nodes run, in their roles: what an operator looks at, and cares for, before a change."""
    if len(cluster.clients) > 1:
        return False
    cluster.cure()
    return (
        one_primary(cluster)
        and cluster.usable(cluster.secondary)
        and cluster.role(cluster.primary) == "primary"
        and cluster.role(cluster.secondary) == "secondary"
        and cluster.primary.status()["syncing"] != DETACHED
    )


def leader(cluster: Cluster) -> bool:
    """Both are well, and the primary lacks nothing that only the other one has."""
    return well(cluster) and not cluster.metadata(cluster.primary).syncing and not cluster.behind(cluster.primary)


def safe(cluster: Cluster) -> bool:
    """The secondary has everything, is connected, and nothing is about to change that."""
    cluster.cure()
    if not cluster.usable(cluster.secondary) or cluster.primary.status()["syncing"] == DETACHED:
        return False
    wait(cluster.settled, "what an earlier fault has left is synchronised")
    time.sleep(0.5)  # for the last fault to be noticed
    if not cluster.settled():
        return False
    return not cluster.behind(cluster.secondary) and not cluster.metadata(cluster.primary).syncing
