"""A resource in the role primary: its component, its stages, its device.

Invariants:
- Metadata is written by this process only, while the component is locked; a counter that others rely on is durable
  before they are told (invariant 7: degraded first).
- The device is published after everything below it serves, and withdrawn before anything below it ends.
- A stage that dies costs the clients a pause: the pipeline is started anew under the same device. So does a worker that
  dies: its successor is given the device, and has everything asked again that has no answer.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast import blockdev, boot, peering, promotion
from hast.component import AbsentComponent, Component, open_component
from hast.config import Resource
from hast.control import Role, StatusEntry
from hast.device.nbd import NbdExport
from hast.device.nbdlisten import NbdListener
from hast.errors import DataError, DiskError, HastError, TemporaryError, UnavailableError
from hast.ffi import _hast
from hast.handshake import Agreement
from hast.link import MODES, Link, Owner
from hast.metadata import Metadata
from hast.outage import DETACHED, Outage
from hast.pipeline import END_SECONDS, Pipeline, PipelineSettings, component_settings
from hast.reload import Action, action, changed_settings
from hast.stages.context import DISK, GGATE

log = logging.getLogger(__name__)
lib = _hast.lib

CLIENT_SLOTS = 256  # bios of clients under way at once
SYNC_SLOTS = 32
SLAB_SIZE = 128 * 1024  # bytes: what a peer of version 2 takes in one request
LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that was killed
LEAVE_SECONDS = 1.0  # for stages to finish what is under way when another worker goes on with the device
GRANT_SECONDS = 0.5  # between attempts to store that this node writes alone
SETTLE_SECONDS = 3.0  # for what was written before a connection to be copied to the secondary, which lacks it
RESTARTS = 8  # of the pipeline, within
RESTART_WINDOW = 60.0  # seconds, before the worker gives up and is started anew itself

Tell = Callable[..., None]


class Primary:
    """One resource as primary. `failed` becomes done, with the reason, when it can be served no longer."""

    def __init__(self, resource: Resource, rundir: Path, tell: Tell, stop: asyncio.Event) -> None:
        self.resource = resource
        self.rundir = rundir
        self.tell = tell
        self.stop = stop  # set when this is to end: start() waits for no other node then
        self.failed: asyncio.Future[HastError] = asyncio.get_running_loop().create_future()
        self.component: Component | None = None
        self.metadata: Metadata | None = None
        self.attempts: list[Metadata] = []  # each may be on disk instead of `metadata`: storing it has failed
        self.pipeline: Pipeline | None = None
        self.listener: NbdListener | None = None
        self.device: blockdev.BlockDevice | None = None
        self.served = False  # the device has a ggate stage, or has had one
        self.may_serve = False  # start() has asked the other node, and nothing stands against it
        self.waiting: list[tuple[socket.socket, int]] = []  # NBD clients that have come while there was no ggate stage
        self.link: Link | None = None
        self.outage: Outage | None = None
        self.retry: asyncio.TimerHandle | None = None  # until the next attempt to raise localcnt
        self.owed: tuple[int, float] | None = None  # what _go_degraded() is to do when the secondary is lost
        self.patience: asyncio.TimerHandle | None = None  # for the secondary, while the component is out of date
        self.impatient = False  # it has run out
        self.restarts: list[float] = []
        self.restarting: asyncio.Task[None] | None = None
        self.died = False  # a stage has, since they were started
        self.turn = asyncio.Lock()  # one restart of the stages, or one change of the settings, at a time

    # ---- start ----

    async def start(self, orders: dict[str, Any], fds: list[int]) -> None:
        """Serve the resource; orders as in hast/workers.py. Raises HastError, EndedError (hast/link.py) when it was
        told to stop; shutdown() then takes away what is there already."""
        resource, left = self.resource, orders.get("device")
        if left is not None and len(fds) == 1:
            self.device = blockdev.BlockDevice(replace(resource, provname=str(left["provname"])), self.rundir)
            self.device.adopt(fds[0])
        note = boot.note(self.rundir, resource.name)
        self.component, self.metadata = self._open(note, bool(orders.get("again")))
        unrecorded = self._read_note() or isinstance(self.component, AbsentComponent)
        virgin = self._become_primary()
        assert self.metadata is not None
        if self.device is None:
            self.device = blockdev.choose(resource, self.rundir)
        elif left != self._device_facts():
            raise UnavailableError(
                f"{resource.name}: its block device is taken away, the settings or the component have changed:"
                f" {left} became {self._device_facts()}"
            )
        settings = self._settings()
        if boot.lost(self.rundir, resource.name):
            if orders.get("again") and not self.metadata.syncing:
                # The worker before this one may have died before clients were told. Where it is known that the
                # component is out of date, what it has lost is read from the secondary, and copied.
                settings = replace(settings, disk=replace(settings.disk, sync_error=errno.EIO))
            else:
                boot.forget(note)
        self.pipeline = Pipeline(settings, self._stage_message, self._stage_death)
        self.component.on_sync_failure = self._flush_failed
        self.outage = Outage(self)
        if unrecorded:
            self.outage.go_on()
        # A stage that dies meanwhile is started anew afterwards: there is one who makes connections, or none.
        async with self.turn:
            await self._start_stages()
            if resource.remote is not None:
                self.link = Link(self._owner(), virgin)
                await self.link.start(self.stop, bool(orders.get("resume")))
            self.may_serve = True
        if self.restarting is not None:
            # What comes now needs the stages. One that dies from here on is started anew under the device.
            await asyncio.wait([self.restarting])
        if self.failed.done():
            raise self.failed.result()
        self.listener = NbdListener(
            self.rundir / f"{resource.name}.sock",
            NbdExport(
                resource.name, self.metadata.datasize, f"hast resource {resource.name}", self.component.can_delete
            ),
            self._nbd_client,
        )
        await self.listener.start()
        if self.device is not None and self.device.fd >= 0:
            if not self.served:  # the restart has not done it
                self._serve_device(resend=True)
        elif self.device is not None:
            self.device.open()
            self._serve_device(resend=False)
            await self.device.attach()
            self.tell({"event": "device", "device": self._device_facts()}, (self.device.fd,))
            self.device.kept = True

    def ready_message(self) -> dict[str, Any]:
        """What main is told when clients can be served."""
        return {
            "event": "ready",
            "device": self.device.path if self.device is not None else None,
            "nbd": str(self.rundir / f"{self.resource.name}.sock"),
        }

    def _device_facts(self) -> dict[str, Any] | None:
        """What a block device is: a worker that finds it left by another one serves it only if all of it is the same.
        None when there is to be none."""
        if self.device is None or self.resource.device == "nbd":
            return None
        assert self.metadata is not None
        return {
            "mount": self.device.mount,
            "provname": self.resource.provname,
            "localpath": self.resource.localpath,
            "datasize": self.metadata.datasize,
            "resuid": self.metadata.resuid,
        }

    def _open(self, note: Path, again: bool) -> tuple[Component, Metadata]:
        """The component, and its metadata. again: one that the worker before this one has given up need not be of any
        use; without it the secondary goes on doing everything. Raises HastError."""
        name, path = self.resource.name, self.resource.localpath
        known = boot.given_up(self.rundir, name) if again else None
        component = None
        try:
            component = open_component(name, path, self.resource.directio, True, LOCK_SECONDS, note)
            metadata = component.read_metadata()
            if known is not None:  # what it refuses now the stages would need in a moment
                if metadata.resuid != known.resuid:
                    raise DataError(f"{name}: component {path} is another one now")
                component.read_map(metadata)
                component.flush()
        except HastError as error:
            if component is not None:
                component.close()
            if known is None or isinstance(error, TemporaryError):
                raise
            log.error("%s; it was given up before: going on without it", error)
            return AbsentComponent.of(name, path, known, str(error)), known
        boot.forget(boot.detached_note(self.rundir, name))
        return component, metadata

    def _read_note(self) -> bool:
        """A process before this one knew that the component is out of date, and could not store it. Store it now;
        whether that is in vain once more. Raises DiskError: then, and there is more to be stored."""
        assert self.component is not None and self.metadata is not None
        if not boot.outdated(self.rundir, self.resource.name, self.metadata.resuid):
            return False
        known = replace(self.metadata, syncing=True, unsaid=True)
        try:
            self.component.fill_map(known)
            self.component.write_metadata(known)
        except DiskError:
            self.metadata = known
            if promotion.as_primary(known, 0)[0] != known:
                raise
            return True
        self.metadata = known
        boot.forget(boot.outdated_note(self.rundir, self.resource.name))
        return False

    def _become_primary(self) -> bool:
        """Take the role in the metadata, if it may be taken (hast/promotion.py). Whether nothing was ever written
        here."""
        assert self.metadata is not None
        if self.metadata.discard:
            log.warning("%s: 'hastctl discard' is void, this node becomes primary", self.resource.name)
        metadata, virgin = promotion.as_primary(self.metadata, secrets.randbits(64))
        self._store(metadata)
        return virgin

    def _owner(self) -> Owner:
        assert self.pipeline is not None

        def metadata() -> Metadata:
            assert self.metadata is not None
            return self.metadata

        def hook(event: str) -> None:
            self.tell({"event": "hook", "args": [event, self.resource.name]})

        def keepmap() -> bool:
            return self.outage is not None and self.outage.unrecorded

        def only_raised() -> bool:
            # What is on the disk does not matter where the secondary's counters, and the note, say what is true.
            return keepmap() or peering.only_raised(metadata(), self.attempts)

        def superseded(agreement: Agreement, metadata: Metadata) -> bool:
            if self.outage is None or not peering.found_newer(agreement, self.attempts):
                return False
            self.outage.superseded(metadata)
            return True

        return Owner(
            self.resource,
            self.pipeline,
            metadata,
            self._store,
            only_raised,
            hook,
            self._fail,
            self._lonely,
            keepmap,
            superseded,
        )

    def _store(self, metadata: Metadata) -> None:
        """Make `metadata` durable, whatever `metaflush` says of maps, then rely on it."""
        assert self.component is not None
        if metadata != self.metadata or self.attempts:
            if metadata not in self.attempts:
                self.attempts.append(metadata)
            self.component.write_metadata(metadata)
            self.metadata, self.attempts = metadata, []
            if self.outage is not None and self.outage.detached:
                boot.give_up(self.rundir, metadata)

    def _settings(self) -> PipelineSettings:
        assert self.component is not None and self.metadata is not None
        return component_settings(
            self.component,
            self.metadata,
            "primary",
            nclient=CLIENT_SLOTS,
            nsync=SYNC_SLOTS,
            slab_size=SLAB_SIZE,
            device=self.device is not None,
            keepawake=self.resource.keepawake,
        )

    async def _start_stages(self) -> None:
        assert self.component is not None and self.metadata is not None and self.pipeline is not None
        arena = self.pipeline.create()
        detached = self.outage is not None and self.outage.detached
        if not detached and self.metadata.unmapped:
            detached = not self._mark_all()
        if not detached:
            arena.load_map(self.component.read_map(self.metadata))
            # Map and metadata are relied on as durable from now on. Who wrote them may have died before the flush.
            self.component.flush()
        arena.seq.detach_on_error = int(self.resource.on_io_error == "detach")
        arena.seq.mode = MODES[self.resource.replication]
        arena.seq.sync_rate = self.resource.syncrate
        arena.seq.metaflush = int(self.resource.metaflush)
        arena.seq.degraded_ok = int(self._degraded_granted())
        # Marked extents are old here until the synchronisation that was broken off is complete (invariant 6).
        arena.seq.sync_remote = int(self.metadata.syncing)
        arena.seq.no_source = int(self.pipeline.sync_error != 0)
        if detached:
            lib.hast_seq_detach(arena.c)
        await self.pipeline.start(DISK, GGATE)
        self._lonely()

    def _mark_all(self) -> bool:
        """It ended, or its ggate stage did, when it was known that the secondary has newer data, and not yet where.
        Whether the map can say so of everything; else the component, known to be out of date, is given up."""
        assert self.component is not None and self.metadata is not None and self.outage is not None
        try:
            self.component.fill_map(self.metadata)
            self._store(replace(self.metadata, unmapped=False))
        except DiskError as error:
            log.error("%s; it is out of date, and given up: everything is done by the secondary", error)
            self.outage.go_on()
            return False
        return True

    def _degraded_granted(self) -> bool:
        """Whether localcnt says already, on the disk, that this node writes alone."""
        assert self.metadata is not None
        return self.metadata.alone and not self.attempts

    # ---- while it runs ----

    def _nbd_client(self, connection: socket.socket, flags: int) -> None:
        assert self.pipeline is not None
        if self.restarting is not None and not self.restarting.done():
            self.waiting.append((connection, flags))
            return
        self.pipeline.send(GGATE, {"cmd": "nbd", "flags": flags}, (connection.fileno(),))
        connection.close()

    def _serve_device(self, resend: bool) -> None:
        assert self.pipeline is not None
        if self.device is not None and self.device.fd >= 0:
            self.served = True
            self.pipeline.send(GGATE, {"cmd": "fuse", "resend": resend}, (self.device.fd,))

    def _stage_message(self, stage: int, message: dict[str, Any]) -> None:
        if message.get("event") == "seq":
            self._sequencer_event(message)
        elif message.get("event") == "lost" and self.link is not None:
            self.link.lose(str(message.get("why", "")), failing=message.get("errno") == errno.ETIMEDOUT)
        elif message.get("event") == "unjoined" and self.link is not None:
            self.link.lose(str(message.get("why", "")), unused=True)
        elif message.get("event") == "disconnected" and self.link is not None:
            self.link.parted()
        elif message.get("event") == "device":
            if self.device is not None:
                self.device.dead = True
            why = f"the kernel closed the block device ({os.strerror(message['errno'])})"
            if message["errno"] == errno.EOPNOTSUPP:
                why = "before Linux 6.9 a block device ends with the process that serves it"
            self._fail(TemporaryError(f"{self.resource.name}: {why}, starting it anew"))

    def _sequencer_event(self, message: dict[str, Any]) -> None:
        bits = int(message["bits"])
        try:
            if bits & lib.HAST_SEQ_SYNC_DONE:
                self._end_retry()  # who has waited was answered by that
            if self.link is not None:
                self.link.sequencer(bits, int(message["dirty"]))
            if bits & lib.HAST_SEQ_SYNC_DONE:
                self._remember()
            if bits & lib.HAST_SEQ_LOCAL_FAILED and self.outage is not None:
                self.outage.failed(bool(message["detach"]))
            if bits & lib.HAST_SEQ_NEED_DEGRADED:
                self._end_retry()
                self._go_degraded(int(message["number"]))
            if bits & lib.HAST_SEQ_MAP_FAILED:
                log.error(
                    "%s: the activemap on %s cannot be written: writes fail until it can",
                    self.resource.name,
                    self.resource.localpath,
                )
        except HastError as error:
            self._fail(error)
        except Exception as error:
            self._unexpected(error)

    def _lonely(self, failing: bool = False) -> None:
        """There is no secondary now: what an out-of-date component cannot do without it waits, but not for ever; what
        waited for the secondary to have it is done without. failing: it was there, and did not do what it was asked.
        Such a connection is no reason to begin the waiting anew, nor is one that has done nothing for those who waited:
        there may be one after the other."""
        if self.owed is not None:
            number, until = self.owed
            self._end_retry()
            self._go_degraded(number, until)
        assert self.metadata is not None
        in_vain = failing or not self._of_use()
        if self.patience is not None and not (self.metadata.syncing and in_vain):
            self.patience.cancel()
            self.patience, self.impatient = None, False
        if self.metadata.syncing and self.patience is None:
            seconds = self.resource.timeout if self.link is not None or self.resource.remote is not None else 0
            self.patience = asyncio.get_running_loop().call_later(seconds, self._give_up)
        elif self.impatient:
            self._give_up()

    def _of_use(self) -> bool:
        """Whether the last connection has answered anybody, or nobody had waited for it."""
        arena = self.pipeline.arena if self.pipeline is not None else None
        return arena is None or arena.seq.served > 0 or not arena.seq.awaited

    def _give_up(self) -> None:
        """While there is a connection the sequencer does not hear of it: it is said again at its end."""
        assert self.pipeline is not None
        self.impatient = True
        self.pipeline.send(GGATE, {"cmd": "give_up"})

    def _go_degraded(self, number: int, until: float = 0.0) -> None:
        """The first write without the secondary waits for this: raise localcnt, store it, let go (invariant 7). Where
        the disk does not take it, whoever waits goes on waiting, for the disk or the secondary, and is told after
        `timeout`. number: of the question; until: when it is given up, in the loop's time."""
        assert self.metadata is not None and self.pipeline is not None
        loop, link = asyncio.get_running_loop(), self.link
        if self.metadata.syncing:
            # Nothing is acknowledged without the secondary now: it was asked before that was known, and is void. Not if
            # it was a handshake that has said so, and its connection is not used because of those who wait.
            self.owed = (number, until) if link is not None and link.in_use else None
            return
        if link is not None:
            link.apart()
        alone = peering.wrote_alone(link.peering if link is not None else None, self.metadata)
        if link is not None and link.in_use and alone != self.metadata:
            # Begun before the connection, or failed there: the secondary lacks it, and was told that it lacks nothing.
            # It has it soon, or is left, and learns from the next handshake that it is a target (invariant 10).
            self.owed = number, until
            wait = max(SETTLE_SECONDS, until - loop.time())
            self.retry = loop.call_later(wait, link.lose, "what was written before it waits for too long")
            return
        try:
            self._store(alone)
        except HastError as error:
            if until == 0.0:
                log.error("%s; writes wait for it, or for the other node", error)
                until = loop.time() + self.resource.timeout
            if loop.time() < until:
                self.retry = loop.call_later(GRANT_SECONDS, self._go_degraded, number, until)
            else:
                self.pipeline.send(GGATE, {"cmd": "refuse_grant"})
            return
        self._remember()
        self.pipeline.send(GGATE, {"cmd": "grant", "number": number})

    def _remember(self) -> None:
        """The metadata tell of all that is lacking here, if no flush has failed: whichever of the two comes first."""
        assert self.component is not None and self.pipeline is not None
        if self.outage is not None and self.outage.unrecorded:
            return  # they do not
        boot.remember(self.rundir, self.resource.name)
        if self.component.sync_failed or self.pipeline.sync_error:
            boot.spoil(boot.note(self.rundir, self.resource.name))

    def _flush_failed(self) -> None:
        """One of this process has. What the disk has lost by that is not durable because the next one succeeds; and it
        may be whole on the secondary, so it is not copied there."""
        assert self.pipeline is not None
        if not self.pipeline.sync_error:
            log.error("%s: a flush of its metadata has failed: what was written may be lost", self.resource.name)
            arena = self.pipeline.arena
            if arena is not None:
                arena.seq.loss = lib.HAST_SEQ_LOSS_TOLD  # from here on, and not when the message has come
            self.pipeline.flush_failed()
            self.pipeline.send(GGATE, {"cmd": "flush_failed"})

    def _end_retry(self) -> None:
        self.owed = None
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None

    def _fail(self, error: HastError) -> None:
        if not self.failed.done():
            self.failed.set_result(error)

    def _unexpected(self, error: Exception) -> None:
        """A mistake of ours, or the system is out of something: a new worker may not meet it again. Clients must not
        wait for what nobody does any more."""
        log.error("%s: unexpected error", self.resource.name, exc_info=error)
        self._fail(TemporaryError(f"{self.resource.name}: unexpected error: {error!r}"))

    def _stage_death(self, stage: int, what: str) -> None:
        """A stage is gone: take the pipeline down and up again, the device stays (its requests are issued anew)."""
        now = time.monotonic()
        self.restarts = [*(t for t in self.restarts if now - t < RESTART_WINDOW), now]
        self.died = True
        if self.link is not None and stage == GGATE:
            self.link.stage_gone()
        if self.failed.done():
            return
        if len(self.restarts) > RESTARTS:
            self._fail(TemporaryError(f"{self.resource.name}: its {what}, {RESTARTS} times in {RESTART_WINDOW:g} s"))
            return
        log.error("%s: its %s; restarting its stages", self.resource.name, what)
        if self.restarting is None or self.restarting.done():
            self.restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _restart(self) -> None:
        assert self.pipeline is not None
        async with self.turn:
            if not self.may_serve:
                return  # start() has failed: nobody is to be served
            try:
                # Before anybody is served, the other node is asked as start() has asked it.
                connected = self.link is not None and (self.link.connected or self.listener is None)
                while self.died and not self.failed.done():  # also one of those that were just started
                    self.died = False
                    if self.link is not None:
                        await self.link.pause()
                    await self.pipeline.close()
                    await self._start_stages()
                    if self.link is not None:
                        await self.link.resume(at_once=connected)
                self._serve_device(resend=True)
                self._serve_waiting()
                log.warning("%s: its stages run again", self.resource.name)
            except HastError as error:
                self._fail(error)
            except Exception as error:
                self._unexpected(error)

    def _serve_waiting(self) -> None:
        waiting, self.waiting = self.waiting, []
        for connection, flags in waiting:
            assert self.pipeline is not None
            self.pipeline.send(GGATE, {"cmd": "nbd", "flags": flags}, (connection.fileno(),))
            connection.close()

    async def reload(self, resource: Resource) -> None:
        """Go on with other settings, none of which needs a new worker (hast/reload.py)."""
        assert self.pipeline is not None
        async with self.turn:
            changed = changed_settings(self.resource, resource)
            self.resource = resource
            settings = {
                "sync_rate": resource.syncrate,
                "metaflush": int(resource.metaflush),
                "detach_on_error": int(resource.on_io_error == "detach"),
                "keepawake": resource.keepawake,
            }
            self.pipeline.settings = replace(self.pipeline.settings, keepawake=resource.keepawake)
            self.pipeline.send(GGATE, {"cmd": "settings", **settings})
            if action(changed, Role.PRIMARY) is Action.RECONNECT:
                await self._relink()

    async def _relink(self) -> None:
        """Leave the other node and connect to the one that is configured now, if there is one."""
        virgin = False
        if self.link is not None:
            await self.link.stop()
            virgin = self.link.peering.virgin
        self.link = None
        if self.resource.remote is not None:
            self.link = Link(self._owner(), virgin)
            await self.link.resume()

    # ---- status ----

    def status(self) -> dict[str, Any]:
        """The fields of control.StatusEntry that only a running worker knows (docs/protocol.md section 7)."""
        entry: dict[str, Any] = {"status": "degraded", "role": "primary", "workerpid": os.getpid()}
        if self.metadata is not None:
            entry |= {"extentsize": self.metadata.extentsize, "keepdirty": self.metadata.keepdirty}
            entry["syncing"] = int(self.metadata.syncing)
            if self.outage is not None and self.outage.detached:
                entry["syncing"] = DETACHED
        arena = self.pipeline.arena if self.pipeline is not None else None
        if arena is None or self.metadata is None:
            return entry
        seq, stats = arena.seq, arena.seq.stats
        entry |= {
            "status": "complete" if seq.connected and seq.ndirty == 0 else "degraded",
            "dirty": seq.ndirty * self.metadata.extentsize,
            "stat_read": stats.read,
            "stat_write": stats.write,
            "stat_delete": getattr(stats, "del"),
            "stat_flush": stats.flush,
            "stat_activemap_update": stats.map_update,
            "stat_read_error": stats.read_error,
            "stat_write_error": stats.write_error,
            "stat_delete_error": stats.delete_error,
            "stat_flush_error": stats.flush_error,
            "idle_queue_size": seq.nfree,
            "local_queue_size": arena.ring_used(lib.HAST_RING_DISK),
            "send_queue_size": arena.ring_used(lib.HAST_RING_SEND),
            "recv_queue_size": 0,
            "done_queue_size": arena.ring_used(lib.HAST_RING_DISK_DONE),
        }
        return {key: value for key, value in entry.items() if key in STATUS_FIELDS}

    # ---- end ----

    async def shutdown(self, leave: bool, abandoned: bool) -> None:
        """Withdraw the device, answer what is under way, end the stages, give the component back. Never raises.

        leave: the device stays for the next worker. abandoned: hastd is gone, and the next one waits for this worker.
        """
        if self.restarting is not None:
            await asyncio.wait([self.restarting])
        if self.patience is not None:
            self.patience.cancel()
        if self.outage is not None:
            await self.outage.close()
        for connection, _ in self.waiting:
            connection.close()
        try:
            if self.listener is not None:
                await self.listener.close()
            self._end_retry()
            if not leave:
                self._end_waits()
            if not leave or (self.device is not None and (self.device.dead or not self.device.kept)):
                try:
                    await self._remove_device()
                except HastError as error:  # main sees to it; the rest ends in good order
                    log.error("%s", error)
            if self.link is not None and not leave:
                await self.link.settle()
            if self.pipeline is not None:
                if not abandoned:
                    await self._stop_stages(leave)
                elif self.link is not None:
                    await self.link.pause()
                await self.pipeline.close()
            if self.device is not None:
                self.device.close()
        except HastError as error:
            log.error("%s", error)
        finally:
            if self.component is not None:
                self.component.close()

    def _end_waits(self) -> None:
        """Who waits for the secondary, or for the disk, gets an error; else the next worker is asked for it again."""
        if self.pipeline is not None:
            self.pipeline.send(GGATE, {"cmd": "give_up"})
            self.pipeline.send(GGATE, {"cmd": "refuse_grant"})

    async def _remove_device(self) -> None:
        if self.device is not None:
            await self.device.detach(abort=not self.served)
            self.tell({"event": "released"})

    async def _stop_stages(self, leave: bool) -> None:
        assert self.pipeline is not None
        seconds = LEAVE_SECONDS if leave else END_SECONDS
        await self.pipeline.stop(GGATE, seconds=seconds)
        if self.link is not None:
            await self.link.pause()
        await self.pipeline.stop(DISK, seconds=seconds)


STATUS_FIELDS = frozenset(StatusEntry.__dataclass_fields__)
