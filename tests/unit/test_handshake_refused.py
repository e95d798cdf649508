"""The handshake: what is refused, and garbage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import checksum, compression
from hast.activemap import count_dirty
from hast.errors import DataError
from hast.handshake import MismatchError, PrimaryHandshake, RefusedError, map_limits, read_hello
from hast.messages import (
    HANDSHAKE_LIMIT,
    SPLIT_BRAIN,
    DataInfo,
    Handshake2Reply,
    Handshake2Request,
    PeerSizes,
    Refusal,
    SyncSource,
    encode_payload,
    pack_message,
    unpack_message,
)
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.handshakes import CAPTURED, EXTENTS, PEER, TOKEN, answer, finish, nv_of, primary, second
from tests.unit.strategies import MESSAGE_NVS

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


# Garbage.


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
