"""The handshake: captured messages in both directions, the decision table end to end, refusals, garbage."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import checksum, compression
from hast.activemap import count_dirty, extent_count, set_bit
from hast.control import Role
from hast.decision import Outcome, as_target, decide
from hast.errors import DataError, DiskError
from hast.handshake import (
    Agreement,
    MismatchError,
    PrimaryHandshake,
    RefusedError,
    SecondaryAnswer,
    accept_first,
    answer_second,
    check_token,
    map_limits,
    read_hello,
    refusal_message,
    refuse,
    request_from_dict,
    request_to_dict,
)
from hast.messages import (
    HANDSHAKE_LIMIT,
    SPLIT_BRAIN,
    DataInfo,
    Handshake1Request,
    Handshake2Reply,
    Handshake2Request,
    PeerSizes,
    Refusal,
    SyncSource,
    encode_payload,
    pack_message,
    unpack_message,
)
from hast.metadata import Metadata, Pair
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.strategies import MESSAGE_NVS, U64

PEER = "tcp4://192.0.2.7:8457"
TOKEN = bytes(range(16))
UID = 8812064633014397473
# The component of the captures: 64 MiB, extents of 2 MiB.
CAPTURED = Metadata("data", 67104256, 2 << 20, 64, 4608, resuid=UID)
EXTENTS = extent_count(CAPTURED.datasize, CAPTURED.extentsize)
COUNTERS = st.integers(0, 3) | U64


def extended(message: bytes) -> bytes:
    """A captured message without data, with the element that we add to it: ours stands last."""
    nv = nv_of(message)
    nv.add_uint8("hast", 1)
    return pack_message(version_of(message), nv)


def without_token(agreement: Agreement) -> Agreement:
    assert agreement.token == TOKEN and not agreement.hast  # of a captured secondary
    return replace(agreement, token=b"")


def nv_of(message: bytes) -> Nv:
    return unpack_message(message, HANDSHAKE_LIMIT)[1]


def version_of(message: bytes) -> int:
    return unpack_message(message, HANDSHAKE_LIMIT)[0].version


def element(name: str, vector: str) -> int | bytes | str:
    return next(value for found, _, value in vectors.load(vector).elements if found == name)


def number(name: str, vector: str) -> int:
    value = element(name, vector)
    assert isinstance(value, int)
    return value


def primary(metadata: Metadata = CAPTURED, *, version: int = 2, virgin: bool = False) -> PrimaryHandshake:
    """A primary that has had the answer to step 1."""
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    handshake.first_reply(nv_of(accept_first(Handshake1Request("data", version), TOKEN)[1]))
    return handshake


def second(metadata: Metadata = CAPTURED, virgin: bool = False) -> Handshake2Request:
    """What that primary sends in step 2."""
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    message = handshake.first_reply(nv_of(accept_first(Handshake1Request("data", 2), TOKEN)[1]))
    request = read_hello(nv_of(message))
    assert isinstance(request, Handshake2Request)
    return request


def foreign(metadata: Metadata = CAPTURED, virgin: bool = False) -> Handshake2Request:
    """What FreeBSD's primary sends in step 2."""
    return replace(second(metadata, virgin), hast=False)


def answer(
    request: Handshake2Request,
    metadata: Metadata,
    bits: bytes | None = None,
    *,
    version: int = 2,
    packing: str = compression.HOLE,
    algorithm: str = checksum.NONE,
) -> SecondaryAnswer:
    own = bytes(metadata.mapsize) if bits is None else bits
    return answer_second(request, version, metadata, lambda: own, packing, algorithm)


def finish(handshake: PrimaryHandshake, message: bytes) -> Agreement:
    """The primary takes the whole answer to step 2."""
    _, nv, data = unpack_message(message, HANDSHAKE_LIMIT)
    assert handshake.second_reply(nv) == len(data)
    return handshake.finish(data)


# Captured messages, byte for byte.


def test_captured_step_1_of_a_primary() -> None:
    vector = vectors.load("hs1_primary_to_secondary")
    assert PrimaryHandshake(CAPTURED, PEER).first() == vector.normal
    assert read_hello(nv_of(vector.raw)) == Handshake1Request("data", 2)


def test_a_primary_that_was_connected_sends_step_1_with_the_version_in_force() -> None:
    vector = vectors.load("hs1_primary_to_secondary")
    message = PrimaryHandshake(CAPTURED, PEER, version=2).first()
    assert message == b"\x02" + vector.normal[1:]


@pytest.mark.parametrize(
    ("name", "highest", "in_force"),
    [
        ("hs1_secondary_to_primary", 2, 2),
        ("hs1_reply_version_fallback", 9, 2),
        ("hs1_reply_no_version", None, 1),
    ],
)
def test_captured_answers_to_step_1(name: str, highest: int | None, in_force: int) -> None:
    vector = vectors.load(name)
    hello = Nv()
    hello.add_string("resource", "data")
    if highest is not None:
        hello.add_uint8("version", highest)
    request = read_hello(hello)
    assert isinstance(request, Handshake1Request)
    token = element("token", name)
    assert isinstance(token, bytes)
    assert accept_first(request, token) == (in_force, vector.normal)
    handshake = PrimaryHandshake(CAPTURED, PEER)
    message = handshake.first_reply(nv_of(vector.raw))
    assert handshake.version == version_of(message) == in_force
    sent = read_hello(nv_of(message))
    assert isinstance(sent, Handshake2Request) and sent.token == token


@pytest.mark.parametrize(
    ("name", "role", "allowed", "wait"),
    [
        ("hs1_error_role_init", Role.INIT, True, False),
        ("hs1_error_wrong_role_wait", Role.PRIMARY, True, True),
        ("hs1_error_unknown_resource", None, True, False),
        ("hs1_error_unknown_resource", None, False, False),
    ],
)
def test_captured_refusals_of_step_1(name: str, role: Role | None, allowed: bool, wait: bool) -> None:
    vector = vectors.load(name)
    refusal = refuse(role, allowed)
    assert refusal is not None
    assert refusal_message(refusal) == vector.normal
    with pytest.raises(RefusedError) as refused:
        PrimaryHandshake(CAPTURED, PEER).first_reply(nv_of(vector.raw))
    assert (refused.value.text, refused.value.wait) == (element("errmsg", name), wait)
    assert not refused.value.split_brain
    assert str(refused.value) == f"data: {PEER} refuses the connection: {element('errmsg', name)}"


@pytest.mark.parametrize("role", list(Role))
def test_a_resource_of_another_node_is_refused_whatever_the_role(role: Role) -> None:
    assert refuse(role, allowed=False) == Refusal("No access to the resource.")


def test_a_secondary_refuses_nobody_that_may_connect() -> None:
    assert refuse(Role.SECONDARY, allowed=True) is None


@pytest.mark.parametrize(
    ("name", "virgin", "pair"),
    [
        ("hs2_primary_to_secondary_virgin", True, Pair()),
        ("hs2_primary_to_secondary", False, Pair(1, 0)),
        ("hs2_primary_to_secondary_splitbrain", False, Pair(1, 0)),
    ],
)
def test_captured_step_2_of_a_primary(name: str, virgin: bool, pair: Pair) -> None:
    vector = vectors.load(name)
    metadata = replace(CAPTURED, resuid=number("resuid", name), pair=pair)
    token = element("token", name)
    assert isinstance(token, bytes)
    handshake = PrimaryHandshake(metadata, PEER, virgin=virgin)
    sent = handshake.first_reply(nv_of(accept_first(Handshake1Request("data"), token)[1]))
    assert sent == extended(vector.normal)  # FreeBSD ignores what it does not know
    request = read_hello(nv_of(vector.raw))
    assert request == Handshake2Request("data", token, metadata.resuid, *pair_of(pair), virgin)


def pair_of(pair: Pair) -> tuple[int, int]:
    return pair.localcnt, pair.remotecnt


def test_captured_answer_of_a_virgin_secondary() -> None:
    vector = vectors.load("hs2_secondary_to_primary_virgin")
    made = answer(foreign(virgin=True), replace(CAPTURED, resuid=0))
    assert made.message == vector.normal
    assert made.accepted and made.metadata == CAPTURED and made.map is None
    agreement = finish(primary(virgin=True), vector.raw)
    assert without_token(agreement) == Agreement(
        2, SyncSource.PRIMARY, Pair(), True, None, replace(CAPTURED, pair=Pair(1, 0))
    )


def test_captured_answer_with_an_empty_map() -> None:
    vector = vectors.load("hs2_secondary_to_primary_activemap")
    made = answer(foreign(replace(CAPTURED, pair=Pair(1, 0))), CAPTURED)
    assert made.message == vector.normal
    assert made.accepted and made.metadata == CAPTURED and made.map is None
    agreement = finish(primary(), vector.raw)
    assert without_token(agreement) == Agreement(2, SyncSource.PRIMARY, Pair(), False, bytes(512), CAPTURED)


def test_captured_answer_of_a_newer_secondary() -> None:
    vector = vectors.load("hs2_secondary_to_primary_activemap_syncsrc_secondary")
    made = answer(foreign(), replace(CAPTURED, pair=Pair(1, 0)), vector.data)
    assert made.decision.outcome is Outcome.SECONDARY_NEWER
    assert made.message == vector.normal
    agreement = finish(primary(), vector.raw)
    assert without_token(agreement) == Agreement(2, SyncSource.SECONDARY, Pair(1, 0), False, vector.data, CAPTURED)


def test_captured_split_brain() -> None:
    vector = vectors.load("hs2_error_splitbrain")
    own = replace(CAPTURED, pair=Pair(1, 0))
    made = answer(second(own), own)
    assert made.message == vector.normal
    assert not made.accepted and made.split_brain and made.metadata == own and made.map is None
    with pytest.raises(RefusedError) as refused:
        primary(own).second_reply(nv_of(vector.raw))
    assert refused.value.split_brain and not refused.value.wait and refused.value.text == SPLIT_BRAIN


def test_captured_mismatch_of_unique_ids() -> None:
    vector = vectors.load("hs2_error_resuid_mismatch")
    own = replace(CAPTURED, resuid=1234605616436508552)
    made = answer(second(), own)
    assert made.message == vector.normal
    assert not made.accepted and not made.split_brain and made.metadata == own
    with pytest.raises(RefusedError) as refused:
        primary().second_reply(nv_of(vector.raw))
    assert refused.value.text == element("errmsg", "hs2_error_resuid_mismatch")
    assert not refused.value.split_brain


def test_captured_token_mismatch() -> None:
    vector = vectors.load("hs2_error_token_mismatch")
    for token in (None, bytes(16), TOKEN[::-1]):
        refusal = check_token(second(), token)
        assert refusal is not None and refusal_message(refusal) == vector.normal
    assert check_token(second(), TOKEN) is None
    with pytest.raises(RefusedError) as refused:
        primary().second_reply(nv_of(vector.raw))
    assert refused.value.text == "Token doesn't match."


def test_version_1_is_in_the_main_header_of_all_that_follows_it() -> None:
    request = Handshake1Request("data", 1)
    version, message = accept_first(request, TOKEN)
    assert version == 1 and version_of(message) == 1
    handshake = PrimaryHandshake(CAPTURED, PEER)
    assert version_of(handshake.first_reply(nv_of(message))) == 1
    accepted = answer(second(), CAPTURED, version=1)
    assert version_of(accepted.message) == 1
    assert finish(handshake, accepted.message).version == 1
    assert version_of(answer(second(), replace(CAPTURED, resuid=1), version=1).message) == 1


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
    assert made.metadata == replace(CAPTURED, pair=told, syncing=expected.target)
    assert (agreement.syncsrc, agreement.secondary) == (expected.syncsrc, told)
    assert agreement.virgin is expected.virgin is (own_uid == 0)
    raised = own_uid == 0 and theirs.localcnt == 0
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


# What a primary refuses.


def reply(mapsize: int = 512, bits: bytes | None = None, **changes: object) -> bytes:
    """An answer to step 2 with a map of so many zeros, or with bits."""
    payload, info = encode_payload(bytes(mapsize) if bits is None else bits, compression.NONE, checksum.NONE)
    made = Handshake2Reply(PeerSizes(67104256, 2097152, 0, 0), SyncSource.PRIMARY, False, mapsize, info)
    return pack_message(2, replace(made, **changes).to_nv(), payload)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (PeerSizes(67104768, 2097152, 0, 0), r"another data size \(67104768 bytes, here it is 67104256\)"),
        (PeerSizes(67103744, 2097152, 0, 0), "another data size"),
        (PeerSizes(67104256, 1048576, 0, 0), r"another extent size \(1048576 bytes, here it is 2097152\)"),
    ],
)
def test_another_geometry_is_refused(sizes: PeerSizes, text: str) -> None:
    with pytest.raises(MismatchError, match=text) as raised:
        primary().second_reply(nv_of(reply(sizes=sizes)))
    assert str(raised.value).startswith(f"data: {PEER} has another ")


@pytest.mark.parametrize(("datasize", "extentsize"), [(0, 2097152), (-512, 2097152), (67104256, 0), (67104256, -1)])
def test_a_geometry_that_cannot_be_is_refused(datasize: int, extentsize: int) -> None:
    with pytest.raises(DataError):
        primary().second_reply(nv_of(reply(sizes=PeerSizes(datasize, extentsize, 0, 0))))


@pytest.mark.parametrize("mapsize", [1, 3, 131073, 1 << 30, 2**32 - 1])
def test_a_map_of_another_size_is_refused_before_it_is_read(mapsize: int) -> None:
    nv = nv_of(reply(mapsize, b"x", data=DataInfo(4, compression.HOLE)))
    with pytest.raises(DataError, match=f"an activemap of {mapsize} bytes, from 4 to 65536 can be"):
        primary().second_reply(nv)


@pytest.mark.parametrize("mapsize", [4, 512, 4096, 65536])
def test_a_map_rounded_up_to_other_sectors_is_taken(mapsize: int) -> None:
    bits = b"\x81".ljust(mapsize, b"\xff")
    agreement = finish(primary(), reply(mapsize, bits))
    assert agreement.map == (b"\x81\xff\xff\xff").ljust(512, b"\0")  # bits behind the last extent are gone


def test_limits_of_maps_hold_what_any_component_of_that_size_has() -> None:
    for sector in (512, 4096, 65536):
        for extentsize in (512, 65536, 2 << 20, 1 << 30):
            data = 10 << 30
            bits = -(-data // extentsize)
            least = -(-bits // 8)
            mapsize = -(-least // sector) * sector
            metadata = replace(CAPTURED, datasize=data, extentsize=extentsize, offset=4096 + mapsize)
            assert mapsize in map_limits(metadata) and least in map_limits(metadata)
            assert max(map_limits(metadata)) <= 2 * mapsize + 2 * 65536


@pytest.mark.parametrize(
    "changes",
    [
        {"data": DataInfo(511)},
        {"data": DataInfo(513)},
        {"data": DataInfo(0)},
        {"data": DataInfo(4)},
        {"data": DataInfo(517, compression.LZF)},
        {"data": DataInfo(5, compression.HOLE)},
        {"mapsize": 0, "data": DataInfo(512)},
    ],
)
def test_sizes_that_contradict_each_other_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(DataError, match="bytes"):
        primary().second_reply(nv_of(reply(**changes)))  # type: ignore[arg-type]


def test_a_short_or_damaged_map_is_refused() -> None:
    handshake = primary()
    _, nv, data = unpack_message(reply(), HANDSHAKE_LIMIT)
    handshake.second_reply(nv)
    for wrong in (data[:-1], b"", data + b"x"):
        with pytest.raises(DataError, match="512 were announced"):
            handshake.finish(wrong)
    made = answer(second(), CAPTURED, b"\1" + bytes(511), algorithm=checksum.CRC32)
    _, nv, data = unpack_message(made.message, HANDSHAKE_LIMIT)
    handshake.second_reply(nv)
    with pytest.raises(DataError, match="checksum mismatch"):
        handshake.finish(b"\2" + data[1:])


@pytest.mark.parametrize("source", [0, 3, 255])
def test_an_unknown_source_is_refused(source: int) -> None:
    nv = Nv([e if e.name != "syncsrc" else replace(e, value=source) for e in nv_of(reply())])
    with pytest.raises(DataError, match=f"names {source} as synchronisation source"):
        primary().second_reply(nv)


@pytest.mark.parametrize(
    ("syncsrc", "virgin", "we_are_virgin", "everything"),
    [
        (SyncSource.PRIMARY, True, True, False),
        (SyncSource.PRIMARY, False, False, False),
        (SyncSource.PRIMARY, True, False, True),  # it lacks all that we have
        (SyncSource.SECONDARY, False, False, True),  # it is newer, and does not say where
    ],
)
def test_a_map_that_is_missing(syncsrc: SyncSource, virgin: bool, we_are_virgin: bool, everything: bool) -> None:
    message = reply(0, b"", syncsrc=syncsrc, virgin=virgin)
    bits = finish(primary(virgin=we_are_virgin), message).map
    assert (bits is not None and count_dirty(bits, EXTENTS) == EXTENTS) if everything else bits is None


@pytest.mark.parametrize("version", [0, 3, 9, 255])
def test_a_version_that_nobody_offered_is_refused(version: int) -> None:
    message = Nv()
    message.add_uint8("version", version)
    message.add_uint8_array("token", TOKEN)
    with pytest.raises(DataError, match=f"version {version}"):
        PrimaryHandshake(CAPTURED, PEER).first_reply(message)


@pytest.mark.parametrize("size", [1, 15, 17, 64])
def test_a_token_of_another_size_is_refused(size: int) -> None:
    message = Nv()
    message.add_uint8("version", 2)
    message.add_uint8_array("token", bytes(size))
    with pytest.raises(DataError, match="token"):
        PrimaryHandshake(CAPTURED, PEER).first_reply(message)
    message.add_string("resource", "data")
    message.add_uint64("resuid", 1)
    with pytest.raises(DataError, match="token"):
        read_hello(message)


def test_a_refusal_is_one_line_of_bounded_length() -> None:
    refused = RefusedError("data", PEER, Refusal("no\n\x1b[31m" + "x" * 5000))
    assert "\n" not in str(refused) and "\x1b" not in str(refused) and len(str(refused)) < 400


def test_split_brain_is_that_very_text() -> None:
    assert RefusedError("data", PEER, Refusal(SPLIT_BRAIN)).split_brain
    for text in ("Split-brain condition", "split-brain condition!", "Split-brain condition! "):
        assert not RefusedError("data", PEER, Refusal(text)).split_brain


# Garbage, and the way from main to the worker.


@given(MESSAGE_NVS)
def test_any_nv_is_a_hello_or_is_refused(nv: Nv) -> None:
    try:
        hello = read_hello(nv)
    except DataError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(hello, Handshake2Request) is ("token" in nv)


@given(MESSAGE_NVS, st.binary(max_size=600))
def test_any_answer_is_taken_or_refused(nv: Nv, data: bytes) -> None:
    """Nothing but the errors that the caller expects, and never a map of another size."""
    for start in (PrimaryHandshake(CAPTURED, PEER), primary()):
        try:
            start.first_reply(nv)
        except (DataError, RefusedError) as error:
            assert "\n" not in str(error)
        try:
            size = start.second_reply(nv)
            assert 0 <= size <= 65540
            bits = start.finish(data).map
            assert bits is None or len(bits) == CAPTURED.mapsize
        except (DataError, RefusedError, MismatchError) as error:
            assert "\n" not in str(error)


@given(st.integers(0, 600), st.integers(0, 255), st.integers(0, 3))
def test_damaged_answers_are_taken_or_refused(at: int, value: int, which: int) -> None:
    """A byte of a captured answer changed."""
    vector = vectors.load(vectors.names("hs2_secondary_to_primary")[which % 3])
    raw = bytearray(vector.raw)
    raw[5 + at % (len(raw) - 5)] = value
    header, data = bytes(raw[5 : 5 + len(vector.header)]), bytes(raw[5 + len(vector.header) :])
    handshake = primary()
    try:
        handshake.second_reply(decode(header))
        bits = handshake.finish(data).map
        assert bits is None or len(bits) == CAPTURED.mapsize
    except (DataError, RefusedError, MismatchError) as error:
        assert "\n" not in str(error)


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
        assert found.metadata == replace(own, syncing=doubt and hast)
