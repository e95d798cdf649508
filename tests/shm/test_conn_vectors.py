"""The connection's stages against the captured messages: byte by byte, both roles, both versions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hast.ffi import _hast
from hast.messages import Reply, Request, decode_payload
from hast.nv import decode
from hast.stages.context import RECV
from tests import vectors
from tests.shm.connrig import DELETE, FLUSH, LOCAL, MEMSYNC, MIB, READ, WRITE, ZERO, Primary, Secondary

lib = _hast.lib
DATASIZE = 256 * MIB  # the captured ones reach so far
VERSIONS = pytest.mark.parametrize("version", [1, 2])
ENOSPC = 28


def patched(raw: bytes, seq: int) -> bytes:
    """A captured message with another seq, and zeros for what is undefined in it."""
    name = b"\x08\x04\x08\x00\x00\x00seq\x00\x00\x00\x00\x00"
    at = raw.index(name) + len(name)
    return raw[:at] + seq.to_bytes(8, "little") + raw[at + 8 :]


def versioned(raw: bytes, version: int) -> bytes:
    return bytes([version]) + raw[1:]


def request_of(name: str) -> Request:
    return Request.from_nv(decode(vectors.load(name).header))


def payload_of(name: str) -> bytes:
    """The data of a captured write, before it was transformed."""
    vector = vectors.load(name)
    request = Request.from_nv(decode(vector.header))
    return decode_payload(vector.data, request.data, request.length)


@contextmanager
def running(rig: Any) -> Iterator[Any]:
    try:
        yield rig
    finally:
        rig.close()


WRITES = [  # vector, compression, checksum, flags
    ("write_memsync", "hole", "none", MEMSYNC),
    ("write_fullsync", "hole", "none", 0),
    ("write_crc32", "none", "crc32", 0),
    ("write_sha256", "none", "sha256", 0),
    ("write_lzf", "lzf", "none", 0),
    ("write_lzf_sha256", "lzf", "sha256", 0),
    ("write_hole_memsync", "hole", "none", MEMSYNC),
    ("write_hole_crc32", "hole", "crc32", 0),
    ("write_zero_nocompression", "none", "none", 0),
    ("sync_write_dirty_extent", "hole", "none", 0),
]


@VERSIONS
@pytest.mark.parametrize(("name", "compression", "checksum", "flags"), WRITES, ids=[w[0] for w in WRITES])
def test_a_primary_writes_what_was_captured(
    name: str, compression: str, checksum: str, flags: int, version: int
) -> None:
    request, data = request_of(name), payload_of(name)
    if request.memsync:
        flags |= MEMSYNC
    with running(Primary(version=version, compression=compression, checksum=checksum, datasize=DATASIZE)) as p:
        given = [p.submit(WRITE, request.offset, data=data, flags=flags)]
        if not any(data):
            given.append(p.submit(WRITE, request.offset, len(data), flags=flags | ZERO))
        for slot in given:
            sent, _, raw = p.out.request()
            expected = versioned(patched(vectors.load(name).normal, p.seq(slot)), version)
            if version == 1 and request.memsync:
                assert not sent.memsync  # version 1 does not have it
            else:
                assert raw == expected
            p.back.answer(Reply(sent.seq), version=version)
            assert [(d.slot, d.received, d.error) for d in p.done()] == [(slot, False, 0)]


OTHERS = [("read", READ), ("delete", DELETE), ("flush", FLUSH)]


@VERSIONS
@pytest.mark.parametrize(("name", "cmd"), OTHERS, ids=[name for name, _ in OTHERS])
def test_a_primary_asks_what_was_captured(name: str, cmd: int, version: int) -> None:
    request = request_of(name)
    with running(Primary(version=version, datasize=DATASIZE)) as p:
        for reply in ("read_reply", "read_reply_hole") if cmd == READ else (f"{name}_reply",):
            slot = p.submit(cmd, request.offset, request.length)
            assert p.out.request()[2] == versioned(patched(vectors.load(name).normal, p.seq(slot)), version)
            vector = vectors.load(reply)
            p.back.say(versioned(patched(vector.raw, p.seq(slot)), version))
            done = p.done()[0]
            assert (done.slot, done.error) == (slot, 0)
            assert done.data == {"read_reply": vector.data, "read_reply_hole": bytes(131072)}.get(reply, b"")


def test_a_primary_keeps_alive_as_captured() -> None:
    with running(Primary(keepalive=0.2)) as p:
        for _ in range(3):
            assert p.out.request()[2] == vectors.load("keepalive").normal
        assert p.alive() and p.nothing_done()


def test_a_primary_takes_captured_replies_to_a_memsync_write() -> None:
    with running(Primary(datasize=DATASIZE)) as p:
        one, two = (p.submit(WRITE, n * MIB, data=b"x" * 512, flags=MEMSYNC) for n in (1, 2))
        for slot in (one, two):
            p.out.request()
            p.back.say(patched(vectors.load("write_memsync_reply1_received").raw, p.seq(slot)))
            assert [(d.slot, d.received) for d in p.done()] == [(slot, True)]
        p.back.say(patched(vectors.load("write_memsync_reply2_final").raw, p.seq(two)))
        assert [(d.slot, d.received, d.error) for d in p.done()] == [(two, False, 0)]
        p.back.say(patched(vectors.load("write_error_reply_memsync").raw, p.seq(one)))
        assert [(d.slot, d.received, d.error) for d in p.done()] == [(one, False, ENOSPC)]


# ---- the secondary ----

ALL = [*(w[0] for w in WRITES), *(name for name, _ in OTHERS)]


def asked(s: Secondary, name: str, version: int) -> int:
    """The captured request goes in; the slot with which it comes out at the disk."""
    s.into.say(versioned(vectors.load(name).raw, version))
    slot = s.disk_takes()[0]
    request, bio = request_of(name), s.bio(slot)
    assert (bio.cmd, bio.offset, bio.length, bio.seq) == (request.cmd, request.offset, request.length, request.seq)
    if request.cmd == WRITE:
        assert s.contents(slot) == payload_of(name)
        assert bool(bio.flags & ZERO) == (request.data.compression == "hole")
    return slot


@VERSIONS
@pytest.mark.parametrize("name", ALL)
def test_a_secondary_is_fed_what_was_captured(name: str, version: int) -> None:
    """Its replies are the captured ones, byte by byte, whatever compression and checksum it has for itself."""
    request = request_of(name)
    memsync = request.memsync and version == 2
    with running(Secondary(version=version, datasize=DATASIZE)) as s:
        s.into.say(versioned(vectors.load("keepalive").raw, version))
        slot = asked(s, name, version)
        s.until(lambda: "first" in s.stages[RECV].events, RECV)
        final = vectors.load({"read": "read_reply", "delete": "delete_reply", "flush": "flush_reply"}.get(
            name, "write_memsync_reply2_final" if memsync else "write_fullsync_reply"))  # fmt: skip
        if memsync:
            received = vectors.load("write_memsync_reply1_received").normal
            assert s.back.reply()[2] == patched(received, request.seq)
        assert s.back.silent(), "an answer before the disk had it"
        if name == "read":
            s.slab(slot)[: request.length] = final.data
        s.disk_done(slot)
        assert s.back.reply()[2] == versioned(patched(final.normal, request.seq), version)
        # Once more, and the disk fails: the captured error.
        slot = asked(s, name, version)
        if memsync:
            s.back.reply()
        s.disk_done(slot, error=ENOSPC)
        error = vectors.load("write_error_reply_memsync" if memsync else "write_error_reply_fullsync").normal
        assert s.back.reply()[2] == versioned(patched(error, request.seq), version)
        s.all_slots_free()
        assert s.back.silent() and s.alive()


def test_a_secondary_answers_a_hole_as_captured() -> None:
    with running(Secondary(compression="hole", datasize=DATASIZE)) as s:
        slot = asked(s, "read", 2)
        s.slab(slot)[:131072] = bytes(131072)
        s.disk_done(slot)
        assert s.back.reply()[2] == vectors.load("read_reply_hole").normal


@pytest.mark.parametrize("checksum", ["none", "crc32", "sha256"])
@pytest.mark.parametrize("compression", ["none", "hole", "lzf"])
def test_reads_pass_through_the_transformations(compression: str, checksum: str) -> None:
    with running(Secondary(compression=compression, checksum=checksum)) as s, \
            running(Primary(compression="none")) as p:  # fmt: skip
        for data in (bytes(131072), b"abcd" * 32768, bytes(range(256)) * 2):
            there = p.submit(READ, 0, len(data))
            s.into.say(p.out.request()[2])
            slot = s.disk_takes()[0]
            s.slab(slot)[: len(data)] = data
            s.disk_done(slot)
            reply, wire, raw = s.back.reply()
            assert decode_payload(wire, reply.data, len(data)) == data and reply.data.checksum == checksum
            packs = {"none": False, "hole": not any(data), "lzf": len(data) > 512}
            assert (reply.data.compression != "none") == packs[compression]
            p.back.say(raw)
            done = p.done()[0]
            assert (done.slot, done.error, done.data) == (there, 0, data)
            assert s.bio(slot).error[LOCAL] == 0


def test_every_captured_request_and_reply_is_used() -> None:
    names = {n for n in vectors.names() if not n.startswith(("hs", "ctl", "metadata", "activemap"))}
    replies = {n for n in names if "reply" in n}
    assert names - replies == {*ALL, "keepalive"}
