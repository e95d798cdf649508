"""The ggate stage: serves the devices, runs the sequencer, speaks with the secondary; between two events all of it
happens in C.

What the worker tells it: {"cmd": "nbd", "flags": n} with a client's socket, {"cmd": "fuse", "resend": bool} with the
FUSE channel, {"cmd": "grant", "number": that of the event}: localcnt is raised and durable, {"cmd": "refuse_grant"}: it
cannot be, {"cmd": "outdated"}, {"cmd": "detach"}, {"cmd": "refused"}: what became of a local failure,
{"cmd": "flush_failed"}, {"cmd": "current"}, {"cmd": "give_up"}: see seq.h, {"cmd": "connect", "mode": n,
"from_remote": bool, "conn": what ConnSettings has} with the secondary's map and both sockets, {"cmd": "disconnect"}: it
is lost, {"cmd": "settings", "sync_rate": n, "metaflush": 0 or 1, "detach_on_error": 0 or 1, "keepawake": bool}: other
ones from now on, {"cmd": "stop"}: answer what is under way, then end, {"cmd": "drop"}: close the NBD clients that still
hold that up.
What it tells the worker: {"event": "up"}, {"event": "seq", "bits": n, "dirty": extents,
"detach": bool, "number": of synchronisations that are complete, "unjoined": bool, whether the map that could not be
written is the secondary's}: the sequencer wants a decision,
{"event": "unjoined", "why": sentence}: the connection cannot be used now, and nothing has come of it,
{"event": "lost", "errno": n, "why": sentence}: the connection is of no use any more, once for each,
{"event": "disconnected"}: the answer to {"cmd": "disconnect"}, what is pushed from now on is for another connection,
{"event": "device", "errno": n}: the block device's channel is gone.
"""

from __future__ import annotations

import errno
import logging
import os
from typing import Any

from hast.channel import DescriptorsLostError
from hast.complaints import Complaints
from hast.errors import ProtocolError, refusal
from hast.ffi import _hast
from hast.stages import awake, protect
from hast.stages.connection import options, tell_lost
from hast.stages.context import DISK, GGATE, ConnSettings, StageContext

ffi, lib = _hast.ffi, _hast.lib
log = logging.getLogger(__name__)


# What the worker has decided and stored, as the sequencer is told.
DECISIONS = {
    "grant": lib.hast_seq_grant_degraded,
    "refuse_grant": lib.hast_seq_refuse_degraded,
    "outdated": lib.hast_seq_outdated,
    "detach": lib.hast_seq_detach,
    "refused": lib.hast_seq_local_refused,
    "flush_failed": lib.hast_seq_local_flush_failed,
    "current": lib.hast_seq_current,
    "give_up": lib.hast_seq_give_up,
}


class Ggate:
    """The stage's state in Python: the C context and what has been told."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self.complaints = Complaints(log)
        bells = context.bells
        self.pump = lib.hast_ggate_new(
            context.arena.c, bells[GGATE], context.control.fileno(), bells.get(DISK, -1)
        )
        if self.pump == ffi.NULL:
            raise refusal(f"{context.resource}: cannot set up the ggate stage: {os.strerror(ffi.errno)}", ffi.errno)
        self.seq = lib.hast_arena_seq(context.arena.c)
        if context.disk is not None and not context.disk.direct:
            lib.hast_ggate_direct(self.pump, context.disk.fd)
        lib.hast_ggate_deletes(self.pump, int(context.disk is None or context.disk.deletes))
        self.keeper = awake.Keeper(context.resource, lambda fd, limit: lib.hast_ggate_awake(self.pump, fd, limit))
        self.keeper.set(context.keepawake)
        self.cacheless = False  # the secondary has no cache, which has been said
        self.from_remote = False  # the secondary has the newer data
        self.stopping = False
        self.unserved = False  # there is a block device that cannot be gone on with

    def command(self, message: dict[str, Any], fds: list[int]) -> None:
        """Carry out one message of the worker."""
        command = message.get("cmd")
        if command == "nbd" and len(fds) == 1:
            error = lib.hast_nbd_add(self.pump, fds[0], message["flags"])
            if error != 0:
                why = os.strerror(-error)
                if -error == errno.EUSERS:
                    why = f"there are {lib.HAST_NBD_CLIENTS_MAX} already"
                self._refused(why)
        elif command == "fuse" and len(fds) == 1:
            error = lib.hast_fuse_add(self.pump, fds[0], int(bool(message.get("resend"))))
            if -error == errno.EOPNOTSUPP:
                # Linux before 6.9 does not send again what the last stage had not answered: nobody would answer it.
                self.context.control.send({"event": "device", "errno": errno.EOPNOTSUPP})
                self.unserved = True
            elif error != 0:
                raise refusal(f"{self.context.resource}: cannot serve the FUSE device: {os.strerror(-error)}", -error)
        elif command == "grant" and message["number"] != self.seq.sync_number:
            pass  # a synchronisation has made the counters equal since it was asked for; who still waits asks again
        elif command in DECISIONS:
            DECISIONS[command](self.context.arena.c)
            if command == "detach":
                lib.hast_ggate_direct(self.pump, -1)
        elif command == "settings":
            for name in ("sync_rate", "detach_on_error"):
                setattr(self.seq, name, message[name])
            lib.hast_seq_metaflush(self.context.arena.c, message["metaflush"])
            self.keeper.set(message["keepawake"])
        elif command == "stop":
            self.stopping = True
            lib.hast_seq_sync_end(self.context.arena.c)
            lib.hast_ggate_freeze(self.pump, 1)
        elif command == "connect" and len(fds) == 3:
            self._connect(message, *fds)
        elif command == "disconnect":
            lib.hast_ggate_disconnect(self.pump)
            if lib.hast_seq_drain(self.context.arena.c) < 0:
                raise ProtocolError(f"{self.context.resource}: a completion of the secondary makes no sense")
            lib.hast_seq_disconnect(self.context.arena.c)
            self.context.control.send({"event": "disconnected"})
        elif command == "drop":
            lib.hast_ggate_drop_clients(self.pump)
        else:
            raise ProtocolError(f"{self.context.resource}: ggate got a message that it does not know: {message}")

    def _refused(self, why: str) -> None:
        """An NBD client is not served, and is closed already."""
        self.complaints.warning("%s: cannot serve an NBD client: %s", self.context.resource, why)

    def _connect(self, message: dict[str, Any], map_fd: int, fd_in: int, fd_out: int) -> None:
        """Merge the secondary's map, and begin to use the connection."""
        size = self.context.arena.geometry.mapsize
        activemap = os.pread(map_fd, size + 1, 0)
        os.close(map_fd)
        if len(activemap) not in (0, size):  # 0: it has none
            self._unjoined(f"the secondary's activemap came as {len(activemap)} of {size} bytes", fd_in, fd_out)
            return
        from_remote = bool(message["from_remote"])
        # For the worker, at the end of this connection: whether it was of use to those who had waited for it.
        self.seq.served = 0
        self.seq.awaited = int(self.seq.mapwait_head != lib.HAST_NONE or self.seq.flushq_head != lib.HAST_NONE)
        if from_remote and not self.seq.sync_remote and (self.seq.nactive or self.seq.grant_head != lib.HAST_NONE):
            # They would be acknowledged, then overwritten. Counted first, they make a split-brain, which is the truth.
            why = "the secondary has newer data, and writes are under way here that it does not have"
            self._unjoined(why, fd_in, fd_out)
            return
        settings = ConnSettings(fd_in, fd_out, **message["conn"])
        error = lib.hast_ggate_connect(self.pump, options(self.context, settings))
        if error != 0:
            self._unjoined(f"cannot use the connection: {os.strerror(-error)}", fd_in, fd_out)
            return
        self.seq.mode = int(message["mode"])
        self.from_remote = from_remote
        self.seq.no_deletes = int(settings.foreign)
        # From now on, and not only when the copying begins: what the merged map marks is old here.
        self.seq.sync_remote = int(from_remote)
        lib.hast_seq_connect(self.context.arena.c, activemap if activemap else ffi.NULL)

    def _unjoined(self, why: str, *fds: int) -> None:
        for fd in fds:
            os.close(fd)
        self.context.control.send({"event": "unjoined", "why": why})

    def tell(self) -> None:
        """Report what has come about while the pump ran."""
        if self.seq.no_flushes and not self.cacheless:
            self.cacheless = True
            log.warning("%s: the other node's disk takes no flushes: as if it had no cache", self.context.resource)
        bits = self.seq.events
        if not bits:
            return
        self.seq.events = 0
        detach = bool(self.seq.turn_detach)
        number = int(self.seq.sync_number)
        told = {"event": "seq", "bits": bits, "dirty": self.seq.ndirty, "detach": detach, "number": number}
        told["unjoined"] = bool(self.seq.join_failed)
        self.context.control.send(told)
        if bits & lib.HAST_SEQ_CONNECTED and not self.stopping:
            lib.hast_seq_sync_start(self.context.arena.c, int(self.from_remote))

    def turn(self) -> int | None:
        """Run the pump once. The stage's exit code when it is to end, else None."""
        result = lib.hast_ggate_pump(self.pump)
        self.tell()
        if result == lib.HAST_PUMP_CONTROL:
            try:
                received = self.context.control.recv(timeout=0)
            except DescriptorsLostError as lost:
                # The end of this stage would close all clients, and again when they are back. Without another message's
                # descriptor there is nothing to go on with.
                if lost.message.get("cmd") != "nbd":
                    raise
                self._refused("no descriptor is left for it")
                return None
            if received is None:
                return os.EX_OK  # the worker is gone
            self.command(*received)
            if self.unserved:
                return os.EX_UNAVAILABLE
        elif result == lib.HAST_PUMP_QUIET:
            return os.EX_OK
        elif result == lib.HAST_PUMP_LOST:
            tell_lost(self.context, lib.hast_ggate_lost(self.pump), lib.hast_ggate_why(self.pump))
        elif result == lib.HAST_PUMP_DEVICE:
            error = lib.hast_ggate_device_error(self.pump)
            self.context.control.send({"event": "device", "errno": error})
            return os.EX_UNAVAILABLE
        elif result != lib.HAST_PUMP_EVENT:
            what = "its shared memory is damaged" if result > 0 else os.strerror(-result)
            log.error("%s: the ggate stage cannot go on: %s", self.context.resource, what)
            return os.EX_SOFTWARE
        return None


def run(context: StageContext) -> int:
    """Serve until told to stop or until it cannot go on; the exit code."""
    if context.serves_device:
        protect.protect(context.resource, context.arena)
    stage = Ggate(context)
    context.control.send({"event": "up"})
    while True:
        code = stage.turn()
        if code is not None:
            lib.hast_ggate_free(stage.pump)
            return code
