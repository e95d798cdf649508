"""What the stages of the connection, send and recv, have in common: they run a pump and tell the worker what comes.

Invariant: a connection is reported lost once, with a reason; the stage goes on until the worker stops it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hast.errors import ProtocolError, SystemCallError
from hast.ffi import _hast
from hast.stages.context import DISK, GGATE, RECV, SEND, STAGE_NAMES, StageContext

ffi, lib = _hast.ffi, _hast.lib
log = logging.getLogger(__name__)

COMPRESSIONS = {
    "none": lib.HAST_WIRE_COMPRESSION_NONE,
    "hole": lib.HAST_WIRE_COMPRESSION_HOLE,
    "lzf": lib.HAST_WIRE_COMPRESSION_LZF,
}
CHECKSUMS = {
    "none": lib.HAST_WIRE_CHECKSUM_NONE,
    "crc32": lib.HAST_WIRE_CHECKSUM_CRC32,
    "sha256": lib.HAST_WIRE_CHECKSUM_SHA256,
}


def options(context: StageContext) -> Any:
    """struct hast_conn_options for this stage. Raises ProtocolError when it was given no connection."""
    settings, bells = context.conn, context.bells
    if settings is None:
        raise ProtocolError(
            f"{context.resource}: the {STAGE_NAMES[context.stage]} stage was started without a connection"
        )
    return ffi.new(
        "struct hast_conn_options *",
        {
            "fd": settings.fd,
            "own_bell": bells[context.stage],
            "control": context.control.fileno(),
            "seq_bell": bells.get(GGATE, -1),
            "disk_bell": bells.get(DISK, -1),
            "send_bell": bells.get(SEND, -1),
            "recv_bell": bells.get(RECV, -1),
            "secondary": int(context.role == "secondary"),
            "version": settings.version,
            "compression": COMPRESSIONS[settings.compression],
            "checksum": CHECKSUMS[settings.checksum],
            "keepalive_ms": round(settings.keepalive * 1000),
            "timeout_ms": round(settings.timeout * 1000),
            "sector": settings.sector,
            "max_io": settings.max_io,
        },
    )


def checked(context: StageContext, pump: Any) -> Any:
    """The pump's context. Raises SystemCallError when there is none."""
    if pump == ffi.NULL:
        raise SystemCallError(
            f"{context.resource}: cannot set up the {STAGE_NAMES[context.stage]} stage: {os.strerror(ffi.errno)}"
        )
    return pump


@dataclass(frozen=True)
class Pump:
    """The functions of one pump in C; `new` makes the context that all others take."""

    new: Callable[..., Any]
    run: Callable[[Any], int]
    finish: Callable[[Any], None]
    error: Callable[[Any], int]
    why: Callable[[Any], Any]
    free: Callable[[Any], None]


def serve(context: StageContext, pump: Pump, prepare: Callable[[Any], None] | None = None) -> int:
    """Run the pump, once prepared, until told to stop or until it cannot go on; the exit code.

    Raises SystemCallError, ProtocolError.
    """
    state = checked(context, pump.new(context.arena.c, options(context)))
    try:
        if prepare is not None:
            prepare(state)
        context.control.send({"event": "up"})
        code = None
        while code is None:
            code = _turn(context, pump, state)
        return code
    finally:
        pump.free(state)


def _turn(context: StageContext, pump: Pump, state: Any) -> int | None:
    """Run the pump once. The stage's exit code when it is to end, else None."""
    result = pump.run(state)
    if result == lib.HAST_PUMP_CONTROL:
        stop = told_to_stop(context)
        if stop:
            pump.finish(state)
        return os.EX_OK if stop is None else None
    if result == lib.HAST_PUMP_EVENT:
        context.control.send({"event": "first"})
        return None
    if result == lib.HAST_PUMP_LOST:
        tell_lost(context, pump.error(state), pump.why(state))
        return None
    if result == lib.HAST_PUMP_QUIET:
        return os.EX_OK
    return cannot_go_on(context, result)


def tell_lost(context: StageContext, errno: int, why: Any) -> None:
    """Report why the connection is lost: a number for decisions, a sentence for people."""
    context.control.send({"event": "lost", "errno": errno, "why": ffi.string(why).decode(errors="replace")})


def told_to_stop(context: StageContext) -> bool | None:
    """Whether the worker's message is "stop": False when there is none yet, None when the worker is gone. Raises
    ProtocolError for any other one."""
    try:
        received = context.control.recv(timeout=0)
    except TimeoutError:
        return False
    if received is None:
        return None
    message, fds = received
    for fd in fds:
        os.close(fd)
    if message.get("cmd") != "stop":
        raise ProtocolError(
            f"{context.resource}: {STAGE_NAMES[context.stage]} got a message that it does not know: {message}"
        )
    return True


def cannot_go_on(context: StageContext, result: int) -> int:
    """Log what a pump returned that nothing can be done about; the stage's exit code."""
    what = "its shared memory is damaged" if result > 0 else os.strerror(-result)
    log.error("%s: the %s stage cannot go on: %s", context.resource, STAGE_NAMES[context.stage], what)
    return os.EX_SOFTWARE
