"""A primary's connection to its secondary: made, kept, made again (docs/protocol.md sections 3 and 6).

Invariants:
- One thing at a time: an old connection is closed, and the sequencer knows it, before the next attempt begins.
- What a handshake demands to be stored is durable before the sequencer may use the connection (where it demands nothing
  new, a disk that takes no metadata is no reason to leave the secondary, see peering.only_raised()); the peer's map is
  merged and durable before the first request (the sequencer's part).
- Counters are set to "in sync" only when the sequencer says that both nodes have the same data, durable.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any

from hast import peering
from hast.config import Resource
from hast.connect import Established, connect, connect_patiently
from hast.errors import DiskError, HastError, TemporaryError
from hast.ffi import _hast
from hast.handshake import Agreement, RefusedError
from hast.messages import MISMATCH_ADVICE, SPLIT_BRAIN_ADVICE, SyncSource
from hast.metadata import Metadata
from hast.peering import Peering
from hast.pipeline import Pipeline
from hast.stages.context import GGATE
from hast.telling import Session, Telling

log = logging.getLogger(__name__)
lib = _hast.lib

STORE_SECONDS = 1.0  # between attempts to store that both nodes are in sync
PART_SECONDS = 30.0  # for the ggate stage to take note of a connection's end
FIRST_SECONDS = 1.0  # for the first attempt, before the primary starts alone; longer while the peer says `wait`
AGAIN_SECONDS = 0.5  # the same, after a stage of ours has died
MODES = {
    "fullsync": lib.HAST_MODE_FULLSYNC,
    "memsync": lib.HAST_MODE_MEMSYNC,
    "async": lib.HAST_MODE_ASYNC,
}


class EndedError(HastError):
    """The worker was told to end while it waited for the other node: nothing has gone wrong."""

    def __init__(self, resource: str) -> None:
        super().__init__(f"{resource}: told to end before it served")


class TakenOverError(HastError):
    """While hastd was gone the other node became primary: what this one served must not be served any more."""

    exit_code = os.EX_UNAVAILABLE

    def __init__(self, resource: str, what: str) -> None:
        super().__init__(f"{resource}: not going on as primary: while hastd was gone the other node took over: {what}")


@dataclass
class Owner:
    """What the link needs of its primary: metadata() and store() for the metadata block, only_raised() what is known of
    it after a failure (hast/peering.py), hook() to run one, fail() when the resource can be served no longer, lonely()
    when the secondary is lost, keepmap() whether this node cannot store the secondary's map, superseded() when a newer
    secondary is to do everything, if that may be, and the pipeline."""

    resource: Resource
    pipeline: Pipeline
    metadata: Callable[[], Metadata]
    store: Callable[[Metadata], None]
    only_raised: Callable[[], bool]
    hook: Callable[..., None]
    fail: Callable[[HastError], None]
    lonely: Callable[[bool], None]
    keepmap: Callable[[], bool]
    superseded: Callable[[Agreement, Metadata], bool]


class Link:
    """The connection and who makes it. What follows from what is in hast/peering.py, here it is carried out."""

    def __init__(self, owner: Owner, virgin: bool) -> None:
        self.owner = owner
        self.peering = Peering(virgin=virgin)
        self.address = str(owner.resource.remote)
        self._up = False  # the ggate stage was given a connection
        self._partings = 0  # disconnects that the sequencer was told and has not answered
        self._parted = asyncio.Event()
        self._lost = asyncio.Event()
        self._was_syncing = False  # before the handshake in force
        self._said: set[str] = set()  # why there is no connection, since there was one
        self._keeper: asyncio.Task[None] | None = None
        self.telling = Telling(self)
        self._agreement: Agreement | None = None  # of the connection in force
        self._unstored: asyncio.TimerHandle | None = None  # "in sync" is to be stored
        self._failing = False  # the last connection was lost by what the secondary did, or did not do

    # ---- making it ----

    async def start(self, stop: asyncio.Event, resume: bool = False) -> None:
        """The first attempt, before clients are served; then the connection is kept. resume: hastd was gone for a
        moment; then TakenOverError is raised if the other node is primary. stop: set when the worker is to end, which
        does not wait for another node then; EndedError is raised.

        Nobody waits for it where it is known that this node writes alone: no counter has to be raised for that."""
        alone = self.owner.metadata().alone and not resume
        if not alone:
            await self._unless(stop, self._first(resume))
        self._start_keeper(0.0 if alone else self.peering.pause)

    def _start_keeper(self, pause: float) -> None:
        self._keeper = asyncio.get_running_loop().create_task(self._keep(pause))
        self._keeper.add_done_callback(self._keeper_ended)

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """It runs until it is cancelled; anything else is a mistake of ours, which a new worker may not meet again."""
        if not keeper.cancelled() and (error := keeper.exception()) is not None:
            log.error("%s: connecting", self.owner.resource.name, exc_info=error)
            self.owner.fail(TemporaryError(f"{self.owner.resource.name}: unexpected error: {error!r}"))

    async def _unless(self, stop: asyncio.Event, attempt: Coroutine[Any, Any, None]) -> None:
        """The attempt, to its end or until `stop` is set: then it is given up, and EndedError raised."""
        loop = asyncio.get_running_loop()
        attempting = loop.create_task(attempt)
        tasks: list[asyncio.Task[Any]] = [attempting, loop.create_task(stop.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not attempting.done():
                raise EndedError(self.owner.resource.name)
            attempting.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first(self, resume: bool) -> None:
        try:
            async with asyncio.timeout(FIRST_SECONDS):
                made = await self._connect()
            if resume:
                self._check_same_history(made)
            self._establish(made)
        except TakenOverError:
            raise
        except TimeoutError:
            log.info("%s: %s does not answer, starting without it", self.owner.resource.name, self.address)
        except RefusedError as error:
            if error.wait and resume:
                raise TakenOverError(self.owner.resource.name, f"{self.address} is primary") from None
            if not error.wait:
                self._complain(error)
                return
            log.info("%s: %s is still primary, waiting for it", self.owner.resource.name, self.address)
            try:
                metadata = self.owner.metadata()
                patient = connect_patiently(
                    self.owner.resource, metadata, virgin=self.peering.virgin, keepmap=self.owner.keepmap()
                )
                self._establish(await self._checked(patient, metadata))
            except HastError as late:
                self._complain(late)
        except HastError as error:
            self._complain(error)

    def _check_same_history(self, made: Established) -> None:
        """Whoever uses the device has seen what this node had. Raises TakenOverError when the other one has more."""
        if made.agreement.syncsrc is SyncSource.SECONDARY and not self.owner.metadata().syncing:
            made.close()
            raise TakenOverError(self.owner.resource.name, f"{self.address} was primary, and has newer data")

    async def _connect(self) -> Established:
        metadata = self.owner.metadata()
        known = self.peering
        keepmap = self.owner.keepmap()
        attempt = connect(self.owner.resource, metadata, version=known.version, virgin=known.virgin, keepmap=keepmap)
        return await self._checked(attempt, metadata)

    async def _checked(self, attempt: Coroutine[Any, Any, Established], metadata: Metadata) -> Established:
        """The attempt's result. Raises TemporaryError when the counters have changed meanwhile: what was agreed on is
        not true any more (a first write without the secondary, invariant 7)."""
        made = await attempt
        if self.owner.metadata() != metadata:
            made.close()
            raise TemporaryError(f"{self.owner.resource.name}: counters changed during the handshake, trying again")
        return made

    async def _keep(self, pause: float) -> None:
        """For as long as the resource is primary: wait until the connection is lost, make it anew. pause: in seconds,
        before the first attempt."""
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            if self._up:
                await self._lost.wait()
                await self._take_down(loop.time() - began)
                pause = self.peering.pause
            await asyncio.sleep(pause)
            try:
                self._establish(await self._connect())
            except HastError as error:
                self._complain(error)
                self.peering = peering.failed(self.peering)
                pause = self.peering.pause

    def _complain(self, error: HastError) -> None:
        """Say why there is no connection, once for each reason."""
        if str(error) in self._said:
            return
        self._said.add(str(error))
        if isinstance(error, RefusedError) and error.split_brain:
            log.error(SPLIT_BRAIN_ADVICE, *[self.owner.resource.name] * 2)
            self.owner.hook("split-brain")
        elif isinstance(error, RefusedError) and error.mismatch:
            log.error(MISMATCH_ADVICE, *[self.owner.resource.name] * 2)
        elif isinstance(error, RefusedError) and error.outdated:
            log.error("%s", peering.OutdatedError(self.owner.resource.name))
        log.warning("%s", error)

    def _establish(self, made: Established) -> None:
        """Give a connection whose handshake is done to the ggate stage. Nothing is waited for since the counters were
        compared: the other node has decided by what is true."""
        resource, agreement, before = self.owner.resource, made.agreement, self.owner.metadata()
        metadata, stored = before, False
        try:
            self._was_syncing = before.syncing
            self.peering = peering.met(self.peering, agreement)
            self._remember_blank()
            self.peering, metadata = peering.agreed(self.peering, agreement, self.owner.keepmap())
            self._store(metadata, agreement)
            stored = True
            message = {
                "cmd": "connect",
                "mode": MODES[self.peering.mode(resource.replication)],
                "from_remote": metadata.syncing,
                "conn": self._settings() | {"foreign": not agreement.hast},
            }
            self._lost.clear()
            self._failing = False
            with _memory(resource.name, agreement.map or b"") as map_fd:
                fds = (map_fd, made.incoming.fileno(), made.out.fileno())
                self.owner.pipeline.send(GGATE, message, fds)
            self._up = True
        except BaseException:
            if stored or metadata.syncing != before.syncing:  # else the next attempt to store anything mends it
                self._unused()
            self.peering, _ = peering.lost(self.peering)  # it had not been told to anybody
            raise
        finally:
            made.close()
        self._said.clear()
        self.telling.begin(Session(made.route, agreement.token, agreement.hast))
        self._agreement = agreement

    def _remember_blank(self) -> None:
        """For the next worker; a disk that does not take it has this one know it all the same."""
        metadata = self.owner.metadata()
        if self.peering.blank and not metadata.blank:
            try:
                self.owner.store(replace(metadata, blank=True))
            except HastError as error:
                self._complain(error)

    def _store(self, metadata: Metadata, agreement: Agreement) -> None:
        """What was agreed on is durable, or there was nothing new, on a disk that does not even take that again: the
        secondary is all the more wanted then. So it is where it is newer, and only the disk does not take that: then it
        is to do everything, from the next connection on, in which it keeps its map."""
        try:
            self.owner.store(metadata)
        except HastError as error:
            before = self.owner.metadata()
            if replace(metadata, unsaid=before.unsaid) == before and self.owner.only_raised():
                self._complain(error)
                return
            if isinstance(error, DiskError) and self.owner.superseded(agreement, metadata):
                self._was_syncing = True
            raise

    def _settings(self) -> dict[str, Any]:
        """Those of ConnSettings, but for the sockets."""
        resource = self.owner.resource
        return {
            "version": self.peering.version,
            "compression": resource.compression,
            "checksum": resource.checksum,
            "timeout": float(resource.timeout),
        }

    # ---- what the ggate stage says ----

    def sequencer(self, bits: int, to_sync: int, unjoined: bool = False) -> None:
        """Events of the sequencer; to_sync: extents that are to be copied; unjoined: it is the secondary's map, or what
        is marked beside it, that could not be written."""
        name = self.owner.resource.name
        if bits & lib.HAST_SEQ_CONNECTED and self._up:
            self.peering, hooks = peering.joined(self.peering, to_sync)
            log.info("%s: connected to %s, %d extents to synchronise", name, self.address, to_sync)
            self._mapped()
            self._run(hooks)
        if bits & lib.HAST_SEQ_SYNC_DONE:
            self._in_sync()
        if bits & lib.HAST_SEQ_REMOTE_FAILED:
            self.lose("the secondary could not do a request", failing=True)
        elif bits & lib.HAST_SEQ_MAP_FAILED and self.peering.phase is peering.Phase.JOINING:
            if unjoined:
                self._not_joined()
            self.lose("its map cannot be stored here")

    def _not_joined(self) -> None:
        """Where the secondary has the newer data, and keeps its map if it is asked to, it is to do everything from the
        next connection on. Else this node's data is needed as well: in sync, each may hold something that was begun
        and not acknowledged, and what clients have read here would change."""
        metadata = self.owner.metadata()
        if self._agreement is not None and metadata.syncing and self.owner.superseded(self._agreement, metadata):
            self._was_syncing = True

    def _mapped(self) -> None:
        """The map on disk says where the secondary's data is the newer. Where that cannot be stored, a primary that is
        started anew takes all of it for newer."""
        metadata = self.owner.metadata()
        if metadata.unmapped and not self.owner.keepmap():
            try:
                self.owner.store(replace(metadata, unmapped=False))
            except HastError as error:
                self._complain(error)

    def _in_sync(self) -> None:
        """Both nodes have the same data, durable: store it. Where the disk does not take it now, the counters go on
        saying what was true before, and it is tried again as long as nothing has come between."""
        self.apart()
        if not self.peering.connected:
            return  # that connection is gone; said of the next one it would not be true
        before = self.owner.metadata()
        state, metadata, hooks = peering.in_sync(self.peering, before)
        try:
            self.owner.store(metadata)
        except HastError as error:
            self._complain(error)
            self.in_sync_later()
            return
        self.peering = state
        if before.syncing and not metadata.syncing:
            self.owner.pipeline.send(GGATE, {"cmd": "current"})
        if "syncdone" in hooks:
            log.info("%s: synchronisation complete", self.owner.resource.name)
        self._run(hooks)
        self.telling.synced()

    def when_in_sync(self) -> Metadata:
        """What was to be stored when both nodes were, and could not be."""
        return peering.in_sync(self.peering, self.owner.metadata())[1]

    def caught_up(self) -> None:
        """It is stored now, if with the addition that the local component has failed since."""
        self.peering, _, hooks = peering.in_sync(self.peering, self.owner.metadata())
        self._run(hooks)
        self.telling.synced()

    def in_sync_later(self) -> None:
        """It could not be stored yet."""
        self._unstored = asyncio.get_running_loop().call_later(STORE_SECONDS, self._in_sync)

    def apart(self) -> bool:
        """The nodes are not in sync any more, or not for certain: not to be stored. Whether it was still to be."""
        waiting = self._unstored is not None
        if self._unstored is not None:
            self._unstored.cancel()
            self._unstored = None
        return waiting

    @property
    def connected(self) -> bool:
        """Requests go to the secondary, and nothing has come up against that."""
        return self._up and not self._lost.is_set() and self.peering.connected

    @property
    def session(self) -> Session | None:
        """The connection in force, for who has to know later whether it is the same."""
        return self.telling.session

    @property
    def in_use(self) -> bool:
        """The sequencer has been given a connection, and its end has not been carried out: what was agreed on with the
        secondary has to stay true."""
        return self.session is not None

    def outdated(self) -> None:
        """The secondary takes the place of the local component, which has failed."""
        self.peering, hooks = peering.outdated(self.peering)
        self._run(hooks)

    def _run(self, hooks: peering.Hooks) -> None:
        for hook in hooks:
            self.owner.hook(hook)

    def lose(self, why: str, *, unused: bool = False, failing: bool = False) -> None:
        """The connection is lost, or not to be trusted any more. unused: the sequencer has not begun to use it.
        failing: the secondary was there, and did not do what it was asked."""
        if not self._up:
            return
        if unused:  # also where it has been lost meanwhile, for another reason
            self._unused()
        if self._lost.is_set():
            return
        log.warning("%s: connection to %s lost: %s", self.owner.resource.name, self.address, why)
        self._failing = failing
        self._lost.set()

    def _unused(self) -> None:
        """What the handshake said of the own data has had no consequence: nothing was taken from the secondary."""
        metadata = peering.unused(self.owner.metadata(), self._was_syncing)
        if metadata == self.owner.metadata() and self.owner.only_raised():
            return
        try:
            self.owner.store(metadata)
        except HastError as error:  # what is on disk and what the sequencer does would not be the same
            self.owner.fail(error)

    async def _take_down(self, lasted: float = 0.0) -> None:
        """Close the connection, and have the sequencer know it: nothing comes from the secondary any more. Until it has
        answered, what it pushes is for this connection, and there must not be another one that takes it."""
        self._partings += 1
        self._parted.clear()
        self.owner.pipeline.send(GGATE, {"cmd": "disconnect"})
        try:
            async with asyncio.timeout(PART_SECONDS):
                await self._parted.wait()
        except TimeoutError:
            self.owner.fail(TemporaryError(f"{self.owner.resource.name}: its ggate stage does not answer"))
        self._down(lasted)

    def parted(self) -> None:
        """The sequencer knows that the connection is gone."""
        self._partings -= 1
        if self._partings == 0:
            self._parted.set()

    def stage_gone(self) -> None:
        """There is no ggate stage any more that could note an end; what its successor is given is for resume()."""
        self._parted.set()

    def _down(self, lasted: float = 0.0) -> None:
        self._up, self._agreement = False, None
        self.apart()
        self.telling.end()
        self.peering, hooks = peering.lost(self.peering, lasted)
        self._run(hooks)
        self.owner.lonely(self._failing)

    # ---- end ----

    async def stop(self) -> None:
        """Give the connection up; the pipeline goes on without it."""
        self._lost.set()  # should the local component fail now, the secondary cannot stand in for it
        await self._stop_keeping()
        if self._up:
            await self._take_down()

    async def _stop_keeping(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
            self._keeper = None

    async def pause(self) -> None:
        """Stop keeping the connection; the pipeline is being taken down."""
        await self._stop_keeping()
        self._down()

    async def resume(self, at_once: bool = False) -> None:
        """Make a connection and keep it, as soon as it can be had: the pipeline runs, without one. at_once: there was
        one a moment ago; this returns when it is made again, or after AGAIN_SECONDS.

        Who goes on without it at once counts as alone what the secondary would have had; and where all of this node is
        dying, a counter that is raised in its last moment makes a split-brain of that."""
        self._partings = 0  # a new ggate stage
        self._lost.clear()
        if at_once:
            try:
                async with asyncio.timeout(AGAIN_SECONDS):
                    self._establish(await self._connect())
            except TimeoutError:
                pass
            except HastError as error:
                self._complain(error)
        self._start_keeper(0.0)


@contextlib.contextmanager
def _memory(resource: str, data: bytes) -> Any:
    """A descriptor of memory that holds data: an activemap is larger than a message may be. Raises TemporaryError."""
    with contextlib.ExitStack() as stack:
        try:
            fd = os.memfd_create("hast map", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            written = os.write(fd, data)
        except OSError as error:
            raise TemporaryError(f"{resource}: no memory for the secondary's activemap: {error.strerror}") from error
        if written != len(data):  # what is left out would count as the same on both nodes
            raise TemporaryError(f"{resource}: no memory for more than {written} bytes of the secondary's activemap")
        yield fd
