"""How a trace is taken: the arenas of a running resource, and snapshots of what its stages note.

Snapshots that are taken seldom are samples: what a stage notes between two of them may be overwritten before it is
seen. So events come in runs, and nothing may be concluded across the end of one (runs()).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hast.shm import trace
from hast.shm.arena import Arena
from hast.shm.trace import Event, Snapshot
from perf import hops
from perf.errors import PerfError

EVERY = 0.05  # seconds between snapshots
Shots = list[dict[str, Snapshot]]  # by stage


def shots_of(arena: Arena) -> dict[str, Snapshot]:
    return {name: trace.snapshot(arena, stage) for name, stage in hops.STAGES.items()}


def take(arenas: Sequence[Arena], over: Callable[[], bool], every: float = EVERY) -> list[Shots]:
    """Snapshots of each arena at the same moments, with tracing on only until it is over."""
    taken: list[Shots] = [[] for _ in arenas]
    with trace.traced(*arenas):
        while not over():
            time.sleep(every)
            for shots, arena in zip(taken, arenas, strict=True):
                shots.append(shots_of(arena))
    return taken


def after(seconds: float) -> Callable[[], bool]:
    """For take(): whether so much time has passed from now on."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def events_of(shots: Shots) -> dict[str, list[Event]]:
    """The events of each stage, each once."""
    events: dict[str, list[Event]] = {name: [] for name in hops.STAGES}
    for shot in shots:
        for name, of in shot.items():
            events[name] += of.events(events[name][-1].number + 1 if events[name] else 0)
    return events


def runs(events: Iterable[Event]) -> list[list[Event]]:
    """Pieces in which no event is missing."""
    found: list[list[Event]] = []
    for event in events:
        if not found or event.number != found[-1][-1].number + 1:
            found.append([])
        found[-1].append(event)
    return found


# ---- whose arenas ----


def titled(title: str, pids: Sequence[int]) -> int | None:
    """The process of that title."""
    for pid in pids:
        if said(pid) == title:
            return pid
    return None


def said(pid: int) -> str:
    """A process's title; "" when it is gone, or belongs to the kernel."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def arenas_of(resource: str, primary: Sequence[int], secondary: Sequence[int]) -> list[Arena]:
    """The primary's, and the secondary's if it is there."""
    found = []
    for role, pids in (("primary", primary), ("secondary", secondary)):
        pid = titled(f"hastd: {resource} ({role})", pids)
        if pid is not None:
            found.append(trace.attach(pid))
        elif role == "primary":
            raise PerfError(f"{resource}: no process here is titled 'hastd: {resource} (primary)'")
    return found
