"""fio: the jobs of the comparison, and one run of one of them.

Invariants:
- A figure is what fio reports of the span that it timed, and counts no ramp.
- All systems get the same job: the same requests, depth and span; only the engine is the target's.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any

from perf.errors import PerfError

PERCENTILES = {"p50": "50.000000", "p90": "90.000000", "p99": "99.000000", "p99.9": "99.900000"}

# Of one run: "rate" in the job's unit, percentiles in microseconds, "bytes", "requests", "client_cpu" in seconds.
Figures = dict[str, float]


@dataclass(frozen=True)
class Target:
    """What fio opens: an NBD URI, a block device, or a file (with or without O_DIRECT)."""

    kind: str  # "nbd", "block" or "file"
    where: str
    direct: bool = True

    def args(self) -> list[str]:
        if self.kind == "nbd":
            return ["--ioengine=nbd", f"--uri={self.where}"]
        return ["--ioengine=libaio", f"--filename={self.where}", f"--direct={int(self.direct)}"]


@dataclass(frozen=True)
class Job:
    name: str
    rw: str
    bs: str
    depth: int
    unit: str = "iops"  # or "MB/s"
    fsync: bool = False  # after each write
    targets: int = 1

    @property
    def writes(self) -> bool:
        return self.rw in ("write", "randwrite", "randrw")

    def args(self) -> list[str]:
        words = [f"--rw={self.rw}", f"--bs={self.bs}", f"--iodepth={self.depth}"]
        if self.rw == "randrw":
            words += ["--rwmixread=70", "--unified_rw_reporting=1"]
        if self.fsync:
            words += ["--fsync=1"]
        return words


JOBS = (
    *(Job(f"{rw} 4k depth {depth}", rw, "4k", depth) for rw in ("randwrite", "randread") for depth in (1, 8, 32)),
    *(Job(f"{rw} 64k depth 8", rw, "64k", 8) for rw in ("randwrite", "randread")),
    *(Job(f"{rw} 128k depth 8", rw, "128k", 8, "MB/s") for rw in ("write", "read")),
    Job("mix 70/30 4k depth 32", "randrw", "4k", 32),
    Job("randwrite 4k depth 1, fsync", "randwrite", "4k", 1, fsync=True),
)
TWO_JOBS = tuple(
    Job(f"two: {rw} 4k depth {depth}", rw, "4k", depth, targets=2)
    for rw in ("randwrite", "randread")
    for depth in (1, 32)
)
FILL = Job("fill", "write", "1m", 4, "MB/s")


def command(
    targets: list[Target], job: Job, size: int, seconds: float | None = None, requests: int | None = None
) -> list[str]:
    """fio's command line: for some seconds, or that many requests, or else once over all data."""
    span: list[str] = []
    if seconds is not None:
        span = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    elif requests is not None:
        span = [f"--number_ios={requests}"]
    words = ["fio", "--output-format=json"]
    for number, target in enumerate(targets):
        words += [f"--name=job{number}", *target.args(), *job.args(), f"--size={size}", *span]
        words += ["--randrepeat=0", "--norandommap", "--group_reporting"]
    return words


def run(
    targets: list[Target], job: Job, size: int, seconds: float | None = None, requests: int | None = None
) -> Figures:
    """One run. PerfError when it fails."""
    words = command(targets, job, size, seconds, requests)
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise PerfError(
            f"fio, {job.name}: exit status {done.returncode}\n{' '.join(words)}\n{done.stdout}{done.stderr}"
        )
    return figures(done.stdout, job)


def figures(output: str, job: Job) -> Figures:
    """What fio's JSON says of the (first group of the) job."""
    result: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    side = result["mixed"] if "mixed" in result else result["write" if job.writes else "read"]
    # With an fsync after each write it is the fsync that a user waits for.
    latencies = result["sync"]["lat_ns"] if job.fsync else side["clat_ns"]
    found: Figures = {
        "rate": side["iops"] if job.unit == "iops" else side["bw_bytes"] / 1e6,
        "bytes": side["io_bytes"],
        "requests": side["total_ios"] * (2 if job.fsync else 1),
        "client_cpu": (result["usr_cpu"] + result["sys_cpu"]) / 100 * side["runtime"] / 1000,
    }
    for name, key in PERCENTILES.items():
        found[name] = latencies["percentile"][key] / 1e3
    return found
