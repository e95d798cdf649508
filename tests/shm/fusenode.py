"""ggate and disk stages under a FUSE block device and nothing else: no metadata, no daemon. FuseNode is what tests use;
run as a program this file is what it starts: python -m tests.shm.fusenode RUNDIR NAME COMPONENT '{"datasize": ...}'

The component is a file whose first 8192 bytes are a block for metadata (not used) and the activemap. The program
reads one command a line and answers each with one line of JSON: attach; facts; stop (SIGSTOP of both stages);
stop disk; crash (kill -9 of both stages, new ones in a new arena). End of file ends it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hast.device import fuse, loop
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib

ROOT = Path(__file__).resolve().parents[2]
DATA_OFFSET = 8192
SECONDS = 60.0  # for anything that is waited for; then the channel is aborted, so that nobody hangs for ever
DEFAULTS: dict[str, Any] = {"datasize": 64 << 20, "nclient": 256, "slab_size": 131072, "file_limit": 0}


# ---- the tests' side ----


class FuseNode:
    """A running device; `device` is its loop device's path, the link is devdir/NAME."""

    def __init__(self, tmp_path: Path, name: str, **settings: Any) -> None:
        self.rundir, self.devdir = tmp_path / "run", tmp_path / "dev"
        self.rundir.mkdir(mode=0o700, exist_ok=True)
        self.name = name
        self.settings = {**DEFAULTS, **settings}
        self.component = tmp_path / "component"
        if not self.component.exists():
            with self.component.open("wb") as file:
                file.truncate(DATA_OFFSET + self.settings["datasize"])
        arguments = [str(self.rundir), name, str(self.component), json.dumps(self.settings)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.shm.fusenode", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=ROOT,
        )
        self.device = ""

    def ask(self, command: str) -> dict[str, Any]:
        """Have the program carry out a command; its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        readable, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        assert readable, f"no answer to {command}"
        line = self.process.stdout.readline()
        assert line, f"no answer to {command}: the program has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def attach(self) -> Path:
        """Attach the loop device and publish it in devdir; its path."""
        self.device = self.ask("attach")["device"]
        fuse.publish(Path(self.device), self.name, self.devdir)
        return Path(self.device)

    @property
    def mount_point(self) -> Path:
        return fuse.mount_point(self.rundir, self.name)

    def kill_all(self) -> None:
        """kill -9 of the program and its stages."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        """End it, and leave nothing behind whatever state it is in."""
        fuse.abort(self.rundir, self.name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                assert stream is not None
                stream.close()
        fuse.detach(self.rundir, self.name, self.name, self.devdir)


@contextlib.contextmanager
def running(tmp_path: Path, name: str, **settings: Any) -> Iterator[FuseNode]:
    """A device for the time of the block. A watchdog aborts its channel (and no other) when a test hangs."""
    reason = fuse.usable()
    if reason is not None:
        pytest.skip(reason)
    node = FuseNode(tmp_path, name, **settings)
    watchdog = threading.Timer(SECONDS, fuse.abort, (node.rundir, name))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield node
    finally:
        watchdog.cancel()
        node.close()


# ---- the program ----


def make_arena(settings: dict[str, Any], component: int) -> tuple[Any, mmap.mmap]:
    """An arena in shared anonymous memory, which the stages inherit; with the activemap as it is on disk."""
    geometry = {
        "datasize": settings["datasize"],
        "data_offset": DATA_OFFSET,
        "extentsize": 2 << 20,
        "mapsize": 4096,
        "keepdirty": 64,
        "nclient": settings["nclient"],
        "nsync": 4,
        "slab_size": settings["slab_size"],
    }
    c_geometry = ffi.new("struct hast_geometry *", geometry)
    size = lib.hast_arena_size(c_geometry)
    assert size, "impossible geometry"
    memory = mmap.mmap(-1, size)
    arena = ffi.cast("struct hast_arena *", ffi.from_buffer(memory))
    assert lib.hast_arena_init(arena, c_geometry) == 0
    lib.hast_seq_load_map(arena, ffi.from_buffer("uint8_t[]", os.pread(component, 4096, 4096)))
    return arena, memory


@dataclass
class Stages:
    """One life of the two stages."""

    arena: Any
    memory: mmap.mmap
    pids: list[int]  # disk, ggate
    controls: list[socket.socket]
    bells: list[int]

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for end in self.controls:
            end.close()
        for bell in self.bells:
            os.close(bell)


def fork(body: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        body()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def disk(arena: Any, component: int, bells: list[int], control: int, file_limit: int) -> None:
    if file_limit:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    options = ffi.new(
        "struct hast_disk_options *",
        {
            "fd": component,
            "own_bell": bells[lib.HAST_STAGE_DISK],
            "control": control,
            "done_bell": bells[lib.HAST_STAGE_GGATE],
            "done_stage": lib.HAST_STAGE_GGATE,
            "engine": lib.HAST_DISK_INLINE,
            "depth": 128,
            "align": 1,
        },
    )
    pump = lib.hast_disk_new(arena, options)
    assert pump != ffi.NULL, os.strerror(ffi.errno)
    print(f"disk: {lib.hast_disk_pump(pump)}", file=sys.stderr)


def ggate(arena: Any, bells: list[int], control: int, channel: int, resend: bool) -> None:
    pump = lib.hast_ggate_new(arena, bells[lib.HAST_STAGE_GGATE], control, bells[lib.HAST_STAGE_DISK])
    error = lib.hast_fuse_add(pump, channel, int(resend))
    assert error == 0, os.strerror(-error)
    seq = lib.hast_arena_seq(arena)
    while (result := lib.hast_ggate_pump(pump)) == lib.HAST_PUMP_EVENT:
        seq.events = 0
        lib.hast_seq_grant_degraded(arena)
    reason = os.strerror(lib.hast_ggate_device_error(pump))
    print(f"ggate: {result} {reason if result == lib.HAST_PUMP_DEVICE else ''}", file=sys.stderr)


def start(settings: dict[str, Any], component: int, channel: int, resend: bool) -> Stages:
    arena, memory = make_arena(settings, component)
    bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(5)]
    pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    pids = [
        fork(lambda: disk(arena, component, bells, pairs[0][1].fileno(), settings["file_limit"])),
        fork(lambda: ggate(arena, bells, pairs[1][1].fileno(), channel, resend)),
    ]
    return Stages(arena, memory, pids, [end for pair in pairs for end in pair], bells)


def facts(arena: Any) -> dict[str, int]:
    seq = lib.hast_arena_seq(arena)
    names = ("read", "write", "del", "flush", "map_update", "write_error")
    return {name: getattr(seq.stats, name) for name in names} | {"free": seq.nfree, "inuse": seq.inuse}


def main() -> None:
    rundir, name, component = Path(sys.argv[1]), sys.argv[2], os.open(sys.argv[3], os.O_RDWR)
    settings = json.loads(sys.argv[4])
    channel = fuse.open_channel()
    fuse.mount(channel, rundir, name)
    stages = start(settings, component, channel, resend=False)
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        if line == "attach\n":
            answer["device"] = str(fuse.attach_loop(rundir, name))
        elif line == "facts\n":
            answer = facts(stages.arena)
        elif line in ("stop\n", "stop disk\n"):
            for pid in stages.pids[: 1 if "disk" in line else 2]:
                os.kill(pid, signal.SIGSTOP)
        elif line == "crash\n":
            stages.kill()
            stages = start(settings, component, channel, resend=True)
        answer["loops"] = loop.devices_of(fuse.mount_point(rundir, name))
        print(json.dumps(answer), flush=True)
    stages.kill()


if __name__ == "__main__":
    main()
