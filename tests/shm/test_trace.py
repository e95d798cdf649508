"""The logs of hast/ffi/trace.h: what is in them, what they cost when nobody wants them, and how a tool gets at them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from hast.errors import SystemCallError
from hast.ffi import _hast
from hast.shm import trace
from hast.shm.arena import Arena, Geometry
from hast.shm.trace import Snapshot

lib = _hast.lib

DISK = lib.HAST_STAGE_DISK
SIZE = lib.HAST_TRACE_EVENTS
GEOMETRY = Geometry(64 << 20, 1 << 20, 2 << 20, 512, 64, 6, 2, 4096)


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(GEOMETRY, "r")
    yield made
    made.close()


def note(arena: Arena, *keys: int) -> None:
    for key in keys:
        lib.hast_trace_note(arena.c, DISK, lib.HAST_TRACE_IN, key)


def test_the_logs_take_no_memory_before_tracing_begins(arena: Arena) -> None:
    without = os.fstat(arena.fd).st_blocks
    arena.trace(True)
    assert (os.fstat(arena.fd).st_blocks - without) * 512 == lib.hast_trace_size()


def test_all_stages_are_switched_and_by_default_none_is(arena: Arena) -> None:
    def switched() -> set[int]:
        return {int(arena.stage(stage).trace) for stage in range(lib.HAST_STAGES)}

    assert switched() == {0}
    with trace.traced(arena):
        assert switched() == {1}
    assert switched() == {0}


def test_no_memory_is_an_error_and_nothing_is_switched_on(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SystemCallError, match="no memory for a trace: No space left on device"), trace.traced(arena):
        pytest.fail("it was taken for switched on")
    assert arena.stage(DISK).trace == 0


def test_events_are_in_order_and_of_their_stage(arena: Arena) -> None:
    arena.trace(True)
    note(arena, 7, 8, 9)
    events = trace.snapshot(arena, DISK).events()
    assert [(event.number, event.key, event.point) for event in events] == [
        (n, key, lib.HAST_TRACE_IN) for n, key in enumerate((7, 8, 9))
    ]
    assert events[0].ns <= events[1].ns <= events[2].ns
    assert [event.key for event in trace.snapshot(arena, DISK).events(since=2)] == [9]
    assert trace.count(arena, lib.HAST_STAGE_GGATE) == 0


def test_the_newest_replace_the_oldest(arena: Arena) -> None:
    arena.trace(True)
    note(arena, *range(3 * SIZE + 10))
    events = trace.snapshot(arena, DISK).events()
    # All but one, in whose place the next may be half written.
    assert [event.key for event in events] == list(range(2 * SIZE + 11, 3 * SIZE + 10))


def test_what_may_be_half_written_or_overwritten_is_left_out() -> None:
    log = bytes(trace.LOG_HEADER + SIZE * trace.EVENT.size)
    numbers = [event.number for event in Snapshot(SIZE + 100, SIZE + 150, log).events()]
    assert numbers == list(range(151, SIZE + 100))
    assert Snapshot(100, 3 * SIZE, log).events() == [], "all was overwritten while it was read"


def test_a_reader_beside_a_writer_sees_whole_events_only(arena: Arena) -> None:
    """Keys are the events' numbers, written in a tight loop while snapshots are taken."""
    arena.trace(True)
    stop = threading.Event()
    ffi = _hast.ffi

    def write() -> None:
        number = 0
        while not stop.is_set():
            for _ in range(1000):
                lib.hast_trace_note(arena.c, DISK, lib.HAST_TRACE_IN, number)
                number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen, last = 0, -1
        while seen < 20 * SIZE:
            for event in trace.snapshot(arena, DISK).events(last + 1):
                assert event.key == event.number and event.point == lib.HAST_TRACE_IN
                seen, last = seen + 1, event.number
    finally:
        stop.set()
        writer.join()
    assert ffi.sizeof("struct hast_trace_event") == trace.EVENT.size


def test_a_tool_finds_the_arena_of_a_process() -> None:
    program = f"""
from hast.ffi._hast import lib
from hast.shm.arena import Arena, Geometry
arena = Arena.create({GEOMETRY}, "r")
print(arena.stage(lib.HAST_STAGE_DISK).trace, flush=True)
input()
print(arena.stage(lib.HAST_STAGE_DISK).trace, flush=True)
lib.hast_trace_note(arena.c, lib.HAST_STAGE_DISK, lib.HAST_TRACE_IN, 5)
input()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "0\n"
        with trace.traced(there := trace.attach(other.pid)):
            print(file=other.stdin, flush=True)
            assert other.stdout.readline() == "1\n"
            other.communicate("\n", timeout=60)
            assert [event.key for event in trace.snapshot(there, DISK).events()] == [5]
        there.close()


def test_a_process_without_an_arena_is_told_of() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        with pytest.raises(SystemCallError, match=f"process {other.pid} has no shared memory of hastd"):
            trace.attach(other.pid)
        other.communicate(b"\n", timeout=60)
    with pytest.raises(SystemCallError, match=f"cannot open the shared memory of process {other.pid}"):
        trace.attach(other.pid)
