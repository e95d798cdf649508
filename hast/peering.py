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

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from hast import decision
from hast.errors import UnavailableError
from hast.handshake import Agreement
from hast.messages import FIRST_VERSION, SyncSource
from hast.metadata import Metadata, Pair

SHORTEST_PAUSE = 0.5  # seconds between attempts
LONGEST_PAUSE = 5.0
SETTLED_SECONDS = 10.0  # a connection that has lasted so long does not count as flapping
MEMSYNC_VERSION = 2  # the first one with memsync

Hooks = tuple[str, ...]


class OutdatedError(UnavailableError):
    """Nobody has all of the data."""

    def __init__(self, resource: str) -> None:
        super().__init__(
            f"{resource}: this node's component is out of date, and the other node is new or older still, so it is not"
            f" synchronised: make the node primary that has the data, or, to go on with what is here,"
            f" 'hastctl role -f primary {resource}'"
        )


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
    attempt. blank: while this node's component was out of date, the secondary was one that was never used."""

    virgin: bool = False
    blank: bool = False
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


def met(peering: Peering, agreement: Agreement) -> Peering:
    """A handshake is done. A secondary that was never used says so only once, has taken this node's counters over by
    then, and looks like one in sync at the next contact. One of ours does not do that to a primary that is out of date
    (`outdated` in the handshake). So this node remembers it, until it has another one or is not out of date itself."""
    known = peering.blank or agreement.metadata.blank or agreement.virgin
    return replace(peering, blank=agreement.metadata.syncing and known)


def agreed(peering: Peering, agreement: Agreement, keepmap: bool = False) -> tuple[Peering, Metadata]:
    """A handshake is done; the metadata has to be durable before the peer's map is merged. Whether the secondary is the
    source of the synchronisation is its `syncing`. Until that map is merged, durably, only `unmapped` says what is old.
    keepmap: the secondary's map stays the one that says it.

    Raises OutdatedError: this node's component is out of date, and the other one has not what it lacks."""
    metadata = agreement.metadata
    from_remote = agreement.syncsrc is SyncSource.SECONDARY
    unfit = peering.blank or metadata.pair != decision.after_sync(agreement.secondary)
    if metadata.syncing and not from_remote and unfit:
        raise OutdatedError(metadata.resource)
    alone = metadata.pair.localcnt != agreement.secondary.remotecnt
    joining = replace(peering, peer=agreement.secondary, version=agreement.version, phase=Phase.JOINING, blank=False)
    news = not metadata.syncing or (not keepmap and any(agreement.map or b""))
    unmapped = metadata.unmapped or (from_remote and news)
    syncing = from_remote or metadata.syncing
    # Also where the version before this one has stored that it is out of date.
    unsaid = metadata.unsaid or (syncing and agreement.secondary.localcnt <= metadata.pair.remotecnt)
    return joining, replace(metadata, alone=alone, syncing=syncing, unmapped=unmapped, blank=False, unsaid=unsaid)


def unused(metadata: Metadata, was_syncing: bool) -> Metadata:
    """The handshake's agreement was not put to use: nothing of this node's data was given up for the secondary's.
    Writes that are under way here are acknowledged without it, and the next handshake finds a split-brain."""
    return replace(metadata, syncing=was_syncing, unmapped=was_syncing and metadata.unmapped)


def only_raised(metadata: Metadata, attempts: Iterable[Metadata]) -> bool:
    """Whether nothing but metadata, or the same with localcnt raised, or with `syncing`, can be on a disk that has
    failed to store attempts. Such a disk says at worst that its node has written alone, which has its map believed, or
    that it is out of date, as the secondary had everything: with nothing else to be stored, that may be used."""
    return all(
        replace(
            attempt,
            pair=metadata.pair,
            alone=metadata.alone,
            syncing=metadata.syncing,
            unmapped=metadata.unmapped,
            blank=metadata.blank,
            unsaid=metadata.unsaid,
        )
        == metadata
        and (attempt.syncing == metadata.syncing or (attempt.syncing and attempt.pair == metadata.pair))
        and attempt.pair.remotecnt == metadata.pair.remotecnt
        and attempt.pair.localcnt >= metadata.pair.localcnt
        for attempt in attempts
    )


def found_newer(agreement: Agreement, attempts: Iterable[Metadata]) -> bool:
    """Whether the secondary's counters tell by themselves that this node's component is out of date, or that both nodes
    have something of their own, whichever of attempts is on a disk that has failed to store them: then that need not be
    stored here, if the secondary is one of ours, and keeps a map that says so of everything."""
    theirs = agreement.secondary
    newer = agreement.hast and agreement.syncsrc is SyncSource.SECONDARY
    return newer and all(
        theirs.localcnt > attempt.pair.remotecnt and theirs.remotecnt <= attempt.pair.localcnt for attempt in attempts
    )


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
    return peering, replace(metadata, pair=pair, alone=False, syncing=False, unmapped=False, unsaid=False), hooks


def outdated(peering: Peering) -> tuple[Peering, Hooks]:
    """The local component has failed, the secondary has everything: from now on it is the source."""
    if peering.phase is not Phase.CONNECTED:
        return peering, ()
    return replace(peering, phase=Phase.SYNCING), ("syncstart",)


def may_say_ahead(peering: Peering, metadata: Metadata) -> bool:
    """Whether the secondary may be told that this node's component is out of date, in other words that its own is
    whole: not while it lacks what only this one has, or has counters that only this one knows. While this node gets its
    data from there it is whole, and its counters say that it is ahead, before and after."""
    if not peering.connected or peering.peer is None:
        return False
    return metadata.syncing or metadata.pair == decision.after_sync(peering.peer)


def said_ahead(peering: Peering, pair: Pair) -> Peering:
    """The secondary has stored that it is ahead, with this pair: it is what "in sync" is to be equal to from now on."""
    return replace(peering, peer=pair)


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
