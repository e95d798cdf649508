"""Where the processors' time goes while something is traced: everybody's, the kernel's threads included."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from perf.procstat import machine_idle
from perf.tracing import said

IDLE = "idle"


@dataclass(frozen=True)
class Time:
    """Seconds on a processor, and runnable without one."""

    ran: float = 0.0
    waited: float = 0.0

    def __add__(self, other: Time) -> Time:
        return Time(self.ran + other.ran, self.waited + other.waited)

    def __sub__(self, other: Time) -> Time:
        return Time(self.ran - other.ran, self.waited - other.waited)


@dataclass
class Clock:
    """What everybody has used since it was started, by name: "primary: ggate" of this resource, else the first word of
    the thread's name, so that all workers of the kernel are one."""

    resource: str
    began: float = field(default_factory=time.monotonic)
    idle: float = field(default_factory=machine_idle)
    before: dict[int, Time] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = {thread: used for thread, (_, used) in self._now().items()}

    def used(self) -> tuple[float, dict[str, Time]]:
        """Seconds of all processors since the start, and who used what of them. What is missing at the sum was spent in
        interrupts, or by those who have ended meanwhile."""
        found = {IDLE: Time(machine_idle() - self.idle)}
        for thread, (name, used) in self._now().items():
            found[name] = found.get(name, Time()) + (used - self.before.get(thread, Time()))
        return (time.monotonic() - self.began) * len(os.sched_getaffinity(0)), found

    def _now(self) -> dict[int, tuple[str, Time]]:
        found = {}
        for schedstat in Path("/proc").glob("[0-9]*/task/*/schedstat"):
            try:
                ran, waited, _ = (int(word) for word in schedstat.read_text().split())
                name = self._name(int(schedstat.parts[2]), (schedstat.parent / "comm").read_text().strip())
            except OSError:
                continue  # it is gone
            found[int(schedstat.parts[4])] = (name, Time(ran / 1e9, waited / 1e9))
        return found

    def _name(self, pid: int, comm: str) -> str:
        of = f"hastd: {self.resource} ("
        title = said(pid) if comm.startswith("hastd") else ""
        return title.removeprefix(of).replace(")", "", 1) if title.startswith(of) else comm.partition("/")[0]
