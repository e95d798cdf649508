"""How it grows: throughput with the number of resources and with the size of a component; what many resources cost.

Idle cost and memory are those of a pair of nodes with many resources, all connected and in sync. The memory of a
resource is that of its worker and stages, what they share with the spawner counted in proportion (PSS), after a job
on each has touched its slabs; and, for an idle one, before.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from perf.fio import Figures, Job, Target
from perf.measure import Samples, System, rounds, sample
from perf.nodes import compare, pair
from perf.options import Options
from perf.procstat import memory, run_seconds, usage
from perf.scene import MIB
from tests.e2e.pair import Pair, PairNode

SMALL = 64 * MIB
SIZES = (64, 256, 1024, 4096)  # MiB
SIZE_JOBS = (
    Job("randwrite 4k depth 1", "randwrite", "4k", 1),
    Job("randwrite 4k depth 32", "randwrite", "4k", 32),
    Job("randread 4k depth 32", "randread", "4k", 32),
)
COUNT_JOBS = (("randwrite", 8), ("randread", 8))


def counts(most: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    found = [1]
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return found if most == 1 else [*found, most]


def own(node: PairNode, count: int) -> list[int]:
    """Processes that exist for a resource: all but main, keeper and spawner."""
    pids = [pid for pid, title in node.titles().items() if "(primary)" in title or "(secondary)" in title]
    assert len(pids) >= count, f"{node.node}: {len(pids)} processes for {count} resources: {node.titles()}"
    return pids


def idle(two: Pair, count: int, seconds: float) -> Figures:
    """Per cent of one processor that each node takes while nobody uses it, and memory in MiB."""
    nodes = {"primary": two.a, "secondary": two.b}
    pids = {name: node.pids() for name, node in nodes.items()}
    before, began = {name: usage(pids[name]) for name in nodes}, time.monotonic()
    run = {name: run_seconds(pids[name]) for name in nodes}
    time.sleep(seconds)
    taken = time.monotonic() - began
    found: Figures = {"resources": count}
    for name in nodes:
        used = usage(pids[name]) - before[name]
        found[f"{name} cpu %"] = 100 * (run_seconds(pids[name]) - run[name]) / taken
        found[f"{name} switches/s"] = (used.voluntary + used.involuntary) / taken
    return found


def sizes_of_memory(two: Pair, count: int) -> Figures:
    found: Figures = {}
    for name, node in (("primary", two.a), ("secondary", two.b)):
        found[f"{name} MiB"] = memory(own(node, count)) / count
        found[f"{name} processes"] = len(own(node, count)) / count
    return found


def resources(options: Options) -> dict[str, Any]:
    most = options.resources
    names = [f"r{number}" for number in range(most)]
    samples: Samples = {}
    with pair(dict.fromkeys(names, SMALL)) as two:
        before = sizes_of_memory(two, most)
        cost = idle(two, most, options.idle)
        uris = [Target("nbd", two.a.uri(name)) for name in names]

        def check(used: Sequence[str]) -> None:
            for name in used:
                compare(two, name)

        for _ in range(options.repeats):
            for count in counts(most):
                for rw, depth in COUNT_JOBS:
                    job = Job(f"{rw} 4k depth {depth} on each", rw, "4k", depth, targets=count)
                    system = System(
                        "hast memsync", tuple(uris[:count]), SMALL, lambda: two.a.pids() + two.b.pids(),
                    )  # fmt: skip
                    figures = sample(system, job, options.seconds)
                    samples.setdefault(job.name, {}).setdefault(str(count), []).append(figures)
                print(f"resources: {count}", file=sys.stderr, flush=True)
        check(names)
        after = sizes_of_memory(two, most)
    return {"samples": samples, "idle": cost, "memory idle": before, "memory used": after}


def sizes(options: Options) -> dict[str, Any]:
    """Components of which nothing is allocated: a page of a large one is hardly ever written twice."""
    names = {f"s{mib}": mib for mib in SIZES}
    with pair({name: mib * MIB for name, mib in names.items()}) as two:

        def system(name: str, mib: int) -> System:
            def pids() -> list[int]:
                return two.a.pids() + two.b.pids()

            return System(str(mib), (Target("nbd", two.a.uri(name)),), mib * MIB, pids)

        systems = [system(name, mib) for name, mib in names.items()]
        samples = rounds(systems, SIZE_JOBS, options.repeats, options.seconds, "sizes", filled=False)
        for name in names:
            compare(two, name)
    return {"samples": samples}
