"""The local component is out of date: the secondary has what counts, nothing is acknowledged that only this node has
(invariants 1, 2, 6 and 7; hast/ffi/seq_local.c)."""

import errno

import pytest

from tests.sim.harness import (
    CONNECTED,
    EIO,
    FLAG_MEMSYNC,
    LOCAL_FAILED,
    MAP_FAILED,
    MAPWAIT,
    MEMSYNC,
    NEED_DEGRADED,
    READ,
    REMOTE_FAILED,
    SECTOR,
    SYNC_DONE,
    Bench,
    own_flush,
    whole,
)


def old(*extents: int, connected: bool = True, **wanted: int) -> Bench:
    """Out of date where it is marked."""
    b = Bench(connected=False, load=sum(1 << n for n in extents), **wanted)
    b.seq.s.sync_remote = 1
    if connected:
        b.connect()
        b.done(b.seq.own_flush_slot)
        assert b.raised == CONNECTED
        b.raised = 0
    return b


def test_out_of_date_a_write_is_acknowledged_when_it_is_durable_there() -> None:
    """The secondary may lose its power, and then its cache: this node's copy would be overwritten from there."""
    b = old(3, mode=MEMSYNC)
    slot = b.write(0)
    b.settle_map()
    assert not b.seq.bio[slot].flags & FLAG_MEMSYNC  # what is only received there counts for nothing
    b.local_done(slot)
    b.remote_done(slot)
    assert b.answers == {} and b.seq.s.served == 0
    own_flush(b)
    assert b.answers == {slot: 0} and b.seq.s.served == 1
    here = b.read(9)
    b.local_done(here)
    assert b.seq.s.served == 1, "that is not the secondary's doing"


def test_out_of_date_and_alone_nothing_is_acknowledged() -> None:
    b = old(3, 5, connected=False)
    write, delete, read, flush = b.write(3), b.delete(4), b.read(5), b.flush()
    here = b.read(9)
    b.settle_map()
    assert b.local == [here] and b.raised == 0
    assert b.seq.bio[write].state == MAPWAIT
    b.connect()
    own_flush(b)
    assert set(b.remote) == {write, delete, read} and b.answers == {flush: 0}


def test_out_of_date_and_alone_for_too_long_is_an_error() -> None:
    b = old(3, connected=False, nclient=16)
    waiting = [b.write(3), b.write(3), b.read(3), b.flush()]
    b.settle_map()
    b.give_up()
    assert b.answers == dict.fromkeys(waiting, EIO)
    late = [b.write(3), b.delete(7), b.read(3), b.flush()]
    b.settle_map()
    assert b.answers == dict.fromkeys([*waiting, *late], EIO)
    here = b.read(9)
    b.local_done(here)
    assert b.answers[here] == 0
    b.connect()
    b.settle_map()
    own_flush(b)
    assert b.seq.s.given_up == 0
    again = b.write(3)
    assert again in b.remote


def test_out_of_date_what_was_under_way_when_the_secondary_is_lost_is_done_again() -> None:
    b = old(3)
    running, stored, blocked, read, flush = b.write(3), b.write(0), b.write(3), b.read(3), b.flush()
    assert flush in b.local and flush in b.remote
    b.settle_map()
    b.local_done(running)
    b.local_done(stored)
    b.remote_done(stored)
    b.disconnect()
    b.local_done(flush)
    assert b.answers == {} and not b.raised & NEED_DEGRADED
    b.connect()
    b.settle_map()
    own_flush(b)
    assert {running, stored} <= set(b.remote) and blocked not in b.remote and read not in b.remote
    for slot in (running, stored):
        b.done(slot)
    assert running not in b.answers
    own_flush(b)
    own_flush(b)
    assert b.answers[running] == b.answers[stored] == 0 and blocked in b.remote


def test_out_of_date_the_secondary_flushes_before_it_is_read() -> None:
    """What it has in its cache only, and would show now, it might not show after its power has failed."""
    b = old(3, connected=False)
    read = b.read(3)
    b.connect()
    own = b.seq.own_flush_slot
    assert b.remote == [own]
    b.local_done(own)
    b.remote_done(own)
    assert b.remote == [read]


def test_a_secondary_that_fails_a_write_of_an_out_of_date_primary_gets_it_again() -> None:
    b = old(3)
    slot = b.write(3)
    b.settle_map()
    b.local_done(slot)
    b.remote_done(slot, EIO)
    assert b.answers == {} and b.raised == REMOTE_FAILED and slot not in b.remote
    b.disconnect()
    b.connect()
    own_flush(b)
    assert slot in b.remote


def test_old_errors_are_not_blamed_on_a_new_connection() -> None:
    """A write whose secondary was lost, and whose local disk is slow: the next secondary has not failed it."""
    b = whole()
    slot = b.write(0)
    b.disconnect()
    b.raised = 0
    b.connect()
    b.local_done(slot)
    assert not b.raised & REMOTE_FAILED


def test_a_failure_between_the_end_of_the_copying_and_its_being_stored() -> None:
    """It is not forgotten when the component is taken for current."""
    b = old(3)
    b.seq.sync_start(True)
    b.look()
    [chunk] = b.remote
    b.remote_done(chunk)
    b.local_done(chunk)
    own_flush(b)
    assert b.raised & SYNC_DONE
    b.raised = 0
    slot = b.write(3)
    b.local_done(slot, EIO)
    b.remote_done(slot)
    own_flush(b)
    assert b.answers == {} and b.raised == LOCAL_FAILED
    b.current()
    assert b.answers == {}
    read = b.read(3)
    assert read not in b.local
    b.outdated()
    assert b.answers == {slot: 0} and b.seq.s.sync_remote == 1 and 3 in b.seq.sync()


def test_extents_marked_while_connected_are_copied_without_a_new_connection() -> None:
    b = Bench()
    b.synchronise()
    b.disconnect()
    b.connect()
    b.synchronise()
    alone = b.write(0)
    b.settle_map()
    b.seq.s.peer_whole = 0
    b.local_done(alone, EIO)
    b.remote_done(alone)
    assert b.answers == {alone: EIO} and b.seq.sync() == {0} and b.seq.s.sync_on == 1
    b.seq.lib.hast_seq_sync_tick(b.seq.arena, 1000)
    b.look()
    for chunk in list(b.local):
        b.done(chunk)
    own_flush(b)
    assert b.raised & SYNC_DONE and b.seq.sync() == set()


def test_out_of_date_and_the_map_cannot_be_written_when_the_secondary_comes() -> None:
    """It has everything, and nothing marked that is not marked here: it does all of it."""
    b = old(3, connected=False)
    refused = b.write(9)
    b.map_done(EIO)
    assert b.answers == {refused: EIO}
    waiting = b.write(10)
    b.raised = 0
    b.connect()
    b.map_done(EIO)
    assert b.raised == CONNECTED and waiting not in b.answers
    own_flush(b)
    assert b.raised == CONNECTED | LOCAL_FAILED and b.seq.s.turn_detach == 1
    b.detach()
    assert waiting in b.remote and waiting not in b.local


def test_out_of_date_and_the_secondarys_map_cannot_be_written() -> None:
    """It is not used then. Who waits is not told: the worker gives this component up, and then it is used."""
    b = old(3, connected=False)
    before, read = b.write(9), b.read(3)
    b.settle_map()
    b.connect(0b110000)
    waiting = b.write(10)
    b.map_done(EIO)
    later = b.write(11)
    b.map_done(EIO)
    assert b.raised == MAP_FAILED and b.seq.s.join_failed == 1 and b.seq.s.connected == 0
    assert b.answers == {} and b.updating() is None
    b.detach()
    b.disconnect()
    b.connect(0xFFFFFFFF)
    own_flush(b)
    assert b.seq.s.join_failed == 0 and b.local.count(before) == 0
    assert {before, read, waiting, later} <= set(b.remote)
    b.remote_done(waiting)
    own_flush(b)
    assert b.answers == {waiting: 0}


def test_out_of_date_and_the_worker_does_nothing_about_a_map_that_cannot_be_written() -> None:
    b = old(3, connected=False)
    b.connect(0b110000)
    waiting = b.write(10)
    b.map_done(EIO)
    assert b.answers == {} and b.raised == MAP_FAILED
    b.disconnect()
    b.map_done(EIO)
    assert b.answers == {waiting: EIO}


def test_not_out_of_date_and_the_secondarys_map_cannot_be_written() -> None:
    """This node's data counts: there is no other good copy."""
    b = Bench(connected=False, load=0b1)
    waiting = b.write(10)
    b.map_done()
    b.done(waiting)
    b.connect(0b110000)
    assert b.updating() == {0, 4, 5, 10}
    refused = b.write(11)
    b.map_done(EIO)
    assert b.seq.s.join_failed == 1 and refused not in b.answers
    b.map_done(EIO)
    assert b.answers == {refused: EIO}


def test_out_of_date_and_cannot_be_given_up() -> None:
    """The setting asks for that, and it cannot be stored: what fails here is done by the secondary all the same."""
    b = old(3, nclient=8)
    b.seq.s.detach_on_error = 1
    failed = b.write(0)
    b.settle_map()
    b.local_done(failed, EIO)
    b.remote_done(failed)
    own_flush(b)
    assert b.raised == LOCAL_FAILED
    b.local_refused()
    assert b.answers == {failed: 0}
    again, read = b.write(1), b.read(7)
    b.settle_map()
    b.local_done(again, EIO)
    b.remote_done(again)
    b.local_done(read, EIO)
    assert read in b.remote
    b.remote_done(read)
    own_flush(b)
    assert b.answers == {failed: 0, again: 0, read: 0}


def test_out_of_date_and_the_secondary_cannot_read_it_either() -> None:
    """No good copy is left. A client's read is no reason to leave the secondary; that nothing can be copied from there
    is one."""
    b = old(3, 4, nclient=8)
    read, write = b.read(3), b.write(4)
    assert read in b.remote and read not in b.local
    b.remote_done(read, EIO)
    assert b.answers == {read: EIO} and read not in b.local and b.raised == 0
    b.settle_map()
    b.done(write)
    own_flush(b)
    assert b.answers == {read: EIO, write: 0}, "it goes on to be used"
    b.seq.sync_start(True)
    b.look()
    chunk = next(slot for slot in b.remote if slot >= b.geometry.nclient and b.seq.bio[slot].cmd == READ)
    b.remote_done(chunk, EIO)
    assert b.raised & REMOTE_FAILED and 3 in b.seq.sync()


def test_flush_fails_between_the_end_of_a_synchronisation_and_the_word_that_it_is_stored() -> None:
    """Where the secondary cannot take this component's place any more, its failures count again from then on, and
    nobody waits for the word."""
    b = old(3)
    b.seq.s.detach_on_error = 1
    failed = b.write(0)
    b.settle_map()
    b.local_done(failed, EIO)
    b.remote_done(failed)
    own_flush(b)
    b.local_refused()
    b.forget(failed)
    b.seq.sync_start(True)
    b.look()
    while not b.raised & SYNC_DONE:
        for slot in {*b.local, *b.remote}:
            b.done(slot)
    flush = b.flush()
    b.local_done(flush, EIO)
    b.remote_done(flush)
    assert b.answers == {flush: EIO}, "also when it cannot be stored for long"
    b.current()
    assert b.answers == {flush: EIO}


def test_delete_that_has_waited_for_a_secondary_whose_deletes_promise_nothing() -> None:
    """Zeros cannot be copied there from a component that is out of date."""
    b = old(3, connected=False)
    slot, write = b.delete(4), b.write(3)
    b.settle_map()
    b.seq.s.no_deletes = 1
    b.connect()
    own_flush(b)
    assert b.answers == {slot: errno.EOPNOTSUPP} and b.remote == [write] and b.local == [write]


@pytest.mark.parametrize("later_is_done", [False, True])
def test_what_waited_for_a_grant_is_done_again_before_what_came_after_it(later_is_done: bool) -> None:
    """It was stored here, so that an overlapping one could begin. Then this component is given up, without a
    connection: the secondary gets both, in the order in which they came."""
    b = Bench(connected=False)
    first = b.write(0, 0, 2 * SECTOR)
    b.settle_map()
    b.local_done(first)
    assert b.raised == NEED_DEGRADED and b.answers == {}
    second = b.write(0, SECTOR, SECTOR)
    third = b.write(0, 0, SECTOR)
    assert set(b.local) == {second, third}
    if later_is_done:
        b.local_done(third)
    b.detach()
    if not later_is_done:
        b.local_done(third)
    b.local_done(second)
    assert b.remote == []
    b.connect()
    own_flush(b)
    assert b.remote == [first]
    b.remote_done(first)
    own_flush(b)
    assert set(b.remote) == {second, third} and b.answers == {first: 0}
    for slot in (third, second):
        b.remote_done(slot)
        own_flush(b)
    assert b.answers == {first: 0, second: 0, third: 0}
    assert b.seq.s.nactive == 0
