"""What a secondary gives to its disk, and when: overlap order, flush barriers, slots.

The test is the disk and completes in whatever order it likes; the primary sends what an original one may send:
overlapping writes in flight, one seq for many.
"""

from __future__ import annotations

import fcntl
import random
import select
import struct
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from hast.ffi import _hast
from hast.messages import Cmd, DataInfo, Request
from hast.stages.context import RECV, SEND
from tests.shm.connrig import DELETE, FLUSH, KIB, MIB, READ, WRITE, Secondary

ffi, lib = _hast.ffi, _hast.lib


@contextmanager
def running(rig: Secondary) -> Iterator[Secondary]:
    try:
        yield rig
    finally:
        rig.close()


@pytest.fixture
def s() -> Iterator[Secondary]:
    with running(Secondary()) as rig:
        yield rig


def write(s: Secondary, seq: int, offset: int, data: bytes, memsync: bool = False) -> None:
    s.into.ask(Request(Cmd.WRITE, seq, offset, len(data), memsync, DataInfo(len(data))), data)


def ask(s: Secondary, cmd: int, seq: int, offset: int = 0, length: int = 0) -> None:
    s.into.ask(Request(cmd, seq, offset, length))


def takes(s: Secondary, *seqs: int) -> list[int]:
    """The disk is given these, in this order, and nothing else; the slots."""
    slots = s.disk_takes(len(seqs))
    assert [s.bio(slot).seq for slot in slots] == list(seqs)
    assert settled(s) and s.disk_waits()
    return slots


def settled(s: Secondary) -> bool:
    """Wait until recv has looked at everything that it was given, and waits again. Unix sockets only: there, what is
    not read yet counts as not sent."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        unread = struct.unpack("i", fcntl.ioctl(s.into.sock, termios.TIOCOUTQ, bytes(4)))[0]
        # It is not in state 2, waiting, from before it reads until all that follows from it is done.
        if unread == 0 and s.arena.ring_used(lib.HAST_RING_DISK_DONE) == 0 and s.line(RECV).state == 2:
            return True
        time.sleep(0.001)
    return False


def answers(s: Secondary, *seqs: int) -> None:
    assert [s.back.reply()[0].seq for _ in seqs] == list(seqs)


def test_overlapping_writes_reach_the_disk_in_order(s: Secondary) -> None:
    write(s, 1, 0, b"a" * 4096)
    write(s, 2, 2048, b"b" * 4096)
    write(s, 3, 8192, b"c" * 512)
    write(s, 4, 0, b"d" * 512)
    first, other = takes(s, 1, 3)
    s.disk_done(other)
    answers(s, 3)
    assert settled(s) and s.disk_waits()
    s.disk_done(first)
    answers(s, 1)
    takes(s, 2, 4)


def test_a_chain_of_overlaps_goes_one_by_one(s: Secondary) -> None:
    for seq in (1, 2, 3):
        write(s, seq, 0, bytes([seq]) * 512)
    for seq in (1, 2, 3):
        (slot,) = takes(s, seq)
        assert s.contents(slot) == bytes([seq]) * 512
        s.disk_done(slot)
        answers(s, seq)
    s.all_slots_free()


def test_neighbours_do_not_wait_for_each_other(s: Secondary) -> None:
    for seq in range(1, 9):
        write(s, seq, (seq - 1) * 512, b"x" * 512)
    takes(s, *range(1, 9))


def test_reads_wait_for_earlier_writes_and_not_for_reads(s: Secondary) -> None:
    ask(s, READ, 1, 0, 4096)
    ask(s, READ, 2, 0, 4096)
    write(s, 3, 512, b"x" * 512)
    ask(s, READ, 4, 0, 1024)
    ask(s, READ, 5, 1024, 512)
    one, two, _ = takes(s, 1, 2, 5)
    s.disk_done(one)
    answers(s, 1)
    assert settled(s) and s.disk_waits()
    s.disk_done(two)
    (three,) = takes(s, 3)
    s.disk_done(three)
    takes(s, 4)


def test_a_delete_of_everything_is_one_mutation(s: Secondary) -> None:
    write(s, 1, 40 * MIB, b"x" * 512)
    ask(s, DELETE, 2, 0, 64 * MIB)
    write(s, 3, 0, b"x" * 512)
    (one,) = takes(s, 1)
    s.disk_done(one)
    (two,) = takes(s, 2)
    assert (s.bio(two).offset, s.bio(two).length) == (0, 64 * MIB)
    s.disk_done(two)
    takes(s, 3)


def test_a_flush_is_a_barrier(s: Secondary) -> None:
    write(s, 1, 0, b"x" * 512)
    write(s, 2, 512, b"x" * 512)
    ask(s, FLUSH, 3)
    write(s, 4, 1024, b"x" * 512)
    ask(s, READ, 5, 4096, 512)
    ask(s, FLUSH, 6)
    write(s, 7, 0, b"x" * 512)
    one, two = takes(s, 1, 2)
    s.disk_done(two)
    answers(s, 2)
    assert settled(s) and s.disk_waits()
    s.disk_done(one)
    (flush,) = takes(s, 3)
    assert s.bio(flush).cmd == FLUSH
    s.disk_done(flush)
    answers(s, 1, 3)
    four, five = takes(s, 4, 5)
    s.disk_done(four, five)
    (six,) = takes(s, 6)
    s.disk_done(six)
    takes(s, 7)


def test_a_flush_alone_goes_at_once_and_flushes_go_one_by_one(s: Secondary) -> None:
    ask(s, FLUSH, 1)
    ask(s, FLUSH, 2)
    (one,) = takes(s, 1)
    s.disk_done(one)
    (two,) = takes(s, 2)
    s.disk_done(two, error=5)
    answers(s, 1)
    assert s.back.reply()[0].error == 5
    s.all_slots_free()


def test_received_is_said_before_the_disk_has_it_even_behind_a_flush(s: Secondary) -> None:
    write(s, 1, 0, b"x" * 512)
    ask(s, FLUSH, 2)
    write(s, 3, 0, b"y" * 40 * KIB, memsync=True)
    (one,) = takes(s, 1)
    received = s.back.reply()[0]
    assert (received.seq, received.received) == (3, True)
    unstored = s.arena.c.stage[RECV].extra
    assert unstored[1] == 1
    s.disk_done(one)
    s.disk_done(*takes(s, 2))
    assert unstored[1] == 1
    s.disk_done(*takes(s, 3))
    assert [s.back.reply()[0].received for _ in range(3)] == [False] * 3
    assert unstored[1] == 0


def test_flush_that_is_done_after_the_worker_has_failed_one_has_failed(s: Secondary) -> None:
    """The disk says it once; the disk stage hears of it in a message."""
    s.arena.seq.loss = 1
    ask(s, FLUSH, 1)
    s.disk_done(*takes(s, 1))
    assert s.back.reply()[0].error == 5


def test_received_and_not_stored_stays_so_when_the_disk_fails(s: Secondary) -> None:
    write(s, 1, 0, b"y" * 40 * KIB, memsync=True)
    s.disk_done(*takes(s, 1), error=5)
    assert [s.back.reply()[0].error for _ in range(2)] == [0, 5]
    assert s.arena.c.stage[RECV].extra[1] == 1


def test_one_seq_for_many(s: Secondary) -> None:
    """The original's synchronisation writes all have seq 1, and so has a client's write among them."""
    write(s, 1, 0, b"a" * 512)
    write(s, 1, 512, b"b" * 512, memsync=True)
    write(s, 1, 0, b"c" * 512)
    one, two = takes(s, 1, 1)
    assert s.back.reply()[0].received
    s.disk_done(two)
    answers(s, 1)
    s.disk_done(one)
    (three,) = takes(s, 1)
    assert s.contents(three) == b"c" * 512
    s.disk_done(three)
    answers(s, 1, 1)
    s.all_slots_free()


def test_without_slots_nothing_more_is_read() -> None:
    """Eight slots, all with the disk: the rest waits in the connection, and goes on as soon as replies are out."""
    with running(Secondary(nclient=8, family="tcp")) as s:
        for seq in range(1, 101):
            write(s, seq, seq * 512, b"x" * 512)
        slots = s.disk_takes(8)
        assert s.arena.seq.nfree == 0
        for seq in range(1, 101):
            s.disk_done(slots.pop(0))
            answers(s, seq)
            if seq + 8 <= 100:
                slots += s.disk_takes()
                assert s.bio(slots[-1]).seq == seq + 8
        s.all_slots_free()
        assert s.alive()


def test_without_slots_the_connection_fills_up() -> None:
    with running(Secondary(nclient=4, slab_size=256 * KIB)) as s:
        message = Request(Cmd.WRITE, 1, 0, 128 * KIB, False, DataInfo(128 * KIB))
        s.into.sock.settimeout(1.0)
        sent = 0
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                s.into.ask(message, b"x" * 128 * KIB)
                sent += 1
        assert 4 <= sent < 100
        assert s.alive() and s.stages[RECV].lost is None


# ---- at random ----


@dataclass
class Sent:
    cmd: int
    begin: int
    end: int
    data: bytes = b""
    state: str = "sent"  # then "disk", "done"


def conflict(x: Sent, y: Sent) -> bool:
    if FLUSH in (x.cmd, y.cmd):
        return True
    return not x.cmd == y.cmd == READ and x.begin < y.end and y.begin < x.end


def may_run(sent: list[Sent], n: int) -> bool:
    """The rule, written down naively: everything before it that is in its way is done."""
    return all(old.state == "done" for old in sent[:n] if conflict(old, sent[n]))


def random_request(dice: random.Random, area: int) -> Sent:
    cmd = dice.choices((READ, WRITE, DELETE, FLUSH), (3, 6, 1, 0.6))[0]
    if cmd == FLUSH:
        return Sent(FLUSH, 0, 0)
    length = 512 * dice.choice((1, 1, 2, 3, 8, 40, 100))
    if cmd == DELETE:
        length *= dice.choice((1, 10))
    begin = dice.randrange(0, area - length, 512)
    data = dice.randbytes(8) * (length // 8) if cmd == WRITE else b""
    return Sent(cmd, begin, begin + length, data)


def send_one(s: Secondary, seq: int, one: Sent) -> None:
    if one.cmd == WRITE:
        write(s, seq, one.begin, one.data, memsync=seq % 2 == 0)
    else:
        ask(s, one.cmd, seq, one.begin, one.end - one.begin)


@pytest.mark.parametrize("seed", range(6))
def test_exactly_what_may_run_runs(seed: int) -> None:
    """Never more than 60 under way, so slots are no limit: the disk has then exactly what the rule lets it have."""
    dice = random.Random(seed)
    with running(Secondary(nclient=64, family=("unix", "tcp")[seed % 2])) as s:
        sent: list[Sent] = []
        slot_of: dict[int, int] = {}
        open_ = 0
        while len(sent) < 1200 or open_:
            for _ in range(dice.randrange(0, 12)):
                if open_ < 60 and len(sent) < 1200:
                    sent.append(random_request(dice, area=1 * MIB))
                    send_one(s, len(sent), sent[-1])
                    open_ += 1
            first = next((n for n, one in enumerate(sent) if one.state != "done"), len(sent))
            expected = {n for n in range(first, len(sent)) if sent[n].state == "sent" and may_run(sent, n)}
            for slot in s.disk_takes(len(expected)) if expected else ():
                n = s.bio(slot).seq - 1
                assert n in expected, f"{sent[n]} is with the disk too early"
                if sent[n].cmd == WRITE:
                    assert s.contents(slot) == sent[n].data
                slot_of[n] = slot
                sent[n].state = "disk"
            assert s.disk_waits()
            running_now = [n for n, one in enumerate(sent) if one.state == "disk"]
            for n in dice.sample(running_now, min(len(running_now), dice.randrange(0, 8))):
                s.disk_done(slot_of.pop(n))
                sent[n].state = "done"
                open_ -= 1
            while not s.back.silent():
                s.back.reply()
        s.all_slots_free()
        assert s.alive()


@pytest.mark.parametrize("seed", range(4))
def test_with_few_slots_the_order_stands_too(seed: int) -> None:
    """More is sent than there are slots, by a primary that does not read replies at once; every request is answered."""
    dice = random.Random(100 + seed)
    with running(Secondary(nclient=6, family=("unix", "tcp")[seed % 2])) as s:
        sent = [random_request(dice, area=512 * KIB) for _ in range(400)]
        expected = sum(2 if one.cmd == WRITE and n % 2 else 1 for n, one in enumerate(sent))
        at_disk: dict[int, int] = {}
        written = answered = 0
        entries = ffi.new("uint32_t[8]")
        deadline = time.monotonic() + 30
        while answered < expected:
            assert time.monotonic() < deadline, f"{answered} of {expected} answers, {len(at_disk)} with the disk"
            if written < len(sent) and select.select([], [s.into.sock], [], 0)[1]:
                send_one(s, written + 1, sent[written])
                written += 1
            for i in range(lib.hast_ring_pop_some(s.arena.ring(lib.HAST_RING_DISK), entries, 8)):
                n = s.bio(entries[i]).seq - 1
                assert may_run(sent, n), f"{sent[n]} is with the disk too early"
                sent[n].state = "disk"
                at_disk[n] = int(entries[i])
                s.at_disk.append(at_disk[n])
            for n in dice.sample(sorted(at_disk), dice.randrange(0, len(at_disk) + 1)):
                sent[n].state = "done"
                s.disk_done(at_disk.pop(n))
            while dice.random() < 0.8 and not s.back.silent():
                s.back.reply()
                answered += 1
        assert all(one.state == "done" for one in sent)
        s.all_slots_free()
        assert s.alive()


def test_a_slot_is_not_free_before_its_reply_is_out() -> None:
    """The primary reads nothing: what stands in the slabs is still to be sent, so nothing else may come there."""
    with running(Secondary(nclient=3)) as s:
        for seq in (1, 2, 3):
            ask(s, READ, seq, 0, 1 * MIB)
        slots = s.disk_takes(3)
        for slot in slots:
            s.slab(slot)[:] = bytes([slot + 1]) * MIB
        s.disk_done(*slots)
        deadline = time.monotonic() + 30
        while s.line(SEND).bytes == 0 or s.line(RECV).state != 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert s.arena.seq.nfree == 0 and s.arena.ring_used(lib.HAST_RING_SEND_DONE) == 0
        for slot in slots:
            reply, data, _ = s.back.reply()
            assert (reply.seq, data) == (s.bio(slot).seq, bytes([slot + 1]) * MIB)
        s.all_slots_free()
