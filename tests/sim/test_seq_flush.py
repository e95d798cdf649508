"""Client flushes: invariant 5's second half, and how they are put together."""

from tests.sim.harness import ASYNC, MEMSYNC, NEED_DEGRADED, REMOTE_FAILED, Bench


def hot(**wanted: int) -> Bench:
    b = Bench(**wanted)
    for n in range(2):
        b.whole_write(n)
    return b


def test_flush_waits_for_both_in_every_mode() -> None:
    for mode in (0, MEMSYNC, ASYNC):
        b = hot(mode=mode)
        slot = b.flush()
        assert b.local == [slot] and b.remote == [slot]
        b.local_done(slot)
        assert b.answers == {}
        b.remote_done(slot)
        assert b.answers == {slot: 0} and b.seq.quiet()


def test_flush_that_comes_while_one_is_under_way_gets_one_of_its_own() -> None:
    """A write acknowledged since the first began has to be covered by the second."""
    b = hot()
    first = b.flush()
    b.whole_write(0)
    second = b.flush()
    assert second not in b.local
    b.local_done(first)
    assert second not in b.local
    b.remote_done(first)
    assert b.answers == {first: 0} and b.local == [second] and b.remote == [second]


def test_flushes_that_wait_are_one_batch() -> None:
    b = hot()
    first = b.flush()
    batch = [b.flush() for _ in range(4)]
    b.done(first)
    assert b.local == [batch[0]] and b.remote == [batch[0]]
    late = b.flush()
    b.done(batch[0])
    assert b.answers == dict.fromkeys([first, *batch], 0)
    assert b.local == [late]


def test_error_is_told_to_the_whole_batch() -> None:
    b = hot()
    first = b.flush()
    batch = [b.flush() for _ in range(3)]
    b.done(first)
    b.local_done(batch[0], 5)
    assert batch[0] not in b.answers
    b.remote_done(batch[0])
    assert b.answers == {first: 0} | dict.fromkeys(batch, 5)


def test_remote_error_drops_the_secondary_and_is_not_the_clients() -> None:
    b = hot()
    slot = b.flush()
    b.local_done(slot)
    b.remote_done(slot, 5)
    assert b.answers == {} and b.raised == REMOTE_FAILED | NEED_DEGRADED
    b.grant()
    assert b.answers == {slot: 0}


def test_degraded_flush_is_local_alone_and_waits_for_the_grant() -> None:
    """What it makes durable was acknowledged by both, and is durable on one from now on: that has to be known."""
    b = hot()
    b.disconnect()
    slot = b.flush()
    assert b.local == [slot] and b.remote == []
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED
    b.grant()
    assert b.answers == {slot: 0}
    again = b.flush()
    b.local_done(again)
    assert b.answers[again] == 0


def test_degraded_flush_of_what_both_have_flushed_needs_no_grant() -> None:
    """Nothing was written since: a counter raised for nothing would end in a needless split-brain."""
    b = hot()
    b.whole_flush()
    b.disconnect()
    slot = b.flush()
    b.local_done(slot)
    assert b.answers == {slot: 0} and b.raised == 0


def test_degraded_flush_after_a_restart_with_extents_that_may_differ_needs_the_grant() -> None:
    b = Bench(connected=False, load=0b1)
    slot = b.flush()
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED


def test_lost_secondary_ends_a_flush_that_waits_for_it() -> None:
    b = hot()
    done, running = b.flush(), b.flush()
    b.done(done)
    b.local_done(running)
    after = b.flush()
    b.disconnect()
    assert b.answers == {done: 0, running: 0} and b.raised == 0
    assert b.local == [after] and b.remote == []


def test_flush_during_which_the_secondary_was_lost_counts_for_no_clearing() -> None:
    b = hot(keepdirty=2)
    b.whole_write(5)
    flush = b.flush()
    b.disconnect()
    b.connect()
    b.local_done(flush)
    b.rest()
    assert b.seq.dirty() >= {0, 1, 5} and b.map == 0b100011


def test_own_flush_is_answered_to_nobody_and_joins_the_batch() -> None:
    b = hot(keepdirty=1)
    first = b.flush()
    assert b.seq.idle() == 1
    b.look()
    client = b.flush()
    b.done(first)
    own = b.seq.own_flush_slot
    assert b.local == [own]
    b.done(own)
    assert b.answers == {first: 0, client: 0} and b.seq.quiet()


def test_idle_starts_one_own_flush_at_a_time() -> None:
    b = hot(keepdirty=1)
    assert b.seq.idle() == 1
    assert b.seq.idle() == 0
    b.look()
    assert b.local == [b.seq.own_flush_slot]
    b.done(b.seq.own_flush_slot)
    b.rest()
    assert b.seq.quiet()


def test_failed_flush_is_the_error_of_writes_that_are_not_answered_yet() -> None:
    """They were in the cache that may be lost; told later, the next flush would seem to cover them."""
    b = hot()
    waiting = b.write(0)
    b.local_done(waiting)
    later = b.write(1)
    flush = b.flush()
    b.local_done(flush, 5)
    b.remote_done(flush)
    assert b.answers == {flush: 5}
    b.remote_done(waiting)
    b.local_done(later)
    b.remote_done(later)
    assert b.answers == {flush: 5, waiting: 5, later: 0} and 0 in b.seq.sync()


def test_failed_flush_is_the_error_of_writes_that_wait_for_the_grant() -> None:
    b = hot()
    b.disconnect()
    slot = b.write(0)
    b.local_done(slot)
    flush = b.flush()
    b.local_done(flush, 28)
    b.grant()
    assert b.answers == {flush: 28, slot: 28}
