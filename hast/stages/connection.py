"""What the stages of the connection, send and recv, have in common: their options in C, and what they tell the worker.

Invariant: a connection is reported lost once, with a reason; the stage goes on until the worker stops it.
"""

from __future__ import annotations

import logging
import os
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
