"""Every captured message and block decodes to what its comment says and re-encodes to the same bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hast import activemap, metadata
from hast.compression import HOLE, LZF, NONE
from hast.control import ControlRequest, Role, RoleReply, StatusReply
from hast.messages import (
    HANDSHAKE_LIMIT,
    DataInfo,
    Handshake1Reply,
    Handshake1Request,
    Handshake2Reply,
    Handshake2Request,
    Refusal,
    Reply,
    Request,
    decode_payload,
    encode_payload,
    pack_message,
    parse_handshake1_reply,
    parse_handshake2_reply,
    unpack_message,
)
from hast.nv import Nv, decode
from tests import vectors

WITH_NV = [name for name in vectors.names() if not name.startswith("activemap")]
MESSAGES = [name for name in WITH_NV if not name.startswith("metadata")]
LENGTHS = {"read_reply": 131072, "read_reply_hole": 131072}  # what a read reply stands for
CLASSES = {
    "ctl_role_reply": RoleReply,
    "ctl_role_request": ControlRequest,
    "ctl_status_reply": StatusReply,
    "ctl_status_reply_unknown": StatusReply,
    "ctl_status_request": ControlRequest,
    "delete": Request,
    "delete_reply": Reply,
    "flush": Request,
    "flush_reply": Reply,
    "hs1_error_role_init": Refusal,
    "hs1_error_unknown_resource": Refusal,
    "hs1_error_wrong_role_wait": Refusal,
    "hs1_primary_to_secondary": Handshake1Request,
    "hs1_reply_no_version": Handshake1Reply,
    "hs1_reply_version_fallback": Handshake1Reply,
    "hs1_secondary_to_primary": Handshake1Reply,
    "hs2_error_resuid_mismatch": Refusal,
    "hs2_error_splitbrain": Refusal,
    "hs2_error_token_mismatch": Refusal,
    "hs2_primary_to_secondary": Handshake2Request,
    "hs2_primary_to_secondary_splitbrain": Handshake2Request,
    "hs2_primary_to_secondary_virgin": Handshake2Request,
    "hs2_secondary_to_primary_activemap": Handshake2Reply,
    "hs2_secondary_to_primary_activemap_syncsrc_secondary": Handshake2Reply,
    "hs2_secondary_to_primary_virgin": Handshake2Reply,
    "keepalive": Request,
    "read": Request,
    "read_reply": Reply,
    "read_reply_hole": Reply,
    "sync_write_dirty_extent": Request,
    "write_crc32": Request,
    "write_error_reply_fullsync": Reply,
    "write_error_reply_memsync": Reply,
    "write_fullsync": Request,
    "write_fullsync_reply": Reply,
    "write_hole_crc32": Request,
    "write_hole_memsync": Request,
    "write_lzf": Request,
    "write_lzf_sha256": Request,
    "write_memsync": Request,
    "write_memsync_reply1_received": Reply,
    "write_memsync_reply2_final": Reply,
    "write_sha256": Request,
    "write_zero_nocompression": Request,
}


def info_and_length(name: str) -> tuple[DataInfo, int]:
    """What the nv says about the data of a vector, and how many bytes that data stands for."""
    nv = decode(vectors.load(name).header)
    length = nv.get_uint32("mapsize", 0) or nv.get_uint64("length", LENGTHS.get(name, 0))
    return DataInfo.from_nv(nv), length


def test_the_table_of_classes_is_complete() -> None:
    assert sorted(CLASSES) == MESSAGES


@pytest.mark.parametrize("name", WITH_NV)
def test_nv_holds_what_the_comment_says(name: str) -> None:
    vector = vectors.load(name)
    found = tuple((e.name, e.type.label, e.value) for e in decode(vector.header))
    assert vector.elements, "the vector has no comment to compare with"
    assert found == vector.elements


@pytest.mark.parametrize("name", WITH_NV)
def test_nv_encodes_to_the_same_bytes(name: str) -> None:
    vector = vectors.load(name)
    expected = vectors.without_name_padding(vector.header)
    assert decode(vector.header).encode().ljust(len(expected), b"\0") == expected


@pytest.mark.parametrize("name", MESSAGES)
def test_message_survives_its_dataclass(name: str) -> None:
    vector = vectors.load(name)
    main, nv, data = unpack_message(vector.raw, HANDSHAKE_LIMIT)
    message = CLASSES[name].from_nv(nv)
    assert pack_message(main.version, message.to_nv(), data) == vector.normal
    assert CLASSES[name].from_nv(message.to_nv()) == message


@pytest.mark.parametrize("name", MESSAGES)
def test_data_has_the_announced_size(name: str) -> None:
    vector = vectors.load(name)
    assert len(vector.data) == decode(vector.header).get_uint32("size", 0)


@pytest.mark.parametrize("name", [name for name in MESSAGES if vectors.load(name).data])
def test_data_is_undone_and_made_again(name: str) -> None:
    vector = vectors.load(name)
    info, length = info_and_length(name)
    data = decode_payload(vector.data, info, length)
    assert len(data) == length
    assert encode_payload(data, info.compression, info.checksum) == (vector.data, info)


def test_payloads_are_those_of_the_comments() -> None:
    ramp = bytes((7 * i + 3) & 255 for i in range(4096))
    for name in ("write_memsync", "write_fullsync", "write_crc32", "write_sha256"):
        assert decode_payload(vectors.load(name).data, *info_and_length(name)) == ramp
    pangram = b"The quick brown fox jumps over the lazy dog. "
    for name in ("write_lzf", "write_lzf_sha256"):
        text = decode_payload(vectors.load(name).data, *info_and_length(name))
        assert text == (pangram * 100)[:4096]
    for name in ("write_hole_crc32", "write_hole_memsync", "write_zero_nocompression", "read_reply_hole"):
        assert not any(decode_payload(vectors.load(name).data, *info_and_length(name)))


def test_hole_is_tried_first_under_lzf_too() -> None:
    for name in ("write_hole_memsync", "read_reply_hole"):
        info, length = info_and_length(name)
        assert info.compression == HOLE
        assert encode_payload(bytes(length), LZF, NONE) == (vectors.load(name).data, info)


def test_handshake_replies_are_told_apart() -> None:
    for name, kind in CLASSES.items():
        nv = decode(vectors.load(name).header)
        if name.startswith(("hs1_reply", "hs1_secondary", "hs1_error")):
            assert isinstance(parse_handshake1_reply(nv), kind)
        if name.startswith(("hs2_secondary", "hs2_error")):
            assert isinstance(parse_handshake2_reply(nv), kind)


def test_activemap_of_the_handshake() -> None:
    name = "hs2_secondary_to_primary_activemap_syncsrc_secondary"
    bits = decode_payload(vectors.load(name).data, *info_and_length(name))
    assert list(activemap.dirty_ranges(bits, 32)) == [range(2, 3)]


@pytest.mark.parametrize("name", vectors.names("metadata"))
def test_metadata_block(name: str) -> None:
    vector = vectors.load(name)
    block = metadata.unpack(vector.raw, "data")
    assert block.pack() == vector.normal
    assert not block.syncing
    metadata.check_media(block, 64 << 20)
    values = {name: value for name, _, value in vector.elements}
    assert block.prevrole.text == values["prevrole"]
    assert (block.pair.localcnt, block.pair.remotecnt) == (values["localcnt"], values["remotecnt"])
    assert (block.resuid, block.offset, block.datasize) == (
        values["resuid"],
        values["offset"],
        values["datasize"],
    )


def test_created_component_is_metadata_init() -> None:
    layout = activemap.geometry(64 << 20, activemap.DEFAULT_EXTENTSIZE, activemap.FILE_SECTOR_SIZE)
    block = metadata.Metadata(
        resource="data",
        datasize=layout.datasize,
        extentsize=layout.extentsize,
        keepdirty=activemap.DEFAULT_KEEPDIRTY,
        offset=layout.offset,
    )
    assert block.pack() == vectors.load("metadata_init").raw


def test_first_write_alone_gives_metadata_primary_degraded() -> None:
    before = metadata.unpack(vectors.load("metadata_primary").raw, "data")
    after = replace(before, pair=metadata.Pair(1, 0))
    assert after.pack() == vectors.load("metadata_primary_degraded").normal


def test_activemap_block() -> None:
    raw = vectors.load("activemap_ondisk_primary").raw
    assert len(raw) == activemap.ondisk_size((64 << 20) - 4096, 2 << 20, 512)
    assert list(activemap.dirty_ranges(raw, 32)) == [range(1)]
    mine = bytearray(len(raw))
    activemap.set_bit(mine, 0)
    assert mine == raw


def test_control_requests_are_understood() -> None:
    role = ControlRequest.from_nv(decode(vectors.load("ctl_role_request").header))
    assert role == ControlRequest(1, ("data",), Role.PRIMARY)
    status = ControlRequest.from_nv(decode(vectors.load("ctl_status_request").header))
    assert status == ControlRequest(2, ("all",))


def test_normalising_changes_nothing_but_padding() -> None:
    nv = Nv()
    nv.add_uint8("cmd", 5)
    encoded = bytearray(nv.encode())
    assert vectors.without_name_padding(bytes(encoded)) == encoded
    encoded[6 + 5] = 0x55
    assert vectors.without_name_padding(bytes(encoded)) == nv.encode()
