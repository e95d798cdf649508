"""Requests and replies: hast/messages.py and hast/ffi/wire.c give the same verdict and the same values.

The first four bytes: which of the two; nothing; the largest read or write in KiB.
"""

from __future__ import annotations

import errno
from typing import Any

from hast.errors import DataError
from hast.ffi import _hast
from hast.messages import DataInfo, Reply, Request, check_request
from hast.nv import decode
from tests.fuzz.nvmutator import HEAD

ffi, lib = _hast.ffi, _hast.lib
COMPRESSION = ("none", "hole", "lzf")
CHECKSUM = ("none", "crc32", "sha256")
DATASIZE, SECTOR = 1 << 30, 512


def same_data(info: DataInfo, c: Any) -> None:
    assert (info.size, info.compression, info.checksum) == (c.size, COMPRESSION[c.compression], CHECKSUM[c.checksum])
    assert bytes(c.hash)[: len(info.hash)] == info.hash and not any(bytes(c.hash)[len(info.hash) :])


def request(header: bytes, max_io: int) -> None:
    c = ffi.new("struct hast_wire_request *")
    verdict = lib.hast_wire_decode_request(header, len(header), c)
    try:
        message = Request.from_nv(decode(header))
    except DataError as error:
        assert verdict < 0, f"C takes what Python refuses: {error}"
        return
    assert verdict == 0, f"C refuses what Python takes: {ffi.string(lib.hast_wire_error_text(verdict))!r}"
    assert (message.cmd, message.seq, message.offset, message.length) == (c.cmd, c.seq, c.offset, c.length)
    assert message.memsync == bool(c.memsync)
    same_data(message.data, c.data)
    answer = check_request(message, DATASIZE, SECTOR, max_io)
    assert answer in (0, errno.EINVAL)
    assert answer == lib.hast_wire_check_request(c, DATASIZE, SECTOR, max_io), "one would do it, the other one not"
    out = ffi.new("uint8_t[]", lib.HAST_WIRE_HEADER_MAX)
    size = lib.hast_wire_encode_request(c, 2, out, len(out))
    assert bytes(ffi.buffer(out)[5:size]) == message.to_nv().encode(), "written differently"


def reply(header: bytes) -> None:
    c = ffi.new("struct hast_wire_reply *")
    verdict = lib.hast_wire_decode_reply(header, len(header), c)
    try:
        message = Reply.from_nv(decode(header))
    except DataError as error:
        assert verdict < 0, f"C takes what Python refuses: {error}"
        return
    assert verdict == 0, f"C refuses what Python takes: {ffi.string(lib.hast_wire_error_text(verdict))!r}"
    assert (message.seq, message.received, message.error) == (c.seq, bool(c.received), c.error)
    same_data(message.data, c.data)
    out = ffi.new("uint8_t[]", lib.HAST_WIRE_HEADER_MAX)
    size = lib.hast_wire_encode_reply(c, 2, out, len(out))
    assert bytes(ffi.buffer(out)[5:size]) == message.to_nv().encode(), "written differently"


def check(data: bytes) -> None:
    head, header = data[:HEAD].ljust(HEAD, b"\0"), data[HEAD:]
    if head[0] & 1:
        reply(header)
    else:
        request(header, 1024 * int.from_bytes(head[2:], "little"))
