"""A resource in the role primary: the order in which its parts start and end, its metadata, its stages.

The parts: how it comes to its component (hast/opening.py), what clients reach it by (hast/frontend.py), the connection
to the secondary (hast/link.py), what it may do without that (hast/alone.py), and without its own disk (hast/outage.py).

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
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast import boot, peering, promotion
from hast.alone import Alone
from hast.component import AbsentComponent, Component
from hast.config import Resource
from hast.control import Role
from hast.errors import DiskError, HastError, TemporaryError, UnavailableError
from hast.ffi import _hast
from hast.frontend import Frontend, Tell
from hast.handshake import Agreement
from hast.link import MODES, Link, Owner
from hast.metadata import Metadata
from hast.opening import distrust_map, flush, open_primary, read_note
from hast.outage import Outage
from hast.pipeline import END_SECONDS, Pipeline, PipelineSettings, component_settings
from hast.primary_status import primary_status
from hast.reload import Action, action, changed_settings
from hast.stages.context import DISK, GGATE

log = logging.getLogger(__name__)
lib = _hast.lib

CLIENT_SLOTS = 256  # bios of clients under way at once
SYNC_SLOTS = 32
SLAB_SIZE = 128 * 1024  # bytes: what a peer of version 2 takes in one request
LEAVE_SECONDS = 1.0  # for stages to finish what is under way when another worker goes on with the device
RESTARTS = 8  # of the pipeline, within
RESTART_WINDOW = 60.0  # seconds, before the worker gives up and is started anew itself


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
        self.may_serve = False  # start() has asked the other node, and nothing stands against it
        self.link: Link | None = None
        self.outage: Outage | None = None
        self.frontend = Frontend(self)
        self.alone = Alone(self)
        self.restarts: list[float] = []
        self.restarting: asyncio.Task[None] | None = None
        self.died = False  # a stage has, since they were started
        self.over = False  # none is started any more
        self.turn = asyncio.Lock()  # one restart of the stages, or one change of the settings, at a time

    # ---- start ----

    async def start(self, orders: dict[str, Any], fds: list[int]) -> None:
        """Serve the resource; orders as in hast/workers.py. Raises HastError, EndedError (hast/link.py) when it was
        told to stop; shutdown() then takes away what is there already."""
        resource, left = self.resource, orders.get("device")
        self.frontend.adopt(left, fds)
        note = boot.note(self.rundir, resource.name)
        again = bool(orders.get("again"))
        self.component, self.metadata = open_primary(resource, self.rundir, again)
        self._check_served(orders.get("served"))
        self.metadata, unrecorded = read_note(self.rundir, self.component, self.metadata)
        unrecorded = unrecorded or isinstance(self.component, AbsentComponent)
        role = self.metadata.prevrole
        outdated = self.metadata.syncing and role is Role.PRIMARY  # and served by the other node
        lost = boot.lost(self.rundir, resource.name)
        if lost and not unrecorded:
            unrecorded = not self._distrust_map(again)
        if resource.remote is not None and not outdated and (role is Role.SECONDARY or not again or lost):
            self.metadata = flush(self.component, self.metadata, self.rundir, lost)
        virgin = self._become_primary()
        self.frontend.choose(left)
        settings = self._settings()
        if boot.lost(self.rundir, resource.name):
            if again and not self.metadata.syncing:
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
        await self._settled()  # what comes now needs the stages; one that dies from here on is started anew under it
        if self.failed.done():
            raise self.failed.result()
        await self.frontend.start()

    def ready_message(self) -> dict[str, Any]:
        """What main is told when clients can be served."""
        return self.frontend.ready_message() | {"served": self._served()}

    def _served(self) -> dict[str, Any]:
        """Whose data clients find here."""
        assert self.metadata is not None
        return {"localpath": self.resource.localpath, "resuid": self.metadata.resuid}

    def _check_served(self, before: dict[str, Any] | None) -> None:
        """before: what the worker before this one has served. NBD clients that connect again by themselves, and users
        of a block device, are to find the same. Raises UnavailableError."""
        if before is not None and before != self._served():
            raise UnavailableError(
                f"{self.resource.name}: not going on as primary: the settings or the component have changed:"
                f" {before} became {self._served()}"
            )

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
            if self.outage is None or not peering.found_newer(agreement, self.attempts or [metadata]):
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
            device=self.frontend.device is not None,
            keepawake=self.resource.keepawake,
        )

    async def _start_stages(self) -> None:
        assert self.component is not None and self.metadata is not None and self.pipeline is not None
        arena = self.pipeline.create()
        assert self.outage is not None
        detached = self.outage.detached
        if not detached and self.metadata.unmapped:
            detached = not self._mark_all()
        if not detached and self.pipeline.sync_error and not self._distrust_map(again=True):
            self.outage.go_on()
            detached = True
        if not detached:
            arena.load_map(self.component.read_map(self.metadata))
            self._flush()
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

    def _flush(self) -> None:
        """Map and metadata are relied on as durable from now on. Who wrote them may have died before the flush. Of what
        the disk loses now, or has lost when those died who would have told, no client knows, and the other node may
        have it: none must be shown what is left."""
        assert self.component is not None and self.metadata is not None and self.pipeline is not None
        if self.resource.remote is None or self.metadata.syncing:  # else it is read there
            self.component.flush()
            return
        resource, lost = self.resource, self.pipeline.sync_error != 0
        if flush(self.component, self.metadata, self.rundir, lost) != self.metadata:
            name, path = resource.name, resource.localpath
            raise DiskError(f"{name}: component {path} has failed a flush: the other node may have what it has lost")

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

    def _distrust_map(self, again: bool) -> bool:
        """A flush has failed, and what it has lost may be the map. Whether the component can be used: not where it is
        out of date, and the map cannot be marked; the secondary does everything then. Where nobody has more, and the
        role is not new, nothing is copied from here before it is taken anew. Raises DiskError."""
        assert self.component is not None and self.metadata is not None
        try:
            distrust_map(self.component, self.metadata)
        except DiskError as error:
            if not self.metadata.syncing and not (again and promotion.whole(self.metadata)):
                raise
            log.error("%s; a flush has failed, and what is marked there cannot be trusted", error)
            return not self.metadata.syncing
        return True

    def _degraded_granted(self) -> bool:
        """Whether localcnt says already, on the disk, that this node writes alone."""
        assert self.metadata is not None
        return self.metadata.alone and not self.attempts

    # ---- while it runs ----

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
            self._fail(self.frontend.device_gone(message["errno"]))

    def _sequencer_event(self, message: dict[str, Any]) -> None:
        bits = int(message["bits"])
        try:
            if bits & lib.HAST_SEQ_SYNC_DONE:
                self._end_retry()  # who has waited was answered by that
            if self.link is not None:
                self.link.sequencer(bits, int(message["dirty"]), bool(message["unjoined"]))
            if bits & lib.HAST_SEQ_SYNC_DONE:
                self._remember()
            if bits & lib.HAST_SEQ_LOCAL_FAILED and self.outage is not None:
                self.outage.failed(bool(message["detach"]))
            if bits & lib.HAST_SEQ_NEED_DEGRADED:
                self._end_retry()
                self.alone.go_degraded(int(message["number"]))
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
        """There is no secondary now, say hast/link.py and hast/outage.py."""
        self.alone.lonely(failing)

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
            arena = self.pipeline.arena
            if arena is not None:
                arena.seq.loss = lib.HAST_SEQ_LOSS_TOLD  # from here on, and not when the message has come
            log.error("%s: a flush of its metadata has failed: what was written may be lost", self.resource.name)
            self.pipeline.flush_failed()
            self.pipeline.send(GGATE, {"cmd": "flush_failed"})

    def _end_retry(self) -> None:
        """What writes wait for is not needed any more, says hast/outage.py."""
        self.alone.end_retry()

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
        if self.failed.done() or self.over:
            return
        if len(self.restarts) > RESTARTS:
            self._fail(TemporaryError(f"{self.resource.name}: its {what}, {RESTARTS} times in {RESTART_WINDOW:g} s"))
            return
        log.error("%s: its %s; restarting its stages", self.resource.name, what)
        if self.restarting is None or self.restarting.done():
            self.restarting = asyncio.get_running_loop().create_task(self._restart())

    async def _settled(self) -> None:
        """No stages are being started anew."""
        while self.restarting is not None and not self.restarting.done():
            await asyncio.wait([self.restarting])

    async def _restart(self) -> None:
        assert self.pipeline is not None
        async with self.turn:
            if not self.may_serve:
                return  # start() has failed: nobody is to be served
            try:
                # Before anybody is served, the other node is asked as start() has asked it.
                connected = self.link is not None and (self.link.connected or self.frontend.listener is None)
                while self.died and not self.failed.done():  # also one of those that were just started
                    self.died = False
                    # Asked by stages that are gone. A flush that fails from here on makes this node a target, and that
                    # must be neither prevented by what would be stored for them, nor overwritten.
                    self._end_retry()
                    if self.link is not None:
                        await self.link.pause()
                    await self.pipeline.close()
                    self._end_retry()
                    await self._start_stages()
                    if self.link is not None:
                        await self.link.resume(at_once=connected)
                self.frontend.serve_device(resend=True)
                self.frontend.serve_waiting()
                log.warning("%s: its stages run again", self.resource.name)
            except HastError as error:
                self._fail(error)
            except Exception as error:
                self._unexpected(error)

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
        arena = self.pipeline.arena if self.pipeline is not None else None
        return primary_status(self.metadata, arena, self.outage is not None and self.outage.detached)

    # ---- end ----

    async def shutdown(self, leave: bool, abandoned: bool) -> None:
        """Withdraw the device, answer what is under way, end the stages, give the component back. Never raises.

        leave: the device stays for the next worker. abandoned: hastd is gone, and the next one waits for this worker.
        """
        await self._settled()
        self.alone.end_patience()
        if self.outage is not None:
            await self.outage.close()
        self.frontend.drop_waiting()
        try:
            await self.frontend.close_listener()
            if leave:
                self._end_retry()  # the next worker is asked for it again
            else:
                await self.alone.end()
            await self._settled()  # who uses the device is answered by the new stages
            if not leave or self.frontend.useless:
                try:
                    await self.frontend.remove_device()
                except HastError as error:  # main sees to it; the rest ends in good order
                    log.error("%s", error)
            if self.link is not None and not leave:
                await self.link.telling.settle()
            await self._settled()
            self.over = True
            if self.pipeline is not None:
                if not abandoned:
                    await self._stop_stages(leave)
                elif self.link is not None:
                    await self.link.pause()
                await self.pipeline.close()
            self.frontend.close()
        except HastError as error:
            log.error("%s", error)
        finally:
            if self.component is not None:
                self.component.close()

    async def _stop_stages(self, leave: bool) -> None:
        assert self.pipeline is not None
        seconds = LEAVE_SECONDS if leave else END_SECONDS
        await self.pipeline.stop(GGATE, seconds=seconds)
        if self.link is not None:
            await self.link.pause()
        await self.pipeline.stop(DISK)  # which ends as soon as what it has begun is done: to kill it is no faster
