"""Interleaved rounds of jobs against systems; what is kept is every sample, so that medians and spread can be told.

Invariants:
- In each round every job runs against every system in turn, so that a slow moment of the machine hits all of them.
- Every block of a system is allocated before anything is timed.
- After each job the system's data is checked, where it keeps it twice.
- Processor time, context switches, requests and bytes are those of the same span.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from perf import fio
from perf.fio import Figures, Job, Target
from perf.procstat import machine_busy, usage

GIB = 1 << 30
MILLION = 1_000_000
PROCESSORS = os.cpu_count() or 1

# job -> system -> one set of figures for each round
Samples = dict[str, dict[str, list[Figures]]]


@dataclass(frozen=True)
class System:
    """Something that serves `size` bytes at each target. `pids`: its processes; `check` raises when data is wrong."""

    name: str
    targets: tuple[Target, ...]
    size: int
    pids: Callable[[], list[int]]
    check: Callable[[], None] = lambda: None


def sample(system: System, job: Job, seconds: float | None = None, requests: int | None = None) -> Figures:
    """One run of a job against a system, with what it cost; the data is checked afterwards."""
    pids = system.pids()
    before, busy, began = usage(pids), machine_busy(), time.monotonic()
    figures = fio.run(list(system.targets[: job.targets]), job, system.size, seconds, requests)
    busy, taken = machine_busy() - busy, time.monotonic() - began
    used = usage(pids) - before
    count = figures["requests"]
    figures |= {
        "cpu_gib": used.cpu * GIB / figures["bytes"],  # seconds of the system's processes for each GiB
        "cpu_million": used.cpu * MILLION / count,  # and for each million requests
        "machine_gib": busy * GIB / figures["bytes"],  # of all that the machine did, client and kernel threads too
        "switches": (used.voluntary + used.involuntary) / count,
        "waits": used.voluntary / count,
        # Of all processors: what neither the system nor its client has used. The kernel's threads are in it.
        "foreign %": 100 * max(0.0, busy - used.cpu - figures["client_cpu"]) / taken / PROCESSORS,
    }
    system.check()
    return figures


def fill(systems: Sequence[System]) -> None:
    for system in systems:
        for target in system.targets:
            fio.run([target], fio.FILL, system.size)


def rounds(
    systems: Sequence[System], jobs: Sequence[Job], repeats: int, seconds: float, say: str, filled: bool = True
) -> Samples:
    """All samples. A line on stderr tells how far it is. The systems take turns in another order each time: whoever
    comes after a certain one, or first in a job, finds the machine as that has left it."""
    if filled:
        fill(systems)
    samples: Samples = {}
    began, done, total = time.monotonic(), 0, repeats * len(jobs) * len(systems)
    for number in range(repeats):
        for job in jobs:
            for system in Random(f"{number} {job.name}").sample(list(systems), len(systems)):
                by_system = samples.setdefault(job.name, {one.name: [] for one in systems})
                by_system[system.name].append(sample(system, job, seconds))
                done += 1
            left = (time.monotonic() - began) / done * (total - done)
            print(f"{say}: round {number + 1} of {repeats}, {job.name}; {left:.0f} s left", file=sys.stderr, flush=True)
    return samples


# ---- what samples say ----


def median(samples: Sequence[Figures], key: str) -> float:
    return statistics.median(figures[key] for figures in samples)


def spread(samples: Sequence[Figures], key: str) -> float:
    """Half of what lies between the extremes, as a part of the median."""
    values = [figures[key] for figures in samples]
    middle = statistics.median(values)
    return (max(values) - min(values)) / 2 / middle if middle else 0.0


def ratios(one: Sequence[Figures], other: Sequence[Figures], key: str) -> list[float]:
    """Of the same rounds: what a slow moment of the machine did to both is not in them."""
    return [a[key] / b[key] for a, b in zip(one, other, strict=False) if b[key]]
