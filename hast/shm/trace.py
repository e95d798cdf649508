"""What the stages of a running resource note about their bios (hast/ffi/trace.h), for tests and tools.

A tool finds the arena through a process that has it, switches tracing on, takes snapshots while bios go by, and
switches it off again; nobody in hastd knows of it.

Invariants:
- An event is reported only when it was whole before the snapshot began and not overwritten before it ended.
- Nothing of an arena is changed but the switch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hast.errors import SystemCallError
from hast.ffi import _hast
from hast.shm.arena import NAME, Arena

lib = _hast.lib

LOG_HEADER = 64  # bytes before the first event
EVENT = struct.Struct("<QQII")


@dataclass(frozen=True)
class Event:
    """Event `number` of a stage, counted from 0, at `ns` of CLOCK_MONOTONIC.

    point: enum hast_trace_point; key: a bio's seq (ADMIT: its slot), or 0."""

    number: int
    ns: int
    point: int
    key: int


@dataclass(frozen=True)
class Snapshot:
    """A stage's log as it was between two looks at its count."""

    before: int
    after: int
    log: bytes

    def events(self, since: int = 0) -> list[Event]:
        """In order, from number `since` on, without those that are not there any more."""
        size = int(lib.HAST_TRACE_EVENTS)
        # One more may have been under way when the count was read.
        first = max(since, self.after + 1 - size, 0)
        found = []
        for number in range(first, self.before):
            ns, key, point, _ = EVENT.unpack_from(self.log, LOG_HEADER + number % size * EVENT.size)
            found.append(Event(number, ns, point, key))
        return found


def count(arena: Arena, stage: int) -> int:
    """How many events a stage (enum hast_stage_id) has ever noted."""
    return int(lib.hast_arena_trace(arena.c, stage).count)


def snapshot(arena: Arena, stage: int) -> Snapshot:
    before = count(arena, stage)
    log = arena.trace_log(stage)
    return Snapshot(before, count(arena, stage), log)


def attach(pid: int) -> Arena:
    """The arena that a worker or a stage works with.

    Raises SystemCallError when there is none or it must not be opened, DataError when it is another version's."""
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if not str(link.readlink()).startswith(f"/memfd:{NAME}"):
                continue
            fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
            try:
                return Arena.attach(fd)
            finally:
                os.close(fd)
    except OSError as error:
        raise SystemCallError(f"cannot open the shared memory of process {pid}: {error}") from error
    raise SystemCallError(f"process {pid} has no shared memory of hastd: it is no worker or stage of a resource")


@contextmanager
def traced(*arenas: Arena) -> Iterator[None]:
    """All of them are traced until the block ends. Raises SystemCallError."""
    try:
        for arena in arenas:
            arena.trace(True)
        yield
    finally:
        for arena in arenas:
            arena.trace(False)
