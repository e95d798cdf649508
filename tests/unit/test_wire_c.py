"""The formats in C: equal to the Python ones, and never outside their buffers.

Input that C reads ends at an unreadable page, so that one byte too many is a crash; output has guard bytes
on both sides.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hast import compression, errnos, messages
from hast.errors import DataError, ProtocolError
from hast.ffi._hast import ffi, lib
from hast.messages import Cmd, DataInfo, Reply, Request, check_request, pack_message
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.strategies import MESSAGE_NVS, damaged, replies, requests
from tests.unit.test_compression import DATA, STREAMS, noise

COMPRESSIONS = ("none", "hole", "lzf")
CHECKSUMS = ("none", "crc32", "sha256")
PAGE = mmap.PAGESIZE
ROOM = 32 * PAGE
REQUESTS = [n for n in vectors.names() if n.startswith(("delete", "flush", "keepalive", "read", "sync", "write"))
            and "reply" not in n]  # fmt: skip
REPLIES = [n for n in vectors.names() if "reply" in n and not n.startswith(("ctl", "hs"))]


class Guarded:
    """Memory whose last readable byte is followed by a page that nobody may touch."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, ROOM + PAGE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + ROOM), ctypes.c_size_t(PAGE), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.end = ffi.cast("uint8_t *", address + ROOM)

    def put(self, data: bytes) -> Any:
        """A pointer to data, which ends where the readable memory ends."""
        assert len(data) <= ROOM
        start = self.end - len(data)
        ffi.memmove(start, data, len(data))
        return start


GUARDED = Guarded()


@contextmanager
def output(size: int) -> Iterator[Any]:
    """size bytes to write to; fails when what stands around them was changed."""
    around = 64
    buffer = ffi.new("uint8_t[]", b"\xa5" * (size + 2 * around))
    yield buffer + around
    raw = bytes(ffi.buffer(buffer, size + 2 * around))
    assert raw[:around] == raw[around + size :] == b"\xa5" * around, "bytes outside the buffer were written"


def c_data(info: DataInfo) -> dict[str, Any]:
    return {
        "size": info.size,
        "compression": COMPRESSIONS.index(info.compression),
        "checksum": CHECKSUMS.index(info.checksum),
        "hash": list(info.hash),
    }


def py_data(data: Any) -> DataInfo:
    hash_ = bytes(data.hash)
    size = lib.hast_wire_hash_size(data.checksum)
    assert not any(hash_[size:])
    return DataInfo(data.size, COMPRESSIONS[data.compression], CHECKSUMS[data.checksum], hash_[:size])


def c_request(request: Request) -> Any:
    r = request
    data = c_data(r.data)
    return ffi.new("struct hast_wire_request *", (r.seq, r.offset, r.length, r.cmd, r.memsync, data))


def c_reply(reply: Reply) -> Any:
    return ffi.new("struct hast_wire_reply *", (reply.seq, reply.error, reply.received, c_data(reply.data)))


def encode_request(request: Request, version: int = 2) -> bytes:
    with output(lib.HAST_WIRE_HEADER_MAX) as out:
        length = lib.hast_wire_encode_request(c_request(request), version, out, lib.HAST_WIRE_HEADER_MAX)
        assert length > 0
        return bytes(ffi.buffer(out, length))


def encode_reply(reply: Reply, version: int = 2) -> bytes:
    with output(lib.HAST_WIRE_HEADER_MAX) as out:
        length = lib.hast_wire_encode_reply(c_reply(reply), version, out, lib.HAST_WIRE_HEADER_MAX)
        assert length > 0
        return bytes(ffi.buffer(out, length))


def decode_request(nv: bytes) -> tuple[int, Request | None]:
    out = ffi.new("struct hast_wire_request *")
    error = lib.hast_wire_decode_request(GUARDED.put(nv), len(nv), out)
    if error != 0:
        return error, None
    return 0, Request(out.cmd, out.seq, out.offset, out.length, bool(out.memsync), py_data(out.data))


def decode_reply(nv: bytes) -> tuple[int, Reply | None]:
    out = ffi.new("struct hast_wire_reply *")
    error = lib.hast_wire_decode_reply(GUARDED.put(nv), len(nv), out)
    if error != 0:
        return error, None
    return 0, Reply(out.seq, bool(out.received), out.error, py_data(out.data))


@pytest.mark.parametrize("name", REQUESTS)
def test_captured_requests(name: str) -> None:
    vector = vectors.load(name)
    error, request = decode_request(vector.header)
    assert error == 0 and request == Request.from_nv(decode(vector.header))
    assert encode_request(request) + vector.data == vector.normal


@pytest.mark.parametrize("name", REPLIES)
def test_captured_replies(name: str) -> None:
    vector = vectors.load(name)
    error, reply = decode_reply(vector.header)
    assert error == 0 and reply == Reply.from_nv(decode(vector.header))
    assert encode_reply(reply) + vector.data == vector.normal


def test_there_are_captured_ones() -> None:
    assert len(REQUESTS) == 14 and len(REPLIES) == 9


@given(requests(), st.integers(0, 2))
def test_requests_are_written_as_python_does(request: Request, version: int) -> None:
    raw = encode_request(request, version)
    assert raw == pack_message(version, request.to_nv())
    assert decode_request(raw[5:]) == (0, request)


@given(replies(), st.integers(0, 2))
def test_replies_are_written_as_python_does(reply: Reply, version: int) -> None:
    raw = encode_reply(reply, version)
    assert raw == pack_message(version, reply.to_nv())
    assert decode_reply(raw[5:]) == (0, reply)


@given(requests(), replies(), st.integers(0, 300))
def test_a_small_buffer_is_never_overrun(request: Request, reply: Reply, cap: int) -> None:
    for encode, message, whole in (
        (lib.hast_wire_encode_request, c_request(request), encode_request(request)),
        (lib.hast_wire_encode_reply, c_reply(reply), encode_reply(reply)),
    ):
        with output(cap) as out:
            length = encode(message, 2, out, cap)
            if cap < len(whole):
                assert length == lib.HAST_WIRE_ESPACE
            else:
                assert bytes(ffi.buffer(out, length)) == whole


@pytest.mark.parametrize("field", ["compression", "checksum"])
def test_unknown_algorithms_are_not_written(field: str) -> None:
    request = c_request(Request(Cmd.WRITE, 1, 0, 512, data=DataInfo(512)))
    setattr(request.data, field, 3)
    with output(lib.HAST_WIRE_HEADER_MAX) as out:
        assert lib.hast_wire_encode_request(request, 2, out, 384) == lib.HAST_WIRE_EALGORITHM


CAPTURED = st.sampled_from([vectors.load(name).header for name in REQUESTS + REPLIES])
NV_BYTES = damaged(CAPTURED) | damaged(MESSAGE_NVS.map(Nv.encode)) | st.binary(max_size=200)
WITH_SEQ = MESSAGE_NVS.map(lambda nv: Nv([*_seq_and_cmd(), *nv]).encode())


def _seq_and_cmd() -> Nv:
    """The beginning of many messages, so that more of what follows is looked at."""
    nv = Nv()
    nv.add_uint8("cmd", 4)
    nv.add_uint64("seq", 1)
    return nv


@settings(max_examples=500)
@given(NV_BYTES | WITH_SEQ)
@example(b"")
@example(bytes(1000))
@example(b"\x02\x04\xff\xff\xff\xffcmd\0\0\0\0\0")
@example(b"\x0a\x04\xf9\xff\xff\xffcmd\0\0\0\0\0")
@example(b"\x02\xff\x01\0\0\0" + b"c" * 20)
def test_c_and_python_accept_the_same(nv: bytes) -> None:
    for parse, c_decode in ((Request.from_nv, decode_request), (Reply.from_nv, decode_reply)):
        try:
            expected: Any = parse(decode(nv))
        except DataError:
            expected = None
        error, message = c_decode(nv)
        assert message == expected
        assert (error == 0) == (expected is not None)
        assert error <= 0 and ffi.string(lib.hast_wire_error_text(error)) != b"unknown error"


@given(st.binary(max_size=8), st.integers(0, 4), st.integers(0, 2**32 - 1))
@example(b"\x02\0\0\1\0", 2, 65536)
@example(b"\x02\1\0\1\0", 2, 65536)
@example(b"\x03\0\0\0\0", 2, 65536)
def test_main_header(raw: bytes, highest: int, limit: int) -> None:
    version, size = ffi.new("uint8_t *", 99), ffi.new("uint32_t *", 99)
    error = lib.hast_wire_parse_main(GUARDED.put(raw), len(raw), highest, limit, version, size)
    try:
        main = messages.parse_main_header(raw, limit, highest)
    except ProtocolError:
        assert error == lib.HAST_WIRE_EVERSION
    except DataError:
        assert error == (lib.HAST_WIRE_ESHORT if len(raw) < 5 else lib.HAST_WIRE_ELIMIT)
    else:
        assert (error, version[0], size[0]) == (0, main.version, main.size)
        return
    assert (version[0], size[0]) == (99, 99)


def test_limits_are_those_of_python() -> None:
    assert messages.REQUEST_LIMIT == lib.HAST_WIRE_REQUEST_LIMIT
    raw = _seq_and_cmd().encode().ljust(messages.REQUEST_LIMIT, b"\0")
    assert decode_request(raw)[0] == 0
    assert decode_request(raw + b"\0")[0] == lib.HAST_WIRE_ELIMIT


NEAR = st.integers(0, 2**64 - 1) | st.integers(0, 64).map(lambda n: n * 512) | st.integers(2**64 - 1024, 2**64 - 1)


@settings(max_examples=500)
@given(
    st.integers(0, 7), NEAR, NEAR, st.integers(0, 2**32 - 1) | st.sampled_from((4, 5, 512, 516, 1024, 131072)),
    st.sampled_from(COMPRESSIONS), NEAR, st.sampled_from((512, 4096)), st.sampled_from((1024, 131072, 1048576)),
)  # fmt: skip
def test_checks_are_those_of_python(
    cmd: int, offset: int, length: int, size: int, packing: str, datasize: int, sectorsize: int, max_io: int
) -> None:
    request = Request(cmd, 1, offset, length, data=DataInfo(size, packing))
    found = lib.hast_wire_check_request(c_request(request), datasize, sectorsize, max_io)
    assert found == check_request(request, datasize, sectorsize, max_io)


def test_errors_are_those_of_python() -> None:
    for number in range(-300, 70000):
        assert lib.hast_wire_errno_to_wire(number) == errnos.to_wire(number)
        assert lib.hast_wire_errno_from_wire(number) == errnos.from_wire(number)
    assert lib.hast_wire_errno_to_wire(errno.ETIMEDOUT) == 60


def test_error_texts() -> None:
    assert ffi.string(lib.hast_wire_error_text(-1000)) == b"unknown error"
    texts = {ffi.string(lib.hast_wire_error_text(-n)) for n in range(10)}
    assert len(texts) == 10


# lzf and zeros.


def c_compress(data: bytes, cap: int) -> bytes | None:
    table = ffi.new("uint32_t[]", [0xFFFFFFFF] * lib.HAST_LZF_TABLE)  # what it holds must not matter
    with output(cap) as out:
        length = lib.hast_lzf_compress(GUARDED.put(data), len(data), out, cap, table)
        assert length <= cap
        return bytes(ffi.buffer(out, length)) if length else None


def c_decompress(stream: bytes, length: int) -> bytes | None:
    with output(length) as out:
        error = lib.hast_lzf_decompress(GUARDED.put(stream), len(stream), out, length)
        assert error in (0, -1)
        return bytes(ffi.buffer(out, length)) if error == 0 else None


@given(DATA.filter(bool), st.integers(0, 700))
@example(noise(20000) + noise(3000), 22000)
@example(bytes(50000), 50000)
def test_lzf_is_pythons_and_stays_inside(data: bytes, cap: int) -> None:
    expected = compression.lzf_compress(data)
    assert c_compress(data, len(expected)) == expected
    assert c_compress(data, cap) == (expected if len(expected) <= cap else None)
    assert c_decompress(expected, len(data)) == data
    assert compression.lzf_decompress(expected, len(data)) == data


def test_lzf_of_nothing_is_nothing() -> None:
    assert c_compress(b"", 100) is None
    assert c_decompress(b"", 0) == b""


@pytest.mark.parametrize(("stream", "data"), STREAMS)
def test_lzf_streams_by_hand(stream: bytes, data: bytes) -> None:
    assert c_decompress(stream, len(data)) == data
    assert c_decompress(stream, len(data) + 1) is None
    if data:
        assert c_decompress(stream, len(data) - 1) is None


LZF_BYTES = st.binary(max_size=100) | damaged(DATA.map(compression.lzf_compress))


@settings(max_examples=500)
@given(LZF_BYTES, st.integers(0, 700))
def test_lzf_garbage_is_refused_as_python_does(stream: bytes, length: int) -> None:
    try:
        expected: bytes | None = compression.lzf_decompress(stream, length)
    except DataError:
        expected = None
    assert c_decompress(stream, length) == expected


@given(st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 255))
def test_is_zero(length: int, at: int, value: int) -> None:
    data = bytearray(length)
    if at < length:
        data[at] = value
    assert lib.hast_is_zero(GUARDED.put(bytes(data)), length) == int(not any(data))


def test_the_guard_page_is_there() -> None:
    """A child that reads one byte too many dies of it: else these tests would prove nothing."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        lib.hast_is_zero(GUARDED.put(bytes(10)), 11)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGSEGV, signal.SIGBUS)
