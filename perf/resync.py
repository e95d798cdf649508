"""Resynchronisation: full and of 10% dirty extents, idle and under client load; beside it what a TCP stream carries.

Timed by the primary's log, which is read every two milliseconds: from "connected ..., N extents to synchronise" to
"synchronisation complete". Asking hastd for its status, or running hastctl, would take processor time
from what is measured.

Invariants:
- Blocks of both components are allocated before: what is timed is the synchronisation, not the file system. What is to
  be copied differs on the secondary, so that the comparison afterwards means something.
- The client's latency counts the requests that were answered inside the timed span, and nothing before or after.
- Full synchronisations and TCP streams are interleaved.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perf import fio, stream
from perf.errors import PerfError
from perf.fio import Job, Target
from perf.measure import GIB
from perf.nodes import compare, pair
from perf.options import Options
from perf.scene import MIB
from tests.e2e.pair import Pair, PairNode
from tests.nbdclient import FLUSH, RawClient

EXTENT = 2 * MIB
BLOCK = 4096
DIRTY = 0.10  # part of the extents
CLIENTS = 0.05  # part of the component, at its start, that the load uses
LOAD = Job("load", "randwrite", "4k", 8)
DEADLINE = 300.0
POLL = 0.002

Sample = dict[str, float]


# ---- the client ----


@dataclass
class Load:
    """Latencies in microseconds by the millisecond (of the clock of the day) in which a request was answered."""

    log: list[tuple[int, float]] = field(default_factory=list)

    def percentile(self, part: float, since: float, until: float) -> float:
        """Of the requests answered in a span. PerfError when there are too few."""
        inside = sorted(us for ms, us in self.log if since * 1000 <= ms <= until * 1000)
        if len(inside) < 20:
            raise PerfError(f"only {len(inside)} requests of the client were answered during the synchronisation")
        return inside[min(len(inside) - 1, int(len(inside) * part))]


@contextmanager
def load(target: Target, size: int) -> Iterator[Load]:
    """A client that writes until the end of the block; its latencies are there after it."""
    found = Load()
    with tempfile.TemporaryDirectory(prefix="hastperf.", dir="/dev/shm") as directory:
        words = fio.command([target], LOAD, size, seconds=DEADLINE)
        words += [f"--write_lat_log={directory}/log", "--log_unix_epoch=1", "--disable_slat=1", "--disable_clat=1"]
        output = Path(directory) / "output"
        with output.open("w") as out:
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield found
            if process.poll() is not None:
                raise PerfError(f"the client has ended: {output.read_text()}")
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        for line in (Path(directory) / "log_lat.1.log").read_text().splitlines():
            fields = line.split(",")
            found.log.append((int(fields[0]), int(fields[1]) / 1e3))


# ---- one synchronisation ----


def full_ahead(two: Pair, size: int) -> int:
    """The stopped secondary gets a component that knows nothing, with wrong data; bytes to be copied."""
    before = two.b.dump()["localoff"]
    two.b.create()
    if two.b.dump()["localoff"] != before:
        raise PerfError("hastctl create has moved the data")
    with two.b.component().open("r+b", buffering=0) as file:
        for at in range(0, size, stream.MESSAGE):
            file.seek(before + at)
            file.write(os.urandom(BLOCK))
    return size


def dirty_ahead(two: Pair, size: int) -> int:
    """The secondary is away: a block is written in 10% of the extents, none of them the load's; bytes to be copied."""
    extents = size // EXTENT
    free = range(int(extents * CLIENTS) + 1, extents)
    wanted = random.sample(free, max(1, int(extents * DIRTY)))
    with RawClient(two.a.socket()) as client:
        for extent in wanted:
            if client.write(extent * EXTENT, os.urandom(BLOCK)):
                raise PerfError("a write on the primary fails while the secondary is away")
        client.do(FLUSH)
    return len(wanted) * EXTENT


def when_said(node: PairNode, since: int, pattern: str) -> tuple[float, re.Match[str]]:
    """When the node's log has it, after so many bytes."""
    deadline = time.monotonic() + DEADLINE
    with node.log.open("rb") as file:
        while True:
            file.seek(since)
            match = re.search(pattern, file.read().decode(errors="replace"))
            if match is not None:
                return time.time(), match
            if time.monotonic() > deadline:
                raise PerfError(f"{node.node} does not say within {DEADLINE:g} s: {pattern}")
            time.sleep(POLL)


def timed(two: Pair) -> tuple[float, float, int]:
    """Start the secondary; when the synchronisation began and ended, and how many bytes it had to copy."""
    since = two.a.log.stat().st_size
    two.b.start()
    two.b.set_role("secondary")
    began, match = when_said(two.a, since, r"connected to \S+, (\d+) extents to synchronise")
    ended, _ = when_said(two.a, since + match.end(), "synchronisation complete")
    return began, ended, int(match[1]) * EXTENT


def one(two: Pair, size: int, full: bool, loaded: bool) -> Sample:
    two.b.stop()
    count = full_ahead(two, size) if full else dirty_ahead(two, size)
    found: Sample = {}
    if loaded:
        with load(Target("nbd", two.a.uri()), int(size * CLIENTS) // EXTENT * EXTENT or EXTENT) as client:
            until_load_runs(two)
            began, ended, copied = timed(two)
        found = {name: client.percentile(part, began, ended) for name, part in (("p50", 0.5), ("p99", 0.99))}
    else:
        began, ended, copied = timed(two)
    two.wait_in_sync(two.a)
    compare(two, "disk")
    if copied < count:
        raise PerfError(f"{copied} bytes were to be synchronised, and not all of {count} that differ")
    return found | {"seconds": ended - began, "rate": copied / 1e6 / (ended - began)}


def until_load_runs(two: Pair) -> None:
    """The client's region is dirty already when the synchronisation begins."""
    before, deadline = two.a.status()["stat_write"], time.monotonic() + 30
    while two.a.status()["stat_write"] < before + 1000:
        if time.monotonic() > deadline:
            raise PerfError("the client does not get on")
        time.sleep(POLL)


def baseline(two: Pair, size: int, seconds: float) -> Sample:
    """The same client, with nothing to synchronise."""
    with load(Target("nbd", two.a.uri()), int(size * CLIENTS) // EXTENT * EXTENT or EXTENT) as client:
        until_load_runs(two)
        began = time.time()
        time.sleep(seconds)
        ended = time.time()
    return {name: client.percentile(part, began, ended) for name, part in (("p50", 0.5), ("p99", 0.99))}


def resync(options: Options) -> dict[str, Any]:
    size = options.resync_size * MIB
    samples: dict[str, list[Sample]] = {}

    def add(name: str, sample: Sample) -> None:
        samples.setdefault(name, []).append(sample)
        told = ", ".join(f"{key} {value:.4g}" for key, value in sample.items())
        print(f"resync: {name}: {told}", file=sys.stderr, flush=True)

    with pair({"disk": size}) as two:
        fio.run([Target("nbd", two.a.uri())], fio.FILL, size)
        for _ in range(options.repeats):
            add("tcp", {"rate": stream.rate(size)})
            part = min(size, GIB)
            add("tcp and files", {"rate": stream.rate(part, two.a.component(), scratch(two, part))})
            add("load only", baseline(two, size, options.seconds))
            for kind, full in (("full", True), ("dirty", False)):
                add(kind, one(two, size, full, loaded=False))
                add(f"{kind}, load", one(two, size, full, loaded=True))
    return {"size": size, "samples": samples}


def scratch(two: Pair, size: int) -> Path:
    """A file beside the secondary's component: allocated once, then written again and again."""
    path = two.b.components / "scratch"
    if not path.exists():
        path.write_bytes(b"")
        with path.open("r+b") as file:
            for _ in range(size // (4 * MIB)):
                file.write(os.urandom(4096) * 1024)
    return path
