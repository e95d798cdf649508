"""What a primary knows of its secondary, and what follows from each event (docs/protocol.md sections 3 and 6).

Invariants:
- Pure: a state and an event go in, a state, metadata to be stored and hooks to be run come out. Nothing is sent, stored
  or waited for here; what is returned to be stored must be durable before anything else is done.
- Hooks come in pairs: each `connect` is followed by one `disconnect`, each `syncstart` by one `syncdone` or
  `syncintr`, and a synchronisation lies within a connection.
- The counters say "in sync" (localcnt equal to the secondary's remotecnt, not `alone`) only after the sequencer has
  said that both nodes have the same data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from hast import decision
from hast.handshake import Agreement
from hast.messages import FIRST_VERSION, SyncSource
from hast.metadata import Metadata, Pair

SHORTEST_PAUSE = 0.5  # seconds between attempts
LONGEST_PAUSE = 5.0
SETTLED_SECONDS = 10.0  # a connection that has lasted so long does not count as flapping
MEMSYNC_VERSION = 2  # the first one with memsync

Hooks = tuple[str, ...]


class Phase(Enum):
    """How far a connection is."""

    DOWN = auto()
    JOINING = auto()  # the handshake is done, the peer's map is being made durable
    CONNECTED = auto()  # requests go to the secondary, nothing is known to differ
    SYNCING = auto()  # and what differs is being copied


@dataclass(frozen=True)
class Peering:
    """virgin: nothing was ever written, since this process made the resuid. peer: the pair that the secondary told
    last, None before it was met. version: of the protocol, in force or last in force. pause: seconds before the next
    attempt."""

    virgin: bool = False
    peer: Pair | None = None
    version: int = FIRST_VERSION
    phase: Phase = Phase.DOWN
    pause: float = SHORTEST_PAUSE

    @property
    def connected(self) -> bool:
        return self.phase in (Phase.CONNECTED, Phase.SYNCING)

    def mode(self, replication: str) -> str:
        """The replication that is possible with this peer: memsync became known in version 2."""
        return "fullsync" if replication == "memsync" and self.version < MEMSYNC_VERSION else replication


def agreed(peering: Peering, agreement: Agreement) -> tuple[Peering, Metadata]:
    """A handshake is done; the metadata has to be durable before the peer's map is merged."""
    metadata = agreement.metadata
    from_remote = agreement.syncsrc is SyncSource.SECONDARY
    alone = metadata.pair.localcnt != agreement.secondary.remotecnt
    joining = replace(peering, peer=agreement.secondary, version=agreement.version, phase=Phase.JOINING)
    return joining, replace(metadata, alone=alone, syncing=from_remote or metadata.syncing)


def joined(peering: Peering, to_sync: int) -> tuple[Peering, Hooks]:
    """The merged map is durable, requests go to the secondary; to_sync: extents that are to be copied."""
    if peering.phase is not Phase.JOINING:
        return peering, ()
    phase = Phase.SYNCING if to_sync else Phase.CONNECTED
    hooks = ("connect", "syncstart") if to_sync else ("connect",)
    return replace(peering, phase=phase, virgin=False), hooks


def in_sync(peering: Peering, metadata: Metadata) -> tuple[Peering, Metadata, Hooks]:
    """Both nodes have the same data, durable. Does not count for a connection that is lost already."""
    if not peering.connected or peering.peer is None:
        return peering, metadata, ()
    pair = decision.after_sync(peering.peer)
    hooks = ("syncdone",) if peering.phase is Phase.SYNCING else ()
    peering = replace(peering, phase=Phase.CONNECTED, peer=Pair(pair.remotecnt, pair.localcnt))
    return peering, replace(metadata, pair=pair, alone=False, syncing=False), hooks


def lost(peering: Peering, lasted: float = 0.0) -> tuple[Peering, Hooks]:
    """The connection is gone, after so many seconds: one that keeps being lost is made anew at growing intervals."""
    if peering.phase is Phase.DOWN:
        return peering, ()
    hooks: Hooks = ("disconnect",) if peering.connected else ()
    if peering.phase is Phase.SYNCING:
        hooks = ("disconnect", "syncintr")
    pause = SHORTEST_PAUSE if lasted > SETTLED_SECONDS else min(peering.pause * 2, LONGEST_PAUSE)
    return replace(peering, phase=Phase.DOWN, pause=pause), hooks


def failed(peering: Peering) -> Peering:
    """An attempt to connect has failed."""
    return replace(peering, pause=min(peering.pause * 2, LONGEST_PAUSE))


def wrote_alone(peering: Peering | None, metadata: Metadata) -> Metadata:
    """The first write without the secondary: what has to be durable before it is acknowledged (invariant 7).

    peering: None for a resource without a peer."""
    peer = peering.peer if peering is not None else None
    pair = decision.before_degraded_write(metadata.pair, peer.remotecnt if peer is not None else None)
    return replace(metadata, pair=pair, alone=True)
