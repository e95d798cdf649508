"""The secondary comes and goes: joining, merging its map, losing it with everything in flight."""

import pytest

from hast.stages.context import DISK
from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    EIO,
    FLAG_DURABLE,
    FULLSYNC,
    MAP_FAILED,
    MEMSYNC,
    NEED_DEGRADED,
    REMOTE_FAILED,
    Bench,
)


def test_connect_without_a_map_is_at_once() -> None:
    b = Bench(connected=False)
    b.connect()
    assert b.raised == CONNECTED and b.seq.s.connected == 1
    slot = b.write(0)
    b.map_done()
    assert b.remote == [slot]


def test_connect_after_any_map_update() -> None:
    """Nothing is left to be written then, and nothing must be waited for."""
    b = Bench(connected=False)
    slot = b.write(0)
    b.map_done()
    b.local_done(slot)
    b.grant()
    b.raised = 0
    b.connect()
    assert b.raised == CONNECTED and b.seq.s.connected == 1 and b.updating() is None


def test_empty_and_known_maps_need_no_update() -> None:
    for bitmap in (0, 0b11):
        b = Bench(connected=False, load=0b11)
        b.connect(bitmap)
        assert b.raised == CONNECTED and b.updating() is None


def test_nothing_goes_to_the_secondary_before_the_merged_map_is_durable() -> None:
    b = Bench(connected=False, load=0b1)
    b.connect(0b10010)
    assert b.updating() == {0, 1, 4} and b.seq.s.connected == 0
    slots = [b.write(0), b.write(1), b.write(9), b.delete(12)]
    read, flush = b.read(0), b.flush()
    assert b.remote == [] and b.local == [b.seq.map_slot, read]
    b.map_done()
    assert b.raised == 0 and b.updating() == {0, 1, 4, 9, 12} and b.remote == []
    b.map_done()
    assert b.raised == CONNECTED and b.remote == [*slots, flush]
    assert [slot for slot in b.local if slot in slots] == slots
    assert b.seq.sync() == {0, 1, 4} and b.map == 0b1001000010011


def test_merged_map_is_durable_also_without_metaflush() -> None:
    """The secondary clears its own: what it had, and what this node had not flushed, would be marked nowhere after a
    loss of power of both."""
    b = Bench(connected=False)
    b.seq.s.metaflush = 0
    slot = b.write(1)
    assert b.seq.bio[b.seq.map_slot].flags == 0
    b.map_done()
    b.local_done(slot)
    b.grant()
    b.raised = 0
    b.connect(0b10)
    assert b.updating() == {1} and b.seq.bio[b.seq.map_slot].flags == FLAG_DURABLE and b.seq.s.connected == 0
    b.map_done()
    assert b.raised == CONNECTED
    b.write(3)
    assert b.seq.bio[b.seq.map_slot].flags == 0


def test_merged_extents_are_out_of_sync() -> None:
    b = Bench(connected=False, load=0b1)
    b.connect(0b11)
    b.map_done()
    assert b.seq.sync() == {0, 1} and b.seq.s.ndirty == 2


def test_bits_past_the_last_extent_are_ignored() -> None:
    b = Bench(connected=False, extents=13, load=0b111 << 13)
    assert b.seq.dirty() == set() and b.seq.s.ndirty == 0
    b.connect(0b1111 << 12)
    assert b.updating() == {12}
    b.map_done()
    assert b.seq.sync() == {12} and b.seq.s.ndirty == 1


def test_merge_while_an_update_is_under_way() -> None:
    b = Bench(connected=False)
    slot = b.write(0)
    b.connect(0b100)
    assert b.updating() == {0}
    b.map_done()
    assert b.remote == [] and b.local == [b.seq.map_slot] and b.updating() == {0, 2}
    b.map_done()
    assert b.raised == CONNECTED and b.remote == [slot]


def test_merge_of_an_extent_that_the_update_under_way_clears() -> None:
    b = Bench(keepdirty=1)
    b.whole_write(9)
    b.whole_write(0)
    b.whole_flush()
    b.seq.idle()
    b.look()
    assert b.updating() == {0}
    b.disconnect()
    b.raised = 0
    b.connect(1 << 9)
    b.map_done()
    assert b.raised == 0 and b.updating() == {0, 9}
    b.map_done()
    assert b.raised == CONNECTED and b.map == 1 | 1 << 9


def test_failed_update_ends_the_joining() -> None:
    b = Bench(connected=False, load=0b1)
    b.connect(0b10)
    ready, refused = b.write(0), b.write(5)
    b.map_done(5)
    assert b.raised == MAP_FAILED and b.seq.s.connected == b.seq.s.joining == 0
    assert b.remote == [] and ready in b.local
    assert refused not in b.answers  # came after that update had begun: another is tried for it
    b.map_done(5)
    assert b.answers == {refused: 5}
    b.local_done(ready)
    b.grant()
    b.raised = 0
    b.connect(0b10)
    assert b.updating() == {0, 1, 5}
    b.map_done()
    assert b.raised == CONNECTED


def test_failed_update_of_other_extents_than_the_secondarys_does_not_end_the_joining() -> None:
    """What it has marked itself is here already. A map that cannot be written is no reason to leave it, for ever."""
    b = Bench(connected=False, load=0b11)
    refused = b.write(5)
    b.map_done(EIO)
    assert b.answers == {refused: EIO}
    b.raised = 0
    b.connect(0b10)
    ready, waiting = b.write(0), b.write(9)
    b.map_done(EIO)
    assert b.raised == CONNECTED | MAP_FAILED and b.seq.s.connected == 1
    assert ready in b.remote and ready in b.local and waiting not in b.remote
    b.map_done(EIO)
    assert b.answers == {refused: EIO, waiting: EIO}
    b.synchronise()
    b.write(9)
    b.map_done(EIO)
    assert b.seq.s.turning == 1, "it has everything: it takes the place of this component"


def test_a_disk_that_has_failed_the_flush_of_an_update_is_no_source() -> None:
    """What it has lost by that may be whole on the secondary, and is marked."""
    b = Bench(connected=False, load=0b11)
    refused = b.write(5)
    b.seq.arena.stage[DISK].extra[0] = EIO  # as the disk stage does
    b.map_done(EIO)
    assert b.answers == {refused: EIO}
    b.raised = 0
    b.connect()
    b.map_done(EIO)
    assert b.raised == CONNECTED | MAP_FAILED and b.seq.s.no_source == 1
    b.seq.sync_start(from_remote=False)
    b.look()
    assert b.local == [], "nothing is read, to be copied"


def test_failed_update_ends_the_joining_where_what_is_marked_need_not_be_durable() -> None:
    b = Bench(connected=False, load=0b11)
    b.seq.s.metaflush = 0
    b.connect(0b10)
    b.map_done(EIO)
    assert b.raised == MAP_FAILED and b.seq.s.connected == 0
    b.disconnect()
    b.raised = 0
    b.connect()
    b.map_done(EIO)
    assert b.raised == CONNECTED | MAP_FAILED


def test_joining_that_breaks_off_lets_writes_go_on_alone() -> None:
    b = Bench(connected=False, load=0b1)
    b.connect(0b10)
    ready, waiting = b.write(0), b.write(1)
    b.disconnect()
    assert b.local == [b.seq.map_slot, ready] and b.remote == []
    b.map_done()
    assert b.local == [ready, waiting] and b.remote == [] and b.raised == 0
    assert b.seq.s.connected == 0


def test_write_begun_alone_leaves_its_extent_out_of_sync_although_the_secondary_is_back() -> None:
    b = Bench(connected=False, load=0b1)
    alone = b.write(5)
    b.map_done()
    b.connect()
    assert b.raised == CONNECTED and b.local == [alone]
    behind = b.write(5)
    b.local_done(alone)
    assert b.answers == {} and b.raised & NEED_DEGRADED and b.seq.sync() == {0, 5}
    assert b.local == [behind] and b.remote == [behind]
    b.grant()
    assert b.answers == {alone: 0}


@pytest.mark.parametrize("mode", [FULLSYNC, MEMSYNC, ASYNC])
def test_lost_with_everything_in_flight(mode: int) -> None:
    b = Bench(mode=mode, nclient=16)
    for n in range(4):
        b.whole_write(n)
    untouched, local, remote, blocked = b.write(0), b.write(1), b.write(2), b.write(2)
    mapwait, delete, read, lost_read = b.write(7), b.delete(3), b.read(5), b.read(6)
    flush, queued = b.flush(), b.flush()
    b.local_done(local)
    b.remote_done(remote)
    b.local_done(lost_read, 5)
    b.answers.clear()
    b.disconnect()
    assert b.remote == [] and b.raised == NEED_DEGRADED * (local not in b.answers or mode == ASYNC)
    assert b.answers == {lost_read: 5}
    b.map_done()
    b.local_done(flush)
    for slot in (untouched, remote, delete, read, mapwait, queued, blocked):
        b.local_done(slot)
    b.grant()
    assert b.remote == [] and b.seq.quiet() and b.seq.s.ndirty == 5
    assert b.seq.sync() == {0, 1, 2, 3, 7}
    told = {untouched, remote, blocked, mapwait, delete, read, lost_read, flush, queued}
    assert {slot for slot, result in b.answers.items() if result == 0} >= told - {lost_read}


def test_rings_of_the_lost_stages_are_empty_and_their_completions_refused() -> None:
    b = Bench()
    b.whole_write(0)
    slot = b.seq.claim()
    assert b.seq.submit(slot, 2, 0, 512) == 0
    b.seq.disconnect()
    b.look()
    assert b.remote == [] and b.local == [slot]
    assert b.seq.complete(1, slot) == -71
    b.seq.connect()
    b.look()
    assert b.remote == [] and b.seq.complete(1, slot) == -71


def test_written_to_both_but_not_flushed_is_out_of_sync_when_the_secondary_is_lost() -> None:
    """It may have gone because its power did, and what was in its cache with it."""
    b = Bench(keepdirty=1)
    b.whole_write(3)
    b.whole_write(4)
    b.whole_flush()
    b.whole_write(5)
    b.whole_write(6)
    b.disconnect()
    assert b.seq.sync() == {5, 6} and b.seq.s.ndirty == 2
    b.connect()
    b.settle_map()
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() >= {5, 6}


def test_flush_under_way_when_the_secondary_is_lost_proves_nothing() -> None:
    for side in ("none", "local", "remote"):
        b = Bench()
        b.whole_write(3)
        flush = b.flush()
        if side == "local":
            b.local_done(flush)
        if side == "remote":
            b.remote_done(flush)
        b.disconnect()
        assert b.seq.sync() == {3}, side


def test_flushed_extents_stay_in_sync_when_the_secondary_is_lost() -> None:
    b = Bench()
    for n in range(3):
        b.whole_write(n)
    b.whole_flush()
    b.disconnect()
    assert b.seq.sync() == set() and b.seq.s.ndirty == 0


def test_disconnect_takes_back_what_was_said_about_that_connection() -> None:
    b = Bench()
    b.whole_write(0)
    slot = b.write(0)
    b.local_done(slot)
    assert b.seq.complete(1, b.remote.pop(), 5) == 0
    assert b.seq.s.events == NEED_DEGRADED | REMOTE_FAILED
    b.seq.disconnect()
    assert b.seq.s.events == NEED_DEGRADED
    b.grant()
    b.seq.connect()
    assert b.seq.s.events == CONNECTED
    b.seq.disconnect()
    assert b.seq.s.events == 0


def test_idle_does_nothing_while_joining_or_alone() -> None:
    b = Bench(keepdirty=1, connected=False, load=0b1)
    assert b.seq.idle() == 0
    b.connect(0b10)
    assert b.seq.idle() == 0


def test_disconnect_of_one_who_never_came() -> None:
    b = Bench(connected=False)
    slot = b.write(0)
    b.disconnect()
    b.map_done()
    b.local_done(slot)
    b.disconnect()
    b.grant()
    assert b.answers == {slot: 0}


def test_delete_begun_before_a_secondary_whose_deletes_promise_nothing() -> None:
    """It does not get the delete, but what is there afterwards."""
    b = Bench(connected=False)
    slot = b.delete(3)
    b.seq.s.no_deletes = 1
    b.connect()
    b.map_done()
    assert b.raised == CONNECTED and b.local == [slot] and b.remote == []
    assert b.seq.sync() == {3}
    b.local_done(slot)
    assert b.answers == {} and b.raised & NEED_DEGRADED
    b.synchronise()
    assert b.answers == {slot: 0} and b.seq.sync() == set()
