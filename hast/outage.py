"""A primary whose own component has failed, while the secondary has everything: what is stored before the secondary
takes the component's place (hast/ffi/seq_local.c asks for it, docs/architecture.md says why).

Invariants:
- Nothing that only the secondary has is acknowledged before it is known durably that this component is out of date:
  in its own metadata, or, where that cannot be written, on the secondary, whose counters then say it.
- A component that is given up (detached) is out of date everywhere: all of its map says so, or the secondary's does,
  which then keeps it (`keepmap` in the handshake) until this node can.
- Where none of this can be stored, whoever made the request gets the component's error.
- What is given up stays given up for as long as the node is primary, also when its worker dies and the disk is gone
  altogether by then: a note in the run directory has what the next worker needs (hast/boot.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from hast import boot
from hast.component import AbsentComponent, Component, open_component
from hast.config import Resource
from hast.errors import DataError, HastError, TemporaryError
from hast.link import Link
from hast.metadata import Metadata
from hast.notice import AHEAD
from hast.pipeline import Pipeline
from hast.stages.context import GGATE
from hast.telling import Session

log = logging.getLogger(__name__)

FIRST_SECONDS = 1.0  # before a component that took nothing is tried again
LONGEST_SECONDS = 30.0
DETACHED = 2  # `syncing` of the status: out of date, and not used


class Owner(Protocol):
    """What is needed of a hast.primary.Primary."""

    resource: Resource
    rundir: Path
    component: Component | None
    metadata: Metadata | None
    pipeline: Pipeline | None
    link: Link | None

    def _store(self, metadata: Metadata) -> None: ...
    def _lonely(self, failing: bool = False) -> None: ...
    def _remember(self) -> None: ...
    def _end_retry(self) -> None: ...


class Outage:
    """Decides what becomes of a failed component; `detached` once it is not used any more, `unrecorded` when only the
    secondary knows that it is out of date."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.detached = False
        self.unrecorded = False
        self._asking: asyncio.Task[None] | None = None

    def failed(self, detach: bool) -> None:
        """The sequencer's question; the secondary had everything, durably, when it was asked. detach: the component is
        to be given up."""
        owner, link = self.owner, self.owner.link
        assert owner.component is not None and owner.metadata is not None
        name, path = owner.resource.name, owner.resource.localpath
        if link is None or not link.connected:
            self._tell("refused")
            return
        unstored = link.apart()
        # Counters by which this node's data is the newer would have it copied over what only the secondary has.
        metadata = link.when_in_sync() if unstored else owner.metadata
        try:
            if detach:
                owner.component.fill_map(owner.metadata)
            owner._store(replace(metadata, syncing=True, unsaid=True))
        except HastError as error:
            log.error("%s; asking the secondary to store that it is ahead", error)
            if self._asking is not None:  # of a connection that is gone: its answer is not for this question
                self._asking.cancel()
            self._asking = asyncio.get_running_loop().create_task(self._ask(link, link.session, unstored))
            return
        if detach:
            log.error("%s: component %s has failed and is given up: everything is done by the secondary", name, path)
        else:
            log.error("%s: component %s has failed: where it is out of date the secondary is read", name, path)
        if unstored:
            link.caught_up()
        link.outdated()
        self._done(detach)

    def _done(self, detach: bool) -> None:
        self.owner._end_retry()  # nothing is acknowledged without the secondary from now on: what was asked for is void
        self.detached = self.detached or detach
        if self.detached and self.owner.metadata is not None:
            boot.give_up(self.owner.rundir, self.owner.metadata)
        self._tell("detach" if detach else "outdated")

    async def _ask(self, link: Link, session: Session | None, unstored: bool) -> None:
        """The component does not even take its metadata. session: the connection that the sequencer's question is of.
        unstored: nor did it take that both nodes were in sync, before."""
        name, before = self.owner.resource.name, self.owner.metadata
        try:
            await link.telling.notify(AHEAD)
            if self.owner.metadata != before:
                link.lose("its counters changed while the secondary was asked")
                raise TemporaryError(f"{name}: counters changed while the secondary was asked")
        except HastError as error:
            log.error("%s: the failure of its component cannot be hidden: %s", name, error)
            if link.session is not session:
                return  # with the connection the question was void; there may be another one by now
            self._tell("refused")
            if unstored and link.connected:
                link.in_sync_later()
            return
        assert before is not None
        link.outdated()
        self._unrecorded(before)
        self.owner._lonely()  # it may have been lost meanwhile

    def superseded(self, metadata: Metadata) -> None:
        """The secondary has newer data, and its counters say so; this component does not even take that, or not where.
        metadata: what was to be stored, or is."""
        with contextlib.suppress(HastError):  # for who is started anew while the secondary cannot be reached
            self.owner._store(replace(metadata, syncing=True, unmapped=True))
        self._unrecorded(metadata)
        self.owner._lonely()

    def _unrecorded(self, metadata: Metadata) -> None:
        """Only the secondary knows that this component is out of date."""
        owner = self.owner
        name, path = owner.resource.name, owner.resource.localpath
        # Not on disk: whoever comes after this process reads it in the note, or in the secondary's counters.
        boot.outdate(owner.rundir, name, metadata.resuid)
        # The map here says where only when _record() has had its way.
        owner.metadata = replace(metadata, syncing=True, unmapped=True)
        self.unrecorded = True
        log.error("%s: component %s has failed and cannot be written: everything is done by the secondary", name, path)
        self._done(True)
        if self._asking is not None and self._asking is not asyncio.current_task():
            self._asking.cancel()  # it has nothing to say any more
        self._asking = asyncio.get_running_loop().create_task(self._record())

    async def _record(self) -> None:
        """A disk that was only full, or ill for a moment, is told as soon as it takes it."""
        owner, pause = self.owner, FIRST_SECONDS
        while True:
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_SECONDS)
            assert owner.component is not None and owner.metadata is not None
            arena = owner.pipeline.arena if owner.pipeline is not None else None
            if arena is not None and arena.seq.map_busy:
                continue  # an update that was under way when it was given up: it must not come down on top of this
            try:
                with self._component() as component:
                    component.fill_map(owner.metadata)
                    component.write_metadata(owner.metadata)
            except HastError as error:
                log.debug("%s", error)
                continue
            self.unrecorded = False
            owner._remember()
            name, path = owner.resource.name, owner.resource.localpath
            log.warning("%s: component %s takes writes again, and says now that it is out of date", name, path)
            return

    @contextlib.contextmanager
    def _component(self) -> Iterator[Component]:
        """The component, also where this process could not open it when it began. Raises HastError: it still cannot, or
        it is another one now."""
        owner = self.owner
        assert owner.component is not None and owner.metadata is not None
        if not isinstance(owner.component, AbsentComponent):
            yield owner.component
            return
        component = open_component(owner.resource.name, owner.resource.localpath, "off")
        try:
            if component.read_metadata().resuid != owner.metadata.resuid:
                raise DataError(f"{owner.resource.name}: component {component.path} is another one now")
            yield component
        finally:
            component.close()

    def _tell(self, decision: str) -> None:
        if self.owner.pipeline is not None:
            self.owner.pipeline.send(GGATE, {"cmd": decision})

    def go_on(self) -> None:
        """The process before this one has asked the secondary, and could not store it either; or it has stored that the
        component is out of date, and cannot mark where. The next one is to know that, too."""
        metadata = self.owner.metadata
        assert metadata is not None
        self.detached = self.unrecorded = True
        boot.outdate(self.owner.rundir, metadata.resource, metadata.resuid)
        boot.give_up(self.owner.rundir, metadata)
        self._asking = asyncio.get_running_loop().create_task(self._record())

    async def close(self) -> None:
        """Nothing is asked any more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.wait([self._asking])
