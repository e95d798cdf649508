"""What the measurements share: fio jobs against NBD servers, in interleaved rounds, and the table of the result.

Invariants:
- In each round every job runs against every system in turn, so that a slow moment of the machine hits all of them;
  figures are medians over the rounds.
- The processor time of a job and its bytes are those of the same span: there is no ramp that only one of them counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZE = 1 << 30
GIB = 1 << 30
TICKS = os.sysconf("SC_CLK_TCK")

# For one (job, system): "rate" in the job's unit, "p50" and "p99" in microseconds, "cpu" in seconds for each GiB.
Figures = dict[str, float]
Result = dict[str, dict[str, Figures]]  # job -> system -> figures


@dataclass(frozen=True)
class Job:
    name: str
    args: tuple[str, ...]
    unit: str  # "iops" or "MB/s"

    @property
    def writes(self) -> bool:
        return "write" in self.args[0]


def job(name: str, rw: str, bs: str, depth: int, unit: str = "iops") -> Job:
    return Job(name, (f"--rw={rw}", f"--bs={bs}", f"--iodepth={depth}"), unit)


JOBS = (
    job("randwrite 4k depth 1", "randwrite", "4k", 1),
    job("randwrite 4k depth 32", "randwrite", "4k", 32),
    job("randread 4k depth 1", "randread", "4k", 1),
    job("randread 4k depth 32", "randread", "4k", 32),
    job("write 128k depth 8", "write", "128k", 8, "MB/s"),
)
FILL = job("fill", "write", "1m", 4, "MB/s")


@dataclass(frozen=True)
class System:
    """Something that serves SIZE bytes at an NBD URI. `pids`: all its processes; `check` raises when data is wrong."""

    name: str
    uri: str
    pids: Callable[[], list[int]]
    check: Callable[[], None] = lambda: None
    reads_only: bool = False


# ---- servers ----


def wait_until(ready: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 15
    while not ready():
        if time.monotonic() > deadline or (process is not None and process.poll() is not None):
            sys.exit(f"in vain: {what}")
        time.sleep(0.01)


@contextmanager
def server(command: list[str], ready: Callable[[], bool]) -> Iterator[int]:
    """The process ID of a server that runs until the end of the block."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_until(ready, " ".join(command), process)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def empty_file(path: Path) -> Path:
    with path.open("wb") as f:
        f.truncate(SIZE)
    return path


# ---- jobs ----


def cpu_seconds(pids: Sequence[int]) -> float:
    """User and system time that processes, with all their threads, have used so far. OSError when one is gone."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime
    return ticks / TICKS


def fio(uri: str, which: Job, seconds: int | None) -> Figures:
    """Run a job for some time, or once over all data; its rate, latencies in microseconds, and "bytes"."""
    span = [] if seconds is None else ["--time_based", f"--runtime={seconds}"]
    done = subprocess.run(
        ["fio", "--name=job", "--ioengine=nbd", f"--uri={uri}", *which.args, f"--size={SIZE}", *span,
         "--randrepeat=0", "--norandommap", "--output-format=json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"fio, {which.name}, {uri}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    result = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    side = result["write" if which.writes else "read"]
    percentiles = side["clat_ns"]["percentile"]
    return {
        "rate": side["iops"] if which.unit == "iops" else side["bw_bytes"] / 1e6,
        "p50": percentiles["50.000000"] / 1e3,
        "p99": percentiles["99.000000"] / 1e3,
        "bytes": side["io_bytes"],
    }


def run(system: System, which: Job, seconds: int) -> Figures:
    """A job against a system, whose data is checked afterwards."""
    pids = system.pids()
    before = cpu_seconds(pids)
    figures = fio(system.uri, which, seconds)
    figures["cpu"] = (cpu_seconds(pids) - before) * GIB / figures.pop("bytes")
    system.check()
    return figures


def measure(systems: Sequence[System], jobs: Sequence[Job], rounds: int, seconds: int) -> Result:
    for system in systems:  # every block allocated before anything is timed
        fio(system.uri, FILL, None)
    samples: dict[str, dict[str, list[Figures]]] = {}
    for _ in range(rounds):
        for which in jobs:
            for system in systems:
                if not (which.writes and system.reads_only):
                    by_system = samples.setdefault(which.name, {})
                    by_system.setdefault(system.name, []).append(run(system, which, seconds))
    return {
        which: {
            name: {key: statistics.median(figures[key] for figures in runs) for key in runs[0]}
            for name, runs in by_system.items()
        }
        for which, by_system in samples.items()
    }


# ---- what is printed ----


def table(result: Result, jobs: Sequence[Job], head: str, ratio: Callable[[dict[str, Figures], str], float]) -> str:
    """Lines of text; `ratio` tells the figure below `head` from all systems' figures and a system's name."""
    lines = [f"{'job':<24}{'server':<16}{'rate':>13}{'p50 us':>9}{'p99 us':>9}{head:>11}{'cpu s/GiB':>11}"]
    units = {which.name: which.unit for which in jobs}
    for which, by_system in result.items():
        for name, figures in by_system.items():
            rate = f"{figures['rate']:.0f} {units[which]}"
            lines.append(
                f"{which:<24}{name:<16}{rate:>13}{figures['p50']:>9.0f}{figures['p99']:>9.0f}"
                f"{ratio(by_system, name):>10.2f}x{figures['cpu']:>11.2f}"
            )
    return "\n".join(lines)


def machine() -> str:
    """What the figures depend on: processors, and what else the machine has to do."""
    return f"{len(os.sched_getaffinity(0))} processors, load average {os.getloadavg()[0]:.1f} at the start"


def arguments(description: str | None, *tools: str) -> argparse.Namespace:
    """The command line: rounds, seconds, json. Exits when a tool is missing."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0] if description else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4, help="for each job (default: 4)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        sys.exit(f"needed and not installed: {', '.join(missing)}")
    return args
