"""Peer messages: limits, required elements, error numbers, the data pipeline."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import checksum, errnos
from hast.errors import DataError, ProtocolError
from hast.messages import (
    HANDSHAKE_LIMIT,
    REQUEST_LIMIT,
    Cmd,
    DataInfo,
    Handshake1Reply,
    Handshake1Request,
    Handshake2Reply,
    Handshake2Request,
    MainHeader,
    PeerSizes,
    Refusal,
    Reply,
    Request,
    SyncSource,
    check_request,
    decode_payload,
    encode_payload,
    negotiate,
    pack_message,
    parse_handshake1_reply,
    parse_handshake2_reply,
    parse_main_header,
    unpack_message,
    wrong_role_text,
)
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.strategies import MESSAGE_NVS, U64, replies, requests

PARSERS = (
    Request.from_nv,
    Reply.from_nv,
    Handshake1Request.from_nv,
    Handshake2Request.from_nv,
    parse_handshake1_reply,
    parse_handshake2_reply,
)


def test_main_header() -> None:
    assert parse_main_header(b"\x02\x16\0\0\0rest", REQUEST_LIMIT) == MainHeader(2, 22)
    assert parse_main_header(b"\x01" + REQUEST_LIMIT.to_bytes(4, "little"), REQUEST_LIMIT).version == 1
    assert MainHeader(2, 22).pack() == b"\x02\x16\0\0\0"
    with pytest.raises(DataError, match="65537"):
        parse_main_header(b"\x02" + (REQUEST_LIMIT + 1).to_bytes(4, "little"), REQUEST_LIMIT)
    with pytest.raises(ProtocolError, match="version 3"):
        parse_main_header(b"\x03\x16\0\0\0", REQUEST_LIMIT)
    with pytest.raises(ProtocolError, match="version 2"):
        parse_main_header(b"\x02\x16\0\0\0", REQUEST_LIMIT, highest=1)
    with pytest.raises(DataError, match="4 bytes"):
        parse_main_header(b"\x02\x16\0\0", REQUEST_LIMIT)


@pytest.mark.parametrize("cut", [0, 4, 5, 6, 26])
def test_a_message_that_ends_early(cut: int) -> None:
    with pytest.raises(DataError, match="ends after"):
        unpack_message(vectors.load("keepalive").raw[:cut], REQUEST_LIMIT)


def test_a_message_too_large_to_send() -> None:
    nv = Nv()
    nv.add_string("resource", "x" * 100)
    with pytest.raises(DataError, match="larger than"):
        pack_message(2, nv, limit=100)


@given(requests())
def test_requests_round_trip(request: Request) -> None:
    raw = pack_message(2, request.to_nv(), limit=REQUEST_LIMIT)
    assert Request.from_nv(unpack_message(raw, REQUEST_LIMIT)[1]) == request


@given(replies())
def test_replies_round_trip(reply: Reply) -> None:
    raw = pack_message(2, reply.to_nv(), limit=REQUEST_LIMIT)
    assert Reply.from_nv(unpack_message(raw, REQUEST_LIMIT)[1]) == reply


@given(st.text("abc/._-", min_size=1), st.binary(min_size=16, max_size=16), U64, U64, U64, st.booleans())
def test_handshake_requests_round_trip(
    name: str, token: bytes, resuid: int, local: int, remote: int, virgin: bool
) -> None:
    first = Handshake1Request(name, 2)
    assert Handshake1Request.from_nv(decode(first.to_nv().encode())) == first
    if resuid:
        second = Handshake2Request(name, token, resuid, local, remote, virgin)
        assert Handshake2Request.from_nv(decode(second.to_nv().encode())) == second


@given(MESSAGE_NVS)
def test_any_nv_gives_a_message_or_data_error(nv: Nv) -> None:
    for parse in PARSERS:
        try:
            message = parse(nv)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert parse(message.to_nv()) == message or isinstance(message, Request | Reply)


@given(st.binary(max_size=300))
def test_any_bytes_give_a_message_or_an_error(raw: bytes) -> None:
    try:
        _, nv, _ = unpack_message(raw, HANDSHAKE_LIMIT)
    except (DataError, ProtocolError):
        return
    assert isinstance(nv, Nv)


def without(nv: Nv, name: str) -> Nv:
    return Nv([element for element in nv if element.name != name])


WRITE = Request(Cmd.WRITE, 1, 4096, 512, True, DataInfo(512))


@pytest.mark.parametrize("name", ["cmd", "seq", "offset", "length", "size"])
def test_a_write_needs_each_element(name: str) -> None:
    with pytest.raises(DataError):
        Request.from_nv(without(WRITE.to_nv(), name))


def test_a_flush_may_leave_out_offset_and_length() -> None:
    flush = Request(Cmd.FLUSH, 1)
    assert Request.from_nv(without(without(flush.to_nv(), "offset"), "length")) == flush


def test_a_keepalive_is_only_a_command() -> None:
    assert [element.name for element in Request(Cmd.KEEPALIVE).to_nv()] == ["cmd"]
    assert Request.from_nv(Request(Cmd.KEEPALIVE).to_nv()) == Request(Cmd.KEEPALIVE)


@pytest.mark.parametrize(
    "request_",
    [
        replace(WRITE, seq=0),
        replace(WRITE, data=DataInfo()),
        Request(Cmd.READ, 1, 0, 512, data=DataInfo(4)),
        Request(Cmd.FLUSH, 1, data=DataInfo(4)),
    ],
)
def test_requests_that_cannot_be(request_: Request) -> None:
    with pytest.raises(DataError):
        Request.from_nv(request_.to_nv())


def test_a_reply_needs_its_seq() -> None:
    with pytest.raises(DataError, match="missing"):
        Reply.from_nv(Nv())
    with pytest.raises(DataError, match="seq 0"):
        Reply.from_nv(Reply(0).to_nv())


@pytest.mark.parametrize(
    ("algorithm", "hash_"), [("crc32", b"123"), ("sha256", bytes(31)), ("md5", bytes(16)), ("none", b"1")]
)
def test_hashes_that_do_not_fit(algorithm: str, hash_: bytes) -> None:
    with pytest.raises(DataError):
        Reply.from_nv(Reply(1, data=DataInfo(4, "none", algorithm, hash_)).to_nv() if algorithm != "none"
                      else _reply_with_checksum_none(hash_))  # fmt: skip


def _reply_with_checksum_none(hash_: bytes) -> Nv:
    nv = Reply(1).to_nv()
    nv.add_string("checksum", "none")
    nv.add_uint8_array("hash", hash_)
    return nv


@pytest.mark.parametrize("name", ["none", "zstd", ""])
def test_unknown_compression_is_refused(name: str) -> None:
    nv = Reply(1).to_nv()
    nv.add_string("compression", name)
    with pytest.raises(DataError, match="compression"):
        Reply.from_nv(nv)


M = 1 << 20


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (Request(Cmd.READ, 1, 0, 512), 0),
        (Request(Cmd.READ, 1, 8 * M - 512, 512), 0),
        (Request(Cmd.READ, 1, 8 * M, 512), errno.EINVAL),
        (Request(Cmd.READ, 1, 2**64 - 512, 512), errno.EINVAL),
        (Request(Cmd.READ, 1, 512, 2**64 - 512), errno.EINVAL),
        (Request(Cmd.READ, 1, 0, 0), errno.EINVAL),
        (Request(Cmd.READ, 1, 1, 512), errno.EINVAL),
        (Request(Cmd.READ, 1, 0, 511), errno.EINVAL),
        (Request(Cmd.READ, 1, 0, M), 0),
        (Request(Cmd.READ, 1, 0, M + 512), errno.EINVAL),
        (Request(Cmd.DELETE, 1, 0, 8 * M), 0),
        (Request(Cmd.DELETE, 1, 512, 8 * M), errno.EINVAL),
        (Request(Cmd.FLUSH, 1), 0),
        (Request(Cmd.KEEPALIVE), 0),
        (Request(0, 1, 0, 512), errno.EINVAL),
        (Request(6, 1, 0, 512), errno.EINVAL),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(512)), 0),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(511)), errno.EINVAL),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(4, "hole")), 0),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(5, "hole")), errno.EINVAL),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(5, "lzf")), 0),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(516, "lzf")), 0),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(4, "lzf")), errno.EINVAL),
        (Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(517, "lzf")), errno.EINVAL),
    ],
)
def test_check_request(request_: Request, error: int) -> None:
    assert check_request(request_, 8 * M, 512) == error


# Data.


@given(
    st.binary(min_size=1, max_size=3000) | st.integers(1, 3000).map(bytes),
    st.sampled_from(("none", "hole", "lzf")),
    st.sampled_from(("none", "crc32", "sha256")),
)
def test_data_round_trips(data: bytes, packing: str, algorithm: str) -> None:
    payload, info = encode_payload(data, packing, algorithm)
    assert len(payload) == info.size
    assert decode_payload(payload, info, len(data)) == data


@pytest.mark.parametrize("algorithm", ["crc32", "sha256"])
def test_a_flipped_bit_is_noticed(algorithm: str) -> None:
    payload, info = encode_payload(b"data" * 128, "none", algorithm)
    with pytest.raises(DataError, match="mismatch"):
        decode_payload(bytes((payload[0] ^ 1,)) + payload[1:], info, 512)


def test_checksums_are_the_known_ones() -> None:
    assert checksum.digest("crc32", b"123456789") == (0xCBF43926).to_bytes(4, "little")
    assert checksum.digest("sha256", b"").hex().startswith("e3b0c44298fc1c14")
    with pytest.raises(DataError, match="md5"):
        checksum.digest("md5", b"")


def test_data_of_another_size_is_refused() -> None:
    payload, info = encode_payload(b"x" * 512, "none", "none")
    with pytest.raises(DataError):
        decode_payload(payload[:-1], info, 512)
    with pytest.raises(DataError):
        decode_payload(payload, info, 1024)


# Error numbers.


def test_errors_are_translated() -> None:
    for name, number in (("EOPNOTSUPP", 45), ("ENOTCONN", 57), ("ETIMEDOUT", 60), ("EAGAIN", 35),
                         ("EDEADLK", 11), ("ENOSPC", 28), ("EIO", 5), ("ECANCELED", 85)):  # fmt: skip
        local = getattr(errno, name)
        assert errnos.to_wire(local) == number
        assert errnos.from_wire(number) == local
        nv = Reply(1, error=local).to_nv()
        assert nv.get_int16("error") == number
        assert Reply.from_nv(nv).error == local


def test_the_table_has_every_error_of_both_sides() -> None:
    """Everything above 34 that this host has and FreeBSD too; the rest is Linux's alone."""
    only_here = {
        "EADV", "EBADE", "EBADFD", "EBADR", "EBADRQC", "EBADSLT", "EBFONT", "ECHRNG", "ECOMM", "EDOTDOT",
        "EISNAM", "EKEYEXPIRED", "EKEYREJECTED", "EKEYREVOKED", "EL2HLT", "EL2NSYNC", "EL3HLT", "EL3RST",
        "ELIBACC", "ELIBBAD", "ELIBEXEC", "ELIBMAX", "ELIBSCN", "ELNRNG", "EMEDIUMTYPE", "ENAVAIL", "ENOANO",
        "ENOCSI", "ENODATA", "ENOKEY", "ENOMEDIUM", "ENONET", "ENOPKG", "ENOSR", "ENOSTR", "ENOTNAM",
        "ENOTUNIQ", "EREMCHG", "EREMOTEIO", "ERESTART", "ERFKILL", "ESRMNT", "ESTRPIPE", "ETIME", "EUCLEAN",
        "EUNATCH", "EXFULL", "EHWPOISON",
    }  # fmt: skip
    same_number = {"EWOULDBLOCK", "EDEADLOCK", "ENOTSUP"}
    for number, name in errno.errorcode.items():
        if (number > 34 or number == 11) and name not in only_here | same_number:
            assert errnos.from_wire(errnos.to_wire(number)) == number, name
    for name in only_here:
        if hasattr(errno, name):
            assert errnos.to_wire(getattr(errno, name)) == 5


@given(st.integers(-(2**15), 2**15 - 1))
def test_an_error_is_never_lost(number: int) -> None:
    assert (errnos.from_wire(number) == 0) == (number == 0)
    assert (errnos.to_wire(number) == 0) == (number == 0)


def test_unknown_errors_are_eio() -> None:
    for number in (-1, -32768, 81, 97, 9999):
        assert errnos.from_wire(number) == errno.EIO
        assert errnos.to_wire(number + 100000) == 5


# Handshake.


def test_version_is_the_lower_one() -> None:
    assert [negotiate(n) for n in (1, 2, 9, 255)] == [1, 2, 2, 2]
    assert Handshake1Request.from_nv(without(Handshake1Request("data").to_nv(), "version")).version == 1


def test_refusals() -> None:
    refusal = Refusal(wrong_role_text("primary"), wait=True)
    assert parse_handshake1_reply(refusal.to_nv()) == refusal
    assert vectors.load("hs1_error_wrong_role_wait").elements[0][2] == refusal.errmsg


SIZES = PeerSizes(64 * M, 2 * M, 0, 0)
ANSWER = Handshake2Reply(SIZES, SyncSource.PRIMARY, mapsize=512, data=DataInfo(512))


@pytest.mark.parametrize(
    "reply",
    [
        replace(ANSWER, data=DataInfo()),
        replace(ANSWER, mapsize=0),
        replace(ANSWER, mapsize=1024),
        replace(ANSWER, data=DataInfo(5, "hole")),
        replace(ANSWER, sizes=replace(SIZES, datasize=0)),
        replace(ANSWER, sizes=replace(SIZES, datasize=-512)),
        replace(ANSWER, sizes=replace(SIZES, extentsize=-1)),
        replace(ANSWER, syncsrc=3),  # type: ignore[arg-type]
        replace(ANSWER, syncsrc=0),  # type: ignore[arg-type]
    ],
)
def test_handshake_replies_that_cannot_be(reply: Handshake2Reply) -> None:
    assert parse_handshake2_reply(ANSWER.to_nv()) == ANSWER
    with pytest.raises(DataError):
        parse_handshake2_reply(reply.to_nv())


def test_tokens_have_sixteen_bytes() -> None:
    with pytest.raises(DataError, match="15 bytes"):
        parse_handshake1_reply(Handshake1Reply(2, bytes(15)).to_nv())
    with pytest.raises(DataError, match="17 bytes"):
        Handshake2Request.from_nv(Handshake2Request("data", bytes(17), 1, 0, 0).to_nv())


def test_versions_and_resuids_that_cannot_be() -> None:
    for version in (0, 3):
        with pytest.raises(DataError, match="version"):
            parse_handshake1_reply(Handshake1Reply(version, bytes(16)).to_nv())
    with pytest.raises(DataError, match="version 0"):
        Handshake1Request.from_nv(Handshake1Request("data", 0).to_nv())
    with pytest.raises(DataError, match="unique ID 0"):
        Handshake2Request.from_nv(Handshake2Request("data", bytes(16), 0, 0, 0).to_nv())
