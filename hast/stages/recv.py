"""The recv stage: replies on a primary, requests on a secondary; between two events all of it happens in C.

What the worker tells it: {"cmd": "stop"}: take nothing more; a secondary waits until all that it has handed to the disk
has completed; then end.
What it tells the worker: {"event": "up"}; {"event": "lost", "errno": n, "why": sentence}: the connection is of no use
any more; on a secondary, what was received completely still goes to disk. {"event": "first"}, on a secondary: the first
request has come, so the primary has stored what the handshake told it.
"""

from __future__ import annotations

import os
from typing import Any

from hast.ffi import _hast
from hast.stages.connection import cannot_go_on, checked, options, tell_lost, told_to_stop
from hast.stages.context import StageContext

lib = _hast.lib


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code. Raises SystemCallError, ProtocolError."""
    pump = checked(context, lib.hast_recv_new(context.arena.c, options(context)))
    try:
        context.control.send({"event": "up"})
        code = None
        while code is None:
            code = _turn(context, pump)
        return code
    finally:
        lib.hast_recv_free(pump)


def _turn(context: StageContext, pump: Any) -> int | None:
    """Run the pump once. The stage's exit code when it is to end, else None."""
    result = lib.hast_recv_pump(pump)
    if result == lib.HAST_PUMP_CONTROL:
        stop = told_to_stop(context)
        if stop:
            lib.hast_recv_finish(pump)
        return os.EX_OK if stop is None else None
    if result == lib.HAST_PUMP_EVENT:
        context.control.send({"event": "first"})
        return None
    if result == lib.HAST_PUMP_LOST:
        tell_lost(context, lib.hast_recv_error(pump), lib.hast_recv_why(pump))
        return None
    if result == lib.HAST_PUMP_QUIET:
        return os.EX_OK
    return cannot_go_on(context, result)
