"""The recv stage, on a secondary: requests of the primary, what they do to the disk, and the replies; between two
events all of it happens in C.

What the worker tells it: {"cmd": "settings", "keepawake": bool}: other ones from now on; {"cmd": "stop"}: take nothing
more; wait until all that was handed to the disk has completed, and the replies are out or cannot be sent; then end.
What it tells the worker: {"event": "up"}; {"event": "lost", "errno": n, "why": sentence}: the connection is of no use
any more; what was received completely still goes to disk. {"event": "first"}: the first request has come, so the
primary has stored what the handshake told it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

from hast.errors import ProtocolError, refusal
from hast.ffi import _hast
from hast.stages import awake
from hast.stages.connection import options, tell_lost
from hast.stages.context import STAGE_NAMES, StageContext

ffi, lib = _hast.ffi, _hast.lib
log = logging.getLogger(__name__)


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code. Raises TemporaryError, SystemCallError,
    ProtocolError."""
    name = STAGE_NAMES[context.stage]
    if context.conn is None:
        raise ProtocolError(f"{context.resource}: the {name} stage was started without a connection")
    link = lib.hast_link_new(context.arena.c, options(context, context.conn))
    if link == ffi.NULL:
        raise refusal(f"{context.resource}: cannot set up the {name} stage: {os.strerror(ffi.errno)}", ffi.errno)
    keeper = awake.Keeper(context.resource, lambda fd, limit: lib.hast_link_awake(link, fd, limit))
    try:
        if context.disk is not None and not context.disk.direct:
            lib.hast_link_direct(link, context.disk.fd)
        keeper.set(context.keepawake)
        context.control.send({"event": "up"})
        code = None
        while code is None:
            code = _turn(context, link, keeper)
        return code
    finally:
        lib.hast_link_free(link)


def _turn(context: StageContext, link: Any, keeper: awake.Keeper) -> int | None:
    """Run the pump once. The stage's exit code when it is to end, else None."""
    result = lib.hast_link_pump(link)
    if result == lib.HAST_PUMP_CONTROL:
        return _command(context, link, keeper)
    if result == lib.HAST_PUMP_EVENT:
        context.control.send({"event": "first"})
        return None
    if result == lib.HAST_PUMP_LOST:
        tell_lost(context, lib.hast_link_error(link), lib.hast_link_why(link))
        return None
    if result == lib.HAST_PUMP_QUIET:
        return os.EX_OK
    what = "its shared memory is damaged" if result > 0 else os.strerror(-result)
    log.error("%s: the %s stage cannot go on: %s", context.resource, STAGE_NAMES[context.stage], what)
    return os.EX_SOFTWARE


def _command(context: StageContext, link: Any, keeper: awake.Keeper) -> int | None:
    """Carry out one message of the worker, if there is one; an exit code ends the stage. Raises ProtocolError for one
    that it does not know."""
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
        lib.hast_link_finish(link)
    elif message.get("cmd") == "settings":
        keeper.set(message["keepawake"])
    else:
        raise ProtocolError(
            f"{context.resource}: {STAGE_NAMES[context.stage]} got a message that it does not know: {message}"
        )
    return None
