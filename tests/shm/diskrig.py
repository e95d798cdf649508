"""A disk pump in a process of its own, and the test in the sequencer's place: it fills bios, pushes them into RING_DISK
and takes them from RING_DISK_DONE. Run as a program this file is that process."""

from __future__ import annotations

import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hast.channel import Channel
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib

ROOT = Path(__file__).resolve().parents[2]
ENGINES = {"inline": lib.HAST_DISK_INLINE, "uring": lib.HAST_DISK_URING, "threads": lib.HAST_DISK_THREADS}
SECONDS = 30.0  # for anything that is waited for
BROKEN = 75  # exit code of the child when the pump says so

SLAB = 128 * 1024
MAPSIZE = 8192
DATA_OFFSET = 4096 + MAPSIZE
DATASIZE = 4 * 1024 * 1024

READ, WRITE, DELETE, FLUSH, MAP = (
    lib.HAST_CMD_READ,
    lib.HAST_CMD_WRITE,
    lib.HAST_CMD_DELETE,
    lib.HAST_CMD_FLUSH,
    lib.HAST_CMD_MAP,
)
ZERO, NOHOLE, DURABLE = lib.HAST_BIO_ZERO, lib.HAST_BIO_NOHOLE, lib.HAST_BIO_DURABLE


@dataclass
class Done:
    """A bio that came back: its errno or 0, and what its slab holds."""

    slot: int
    error: int
    data: bytes


@dataclass
class Rig:
    """The shared memory, the child and the ends of its doorbells. Slots are handed out by take_slot()."""

    arena: Any
    memory: mmap.mmap
    child: subprocess.Popen[bytes]
    control: Channel
    disk_bell: int
    done_bell: int
    memfd: int
    free: list[int] = field(default_factory=list)

    # ---- the sequencer's part ----

    def fill(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> int:
        """A slot with the bio in it, not pushed yet."""
        slot = self.free.pop()
        bio = lib.hast_arena_bio(self.arena, slot)
        bio.cmd, bio.flags, bio.offset = cmd, flags, offset
        bio.length = len(data) if data is not None else length
        bio.error[0] = 9999
        slab = ffi.buffer(lib.hast_arena_slab(self.arena, slot), SLAB)
        slab[:] = b"\xee" * SLAB
        if data is not None:
            slab[: len(data)] = data
        return slot

    def push(self, slots: Iterable[int]) -> None:
        entries = list(slots)
        ring = lib.hast_arena_ring(self.arena, lib.HAST_RING_DISK)
        assert lib.hast_ring_push_some(ring, entries, len(entries)) == len(entries)
        assert lib.hast_doorbell_ring_out(self.arena.bell + lib.HAST_STAGE_DISK, self.disk_bell) == 0

    def submit(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> int:
        slot = self.fill(cmd, offset, length, data, flags)
        self.push([slot])
        return slot

    def pop(self) -> list[Done]:
        """What is in the completion ring now."""
        ring = lib.hast_arena_ring(self.arena, lib.HAST_RING_DISK_DONE)
        entries = ffi.new("uint32_t[]", 64)
        n = lib.hast_ring_pop_some(ring, entries, 64)
        assert n >= 0
        return [self._done(entries[i]) for i in range(n)]

    def _done(self, slot: int) -> Done:
        bio = lib.hast_arena_bio(self.arena, slot)
        assert slot not in self.free, "a slot came back twice"
        self.free.append(slot)
        # offset and length may be garbage on purpose
        length = min(bio.length, SLAB)
        return Done(slot, bio.error[0], bytes(ffi.buffer(lib.hast_arena_slab(self.arena, slot), length)))

    def collect(self, n: int) -> dict[int, Done]:
        """The next n completions, by slot."""
        got: dict[int, Done] = {}
        bell = self.arena.bell + lib.HAST_STAGE_GGATE
        deadline = time.monotonic() + SECONDS
        while len(got) < n:
            lib.hast_doorbell_announce(bell)
            new = self.pop()
            if not new:
                left = deadline - time.monotonic()
                assert left > 0, f"only {len(got)} of {n} bios came back, child's exit code {self.child.poll()}"
                assert self.child.poll() is None, f"the child has ended with {self.child.returncode}"
                select.select([self.done_bell], [], [], min(left, 1.0))
            lib.hast_doorbell_cancel(bell)
            lib.hast_doorbell_drain(self.done_bell)
            got.update((done.slot, done) for done in new)
        return got

    def do(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> Done:
        slot = self.submit(cmd, offset, length, data, flags)
        return self.collect(1)[slot]

    def error(self, cmd: int, offset: int = 0, length: int = 0, data: bytes | None = None, flags: int = 0) -> int:
        return self.do(cmd, offset, length, data, flags).error

    # ---- the worker's part ----

    @property
    def line(self) -> Any:
        return self.arena.stage[lib.HAST_STAGE_DISK]

    def stop(self) -> int:
        """Stop it through its control socket; its exit code."""
        self.control.send({"cmd": "stop"})
        return self.child.wait(SECONDS)

    def close(self) -> None:
        if self.child.poll() is None:
            # strace is told to end its child, which it would otherwise leave behind.
            self.control.close()
            try:
                self.child.wait(SECONDS)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
        self.control.close()
        for fd in (self.disk_bell, self.done_bell, self.memfd):
            os.close(fd)
        self.arena = None
        self.memory.close()


def start(
    component_fd: int,
    engine: str,
    align: int = 1,
    depth: int = 64,
    prefix: Iterable[str] = (),
    follow: bool = False,
    file_limit: int | None = None,
    nclient: int = 64,
    mapsize: int = MAPSIZE,
    data_offset: int = DATA_OFFSET,
    datasize: int = DATASIZE,
) -> Rig:
    """Start the child on this descriptor; prefix: a command that runs it (strace)."""
    geometry = ffi.new(
        "struct hast_geometry *",
        {
            "datasize": datasize,
            "data_offset": data_offset,
            "extentsize": 65536,
            "mapsize": mapsize,
            "keepdirty": 8,
            "nclient": nclient,
            "nsync": 0,
            "slab_size": SLAB,
        },
    )
    size = lib.hast_arena_size(geometry)
    assert size > 0
    memfd = os.memfd_create("hast-test")
    os.ftruncate(memfd, size)
    memory = mmap.mmap(memfd, size)
    arena = ffi.cast("struct hast_arena *", ffi.from_buffer(memory))
    # The cast does not keep the buffer, and the buffer would keep the mapping from being closed: the rig holds both.
    assert lib.hast_arena_init(arena, geometry) == 0
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    disk_bell, done_bell = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
    fds = [memfd, component_fd, theirs.fileno(), disk_bell, done_bell]
    settings = {
        "fds": fds,
        "engine": ENGINES[engine],
        "align": align,
        "depth": depth,
        "follow": int(follow),
        "file_limit": file_limit,
    }
    child = subprocess.Popen(
        [*prefix, sys.executable, __file__, json.dumps(settings)],
        pass_fds=fds,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    theirs.close()
    rig = Rig(arena, memory, child, Channel.from_fd(ours.detach(), "disk child"), disk_bell, done_bell, memfd)
    rig.free = list(range(arena.nslots))
    try:
        received = rig.control.recv(timeout=SECONDS)
        assert received is not None, "the child ended at once"
        assert received[0] == {"event": "up"}, received[0]
    except BaseException:
        rig.close()
        raise
    return rig


def main(settings: dict[str, Any]) -> int:
    memfd, component, control_fd, disk_bell, done_bell = settings["fds"]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = mmap.mmap(memfd, os.fstat(memfd).st_size)
    control = Channel.from_fd(control_fd, "test")
    options = ffi.new(
        "struct hast_disk_options *",
        {
            "fd": component,
            "own_bell": disk_bell,
            "control": control_fd,
            "done_bell": done_bell,
            "done_stage": lib.HAST_STAGE_GGATE,
            "engine": settings["engine"],
            "depth": settings["depth"],
            "align": settings["align"],
            "follow": settings["follow"],
        },
    )
    if settings["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_limit"], settings["file_limit"]))
    pump = lib.hast_disk_new(ffi.from_buffer(memory), options)
    if pump == ffi.NULL:
        control.send({"event": "failed", "errno": ffi.errno})
        return 1
    control.send({"event": "up"})
    result = -4
    while result == -4:  # EINTR
        result = lib.hast_disk_pump(pump)
    lib.hast_disk_free(pump)
    if result == lib.HAST_PUMP_CONTROL:
        return 0
    return BROKEN if result == lib.HAST_PUMP_BROKEN else 1


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
