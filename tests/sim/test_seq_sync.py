"""The resynchronisation: chunks under range locks, what makes a copy worthless, when it is through."""

from tests.sim.harness import (
    ASYNC,
    CONNECTED,
    LOCAL,
    LOCAL_FAILED,
    READ,
    REMOTE,
    REMOTE_FAILED,
    SYNC_DONE,
    WRITE,
    Bench,
    own_flush,
    whole,
)

TICK, SECOND = 50, 1000  # what hast_seq_sync_patience() says, ms


def behind(*extents: int, from_remote: bool = False, rate: int = 0, **wanted: int) -> Bench:
    """Connected, with these extents out of sync, and the copying begun."""
    b = Bench(connected=False, load=sum(1 << n for n in extents), **wanted)
    b.connect()
    assert b.raised == CONNECTED
    b.raised = 0
    b.seq.s.sync_rate = rate
    b.seq.s.sync_credit = rate
    b.seq.lib.hast_seq_sync_start(b.seq.arena, int(from_remote))
    b.look()
    return b


def tick(b: Bench) -> None:
    b.seq.lib.hast_seq_sync_tick(b.seq.arena, 100)
    b.look()


def test_chunk_is_read_here_and_written_there_then_both_flush() -> None:
    b = behind(3)
    [chunk] = b.local
    assert b.seq.bio[chunk].cmd == READ and b.remote == []
    b.local_done(chunk)
    assert b.local == [] and b.remote == [chunk] and b.seq.bio[chunk].cmd == WRITE
    b.remote_done(chunk)
    own = b.seq.own_flush_slot
    assert b.seq.sync() == set() and b.local == [own] and b.remote == [own] and b.raised == 0
    b.done(own)
    assert b.raised == SYNC_DONE and b.seq.quiet()
    b.rest()
    assert b.map == 0


def test_from_the_secondary_it_is_the_other_way_round() -> None:
    b = behind(3, from_remote=True)
    [chunk] = b.remote
    assert b.local == []
    b.remote_done(chunk)
    assert b.local == [chunk] and b.remote == []
    read = b.read(3)
    assert read not in b.local and read not in b.remote
    b.local_done(chunk)
    assert b.remote == [b.seq.own_flush_slot, read] or b.remote == [read, b.seq.own_flush_slot]


def test_marked_extents_are_read_there_while_the_secondary_has_the_newer_data() -> None:
    b = behind(3, 5, from_remote=True, rate=4096)
    here, there = b.read(0), b.read(5)
    assert here in b.local and there in b.remote and there not in b.local
    b.remote_done(there, 5)
    assert b.answers == {there: 5}


def test_nothing_to_copy_ends_with_a_flush() -> None:
    b = behind()
    b.done(b.seq.own_flush_slot)
    assert b.raised == SYNC_DONE


def test_chunk_and_writes_of_its_range_take_turns() -> None:
    b = behind(3)
    [chunk] = b.local
    slot = b.write(3)
    assert slot not in b.local
    b.local_done(chunk)
    assert slot not in b.local and slot not in b.remote
    b.remote_done(chunk)
    assert slot in b.local and slot in b.remote


def test_write_that_fails_while_its_extent_is_copied_spoils_the_copy() -> None:
    b = behind(3, slab_size=4096, extentsize=8192, mode=ASYNC)
    first = b.local[0]
    slot = b.write(3, 0)
    b.done(first)
    b.local_done(slot)
    b.remote_done(slot, 5)
    for chunk in list(b.local):
        b.done(chunk)
    assert 3 in b.seq.sync() and b.raised & REMOTE_FAILED


def test_extent_that_is_spoiled_while_no_chunk_of_it_is_under_way_is_copied_again() -> None:
    """The rate lets only its first half go: nobody would come back to find it failed."""
    b = behind(3, slab_size=4096, extentsize=8192, rate=4096)
    [chunk] = b.local
    b.done(chunk)
    assert b.local == b.remote == []
    slot = b.write(3, 0)
    b.local_done(slot, 5)
    b.remote_done(slot)
    for _ in range(40):
        tick(b)
        for chunk in list(b.local) + list(b.remote):
            b.done(chunk)
    assert b.raised & SYNC_DONE and b.seq.sync() == set()


def test_flush_that_fails_while_an_extent_is_copied_spoils_the_copy() -> None:
    """Its first half came out of a cache that is lost, or went into one."""
    for component in (LOCAL, REMOTE):
        b = behind(3, slab_size=4096, extentsize=8192, rate=4096)
        [chunk] = b.local
        b.done(chunk)
        flush = b.flush()
        (b.local_done if component == LOCAL else b.remote_done)(flush, 5)
        tick(b)
        for chunk in list(b.local):
            if chunk != flush:
                b.done(chunk)
        assert 3 in b.seq.sync()


def test_flush_that_fails_on_the_secondary_is_not_tried_at_once() -> None:
    b = behind()
    own = b.seq.own_flush_slot
    assert b.local == [own]
    b.local_done(own)
    b.remote_done(own, 5)
    assert b.local == [] and b.raised == REMOTE_FAILED


def test_nothing_is_copied_from_a_component_that_has_failed_a_flush() -> None:
    """It may have lost what the secondary has: all that was acknowledged, where that is in sync but for the flushes."""
    b = behind(3, 4, 5)
    one, two = b.local
    b.local_done(one)
    assert b.remote == [one] and b.local == [two]
    flush = b.flush()
    b.local_done(flush, 5)
    b.local_done(two)  # read before that, or after it
    b.remote_done(one)
    b.remote_done(flush)
    for _ in range(3):
        tick(b)
        assert b.local == b.remote == [] and b.raised == 0
    assert b.answers == {flush: 5} and b.seq.sync() == {3, 4, 5}
    b.disconnect()
    b.connect()
    b.seq.lib.hast_seq_sync_start(b.seq.arena, 0)
    tick(b)
    assert b.local == b.remote == []


def test_chunk_that_fails_is_tried_again_after_a_tick() -> None:
    b = behind(3)
    [chunk] = b.local
    b.local_done(chunk, 5)
    assert b.local == b.remote == [] and b.seq.sync() == {3}
    tick(b)
    assert b.local == [chunk]
    b.done(chunk)
    b.done(b.seq.own_flush_slot)
    assert b.raised == SYNC_DONE


def test_what_fails_again_and_again_is_tried_once_per_second() -> None:
    b = behind(3)
    tries = 0
    for _ in range(200):  # 20 seconds
        for chunk in list(b.local):
            b.local_done(chunk, 5)
            tries += 1
        tick(b)
    assert 20 <= tries <= 25
    assert b.seq.lib.hast_seq_sync_patience(b.seq.arena) == SECOND


def test_extent_that_was_marked_during_a_map_update_is_copied() -> None:
    """Nothing else writes its bit, and before that it is not copied."""
    b = whole()
    slot = b.write(7)
    assert b.seq.map_slot in b.local
    read = b.read(9)
    b.local_done(read, 5)
    b.map_done()
    b.done(slot)
    own_flush(b)
    assert b.raised & LOCAL_FAILED
    b.outdated()
    b.done(read)
    assert 9 in b.seq.sync() and not b.raised & SYNC_DONE
    for _ in range(20):
        tick(b)
        for due in {*b.local, *b.remote}:
            if due == b.seq.map_slot:
                b.map_done()
            else:
                b.done(due)
    assert b.raised & SYNC_DONE and b.seq.sync() == set()


def test_a_saving_that_the_end_overtakes_is_forgotten() -> None:
    """Else the next resynchronisation would save nothing until some flush has passed."""
    b = behind(3)
    b.done(b.local[0])
    own = b.seq.own_flush_slot
    b.seq.lib.hast_seq_sync_tick(b.seq.arena, 1000)
    b.look()
    assert b.seq.s.sync_save != 0
    b.done(own)
    assert b.raised & SYNC_DONE and b.seq.s.sync_save == 0


def test_however_low_the_rate_it_gets_on() -> None:
    b = behind(3, 5, rate=10)  # a chunk of 4096 bytes takes 410 seconds
    chunks = 0
    for _ in range(450):
        for due in {*b.local, *b.remote}:
            chunks += due in b.remote
            b.done(due)
        for _ in range(20):
            b.seq.lib.hast_seq_sync_tick(b.seq.arena, 50)
        b.look()
    assert chunks == 2


def test_the_end_of_the_role_waits_for_what_is_under_way_only() -> None:
    b = behind(*range(16))
    under_way = list(b.local)
    b.seq.lib.hast_seq_sync_end(b.seq.arena)
    for chunk in under_way:
        b.local_done(chunk)
    assert b.seq.quiet() and b.seq.sync() == set(range(16)) and not b.raised & SYNC_DONE


def test_time_is_asked_for_as_it_is_needed() -> None:
    b = behind(3)
    patience = b.seq.lib.hast_seq_sync_patience
    assert patience(b.seq.arena) == TICK
    [chunk] = b.local
    b.local_done(chunk, 5)
    assert patience(b.seq.arena) == TICK, "the first other try is soon"
    tick(b)
    b.local_done(chunk)
    b.remote_done(chunk)
    b.done(b.seq.own_flush_slot)
    assert b.raised & SYNC_DONE and patience(b.seq.arena) == 0


def test_secondary_that_has_failed_a_request_is_copied_nothing_any_more() -> None:
    """It may count as complete still, and become primary: it must not have part of what is newer (invariant 10)."""
    b = behind(3, rate=1)
    [chunk] = b.local
    slot = b.write(7)
    b.settle_map()
    b.remote_done(slot, 5)
    assert b.raised & REMOTE_FAILED
    b.local_done(chunk)
    b.seq.s.sync_rate = 0
    tick(b)
    assert chunk not in b.remote and not [n for n in b.local if b.seq.bio[n].cmd == READ]
    b.disconnect()
    b.connect()
    b.settle_map()
    b.seq.lib.hast_seq_sync_start(b.seq.arena, 0)
    b.look()
    assert [n for n in b.local if b.seq.bio[n].cmd == READ]


def test_lost_in_the_middle() -> None:
    b = behind(*range(8), nclient=8)
    reading = list(b.local)
    b.local_done(reading[0])
    waiting = b.write(0)
    b.disconnect()
    assert b.seq.sync() == set(range(8)) and waiting in b.local
    for chunk in reading[1:]:
        b.local_done(chunk)
    assert b.remote == [] and b.local == [waiting]
    b.local_done(waiting)
    b.grant()
    assert b.seq.quiet()


def test_a_chunk_of_the_last_connection_counts_for_nothing_in_this_one() -> None:
    b = behind(3)
    [old] = b.local
    b.disconnect()
    b.connect()
    b.seq.lib.hast_seq_sync_start(b.seq.arena, 0)
    b.look()
    b.local_done(old)
    assert b.seq.sync() == {3} and b.remote == []
    [chunk] = b.local
    b.done(chunk)
    assert b.seq.sync() == set()


def test_last_chunk_of_a_device_is_short() -> None:
    b = behind(15, short=1536)
    [chunk] = b.local
    assert b.seq.bio[chunk].length == 4096 - 1536
    b.done(chunk)
    assert b.seq.sync() == set()


def test_reads_of_newer_data_wait_for_the_merged_map() -> None:
    """The secondary's map says what is old here before the first request may go there: neither stale nor an error."""
    b = Bench(connected=False)
    b.seq.s.sync_remote = 1
    b.connect(1 << 4)
    assert b.updating() == {4}
    old, fine = b.read(4), b.read(2)
    assert fine in b.local
    assert old not in b.local
    assert b.remote == []
    assert old not in b.answers
    b.map_done()
    b.done(b.seq.own_flush_slot)  # nothing is read that the secondary could lose again
    assert b.remote == [old]
    b.remote_done(old)
    assert b.answers[old] == 0


def test_reads_of_newer_data_wait_on_when_the_connection_ends_first_and_fail_when_that_is_given_up() -> None:
    b = Bench(connected=False)
    b.seq.s.sync_remote = 1
    b.connect(1 << 4)
    old = b.read(4)
    b.disconnect()
    b.map_done()
    assert old not in b.answers
    b.give_up()
    assert b.answers[old] == 5
    assert old not in b.local


def test_what_was_copied_and_saved_is_not_copied_again_after_an_interruption() -> None:
    """Both flush it while the copying goes on, then the map on disk is cleared of it: that outlives the connection, and
    what reads the map after this node has died."""
    b = behind(2, 4, 6, rate=4096, slab_size=4096, extentsize=4096)
    own = b.seq.own_flush_slot
    for _ in range(10):  # the rate lets one extent go in each second
        tick(b)
        for chunk in [slot for slot in [*b.local, *b.remote] if slot != own]:
            b.done(chunk)
        if own in b.local:
            break
    copied = {2, 4, 6} - b.seq.sync()
    assert own in b.local and own in b.remote and 0 < len(copied) < 3 and b.raised == 0
    b.done(own)
    b.map_done()
    assert b.map == sum(1 << n for n in {2, 4, 6} - copied)
    b.disconnect()
    assert b.seq.sync() == {2, 4, 6} - copied


def test_what_was_copied_after_the_flush_began_is_not_saved_by_it() -> None:
    b = behind(2, 4, 6, rate=4096, slab_size=4096, extentsize=4096)
    own = b.seq.own_flush_slot
    while own not in b.local:
        tick(b)
        for chunk in [slot for slot in [*b.local, *b.remote] if slot != own]:
            b.done(chunk)
    before = b.seq.sync()
    while b.seq.sync() == before:
        tick(b)
        for chunk in [slot for slot in [*b.local, *b.remote] if slot != own]:
            b.done(chunk)
    b.done(own)
    b.disconnect()
    assert b.seq.sync() == before


def test_what_is_under_way_here_alone_is_part_of_the_synchronisation() -> None:
    """Acknowledged alone after SYNC_DONE, it could be copied to the secondary before an older one (invariant 10)."""
    b = Bench(connected=False)
    slot = b.write(0)
    b.settle_map()
    b.connect()
    b.seq.sync_start(False)
    b.look()
    assert b.seq.sync() == {0}
    for other in {*b.local, *b.remote} - {slot}:
        b.done(other)
    assert not b.raised & SYNC_DONE
    b.local_done(slot)
    assert b.seq.sync() == {0}
