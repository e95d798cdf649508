"""Invariant 9: each slot has one owner and comes back exactly once. What may be submitted."""

import pytest

from tests.sim.harness import (
    ASYNC,
    CLAIMED,
    DELETE,
    FLAG_ZERO,
    FLUSH,
    FREE,
    MAP,
    MEMSYNC,
    NONE,
    READ,
    WRITE,
    Bench,
    Sequencer,
    shape,
)

EINVAL = -22


def free_slots(seq: Sequencer) -> list[int]:
    slots, slot = [], seq.s.free_head
    while slot != NONE:
        slots.append(slot)
        slot = seq.bio[slot].next
    return slots


def test_all_slots_can_be_claimed_once() -> None:
    seq = Sequencer(shape(nclient=5))
    assert [seq.claim() for _ in range(6)] == [0, 1, 2, 3, 4, NONE]
    assert seq.s.nfree == 0
    for slot in range(5):
        seq.release(slot)
    assert seq.s.nfree == 5 and free_slots(seq) == [4, 3, 2, 1, 0]


def test_last_in_first_out() -> None:
    seq = Sequencer(shape())
    one, two, three = seq.claim(), seq.claim(), seq.claim()
    seq.release(two)
    assert seq.claim() == two
    seq.release(one)
    seq.release(three)
    assert [seq.claim(), seq.claim()] == [three, one]


def test_released_twice_comes_back_once() -> None:
    seq = Sequencer(shape(nclient=3))
    slot = seq.claim()
    seq.release(slot)
    seq.release(slot)
    assert seq.s.nfree == 3 and len(free_slots(seq)) == 3


def test_answered_slot_is_the_devices_until_released() -> None:
    b = Bench(nclient=1)
    slot = b.read(0)
    b.local_done(slot)
    assert b.seq.claim() == NONE and b.seq.quiet()
    b.forget(slot)
    assert b.seq.claim() == slot


def test_acknowledged_early_and_released_is_free_when_the_secondary_is_done() -> None:
    for mode in (MEMSYNC, ASYNC):
        b = Bench(mode=mode, nclient=1)
        slot = b.write(0)
        b.map_done()
        if mode == MEMSYNC:
            b.received(slot)
        b.local_done(slot)
        b.forget(slot)
        assert b.seq.claim() == NONE and not b.seq.quiet()
        b.remote_done(slot)
        assert b.seq.claim() == slot and b.answers == {}


def test_device_gone_in_the_middle() -> None:
    """Released in every state that a bio can be in: never answered, free when the sequencer is done with it."""
    b = Bench(nclient=12)
    for n in range(2):
        b.whole_write(n)
    running, blocked, mapwait = b.write(0), b.write(0), b.write(5)
    read, flush, queued, delete = b.read(0), b.flush(), b.flush(), b.delete(1)
    for slot in (running, blocked, mapwait, read, flush, queued, delete):
        b.seq.release(slot)
    assert b.seq.s.nfree == 5
    b.map_done()
    for slot in (running, mapwait, read, flush, delete, blocked, queued):
        b.done(slot)
    assert b.answers == {} and b.seq.quiet()
    assert b.seq.s.nfree == 12 and sorted(free_slots(b.seq)) == list(range(12))


def test_device_gone_while_a_write_waits_for_its_grant() -> None:
    b = Bench(connected=False, nclient=2)
    slot = b.write(0)
    b.map_done()
    b.local_done(slot)
    b.seq.release(slot)
    assert b.seq.s.nfree == 1
    b.grant()
    assert b.seq.s.nfree == 2 and b.answers == {}


def test_device_gone_whose_write_is_refused() -> None:
    b = Bench(nclient=2)
    slot = b.write(0)
    b.seq.release(slot)
    b.map_done(5)
    assert b.seq.s.nfree == 2 and b.answers == {} and b.seq.quiet()


def test_released_before_its_answer_was_taken() -> None:
    """The answer that nobody wants is dropped, and must not be taken for the next user's."""
    b = Bench(nclient=1)
    slot = b.read(0)
    b.local.remove(slot)
    assert b.seq.complete(0, slot) == 0
    b.seq.release(slot)
    assert b.seq.claim() == NONE
    assert b.seq.acked() == []
    assert b.seq.claim() == slot and b.seq.s.nfree == 0
    assert b.seq.submit(slot, READ, 0, 512) == 0
    assert b.seq.acked() == []


def test_early_answer_released_before_it_was_taken() -> None:
    for taken_first in (True, False):
        b = Bench(mode=ASYNC, nclient=1)
        slot = b.write(0)
        b.map_done()
        b.local.remove(slot)
        assert b.seq.complete(0, slot) == 0
        b.seq.release(slot)
        if taken_first:
            assert b.seq.acked() == []
        assert b.seq.complete(1, slot) == 0
        assert b.seq.acked() == []
        assert b.seq.s.nfree == 1 and b.seq.claim() == slot


def test_own_slots_never_reach_the_device() -> None:
    b = Bench(keepdirty=1, nclient=2)
    for n in range(4):
        b.whole_write(n)
    b.whole_flush()
    b.rest()
    assert b.seq.s.nfree == 2 and sorted(free_slots(b.seq)) == [0, 1]
    assert b.seq.bio[b.seq.map_slot].state == b.seq.bio[b.seq.own_flush_slot].state == FREE


def test_sequence_numbers_are_never_zero_and_never_used_twice() -> None:
    b = Bench(keepdirty=1)
    seen = set()
    for n in range(6):
        slot = b.write(n)
        seen.add(b.seq.bio[b.seq.map_slot].seq)
        b.settle_own()
        seen.add(b.seq.bio[slot].seq)
        b.done(slot)
        b.forget(slot)
    assert len(seen) == 12 and 0 not in seen


SIZE = 16 * 4096 - 1024


@pytest.mark.parametrize(
    "cmd,offset,length",
    [
        (READ, 0, 0),
        (WRITE, 0, 0),
        (DELETE, 512, 0),
        (READ, 256, 512),
        (WRITE, 512, 100),
        (WRITE, 0, 4096 + 512),
        (READ, 0, 4096 + 512),
        (READ, SIZE, 512),
        (WRITE, SIZE - 512, 1024),
        (DELETE, 0, SIZE + 512),
        (DELETE, 512, SIZE),
        (DELETE, 512, 2**64 - 512),
        (WRITE, 2**64 - 512, 512),
        (READ, 2**63, 512),
        (MAP, 0, 512),
        (0, 0, 512),
        (6, 0, 512),
        (255, 0, 512),
    ],
)
def test_what_is_not_possible_stays_claimed(cmd: int, offset: int, length: int) -> None:
    b = Bench(short=1024)
    slot = b.seq.claim()
    assert b.seq.submit(slot, cmd, offset, length) == EINVAL
    b.look()
    assert b.local == [] and b.seq.quiet() and b.seq.bio[slot].state == CLAIMED
    b.seq.release(slot)
    assert b.seq.s.nfree == 8


@pytest.mark.parametrize(
    "cmd,offset,length,flags",
    [
        (READ, SIZE - 4096, 4096, 0),
        (WRITE, SIZE - 512, 512, 0),
        (WRITE, SIZE - 4096, 4096, FLAG_ZERO),
        (DELETE, 0, SIZE, 0),
        (FLUSH, 0, 0, 0),
        (FLUSH, 100, 2**64 - 1, 0),
    ],
)
def test_what_is_just_possible(cmd: int, offset: int, length: int, flags: int) -> None:
    b = Bench(short=1024)
    slot = b.request(cmd, offset, length, flags)
    b.settle_map()
    b.done(slot)
    assert b.answers == {slot: 0}


def test_only_a_claimed_slot_can_be_submitted() -> None:
    b = Bench()
    slot = b.read(0)
    assert b.seq.submit(slot, READ, 0, 512) == EINVAL
    b.local_done(slot)
    assert b.seq.submit(slot, READ, 0, 512) == EINVAL
    b.forget(slot)
    assert b.seq.submit(slot, READ, 0, 512) == EINVAL
