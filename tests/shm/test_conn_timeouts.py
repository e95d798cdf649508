"""A peer that stops: reading, answering, sending, in the middle of something.

The connection is lost after the timeout, not before, and an idle one is not lost at all. How late a loaded machine is,
is not tested; where a connection must not be lost, the peer stays far below the timeout.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hast.ffi import _hast
from hast.messages import Cmd, DataInfo, Reply, Request, pack_message
from hast.stages.context import RECV, SEND
from tests.shm.connrig import DELETE, FLUSH, KIB, MIB, READ, SECONDS, WRITE, Primary, Secondary, Wire, pair

lib = _hast.lib
TIMEOUT = 0.4  # seconds
TICK = TIMEOUT / 8
LONG = 2.0  # where nothing may be lost
SOON = TIMEOUT - 2 * TICK  # the earliest; a timer may begin before the test's own
FAMILIES = pytest.mark.parametrize("family", ["unix", "tcp"])


@contextmanager
def running(rig: Any) -> Iterator[Any]:
    try:
        yield rig
    finally:
        rig.close()


@contextmanager
def not_sooner() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began >= SOON


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for it, but not longer."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)


# ---- the primary ----


def test_a_secondary_that_does_not_answer() -> None:
    with running(Primary(timeout=TIMEOUT)) as p:
        p.submit(FLUSH)
        with not_sooner():
            number, why = p.lost(RECV)
        assert (number, why) == (errno.ETIMEDOUT, "the secondary has answered nothing for 0.4 s")
        assert p.alive()
        p.stop(RECV)


def test_a_secondary_that_stops_in_the_middle_of_an_answer() -> None:
    for cut in (3, 20, 100, 100_000):
        with running(Primary(timeout=TIMEOUT)) as p:
            slot = p.submit(READ, 0, 128 * KIB)
            p.out.request()
            data = bytes(128 * KIB)
            raw = pack_message(2, Reply(p.seq(slot), data=DataInfo(len(data))).to_nv(), data)
            p.back.say(raw[:cut])
            with not_sooner():
                assert p.lost(RECV)[0] == errno.ETIMEDOUT
            assert p.nothing_done()


def test_nobody_waits_for_an_idle_secondary() -> None:
    """Long silence without requests, then one that is answered in time, then silence again."""
    with running(Primary(timeout=LONG)) as p:
        for _ in range(2):
            time.sleep(1.2 * LONG)
            slot = p.submit(DELETE, 0, 4096)
            p.out.request()
            time.sleep(LONG / 8)
            p.back.answer(Reply(p.seq(slot)))
            assert p.done()[0].error == 0
        assert p.alive() and p.stages[RECV].lost is None


def test_a_slow_secondary_is_not_a_dead_one() -> None:
    """Each request takes long, but less than the timeout; there is always one out there, and seldom a byte."""
    with running(Primary(timeout=LONG)) as p:
        out = [p.submit(FLUSH)]
        p.out.request()
        for _ in range(6):
            time.sleep(LONG / 3)
            out.append(p.submit(DELETE, 0, 4096))
            p.out.request()
            first = out.pop(0)
            p.back.answer(Reply(p.seq(first)))
            assert p.done()[0].slot == first
        assert p.alive() and p.stages[RECV].lost is None


@pytest.mark.parametrize("kind", ["flush", "delete", "write that it has in memory"])
def test_a_secondary_that_sits_on_one_request(kind: str) -> None:
    """All others are answered at once: there is no silence, also where this test has to wait for its processor."""
    with running(Primary(timeout=LONG)) as p, not_sooner():
        if kind == "flush":
            stuck = p.submit(FLUSH)
        elif kind == "delete":
            stuck = p.submit(DELETE, MIB, 4096)
        else:
            stuck = p.submit(WRITE, MIB, data=b"x" * 4096, flags=lib.HAST_BIO_MEMSYNC)
        p.out.message() if kind in ("flush", "delete") else p.out.written()
        if kind.startswith("write"):
            p.back.answer(Reply(p.seq(stuck), received=True))
            assert p.done()[0].received
        others = 0
        while not select.select([p.stages[RECV].channel], [], [], TIMEOUT / 20)[0]:
            slot = p.submit(DELETE, 0, 4096)
            p.out.request()
            p.back.answer(Reply(p.seq(slot)))
            if came := p.arena.ring_used(lib.HAST_RING_RECV_DONE):
                others += len(p.done(came))
        expected = errno.ETIMEDOUT, "the secondary has had a request for 2 s without answering it"
        assert p.lost(RECV) == expected
        assert others > 0 and p.alive()


def test_a_pause_of_this_node_is_not_the_secondarys() -> None:
    """Its answer lies there, unread, for as long as this process, or its machine, does nothing."""
    with running(Primary(timeout=1.0)) as p:
        slot = p.submit(FLUSH)
        p.out.message()
        time.sleep(0.3)  # it has been seen by then that this one is outstanding
        with stopped(p.stages[RECV].child.pid):
            time.sleep(1.5)
            p.back.answer(Reply(p.seq(slot)))
        assert p.done()[0].error == 0 and p.alive()


@FAMILIES
def test_a_secondary_that_stops_reading(family: str) -> None:
    with running(Primary(family=family, timeout=TIMEOUT, keepalive=60.0, nclient=128)) as p:
        p.arena.seq.nremote = 0
        began = time.monotonic()
        for n in range(100):
            p.push(lib.HAST_RING_SEND, RECV, [p.fill(WRITE, n * 128 * KIB, data=b"x" * 128 * KIB)])
        p.arena.seq.nremote = 0  # that nothing comes from there is not what is found
        number, why = p.lost(RECV)
        assert time.monotonic() - began >= SOON
        assert (number, why) == (errno.ETIMEDOUT, "the secondary has taken no data for 0.4 s")
        assert p.alive()
        p.stop(RECV)


@FAMILIES
def test_a_secondary_that_reads_slowly(family: str) -> None:
    """A little in each quarter of the timeout: everything arrives, in order and whole, over many partial sends."""
    with running(Primary(family=family, timeout=LONG, nclient=128)) as p:
        blocks = [bytes([n]) * 128 * KIB for n in range(40)]
        slots = [p.fill(WRITE, n * 128 * KIB, data=block) for n, block in enumerate(blocks)]
        p.push(lib.HAST_RING_SEND, RECV, slots)
        p.arena.seq.nremote = 0
        for n, block in enumerate(blocks):
            if n % 8 == 0:
                time.sleep(LONG / 4)
            request, data = p.out.written()
            assert (request.seq, request.offset, data) == (p.seq(slots[n]), n * 128 * KIB, block)
        assert p.alive() and p.stages[RECV].lost is None


def test_requests_do_for_keepalives() -> None:
    with running(Primary(keepalive=LONG / 2)) as p:
        for _ in range(6):
            p.submit(FLUSH)
            assert p.out.request()[0].cmd == Cmd.FLUSH
            time.sleep(LONG / 8)
        for _ in range(2):
            assert p.out.request()[0].cmd == Cmd.KEEPALIVE


def test_a_keepalive_that_goes_unread_is_not_the_end() -> None:
    """What the kernel takes is taken: an idle connection is given up only when somebody waits for an answer."""
    with running(Primary(keepalive=0.05, timeout=TIMEOUT)) as p:
        time.sleep(3 * TIMEOUT)
        assert p.alive() and p.stages[RECV].lost is None
        for _ in range(5):
            assert p.out.request()[0].cmd == Cmd.KEEPALIVE


def test_a_keepalive_never_takes_the_place_of_a_request() -> None:
    """It falls due while a request is stuck, and the stage, which was paused, finds out in the moment in which the peer
    reads again. The request did not go then, nor anything after it."""
    (one, out), (two, back) = pair("unix"), pair("unix")
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * KIB)
    with running(Primary(timeout=SECONDS, keepalive=TIMEOUT, ends=(one, two))) as p:
        p.out, p.back = Wire(out), Wire(back)
        slots: list[int] = []
        sent = -1
        while p.line(SEND).bytes != sent:
            sent = p.line(SEND).bytes
            time.sleep(2 * TICK)  # the timer runs from a tick on
            slots.append(p.submit(WRITE, len(slots) * 4096, data=bytes([len(slots)]) * 4096))
            p.arena.seq.nremote = 0  # that nothing comes from there is not what is looked at
            until(lambda before=sent: p.line(SEND).bytes != before, 2 * TICK)
        time.sleep(2 * TIMEOUT)
        arrived = []
        with stopped(p.stages[RECV].child.pid):
            while not p.out.silent():
                arrived.append(p.out.request()[0])
            time.sleep(3 * TICK)
        while len([request for request in arrived if request.cmd == Cmd.WRITE]) < len(slots):
            arrived.append(p.out.request()[0])
        assert [r.seq for r in arrived if r.cmd == Cmd.WRITE] == [p.seq(slot) for slot in slots]
        assert p.alive() and p.stages[RECV].lost is None


def test_an_idle_primary_wakes_up_for_its_keepalives_only() -> None:
    with running(Primary(keepalive=LONG / 2)) as p:
        assert p.out.request()[0].cmd == Cmd.KEEPALIVE
        before = p.sleeps(RECV)
        for _ in range(3):
            assert p.out.request()[0].cmd == Cmd.KEEPALIVE
        # One to begin to wait, one to send; not one for each tick, of which there are eight.
        assert p.sleeps(RECV) - before <= 3 * 4


# ---- the secondary ----


def test_an_idle_secondary_wakes_up_for_keepalives_only() -> None:
    with running(Secondary(silence=2 * LONG)) as s:
        before = s.sleeps(RECV)
        for _ in range(2):
            time.sleep(LONG * 3 / 4)
            s.into.ask(Request(Cmd.KEEPALIVE))
        assert s.alive() and s.stages[RECV].lost is None
        assert s.sleeps(RECV) - before <= 2 * 3


def test_a_primary_that_is_silent() -> None:
    with running(Secondary(silence=TIMEOUT)) as s:
        with not_sooner():
            number, why = s.lost(RECV)
        assert (number, why) == (errno.ETIMEDOUT, "the primary has sent nothing for 0.4 s")
        assert s.alive()
        s.stop(RECV)


@pytest.mark.parametrize("cut", [1, 50, 200, 30_000])
def test_a_primary_that_stops_in_the_middle_of_a_request(cut: int) -> None:
    data = b"x" * 128 * KIB
    with running(Secondary(silence=TIMEOUT)) as s:
        s.into.say(pack_message(2, Request(Cmd.WRITE, 1, 0, len(data), True, DataInfo(len(data))).to_nv(), data)[:cut])
        with not_sooner():
            assert s.lost(RECV)[0] == errno.ETIMEDOUT
        assert s.disk_waits() and s.back.silent()
        s.all_slots_free()


def test_keepalives_keep_it() -> None:
    with running(Secondary(silence=LONG)) as s:
        for _ in range(6):
            s.into.ask(Request(Cmd.KEEPALIVE))
            time.sleep(LONG / 4)
        assert s.alive() and s.stages[RECV].lost is None
        assert s.back.silent() and s.disk_waits()


def test_a_slow_disk_is_not_the_primarys_silence() -> None:
    """All slots are with the disk, so recv does not read: that the primary cannot send is not its fault."""
    with running(Secondary(silence=TIMEOUT, nclient=2)) as s:
        for seq in range(1, 4):
            s.into.ask(Request(Cmd.READ, seq, seq * 512, 512))
        slots = s.disk_takes(2)
        time.sleep(3 * TIMEOUT)
        assert s.stages[RECV].lost is None and s.alive()
        s.disk_done(*slots)
        s.disk_done(*s.disk_takes())
        assert [s.back.reply()[0].seq for _ in range(3)] == [1, 2, 3]


@FAMILIES
def test_a_primary_that_does_not_read_its_replies(family: str) -> None:
    with running(Secondary(family=family, timeout=TIMEOUT, nclient=32)) as s:
        for seq in range(1, 31):
            s.into.ask(Request(Cmd.READ, seq, 0, 1 << 20))
        slots = s.disk_takes(30)
        began = time.monotonic()
        s.disk_done(*slots)
        number, why = s.lost(RECV)
        assert time.monotonic() - began >= SOON
        assert (number, why) == (errno.ETIMEDOUT, "the primary has taken no data for 0.4 s")
        s.all_slots_free()
        assert s.alive()
        s.stop(RECV)
