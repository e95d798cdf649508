"""A primary's connection to its secondary: made, kept, made again (docs/protocol.md sections 3 and 6).

Invariants:
- One thing at a time: the stages of an old connection are gone, and the sequencer knows it, before the next
  attempt begins.
- What a handshake demands to be stored is durable before the sequencer may use the connection; the peer's map is
  merged and durable before the first request (the sequencer's part).
- Counters are set to "in sync" only when the sequencer says that both nodes have the same data, durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from hast import peering
from hast.config import Resource
from hast.connect import Established, connect, connect_patiently
from hast.errors import HastError, TemporaryError
from hast.ffi import _hast
from hast.handshake import RefusedError
from hast.messages import SPLIT_BRAIN_ADVICE, SyncSource
from hast.metadata import Metadata
from hast.peering import Peering
from hast.pipeline import Pipeline
from hast.stages.context import GGATE, RECV, SEND, ConnSettings

log = logging.getLogger(__name__)
lib = _hast.lib

FIRST_SECONDS = 2.0  # for the first attempt, before the primary starts alone; longer while the peer says `wait`
MODES = {
    "fullsync": lib.HAST_MODE_FULLSYNC,
    "memsync": lib.HAST_MODE_MEMSYNC,
    "async": lib.HAST_MODE_ASYNC,
}


@dataclass
class Owner:
    """What the link needs of its primary: metadata() and store() for the metadata block, hook() to run one, fail()
    when the resource can be served no longer, and the pipeline."""

    resource: Resource
    pipeline: Pipeline
    metadata: Callable[[], Metadata]
    store: Callable[[Metadata], None]
    hook: Callable[..., None]
    fail: Callable[[HastError], None]


class Link:
    """The connection and who makes it. What follows from what is in hast/peering.py, here it is carried out."""

    def __init__(self, owner: Owner, virgin: bool) -> None:
        self.owner = owner
        self.peering = Peering(virgin=virgin)
        self.address = str(owner.resource.remote)
        self._up = False  # send and recv stages run
        self._lost = asyncio.Event()
        self._refused = ""  # said already
        self._keeper: asyncio.Task[None] | None = None

    # ---- making it ----

    async def start(self) -> None:
        """The first attempt, before clients are served; then the connection is kept."""
        with contextlib.suppress(TimeoutError):
            await self._first()
        self._start_keeper()

    def _start_keeper(self) -> None:
        self._keeper = asyncio.get_running_loop().create_task(self._keep())
        self._keeper.add_done_callback(self._keeper_ended)

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """It runs until it is cancelled; anything else is a mistake of ours, which a new worker may not meet again."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            log.error("%s: connecting", self.owner.resource.name, exc_info=error)
            self.owner.fail(TemporaryError(f"{self.owner.resource.name}: unexpected error: {error!r}"))

    async def _first(self) -> None:
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                await self._establish(await self._connect())
        except RefusedError as error:
            if not error.wait:
                self._complain(error)
                return
            log.info("%s: %s is still primary, waiting for it", self.owner.resource.name, self.address)
            try:
                metadata = self.owner.metadata()
                patient = connect_patiently(self.owner.resource, metadata, virgin=self.peering.virgin)
                await self._establish(await self._checked(patient, metadata))
            except HastError as late:
                self._complain(late)
        except HastError as error:
            self._complain(error)

    async def _connect(self) -> Established:
        metadata = self.owner.metadata()
        known = self.peering
        attempt = connect(self.owner.resource, metadata, version=known.version, virgin=known.virgin)
        return await self._checked(attempt, metadata)

    async def _checked(self, attempt: Coroutine[Any, Any, Established], metadata: Metadata) -> Established:
        """The attempt's result. Raises TemporaryError when the counters have changed meanwhile: what was agreed on is
        not true any more (a first write without the secondary, invariant 7)."""
        made = await attempt
        if self.owner.metadata() != metadata:
            made.close()
            raise TemporaryError(f"{self.owner.resource.name}: counters changed during the handshake, trying again")
        return made

    async def _keep(self) -> None:
        """For as long as the resource is primary: wait until the connection is lost, make it anew."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if self._up:
                await self._lost.wait()
                await self._take_down(loop.time() - began)
            await asyncio.sleep(self.peering.pause)
            try:
                await self._establish(await self._connect())
            except HastError as error:
                self._complain(error)
                self.peering = peering.failed(self.peering)

    def _complain(self, error: HastError) -> None:
        """Say why there is no connection, once for each reason."""
        if str(error) == self._refused:
            return
        self._refused = str(error)
        if isinstance(error, RefusedError) and error.split_brain:
            log.error("%s: %s", self.owner.resource.name, SPLIT_BRAIN_ADVICE)
            self.owner.hook("split-brain")
        log.warning("%s", error)

    async def _establish(self, made: Established) -> None:
        """Give a connection whose handshake is done to the stages."""
        resource, agreement = self.owner.resource, made.agreement
        from_remote = agreement.syncsrc is SyncSource.SECONDARY
        try:
            self.peering, metadata = peering.agreed(self.peering, agreement)
            self._store(metadata)
            conns = {SEND: self._settings(made.out.fileno()), RECV: self._settings(made.incoming.fileno())}
            self._lost.clear()
            await self.owner.pipeline.start(RECV, SEND, conns=conns)
        finally:
            made.close()
        self._up, self._refused = True, ""
        mode = self.peering.mode(resource.replication)
        with _memory(agreement.map or b"") as map_fd:
            message = {"cmd": "connect", "mode": MODES[mode], "from_remote": from_remote}
            self.owner.pipeline.send(GGATE, message, (map_fd,))

    def _settings(self, fd: int) -> ConnSettings:
        resource = self.owner.resource
        return ConnSettings(fd, self.peering.version, resource.compression, resource.checksum, float(resource.timeout))

    def _store(self, metadata: Metadata) -> None:
        try:
            self.owner.store(metadata)
        except HastError as error:
            self.owner.fail(error)
            raise

    # ---- what the stages say ----

    def sequencer(self, bits: int, to_sync: int) -> None:
        """Events of the sequencer; to_sync: extents that are to be copied."""
        name = self.owner.resource.name
        if bits & lib.HAST_SEQ_CONNECTED and self._up:
            self.peering, hooks = peering.joined(self.peering, to_sync)
            log.info("%s: connected to %s, %d extents to synchronise", name, self.address, to_sync)
            self._run(hooks)
        if bits & lib.HAST_SEQ_SYNC_DONE:
            before = self.owner.metadata()
            self.peering, metadata, hooks = peering.in_sync(self.peering, before)
            self._store(metadata)
            if "syncdone" in hooks:
                log.info("%s: synchronisation complete", name)
            self._run(hooks)
        if bits & (lib.HAST_SEQ_REMOTE_FAILED | lib.HAST_SEQ_MAP_FAILED):
            self.lose("the secondary could not do a request" if bits & lib.HAST_SEQ_REMOTE_FAILED else "map failed")

    def _run(self, hooks: peering.Hooks) -> None:
        for hook in hooks:
            self.owner.hook(hook)

    def lose(self, why: str) -> None:
        """The connection is lost, or not to be trusted any more."""
        if not self._up or self._lost.is_set():
            return
        log.warning("%s: connection to %s lost: %s", self.owner.resource.name, self.address, why)
        self._lost.set()

    async def _take_down(self, lasted: float = 0.0) -> None:
        """End the connection's stages, then tell the sequencer: nothing comes from the secondary any more."""
        await self.owner.pipeline.kill(SEND, RECV)
        self.owner.pipeline.send(GGATE, {"cmd": "disconnect"})
        self._down(lasted)

    def _down(self, lasted: float = 0.0) -> None:
        self._up = False
        self.peering, hooks = peering.lost(self.peering, lasted)
        self._run(hooks)

    # ---- end ----

    async def stop(self) -> None:
        """Give the connection up; the pipeline goes on without it."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        if self._up:
            await self._take_down()

    async def pause(self) -> None:
        """Stop keeping the connection; the pipeline is being taken down."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None
        self._down()

    def resume(self) -> None:
        """Make a connection and keep it, as soon as it can be had: the pipeline runs, without one."""
        self._lost.clear()
        self._start_keeper()


@contextlib.contextmanager
def _memory(data: bytes) -> Any:
    """A descriptor of memory that holds data: an activemap is larger than a message may be."""
    fd = os.memfd_create("hast map", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)
