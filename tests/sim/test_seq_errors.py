"""Map updates that fail, reads that fail (invariant 6), and completions that make no sense (invariant 9)."""

import pytest

from tests.sim.harness import (
    ASYNC,
    DELETE,
    LOCAL,
    MAP_FAILED,
    MEMSYNC,
    REMOTE,
    RING_DISK_DONE,
    RING_RECV_DONE,
    RING_SEND_DONE,
    SECTOR,
    Bench,
)

EPROTO = -71
BLOCK = 8 * 4096  # extents of one block of the map


def hot(mode: int = 0, **wanted: int) -> Bench:
    b = Bench(mode=mode, **wanted)
    for n in range(2):
        b.whole_write(n)
    return b


# ---- map updates ----


def test_map_failure_refuses_the_write_and_says_so() -> None:
    b = hot()
    slot = b.write(5)
    b.map_done(5)
    assert b.answers == {slot: 5} and b.raised == MAP_FAILED
    assert b.local == [] and b.remote == [] and b.seq.quiet()
    assert b.seq.s.stats.map_error == 1 and b.seq.s.stats.write_error == 1
    assert b.seq.s.ndirty == 0


def test_map_failure_lets_others_go_on() -> None:
    b = hot()
    refused = b.write(5)
    running = b.write(0)
    b.map_done(5)
    assert list(b.answers) == [refused] and b.local == [running]
    b.done(running)
    assert b.answers[running] == 0


def test_later_write_tries_the_map_again() -> None:
    b = hot()
    b.write(5)
    b.map_done(5)
    slot = b.write(5)
    assert b.updating() == {0, 1, 5} and b.remote == []
    b.map_done()
    assert b.remote == [slot]


def test_map_failure_does_not_refuse_those_who_came_after_the_update_began() -> None:
    """They needed another one, which is tried."""
    b = hot()
    refused = b.write(5)
    later = b.write(6)
    b.map_done(5)
    assert b.answers == {refused: 5} and b.updating() == {0, 1, 5, 6}
    b.map_done()
    assert b.local == [later]


def test_map_failure_refuses_all_who_needed_that_update() -> None:
    b = hot()
    b.write(4)
    both = [b.write(5), b.write(5, 1024)]
    b.map_done()
    assert b.updating() == {0, 1, 4, 5}
    b.map_done(28)
    assert [b.answers[slot] for slot in both] == [28, 28]


def test_map_failure_in_another_block_does_not_refuse() -> None:
    """The delete needs a bit in the second block only: its extents in the first are dirty already."""
    b = Bench(extents=2 * BLOCK, extentsize=512, keepdirty=4)
    b.whole_write(BLOCK - 1)
    refused = b.write(7)
    wide = b.request(DELETE, (BLOCK - 1) * 512, 1024)
    b.map_done(5)
    assert b.answers == {refused: 5}
    assert b.updating() == {BLOCK}
    b.map_done()
    assert wide in b.local


def test_map_block_that_cannot_be_written_does_not_starve_the_others() -> None:
    b = Bench(extents=4 * BLOCK, extentsize=512, keepdirty=4)
    refused = b.write(7)
    waiting = b.write(2 * BLOCK + 7)
    b.map_done(5)
    assert b.answers == {refused: 5} and b.updating() == {2 * BLOCK + 7}
    b.map_done()
    assert b.local == [waiting]
    b.done(waiting)
    b.local.clear()
    again = b.write(7, 0)
    assert b.updating() == {7}
    b.map_done()
    assert b.local == [again]


def test_map_failure_is_told_again_after_a_success() -> None:
    """Also where no secondary ever comes."""
    b = Bench(connected=False)
    b.write(5)
    b.map_done(5)
    b.write(6)
    b.map_done(5)
    assert b.raised == MAP_FAILED
    b.write(7)
    b.map_done()
    b.raised = 0
    b.write(8)
    b.map_done(5)
    assert b.raised == MAP_FAILED


# ---- reads ----


def test_read_is_answered_by_the_local_component() -> None:
    b = hot()
    slot = b.read(0)
    assert b.local == [slot] and b.remote == []
    b.local_done(slot)
    assert b.answers == {slot: 0}


def test_read_that_fails_here_is_sent_to_the_secondary() -> None:
    b = hot()
    slot = b.read(0)
    b.local_done(slot, 5)
    assert b.answers == {} and b.remote == [slot]
    b.remote_done(slot)
    assert b.answers == {slot: 0} and b.seq.s.stats.read_error == 1  # the client sees none, status does


def test_read_that_fails_on_both_tells_the_local_error() -> None:
    b = hot()
    slot = b.read(0)
    b.local_done(slot, 61)
    b.remote_done(slot, 5)
    assert b.answers == {slot: 61} and b.raised == 0


def test_read_that_fails_without_the_secondary() -> None:
    b = hot()
    b.disconnect()
    slot = b.read(0)
    b.local_done(slot, 5)
    assert b.answers == {slot: 5} and b.remote == []


def test_read_under_way_when_the_secondary_is_lost() -> None:
    b = hot()
    slot = b.read(0)
    b.local_done(slot, 61)
    b.disconnect()
    assert b.answers == {slot: 61}


def test_read_never_takes_what_the_secondary_missed() -> None:
    """Written without the secondary: its data is older than what was acknowledged."""
    b = hot()
    b.disconnect()
    slot = b.write(0)
    b.local_done(slot)
    b.grant()
    b.connect()
    b.settle_map()
    read = b.read(0, 1024)
    b.local_done(read, 5)
    assert b.answers[read] == 5 and b.remote == []
    other = b.read(9)
    b.local_done(other, 5)
    assert b.remote == [other]


def test_read_never_takes_what_the_secondary_failed_to_write() -> None:
    b = hot()
    slot = b.write(0)
    b.local_done(slot)
    b.remote_done(slot, 5)
    b.grant()
    read = b.read(0)
    b.local_done(read, 5)
    assert b.answers[read] == 5 and b.remote == []


@pytest.mark.parametrize("mode", [MEMSYNC, ASYNC])
def test_read_waits_for_a_write_that_the_secondary_has_not_stored_yet(mode: int) -> None:
    """Acknowledged, and not on the secondary's disk: sent at once, the read might pass it there."""
    b = hot(mode)
    slot = b.write(0, 0, 1024)
    if mode == MEMSYNC:
        b.received(slot)
    b.local_done(slot)
    assert b.answers == {slot: 0}
    read = b.read(0, 512)
    b.local_done(read, 5)
    assert b.remote == [slot] and read not in b.answers
    elsewhere = b.read(0, 1024)
    b.local_done(elsewhere, 5)
    assert b.remote == [slot, elsewhere]
    b.remote_done(slot)
    assert b.remote == [elsewhere, read]
    later = b.write(0, 512)
    assert later not in b.local
    b.remote_done(read)
    assert b.answers[read] == 0 and later in b.local


def test_read_that_waited_for_a_write_that_failed_there() -> None:
    b = hot(ASYNC)
    slot = b.write(0)
    b.local_done(slot)
    read = b.read(0)
    b.local_done(read, 61)
    b.remote_done(slot, 5)
    assert b.answers == {slot: 0, read: 61} and b.remote == []


def test_read_that_waited_when_the_secondary_is_lost() -> None:
    b = hot(ASYNC)
    slot = b.write(0)
    b.local_done(slot)
    read, behind = b.read(0), None
    b.local_done(read, 61)
    behind = b.write(0)
    b.disconnect()
    assert b.answers == {slot: 0, read: 61} and b.local == [behind]


def test_reads_that_waited_and_fail_hold_nobody_up() -> None:
    """They leave the list of those who hold a range while it is gone through: nobody behind them may be skipped."""
    b = hot(ASYNC)
    first = b.write(0, 0, 2048)
    b.local_done(first)
    reads = [b.read(0, n * 512) for n in range(3)]
    for read in reads:
        b.local_done(read, 61)
    behind = [b.write(0, n * 512) for n in range(4)]
    b.disconnect()
    assert b.answers == {first: 0} | dict.fromkeys(reads, 61)
    assert b.local == behind


# ---- nonsense ----


def test_slot_out_of_range() -> None:
    b = hot()
    for entry in (len(b.seq.bio), 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000 | len(b.seq.bio)):
        assert b.seq.lib.hast_seq_complete(b.seq.arena, LOCAL, entry) == EPROTO


def test_slot_that_nobody_has() -> None:
    b = hot()
    claimed = b.seq.claim()
    waiting = b.write(5)
    queued = [b.flush(), b.flush()][1]
    for slot in (claimed, waiting, queued, claimed + 3, b.seq.own_flush_slot):
        for component in (LOCAL, REMOTE):
            assert b.seq.complete(component, slot) == EPROTO
    assert b.seq.complete(REMOTE, b.seq.map_slot) == EPROTO
    b.map_done()
    b.done(waiting)
    assert b.answers[waiting] == 0


def test_twice() -> None:
    b = hot()
    slot = b.write(0)
    assert b.seq.complete(LOCAL, slot) == 0
    assert b.seq.complete(LOCAL, slot) == EPROTO
    assert b.seq.complete(REMOTE, slot) == 0
    assert b.seq.complete(REMOTE, slot) == EPROTO
    assert b.seq.complete(LOCAL, slot) == EPROTO
    assert b.seq.acked() == [slot]
    b.seq.release(slot)
    assert b.seq.complete(LOCAL, slot) == EPROTO


def test_read_answered_by_the_secondary_that_was_not_asked() -> None:
    b = hot()
    slot = b.read(0)
    assert b.seq.complete(REMOTE, slot) == EPROTO
    b.local_done(slot)


def test_received_where_it_makes_no_sense() -> None:
    b = hot(MEMSYNC)
    slot, delete, flush = b.write(0), b.delete(1), b.flush()
    entry = slot | 0x80000000
    assert b.seq.complete(LOCAL, entry) == EPROTO
    assert b.seq.complete(REMOTE, delete | 0x80000000) == EPROTO
    assert b.seq.complete(REMOTE, flush | 0x80000000) == EPROTO
    assert b.seq.complete(REMOTE, entry) == 0
    assert b.seq.complete(REMOTE, entry) == EPROTO
    assert b.seq.complete(REMOTE, slot) == 0
    assert b.seq.complete(REMOTE, entry) == EPROTO
    other = hot()
    assert other.seq.complete(REMOTE, other.write(0) | 0x80000000) == EPROTO


def test_negative_error() -> None:
    b = hot()
    slot = b.write(0)
    for component in (LOCAL, REMOTE):
        assert b.seq.complete(component, slot, -5) == EPROTO


def test_drain_takes_everything_and_stops_at_nonsense() -> None:
    b = hot(MEMSYNC)
    one, two = b.write(0), b.write(1)
    b.seq.post(RING_DISK_DONE, one)
    b.seq.post(RING_RECV_DONE, one | 0x80000000)
    b.seq.post(RING_RECV_DONE, two, 5)
    b.seq.post(RING_SEND_DONE, one, 32)
    assert b.seq.drain() == 4
    b.look()
    assert b.answers == {one: 0} and b.seq.sync() == {0}
    b.seq.post(RING_DISK_DONE, two)
    b.seq.post(RING_DISK_DONE, two)
    assert b.seq.drain() == EPROTO
    assert b.seq.bio[two].length == SECTOR


def test_corrupt_completion_ring() -> None:
    b = hot()
    b.seq.ring[RING_DISK_DONE].tail += 100000
    assert b.seq.drain() == EPROTO
