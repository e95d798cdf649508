"""A session: one cluster, and rounds of faults on it; after each round all is made well, and looked at.

Invariants:
- Whatever ends a session, nothing of it is left: its cluster is closed.
- A failure is kept with its logs before the cluster is taken away.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.chaos.nemesis import plan
from tests.chaos.nemesis.checker import Checker
from tests.chaos.nemesis.cluster import Cluster
from tests.chaos.nemesis.faults import KINDS
from tests.chaos.nemesis.operator import Operator
from tests.chaos.nemesis.story import Story, ViolationError, keep

ROUNDS = 10  # of a session


@dataclass
class Tally:
    """What was done, over all sessions."""

    faults: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    sessions: int = 0
    rounds: int = 0
    requests: int = 0
    promotions: int = 0
    split_brains: int = 0
    forgiven: int = 0
    slowest: float = 0.0

    @property
    def total(self) -> int:
        return self.faults.total()


@dataclass(frozen=True)
class Failure:
    """complaint: what is wrong; kept: where its history is."""

    complaint: str
    story: str
    kept: Path
    replay: str


class Session:
    """`replay` is what names its choices: seed/session."""

    def __init__(self, seed: str, number: int, kinds: Collection[str], tally: Tally, loud: bool = False) -> None:
        self.seed, self.number, self.kinds, self.tally = seed, number, kinds, tally
        self.replay = f"{seed}/{number}"
        self.setup = plan.setup(seed, number)
        self.story = Story(f"session {self.replay}: {self.setup.words()}", tally.faults, loud)
        self.history: list[list[str]] = []

    def run(self, faults: int, place: Path, rounds: int = ROUNDS) -> Failure | None:
        """Until there were so many faults over all sessions, or so many rounds in this one."""
        cluster = Cluster(self.setup, self.replay, self.story)
        failure = None
        operator = Operator(cluster)
        try:
            try:
                self._rounds(cluster, operator, faults, rounds)
            except ViolationError as error:
                failure = self._failed(cluster, place, str(error))
            except Exception as error:
                failure = self._failed(cluster, place, f"the hunter itself failed: {error!r}")
                raise
        finally:
            self._count(cluster, operator)
            complaints = self._close(cluster)
        if complaints and failure is None:
            self.story.tell(f"at the end: {complaints}")
            failure = Failure("; ".join(complaints), self.story.short(), place, self.replay)
        return failure

    def _rounds(self, cluster: Cluster, operator: Operator, faults: int, rounds: int) -> None:
        checker = Checker(cluster, operator)
        cluster.up()
        for number in range(rounds):
            if self.tally.total >= faults:
                return
            self.story.tell(f"round {number}, primary {cluster.primary.node}")
            cluster.progress(cluster.primary)
            self._round(cluster, operator, number)
            self.story.tell("all is made well")
            operator.heal(random.Random(f"{self.replay}/{number}/heal"))
            client = cluster.clients[cluster.primary]
            cluster.progress(cluster.primary, 50)
            client.drain()
            cluster.complain()
            checker.all()
            client.go_on()
            self.tally.rounds += 1

    def _round(self, cluster: Cluster, operator: Operator, number: int) -> None:
        wanted, steps = plan.steps(self.seed, self.number, number, self.kinds, self.setup)
        done: list[str] = []
        self.history.append(done)
        for step in steps:
            if len(done) == wanted:
                break
            self.story.tell(f"fault: {step.kind}")
            if not self._inject(cluster, operator, step):
                self.story.take_back()
                self.tally.skipped[step.kind] += 1
                continue
            done.append(step.kind)
            self.tally.faults[step.kind] += 1
            cluster.complain()
            time.sleep(step.pause)
            cluster.complain()

    @staticmethod
    def _inject(cluster: Cluster, operator: Operator, step: plan.Step) -> bool:
        fault = KINDS[step.kind]
        try:
            if not fault.local:
                cluster.troubled = time.monotonic()
            return fault.inject(cluster, operator, random.Random(step.seed))
        finally:
            if not fault.local:
                cluster.troubled = time.monotonic()

    def _failed(self, cluster: Cluster, place: Path, complaint: str) -> Failure:
        self.story.tell(f"VIOLATION: {complaint}")
        facts = {"replay": self.replay, "setup": asdict(self.setup), "rounds": self.history}
        kept = keep(self.story, place, cluster.nodes, facts, complaint)
        return Failure(complaint, self.story.short(), kept, self.replay)

    def _close(self, cluster: Cluster) -> list[str]:
        try:
            return cluster.close()
        except ViolationError as error:
            return [str(error)]

    def _count(self, cluster: Cluster, operator: Operator) -> None:
        tally = self.tally
        tally.sessions += 1
        tally.promotions += operator.promotions
        tally.split_brains += operator.split_brains
        tally.forgiven += operator.forgiven
        clients = list(cluster.clients.values())
        tally.requests += cluster.served + sum(sum(client.done.values()) for client in clients)
        tally.slowest = max([tally.slowest, cluster.slowest, *(client.slowest for client in clients)])
