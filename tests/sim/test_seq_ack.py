"""Invariants 5 (acknowledge: by the mode) and 7 (degraded first)."""

import pytest

from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    EIO,
    FLAG_MEMSYNC,
    FULLSYNC,
    MEMSYNC,
    NEED_DEGRADED,
    REMOTE_FAILED,
    Bench,
)


def hot(mode: int = FULLSYNC, connected: bool = True) -> Bench:
    b = Bench(mode=mode)
    for n in range(4):
        b.whole_write(n)
    if not connected:
        b.disconnect()
    return b


def test_fullsync_waits_for_both() -> None:
    for first in ("local", "remote"):
        b = hot()
        slot = b.write(0)
        (b.local_done if first == "local" else b.remote_done)(slot)
        assert b.answers == {}
        (b.remote_done if first == "local" else b.local_done)(slot)
        assert b.answers == {slot: 0} and b.raised == 0


def test_memsync_received_first() -> None:
    b = hot(MEMSYNC)
    slot = b.write(0)
    assert b.seq.bio[slot].flags & FLAG_MEMSYNC
    b.received(slot)
    assert b.answers == {}
    b.local_done(slot)
    assert b.answers == {slot: 0} and not b.seq.quiet()
    b.remote_done(slot)
    assert b.answers == {slot: 0} and b.seq.quiet()


def test_memsync_local_first() -> None:
    b = hot(MEMSYNC)
    slot = b.write(0)
    b.local_done(slot)
    assert b.answers == {}
    b.received(slot)
    assert b.answers == {slot: 0}
    b.remote_done(slot)
    assert b.answers == {slot: 0}


def test_memsync_final_reply_alone_will_do() -> None:
    b = hot(MEMSYNC)
    slot = b.write(0)
    b.local_done(slot)
    b.remote_done(slot)
    assert b.answers == {slot: 0}


def test_memsync_delete_waits_for_the_secondary() -> None:
    b = hot(MEMSYNC)
    slot = b.delete(0)
    assert not b.seq.bio[slot].flags & FLAG_MEMSYNC
    b.local_done(slot)
    assert b.answers == {}
    b.remote_done(slot)
    assert b.answers == {slot: 0}


@pytest.mark.parametrize("mode", [FULLSYNC, ASYNC])
def test_only_memsync_writes_have_two_replies(mode: int) -> None:
    b = hot(mode)
    assert not b.seq.bio[b.write(0)].flags & FLAG_MEMSYNC


def test_async_waits_for_local_alone() -> None:
    b = hot(ASYNC)
    slot = b.write(0)
    b.local_done(slot)
    assert b.answers == {slot: 0} and not b.seq.quiet()
    b.remote_done(slot)
    assert b.seq.quiet()


def test_async_remote_first() -> None:
    b = hot(ASYNC)
    slot = b.write(0)
    b.remote_done(slot)
    assert b.answers == {}
    b.local_done(slot)
    assert b.answers == {slot: 0}


def test_write_that_fails_is_not_counted_as_written_alone() -> None:
    """Nobody was told that it is there: a counter that is raised for it makes a split-brain that is none."""
    b = Bench(connected=False, load=0b1)
    slot = b.write(0)
    b.local_done(slot, EIO)
    assert b.answers == {slot: EIO} and b.raised == 0 and b.seq.sync() == {0}
    b.connect()
    both = b.write(0)
    b.disconnect()
    b.local_done(both, EIO)
    assert b.answers[both] == EIO and not b.raised & NEED_DEGRADED
    later = b.write(0)
    b.local_done(later)
    assert b.raised & NEED_DEGRADED and later not in b.answers


@pytest.mark.parametrize("mode", [FULLSYNC, MEMSYNC, ASYNC])
def test_degraded_write_waits_for_the_grant(mode: int) -> None:
    b = hot(mode, connected=False)
    slot = b.write(0)
    assert b.remote == []
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED and not b.seq.quiet()
    b.grant()
    assert b.answers == {slot: 0} and b.seq.quiet()


def test_degraded_write_after_the_grant_needs_none() -> None:
    b = hot(connected=False)
    b.done(b.write(0))
    b.grant()
    b.raised = 0
    slot = b.write(1)
    b.local_done(slot)
    assert b.answers[slot] == 0 and b.raised == 0


def test_need_degraded_is_raised_once() -> None:
    b = hot(connected=False)
    slots = [b.write(n) for n in range(3)]
    b.local_done(slots[0])
    assert b.raised == NEED_DEGRADED
    b.raised = 0
    b.local_done(slots[1])
    assert b.raised == 0
    b.grant()
    assert b.answers == dict.fromkeys(slots[:2], 0)
    b.local_done(slots[2])
    assert b.raised == 0 and b.answers[slots[2]] == 0


def test_grant_ends_with_the_next_connection() -> None:
    b = hot(connected=False)
    b.done(b.write(0))
    b.grant()
    b.connect()
    assert b.raised == NEED_DEGRADED | CONNECTED
    b.disconnect()
    b.raised = 0
    slot = b.write(1)
    b.local_done(slot)
    assert slot not in b.answers and b.raised == NEED_DEGRADED


def test_grant_for_a_failed_remote_write_is_for_that_one() -> None:
    """localcnt may be made equal again by a resynchronisation while connected: each later failure asks anew."""
    b = hot()
    slot = b.write(0)
    b.local_done(slot)
    b.remote_done(slot, 5)
    assert b.answers == {} and b.raised == NEED_DEGRADED | REMOTE_FAILED
    b.grant()
    assert b.answers == {slot: 0}
    b.raised = 0
    later = b.write(1)
    b.local_done(later)
    b.remote_done(later, 5)
    assert later not in b.answers and b.raised & NEED_DEGRADED
    b.grant()
    assert b.answers[later] == 0


def test_grant_that_comes_after_the_secondary_has_come_back() -> None:
    b = hot(connected=False)
    slot = b.write(0)
    b.local_done(slot)
    b.connect()
    assert b.answers == {}
    b.grant()
    assert b.answers == {slot: 0}
    later = b.write(1)
    b.local_done(later)
    b.remote_done(later, 5)
    assert later not in b.answers


def test_write_under_way_when_the_secondary_is_lost_waits_for_the_grant() -> None:
    for mode in (FULLSYNC, MEMSYNC):
        b = hot(mode)
        early, late = b.write(0), b.write(1)
        b.local_done(early)
        b.disconnect()
        assert b.answers == {} and b.raised == NEED_DEGRADED
        b.local_done(late)
        assert b.answers == {}
        b.grant()
        assert b.answers == {early: 0, late: 0}


def test_write_that_the_secondary_completed_before_it_was_lost_needs_a_grant_too() -> None:
    """It may have been lost with the secondary's cache, and is acknowledged without the secondary."""
    b = hot()
    slot = b.write(0)
    b.remote_done(slot)
    b.disconnect()
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED and 0 in b.seq.sync()
    b.grant()
    assert b.answers == {slot: 0}


@pytest.mark.parametrize("mode", [MEMSYNC, ASYNC])
def test_write_acknowledged_early_and_then_lost_still_asks_for_localcnt(mode: int) -> None:
    b = hot(mode)
    slot = b.write(0)
    if mode == MEMSYNC:
        b.received(slot)
    b.local_done(slot)
    assert b.answers == {slot: 0}
    b.disconnect()
    assert b.raised == NEED_DEGRADED and b.seq.sync() >= {0}
    b.grant()
    assert b.seq.quiet()


def test_local_error_is_answered_when_the_secondary_is_settled() -> None:
    for mode in (FULLSYNC, MEMSYNC, ASYNC):
        b = hot(mode)
        slot = b.write(0)
        b.local_done(slot, 28)
        assert b.answers == {}
        b.remote_done(slot)
        assert b.answers == {slot: 28} and 0 in b.seq.sync()


def test_local_error_while_degraded() -> None:
    b = hot(connected=False)
    slot = b.write(0)
    b.local_done(slot, 28)
    assert b.answers == {slot: 28} and b.seq.quiet()


def test_both_fail() -> None:
    b = hot()
    slot = b.write(0)
    b.remote_done(slot, 5)
    b.local_done(slot, 28)
    assert b.answers == {slot: 28} and 0 in b.seq.sync() and b.raised & REMOTE_FAILED


def test_remote_error_is_reported_once_and_leaves_the_extent_out_of_sync() -> None:
    b = hot()
    one, two = b.write(0), b.write(1)
    b.local_done(one)
    b.remote_done(one, 5)
    assert b.raised & REMOTE_FAILED and b.seq.sync() == {0} and b.seq.s.ndirty == 2
    b.raised = 0
    b.local_done(two)
    b.remote_done(two, 5)
    assert not b.raised & REMOTE_FAILED and b.seq.sync() == {0, 1}


def test_statistics() -> None:
    b = hot(connected=False)
    b.grant()
    before = b.seq.s.stats.write
    for cmd, error in ((b.write, 0), (b.write, 5), (b.delete, 5), (b.read, 5), (b.read, 0)):
        slot = cmd(0)
        b.local_done(slot, error)
        b.forget(slot)
    flush = b.flush()
    b.local_done(flush, 5)
    st = b.seq.s.stats
    assert (st.read, st.write - before, getattr(st, "del"), st.flush) == (
        2,
        2,
        1,
        1,
    )
    assert (st.read_error, st.write_error, st.delete_error, st.flush_error) == (1, 1, 1, 1)
