"""A careful operator of a cluster: who promotes only what has everything, and knows when something may be missing.

Invariants:
- At each promotion the new primary's disk is read as a whole, before any client works on it, and held against the
  model: what was acknowledged in fullsync or memsync is there.
- A client's error is forgiven in one case: its primary's own copy is out of date (`syncing`), and what has the newer
  one cannot be reached because of a fault of ours. `forgive`.
- When two nodes have written alone, their next contact must tell of a split brain; one of them gives up its changes.
"""

from __future__ import annotations

import random
import time

from hast.errors import HastError
from tests.chaos.nemesis.client import read_all
from tests.chaos.nemesis.cluster import Cluster, wait
from tests.chaos.nemesis.model import Model, WrongDataError
from tests.chaos.nemesis.story import ViolationError
from tests.e2e.pair import PairNode

EIO = 5
DETACHED = 2  # `syncing` of a primary that does not use its disk any more
ROLE_SECONDS = 60.0


class Operator:
    """Acts on a cluster, one thing after the other."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.promotions = 0
        self.split_brains = 0
        self.forgiven = 0
        cluster.forgive = self.forgive

    # ---- what is legitimate ----

    def forgive(self, node: PairNode, error: int, text: str) -> bool:
        """Called by a client's thread, for each error at once. docs: see the module."""
        cluster = self.cluster
        outdated = cluster.metadata(node).syncing or bool(cluster.behind(node))
        if error == EIO and outdated and self.out_of_reach(node):
            self.forgiven += 1
            return True
        cluster.story.tell(f"error {error} for {text}: {', '.join(map(cluster.describe, cluster.nodes))}")
        return False

    def out_of_reach(self, node: PairNode) -> bool:
        """Whether our faults keep the other node away, or did so a moment ago."""
        cluster = self.cluster
        other = cluster.pair.other(node)
        recent = time.monotonic() - cluster.troubled < cluster.limit
        return recent or bool(cluster.cures) or not cluster.alive(other) or not cluster.connected()

    # ---- roles ----

    def ensure_role(self, node: PairNode, role: str) -> None:
        """Asks until it is so: a worker that was killed while it started is no reason to give up. A disk that fails is,
        and is seen to before."""
        cluster, why = self.cluster, ""
        if role != "init":
            cluster.cure(f"disk of {node.node}")
        deadline = time.monotonic() + ROLE_SECONDS
        while True:
            try:
                node.set_role(role)
                return
            except (AssertionError, HastError) as error:
                why = str(error).splitlines()[0]
            if not cluster.alive(node):
                raise ViolationError(f"hastd of {node.node} has ended: {node.said()[-2000:]}")
            if time.monotonic() > deadline:
                raise ViolationError(f"{node.node} does not become {role} within {ROLE_SECONDS:g} s: {why}")
            time.sleep(0.1)

    def start(self, node: PairNode) -> None:
        self.cluster.story.tell(f"hastd of {node.node} is started")
        try:
            node.start()
        except AssertionError as error:
            raise ViolationError(f"hastd of {node.node} does not start: {error}") from None

    def revive(self, node: PairNode, role: str) -> None:
        """Whatever is left of it: it runs, in this role."""
        self.start_if_dead(node)
        self.cluster.story.tell(f"{node.node} is made {role}")
        self.ensure_role(node, role)

    def start_if_dead(self, node: PairNode) -> None:
        self.cluster.cure(f"disk of {node.node}")
        if not self.cluster.alive(node):
            self.start(node)

    def promote(self, node: PairNode, model: Model, what: str) -> None:
        """Make it primary, look whether all of the model is there, and let clients work on it."""
        cluster = self.cluster
        cluster.story.tell(f"{node.node} is promoted ({what}): {', '.join(map(cluster.describe, cluster.nodes))}")
        self.ensure_role(node, "primary")
        self.promotions += 1
        self.check(node, model, "after its promotion")
        cluster.work(node, model)

    def check(self, node: PairNode, model: Model, when: str) -> bytes:
        """All data of a primary, held against the model."""
        size, cell = model.size * model.cell, model.cell
        data = b""

        def read() -> bool:
            nonlocal data
            try:
                data = read_all(node.socket(), size)
            except (EOFError, OSError):  # a fault is still at work there
                return False
            except AssertionError:
                if self.forgive(node, EIO, f"reading all of it {when}"):
                    return False
                raise ViolationError(f"{node.node} {when}: an error for a read") from None
            return True

        wait(read, f"{node.node} can be read {when}")
        try:
            for number in range(model.size):
                model.look(number, data[number * cell : (number + 1) * cell], f"{node.node} {when}")
        except WrongDataError as error:
            raise ViolationError(f"{error}\n{', '.join(map(self.cluster.describe, self.cluster.nodes))}") from None
        return data

    # ---- when the primary is gone ----

    def model_of(self, copy: PairNode, model: Model) -> Model:
        """What the other copy of a primary's disk has, when nothing was acknowledged without it."""
        cluster = self.cluster
        lost = copy in cluster.dark or ("memsync" in cluster.weakest and copy in cluster.hurt)
        if "async" in cluster.weakest or lost:
            # What was not flushed may be missing: in the mode async it may never have come, else it may be lost with
            # the cache of its disk, or, in memsync, with its memory.
            return model.fork(model.flushed)
        return model.fork(None)

    def primary_gone(self, rng: random.Random) -> None:
        """No process of the primary is left: take over, if the other one has everything; else bring it back."""
        cluster = self.cluster
        old, new = cluster.primary, cluster.secondary
        able = cluster.usable(new) and cluster.role(new) == "secondary"
        if self.unaware(old):
            # Its disk has failed so that it could not even store that: only the other one has everything.
            self.revive(new, "secondary")
            able = True
        why = cluster.behind(new) if able else "it does not run"
        by_choice = rng.random() < 0.35 and (not cluster.behind(old) or cluster.metadata(old).syncing)
        if not why and not by_choice:
            why = self.found_out(new)
        if why or by_choice:
            cluster.story.tell(f"{old.node} comes back as primary ({why or 'by choice'})")
            self.come_back(old)
            return
        cluster.rest(old)
        model = self.model_of(new, cluster.model)
        cluster.primary, cluster.model = new, model
        self.promote(new, model, "the primary is dead")
        if rng.random() < 0.5:
            self.revive(old, "secondary")

    def found_out(self, node: PairNode) -> str:
        """Asks for the role once. A secondary that had everything may find out only now that it does not, because one
        of its stages was killed a moment before its primary was: why it lacks something."""
        try:
            node.set_role("primary")
        except (AssertionError, HastError) as error:
            if "not complete" in str(error) and node in self.cluster.hurt:
                return self.cluster.behind(node)
        return ""

    def swap(self) -> None:
        """Both are well: the roles change in good order, under load."""
        cluster = self.cluster
        old, new = cluster.primary, cluster.secondary
        cluster.story.tell(f"{old.node} is demoted under load")
        with cluster.excused(old):
            self.ensure_role(old, "secondary")
            cluster.rest(old)
        why = cluster.behind(new)
        if why and not cluster.metadata(old).syncing:
            cluster.story.tell(f"{new.node} is not promoted: {why}")
            if cluster.metadata(new).syncing:
                self.refused(new)
            self.promote(old, cluster.model.fork(None), "it has everything")
            cluster.model = cluster.clients[old].model
            return
        cluster.primary, cluster.model = new, self.model_of(new, cluster.model)
        self.promote(new, cluster.model, "in good order")

    def promote_stale(self, node: PairNode, model: Model) -> bool:
        """Promote a node that lacks something, with the other one, which has it, as its secondary. False: they did not
        meet, and the other one is primary now."""
        cluster = self.cluster
        other = cluster.pair.other(node)
        self.ensure_role(node, "primary")
        if cluster.metadata(node).syncing or not cluster.behind(node):
            cluster.primary, cluster.model = node, model
            cluster.work(node, model)
            return True
        # A careful operator takes it back: nothing was written yet.
        cluster.story.tell(f"{node.node} did not get its data, and is demoted again")
        self.ensure_role(node, "secondary")
        cluster.primary, cluster.model = other, model
        self.promote(other, model, "it has everything")
        return False

    def unaware(self, node: PairNode) -> bool:
        """Only the other one knows that this one lacks something."""
        cluster = self.cluster
        other = cluster.pair.other(node)
        return bool(cluster.behind(node) and not cluster.metadata(node).syncing and not cluster.behind(other))

    def come_back(self, node: PairNode) -> None:
        """A primary that has died is brought back as primary."""
        cluster = self.cluster
        if self.unaware(node):
            # Its disk failed so that it could not even store that: it would serve what it has, which is old.
            cluster.rest(node)
            other = cluster.pair.other(node)
            cluster.primary, cluster.model = other, self.model_of(other, cluster.model)
            self.start_if_dead(other)
            self.promote(other, cluster.model, "the other one is behind, and does not know")
            return
        if node not in cluster.dark:
            with cluster.excused(node):
                self.revive(node, "primary")
            return
        # It has lost what was not flushed, as any disk does. Where the other one has it, it may be there or not.
        cluster.rest(node)
        cluster.model = cluster.model.fork(cluster.model.flushed)
        self.start(node)
        if cluster.metadata(node).syncing:  # it cannot even be read without the other one
            self.revive(cluster.pair.other(node), "secondary")
        self.promote(node, cluster.model, "it comes back, without the cache of its disk")

    def open_anew(self, rng: random.Random) -> None:
        """The primary's disk has failed and is well again: it is used once more after a change of the role."""
        cluster = self.cluster
        old, new = cluster.primary, cluster.secondary
        model = cluster.clients[old].model
        with cluster.excused(old):
            self.ensure_role(old, "init")
            cluster.rest(old)
        self.revive(new, "secondary")
        fork = self.model_of(new, model)
        if rng.random() < 0.5 or cluster.behind(new):
            cluster.story.tell(f"{old.node} is primary again, with its disk: {cluster.describe(old)}")
            self.promote_stale(old, fork)
            return
        cluster.primary, cluster.model = new, fork
        self.promote(new, fork, "the other one's disk had failed")
        self.ensure_role(old, "secondary")

    def refused(self, node: PairNode) -> None:
        """The target of a synchronisation must refuse to be promoted (invariant 10), as long as it is one."""
        self.cluster.story.tell(f"{node.node} is asked to be primary, and has to refuse")
        try:
            node.set_role("primary")
        except AssertionError as error:
            if "not complete" not in str(error):
                raise ViolationError(f"{node.node} refuses, and does not say why: {error}") from None
            return
        raise ViolationError(f"{node.node} is promoted in the middle of a synchronisation")

    # ---- all is to be well again ----

    def heal(self, rng: random.Random) -> None:
        """Cures for everything, both nodes in their roles, connected."""
        cluster = self.cluster
        cluster.cure()
        cluster.heal_links()
        for node in cluster.nodes:
            if node.hastd is not None and not cluster.alive(node):
                raise ViolationError(f"hastd of {node.node} has ended by itself: {node.hastd.returncode}")
        if len(cluster.clients) > 1:
            self.settle_split(rng)
        primary, secondary = cluster.primary, cluster.secondary
        if primary not in cluster.clients:
            raise ViolationError("the harness has lost its client")
        with cluster.excused(primary):
            self.revive(primary, "primary")
        self.revive(secondary, "secondary")
        if primary.status()["syncing"] == DETACHED:
            self.open_anew(rng)
            secondary = cluster.secondary
        wait(cluster.connected, f"{secondary.node} has its primary again")

    # ---- split brain ----

    def split(self, cut: bool, rng: random.Random) -> bool:
        """Promote the secondary while the primary runs, let both write."""
        cluster = self.cluster
        old, new = cluster.primary, cluster.secondary
        if len(cluster.clients) > 1 or not (cluster.usable(new) and cluster.usable(old)):
            return False
        if cluster.metadata(new).syncing or cluster.metadata(old).syncing:
            return False
        if cut:
            for relay in cluster.relays.values():
                relay.cut()
        # What the old one acknowledges from now on, or has acknowledged alone before, may be missing.
        model = cluster.clients[old].model
        cluster.story.tell(f"{new.node} is promoted while {old.node} runs as primary")
        self.ensure_role(new, "primary")
        quiet = cluster.clients[old]
        quiet.drain()
        fork = model.fork(0)
        quiet.go_on()
        self.check(new, fork, "after its promotion beside the primary")
        cluster.work(new, fork)
        for node in cluster.nodes:
            if cluster.usable(node):
                cluster.progress(node)
        return True

    def settle_split(self, rng: random.Random) -> None:
        """Two primaries, both have written: their contact tells of it, and one of them gives up."""
        cluster = self.cluster
        for node in cluster.nodes:
            if not cluster.alive(node):
                with cluster.excused(node):
                    self.revive(node, "primary")
            cluster.progress(node)
        for node in cluster.nodes:
            wait(lambda node=node: cluster.metadata(node).alone, f"{node.node} knows that it has written alone", 10)
        winner, loser = rng.sample(cluster.nodes, 2)
        self.meet(winner, loser, cluster.clients[winner].model, rng)

    def meet(self, winner: PairNode, loser: PairNode, model: Model, rng: random.Random) -> None:
        """Both have written alone, the winner is primary: the loser becomes its secondary, both tell of a split brain,
        nothing is overwritten, and then the loser gives up."""
        cluster = self.cluster
        marks = {node: len(cluster.pair.events(node)) for node in cluster.nodes}
        states = ", ".join(map(cluster.describe, cluster.nodes))
        cluster.story.tell(f"both have written: {loser.node} is made secondary, {states}")
        with cluster.excused(loser):
            self.ensure_role(loser, "secondary")
            cluster.rest(loser)
        cluster.primary, cluster.model = winner, model
        event = f"split-brain {winner.name()}"
        for node in cluster.nodes:
            wait(
                lambda node=node: event in cluster.pair.events(node)[marks[node] :],
                f"{node.node} tells of the split brain",
            )
        if cluster.connected():
            raise ViolationError("connected in spite of a split brain")
        self.split_brains += 1
        self.give_up(loser, rng)

    def give_up(self, loser: PairNode, rng: random.Random) -> None:
        """The way out, on the node whose changes are thrown away: the documented one, or a new component."""
        cluster = self.cluster
        if rng.random() < 0.7:
            if rng.random() < 0.3:
                self.ensure_role(loser, "init")
            cluster.story.tell(f"{loser.node} gives up its changes: hastctl discard")
            loser.ctl("discard", loser.name())
        else:
            self.ensure_role(loser, "init")
            cluster.story.tell(f"{loser.node} gives up its changes: hastctl create")
            loser.create("-e", str(cluster.setup.extentsize), "-k", str(cluster.setup.keepdirty))
        self.ensure_role(loser, "secondary")
