"""Who is out of date: the decision of the secondary, and the rules of the counters
(docs/protocol.md section 6).

Invariants:
- Pure functions: counters in, decision out; nothing is stored or sent here.
- Every combination of counters has exactly one outcome.
- A rule that changes counters returns the pair that must be durable before anybody relies on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

from hast.messages import OUTDATED, SPLIT_BRAIN, STRANGERS, SyncSource, resuid_mismatch_text
from hast.metadata import Pair

COUNTER_MAX = (1 << 64) - 1


class Outcome(Enum):
    """The row of the table that applies."""

    ADOPT = auto()  # the secondary was never used
    RESUID_MISMATCH = auto()
    SECONDARY_NEWER = auto()
    IN_SYNC = auto()
    PRIMARY_NEWER = auto()
    SPLIT_BRAIN = auto()
    IMPOSSIBLE = auto()  # no history that the protocol allows leads here
    OUTDATED = auto()  # the primary is out of date, and the secondary has nothing that can be told from what it lacks
    STRANGERS = auto()  # one of the components has been synchronised with a third one since


class MapChoice(Enum):
    """The activemap that the secondary sends."""

    NONE = auto()  # no map: nothing has to be synchronised
    OWN = auto()  # the secondary's on-disk map
    FULL = auto()  # all extents dirty


@dataclass(frozen=True)
class Decision:
    """What the secondary does with a handshake of step 2.

    error: the text of the refusal, or None; then syncsrc and map are what the reply says, virgin whether it
    says `virgin`, and adopt_resuid, when not None, is stored before the reply is sent. warning: what to
    tell the administrator, or None.
    """

    outcome: Outcome
    syncsrc: SyncSource = SyncSource.PRIMARY
    map: MapChoice = MapChoice.NONE
    virgin: bool = False
    adopt_resuid: int | None = None
    error: str | None = None
    warning: str | None = None

    @property
    def target(self) -> bool:
        """Whether the secondary's data is not fit to be used until the synchronisation that follows is complete. In
        sync it is: extents that are copied then hold every acknowledged write on both nodes already."""
        if self.outcome is Outcome.PRIMARY_NEWER:
            return True
        return self.map is MapChoice.FULL and self.syncsrc is SyncSource.PRIMARY


def decide(
    own_resuid: int, own: Pair, primary_resuid: int, primary: Pair, primary_virgin: bool
) -> Decision:
    """The table of section 6: own is the secondary's pair, primary the pair that it received."""
    if own_resuid == 0:
        chosen = MapChoice.NONE if primary_virgin else MapChoice.FULL
        return Decision(Outcome.ADOPT, map=chosen, virgin=True, adopt_resuid=primary_resuid)
    if own_resuid != primary_resuid:
        text = resuid_mismatch_text(primary_resuid, own_resuid)
        return Decision(Outcome.RESUID_MISMATCH, error=text)
    if own.remotecnt == primary.localcnt:
        if own.localcnt > primary.remotecnt:
            return Decision(Outcome.SECONDARY_NEWER, SyncSource.SECONDARY, MapChoice.OWN)
        if own.localcnt == primary.remotecnt:
            return Decision(Outcome.IN_SYNC, SyncSource.PRIMARY, MapChoice.OWN)
    if own.localcnt == primary.remotecnt and own.remotecnt < primary.localcnt:
        return Decision(Outcome.PRIMARY_NEWER, SyncSource.PRIMARY, MapChoice.OWN)
    if own.localcnt > primary.remotecnt and primary.localcnt > own.remotecnt:
        return Decision(Outcome.SPLIT_BRAIN, error=SPLIT_BRAIN)
    source = SyncSource.SECONDARY if own.localcnt > primary.remotecnt else SyncSource.PRIMARY
    return Decision(
        Outcome.IMPOSSIBLE,
        source,
        MapChoice.FULL,
        warning=(
            f"counters that cannot be (primary {primary.localcnt}/{primary.remotecnt}, "
            f"secondary {own.localcnt}/{own.remotecnt}): everything is synchronised "
            f"from the {source.name.lower()}"
        ),
    )


def for_outdated(made: Decision) -> Decision:
    """The decision on a primary that says that it is out of date. One that was never used, or whose counters cannot be,
    would look like one in sync at the next contact, if it took the primary's counters over now: and then all that the
    primary lacks would be read from it. So it stores nothing."""
    if made.outcome is Outcome.ADOPT or (made.outcome is Outcome.IMPOSSIBLE and made.target):
        return Decision(Outcome.OUTDATED, error=OUTDATED)
    return made


def for_strangers(made: Decision, own_is_needed: bool) -> Decision:
    """The decision where one of the two components has been synchronised with a third one since they have met: counters
    and maps are about that one. Only where the secondary's own data is of no use to anybody is it known what to do: all
    of the primary's is copied to it. One that was never used is nobody's stranger."""
    if made.error is not None or made.outcome is Outcome.ADOPT:
        return made
    if made.syncsrc is SyncSource.PRIMARY and not own_is_needed:
        return replace(made, map=MapChoice.FULL)
    return Decision(Outcome.STRANGERS, error=STRANGERS)


# Counters of a primary.


def before_degraded_write(pair: Pair, secondary_remotecnt: int | None) -> Pair:
    """The pair to store before the first write without the secondary is acknowledged.

    secondary_remotecnt: what the secondary last said in a handshake (after a completed synchronisation, our
    own localcnt), None when this process has never been told. localcnt is raised when it does not already
    differ from that. When nothing is known it is raised as well: once too often is harmless, once too
    rarely would hide that the nodes diverged. A first write ever thus gives localcnt 1.
    """
    if secondary_remotecnt is not None and secondary_remotecnt != pair.localcnt:
        return pair
    return Pair(_raised(pair.localcnt), pair.remotecnt)


def after_sync(secondary: Pair) -> Pair:
    """The primary's pair when a synchronisation has completed; secondary is the pair from the handshake."""
    return Pair(localcnt=secondary.remotecnt, remotecnt=secondary.localcnt)


def when_told_virgin(pair: Pair) -> Pair:
    """The primary's pair when the secondary replied `virgin`: from now on it counts as used."""
    return Pair(1, pair.remotecnt) if pair.localcnt == 0 else pair


# Counters of a secondary.


def ahead(pair: Pair) -> Pair:
    """The secondary's pair when the primary's component is known to be out of date: it has to be found so."""
    return Pair(_raised(pair.localcnt), pair.remotecnt)


def as_target(own: Pair, primary: Pair) -> Pair:
    """The secondary's pair once it is known to be the target: the one with which the table calls it out of date.

    That is the pair which it has already, but where it was never used, where the counters cannot be, and where its own
    changes are given up after a split-brain. Without it the next handshake would not know how far this one has come,
    and a target that is forced to be primary might be taken for one that is in sync.
    """
    return Pair(localcnt=primary.remotecnt, remotecnt=min(own.remotecnt, max(primary.localcnt, 1) - 1))


def choose_resuid(random64: int) -> int:
    """A resource unique ID from 64 random bits: 0 means "never used" and is never chosen."""
    return random64 % COUNTER_MAX + 1


def _raised(counter: int) -> int:
    """counter + 1. It cannot reach the end of 64 bits by counting; a damaged block must not make it wrap."""
    return min(counter + 1, COUNTER_MAX)
