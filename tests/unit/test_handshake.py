"""The handshake: the decision table end to end, maps on their way, and a target that knows that it is one."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import checksum, compression, peering
from hast.activemap import count_dirty, set_bit
from hast.decision import Outcome, as_target, decide
from hast.errors import DiskError
from hast.handshake import RefusedError, answer_second, first_request, request_from_dict, request_to_dict
from hast.messages import Handshake2Request
from hast.metadata import Metadata, Pair
from hast.peering import OutdatedError, Peering
from hast.promotion import as_primary, forced
from tests.unit.handshakes import CAPTURED, EXTENTS, UID, answer, finish, foreign, nv_of, primary, second
from tests.unit.strategies import U64

COUNTERS = st.integers(0, 3) | U64


# The table of section 6, through both state machines.


@pytest.mark.parametrize("virgin", [False, True])
@pytest.mark.parametrize("own_uid", [0, UID, UID - 1])
def test_decision_table_end_to_end(virgin: bool, own_uid: int) -> None:
    for a, b, c, d in itertools.product(range(4), repeat=4):
        both_sides(own_uid, Pair(a, b), Pair(c, d), virgin)


def both_sides(own_uid: int, own: Pair, theirs: Pair, virgin: bool) -> None:
    """One handshake: the secondary's ID and pair, the primary's pair, and whether it just made its ID."""
    dirty = bytearray(CAPTURED.mapsize)
    set_bit(dirty, 5)
    mine = replace(CAPTURED, pair=theirs)
    made = answer(second(mine, virgin), replace(CAPTURED, resuid=own_uid, pair=own), bytes(dirty))
    said_virgin = virgin and theirs == Pair()
    expected = decide(own_uid, own, UID, theirs, said_virgin)
    assert made.decision == expected
    handshake = primary(mine, virgin=virgin)
    if expected.error is not None:
        assert made.metadata == replace(CAPTURED, resuid=own_uid, pair=own) and made.map is None
        with pytest.raises(RefusedError) as refused:
            handshake.second_reply(nv_of(made.message))
        assert refused.value.text == expected.error
        assert refused.value.split_brain is made.split_brain is (expected.outcome is Outcome.SPLIT_BRAIN)
        return
    agreement = finish(handshake, made.message)
    told = as_target(own, theirs) if expected.target else own
    unsaid = expected.target and theirs.localcnt <= told.remotecnt
    assert made.metadata == replace(CAPTURED, pair=told, syncing=expected.target, unsaid=unsaid)
    assert (agreement.syncsrc, agreement.secondary) == (expected.syncsrc, told)
    assert expected.virgin is (own_uid == 0)
    assert agreement.virgin is (own_uid == 0 or (expected.target and theirs.localcnt == 0))
    raised = agreement.virgin and theirs.localcnt == 0
    assert agreement.metadata == (replace(mine, pair=Pair(1, theirs.remotecnt)) if raised else mine)
    if expected.outcome is Outcome.ADOPT and said_virgin:
        assert agreement.map is None and made.map is None
    elif expected.outcome in (Outcome.ADOPT, Outcome.IMPOSSIBLE):
        # All of it is dirty on the secondary's own disk before it answers, so that no break loses that.
        assert made.map == b"\xff" * CAPTURED.mapsize
        assert agreement.map is not None and count_dirty(agreement.map, EXTENTS) == EXTENTS
    else:
        assert agreement.map == bytes(dirty) and made.map is None


@given(COUNTERS, COUNTERS, COUNTERS, COUNTERS, st.booleans())
def test_any_counters_survive_the_wire(a: int, b: int, c: int, d: int, virgin: bool) -> None:
    mine = replace(CAPTURED, pair=Pair(c, d))
    made = answer(second(mine, virgin), replace(CAPTURED, pair=Pair(a, b)))
    assert made.decision == decide(UID, Pair(a, b), UID, Pair(c, d), virgin and mine.pair == Pair())
    if made.accepted:
        assert finish(primary(mine), made.message).secondary == made.metadata.pair


def test_adopting_lasts_when_the_connection_breaks_before_the_map_was_merged() -> None:
    """The next handshake finds equal IDs, and only the stored map still says that everything is missing."""
    mine = replace(CAPTURED, pair=Pair(1, 0))
    first = answer(second(mine), replace(CAPTURED, resuid=0))
    assert first.decision.outcome is Outcome.ADOPT and first.map is not None
    again = answer(second(mine), first.metadata, first.map)
    assert again.decision.outcome is Outcome.PRIMARY_NEWER
    merged = finish(primary(mine), again.message).map
    assert merged is not None and count_dirty(merged, EXTENTS) == EXTENTS


def test_virgin_is_not_said_once_something_was_written() -> None:
    assert second(replace(CAPTURED, pair=Pair(1, 0)), virgin=True).virgin is False
    assert second(CAPTURED, virgin=True).virgin is True


def test_a_map_that_cannot_be_read_is_the_secondarys_own_trouble() -> None:
    def fails() -> bytes:
        raise DiskError("data: component /dev/x cannot be read")

    with pytest.raises(DiskError):
        answer_second(second(), 2, CAPTURED, fails, compression.HOLE, checksum.NONE)


@pytest.mark.parametrize("packing", compression.NAMES)
@pytest.mark.parametrize("algorithm", [checksum.NONE, checksum.CRC32, checksum.SHA256])
@pytest.mark.parametrize("bits", [bytes(8192), b"\x05" + bytes(8191), bytes(range(256)) * 32])
def test_maps_travel_transformed(packing: str, algorithm: str, bits: bytes) -> None:
    large = replace(CAPTURED, datasize=8192 * 8 << 21, offset=4096 + 8192)
    made = answer(second(large), large, bits, packing=packing, algorithm=algorithm)
    assert finish(primary(large), made.message).map == bits
    packed = packing == compression.LZF or (packing == compression.HOLE and not any(bits))
    assert (len(made.message) < 2000) is packed


# The way from main to the worker.


@given(st.binary(min_size=16, max_size=16), st.integers(1, 2**64 - 1), U64, U64, st.booleans())
def test_a_request_survives_json(token: bytes, resuid: int, local: int, remote: int, virgin: bool) -> None:
    request = Handshake2Request("data", token, resuid, local, remote, virgin)
    assert request_from_dict(json.loads(json.dumps(request_to_dict(request)))) == request


# Invariant 10: a target knows that it is one.


def test_a_target_of_one_of_ours_stores_that_before_it_answers() -> None:
    newer = replace(CAPTURED, pair=Pair(1, 0))
    for own in (CAPTURED, replace(CAPTURED, resuid=0), replace(CAPTURED, pair=Pair(0, 2))):
        made = answer(second(newer), own)
        assert made.accepted and made.metadata.syncing
        assert finish(primary(newer), made.message).hast
        # FreeBSD's could never say that it is over.
        assert not answer(foreign(newer), own).metadata.syncing
    assert not answer(second(virgin=True), replace(CAPTURED, resuid=0)).metadata.syncing
    assert not answer(second(), replace(CAPTURED, pair=Pair(1, 0))).metadata.syncing


def test_in_sync_does_not_make_a_target_nor_end_one() -> None:
    assert not answer(second(), CAPTURED).metadata.syncing
    was = replace(CAPTURED, syncing=True)
    assert answer(second(), was).metadata.syncing  # its primary has not said yet that it is over
    assert not answer(foreign(), was).metadata.syncing


def test_a_refusal_changes_nothing() -> None:
    own = replace(CAPTURED, pair=Pair(1, 0), syncing=True, alone=True)
    assert answer(second(own), own).metadata == own


def test_the_answer_says_hast_to_who_has_said_it() -> None:
    assert "hast" in nv_of(answer(second(), CAPTURED).message)
    assert "hast" not in nv_of(answer(foreign(), CAPTURED).message)


@pytest.mark.parametrize("hast", [True, False])
def test_a_secondary_that_has_lost_its_power_is_a_target_though_the_counters_agree(hast: bool) -> None:
    """What it had acknowledged and not flushed may be gone. A primary that is not ours could never end it."""
    own = replace(CAPTURED, pair=Pair(1, 2))
    theirs = replace(CAPTURED, pair=Pair(2, 1))
    request = replace(second(theirs), hast=hast)
    for doubt in (False, True):
        found = answer_second(request, 2, own, lambda: bytes(512), compression.NONE, checksum.NONE, doubt)
        assert found.decision.outcome is Outcome.IN_SYNC
        assert found.metadata == replace(own, syncing=doubt and hast, unsaid=doubt and hast)


# A primary that is out of date.


def outdated(pair: Pair) -> Metadata:
    return replace(CAPTURED, pair=pair, syncing=True)


@pytest.mark.parametrize("pair", [Pair(0, 0), Pair(1, 0), Pair(0, 2), Pair(3, 1)])
def test_an_out_of_date_primary_is_refused_by_one_that_was_never_used(pair: Pair) -> None:
    """If that adopted its ID and took its counters over, it would count as whole at the next contact."""
    blank = replace(CAPTURED, resuid=0)
    for _ in range(2):
        made = answer(second(outdated(pair)), blank)
        assert made.decision.outcome is Outcome.OUTDATED and made.metadata == blank and made.map is None
        with pytest.raises(RefusedError) as refused:
            primary(outdated(pair)).second_reply(nv_of(made.message))
        assert refused.value.outdated and not refused.value.wait


def test_an_out_of_date_primary_never_makes_a_target_that_looks_like_one_in_sync() -> None:
    for a, b, c, d in itertools.product(range(3), repeat=4):
        own, theirs = replace(CAPTURED, pair=Pair(a, b)), outdated(Pair(c, d))
        made = answer(second(theirs), own)
        if not made.metadata.syncing:
            continue
        for _ in range(2):  # the answer to the first one is lost, or not
            made = answer(second(theirs), made.metadata)
            with pytest.raises(OutdatedError):
                peering.agreed(Peering(), finish(primary(theirs), made.message))


@pytest.mark.parametrize("was", [False, True])
def test_a_secondary_that_has_lost_its_power_is_no_target_of_a_primary_that_is_out_of_date(was: bool) -> None:
    """Nothing was acknowledged that was not durable here: it may become primary, also if that one never comes back."""
    own = replace(CAPTURED, pair=Pair(1, 2), syncing=was)
    for theirs, syncing in ((outdated(Pair(2, 1)), False), (replace(CAPTURED, pair=Pair(2, 1)), True)):
        found = answer_second(second(theirs), 2, own, lambda: bytes(512), compression.NONE, checksum.NONE, True)
        assert found.decision.outcome is Outcome.IN_SYNC
        assert found.metadata == replace(own, syncing=syncing, unsaid=syncing)


def test_the_newer_secondary_of_a_primary_that_is_out_of_date_lacks_nothing() -> None:
    """What it was told, and has lost with a stage that was killed, was not acknowledged before it was durable here."""
    own, theirs = replace(CAPTURED, pair=Pair(2, 1), syncing=True, unsaid=True), Pair(1, 1)
    for primarys, lacks in ((outdated(theirs), False), (replace(CAPTURED, pair=theirs), True)):
        made = answer(second(primarys), own)
        assert made.decision.outcome is Outcome.SECONDARY_NEWER
        assert made.metadata == replace(own, syncing=lacks, unsaid=False)


def test_a_secondary_whose_map_its_primary_cannot_store_says_that_all_may_differ() -> None:
    """That primary knows of its own changes only as long as it runs."""
    own, theirs = replace(CAPTURED, pair=Pair(1, 0)), outdated(Pair(0, 0))
    made = answer(replace(second(theirs), keepmap=True), own)
    assert made.decision.outcome is Outcome.SECONDARY_NEWER and made.map == b"\xff" * CAPTURED.mapsize
    merged = finish(primary(theirs), made.message).map
    assert merged is not None and count_dirty(merged, EXTENTS) == EXTENTS
    assert answer(second(theirs), own).map is None


# A target of a primary that has never written alone.


@pytest.mark.parametrize("resuid", [0, UID])
def test_a_forced_target_is_found_though_the_first_answer_was_lost(resuid: int) -> None:
    """The primary counts it as used only when it is told so: as long as it is a target, each time."""
    for a, b, d in itertools.product(range(3), repeat=3):
        own, theirs = replace(CAPTURED, resuid=resuid, pair=Pair(a, b)), replace(CAPTURED, pair=Pair(0, d))
        made = answer(second(theirs), own)
        if not made.metadata.syncing:
            continue
        made = answer(second(theirs), made.metadata)
        told = finish(primary(theirs), made.message).metadata
        assert told.pair == Pair(1, d) and made.metadata.unsaid
        # It does not know yet whether that was heard.
        assert forced(made.metadata, UID).resuid == UID + 1
        heard = answer(second(told), made.metadata).metadata
        assert heard == replace(made.metadata, unsaid=False) == first_request(made.metadata)
        went = forced(heard, UID).pair
        assert decide(UID, went, UID, told.pair, False).outcome is Outcome.SPLIT_BRAIN
        assert decide(UID, told.pair, UID, went, False).outcome is Outcome.SPLIT_BRAIN


# A primary of FreeBSD, which never says that all is copied.


def test_what_a_foreign_primary_cannot_end_is_over_with_its_first_request() -> None:
    own = replace(CAPTURED, pair=Pair(1, 2), syncing=True, unsaid=True)
    met = answer(foreign(replace(CAPTURED, pair=Pair(2, 1))), own).metadata
    assert not met.syncing and not first_request(met).unsaid


def test_a_foreign_primary_is_told_virgin_until_it_was_heard_and_never_with_a_counter() -> None:
    """FreeBSD's hastd ends when the secondary that says it has a localcnt."""
    for a, b in itertools.product(range(4), repeat=2):
        theirs = replace(CAPTURED, pair=Pair(a, b))
        made = answer(foreign(theirs), replace(CAPTURED, resuid=0))
        for _ in range(3):
            told = nv_of(made.message)
            assert "virgin" not in told or told.get_uint64("localcnt") == 0
            assert "virgin" in told or a > 0
            if a > 0:  # promoted in the middle, which FreeBSD's hastd does not keep it from, and written to
                went = peering.wrote_alone(Peering(), as_primary(first_request(made.metadata), 1)[0]).pair
                assert decide(UID, theirs.pair, UID, went, False).outcome is Outcome.SPLIT_BRAIN
            made = answer(foreign(theirs), made.metadata)
            assert a == 0 or made.decision.outcome is Outcome.PRIMARY_NEWER
    theirs = foreign(replace(CAPTURED, pair=Pair(0, 0)))
    made = answer(theirs, replace(CAPTURED, resuid=0))
    for _ in range(2):
        made = answer(theirs, made.metadata)
        assert made.decision.outcome is Outcome.IN_SYNC and "virgin" in nv_of(made.message)
        assert made.metadata.unsaid
    made = answer(theirs, first_request(made.metadata))
    assert "virgin" not in nv_of(made.message)
