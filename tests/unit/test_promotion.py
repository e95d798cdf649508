"""Who may become primary, and what taking a role changes in the metadata (invariants 7 and 10)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.control import Role
from hast.decision import MapChoice, Outcome, after_sync, as_target, decide, when_told_virgin
from hast.errors import UnavailableError
from hast.metadata import Metadata, Pair
from hast.promotion import as_primary, check_primary, forced

USED = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=7, pair=Pair(3, 4), prevrole=Role.SECONDARY)
TARGET = replace(USED, syncing=True)
COUNTERS = st.integers(0, 3)


def test_a_secondary_that_is_a_target_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"^data: .*'hastctl role -f primary data'$"):
        as_primary(TARGET, 1)
    with pytest.raises(UnavailableError):
        check_primary(replace(TARGET, prevrole=Role.INIT))
    check_primary(USED)


def test_a_primary_that_is_a_target_takes_its_role_again_and_goes_on_being_one() -> None:
    was = replace(TARGET, prevrole=Role.PRIMARY)
    assert as_primary(was, 1) == (was, False)
    # But not after it was secondary in between.
    with pytest.raises(UnavailableError):
        as_primary(replace(was, prevrole=Role.SECONDARY), 1)


def test_the_first_start_ever_makes_the_unique_id() -> None:
    metadata, virgin = as_primary(Metadata("data", 67104256, 2 << 20, 64, 4608), 41)
    assert virgin and metadata.resuid == 42 and metadata.prevrole is Role.PRIMARY


def test_counters_that_were_raised_before_it_was_secondary_do_not_count_any_more() -> None:
    """It wrote alone, was synchronised to the other node as a secondary, and is primary again: the other node knows the
    raised counter by now, so the next write alone has to raise it once more."""
    assert as_primary(replace(USED, alone=True), 1)[0].alone is False
    assert as_primary(replace(USED, alone=True, prevrole=Role.PRIMARY), 1)[0].alone is True


def test_a_primary_does_not_give_up_what_it_changes_from_now_on() -> None:
    assert as_primary(replace(USED, discard=True), 1)[0].discard is False


def test_force_changes_nothing_where_nothing_has_to_be_forced() -> None:
    assert forced(USED, 1) == USED


@given(COUNTERS, COUNTERS, COUNTERS, COUNTERS)
def test_a_target_is_found_out_of_date_and_a_forced_one_in_split_brain(a: int, b: int, c: int, d: int) -> None:
    """Wherever the two were, also where their counters cannot be: the primary has the newer data, and keeps it."""
    own, theirs = Pair(a, b), Pair(c, d)
    if not decide(7, own, 7, theirs, False).target:
        return
    target = replace(TARGET, pair=as_target(own, theirs))
    theirs = when_told_virgin(theirs)  # as it is by each target, where that makes a difference
    assert decide(7, target.pair, 7, theirs, False).outcome is Outcome.PRIMARY_NEWER
    promoted = forced(target, 1)
    assert promoted.alone and not promoted.syncing
    assert as_primary(promoted, 1)[0] == promoted
    assert decide(7, promoted.pair, 7, theirs, False).outcome is Outcome.SPLIT_BRAIN
    assert decide(7, theirs, 7, promoted.pair, False).outcome is Outcome.SPLIT_BRAIN
    # But when the synchronisation was complete and nobody had said so, it has lost nothing.
    assert decide(7, promoted.pair, 7, after_sync(target.pair), False).outcome is Outcome.SECONDARY_NEWER


@given(COUNTERS, COUNTERS)
def test_a_forced_target_that_is_in_sync_by_its_counters_is_found(a: int, b: int) -> None:
    """It had lost its power, and with that what it had acknowledged and not flushed. Or its disk had failed while it
    was primary, and the secondary did everything. Where the other node's localcnt is 0 no counter says so; that one may
    not have heard that it has a target."""
    target, theirs = replace(TARGET, pair=Pair(a, b), unsaid=True), Pair(b, a)
    assert decide(7, target.pair, 7, theirs, False).outcome is Outcome.IN_SYNC
    promoted = forced(target, 8)
    assert not promoted.unsaid and as_primary(promoted, 1)[0] == promoted
    for told in {theirs, when_told_virgin(theirs)}:
        for outcome in (
            decide(promoted.resuid, promoted.pair, 7, told, False).outcome,
            decide(7, told, promoted.resuid, promoted.pair, False).outcome,
        ):
            assert outcome is (Outcome.SPLIT_BRAIN if b else Outcome.RESUID_MISMATCH)


def test_a_node_that_a_primary_of_freebsd_may_take_for_one_in_sync_is_found() -> None:
    """FreeBSD's hastd does not say when a synchronisation is over: such a secondary may always become primary. Where
    that one may not have heard `virgin`, both would have the counters 0/0."""
    assert as_primary(replace(USED, unsaid=True), 41) == (replace(USED, resuid=42, prevrole=Role.PRIMARY), False)


def test_a_node_that_was_made_anew_and_is_met_again_in_the_middle_goes_on_where_it_was() -> None:
    """The primary knows a count of the one that was there before: without taking it over, everything would be copied
    from the start at each contact, and a forced node would be overwritten without a word."""
    theirs = Pair(1, 5)
    first = decide(0, Pair(), 7, theirs, False)
    assert first.outcome is Outcome.ADOPT and first.target
    again = decide(7, as_target(Pair(), theirs), 7, theirs, False)
    assert (again.outcome, again.map) == (Outcome.PRIMARY_NEWER, MapChoice.OWN)
