"""ggate and disk stages with NBD clients and nothing else: no metadata, no daemon. Run as a program by
test_nbd_port.py:  python -m tests.shm.nbdserver SOCKET COMPONENT '{"datasize": ...}'

The component is a file whose first 8192 bytes are a block for metadata (not used) and the activemap. Prints
"ready", serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hast.device.nbd import NbdExport
from hast.device.nbdlisten import NbdListener
from hast.ffi import _hast

ffi, lib = _hast.ffi, _hast.lib
DATA_OFFSET = 8192
DEFAULTS: dict[str, Any] = {
    "datasize": 64 << 20,
    "nclient": 64,
    "slab_size": 131072,
    "engine": "inline",
    "file_limit": 0,  # bytes: writes behind it fail (0: none)
    "read_only": False,
}


def make_arena(settings: dict[str, Any]) -> tuple[Any, mmap.mmap]:
    """An arena in shared anonymous memory, which the children inherit."""
    geometry = ffi.new(
        "struct hast_geometry *",
        {
            "datasize": settings["datasize"],
            "data_offset": DATA_OFFSET,
            "extentsize": 2 << 20,
            "mapsize": 4096,
            "keepdirty": 64,
            "nclient": settings["nclient"],
            "nsync": 4,
            "slab_size": settings["slab_size"],
        },
    )
    size = lib.hast_arena_size(geometry)
    assert size, "impossible geometry"
    memory = mmap.mmap(-1, size)
    arena = ffi.cast("struct hast_arena *", ffi.from_buffer(memory))
    assert lib.hast_arena_init(arena, geometry) == 0
    return arena, memory


def fork(body: Callable[[], None], keep: socket.socket, others: list[socket.socket]) -> int:
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for other in others:
        if other is not keep:
            other.close()
    try:
        body()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def disk(arena: Any, settings: dict[str, Any], component: str, bells: list[int], control: socket.socket) -> None:
    if settings["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["file_limit"], settings["file_limit"]))
    engine = {"inline": lib.HAST_DISK_INLINE, "uring": lib.HAST_DISK_URING, "threads": lib.HAST_DISK_THREADS}
    options = ffi.new(
        "struct hast_disk_options *",
        {
            "fd": os.open(component, os.O_RDWR),
            "own_bell": bells[lib.HAST_STAGE_DISK],
            "control": control.fileno(),
            "done_bell": bells[lib.HAST_STAGE_GGATE],
            "done_stage": lib.HAST_STAGE_GGATE,
            "engine": engine[settings["engine"]],
            "depth": 4 if settings["engine"] == "threads" else 128,
            "align": 1,
            "follow": 0,
        },
    )
    pump = lib.hast_disk_new(arena, options)
    assert pump != ffi.NULL, os.strerror(ffi.errno)
    result = lib.hast_disk_pump(pump)  # the only control there is: the end
    if result != lib.HAST_PUMP_CONTROL:
        print(f"disk: {result}", file=sys.stderr)


def ggate(arena: Any, bells: list[int], control: socket.socket) -> None:
    pump = lib.hast_ggate_new(arena, bells[lib.HAST_STAGE_GGATE], control.fileno(), bells[lib.HAST_STAGE_DISK])
    seq = lib.hast_arena_seq(arena)
    while True:
        result = lib.hast_ggate_pump(pump)
        if result == lib.HAST_PUMP_EVENT:
            seq.events = 0
            lib.hast_seq_grant_degraded(arena)
        elif result in (lib.HAST_PUMP_CONTROL, lib.HAST_PUMP_QUIET):
            # Quiet: frozen and nothing under way, so that there is nothing to do but to wait for the word.
            if not obey(pump, seq, control):
                return
        else:
            print(f"ggate: {result}", file=sys.stderr)
            return


def obey(pump: Any, seq: Any, control: socket.socket) -> bool:
    """Carry out one message; False at the end."""
    data, fds, _, _ = socket.recv_fds(control, 4096, 1)
    if not data:
        return False
    message = json.loads(data)
    if message["cmd"] == "nbd":
        lib.hast_nbd_add(pump, fds[0], message["flags"])
    elif message["cmd"] == "freeze":
        lib.hast_ggate_freeze(pump, message["on"])
    elif message["cmd"] == "facts":
        facts = {
            "clients": lib.hast_ggate_clients(pump),
            "quiet": lib.hast_ggate_quiet(pump),
            "free": seq.nfree,
            "inuse": seq.inuse,
        }
        control.send(json.dumps(facts).encode())
    return True


async def serve(path: Path, settings: dict[str, Any], control: socket.socket) -> None:
    """Negotiate; pass lines of standard input on to the ggate stage as messages, and its answers back."""

    def on_client(connection: socket.socket, flags: int) -> None:
        message = json.dumps({"cmd": "nbd", "flags": flags}).encode()
        socket.send_fds(control, [message], [connection.fileno()])
        connection.close()

    export = NbdExport("test", settings["datasize"], "a test", read_only=settings["read_only"])
    listener = NbdListener(path, export, on_client)
    await listener.start()
    print("ready", flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        control.sendall(line.encode())
        if json.loads(line)["cmd"] == "facts":
            print(control.recv(4096).decode(), flush=True)
    await listener.close()


def main() -> None:
    path, component, given = sys.argv[1:4]
    settings = {**DEFAULTS, **json.loads(given)}
    arena, _memory = make_arena(settings)
    bells = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(5)]
    channels = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2)]
    every = [end for pair in channels for end in pair]
    (g_here, g_there), (d_here, d_there) = channels
    pids = [
        fork(lambda: ggate(arena, bells, g_there), g_there, every),
        fork(lambda: disk(arena, settings, component, bells, d_there), d_there, every),
    ]
    g_there.close()
    d_there.close()
    try:
        asyncio.run(serve(Path(path), settings, g_here))
    finally:
        g_here.close()
        d_here.close()
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
