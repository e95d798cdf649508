"""What a peer may send and must not: the connection ends with a sentence, and nothing else does.

After each of these the stages live, no slot is lost, nothing that was not believed has gone to the disk or to the
sequencer.
"""

from __future__ import annotations

import errno
import select
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from hast.ffi import _hast
from hast.messages import REQUEST_LIMIT, Cmd, DataInfo, Reply, Request, encode_payload, pack_message
from hast.nv import Nv
from hast.stages.context import RECV
from tests.shm.connrig import DATASIZE, DELETE, FLUSH, KIB, MEMSYNC, MIB, READ, REMOTE, WRITE, Primary, Pump, Secondary

lib = _hast.lib
SECTOR = 512


@contextmanager
def running(rig: Any) -> Iterator[Any]:
    try:
        yield rig
    finally:
        rig.close()


def message(nv: Nv, data: bytes = b"", version: int = 2) -> bytes:
    return pack_message(version, nv, data)


def reply(seq: int, **fields: Any) -> bytes:
    return message(Reply(seq, **fields).to_nv())


def without(nv: Nv, name: str) -> Nv:
    return Nv([element for element in nv if element.name != name])


def nv_of(**values: Any) -> Nv:
    """An nv by hand: int is uint64, bytes an array of uint8, str a string; a tuple names the type."""
    nv = Nv()
    for name, value in values.items():
        kind, value = value if isinstance(value, tuple) else (None, value)
        if kind is not None:
            getattr(nv, f"add_{kind}")(name, value)
        elif isinstance(value, str):
            nv.add_string(name, value)
        elif isinstance(value, bytes):
            nv.add_uint8_array(name, value)
        else:
            nv.add_uint64(name, value)
    return nv


NO_MESSAGE = {
    "garbage": b"\xff" * 100,
    "a version of the future": message(nv_of(seq=1), version=3),
    "an oversize header": b"\x02" + (REQUEST_LIMIT + 1).to_bytes(4, "little") + bytes(64),
    "a gigantic header": b"\x02\xff\xff\xff\xff" + bytes(64),
    "no nv": b"\x02\x10\x00\x00\x00" + b"\x63" * 16,
    "an element that runs past the end": b"\x02\x16\x00\x00\x00\x08\x04\xff\xff\xff\xffseq\0" + bytes(12),
    "nothing": b"\x02\x00\x00\x00\x00",
    "the largest header, full of zeros": b"\x02\x00\x00\x01\x00" + bytes(REQUEST_LIMIT),
    "seq 0": message(nv_of(cmd=("uint8", 4), seq=0, offset=0, length=0)),
    "seq of another type": message(nv_of(cmd=("uint8", 4), seq=("uint32", 1))),
}


# ---- replies, to the primary ----

WRONG = b"x" * SECTOR
CRC = zlib.crc32(WRONG).to_bytes(4, "little")

REPLIES: dict[str, Callable[[int], bytes]] = {
    **{name: (lambda _, raw=raw: raw) for name, raw in NO_MESSAGE.items()},
    "no seq": lambda _: message(nv_of(received=("int8", 1))),
    "a slot that is not there": lambda seq: reply(seq | 0xFFFF),
    "a slot that has nothing": lambda seq: reply(5 << 16 | (seq & 0xFFFF) + 1 & 0xFFFF),
    "another number of the same slot": lambda seq: reply(seq + (1 << 16)),
    "the number before": lambda seq: reply((seq & 0xFFFF) or 1),
    "error of another type": lambda seq: message(nv_of(seq=seq, error=("uint16", 5))),
    "unknown compression": lambda seq: message(nv_of(seq=seq, compression="zstd", size=("uint32", 4)), bytes(4)),
    "unknown checksum": lambda seq: message(nv_of(seq=seq, checksum="md5", hash=bytes(16), size=("uint32", 4))),
    "a short hash": lambda seq: message(nv_of(seq=seq, checksum="crc32", hash=bytes(3), size=("uint32", 4))),
    "no hash": lambda seq: message(nv_of(seq=seq, checksum="crc32", size=("uint32", 512)), WRONG),
}

READ_REPLIES: dict[str, tuple[DataInfo, bytes, int]] = {
    "none at all": (DataInfo(), b"", errno.EPROTO),
    "too short": (DataInfo(SECTOR - 1), bytes(SECTOR - 1), errno.EPROTO),
    "too long": (DataInfo(SECTOR + 1), bytes(SECTOR + 1), errno.EPROTO),
    "far too long": (DataInfo(2**32 - 1), bytes(SECTOR), errno.EPROTO),
    "a wrong hash": (DataInfo(SECTOR, "none", "crc32", bytes(4)), WRONG, errno.EBADMSG),
    "a wrong strong hash": (DataInfo(SECTOR, "none", "sha256", bytes(32)), WRONG, errno.EBADMSG),
    "a hole of another length": (DataInfo(4, "hole"), (4096).to_bytes(4, "little"), errno.EBADMSG),
    "a hole with more than a length": (DataInfo(5, "hole"), bytes(5), errno.EPROTO),
    "lzf of another length": (DataInfo(9, "lzf"), (4096).to_bytes(4, "little") + b"\0a\0b\0", errno.EBADMSG),
    "lzf that ends early": (DataInfo(7, "lzf"), SECTOR.to_bytes(4, "little") + b"\x1fab", errno.EBADMSG),
    "lzf from before its beginning": (
        DataInfo(7, "lzf"),
        SECTOR.to_bytes(4, "little") + b"\xe0\xff\x01",
        errno.EBADMSG,
    ),
    "an lzf bomb": (
        DataInfo(SECTOR, "lzf"),
        SECTOR.to_bytes(4, "little") + b"\x01ab" + b"\xe0\xff\x01" * 168 + b"\0",
        errno.EBADMSG,
    ),
    "lzf with nothing in it": (DataInfo(4, "lzf"), SECTOR.to_bytes(4, "little"), errno.EPROTO),
}


def refused(p: Primary, expected: int = errno.EPROTO) -> str:
    """The connection is lost by recv, the stages live and the sequencer was told nothing."""
    number, why = p.lost(RECV)
    assert number == expected, why
    assert p.nothing_done() and p.alive()
    assert "secondary" in why
    p.stop(RECV)
    return why


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_that_cannot_be(name: str) -> None:
    with running(Primary()) as p:
        slot = p.submit(READ, 0, SECTOR)
        p.out.request()
        p.back.say(REPLIES[name](p.seq(slot)))
        refused(p)


@pytest.mark.parametrize("name", READ_REPLIES)
def test_data_of_a_read_that_cannot_be(name: str) -> None:
    info, data, expected = READ_REPLIES[name]
    with running(Primary()) as p:
        slot = p.submit(READ, 0, SECTOR)
        p.out.request()
        p.back.answer(Reply(p.seq(slot), data=info), data)
        refused(p, expected)
        assert bytes(p.slab(slot)[SECTOR:]) == bytes(128 * KIB - SECTOR)
        assert not any(bytes(p.slab(slot + 1)))


@pytest.mark.parametrize(("cmd", "error"), [(WRITE, 0), (FLUSH, 0), (DELETE, 0), (READ, 5)])
def test_data_that_nobody_asked_for(cmd: int, error: int) -> None:
    with running(Primary()) as p:
        slot = p.submit(cmd, 0, SECTOR, WRONG if cmd == WRITE else None)
        p.out.request()
        p.back.answer(Reply(p.seq(slot), error=error, data=DataInfo(SECTOR)), WRONG)
        refused(p)


def test_an_answer_comes_twice() -> None:
    """Also at once: the sequencer has not looked at the first one yet."""
    for cmd in (READ, WRITE, FLUSH):
        with running(Primary()) as p:
            slot = p.submit(cmd, 0, SECTOR, WRONG if cmd == WRITE else None)
            p.out.request()
            data = encode_payload(WRONG, "none", "crc32") if cmd == READ else (b"", DataInfo())
            once = message(Reply(p.seq(slot), data=data[1]).to_nv(), data[0])
            p.back.say(once + once)
            assert p.lost(RECV)[0] == errno.EPROTO
            assert [(d.slot, d.error) for d in p.done()] == [(slot, 0)]
            assert p.nothing_done() and p.alive()


def test_received_comes_twice_or_late_or_uncalled_for() -> None:
    def received(seq: int) -> bytes:
        return reply(seq, received=True)

    cases: list[tuple[int, Callable[[int], bytes], int]] = [
        (MEMSYNC, lambda seq: received(seq) + received(seq), 1),
        (MEMSYNC, lambda seq: reply(seq) + received(seq), 1),
        (MEMSYNC, lambda seq: received(seq) + reply(seq) + received(seq), 2),
        (MEMSYNC, lambda seq: message(Reply(seq, received=True, error=5).to_nv()), 0),
        (0, received, 0),
    ]
    for flags, raw, believed in cases:
        with running(Primary()) as p:
            slot = p.submit(WRITE, 0, data=WRONG, flags=flags)
            p.out.request()
            p.back.say(raw(p.seq(slot)))
            assert p.lost(RECV)[0] == errno.EPROTO
            assert len(p.done(believed) if believed else []) == believed
            assert p.nothing_done() and p.alive()
    with running(Primary(version=1)) as p:
        slot = p.submit(WRITE, 0, data=WRONG, flags=MEMSYNC)
        p.out.request()
        p.back.say(received(p.seq(slot)))
        refused(p)


def test_an_answer_to_what_was_not_sent_yet() -> None:
    """A peer can guess the next seq; while the bio waits in the ring it is not to be touched by anybody else."""
    with running(Primary()) as p:
        slot = p.fill(WRITE, 0, data=WRONG)
        p.back.say(reply(p.seq(slot)))
        refused(p)


def test_an_answer_to_what_the_secondary_has_no_more() -> None:
    with running(Primary()) as p:
        slot = p.submit(FLUSH)
        p.out.request()
        p.bio(slot).pending = 0
        p.back.say(reply(p.seq(slot)))
        refused(p)


def test_every_end_in_a_read_reply() -> None:
    """Cut off after each of its bytes: nothing is believed, and the sentence says where it ended."""
    payload, info = encode_payload(bytes(range(256)) * 2, "none", "crc32")
    whole = len(message(Reply(1, data=info).to_nv(), payload))
    for cut in range(whole):
        with running(Pump(secondary=False)) as p:
            bio = lib.hast_arena_bio(p.arena.c, 1)
            bio.cmd, bio.length, bio.pending = READ, len(payload), 1 << REMOTE
            bio.seq = bio.sent = 5 << 16 | 1
            p.peer.sendall(message(Reply(bio.seq, data=info).to_nv(), payload)[:cut])
            p.peer.close()
            assert p.run() == errno.ECONNRESET
            assert ("middle" in p.why()) == (cut > 0)
            assert p.arena.ring_used(lib.HAST_RING_RECV_DONE) == 0


def test_a_large_read_reply_that_ends_or_is_damaged() -> None:
    data = bytes(range(256)) * 512
    payload, info = encode_payload(data, "none", "sha256")
    with running(Primary()) as p:
        slot = p.submit(READ, 0, len(data))
        p.out.request()
        p.back.say(message(Reply(p.seq(slot), data=info).to_nv(), payload)[:-1])
        p.back.close()
        assert "middle" in refused(p, errno.ECONNRESET)
    with running(Primary()) as p:
        slot = p.submit(READ, 0, len(data))
        p.out.request()
        p.back.say(message(Reply(p.seq(slot), data=info).to_nv(), payload[:-1] + b"!"))
        refused(p, errno.EBADMSG)


def test_the_secondary_goes() -> None:
    with running(Primary()) as p:
        p.back.close()
        p.out.close()
        assert p.lost(RECV) == (errno.ECONNRESET, "the secondary closed the connection")
        p.submit(FLUSH)  # a connection that is lost takes no notice
        assert p.alive()
        p.stop(RECV)


# ---- requests, to the secondary ----


def request(cmd: int = Cmd.READ, seq: int = 7, offset: int = 0, length: int = SECTOR, data: Any = None) -> bytes:
    payload, info = data if data is not None else (b"", DataInfo())
    return message(Request(cmd, seq, offset, length, data=info).to_nv(), payload)


def write(offset: int = 0, data: bytes = WRONG, info: DataInfo | None = None, memsync: bool = False) -> bytes:
    nv = Request(Cmd.WRITE, 7, offset, len(data), memsync, info or DataInfo(len(data))).to_nv()
    return message(nv, data)


ANSWERED = {
    "behind the end": request(offset=DATASIZE),
    "over the end": request(offset=DATASIZE - SECTOR, length=2 * SECTOR),
    "an offset that wraps": request(offset=2**64 - SECTOR, length=2 * SECTOR),
    "a length that wraps": request(offset=2 * SECTOR, length=2**64 - SECTOR),
    "an offset that is not aligned": request(offset=1),
    "a length that is not aligned": request(length=SECTOR + 1),
    "no length": request(length=0),
    "a huge read": request(length=MIB + SECTOR),
    "the largest numbers": request(offset=2**64 - 1, length=2**64 - 1),
    "an unknown command": request(cmd=6),
    "command 0": request(cmd=0),
    "command 255": request(cmd=255, offset=2**63),
    "a delete over the end": request(cmd=Cmd.DELETE, offset=SECTOR, length=DATASIZE),
    "a delete that is not aligned": request(cmd=Cmd.DELETE, length=100),
}

UNREADABLE: dict[str, bytes] = {
    **NO_MESSAGE,
    "no cmd": message(nv_of(seq=1, offset=0, length=512)),
    "cmd of another type": message(nv_of(cmd=1, seq=1, offset=0, length=512)),
    "no seq": message(without(Request(Cmd.READ, 1, 0, SECTOR).to_nv(), "seq")),
    "no offset": message(without(Request(Cmd.READ, 1, 0, SECTOR).to_nv(), "offset")),
    "no length": message(without(Request(Cmd.DELETE, 1, 0, SECTOR).to_nv(), "length")),
    "a read with data": request(data=(WRONG, DataInfo(SECTOR))),
    "a flush with data": request(cmd=Cmd.FLUSH, length=0, data=(WRONG, DataInfo(SECTOR))),
    "an unknown command with data": request(cmd=9, data=(WRONG, DataInfo(SECTOR))),
    "a write without data": request(cmd=Cmd.WRITE),
    "unknown compression": message(
        Nv([*Request(Cmd.WRITE, 1, 0, SECTOR).to_nv(), *nv_of(compression="gzip", size=("uint32", SECTOR))]), WRONG
    ),
    "a hash of another length": message(
        Nv(
            [
                *Request(Cmd.WRITE, 1, 0, SECTOR).to_nv(),
                *nv_of(checksum="sha256", hash=bytes(31), size=("uint32", SECTOR)),
            ]
        ),
        WRONG,
    ),
}

IMPOSSIBLE = {
    "behind the end": write(offset=DATASIZE),
    "over the end": write(offset=DATASIZE - SECTOR, data=WRONG * 2),
    "not aligned": write(offset=100),
    "of odd length": write(data=b"x" * 100),
    "too long": request(cmd=Cmd.WRITE, length=2 * MIB, data=(WRONG, DataInfo(2 * MIB))),
    "shorter than its length": request(cmd=Cmd.WRITE, length=1024, data=(WRONG, DataInfo(SECTOR))),
    "longer than its length": request(cmd=Cmd.WRITE, length=SECTOR, data=(WRONG * 2, DataInfo(1024))),
    "with the largest size": request(cmd=Cmd.WRITE, length=SECTOR, data=(WRONG, DataInfo(2**32 - 1))),
    "a hole with too much": request(cmd=Cmd.WRITE, data=(bytes(8), DataInfo(8, "hole"))),
    "lzf larger than raw": request(cmd=Cmd.WRITE, data=(bytes(517), DataInfo(517, "lzf"))),
    "of the largest length": request(cmd=Cmd.WRITE, length=2**64 - SECTOR, data=(bytes(4), DataInfo(4, "hole"))),
}


def good(s: Secondary) -> None:
    """The connection still works, and every slot is there."""
    s.into.say(request(seq=99))
    slot = s.disk_takes()[0]
    assert s.bio(slot).seq == 99
    s.disk_done(slot)
    assert s.back.reply()[0] == Reply(99, data=DataInfo(SECTOR))
    s.all_slots_free()


def ended(s: Secondary, expected: int = errno.EPROTO) -> str:
    """Lost by recv with this error; nothing went to the disk, no slot is lost, the stages stop in order."""
    number, why = s.lost(RECV)
    assert number == expected, why
    assert "primary" in why
    assert s.disk_waits() and s.alive()
    s.all_slots_free()
    s.stop(RECV)
    return why


@pytest.mark.parametrize("name", ANSWERED)
def test_a_request_that_is_refused(name: str) -> None:
    with running(Secondary()) as s:
        for _ in range(3):
            s.into.say(ANSWERED[name])
            assert s.back.reply()[0] == Reply(7, error=errno.EINVAL)
        assert s.disk_waits()
        good(s)


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_request_that_cannot_be_read(name: str) -> None:
    with running(Secondary()) as s:
        good(s)
        s.into.say(UNREADABLE[name])
        ended(s)
        assert s.back.at_end()  # and no answer


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_write_that_is_refused_ends_the_connection(name: str) -> None:
    with running(Secondary()) as s:
        s.into.say(IMPOSSIBLE[name] + request(seq=8))
        assert s.back.reply()[0] == Reply(7, error=errno.EINVAL)
        ended(s)
        assert s.back.at_end()


DAMAGED = {name: value for name, value in READ_REPLIES.items() if value[2] == errno.EBADMSG}


@pytest.mark.parametrize("memsync", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_write_whose_data_is_damaged(name: str, memsync: bool) -> None:
    """Not believed, not answered, not even as received."""
    info, data, expected = DAMAGED[name]
    with running(Secondary()) as s:
        nv = Request(Cmd.WRITE, 7, 0, SECTOR, memsync, info).to_nv()
        s.into.say(message(nv, data) + request(seq=8))
        ended(s, expected)
        assert s.back.at_end()


@pytest.mark.parametrize("checksum", ["crc32", "sha256"])
def test_a_large_write_whose_data_is_damaged(checksum: str) -> None:
    data = bytes(range(256)) * 4096
    payload, info = encode_payload(data, "none", checksum)
    with running(Secondary(family="tcp")) as s:
        s.into.say(message(Request(Cmd.WRITE, 7, 0, len(data), True, info).to_nv(), payload))
        assert s.back.reply()[0].received
        slot = s.disk_takes()[0]
        assert s.contents(slot) == data
        s.disk_done(slot)
        s.back.reply()
        s.into.say(message(Request(Cmd.WRITE, 8, 0, len(data), True, info).to_nv(), payload[:-1] + b"!"))
        ended(s, errno.EBADMSG)
        assert s.back.at_end()


def test_every_end_in_a_write() -> None:
    payload, info = encode_payload(b"abcd" * 1024, "lzf", "crc32")
    raw = message(Request(Cmd.WRITE, 7, 0, 4096, True, info).to_nv(), payload)
    for cut in range(len(raw)):
        with running(Pump(secondary=True)) as p:
            p.peer.sendall(raw[:cut])
            p.peer.close()
            assert p.run() == errno.ECONNRESET
            assert ("middle" in p.why()) == (cut > 0)
            assert p.arena.ring_used(lib.HAST_RING_DISK) == p.arena.ring_used(lib.HAST_RING_SEND) == 0
            assert lib.hast_link_free_slots(p.c) == p.arena.seq.nfree == 4


@pytest.mark.parametrize("compression", ["none", "lzf"])
def test_a_large_write_that_ends_in_its_data(compression: str) -> None:
    payload, info = encode_payload(bytes(range(256)) * 1024 + b"abcd" * 65536, compression, "none")
    raw = message(Request(Cmd.WRITE, 7, 0, 512 * KIB, False, info).to_nv(), payload)
    for cut in (len(raw) - 1, len(raw) // 2, len(raw) - len(payload), len(raw) - len(payload) + 1):
        with running(Secondary(nclient=4, family="tcp")) as s:
            s.into.say(raw[:cut])
            s.into.close()
            assert "middle" in ended(s, errno.ECONNRESET)


def test_what_came_before_the_end_goes_to_the_disk() -> None:
    """All of it, in order, over four slots; the answers have nowhere to go, and the slots come back all the same."""
    with running(Secondary(nclient=4)) as s:
        raw = b"".join(write(n * SECTOR, bytes([n]) * SECTOR) for n in range(20))
        s.into.say(raw + request(Cmd.FLUSH, length=0) + raw[:100])
        s.into.close()
        s.back.close()
        while s.line(RECV).ops < 4:
            pass
        s.stages[RECV].channel.send({"cmd": "stop"})
        for n in range(20):
            slot = s.disk_takes()[0]
            assert (s.bio(slot).offset, s.contents(slot)) == (n * SECTOR, bytes([n]) * SECTOR)
            s.disk_done(slot)
        assert s.alive(), "recv has ended while something was under way"
        flush = s.disk_takes()[0]
        assert s.bio(flush).cmd == FLUSH
        s.disk_done(flush)
        s.ends(RECV)
        s.all_slots_free()


def test_a_primary_that_sends_and_takes_nothing() -> None:
    """It has closed the other way: what it had sent is done, but not all that it will ever send."""
    with running(Secondary(nclient=4)) as s:
        raw = b"".join(write(n * SECTOR, bytes([n]) * SECTOR) for n in range(20))
        s.into.say(raw)
        s.until(lambda: "first" in s.stages[RECV].events, RECV)
        s.back.close()
        s.into.sock.setblocking(False)
        left, done = raw, 0
        stage = s.stages[RECV]
        while not select.select([stage.child.pidfd], [], [], 0)[0]:
            with suppress(BlockingIOError, BrokenPipeError):
                left = left[s.into.sock.send(left) :] or raw
            if not s.disk_waits():
                s.disk_done(*s.disk_takes())
                done += 1
            if stage.lost is None and select.select([stage.channel], [], [], 0)[0]:
                assert s.lost(RECV)[0] in (errno.ECONNRESET, errno.EPIPE)
                stage.channel.send({"cmd": "stop"})
        assert 20 <= done < 100_000
        s.ends(RECV)


def test_stopped_with_half_a_write_and_a_full_queue() -> None:
    """What is complete is done, what is not is dropped; replies that are due go out before recv ends."""
    with running(Secondary(nclient=8)) as s:
        s.into.say(write(0) + request(Cmd.FLUSH, 8, length=0) + write(SECTOR))
        s.into.say(write(data=b"x" * 64 * KIB)[:5000])
        first = s.disk_takes()[0]
        while s.line(RECV).ops < 4:
            pass
        s.stages[RECV].channel.send({"cmd": "stop"})
        s.disk_done(first)
        s.disk_done(*s.disk_takes())
        s.disk_done(*s.disk_takes())
        s.ends(RECV)
        assert [s.back.reply()[0].seq for _ in range(3)] == [7, 8, 7]
        assert s.back.at_end()


def test_the_wrong_stage_speaks() -> None:
    """Damaged shared memory is found, and said so: a slot that is not with the disk comes back from it."""
    for ring, entry in ((lib.HAST_RING_DISK_DONE, 3), (lib.HAST_RING_SEND_DONE, 3), (lib.HAST_RING_DISK_DONE, 2**31)):
        with running(Secondary()) as s:
            s.push(ring, RECV, [entry])
            s.ends(RECV, 70)
    for entry in (66, 2**32 - 1):
        with running(Secondary()) as s:
            s.push(lib.HAST_RING_SEND, RECV, [entry])
            s.ends(RECV, 70)
    with running(Primary()) as p:
        slot = p.fill(WRITE, 0, data=WRONG)
        p.bio(slot).length = 2 * MIB
        p.push(lib.HAST_RING_SEND, RECV, [slot])
        p.ends(RECV, 70)


def test_replies_are_not_believed_by_name_only() -> None:
    """replace() of one field at a time, of a reply that is right: it is the only one that is taken."""
    payload, info = encode_payload(WRONG, "none", "crc32")
    assert info.hash == CRC
    for wrong in (replace(info, hash=b"\0" + CRC[1:]), replace(info, compression="hole"), replace(info, size=8)):
        with running(Primary()) as p:
            slot = p.submit(READ, 0, SECTOR)
            p.out.request()
            p.back.answer(Reply(p.seq(slot), data=wrong), payload)
            assert p.lost(RECV)[0] in (errno.EPROTO, errno.EBADMSG) and p.nothing_done()
    with running(Primary()) as p:
        slot = p.submit(READ, 0, SECTOR)
        p.out.request()
        p.back.answer(Reply(p.seq(slot), data=info), payload)
        assert [(d.error, d.data) for d in p.done()] == [(0, WRONG)]
