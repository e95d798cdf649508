"""The send stage: requests of a primary, replies of a secondary; between two events all of it happens in C.

What the worker tells it: {"cmd": "stop"}: send what is waiting, then end.
What it tells the worker: {"event": "up"}; {"event": "lost", "errno": n, "why": sentence}: the connection is of no use
any more. It stays after that, until it is stopped: on a secondary it gives the slots of unsent replies back.
"""

from __future__ import annotations

from hast.ffi import _hast
from hast.stages.connection import Pump, serve
from hast.stages.context import StageContext

lib = _hast.lib

PUMP = Pump(
    lib.hast_send_new,
    lib.hast_send_pump,
    lib.hast_send_finish,
    lib.hast_send_error,
    lib.hast_send_why,
    lib.hast_send_free,
)


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code. Raises SystemCallError, ProtocolError."""
    return serve(context, PUMP)
