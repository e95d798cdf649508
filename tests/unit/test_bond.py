"""What two components have in common, so that a third one that takes the place of one of them is told from it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hast import checksum, compression
from hast.decision import Outcome
from hast.handshake import RefusedError, SecondaryAnswer, answer_second
from hast.messages import STRANGERS, SyncSource
from hast.metadata import Metadata, Pair
from tests.unit.handshakes import CAPTURED, finish, foreign, nv_of, primary, second

BLANK = replace(CAPTURED, resuid=0)


def meet(theirs: Metadata, own: Metadata, bond: int = 99, hast: bool = True) -> SecondaryAnswer:
    request = second(theirs) if hast else foreign(theirs)
    answered = answer_second(
        request, 2, own, lambda: bytes(own.mapsize), compression.NONE, checksum.NONE, bond=bond
    )
    if answered.accepted:
        told = finish(primary(theirs), answered.message).metadata.bond
        assert told == (answered.metadata.bond if hast else theirs.bond)
    return answered


def test_one_that_is_adopted_and_its_primary_have_a_bond() -> None:
    for before in (0, 7):
        assert meet(replace(CAPTURED, bond=before), BLANK).metadata.bond == 99


def test_two_that_belong_together_keep_it() -> None:
    both = replace(CAPTURED, bond=7)
    assert meet(both, both).metadata == both


@pytest.mark.parametrize(("theirs", "own", "then"), [(0, 0, 99), (7, 0, 7), (0, 7, 7)])
def test_who_has_none_takes_the_other_ones(theirs: int, own: int, then: int) -> None:
    """It was made before there were bonds, or FreeBSD's hastd has written its metadata since."""
    made = meet(replace(CAPTURED, bond=theirs), replace(CAPTURED, bond=own))
    assert made.decision.outcome is Outcome.IN_SYNC and made.metadata == replace(CAPTURED, bond=then)


def test_a_primary_that_is_not_ours_changes_nothing() -> None:
    assert meet(CAPTURED, replace(CAPTURED, bond=7), hast=False).metadata.bond == 7
    assert "bond" not in nv_of(meet(CAPTURED, replace(CAPTURED, bond=7), hast=False).message)


@pytest.mark.parametrize("own", [Pair(1, 1), Pair(1, 0), Pair(2, 1), Pair(0, 2)])
def test_strangers_are_refused_whatever_their_counters_are(own: Pair) -> None:
    theirs, mine = replace(CAPTURED, pair=Pair(1, 1), bond=8), replace(CAPTURED, pair=own, bond=7)
    made = meet(theirs, mine)
    assert made.decision.outcome is Outcome.STRANGERS and made.metadata == mine and made.map is None
    with pytest.raises(RefusedError) as refused:
        primary(theirs).second_reply(nv_of(made.message))
    assert refused.value.mismatch and refused.value.text == STRANGERS


def test_split_brain_and_mismatch_are_what_they_were() -> None:
    split = meet(replace(CAPTURED, pair=Pair(1, 0), bond=8), replace(CAPTURED, pair=Pair(1, 0), bond=7))
    assert split.split_brain
    other = meet(replace(CAPTURED, bond=8), replace(CAPTURED, resuid=5, bond=7))
    assert other.decision.outcome is Outcome.RESUID_MISMATCH


@pytest.mark.parametrize("own", [Pair(1, 1), Pair(1, 0), Pair(0, 2), Pair(2, 0)])
@pytest.mark.parametrize("discard", [False, True])
def test_all_is_copied_to_a_stranger_whose_data_nobody_needs(own: Pair, discard: bool) -> None:
    """A target, of a primary that has not heard of it for one; or who was told to throw its changes away."""
    theirs = replace(CAPTURED, pair=Pair(1, 1), bond=8)
    made = meet(theirs, replace(CAPTURED, pair=own, bond=7, syncing=not discard, discard=discard))
    if own == Pair(2, 0) and not discard:
        assert made.split_brain
        return
    assert made.accepted and made.metadata.syncing and made.metadata.bond == 99 and not made.metadata.discard
    agreement = finish(primary(theirs), made.message)
    assert agreement.syncsrc is SyncSource.PRIMARY
    assert made.map == b"\xff" * CAPTURED.mapsize and agreement.map is not None and any(agreement.map)


def test_what_only_the_stranger_has_is_not_overwritten() -> None:
    made = meet(replace(CAPTURED, pair=Pair(1, 1), bond=8), replace(CAPTURED, pair=Pair(2, 1), bond=7, syncing=True))
    assert made.decision.outcome is Outcome.STRANGERS


def test_nothing_is_copied_to_a_stranger_from_one_that_is_out_of_date() -> None:
    theirs = replace(CAPTURED, pair=Pair(1, 1), bond=8, syncing=True)
    made = meet(theirs, replace(CAPTURED, pair=Pair(1, 1), bond=7, syncing=True))
    assert made.decision.outcome is Outcome.STRANGERS
