"""What must be true when all is well again: each check raises ViolationError with what is wrong.

Invariants:
- Checked with no client at work, and nothing is repaired here: a check that waits does so for what the nodes have to
  reach by themselves.
"""

from __future__ import annotations

import re
import time

from tests.chaos.nemesis.cluster import Cluster, wait
from tests.chaos.nemesis.model import WrongDataError
from tests.chaos.nemesis.operator import Operator
from tests.chaos.nemesis.story import ViolationError
from tests.e2e.pair import PairNode
from tests.nbdclient import FLUSH, RawClient

BOTH = {"main", "spawner", "keeper", "worker", "disk"}
PRIMARY, SECONDARY = BOTH | {"ggate"}, BOTH | {"recv"}
# What a program says that has met what its author did not think of.
BAD_LINES = re.compile(r"Traceback|AddressSanitizer|runtime error:|[Aa]ssertion|unexpected error|was never retrieved")


class Checker:
    """Looks at a cluster whose faults are cured and whose clients are drained."""

    def __init__(self, cluster: Cluster, operator: Operator) -> None:
        self.cluster, self.operator = cluster, operator
        self._read = dict.fromkeys(cluster.nodes, 0)  # bytes of its log that were looked at

    def all(self) -> None:
        self.flush()
        self.in_sync()
        self.data()
        self.counters()
        self.processes()
        self.maps()
        self.logs()
        self.cluster.begin()

    def flush(self) -> None:
        """Afterwards what was written is not only in sync but said to be so."""
        with RawClient(self.cluster.primary.socket()) as raw:
            if error := raw.do(FLUSH).error:
                raise ViolationError(f"a flush is answered with error {error} when all is well")

    def in_sync(self) -> None:
        cluster = self.cluster
        began = time.monotonic()
        seen = ""

        def in_sync() -> bool:
            nonlocal seen
            primary, secondary = cluster.primary.status(), cluster.secondary.status()
            data, other = cluster.metadata(cluster.primary), cluster.metadata(cluster.secondary)
            seen = f"primary {primary['status']} dirty {primary['dirty']}, secondary {secondary['status']}"
            well = primary["status"] == secondary["status"] == "complete" and primary["dirty"] == 0
            return bool(well and not data.alone and not data.syncing and not other.syncing)

        try:
            wait(in_sync, "both are in sync")
        except ViolationError as error:
            raise ViolationError(f"{error}: {seen}; {', '.join(map(cluster.describe, cluster.nodes))}") from None
        cluster.story.tell(f"in sync after {time.monotonic() - began:.1f} s")

    def data(self) -> None:
        """Through the primary, as the model says; and the same on both components."""
        cluster, model = self.cluster, self.cluster.model
        data = self.operator.check(cluster.primary, model, "in sync")
        for node in cluster.nodes:
            with cluster.backing(node).open("rb") as file:
                file.seek(cluster.metadata(node).offset)
                on_disk = file.read(len(data))
            if on_disk != data:
                at = next(i for i in range(len(data)) if on_disk[i] != data[i])
                cell = at // model.cell
                raise ViolationError(
                    f"{node.node}'s component differs at offset {at} (cell {cell}, extent"
                    f" {at // cluster.setup.extentsize}): {on_disk[at : at + 16].hex()}, the primary reads"
                    f" {data[at : at + 16].hex()}"
                )
        if (at := cluster.pair.differing()) is not None:
            raise ViolationError(f"the components differ at offset {at}")
        try:
            for cell in range(model.size):
                model.pin(cell, data[cell * model.cell : (cell + 1) * model.cell], "in sync")
        except WrongDataError as error:
            raise ViolationError(str(error)) from None

    def counters(self) -> None:
        cluster = self.cluster
        mine, other = (cluster.metadata(node) for node in (cluster.primary, cluster.secondary))
        wrong = [
            text
            for text, is_so in {
                "resuids differ": mine.resuid != other.resuid,
                "counters are not in step": (mine.pair.localcnt, mine.pair.remotecnt)
                != (other.pair.remotecnt, other.pair.localcnt),
                "the primary says that it is alone": mine.alone,
                "somebody says that it is being synchronised": mine.syncing or other.syncing,
            }.items()
            if is_so
        ]
        if wrong:
            raise ViolationError(f"{', '.join(wrong)}: {', '.join(map(cluster.describe, cluster.nodes))}")

    def processes(self) -> None:
        """Each once, and no others."""
        for node, expected in ((self.cluster.primary, PRIMARY), (self.cluster.secondary, SECONDARY)):

            def right(node: PairNode = node, expected: set[str] = expected) -> bool:
                return self.cluster.processes(node).keys() == expected and len(node.pids()) == len(expected)

            try:
                wait(right, "processes", 15)
            except ViolationError:
                raise ViolationError(f"{node.node} has these processes: {node.titles()}") from None

    def maps(self) -> None:
        """When nobody works, the primary's map on disk has what is hot and nothing else."""
        primary, keep = self.cluster.primary, self.cluster.setup.keepdirty
        dirty = 0

        def clean() -> bool:
            nonlocal dirty
            dirty = primary.dump()["dirtyextents"]
            return dirty <= keep

        try:
            wait(clean, "the map", 30)
        except ViolationError:
            raise ViolationError(f"{dirty} extents stay dirty in the map of {primary.node}, not {keep}") from None

    def logs(self) -> None:
        for node in self.cluster.nodes:
            text = node.log.read_bytes()[self._read[node] :]
            self._read[node] += len(text)
            for line in text.decode(errors="replace").splitlines():
                if BAD_LINES.search(line):
                    raise ViolationError(f"{node.node} logs: {line}")
