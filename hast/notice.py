"""Notices: what a primary tells its secondary beside the connection, over a short one of its own, when both are ours
(docs/protocol.md section 3).

Invariants:
- A notice is heeded only with the token of the session in force: whatever was meant for an earlier one is refused.
- What it says is durable on the secondary before it is answered; a second time it does no harm.
- Nothing is read, written or stored here: messages and metadata in, messages and metadata out.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, replace

from hast import decision
from hast.activemap import all_dirty
from hast.errors import DataError
from hast.messages import PROTOCOL_VERSION, TOKEN_MISMATCH, Refusal, handshake_token, pack_message
from hast.metadata import Metadata, Pair
from hast.nv import Nv, printable

SYNCED = "synced"  # both nodes have the same data, and the primary's counters say so
AHEAD = "ahead"  # the primary's component is out of date, and cannot be made to say so
MAX_WORD = 64  # characters of a notice that are shown


@dataclass(frozen=True)
class Notice:
    """The first and only message of its connection: what the secondary is told, with the token of the session."""

    resource: str
    token: bytes
    word: str

    def to_nv(self) -> Nv:
        nv = Nv()
        nv.add_string("resource", self.resource)
        nv.add_uint8_array("token", self.token)
        nv.add_string("notice", self.word)
        return nv

    @classmethod
    def from_nv(cls, nv: Nv) -> Notice:
        """Raises DataError."""
        return cls(nv.get_string("resource"), handshake_token(nv), nv.get_string("notice"))


@dataclass(frozen=True)
class Heeded:
    """What a secondary does with a notice, in this order: map, when not None, is written over the whole on-disk map and
    made durable; then metadata is; then message is sent."""

    metadata: Metadata
    map: bytes | None
    message: bytes


def heed(notice: Notice, session: bytes, metadata: Metadata) -> Heeded:
    """session: the token of the connection in force, empty without one. Raises DataError for what is to be refused."""
    if not session or not hmac.compare_digest(notice.token, session):
        raise DataError(TOKEN_MISMATCH)
    if notice.word == SYNCED:
        return Heeded(replace(metadata, syncing=False, unsaid=False), None, _accepted(None))
    if notice.word == AHEAD:
        # Where the primary's data is old nobody knows any more, so all of it is: the map says that at the next contact.
        ahead = replace(metadata, pair=decision.ahead(metadata.pair), syncing=False, unsaid=False)
        return Heeded(ahead, bytes(all_dirty(metadata.mapsize)), _accepted(ahead.pair))
    raise DataError(f"Unknown notice {printable(notice.word[:MAX_WORD])!r}.")


def _accepted(pair: Pair | None) -> bytes:
    nv = Nv()
    if pair is not None:
        nv.add_uint64("localcnt", pair.localcnt)
        nv.add_uint64("remotecnt", pair.remotecnt)
    return pack_message(PROTOCOL_VERSION, nv)


def parse_reply(nv: Nv) -> Pair | Refusal | None:
    """What the secondary answered: its pair where that has changed, or None, or that it refuses. Raises DataError."""
    if "errmsg" in nv:
        return Refusal.from_nv(nv)
    if "localcnt" in nv:
        return Pair(nv.get_uint64("localcnt"), nv.get_uint64("remotecnt"))
    return None
