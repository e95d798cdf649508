"""What a primary tells its secondary beside the connection: notices (docs/protocol.md section 6).

Invariants:
- A notice is about the connection that was in force when it was sent, and has its token: the secondary heeds no other.
- Where nobody knows whether the secondary has stored that it is ahead, the connection ends: the next handshake says it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hast import peering
from hast.connect import Route, tell
from hast.errors import HastError, TemporaryError
from hast.handshake import RefusedError
from hast.notice import AHEAD, SYNCED

if TYPE_CHECKING:
    from hast.link import Link

log = logging.getLogger(__name__)

LAST_SECONDS = 1.0  # for the secondary to hear that both are in sync, before a primary ends


@dataclass(frozen=True)
class Session:
    """What is known of the connection in force: how the secondary is reached, and that it takes notices."""

    route: Route
    token: bytes
    hast: bool


class Telling:
    """The notices of a link."""

    def __init__(self, link: Link) -> None:
        self.session: Session | None = None  # of the connection in force
        self._link = link
        self._teller: asyncio.Task[None] | None = None  # says that the synchronisation is complete
        self._told = asyncio.Event()  # it has been heard, in the connection in force

    def begin(self, session: Session) -> None:
        """There is a connection."""
        self.session = session
        self._told.clear()

    def end(self) -> None:
        """It is gone."""
        self.session = None
        if self._teller is not None:
            self._teller.cancel()
            self._teller = None

    async def notify(self, word: str) -> None:
        """Give the secondary a notice, within `timeout` seconds: it has stored what follows from it when this returns.

        Raises HastError: it has not, or nobody knows whether it has. In the latter case "ahead" ends the connection:
        the next handshake says what the secondary's counters are. Also when it has, and that connection is gone then:
        without it this node may have gone its own way, and the next handshake has said, or says, what is true.
        """
        link, session, resource = self._link, self.session, self._link.owner.resource
        if session is None or not session.hast:
            raise TemporaryError(f"{resource.name}: no secondary that takes notices is connected")
        if word == AHEAD and not peering.may_say_ahead(link.peering, link.owner.metadata()):
            raise TemporaryError(f"{resource.name}: the secondary is not up to date itself")
        try:
            pair = await tell(resource, session.route, session.token, word)
        except RefusedError:
            raise
        except BaseException:
            if word == AHEAD and self.session is session:
                link.lose("nobody knows what it has stored")
            raise
        if word == AHEAD and self.session is not session:
            raise TemporaryError(f"{resource.name}: the connection was lost while the secondary was asked")
        if pair is not None and self.session is session:
            link.peering = peering.said_ahead(link.peering, pair)

    def synced(self) -> None:
        """So that the secondary may become primary (invariant 10)."""
        session = self.session
        if session is not None and session.hast and self._link.peering.connected and self._teller is None:
            self._teller = asyncio.get_running_loop().create_task(self._keep_telling())

    async def _keep_telling(self) -> None:
        """Until it has heard it, or the connection is lost: the next one finds both in sync, and says it again."""
        pause, said = peering.SHORTEST_PAUSE, False
        while True:
            try:
                await self.notify(SYNCED)
                self._told.set()
                return
            except HastError as error:
                if not said:
                    log.warning("%s; trying again", error)
                said = True
            await asyncio.sleep(pause)
            pause = min(pause * 2, peering.LONGEST_PAUSE)

    async def settle(self) -> None:
        """Before an end that was asked for: a secondary that has everything, or lacked nothing when it joined, is to
        know it, so that it may become primary. Waits LAST_SECONDS at most."""
        session = self.session
        if session is None or not session.hast or self._link.peering.phase is not peering.Phase.CONNECTED:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._told.wait(), LAST_SECONDS)
