"""The local component fails: the secondary takes its place, and nothing is acknowledged that only this node has
(invariants 1, 2, 6 and 7; hast/ffi/seq_local.c)."""

import pytest

from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    DURABLEWAIT,
    EIO,
    LOCAL_FAILED,
    LOSS_TOLD,
    MAP_FAILED,
    MEMSYNC,
    NEED_DEGRADED,
    READ,
    REMOTE_FAILED,
    SYNC_DONE,
    WRITE,
    Bench,
    own_flush,
    whole,
)

# ---- a write that fails here ----


@pytest.mark.parametrize("mode", [0, MEMSYNC, ASYNC])
def test_failed_write_is_acknowledged_when_it_is_durable_there_and_known_here(mode: int) -> None:
    b = whole(mode)
    slot = b.write(0)
    b.local_done(slot, EIO)
    assert b.answers == {} and b.raised == 0
    b.remote_done(slot)
    assert b.answers == {} and b.raised == 0 and b.seq.bio[slot].state == DURABLEWAIT
    own_flush(b)
    assert b.answers == {} and b.raised == LOCAL_FAILED
    b.outdated()
    assert b.answers == {slot: 0} and b.seq.sync() == {0} and b.seq.s.sync_remote == 1
    assert b.seq.s.stats.write_error == 1


def test_failed_write_is_an_error_when_that_cannot_be_stored() -> None:
    b = whole()
    slot = b.write(0)
    b.done(slot, 0)
    failed = b.write(1)
    b.local_done(failed, EIO)
    b.remote_done(failed)
    own_flush(b)
    b.local_refused()
    assert b.answers == {slot: 0, failed: EIO} and b.seq.s.sync_remote == 0
    again = b.write(1)
    b.local_done(again, EIO)
    b.remote_done(again)
    assert b.answers[again] == EIO  # it is not asked again on this connection


def test_failed_write_is_an_error_when_the_secondary_is_lost_before_it_is_stored() -> None:
    b = whole()
    slot = b.write(0)
    b.local_done(slot, EIO)
    b.remote_done(slot)
    own_flush(b)
    b.disconnect()
    assert b.answers == {slot: EIO}


def test_failed_write_is_an_error_while_the_secondary_has_not_everything() -> None:
    b = Bench(connected=False, load=0b100)
    b.connect()
    slot = b.write(0)
    b.settle_map()
    b.local_done(slot, EIO)
    b.remote_done(slot)
    assert b.answers == {slot: EIO}


def test_failed_write_is_an_error_when_it_fails_on_both() -> None:
    b = whole()
    slot = b.write(0)
    b.local_done(slot, 28)
    b.remote_done(slot, EIO)
    assert b.answers == {slot: 28} and b.raised & REMOTE_FAILED


def test_failed_write_is_read_there_and_copied_from_there() -> None:
    b = whole(nclient=8)
    slot = b.write(0)
    b.local_done(slot, EIO)
    b.remote_done(slot)
    own_flush(b)
    b.outdated()
    [chunk] = [s for s in b.remote if s >= b.geometry.nclient]
    assert b.seq.bio[chunk].cmd == READ
    read, other = b.read(0), b.read(1)
    assert other in b.local and read not in b.local
    b.remote_done(chunk)
    assert b.seq.bio[chunk].cmd == WRITE and chunk in b.local
    b.local_done(chunk)
    own_flush(b)
    assert b.raised & SYNC_DONE and b.seq.s.sync_remote == 1
    b.current()
    assert b.seq.s.sync_remote == 0 and b.seq.sync() == set()


def test_nothing_is_acknowledged_early_while_it_is_turning() -> None:
    """What is acknowledged between the flush and the word that it is stored could be on this component alone."""
    b = whole(MEMSYNC)
    failed, early = b.write(0), b.write(1)
    b.local_done(failed, EIO)
    b.remote_done(failed)
    b.local_done(early)
    b.received(early)
    assert b.answers == {}
    b.remote_done(early)
    assert b.answers == {}
    own_flush(b)
    assert b.answers == {}
    own_flush(b)
    assert b.answers == {early: 0}
    b.outdated()
    assert b.answers == {early: 0, failed: 0}


# ---- a flush, the map, a read that fails here ----


def test_failed_flush_is_hidden_and_gives_the_component_up() -> None:
    b = whole()
    b.whole_write(1)
    flush = b.flush()
    b.local_done(flush, EIO)
    b.remote_done(flush)
    assert b.answers == {} and b.seq.s.turn_detach == 1
    own_flush(b)
    assert b.raised == LOCAL_FAILED
    b.detach()
    assert b.answers == {flush: 0} and b.seq.sync() == set(range(16))


def test_flush_that_the_worker_has_failed_gives_the_component_up_as_well() -> None:
    """The disk need not say it twice: those that the sequencer asks for are done."""
    b = whole()
    b.whole_write(1)
    b.local_flush_failed()
    flush = b.flush()
    own_flush(b)
    assert b.answers == {} and b.raised == LOCAL_FAILED and b.seq.s.turn_detach == 1
    b.detach()
    own_flush(b)
    assert b.answers == {flush: 0} and b.seq.sync() == set(range(16))
    b.local_flush_failed()  # of a component that is not used any more
    assert b.seq.s.turning == 0


def test_flush_that_the_worker_has_failed_without_the_secondary() -> None:
    """It was to store that this node writes alone. What waits for that may be lost, and nothing is copied to the
    secondary when it is back: what this node has lost may be whole there."""
    b = whole()
    b.whole_write(1)
    b.disconnect()
    slot = b.write(1)
    b.local_done(slot)
    assert b.answers == {} and b.raised == NEED_DEGRADED
    b.local_flush_failed()
    b.grant()
    assert b.answers == {slot: EIO}
    b.connect()
    b.settle_map()
    b.seq.sync_start(False)
    b.look()
    assert 1 in b.seq.sync()
    assert b.local == [] and b.remote == []


def test_write_that_is_granted_when_the_worker_has_failed_a_flush_since_is_an_error() -> None:
    """Simulation, seed 36000471492: the grant was on its way; a client read older data than it was told to be there."""
    b = whole()
    b.whole_write(1)
    b.disconnect()
    slot = b.write(1)
    b.local_done(slot)
    b.seq.s.loss = LOSS_TOLD
    b.grant()
    assert b.answers == {slot: EIO}


def test_write_that_is_refused_the_secondary_when_the_worker_has_failed_a_flush_since_is_an_error() -> None:
    """Another write has failed here; this one has not, and waited for the secondary to take the component's place."""
    b = whole()
    fails, slot = b.write(0), b.write(1)
    b.local_done(fails, EIO)
    b.remote_done(fails)
    b.local_done(slot)
    b.remote_done(slot)
    assert b.answers == {} and b.seq.s.turning == 1
    b.seq.s.loss = LOSS_TOLD
    b.local_refused()
    assert b.answers == {fails: EIO, slot: EIO}


def test_nothing_is_believed_that_was_read_when_the_worker_had_failed_a_flush() -> None:
    """Simulation, seed 13000108059: its word is there before its message is, and the disk shows older data by then."""
    b = whole()
    b.whole_write(1)
    read = b.read(1)
    b.seq.s.loss = LOSS_TOLD
    b.local_done(read)
    assert b.answers == {} and read in b.remote and b.seq.s.turning == 1
    marked = b.seq.sync()
    b.local_flush_failed()  # the message
    assert b.seq.sync() == marked
    b.remote_done(read)
    assert b.answers == {read: 0}


def test_write_that_is_begun_after_the_worker_has_failed_a_flush_is_none_that_is_lost() -> None:
    """Simulation, seed 14000102224: it was answered with an error, without anything that had failed for it."""
    b = whole()
    b.whole_write(1)
    b.disconnect()
    b.seq.s.degraded_ok = 1
    b.seq.s.loss = LOSS_TOLD
    slot = b.write(1)
    b.local_done(slot)
    assert b.answers[slot] == 0


def test_write_that_goes_on_after_the_loss_is_none_that_is_lost() -> None:
    """It waited for one that overlaps it; that one is answered by what the secondary says, after the loss."""
    b = Bench(load=0b11)
    b.connect()
    b.settle_map()
    before, after = b.write(0), b.write(0)
    b.local_done(before)
    b.seq.s.loss = LOSS_TOLD
    b.remote_done(before)
    b.local_done(after)
    b.remote_done(after)
    assert b.answers[before] == EIO and b.answers[after] == 0


@pytest.mark.parametrize("connected", [True, False])
def test_flush_that_the_disk_does_after_the_worker_had_failed_one_has_failed(connected: bool) -> None:
    """The disk says it once; the disk stage hears of it in a message."""
    b = whole()
    b.whole_write(1)
    if not connected:
        b.disconnect()
    for _ in range(2):
        flush = b.flush()
        b.seq.s.loss = max(int(b.seq.s.loss), LOSS_TOLD)
        b.local_done(flush)
        if connected:
            assert b.answers == {} and b.seq.s.turn_detach == 1
            return
        assert b.answers.pop(flush) == EIO


def test_reads_of_what_a_failed_flush_may_have_lost_go_there_at_once() -> None:
    b = whole()
    b.whole_write(1)
    before = b.read(1)
    flush = b.flush()
    b.local_done(flush, EIO)
    after = b.read(1)
    assert after in b.remote and after not in b.local
    b.remote_done(after)
    b.local_done(before)
    assert before in b.remote and before not in b.answers  # it was read here, perhaps after it was lost


def test_failed_map_update_is_hidden_and_gives_the_component_up() -> None:
    b = whole()
    slot = b.write(9)
    b.map_done(EIO)
    assert b.answers == {} and not b.raised & MAP_FAILED and b.updating() is None
    own_flush(b)
    assert b.raised == LOCAL_FAILED
    b.detach()
    assert slot in b.remote and slot not in b.local
    b.remote_done(slot)
    b.remote_done(b.seq.own_flush_slot)
    assert b.answers == {slot: 0}


def test_the_map_is_not_written_by_two() -> None:
    """The worker writes all of it when the component is given up: no update may be under way then."""
    b = whole()
    flush = b.flush()
    b.write(9)
    assert b.updating() is not None
    b.local_done(flush, EIO)
    b.remote_done(flush)
    own_flush(b)
    assert b.raised == 0
    b.map_done()
    assert b.raised == LOCAL_FAILED


def test_the_map_is_not_written_by_two_when_a_flush_fails_late() -> None:
    """The worker has been asked because of a write, and has not answered; an update of the map is under way."""
    b = whole()
    failed = b.write(0)
    b.local_done(failed, EIO)
    b.remote_done(failed)
    own_flush(b)
    assert b.raised == LOCAL_FAILED and b.seq.s.turn_detach == 0
    b.write(9)
    assert b.updating() is not None
    flush = b.flush()
    b.local_done(flush, EIO)
    assert b.seq.s.turn_detach == 0
    b.remote_done(flush)
    b.outdated()
    assert b.answers == {failed: 0, flush: 0}
    b.map_done()
    again = b.flush()
    b.local_done(again, EIO)
    assert b.seq.s.turn_detach == 1


def test_failed_read_is_served_and_mended_from_there() -> None:
    b = whole()
    read = b.read(7)
    b.local_done(read, EIO)
    assert b.remote == [b.seq.own_flush_slot, read] or b.remote == [read, b.seq.own_flush_slot]
    b.remote_done(read)
    assert b.answers == {read: 0} and b.seq.sync() == {7}
    own_flush(b)
    b.settle_map()
    b.outdated()
    b.seq.lib.hast_seq_sync_tick(b.seq.arena, 1000)
    b.look()
    [chunk] = b.remote
    b.remote_done(chunk)
    assert chunk in b.local


def test_setting_gives_the_component_up_at_the_first_failure() -> None:
    b = whole()
    b.seq.s.detach_on_error = 1
    slot = b.write(0)
    b.local_done(slot, EIO)
    b.remote_done(slot)
    assert b.seq.s.turn_detach == 1


# ---- without the local component ----


def test_detached_does_everything_there() -> None:
    b = whole()
    b.detach()
    write, read, delete = b.write(0), b.read(3), b.delete(5)
    assert b.local == [] and b.remote == [write, read, delete]
    b.remote_done(read)
    assert b.answers == {read: 0}
    b.remote_done(write)
    b.remote_done(delete)
    assert set(b.answers) == {read} and b.local == []
    own_flush(b)
    own_flush(b)
    assert b.answers == {read: 0, write: 0, delete: 0} and b.seq.s.stats.map_update == 2
    flush = b.flush()
    assert b.local == [] and b.remote == [flush]


def test_detached_connects_again_without_a_map_update_and_copies_nothing() -> None:
    b = whole()
    b.detach()
    b.disconnect()
    slot = b.write(0)
    assert b.local == [] and b.remote == []
    b.raised = 0
    b.connect(0b1000)
    assert b.raised == CONNECTED and b.updating() is None
    own_flush(b)
    b.seq.sync_start(True)
    b.look()
    assert b.remote == [slot] and b.seq.s.sync_on == 0


# ---- found by the simulation of two nodes ----


def test_a_read_answered_by_a_secondary_that_has_failed_a_flush_is_not_believed() -> None:
    """It has lost its cache with the flush, and the reply of the read comes after that of the flush."""
    b = whole()
    b.whole_write(1)
    read = b.read(1)
    b.local_done(read, EIO)
    flush = b.flush()
    b.done(b.seq.own_flush_slot)
    assert {read, flush} <= set(b.remote)
    b.remote_done(flush, EIO)
    b.remote_done(read)
    assert b.answers.get(read, EIO) == EIO


def test_a_flush_after_one_that_has_failed_is_not_believed() -> None:
    """The kernel tells of lost pages once."""
    b = whole()
    b.whole_write(1)
    first, second = b.flush(), b.flush()
    b.local_done(first, EIO)
    b.remote_done(first)
    b.local_done(second)
    b.remote_done(second)
    assert b.answers == {} and b.raised == LOCAL_FAILED
    b.local_refused()
    assert b.answers == {first: EIO, second: EIO}


def test_a_read_that_was_to_go_there_is_done_here_when_it_need_not_be() -> None:
    """Nothing has become of the turning: this component is not out of date, and has not failed this read."""
    b = whole()
    failed = b.write(1)
    b.local_done(failed, EIO)
    flush = b.flush()
    b.remote_done(failed)
    b.local_done(flush, EIO)
    read = b.read(1)
    assert read not in b.local
    b.disconnect()
    assert read in b.local and read not in b.answers
    b.local_done(read)
    assert b.answers[read] == 0


def test_a_write_that_the_secondary_failed_while_it_was_to_become_the_truth() -> None:
    """Only this component has it: it is neither acknowledged nor lost, but done again."""
    b = whole()
    failed, only_here = b.write(0), b.write(1)
    b.local_done(failed, EIO)
    b.remote_done(failed)
    own_flush(b)
    assert b.raised == LOCAL_FAILED
    b.local_done(only_here)
    b.remote_done(only_here, EIO)
    assert b.answers == {} and not b.raised & NEED_DEGRADED
    b.outdated()
    b.grant()
    assert b.answers == {failed: 0}
    b.disconnect()
    b.connect()
    own_flush(b)
    assert only_here in b.remote


def test_a_setting_to_give_the_component_up_does_not_make_a_good_flush_fail() -> None:
    b = whole()
    b.seq.s.detach_on_error = 1
    failed, flush = b.write(0), b.flush()
    b.local_done(failed, EIO)
    b.remote_done(failed)
    b.done(flush)
    b.disconnect()
    assert b.answers == {failed: EIO, flush: 0}


def test_a_read_waits_while_it_is_decided_whose_data_counts() -> None:
    """The component failed a write, the secondary then a flush: this node goes on alone, and its data is good."""
    b = whole()
    b.whole_write(1)
    failed, read = b.write(0), b.read(1)
    b.local_done(failed, EIO)
    b.remote_done(failed)
    assert b.seq.s.turning == 1
    own = b.seq.own_flush_slot
    b.local_done(own)
    b.remote_done(own, EIO)
    b.local_done(read)
    assert read not in b.answers
    b.disconnect()
    assert read in b.local
    b.local_done(read)
    assert b.answers[read] == 0
