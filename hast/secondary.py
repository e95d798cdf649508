"""A resource in the role secondary: it waits for its primary, answers the handshake, and does what it is sent.

Invariants:
- The order of docs/protocol.md section 3: what the handshake makes durable (map, metadata) is durable before the
  answer goes out; the on-disk map is cleared only after the primary's first request has come.
- A connection has stages of its own in an arena of its own; a new connection takes the place of the old one, whose
  stages have ended by then: what they had received completely is on the component.
- Losing the primary is no failure: the resource stays secondary and waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from hast import boot, decision
from hast.activemap import FILE_SECTOR_SIZE, METADATA_SIZE, count_dirty, extent_count
from hast.channel import close_all
from hast.component import Component, open_component
from hast.config import Resource
from hast.control import Role
from hast.counters import counters, failures
from hast.decision import Outcome
from hast.errors import DiskError, HastError, UnavailableError
from hast.ffi import _hast
from hast.handshake import (
    SecondaryAnswer,
    answer_second,
    first_request,
    refusal_message,
    refused_second,
    request_from_dict,
)
from hast.messages import DISK_FAILED, MISMATCH_ADVICE, SPLIT_BRAIN_ADVICE, Handshake2Request, Refusal
from hast.metadata import Metadata
from hast.notice import AHEAD, Notice, heed
from hast.opening import distrust_map, flush
from hast.pipeline import END_SECONDS, Pipeline, PipelineSettings, component_settings
from hast.promotion import discarding
from hast.reload import Action, action, changed_settings
from hast.sockio import watch, write_all
from hast.stages.context import DISK, RECV, ConnSettings

log = logging.getLogger(__name__)
lib = _hast.lib

SLOTS = 256  # requests under way at once
SLAB_SIZE = 1 << 20  # bytes: the largest request that has to be taken
SILENCE_SECONDS = 20.0  # without a request or a keepalive
STORE_SECONDS = 1.0  # between attempts to store what the disk has not taken
LOCK_SECONDS = 2.0  # for the kernel to let go of the component of a worker that was killed

Tell = Callable[..., None]


class Secondary:
    """One resource as secondary. `failed` becomes done, with the reason, when it can be served no longer."""

    def __init__(self, resource: Resource, rundir: Path, tell: Tell) -> None:
        self.resource = resource
        self.rundir = rundir
        self.tell = tell
        self.failed: asyncio.Future[HastError] = asyncio.get_running_loop().create_future()
        self.component: Component | None = None
        self.metadata: Metadata | None = None
        self.stored = True  # what is on disk is `metadata`
        self._storing = False  # somebody sees to it that it will be
        self.pipeline: Pipeline | None = None
        self._counted: Counter[str] = Counter()  # of the connections before
        self.connected = False
        self.peer = ""
        self._token = b""  # of the connection in force
        self._keepmap = False  # its primary cannot store our map
        self._hast = False  # and it is one of ours, which says when this node is complete
        self._refused = ""  # why the last handshake was
        self._turn = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, orders: dict[str, Any], fds: list[int]) -> None:
        """Be ready for a primary. Raises HastError."""
        close_all(fds)
        resource = self.resource
        note = boot.note(self.rundir, resource.name)
        self.component = open_component(resource.name, resource.localpath, resource.directio, True, LOCK_SECONDS, note)
        self.component.on_sync_failure = self._flush_failed
        self.metadata = self.component.read_metadata()
        if boot.lost(self.rundir, resource.name):
            distrust_map(self.component, self.metadata)
            if self.metadata.prevrole is Role.PRIMARY and self.metadata.alone:
                boot.forget(note)  # nobody has more; it is in doubt all the same
        # Who wrote it may have died before that, and a primary is to rely on it.
        flush(self.component, self.metadata, self.rundir)
        self._store(replace(self.metadata, prevrole=Role.SECONDARY))

    def ready_message(self) -> dict[str, Any]:
        """What main is told when a primary may connect."""
        return {"event": "ready", "device": None, "nbd": None}

    def _store(self, metadata: Metadata) -> None:
        """Make `metadata` durable, whatever `metaflush` says of maps, then rely on it."""
        assert self.component is not None
        if metadata != self.metadata or not self.stored:
            self.stored = False  # should this fail, nobody knows which of the two is on disk
            self.component.write_metadata(metadata)
            self.metadata, self.stored = metadata, True

    def _hook(self, event: str) -> None:
        self.tell({"event": "hook", "args": [event, self.resource.name]})

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---- a primary connects ----

    def connection(self, message: dict[str, Any], fds: list[int]) -> None:
        """Main's message: two connections, the second one's handshake request has been read. Owns the descriptors."""
        if len(fds) != 2:
            close_all(fds)
            log.error("%s: a connection without its sockets", self.resource.name)
            return
        self._later(self._connection(message, fds))

    async def _connection(self, message: dict[str, Any], fds: list[int]) -> None:
        name = self.resource.name
        with contextlib.ExitStack() as stack:
            incoming, out = (stack.enter_context(socket.socket(fileno=fd)) for fd in fds)
            async with self._turn:
                await self._drop("a new connection takes its place")
                try:
                    for sock in (incoming, out):
                        sock.setblocking(False)
                        watch(sock, self.resource.timeout)
                    async with asyncio.timeout(self.resource.timeout):
                        accepted = await self._answer(message, incoming)
                    if accepted:
                        await self._serve(message, incoming, out)
                except HastError as error:
                    log.error("%s", error)
                    await self._drop("")
                except OSError as error:
                    why = error.strerror or "it took too long"
                    log.warning("%s: handshake with %s failed: %s", name, message.get("peer"), why)
                    await self._drop("")

    async def _answer(self, message: dict[str, Any], incoming: socket.socket) -> bool:
        """Decide, store, answer on connection 1. Whether there is a connection now."""
        assert self.metadata is not None
        version = int(message["version"])
        try:
            answer = self._decide(request_from_dict(message["request"]), version)
        except DiskError as error:  # nothing is accepted that is not durable; the disk may be well the next time
            if self._news(str(error)):
                log.error("%s: the primary is refused", error)
            await write_all(incoming, refused_second(DISK_FAILED, version, self.metadata))
            return False
        await write_all(incoming, answer.message)
        if answer.decision.warning:
            log.warning("%s: %s", self.resource.name, answer.decision.warning)
        if answer.decision.error is None:
            self._refused = ""
        elif self._news(answer.decision.error):
            self._complain(answer, str(message.get("peer")))
        return answer.accepted

    def _decide(self, request: Handshake2Request, version: int) -> SecondaryAnswer:
        """The answer, once all is durable that it promises. Raises DiskError."""
        assert self.component is not None and self.metadata is not None
        component, metadata = self.component, self.metadata
        self._hast = request.hast
        # What was acknowledged and not flushed may be lost: with the power, or by a flush that has failed since.
        doubt = boot.anew(self.rundir, self.resource.name)
        answer = answer_second(
            request,
            version,
            metadata,
            lambda: component.read_map(metadata),
            self.resource.compression,
            self.resource.checksum,
            doubt,
            decision.choose_resuid(secrets.randbits(64)),
        )
        if answer.map is not None:
            self._write_map(answer.map, durable=True)
        self._store(answer.metadata)
        if answer.accepted and doubt:
            boot.remember(self.rundir, self.resource.name)
        return answer

    def _news(self, reason: str) -> bool:
        """Whether this is another reason to refuse than the last one: the primary will try again and again."""
        before, self._refused = self._refused, reason
        return reason != before

    def _complain(self, answer: SecondaryAnswer, peer: str) -> None:
        """Why a primary was refused."""
        name = self.resource.name
        if answer.split_brain:
            log.error(SPLIT_BRAIN_ADVICE, name, name)
            self._hook("split-brain")
        else:
            log.error("%s: refused %s: %s", name, peer, answer.decision.error)
            if answer.decision.outcome in (Outcome.RESUID_MISMATCH, Outcome.STRANGERS):
                log.error(MISMATCH_ADVICE, name, name)

    async def _serve(self, message: dict[str, Any], incoming: socket.socket, out: socket.socket) -> None:
        self.peer = str(message.get("peer", ""))
        request = request_from_dict(message["request"])
        self._token, self._keepmap, self._hast = request.token, request.keepmap, request.hast
        self.pipeline = Pipeline(self._settings(), self._stage_message, self._stage_death)
        self.pipeline.create()
        conn = self._conn(incoming.fileno(), out.fileno(), int(message["version"]))
        await self.pipeline.start(DISK, RECV, conn=conn)
        self.connected = True
        log.info("%s: connected from %s", self.resource.name, self.peer)
        self._hook("connect")

    def _conn(self, incoming: int, out: int, version: int) -> ConnSettings:
        assert self.component is not None
        resource = self.resource
        return ConnSettings(
            incoming,
            out,
            version,
            resource.compression,
            resource.checksum,
            timeout=float(resource.timeout),
            silence=SILENCE_SECONDS,
            sector=FILE_SECTOR_SIZE,  # a primary's clients may ask for that, whatever the component's are
        )

    def _settings(self) -> PipelineSettings:
        assert self.component is not None and self.metadata is not None
        return component_settings(
            self.component,
            self.metadata,
            "secondary",
            nclient=SLOTS,
            nsync=0,
            slab_size=SLAB_SIZE,
            keepawake=self.resource.keepawake,
        )

    def discard(self) -> dict[str, Any]:
        """`hastctl discard`: nothing, or an error in words with its exit code."""
        assert self.metadata is not None
        try:
            if self.connected:
                raise UnavailableError(
                    f"{self.resource.name}: it is connected to its primary: it has no changes of its own to throw away"
                )
            self._store(discarding(self.metadata))
        except HastError as error:
            return {"error": str(error), "code": error.exit_code}
        log.warning("%s: its own changes are to be thrown away when a split-brain is found", self.resource.name)
        return {}

    # ---- while it is there ----

    def _stage_message(self, stage: int, message: dict[str, Any]) -> None:
        if message.get("event") == "first":
            self._first_request()
        elif message.get("event") == "lost":
            self.lose(str(message.get("why", "")))

    def _stage_death(self, stage: int, what: str) -> None:
        self.lose(what)

    def _first_request(self) -> None:
        """The primary has stored what the handshake has told it, and merged our map into its own, durably: ours is not
        needed any more."""
        assert self.metadata is not None
        if self._keepmap:
            return
        try:
            self._store(first_request(self.metadata))
            self._write_map(bytes(self.metadata.mapsize), durable=self.resource.metaflush)
        except HastError as error:
            # Too much is dirty then, which costs a longer synchronisation and nothing else.
            log.error("%s", error)

    def _write_map(self, activemap: bytes, durable: bool) -> None:
        assert self.component is not None
        self.component.pwrite(METADATA_SIZE, activemap)
        if durable:
            self.component.flush()

    def notice(self, message: dict[str, Any], fds: list[int]) -> None:
        """Main's message: the primary says something beside its connection. Owns the descriptor."""
        if len(fds) == 1:
            self._later(self._notice(message, fds[0]))
        else:
            close_all(fds)

    async def _notice(self, message: dict[str, Any], fd: int) -> None:
        peer = message.get("peer")
        with socket.socket(fileno=fd) as sock:
            sock.setblocking(False)
            async with self._turn:
                try:
                    answer = self._heed(message)
                except HastError as error:
                    if self._news(str(error)):
                        log.warning("%s: notice of %s refused: %s", self.resource.name, peer, error)
                    text = DISK_FAILED if isinstance(error, DiskError) else str(error)
                    answer = refusal_message(Refusal(text))
            try:
                async with asyncio.timeout(self.resource.timeout):
                    await write_all(sock, answer)
            except OSError as error:
                log.debug("%s: %s does not take its answer: %s", self.resource.name, peer, error.strerror)

    def _heed(self, message: dict[str, Any]) -> bytes:
        """Store what the notice says; the answer. Raises HastError when it is refused."""
        assert self.metadata is not None
        notice = Notice(self.resource.name, bytes.fromhex(message["token"]), str(message["word"]))
        heeded = heed(notice, self._token, self.metadata)
        if heeded.map is not None:
            self._keepmap = True
            self._write_map(heeded.map, durable=True)
        was_syncing = self._syncing
        self._store(heeded.metadata)
        if notice.word == AHEAD:
            log.warning("%s: the data of %s is out of date, this node has the newer", self.resource.name, self.peer)
        elif was_syncing:
            log.info("%s: synchronisation complete, this node may become primary", self.resource.name)
        return heeded.message

    def lose(self, why: str) -> None:
        """The connection is lost, or another one is about to take its place."""
        if self.pipeline is not None:  # it may be lost while its stages are being started
            self._later(self._lost(why, self.pipeline))

    def _flush_failed(self) -> None:
        """One of this process has. What the disk has lost then is not durable because the primary's next one succeeds:
        it is copied after the next handshake, which finds this node in doubt (hast/boot.py)."""
        if self.pipeline is None:
            self._know()
            return
        if self.pipeline.arena is not None:
            self.pipeline.arena.seq.loss = lib.HAST_SEQ_LOSS_TOLD  # before a message can be there
        self.pipeline.flush_failed()
        self.lose("its disk has failed a flush")

    async def _lost(self, why: str, pipeline: Pipeline) -> None:
        async with self._turn:
            if self.pipeline is pipeline:
                await self._drop(why)

    async def _drop(self, why: str, seconds: float | None = None) -> None:
        """End the connection's stages, after what they have received is on the component: if the disk stage lives. The
        primary knows what it has no reply for. seconds: for that, in the place of `timeout`."""
        self._token = b""
        pipeline = self.pipeline
        if pipeline is None:
            return
        if pipeline.runs(DISK):
            await self._finish(pipeline, max(END_SECONDS, self.resource.timeout) if seconds is None else seconds)
        await pipeline.kill(*pipeline.stages)
        lacking = pipeline.unstored or pipeline.sync_error != 0
        self._count(pipeline)
        await pipeline.close()
        self.pipeline = None  # not before: shutdown() cancels whoever is in here, and begins it again
        if lacking:
            self._lacks()
        if self.connected:
            self.connected = False
            log.warning("%s: connection from %s ended: %s", self.resource.name, self.peer, why)
            self._hook("disconnect")

    def _count(self, pipeline: Pipeline) -> None:
        """The primary knows of no request more than that it has failed: what it was is said here."""
        if pipeline.arena is None:
            return
        counted = counters(pipeline.arena)
        if failed := failures(counted):
            log.error("%s: component %s has failed requests (%s)", self.resource.name, self.resource.localpath, failed)
        self._counted.update(counted)  # + would leave out what is 0

    def _lacks(self) -> None:
        """What was acknowledged because it was here is not on the disk for certain: a stage was killed, or the disk is
        too slow, or has failed a write or a flush. The primary may have it, and may be gone before the next handshake:
        this node is a target from now on (invariant 10), until a handshake or a notice says that it lacks nothing."""
        boot.spoil(boot.note(self.rundir, self.resource.name))
        if self._know():
            self._store_now()

    def _know(self) -> bool:
        """That it lacks something holds from now on, whether the disk takes it or not: whoever asks for the role is
        told. It is tried until it is stored. Whether this is news; not where nobody would ever say that it is over."""
        assert self.metadata is not None
        lacking = replace(self.metadata, syncing=True, unsaid=True)
        if not self._hast or (lacking == self.metadata and (self.stored or self._storing)):
            return False
        self.metadata, self.stored = lacking, False
        log.error("%s: what was received last may not be on its disk: this node is incomplete", self.resource.name)
        if not self._storing:
            self._storing = True
            self._later(self._store_later())
        return True

    async def _store_later(self) -> None:
        while not self.stored:
            await asyncio.sleep(STORE_SECONDS)
            async with self._turn:
                self._store_now()
        self._storing = False

    def _store_now(self) -> None:
        if not self.stored and self.metadata is not None:
            try:
                self._store(self.metadata)
            except HastError as error:
                if self._news(str(error)):
                    log.error("%s", error)

    async def _finish(self, pipeline: Pipeline, seconds: float) -> None:
        """With memsync what is in memory here is acknowledged, and perhaps nowhere else any more: a disk that is slow,
        and not slower than `timeout`, gets the time that it needs."""
        if not await pipeline.stop(RECV, seconds=seconds):
            log.error("%s: its disk is too slow: what was received last is not on it", self.resource.name)
            # Where the primary was told of none of it, nothing is lacking: then it is only in doubt.
            (boot.spoil if pipeline.unstored else boot.forget)(boot.note(self.rundir, self.resource.name))
        await pipeline.stop(DISK)

    async def reload(self, resource: Resource) -> None:
        """Go on with other settings, none of which needs a new worker (hast/reload.py)."""
        async with self._turn:
            changed = changed_settings(self.resource, resource)
            self.resource = resource
            if self.pipeline is not None:
                self.pipeline.settings = replace(self.pipeline.settings, keepawake=resource.keepawake)
                self.pipeline.send(RECV, {"cmd": "settings", "keepawake": resource.keepawake})
            if action(changed, Role.SECONDARY) is Action.RECONNECT:
                await self._drop("it has other settings now")

    # ---- status and end ----

    @property
    def _syncing(self) -> bool:
        return self.metadata is not None and self.metadata.syncing

    def status(self) -> dict[str, Any]:
        """The fields of control.StatusEntry that only a running worker knows (docs/protocol.md section 7)."""
        entry: dict[str, Any] = {
            "status": "complete" if self.connected and not self._syncing else "degraded",
            "syncing": int(self._syncing),
            "role": "secondary",
            "workerpid": os.getpid(),
        }
        if self.metadata is None or self.component is None:
            return entry
        metadata = self.metadata
        with contextlib.suppress(HastError):
            extents = extent_count(metadata.datasize, metadata.extentsize)
            entry["dirty"] = count_dirty(self.component.read_map(metadata), extents) * metadata.extentsize
        arena = self.pipeline.arena if self.pipeline is not None else None
        counted = Counter(self._counted)
        if arena is not None:
            counted.update(counters(arena))
        return entry | counted | {"extentsize": metadata.extentsize, "keepdirty": metadata.keepdirty}

    async def shutdown(self, leave: bool, abandoned: bool) -> None:
        """End the connection, give the component back. Never raises."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        try:
            # Other resources' devices wait until all workers have left: not for as long as `timeout` may be.
            await self._drop("the role changes", END_SECONDS if leave or abandoned else None)
        except HastError as error:
            log.error("%s", error)
        finally:
            if self.component is not None:
                self._store_now()
                self.component.close()
