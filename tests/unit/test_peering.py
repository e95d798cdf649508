"""What a primary knows of its secondary: each event, and any order of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import decision, peering
from hast.control import Role
from hast.decision import Outcome, decide
from hast.handshake import Agreement
from hast.messages import SyncSource
from hast.metadata import Metadata, Pair
from hast.peering import LONGEST_PAUSE, SETTLED_SECONDS, SHORTEST_PAUSE, OutdatedError, Peering, Phase
from tests.unit.handshakes import answer, finish, primary, second

NEVER = Pair()
METADATA = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=7, prevrole=Role.PRIMARY)


def agreement(
    own: Pair, secondary: Pair, syncsrc: SyncSource = SyncSource.PRIMARY, version: int = 2, **words: bool
) -> Agreement:
    return Agreement(version, syncsrc, secondary, False, None, replace(METADATA, pair=own, **words))


def connected(to_sync: int = 0, secondary: Pair = NEVER) -> Peering:
    state, _ = peering.agreed(Peering(), agreement(Pair(), secondary))
    return peering.joined(state, to_sync)[0]


def test_handshake_with_equal_counters_says_that_nothing_was_written_alone() -> None:
    state, metadata = peering.agreed(Peering(virgin=True), agreement(Pair(), Pair(), alone=True))
    assert state == Peering(virgin=True, peer=Pair(), version=2, phase=Phase.JOINING)
    assert metadata == replace(METADATA, pair=Pair())


@pytest.mark.parametrize("keepmap", [False, True])
def test_what_is_newer_is_everywhere_also_where_this_node_was_out_of_date_before(keepmap: bool) -> None:
    """The secondary was primary meanwhile, and wrote what this node's map calls clean. Not where its map stays."""
    for news in (b"\0\0", b"\0\1"):
        found = replace(agreement(Pair(1, 1), Pair(2, 1), SyncSource.SECONDARY, syncing=True), map=news)
        assert peering.agreed(Peering(), found, keepmap)[1].unmapped is (any(news) and not keepmap)


def test_a_primary_that_is_out_of_date_knows_whether_the_counters_say_so() -> None:
    """What the version before this one has stored does not tell."""
    for pair, unsaid in ((Pair(1, 1), True), (Pair(2, 1), False)):
        source = SyncSource.PRIMARY if unsaid else SyncSource.SECONDARY
        assert peering.agreed(Peering(), agreement(Pair(1, 1), pair, source, syncing=True))[1].unsaid is unsaid
    assert not peering.agreed(Peering(), agreement(Pair(1, 1), Pair(1, 1)))[1].unsaid


def test_handshake_with_raised_localcnt_keeps_it_raised() -> None:
    _, metadata = peering.agreed(Peering(), agreement(Pair(1, 0), Pair(0, 0)))
    assert metadata.alone
    assert peering.wrote_alone(connected(secondary=Pair(0, 0)), metadata).pair == Pair(1, 0)


def test_newer_data_on_the_secondary_makes_this_node_a_target() -> None:
    _, metadata = peering.agreed(Peering(), agreement(Pair(), Pair(1, 0), SyncSource.SECONDARY))
    assert metadata.syncing


def test_an_attempt_that_is_not_used_makes_no_target() -> None:
    """Writes were under way here: they are acknowledged without the secondary, and counted."""
    state, metadata = peering.agreed(Peering(), agreement(Pair(), Pair(1, 0), SyncSource.SECONDARY))
    after = peering.unused(metadata, was_syncing=False)
    assert not after.syncing
    counted = peering.wrote_alone(peering.lost(state)[0], after)
    assert decide(7, Pair(1, 0), 7, counted.pair, False).outcome is Outcome.SPLIT_BRAIN
    assert peering.unused(metadata, was_syncing=True).syncing


def test_a_secondary_that_was_never_used_is_not_taken_for_one_in_sync_by_a_primary_that_is_out_of_date() -> None:
    """FreeBSD's adopts the unique ID, and looks like one in sync from then on, with nothing but a map that is full."""
    state, blank = Peering(), replace(METADATA, resuid=0)
    outdated = replace(METADATA, syncing=True)
    for outcome in (Outcome.ADOPT, Outcome.IN_SYNC, Outcome.IN_SYNC):
        made = answer(replace(second(outdated), hast=False, outdated=False), blank)
        assert made.decision.outcome is outcome
        blank = made.metadata
        found = finish(primary(outdated), made.message)
        state = peering.met(state, found)
        with pytest.raises(OutdatedError):
            peering.agreed(state, found)
    # One with newer data is another one; and after a connection with that, one in sync is what it seems to be.
    newer = agreement(Pair(), Pair(1, 0), SyncSource.SECONDARY, syncing=True)
    state, _ = peering.agreed(peering.met(state, newer), newer)
    state = peering.lost(state)[0]
    same = agreement(Pair(), Pair(), syncing=True)
    peering.agreed(peering.met(state, same), same)
    # The next worker knows it from the metadata.
    same = agreement(Pair(), Pair(), syncing=True, blank=True)
    with pytest.raises(OutdatedError):
        peering.agreed(peering.met(Peering(), same), same)


def test_what_is_newer_on_the_secondary_is_everywhere_until_its_map_is_merged() -> None:
    state, metadata = peering.agreed(Peering(), agreement(Pair(), Pair(1, 0), SyncSource.SECONDARY))
    assert metadata.syncing and metadata.unmapped
    assert not peering.unused(metadata, was_syncing=False).unmapped
    assert not peering.in_sync(peering.joined(state, 1)[0], metadata)[1].unmapped
    # Where it was known already, another contact changes nothing.
    _, again = peering.agreed(Peering(), agreement(Pair(), Pair(1, 0), SyncSource.SECONDARY, syncing=True))
    assert again.syncing and not again.unmapped


def test_a_newer_secondary_is_found_whatever_is_on_the_disk() -> None:
    found = replace(agreement(Pair(3, 2), Pair(3, 3), SyncSource.SECONDARY), hast=True)
    here = found.metadata
    raised = replace(here, pair=Pair(4, 2), alone=True)
    known = [replace(here, syncing=True), replace(here, syncing=True, unmapped=True), raised]
    assert peering.found_newer(found, known)
    assert not peering.found_newer(replace(found, hast=False), known)
    assert not peering.found_newer(replace(found, syncsrc=SyncSource.PRIMARY), known)
    # With counters that say "in sync" this node's old data would be copied to the other one.
    assert not peering.found_newer(found, [*known, replace(here, pair=Pair(3, 3))])
    # But where it has stored since that it is ahead, those are not found in sync any more.
    ahead = replace(found, secondary=decision.ahead(found.secondary))
    assert peering.found_newer(ahead, [*known, replace(here, pair=Pair(3, 3))])


@given(st.tuples(*[st.integers(0, 3)] * 6))
def test_what_need_not_be_stored_is_found_whatever_is_on_the_disk(n: tuple[int, ...]) -> None:
    theirs, own, tried = Pair(n[0], n[1]), Pair(n[2], n[3]), replace(METADATA, pair=Pair(n[4], n[5]))
    if decide(7, theirs, 7, own, False).outcome is not Outcome.SECONDARY_NEWER:
        return
    found = replace(agreement(own, theirs, SyncSource.SECONDARY), hast=True)
    if peering.found_newer(found, [tried]):
        met = decide(7, theirs, 7, tried.pair, False).outcome
        assert met in (Outcome.SECONDARY_NEWER, Outcome.SPLIT_BRAIN)


def test_requests_begin_when_the_map_is_durable() -> None:
    state, _ = peering.agreed(Peering(virgin=True), agreement(Pair(), Pair()))
    assert not state.connected
    assert peering.joined(state, 0) == (replace(state, phase=Phase.CONNECTED, virgin=False), ("connect",))
    assert peering.joined(state, 3) == (replace(state, phase=Phase.SYNCING, virgin=False), ("connect", "syncstart"))


def test_in_sync_sets_the_counters_to_those_of_the_secondary() -> None:
    state = connected(to_sync=5, secondary=Pair(0, 0))
    wrote = replace(METADATA, pair=Pair(1, 0), alone=True, syncing=True)
    state, metadata, hooks = peering.in_sync(state, wrote)
    assert metadata == replace(METADATA, pair=Pair(0, 0))
    assert hooks == ("syncdone",)
    assert state.phase is Phase.CONNECTED
    # And again, when nothing was to be copied: no hook.
    assert peering.in_sync(state, metadata) == (state, metadata, ())


@pytest.mark.parametrize("state", [Peering(), Peering(peer=Pair(), phase=Phase.JOINING)])
def test_in_sync_of_a_lost_connection_does_not_count(state: Peering) -> None:
    wrote = replace(METADATA, pair=Pair(1, 0), alone=True)
    assert peering.in_sync(state, wrote) == (state, wrote, ())


def test_lost() -> None:
    assert peering.lost(Peering()) == (Peering(), ())
    assert peering.lost(connected())[1] == ("disconnect",)
    assert peering.lost(connected(to_sync=1))[1] == ("disconnect", "syncintr")
    assert peering.lost(peering.agreed(Peering(), agreement(Pair(), Pair()))[0])[1] == ()


def test_pauses_grow_to_a_limit_and_are_short_again_after_a_connection_that_held() -> None:
    state, pauses = Peering(), []
    for _ in range(6):
        state = peering.failed(state)
        pauses.append(state.pause)
    assert pauses == [1.0, 2.0, 4.0, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]
    flapping = replace(connected(), pause=state.pause)
    assert peering.lost(flapping, 1.0)[0].pause == LONGEST_PAUSE
    assert peering.lost(flapping, SETTLED_SECONDS + 1)[0].pause == SHORTEST_PAUSE


def test_first_write_alone() -> None:
    assert peering.wrote_alone(None, METADATA) == replace(METADATA, pair=Pair(1, 0), alone=True)
    # The secondary is known to have another count already: it need not be raised, only noted.
    met = connected(secondary=Pair(0, 3))
    assert peering.wrote_alone(met, METADATA) == replace(METADATA, alone=True)
    met = connected(secondary=Pair(5, 0))
    assert peering.wrote_alone(met, METADATA).pair == Pair(1, 0)


def test_only_raised() -> None:
    """What may be on a disk that has taken nothing since."""
    here = replace(METADATA, pair=Pair(3, 2))
    raised = replace(here, pair=Pair(4, 2), alone=True)
    assert peering.only_raised(here, []) and peering.only_raised(here, [here, raised])
    outdated = replace(here, syncing=True)  # the secondary had everything, and was to take this node's place
    assert peering.only_raised(here, [outdated, raised]) and not peering.only_raised(outdated, [here])
    for other in (
        replace(raised, syncing=True),
        replace(raised, prevrole=Role.SECONDARY),
        replace(here, pair=Pair(2, 2)),
        replace(here, pair=Pair(3, 3)),
        replace(here, resuid=8),
    ):
        assert not peering.only_raised(here, [raised, other])


def test_memsync_needs_version_2() -> None:
    assert Peering(version=1).mode("memsync") == "fullsync"
    assert Peering(version=2).mode("memsync") == "memsync"
    assert Peering(version=1).mode("async") == "async"


EVENTS = st.lists(st.sampled_from(["agreed", "joined", "syncing", "in_sync", "lost", "failed", "wrote"]), max_size=40)


@given(EVENTS)
def test_any_order_of_events(events: list[str]) -> None:
    """Hooks come in pairs; a secondary that did not write never takes a node that wrote alone for in sync."""
    state, metadata, theirs = Peering(), METADATA, Pair()
    said: list[str] = []
    alone = False
    for event in events:
        hooks: tuple[str, ...] = ()
        if event == "agreed" and state.phase is Phase.DOWN:
            state, metadata = peering.agreed(state, Agreement(2, SyncSource.PRIMARY, theirs, False, None, metadata))
        elif event in ("joined", "syncing"):
            state, hooks = peering.joined(state, 4 if event == "syncing" else 0)
        elif event == "in_sync":
            before = metadata
            state, metadata, hooks = peering.in_sync(state, metadata)
            alone = alone and metadata == before and not state.connected
        elif event == "lost":
            state, hooks = peering.lost(state)
        elif event == "failed":
            state = peering.failed(state)
        elif event == "wrote" and not state.connected:
            metadata, alone = peering.wrote_alone(state, metadata), True
        said += hooks
        decided = decide(7, theirs, 7, metadata.pair, False)
        assert decided.error is None
        assert (decided.outcome.name == "IN_SYNC") is not alone
    for opening, closing in (("connect", ("disconnect",)), ("syncstart", ("syncdone", "syncintr"))):
        open_ = 0
        for hook in said:
            open_ += (hook == opening) - (hook in closing)
            assert open_ in (0, 1), said


def test_a_secondary_is_told_that_it_is_ahead_where_it_has_everything() -> None:
    state = connected(secondary=Pair(0, 1))
    assert peering.may_say_ahead(state, replace(METADATA, pair=Pair(1, 0)))
    assert not peering.may_say_ahead(state, replace(METADATA, pair=Pair(2, 0))), "it lacks something"
    assert not peering.may_say_ahead(peering.lost(state)[0], replace(METADATA, pair=Pair(1, 0)))


def test_the_source_of_a_synchronisation_is_told_that_it_is_ahead() -> None:
    """Its counters say already that it is; they go on to say so, and this node's that it is not."""
    own = Pair(1, 1)
    state, metadata = peering.agreed(Peering(), agreement(own, Pair(2, 1), SyncSource.SECONDARY))
    state, _ = peering.joined(state, 3)
    assert peering.may_say_ahead(state, metadata)
    for pair in (decision.ahead(Pair(2, 1)), decision.ahead(decision.ahead(Pair(2, 1)))):
        assert decide(7, pair, 7, metadata.pair, False).outcome is Outcome.SECONDARY_NEWER
