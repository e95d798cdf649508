"""What processes cost: processor time, context switches, memory, system calls; read from /proc and from strace."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from perf.errors import PerfError

TICKS = os.sysconf("SC_CLK_TCK")
DEADLINE = 60.0


@dataclass(frozen=True)
class Usage:
    """Since the processes began."""

    cpu: float  # seconds, of user and system
    voluntary: int  # context switches: it waited
    involuntary: int  # another one took its processor

    def __sub__(self, other: Usage) -> Usage:
        return Usage(self.cpu - other.cpu, self.voluntary - other.voluntary, self.involuntary - other.involuntary)


def usage(pids: Sequence[int]) -> Usage:
    """Of processes with all their threads. PerfError when one is gone: the figure would be wrong."""
    ticks, switches = 0, {"voluntary_ctxt_switches": 0, "nonvoluntary_ctxt_switches": 0}
    try:
        for pid in pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])  # utime and stime
            for status in Path(f"/proc/{pid}/task").glob("*/status"):
                for line in status.read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in switches:
                        switches[key] += int(value)
    except OSError as error:
        raise PerfError(f"a process that is being measured is gone: {error}") from error
    return Usage(ticks / TICKS, switches["voluntary_ctxt_switches"], switches["nonvoluntary_ctxt_switches"])


def run_seconds(pids: Sequence[int]) -> float:
    """Processor time of processes to the nanosecond, where the ticks of usage() are too coarse: many that do next to
    nothing. Threads that have ended are not in it."""
    total = 0
    for pid in pids:
        for schedstat in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            total += int(schedstat.read_text().split()[0])
    return total / 1e9


def machine_busy() -> float:
    """Seconds that all processors were not idle, since the machine's start: kernel threads and clients included."""
    fields = stat_fields()
    idle, iowait, steal = fields[3], fields[4], fields[7]
    return (sum(fields[:8]) - idle - iowait - steal) / TICKS


def machine_idle() -> float:
    """Seconds that all processors had nothing to do, since the machine's start."""
    fields = stat_fields()
    return (fields[3] + fields[4]) / TICKS


def stat_fields() -> list[int]:
    """Of all processors: user, nice, system, idle, iowait, irq, softirq, steal, in ticks."""
    return [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]


def memory(pids: Sequence[int]) -> float:
    """MiB of resident memory of processes, what they share with others counted in proportion (PSS)."""
    kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    kib += int(line.split()[1])
    return kib / 1024


# ---- system calls ----


def traced(pid: int) -> bool:
    """Whether somebody traces all threads of a process."""
    try:
        states = [status.read_text() for status in Path(f"/proc/{pid}/task").glob("*/status")]
    except OSError:
        return False
    return bool(states) and all("TracerPid:\t0\n" not in state for state in states)


@contextlib.contextmanager
def counted(pids: Sequence[int]) -> Iterator[dict[str, int]]:
    """Counts the system calls that processes make inside the block; they are in the dictionary after it.

    strace slows them down, so a process is asleep less often, or more often, than it is without: counts are close to,
    and not the same as, those of a run at full speed.
    """
    calls: dict[str, int] = {}
    with tempfile.NamedTemporaryFile(prefix="hastperf.", suffix=".strace") as out:
        words = ["strace", "-f", "-q", "-c", "-o", out.name]
        for pid in pids:
            words += ["-p", str(pid)]
        strace = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            deadline = time.monotonic() + DEADLINE
            while not all(traced(pid) for pid in pids):
                if strace.poll() is not None or time.monotonic() > deadline:
                    said = strace.stderr.read().decode() if strace.poll() is not None and strace.stderr else "in vain"
                    raise PerfError(f"strace cannot trace the processes: {said}")
                time.sleep(0.02)
            yield calls
        finally:
            strace.send_signal(signal.SIGINT)
            strace.communicate(timeout=DEADLINE)
        calls |= parse_strace(Path(out.name).read_text())


def parse_strace(text: str) -> dict[str, int]:
    """System call -> how many, of the table that strace -c prints."""
    calls: dict[str, int] = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) in (5, 6) and fields[3].isdigit() and fields[-1] != "total":
            calls[fields[-1]] = calls.get(fields[-1], 0) + int(fields[3])
    return calls
