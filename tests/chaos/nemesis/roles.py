"""Faults: role changes, in good order and in none, and other settings (see common.py)."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import replace

from tests.chaos.nemesis.cluster import Cluster, Setup, wait
from tests.chaos.nemesis.common import Inject, one_primary, safe, well
from tests.chaos.nemesis.operator import Operator
from tests.e2e.pair import PairNode


def swap(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    if not well(cluster):
        return False
    operator.swap()
    return True


def swap_at_once(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """Promotion and demotion at the same moment, with the clients gone: there is nothing to disagree on."""
    if not well(cluster):
        return False
    old, new = cluster.primary, cluster.secondary
    if not cluster.clients[old].drain():
        return True
    if cluster.behind(new):
        cluster.clients[old].go_on()
        return False
    cluster.rest(old)
    model = operator.model_of(new, cluster.model)
    failed: list[Exception] = []

    def change(node: PairNode, role: str) -> None:
        try:
            operator.ensure_role(node, role)
        except Exception as error:  # told by the main thread
            failed.append(error)

    changes = [(old, "secondary"), (new, "primary")]
    rng.shuffle(changes)
    threads = [threading.Thread(target=change, args=arguments) for arguments in changes]
    for thread in threads:
        thread.start()
        time.sleep(rng.choice([0, 0, 0.01, 0.1]))
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    cluster.primary, cluster.model = new, model
    operator.promote(new, model, "while the other one was demoted")
    return True


def bounce(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The primary is demoted in the middle of writes, and promoted again."""
    node = cluster.primary
    if not one_primary(cluster) or cluster.role(node) != "primary" or cluster.metadata(node).syncing:
        return False
    with cluster.excused(node):
        operator.ensure_role(node, rng.choice(["secondary", "init"]))
        time.sleep(rng.choice([0, 0, 0.3]))
        operator.ensure_role(node, "primary")
    return True


def away(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The secondary leaves its role for a while, in good order."""
    node = cluster.secondary
    if not one_primary(cluster) or not cluster.usable(node):
        return False
    operator.ensure_role(node, "init")
    time.sleep(rng.uniform(0, 1))
    operator.ensure_role(node, "secondary")
    return True


def both_primary(cut_first: bool) -> Inject:
    def inject(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
        if not well(cluster) or not safe(cluster) or not operator.split(cut_first, rng):
            return False
        if rng.random() < 0.6:  # else it lasts until the round's end
            operator.settle_split(rng)
        return True

    return inject


# ---- settings ----


def reload(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """SIGHUP with other settings on one node, some of which make the connection anew."""
    node = rng.choice(cluster.nodes)
    if not cluster.usable(node):
        return False
    old = cluster.settings[node.node]
    new = changed(old, rng)
    cluster.story.tell(f"  {node.node}: {new.conf().replace(chr(10), ', ')}")
    cluster.write_conf(node, new)
    hang_up(node)
    return True


def hang_up(node: PairNode) -> None:
    assert node.hastd is not None
    node.hastd.send_signal(1)


def reloads(node: PairNode) -> int:
    return node.log.read_text(errors="replace").count("configuration read again")


def part(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """SIGHUP with `remote none` on the primary, which goes on alone, and with what was there before."""
    node = cluster.primary
    if not one_primary(cluster) or cluster.role(node) != "primary":
        return False
    for alone in (True, False):
        cluster.write_conf(node, cluster.settings[node.node], alone)
        before = reloads(node)
        hang_up(node)
        wait(lambda before=before: reloads(node) > before, f"{node.node} reads its configuration again")
        time.sleep(rng.choice([0, 0.1, 1]) if alone else 0)
    cluster.troubled = time.monotonic()
    return True


def made_anew(cluster: Cluster, operator: Operator, rng: random.Random) -> bool:
    """The secondary has a new component, which knows nothing."""
    if not well(cluster) or not safe(cluster):
        return False
    node = cluster.secondary
    operator.ensure_role(node, "init")
    node.create("-e", str(cluster.setup.extentsize), "-k", str(cluster.setup.keepdirty))
    operator.ensure_role(node, "secondary")
    wait(lambda: cluster.metadata(node).resuid, f"{node.node} has met its primary")
    return True


def changed(setup: Setup, rng: random.Random) -> Setup:
    choices: list[dict[str, object]] = [
        {"checksum": rng.choice(["none", "crc32", "sha256"])},
        {"compression": rng.choice(["none", "hole", "lzf"])},
        {"timeout": rng.choice([2, 3])},
        {"metaflush": rng.choice(["on", "off"])},
        {"on_io_error": rng.choice(["detach", "pass"])},
        {"directio": rng.choice(["auto", "off"])},  # a new worker
    ]
    if setup.replication != "async":
        choices.append({"replication": rng.choice(["fullsync", "memsync"])})
    new = setup
    for choice in rng.sample(choices, rng.randint(1, 2)):
        new = replace(new, **choice)  # type: ignore[arg-type]
    return new
