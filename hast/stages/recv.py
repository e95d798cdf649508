"""The recv stage: replies on a primary, requests on a secondary; between two events all of it happens in C.

What the worker tells it: {"cmd": "stop"}: take nothing more; a secondary waits until all that it has handed to the disk
has completed; then end.
What it tells the worker: {"event": "up"}; {"event": "lost", "errno": n, "why": sentence}: the connection is of no use
any more; on a secondary, what was received completely still goes to disk. {"event": "first"}, on a secondary: the first
request has come, so the primary has stored what the handshake told it.
"""

from __future__ import annotations

from typing import Any

from hast.ffi import _hast
from hast.stages.connection import Pump, serve
from hast.stages.context import StageContext

lib = _hast.lib

PUMP = Pump(
    lib.hast_recv_new,
    lib.hast_recv_pump,
    lib.hast_recv_finish,
    lib.hast_recv_error,
    lib.hast_recv_why,
    lib.hast_recv_free,
)


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code. Raises SystemCallError, ProtocolError."""

    def prepare(state: Any) -> None:
        if context.disk is not None and not context.disk.direct:
            lib.hast_recv_direct(state, context.disk.fd)

    return serve(context, PUMP, prepare)
