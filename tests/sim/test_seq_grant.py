"""The grant, which is needed before something is promised that perhaps only this node has: which flushes need it, and
what becomes of those who wait for it (invariant 7). Most of this was found by the simulation of two nodes."""

import pytest

from tests.sim.harness import ASYNC, EIO, MEMSYNC, NEED_DEGRADED, Bench, own_flush, whole

# ---- flushes that need it ----


def test_first_flush_without_the_secondary_needs_the_grant_whatever_the_map_says() -> None:
    """A node that was secondary a moment ago has an empty map, and writes that the other one has in its cache only."""
    b = Bench(connected=False)
    slot = b.flush()
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED
    b.grant()
    assert b.answers == {slot: 0}


@pytest.mark.parametrize("mode", [0, MEMSYNC, ASYNC])
def test_a_flush_while_the_secondary_is_brought_up_to_date_needs_the_grant(mode: int) -> None:
    """What was acknowledged before this node was started anew may not be there: only the map speaks of it."""
    b = Bench(mode=mode, connected=False, load=0b1)
    b.connect()
    b.raised = 0
    flush = b.flush()
    b.done(flush)
    assert (flush in b.answers) == (mode == 0) and (b.raised == NEED_DEGRADED) == (mode != 0)
    b.grant()
    assert b.answers == {flush: 0}


@pytest.mark.parametrize("mode", [0, MEMSYNC, ASYNC])
def test_a_flush_does_not_cover_what_is_copied_after_it_was_sent(mode: int) -> None:
    """Nothing is left to be copied when it is answered, but the secondary has flushed before."""
    b = Bench(mode=mode, connected=False, load=0b1)
    b.connect()
    b.seq.sync_start(False)
    b.look()
    flush = b.flush()
    if b.seq.s.flush_running != flush:
        own_flush(b)
    b.remote_done(flush)
    for _ in range(64):
        for slot in {*b.local, *b.remote} - {flush, b.seq.own_flush_slot}:
            b.done(slot)
    assert b.seq.s.sync_copied == 1
    b.raised = 0
    b.local_done(flush)
    assert (flush in b.answers) == (mode == 0) and bool(b.raised & NEED_DEGRADED) == (mode != 0)


def test_a_flush_when_the_secondary_is_lost_before_it_is_complete_needs_the_grant() -> None:
    """An acknowledged write that only the map speaks of (async, before a restart) is perhaps durable here alone."""
    b = Bench(mode=ASYNC, connected=False, load=0b1)
    b.connect()
    b.seq.sync_start(False)
    b.look()
    first, flush = b.flush(), b.flush()
    while b.seq.s.flush_running != flush:
        own_flush(b)  # the sequencer's, or the first one: together they say nothing of the map
    b.local_done(flush)
    b.disconnect()
    assert b.raised & NEED_DEGRADED and not {first, flush} & b.answers.keys()


def test_a_flush_is_not_answered_by_a_secondary_that_has_failed_a_write_before_it() -> None:
    b = whole(ASYNC)
    slot = b.write(0)
    b.local_done(slot)
    assert b.answers == {slot: 0}
    flush = b.flush()
    b.local_done(flush)
    b.remote_done(slot, EIO)
    b.remote_done(flush)
    assert flush not in b.answers and b.raised & NEED_DEGRADED
    b.grant()
    assert b.answers[flush] == 0


# ---- those who wait for it ----


def test_who_waits_for_the_grant_needs_it_no_more_when_both_are_in_sync() -> None:
    """The counter cannot be raised, the disk being as it is; but the secondary is back, and gets everything."""
    b = Bench()
    b.synchronise()
    b.disconnect()
    slot = b.write(0)
    b.settle_map()
    b.local_done(slot)
    assert b.answers == {} and b.raised & NEED_DEGRADED
    b.connect()
    b.synchronise()
    assert b.answers == {slot: 0}


def test_who_waits_for_a_grant_that_is_not_to_be_had_is_told() -> None:
    b = Bench(connected=False)
    slot = b.write(0)
    b.settle_map()
    b.local_done(slot)
    b.seq.lib.hast_seq_refuse_degraded(b.seq.arena)
    b.look()
    assert b.answers == {slot: EIO}
    b.raised = 0
    again = b.write(0)
    b.local_done(again)
    assert b.raised == NEED_DEGRADED and again not in b.answers


def test_a_grant_that_was_asked_for_before_both_were_in_sync_is_void() -> None:
    """The worker raises localcnt, then learns of SYNC_DONE and makes the counters equal: who comes after that has to
    ask again. The number that goes with question and answer says so (hast/stages/ggate.py compares it)."""
    b = Bench(connected=False)
    slot = b.write(0)
    b.settle_map()
    b.local_done(slot)
    assert b.raised & NEED_DEGRADED
    number = b.seq.s.sync_number
    b.raised = 0
    b.connect()
    b.synchronise()
    assert b.answers == {slot: 0} and b.seq.s.sync_number != number
    b.disconnect()
    b.raised = 0
    slot = b.write(0)
    b.settle_map()
    b.local_done(slot)
    assert b.raised & NEED_DEGRADED and slot not in b.answers


def test_who_waits_for_the_grant_does_it_again_when_the_component_is_out_of_date() -> None:
    """The question was asked before the component was given up: only what is given up has it."""
    b = whole()
    slot = b.write(0)
    b.local_done(slot)
    b.disconnect()
    flush = b.flush()
    b.local_done(flush)
    assert b.raised & NEED_DEGRADED and b.answers == {}
    number = b.seq.s.sync_number
    b.outdated()
    b.grant()
    assert b.answers == {} and b.seq.s.sync_number != number
    b.connect()
    for _ in range(20):
        for other in {*b.local, *b.remote}:
            b.done(other)
    assert b.answers == {slot: 0, flush: 0}
