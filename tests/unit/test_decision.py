"""The sync decision table, row by row and over histories of two nodes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.decision import (
    MapChoice,
    Outcome,
    after_sync,
    before_degraded_write,
    choose_resuid,
    decide,
    when_told_virgin,
)
from hast.messages import SPLIT_BRAIN, SyncSource
from hast.metadata import Pair
from tests import vectors
from tests.unit.strategies import U64

PRIMARY, SECONDARY = SyncSource.PRIMARY, SyncSource.SECONDARY
UID = 4711


def row(own: tuple[int, int], primary: tuple[int, int]) -> tuple[Outcome, SyncSource, MapChoice]:
    made = decide(UID, Pair(*own), UID, Pair(*primary), primary_virgin=False)
    assert not made.virgin and made.adopt_resuid is None
    return made.outcome, made.syncsrc, made.map


def test_a_secondary_never_used_adopts() -> None:
    virgin = decide(0, Pair(), UID, Pair(), primary_virgin=True)
    assert (virgin.outcome, virgin.syncsrc, virgin.map) == (Outcome.ADOPT, PRIMARY, MapChoice.NONE)
    assert virgin.virgin and virgin.adopt_resuid == UID and virgin.error is None
    used = decide(0, Pair(), UID, Pair(1, 0), primary_virgin=False)
    assert (used.outcome, used.syncsrc, used.map) == (Outcome.ADOPT, PRIMARY, MapChoice.FULL)
    assert used.virgin and used.adopt_resuid == UID and used.error is None


def test_another_resuid_is_refused_in_the_words_of_the_original() -> None:
    vector = vectors.load("hs2_error_resuid_mismatch")
    made = decide(1234605616436508552, Pair(), 8812064633014397473, Pair(), primary_virgin=True)
    assert made.outcome is Outcome.RESUID_MISMATCH
    assert made.error == vector.elements[-1][2]
    assert made.adopt_resuid is None


@pytest.mark.parametrize("n", [0, 5, 2**64 - 2])
def test_rows(n: int) -> None:
    own = MapChoice.OWN
    assert row((n, n), (n, n)) == (Outcome.IN_SYNC, PRIMARY, own)
    assert row((n + 1, n), (n, n)) == (Outcome.SECONDARY_NEWER, SECONDARY, own)
    assert row((n, n), (n + 1, n)) == (Outcome.PRIMARY_NEWER, PRIMARY, own)
    assert row((0, n), (n, 0)) == (Outcome.IN_SYNC, PRIMARY, own)
    # Neither node's word about the other fits.
    assert row((n, n + 1), (n, n)) == (Outcome.IMPOSSIBLE, PRIMARY, MapChoice.FULL)
    assert row((n, n), (n, n + 1)) == (Outcome.IMPOSSIBLE, PRIMARY, MapChoice.FULL)
    assert row((n + 1, n + 1), (n, n)) == (Outcome.IMPOSSIBLE, SECONDARY, MapChoice.FULL)


def test_split_brain_is_said_as_the_original_says_it() -> None:
    made = decide(UID, Pair(1, 0), UID, Pair(1, 0), primary_virgin=False)
    assert made.outcome is Outcome.SPLIT_BRAIN
    assert made.error == SPLIT_BRAIN == vectors.load("hs2_error_splitbrain").elements[-1][2]


def test_impossible_counters_are_told() -> None:
    made = decide(UID, Pair(0, 9), UID, Pair(3, 4), primary_virgin=False)
    assert made.outcome is Outcome.IMPOSSIBLE and made.error is None
    assert made.warning is not None and "primary 3/4, secondary 0/9" in made.warning


def test_every_combination_of_small_counters_is_the_table() -> None:
    """The rows of the table as they stand in docs/protocol.md section 6, tried in that order."""
    for s_local, s_remote, p_local, p_remote in itertools.product(range(4), repeat=4):
        if s_local > p_remote and s_remote == p_local:
            expected = (Outcome.SECONDARY_NEWER, SECONDARY, MapChoice.OWN)
        elif s_local == p_remote and s_remote == p_local:
            expected = (Outcome.IN_SYNC, PRIMARY, MapChoice.OWN)
        elif s_local == p_remote and s_remote < p_local:
            expected = (Outcome.PRIMARY_NEWER, PRIMARY, MapChoice.OWN)
        elif s_local > p_remote and p_local > s_remote:
            expected = (Outcome.SPLIT_BRAIN, PRIMARY, MapChoice.NONE)
        else:
            source = SECONDARY if s_local > p_remote else PRIMARY
            expected = (Outcome.IMPOSSIBLE, source, MapChoice.FULL)
        assert row((s_local, s_remote), (p_local, p_remote)) == expected


@given(U64, st.tuples(U64, U64), U64, st.tuples(U64, U64), st.booleans())
def test_a_decision_is_whole(
    own_uid: int, own: tuple[int, int], uid: int, primary: tuple[int, int], virgin: bool
) -> None:
    made = decide(own_uid, Pair(*own), uid, Pair(*primary), virgin)
    assert (made.error is not None) == (made.outcome in (Outcome.SPLIT_BRAIN, Outcome.RESUID_MISMATCH))
    assert (made.adopt_resuid is not None) == made.virgin == (made.outcome is Outcome.ADOPT)
    assert (made.warning is not None) == (made.outcome is Outcome.IMPOSSIBLE)
    if made.error is not None:
        assert made.map is MapChoice.NONE


# Counters.


def test_degraded_write() -> None:
    assert before_degraded_write(Pair(0, 0), None) == Pair(1, 0)
    assert before_degraded_write(Pair(0, 0), 0) == Pair(1, 0)
    assert before_degraded_write(Pair(5, 2), 5) == Pair(6, 2)
    assert before_degraded_write(Pair(6, 2), 5) == Pair(6, 2)
    assert before_degraded_write(Pair(6, 2), None) == Pair(7, 2)
    assert before_degraded_write(Pair(2**64 - 1, 0), None) == Pair(2**64 - 1, 0)


def test_told_virgin() -> None:
    assert when_told_virgin(Pair(0, 0)) == Pair(1, 0)
    assert when_told_virgin(Pair(3, 1)) == Pair(3, 1)


@given(st.integers(0, 2**64 - 1))
def test_resuid_is_never_zero(random64: int) -> None:
    assert 0 < choose_resuid(random64) < 2**64


@given(U64, U64)
def test_after_a_sync_the_nodes_are_in_sync(local: int, remote: int) -> None:
    secondary = Pair(local, remote)
    made = decide(UID, secondary, UID, after_sync(secondary), primary_virgin=False)
    assert made.outcome is Outcome.IN_SYNC


@given(st.lists(st.sampled_from(("write a", "write b", "sync a", "sync b")), max_size=20))
def test_histories_of_two_nodes(steps: list[str]) -> None:
    """Two nodes take turns as primary, with writes alone and synchronisations: the table is never wrong.

    Each node's data is the set of writes that it holds; whoever is overwritten must hold nothing of its own.
    """
    pairs = {"a": Pair(1, 0), "b": Pair(0, 1)}
    data: dict[str, set[int]] = {"a": set(), "b": set()}
    for n, step in enumerate(steps):
        action, node = step.split()
        other = "b" if node == "a" else "a"
        if action == "write":
            # A worker that was just started knows nothing of the other node.
            pairs[node] = before_degraded_write(pairs[node], None)
            data[node].add(n)
            continue
        made = decide(UID, pairs[other], UID, pairs[node], primary_virgin=False)
        only_here, only_there = data[node] - data[other], data[other] - data[node]
        assert made.outcome is not Outcome.IMPOSSIBLE
        assert (made.outcome is Outcome.SPLIT_BRAIN) == (bool(only_here) and bool(only_there))
        if made.error is not None:
            return
        if only_here:
            assert made.outcome is Outcome.PRIMARY_NEWER
        elif only_there:
            assert made.outcome is Outcome.SECONDARY_NEWER
        else:
            assert made.outcome is Outcome.IN_SYNC
        pairs[node] = after_sync(pairs[other])
        data[node] |= data[other]
        data[other] |= data[node]
