"""The Python face of rings and doorbells, and what one process alone can see of them."""

from __future__ import annotations

import os
import threading
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.errors import DataError, SystemCallError
from hast.shm.doorbell import Doorbell
from hast.shm.ring import Ring

INDEX = st.integers(0, 2**32 - 1)


def start_at(ring: Ring, index: int) -> None:
    ring.c.head = ring.c.tail = ring.c.head_seen = ring.c.tail_seen = index


@given(
    st.sampled_from([1, 2, 8, 64]),
    st.one_of(st.just(2**32 - 3), INDEX),
    st.lists(st.tuples(st.booleans(), st.integers(0, 70)), max_size=60),
)
def test_is_a_bounded_queue(entries: int, first: int, steps: list[tuple[bool, int]]) -> None:
    ring, model, number = Ring.create(entries), deque[int](), 0
    start_at(ring, first)
    for push, n in steps:
        if push:
            done = ring.push([(number + i) & 0xFFFFFFFF for i in range(n)])
            assert done == min(n, entries - len(model))
            model.extend(range(number, number + done))
            number += done
        else:
            got = ring.pop(n)
            # What the consumer knew of is taken without a look at the producer's line: perhaps not all.
            assert got == [model.popleft() for _ in got]
            assert got or not model or n == 0
        assert len(ring) == len(model)


@given(st.sampled_from([1, 4, 32]), INDEX, INDEX)
def test_an_impossible_tail_is_reported(entries: int, head: int, tail: int) -> None:
    ring = Ring.create(entries)
    start_at(ring, head)
    ring.c.tail = tail
    ahead = (tail - head) % 2**32
    assert len(ring) <= entries
    if ahead <= entries:
        assert len(ring.pop()) == ahead
    else:
        with pytest.raises(DataError, match="producer left"):
            ring.pop()
        assert int(ring.c.head) == head


@given(st.sampled_from([1, 4, 32]), INDEX, INDEX)
def test_an_impossible_head_is_reported(entries: int, head: int, tail: int) -> None:
    ring = Ring.create(entries)
    start_at(ring, tail)
    ring.c.head = ring.c.head_seen = head
    inside = (tail - head) % 2**32
    if inside <= entries:
        assert ring.push([1] * entries) == entries - inside
    else:
        with pytest.raises(DataError, match="consumer left"):
            ring.push([1])
        assert int(ring.c.tail) == tail


@pytest.mark.parametrize("entries", [0, -1, 3, 2**25])
def test_impossible_sizes(entries: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Ring.create(entries)


@pytest.fixture(params=["futex", "eventfd"])
def bell(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    efd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) if request.param == "eventfd" else -1
    yield Doorbell.create(efd)
    if efd >= 0:
        os.close(efd)


def test_no_system_call_for_one_who_is_awake(bell: Doorbell) -> None:
    bell.ring()
    bell.announce()
    bell.cancel()
    bell.ring()
    assert bell.wakes == 0


def test_one_system_call_for_one_who_sleeps(bell: Doorbell) -> None:
    bell.announce()
    bell.ring()
    bell.ring()
    assert bell.wakes == 1
    assert bell.wait(60) is True
    bell.announce()
    assert bell.wait(0.01) is False
    bell.force()
    assert bell.wakes == 2


def test_wakes_a_thread(bell: Doorbell) -> None:
    """The wait gives other Python threads their turn, or nobody could ring."""
    woken: list[bool] = []
    bell.announce()
    sleeper = threading.Thread(target=lambda: woken.append(bell.wait(60)))
    sleeper.start()
    bell.ring()
    sleeper.join(60)
    assert woken == [True]
    assert int(bell.c.sleeping) == 0


def test_a_closed_eventfd_is_an_error() -> None:
    efd = os.eventfd(0, os.EFD_NONBLOCK)
    bell = Doorbell.create(efd)
    os.close(efd)
    with pytest.raises(SystemCallError, match="cannot ring a doorbell"):
        bell.force()


def test_a_producer_in_another_process() -> None:
    ring, bell = Ring.create(8), Doorbell.create()
    pid = os.fork()
    if pid == 0:
        try:
            for n in range(1000):
                end = time.monotonic() + 60
                while ring.push([n]) == 0 and time.monotonic() < end:
                    os.sched_yield()
                bell.ring()
        finally:
            os._exit(0)
    got: list[int] = []
    end = time.monotonic() + 60
    while len(got) < 1000 and time.monotonic() < end:
        bell.announce()
        batch = ring.pop()
        if batch:
            bell.cancel()
            got += batch
        else:
            bell.wait(60)
    os.waitpid(pid, 0)
    assert got == list(range(1000))
