"""The disk stage: does the bios of the sequencer on the local component; between two events all of it happens in C.

What the worker tells it: {"cmd": "stop"}: finish what is under way, then end; {"cmd": "flush_failed", "errno": n}: a
flush of the component that the worker has tried.
What it tells the worker: {"event": "up", "engine": name}.

Invariants:
- The engine that the worker chose is a wish: where the kernel refuses io_uring to this process, threads do the same.
- When the stage ends by itself, each bio that it took is in RING_DISK_DONE.
"""

from __future__ import annotations

import logging
import os
from errno import EINTR, ENOMEM, ENOSYS, EPERM
from typing import Any

from hast.errors import ProtocolError, refusal
from hast.ffi import _hast
from hast.stages import protect
from hast.stages.context import DISK, GGATE, RECV, DiskSettings, StageContext

ffi, lib = _hast.ffi, _hast.lib
log = logging.getLogger(__name__)

ENGINES = {"inline": lib.HAST_DISK_INLINE, "uring": lib.HAST_DISK_URING, "threads": lib.HAST_DISK_THREADS}
THREADS = 16  # a thread per bio of the depth would be no faster
NO_URING = (ENOSYS, EPERM, ENOMEM)  # not in this kernel, not allowed, not enough locked memory


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code. Raises TemporaryError, SystemCallError,
    ProtocolError."""
    if context.serves_device:
        protect.protect(context.resource)
    pump, engine = _set_up(context)
    try:
        context.control.send({"event": "up", "engine": engine})
        code = None
        while code is None:
            code = _turn(context, pump)
        return code
    finally:
        lib.hast_disk_free(pump)


def _set_up(context: StageContext) -> tuple[Any, str]:
    """The pump's context and the name of its engine."""
    settings = context.disk
    if settings is None:
        raise ProtocolError(f"{context.resource}: the disk stage was started without a component")
    pump = _new(context, settings, settings.engine)
    if pump == ffi.NULL and settings.engine == "uring" and ffi.errno in NO_URING:
        log.warning("%s: io_uring cannot be used (%s), using threads", context.resource, os.strerror(ffi.errno))
        return _checked(context, _new(context, settings, "threads")), "threads"
    return _checked(context, pump), settings.engine


def _new(context: StageContext, settings: DiskSettings, engine: str) -> Any:
    # On a secondary there is no ggate: recv takes the completions.
    consumer = RECV if context.role == "secondary" else GGATE
    note = ffi.NULL if settings.note is None else ffi.new("char[]", os.fsencode(settings.note))
    options = ffi.new(
        "struct hast_disk_options *",
        {
            "fd": settings.fd,
            "own_bell": context.bells[DISK],
            "control": context.control.fileno(),
            "done_bell": context.bells[consumer],
            "done_stage": consumer,
            "engine": ENGINES[engine],
            "depth": min(settings.depth, THREADS) if engine == "threads" else settings.depth,
            "align": settings.align,
            "follow": 1,
            "sync_error": settings.sync_error,
            "witness": settings.witness,
            "note": note,
        },
    )
    return lib.hast_disk_new(context.arena.c, options)


def _checked(context: StageContext, pump: Any) -> Any:
    if pump == ffi.NULL:
        raise refusal(f"{context.resource}: cannot set up the disk stage: {os.strerror(ffi.errno)}", ffi.errno)
    return pump


def _turn(context: StageContext, pump: Any) -> int | None:
    """Run the pump once. The stage's exit code when it is to end, else None."""
    result = lib.hast_disk_pump(pump)
    if result == lib.HAST_PUMP_CONTROL:
        return _command(context, pump)
    if result == -EINTR:
        return None
    what = "its shared memory is damaged" if result > 0 else os.strerror(-result)
    log.error("%s: the disk stage cannot go on: %s", context.resource, what)
    return os.EX_SOFTWARE


def _command(context: StageContext, pump: Any) -> int | None:
    """Carry out one message of the worker; an exit code ends the stage."""
    try:
        received = context.control.recv(timeout=0)
    except TimeoutError:
        return None
    if received is None:
        return os.EX_OK  # the worker is gone
    message, fds = received
    for fd in fds:
        os.close(fd)
    if message.get("cmd") == "stop":
        return os.EX_OK
    if message.get("cmd") == "flush_failed":
        lib.hast_disk_flush_failed(pump, int(message["errno"]))
        return None
    raise ProtocolError(f"{context.resource}: disk got a message that it does not know: {message}")
