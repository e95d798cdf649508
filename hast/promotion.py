"""Which role a node's metadata allows it to take, and what taking one changes in it (TWO NODES in hastd(8)).

Invariants:
- Pure: metadata in, metadata out; what comes out is durable before anything is served.
- 10 no surprise promotion: a secondary that is the target of an unfinished synchronisation does not become primary
  unless that is forced, and then its counters say that it has gone its own way.
- 7 degraded first: `alone` is believed only of a node that has not been secondary since.
"""

from __future__ import annotations

from dataclasses import replace

from hast import decision
from hast.control import Role
from hast.errors import UnavailableError
from hast.metadata import Metadata, Pair


def target_text(resource: str) -> str:
    """Why a secondary may not become primary, and what can be done."""
    return (
        f"{resource}: it cannot become primary: its data is a mix of old and new, because a synchronisation from the"
        " other node is not complete, or its disk has lost what the other node may have: make that one primary, if it"
        f" is not, and wait for it to be copied, or give the newer data up with 'hastctl role -f primary {resource}'"
    )


def check_primary(metadata: Metadata) -> None:
    """Raises UnavailableError when the node must not become primary by itself.

    One that was primary when it became a target may take its role again: what is marked is served by the other node.
    """
    if metadata.syncing and metadata.prevrole is not Role.PRIMARY:
        raise UnavailableError(target_text(metadata.resource))


def whole(metadata: Metadata) -> bool:
    """Nobody has more than this component: a primary that wrote alone, or one that was never used."""
    return metadata.resuid == 0 or (metadata.prevrole is Role.PRIMARY and metadata.alone)


def as_primary(metadata: Metadata, random64: int) -> tuple[Metadata, bool]:
    """The metadata of a node that becomes primary, and whether nothing was ever written here; random64 is for its
    unique ID, at the first start ever, and where one of FreeBSD's may take this node, which it has not synchronised
    yet, for one in sync (see forced). Raises UnavailableError (see check_primary)."""
    check_primary(metadata)
    virgin = metadata.resuid == 0
    unknown = virgin or (metadata.unsaid and not metadata.syncing)
    return replace(
        metadata,
        resuid=decision.choose_resuid(random64) if unknown else metadata.resuid,
        prevrole=Role.PRIMARY,
        # As a secondary it may have been met by a primary that has taken its counters for its own since.
        alone=metadata.alone and metadata.prevrole is Role.PRIMARY,
        # What it changes from now on is not to be thrown away.
        discard=False,
        unmapped=metadata.syncing and metadata.unmapped,
        blank=metadata.syncing and metadata.blank,
        unsaid=metadata.syncing and metadata.unsaid,
    ), virgin


def discarding(metadata: Metadata) -> Metadata:
    """`hastctl discard`: when this node, as secondary, is next found in split-brain, it gives up what it changed alone.
    Any other handshake that succeeds ends that, and so does becoming primary."""
    return replace(metadata, discard=True)


def forced(metadata: Metadata, random64: int) -> Metadata:
    """`hastctl role -f primary`: what the other node has and this one lacks is given up. Both then have something of
    their own, which their next handshake finds, as a split-brain. Nothing changes where nothing has to be forced.

    That handshake has to see a remotecnt here that is below the other node's localcnt. Where it may not be, because
    this node was in sync by its counters and not fit to be used all the same, it is lowered. And where that cannot be,
    because it is 0, another unique ID says so, of random64: the nodes have nothing in common then.
    """
    if not metadata.syncing:
        return metadata
    resuid, pair = metadata.resuid, decision.before_degraded_write(metadata.pair, None)
    if metadata.unsaid and pair.remotecnt > 0:
        pair = Pair(pair.localcnt, pair.remotecnt - 1)
    elif metadata.unsaid:
        resuid = decision.choose_resuid(random64)
    return replace(
        metadata,
        resuid=resuid,
        pair=pair,
        prevrole=Role.PRIMARY,
        syncing=False,
        alone=True,
        discard=False,
        unsaid=False,
    )
