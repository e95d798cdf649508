"""A primary without its secondary: when it may acknowledge alone, and how long it waits for the other node.

Invariants:
- 7 degraded first: nothing is acknowledged without the secondary before localcnt is raised, durably. Where the disk
  does not take that, whoever waits is told after `timeout`.
- Nothing is counted as written alone by a component that is out of date, nor while a secondary is in use that was told
  that it lacks nothing.
- What an out-of-date component cannot do without the other node waits for it, and for `timeout` at most: a connection
  that was of no use to those who wait does not begin that anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from hast import peering
from hast.config import Resource
from hast.errors import HastError
from hast.link import Link
from hast.metadata import Metadata
from hast.pipeline import Pipeline
from hast.stages.context import GGATE

log = logging.getLogger(__name__)

GRANT_SECONDS = 0.5  # between attempts to store that this node writes alone
SETTLE_SECONDS = 3.0  # for what was written before a connection to be copied to the secondary, which lacks it
LOOK_SECONDS = 0.02  # between two looks whether it has been, when the role ends


class Owner(Protocol):
    """What is needed of a hast.primary.Primary."""

    resource: Resource
    metadata: Metadata | None
    pipeline: Pipeline | None
    link: Link | None

    def _store(self, metadata: Metadata) -> None: ...
    def _remember(self) -> None: ...


class Alone:
    """Answers the sequencer when it asks to go on without the secondary, and ends the waiting for it."""

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.retry: asyncio.TimerHandle | None = None  # until the next attempt to raise localcnt
        self.owed: tuple[int, float] | None = None  # what go_degraded() is to do when the secondary is lost
        self.patience: asyncio.TimerHandle | None = None  # for the secondary, while the component is out of date
        self.impatient = False  # it has run out
        self.ending = False  # the role does: nobody is to wait for the disk or the other node any more

    def lonely(self, failing: bool = False) -> None:
        """There is no secondary now: what an out-of-date component cannot do without it waits, but not for ever; what
        waited for the secondary to have it is done without. failing: it was there, and did not do what it was asked.
        Such a connection is no reason to begin the waiting anew, nor is one that has done nothing for those who waited:
        there may be one after the other."""
        owner = self.owner
        if self.owed is not None:
            number, until = self.owed
            self.end_retry()
            self.go_degraded(number, until)
        assert owner.metadata is not None
        in_vain = failing or not self._of_use()
        if self.patience is not None and not (owner.metadata.syncing and in_vain):
            self.patience.cancel()
            self.patience, self.impatient = None, False
        if owner.metadata.syncing and self.patience is None:
            seconds = owner.resource.timeout if owner.link is not None or owner.resource.remote is not None else 0
            self.patience = asyncio.get_running_loop().call_later(seconds, self._give_up)
        elif self.impatient:
            self._give_up()

    def _of_use(self) -> bool:
        """Whether the last connection has answered anybody, or nobody had waited for it."""
        arena = self.owner.pipeline.arena if self.owner.pipeline is not None else None
        return arena is None or arena.seq.served > 0 or not arena.seq.awaited

    def _give_up(self) -> None:
        """While there is a connection the sequencer does not hear of it: it is said again at its end."""
        assert self.owner.pipeline is not None
        self.impatient = True
        self.owner.pipeline.send(GGATE, {"cmd": "give_up"})

    def go_degraded(self, number: int, until: float = 0.0) -> None:
        """The first write without the secondary waits for this: raise localcnt, store it, let go (invariant 7). Where
        the disk does not take it, whoever waits goes on waiting, for the disk or the secondary, and is told after
        `timeout`. number: of the question; until: when it is given up, in the loop's time."""
        owner = self.owner
        assert owner.metadata is not None and owner.pipeline is not None
        loop, link = asyncio.get_running_loop(), owner.link
        if owner.metadata.syncing:
            # Nothing is acknowledged without the secondary now: it was asked before that was known, and is void. Not if
            # it was a handshake that has said so, and its connection is not used because of those who wait.
            self.owed = (number, until) if link is not None and link.in_use else None
            if self.ending:
                self._refuse()
            return
        if link is not None:
            link.apart()
        alone = peering.wrote_alone(link.peering if link is not None else None, owner.metadata)
        if link is not None and link.in_use and alone != owner.metadata:
            # Begun before the connection, or failed there: the secondary lacks it, and was told that it lacks nothing.
            # It has it soon, or is left, and learns from the next handshake that it is a target (invariant 10).
            if self.ending:
                self._refuse()
                return
            self.owed = number, until
            wait = max(SETTLE_SECONDS, until - loop.time())
            self.retry = loop.call_later(wait, link.lose, "what was written before it waits for too long")
            return
        try:
            owner._store(alone)
        except HastError as error:
            if until == 0.0:
                log.error("%s; writes wait for it, or for the other node", error)
                until = loop.time() + owner.resource.timeout
            if loop.time() < until and not self.ending:
                self.retry = loop.call_later(GRANT_SECONDS, self.go_degraded, number, until)
            else:
                self._refuse()
            return
        owner._remember()
        owner.pipeline.send(GGATE, {"cmd": "grant", "number": number})

    def _refuse(self) -> None:
        assert self.owner.pipeline is not None
        self.owner.pipeline.send(GGATE, {"cmd": "refuse_grant"})

    async def end(self) -> None:
        """The role ends. Who waits for the secondary, or for the disk, gets an error, if need be once the secondary has
        had time for what it lacks; who has only just asked, and has nothing to wait for, is answered."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLE_SECONDS
        while self._awaited() and loop.time() < until:
            await asyncio.sleep(LOOK_SECONDS)
        waited = self.retry is not None or self.owed is not None
        self.ending = True
        self.end_retry()
        if self.owner.pipeline is not None:
            self.owner.pipeline.send(GGATE, {"cmd": "give_up"})
            if waited:
                self._refuse()

    def _awaited(self) -> bool:
        """Whether somebody is under way who may have to wait for what is being copied to the secondary."""
        owner = self.owner
        arena = owner.pipeline.arena if owner.pipeline is not None else None
        if arena is None or owner.link is None or not owner.link.in_use or owner.metadata is None:
            return False
        seq = arena.seq
        return bool(seq.sync_on and not seq.peer_whole and seq.inuse > seq.sync_chunks and not owner.metadata.syncing)

    def end_retry(self) -> None:
        """What was asked for is answered, or void."""
        self.owed = None
        if self.retry is not None:
            self.retry.cancel()
            self.retry = None

    def end_patience(self) -> None:
        """The worker ends: nobody has to be told any more."""
        if self.patience is not None:
            self.patience.cancel()
