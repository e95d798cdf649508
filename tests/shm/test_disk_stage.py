"""The disk stage as its worker sees it: how it starts, what it is told, how it ends."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from hast.channel import Channel
from hast.component import create, open_component
from hast.ffi import _hast
from hast.shm.arena import Arena, Geometry
from hast.stages import disk
from hast.stages.context import DISK, GGATE, DiskSettings, StageContext
from hast.stages.launch import Child, start_stage

ffi, lib = _hast.ffi, _hast.lib
SECONDS = 30.0
MIB = 1 << 20


@dataclass
class Stage:
    arena: Arena
    child: Child
    channel: Channel
    bells: dict[int, int]

    def event(self) -> dict[str, object]:
        received = self.channel.recv(timeout=SECONDS)
        assert received is not None
        return received[0]

    def code(self) -> int:
        """Its exit code; it has been told to end."""
        status = os.waitstatus_to_exitcode(os.waitpid(self.child.pid, 0)[1])
        self.child.status = status
        return status

    def push(self, slot: int) -> None:
        ring = lib.hast_arena_ring(self.arena.c, lib.HAST_RING_DISK)
        assert lib.hast_ring_push_some(ring, [slot], 1) == 1
        lib.hast_doorbell_force(self.arena.c.bell + DISK, self.bells[DISK])


def start(path: str, engine: str | None = None) -> Stage:
    """As a worker does it: component, arena, doorbells, fork."""
    component = open_component("data", path)
    metadata = component.read_metadata()
    geometry = Geometry(
        datasize=metadata.datasize,
        data_offset=metadata.offset,
        extentsize=metadata.extentsize,
        mapsize=metadata.mapsize,
        keepdirty=metadata.keepdirty,
        nclient=16,
        nsync=4,
        slab_size=128 * 1024,
    )
    arena = Arena.create(geometry, "data")
    bells = {stage: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for stage in (GGATE, DISK)}
    ours, theirs = Channel.pair("disk stage")
    settings = DiskSettings(component.fd, engine or component.engine, component.align)
    context = StageContext("data", "primary", DISK, arena, theirs, bells, settings)
    child = start_stage(context, disk.run, ours)
    component.close()
    return Stage(arena, child, ours, bells)


def end(stage: Stage) -> None:
    if stage.child.status is None:
        stage.child.kill()
        os.waitpid(stage.child.pid, 0)
    os.close(stage.child.pidfd)
    stage.channel.close()
    for bell in stage.bells.values():
        os.close(bell)
    stage.arena.close()


@pytest.fixture
def path(tmp_path: Path) -> str:
    made = tmp_path / "component"
    create("data", str(made), extentsize=65536, mediasize=4 * MIB)
    return str(made)


@pytest.fixture(params=["uring", "threads", "inline"])
def stage(request: pytest.FixtureRequest, path: str) -> Iterator[Stage]:
    if request.param == "uring" and not lib.hast_disk_uring_works():
        pytest.skip("io_uring cannot be set up here")
    started = start(path, request.param)
    try:
        assert started.event() == {"event": "up", "engine": request.param}
        yield started
    finally:
        end(started)


def test_serves_and_stops(stage: Stage, path: str) -> None:
    bio = stage.arena.bio(0)
    bio.cmd, bio.flags, bio.offset, bio.length = lib.HAST_CMD_WRITE, 0, 65536, 4096
    ffi.buffer(lib.hast_arena_slab(stage.arena.c, 0), 4096)[:] = b"\x99" * 4096
    stage.push(0)
    stage.channel.send({"cmd": "stop"})
    assert stage.code() == 0
    # Taken or not: one of the two rings has it.
    rings = [lib.hast_arena_ring(stage.arena.c, r) for r in (lib.HAST_RING_DISK, lib.HAST_RING_DISK_DONE)]
    left, done = (lib.hast_ring_used(ring) for ring in rings)
    assert left + done == 1
    if done:
        assert bio.error[0] == 0
        with closing(open_component("data", path)) as component:
            assert component.pread(component.read_metadata().offset + 65536, 4096) == b"\x99" * 4096


def test_the_lock_is_held_as_long_as_it_lives(stage: Stage, path: str) -> None:
    # The worker has closed its own descriptor (see start).
    with pytest.raises(Exception, match="locked by another"):
        open_component("data", path)
    stage.channel.send({"cmd": "stop"})
    assert stage.code() == 0
    open_component("data", path).close()


def test_the_lock_goes_when_it_is_killed(stage: Stage, path: str) -> None:
    for slot in range(16):
        bio = stage.arena.bio(slot)
        bio.cmd, bio.offset, bio.length = lib.HAST_CMD_READ, slot * 65536, 65536
        stage.push(slot)
    stage.child.kill()
    assert stage.code() == -9
    open_component("data", path, wait=SECONDS).close()


def test_ends_with_its_worker(stage: Stage) -> None:
    stage.channel.close()
    assert stage.code() == 0


def test_damaged_memory_ends_it(stage: Stage) -> None:
    stage.push(stage.arena.c.nslots)
    assert stage.code() == os.EX_SOFTWARE


def test_unknown_message_ends_it(stage: Stage) -> None:
    stage.channel.send({"cmd": "sing"})
    assert stage.code() == os.EX_PROTOCOL


PROGRAM = """
import json, sys
from tests.shm.test_disk_stage import end, start
stage = start(sys.argv[1], "uring")
print(json.dumps(stage.event()))
stage.channel.send({"cmd": "stop"})
print(stage.code())
end(stage)
"""


@pytest.mark.parametrize("error", ["ENOSYS", "EPERM", "ENOMEM"])
def test_without_io_uring_it_takes_threads(path: str, error: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    strace = ["strace", "-f", "-o", "/dev/null", "-e", f"inject=io_uring_setup:error={error}"]
    if subprocess.run([*strace, "true"], capture_output=True).returncode != 0:
        pytest.skip("strace cannot trace here")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [*strace, sys.executable, "-c", PROGRAM, path],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=2 * SECONDS,
    )
    lines = done.stdout.splitlines()
    assert json.loads(lines[0]) == {"event": "up", "engine": "threads"}, done
    assert lines[1] == "0"
    assert "io_uring cannot be used" in done.stderr


def test_flush_that_its_worker_has_failed(stage: Stage) -> None:
    """All later ones fail, as after one of its own."""
    done = lib.hast_arena_ring(stage.arena.c, lib.HAST_RING_DISK_DONE)
    entries = ffi.new("uint32_t[1]")

    def flush() -> int:
        bio = stage.arena.bio(0)
        bio.cmd, bio.flags, bio.offset, bio.length = lib.HAST_CMD_FLUSH, 0, 0, 0
        stage.push(0)
        deadline = time.monotonic() + SECONDS
        while lib.hast_ring_pop_some(done, entries, 1) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return int(bio.error[0])

    assert flush() == 0
    stage.channel.send({"cmd": "flush_failed", "errno": errno.ENOSPC})
    deadline = time.monotonic() + SECONDS
    while stage.arena.stage(DISK).extra[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert flush() == errno.ENOSPC
    stage.channel.send({"cmd": "flush_failed", "errno": errno.EIO})
    stage.channel.send({"cmd": "stop"})
    assert stage.code() == 0
    assert stage.arena.stage(DISK).extra[0] == errno.ENOSPC, "the first counts"
