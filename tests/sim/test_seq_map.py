"""Invariants 1 (dirty before write) and 2 (clean after durable), and the extents that are kept dirty."""

import mmap
from dataclasses import asdict, replace

from hast.ffi import _hast
from tests.sim.harness import DELETE, FLAG_DURABLE, FLAG_ZERO, WRITE, Bench, shape

ffi, lib = _hast.ffi, _hast.lib


def test_write_to_a_clean_extent_waits_until_the_map_says_dirty() -> None:
    b = Bench()
    slot = b.write(3)
    assert b.updating() == {3} and b.local == [b.seq.map_slot]
    assert b.remote == []
    b.map_done()
    assert b.local == [slot] and b.remote == [slot]
    assert b.map == 1 << 3


def test_delete_of_a_clean_extent_waits_too() -> None:
    b = Bench()
    slot = b.delete(3, 2)
    assert b.updating() == {3, 4} and b.remote == []
    b.map_done()
    assert b.local == [slot] and b.remote == [slot]


def test_write_to_a_dirty_extent_goes_at_once() -> None:
    b = Bench()
    b.whole_write(3)
    slot = b.write(3, 1024)
    assert b.updating() is None
    assert b.local == [slot] and b.remote == [slot]


def test_second_write_waits_for_the_update_under_way() -> None:
    b = Bench()
    first = b.write(3)
    second = b.write(3, 1024)
    assert b.local == [b.seq.map_slot]
    b.map_done()
    assert b.local == [first, second] and b.updating() is None


def test_write_to_another_clean_extent_waits_for_an_update_of_its_own() -> None:
    b = Bench()
    first = b.write(3)
    second = b.write(5)
    assert b.updating() == {3}
    b.map_done()
    assert first in b.remote and second not in b.remote
    assert b.updating() == {3, 5}
    b.map_done()
    assert second in b.remote


def test_one_update_serves_all_who_came_while_another_was_under_way() -> None:
    b = Bench()
    b.write(0)
    waiting = [b.write(n) for n in (4, 5, 6)]
    b.map_done()
    assert b.updating() == {0, 4, 5, 6}
    b.map_done()
    assert set(waiting) < set(b.local) and b.updating() is None
    assert b.seq.s.stats.map_update == 2


def test_write_across_two_extents_needs_both() -> None:
    b = Bench()
    b.whole_write(3)
    slot = b.write(3, 4096 - 512, 1024)
    assert b.updating() == {3, 4} and b.remote == []
    b.map_done()
    assert b.remote == [slot]


def test_others_go_on_while_a_write_waits_for_the_map() -> None:
    b = Bench()
    b.whole_write(3)
    waiting = b.write(4)
    slot = b.write(3)
    reader = b.read(4)
    assert slot in b.local and slot in b.remote and reader in b.local and waiting not in b.local


def test_metaflush_asks_for_a_durable_update() -> None:
    b = Bench()
    b.write(0)
    assert b.seq.bio[b.seq.map_slot].flags == FLAG_DURABLE
    b.map_done()
    b.seq.s.metaflush = 0
    b.write(1)
    assert b.seq.bio[b.seq.map_slot].flags == 0


def test_what_was_written_without_a_flush_does_not_count_when_metaflush_is_switched_on() -> None:
    """By `hastctl reload`: it may only be in the cache, and so may be what is under way."""
    b = Bench()
    b.seq.lib.hast_seq_metaflush(b.seq.arena, 0)
    b.whole_write(1)
    early = b.write(2)
    b.seq.lib.hast_seq_metaflush(b.seq.arena, 1)
    assert b.seq.ondisk() == set()
    slot = b.write(1)
    b.map_done()  # the one that was under way
    assert early not in b.local and slot not in b.local and b.seq.ondisk() == set()
    assert b.updating() == {1, 2} and b.seq.bio[b.seq.map_slot].flags == FLAG_DURABLE
    b.map_done()
    assert {early, slot} <= set(b.local) and b.seq.ondisk() == {1, 2}


def cold(b: Bench, extent: int, hot: range) -> None:
    """extent written and pushed out of the extents that are kept dirty by as many others."""
    for n in (extent, *hot):
        b.whole_write(n)


def test_cold_extent_is_cleared_after_both_have_flushed() -> None:
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    flush = b.flush()
    b.local_done(flush)
    b.seq.idle()
    assert 9 in b.seq.dirty() and b.updating() is None
    b.remote_done(flush)
    assert b.seq.idle() == 1
    b.look()
    assert b.updating() == {0, 1} and 9 not in b.seq.ondisk()
    b.map_done()
    assert b.map == 0b11


def test_cold_extents_stay_dirty_beside_clients_until_they_are_many() -> None:
    """A write that comes back to one of them has nothing to wait for then."""
    b = Bench(keepdirty=1)
    b.seq.s.dirty_max = 6
    for n in range(6):
        b.whole_write(n)
    b.whole_flush()
    updates = b.seq.s.stats.map_update
    for n in range(6):
        b.whole_write(n)
        assert b.seq.dirty() == b.seq.ondisk() == set(range(6))
    assert b.seq.s.stats.map_update == updates
    b.whole_flush()
    b.whole_write(6)
    assert b.seq.dirty() == {6}, "one too many: all go that may"
    b.rest()
    assert b.map == 1 << 6


def test_many_cold_extents_that_lack_a_flush_get_one() -> None:
    b = Bench(keepdirty=1)
    b.seq.s.dirty_max = 6
    for n in range(6):
        b.whole_write(n)
    assert b.local == b.remote == []
    slot = b.write(6)
    own = b.seq.own_flush_slot
    assert own in b.local and own in b.remote
    b.settle_own()
    b.done(slot)
    b.forget(slot)
    b.whole_write(7)
    assert len(b.seq.dirty()) < 6


def test_quiet_moments_clear_however_few_there_are() -> None:
    b = Bench(keepdirty=1)
    b.seq.s.dirty_max = 16
    for n in range(4):
        b.whole_write(n)
    b.rest()
    assert b.map == 1 << 3


def test_how_many_may_be_dirty_by_default() -> None:
    """2 GiB, and keepdirty; or twice that, where it is more."""
    for extentsize, keepdirty, most in ((1 << 21, 64, 1024 + 64), (1 << 30, 64, 128)):
        geometry = replace(shape(keepdirty=keepdirty), extentsize=extentsize, datasize=extentsize)
        wanted = ffi.new("struct hast_geometry *", asdict(geometry))
        memory = mmap.mmap(-1, lib.hast_arena_size(wanted))
        base = ffi.from_buffer(memory)
        assert lib.hast_arena_init(base, wanted) == 0
        assert lib.hast_arena_seq(ffi.cast("struct hast_arena *", base)).dirty_max == most


def test_idle_flushes_for_itself_and_then_clears() -> None:
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    assert b.seq.idle() == 1
    b.look()
    own = b.seq.own_flush_slot
    assert b.local == [own] and b.remote == [own] and 9 in b.seq.dirty()
    b.done(own)
    assert b.answers == {}
    assert b.seq.idle() == 1
    b.look()
    assert b.updating() == {0, 1}
    b.rest()
    assert b.map == 0b11


def test_flush_of_one_side_only_clears_nothing() -> None:
    for broken in ("local", "remote"):
        b = Bench(keepdirty=2)
        cold(b, 9, range(2))
        flush = b.flush()
        b.local_done(flush, 5 if broken == "local" else 0)
        b.remote_done(flush, 5 if broken == "remote" else 0)
        b.seq.idle()
        b.look()
        assert 9 in b.seq.dirty() and b.updating() is None


def test_a_failed_flush_is_not_made_good_by_the_next() -> None:
    """What a flush failed for may be lost on that side although the next flush succeeds: the nodes may differ."""
    for broken in ("local", "remote"):
        b = Bench(keepdirty=2)
        cold(b, 9, range(2))
        flush = b.flush()
        b.local_done(flush, 5 if broken == "local" else 0)
        b.remote_done(flush, 5 if broken == "remote" else 0)
        if broken == "remote":
            assert b.seq.idle() == 0  # it is about to be dropped
            b.disconnect()
            b.connect()
        b.whole_flush()
        b.rest()
        assert 9 in b.seq.dirty() and 9 in b.seq.sync()


def test_write_after_a_failed_flush_is_cleared_as_ever() -> None:
    b = Bench(keepdirty=2)
    b.whole_write(12)
    flush = b.flush()
    b.local_done(flush, 5)
    b.remote_done(flush)
    cold(b, 9, range(2))
    b.rest()
    assert 9 not in b.seq.dirty() and 12 in b.seq.sync()


def test_nothing_is_cleared_without_the_secondary() -> None:
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    b.whole_flush()
    b.disconnect()
    assert b.seq.idle() == 0
    slot = b.write(5)
    assert b.updating() == {0, 1, 5, 9}
    b.map_done()
    b.local_done(slot)
    assert b.seq.idle() == 0 and b.seq.dirty() == {0, 1, 5, 9}


def test_extent_that_is_out_of_sync_is_never_cleared() -> None:
    b = Bench(keepdirty=2, load=1 << 9)
    assert b.seq.sync() == {9} and b.seq.ondisk() == {9}
    cold(b, 9, range(2))
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0, 1, 9} and b.map == 0b1000000011


def test_extent_with_a_mutation_under_way_is_not_cleared() -> None:
    b = Bench(keepdirty=1)
    b.whole_write(9)
    slot = b.write(9)
    b.whole_write(0)
    b.whole_flush()
    assert b.seq.idle() == 0 and 9 in b.seq.dirty()
    b.done(slot)
    # Completed after the flush began: that one does not count for it.
    b.seq.idle()
    assert 9 in b.seq.dirty()


def test_write_that_completes_after_the_flush_began_is_not_covered() -> None:
    for side in ("both", "local", "remote"):
        b = Bench(keepdirty=1)
        b.whole_write(9)
        b.whole_write(0)
        slot = b.write(9)
        if side == "local":
            b.remote_done(slot)
        if side == "remote":
            b.local_done(slot)
        flush = b.flush()
        b.done(slot)
        b.done(flush)
        b.whole_write(0)
        b.seq.idle()
        b.look()
        assert 9 in b.seq.dirty(), side
        b.rest()
        assert 9 not in b.seq.dirty(), side


def test_write_to_an_extent_that_the_update_under_way_clears_waits_for_another() -> None:
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    b.whole_flush()
    b.seq.idle()
    b.look()
    assert b.updating() == {0, 1} and 9 in {n for n in range(16) if b.map >> n & 1}
    slot = b.write(9)
    assert b.local == [b.seq.map_slot] and b.remote == []
    b.map_done()
    assert b.remote == [] and b.updating() == {1, 9}
    b.map_done()
    assert b.remote == [slot]


def test_write_to_an_extent_whose_clearing_failed_waits_for_another_update() -> None:
    """After a failed update nobody knows what the disk says about the extents that it changed."""
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    b.whole_flush()
    b.seq.idle()
    b.look()
    b.map_done(5)
    slot = b.write(9)
    assert b.remote == [] and b.updating() == {1, 9}
    b.map_done()
    assert b.remote == [slot]


def test_map_update_takes_cold_extents_along() -> None:
    b = Bench(keepdirty=2)
    cold(b, 9, range(2))
    b.whole_flush()
    b.write(1)
    assert b.updating() is None
    b.write(7)
    assert b.updating() == {1, 7}


def test_many_cold_extents_get_a_flush_from_a_map_update() -> None:
    b = Bench(keepdirty=2, nclient=12)
    for n in range(4):
        b.whole_write(n)
    assert b.seq.s.seq == b.seq.s.stats.write + b.seq.s.stats.map_update
    b.write(4)
    assert b.seq.own_flush_slot in b.local and b.seq.own_flush_slot in b.remote


def test_hot_extents_cost_no_update() -> None:
    b = Bench(keepdirty=4)
    for n in range(4):
        b.whole_write(n)
    before = b.seq.s.stats.map_update
    for turn in range(20):
        b.whole_write(turn % 4, turn % 8 * 512)
        b.whole_flush()
        b.rest()
    assert b.seq.s.stats.map_update == before


def test_one_extent_more_pushes_out_the_least_recently_used() -> None:
    b = Bench(keepdirty=4)
    for n in (0, 1, 2, 3, 0, 2):
        b.whole_write(n)
    b.whole_write(4)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0, 2, 3, 4}
    b.whole_write(5)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0, 2, 4, 5}
    slot = b.write(1)
    assert b.updating() is not None and slot not in b.local


def test_one_kept_extent() -> None:
    b = Bench(keepdirty=1)
    for n in (0, 1, 0, 2, 2):
        b.whole_write(n)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {2}


def test_write_of_more_extents_than_are_kept() -> None:
    b = Bench(keepdirty=2, extentsize=512)
    slot = b.request(WRITE, 3 * 512, 8 * 512)
    assert b.updating() == set(range(3, 11))
    b.map_done()
    b.done(slot)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {9, 10}


def test_write_of_zeros_keeps_its_extent() -> None:
    b = Bench(keepdirty=2)
    slot = b.request(WRITE, 0, 4096, FLAG_ZERO)
    b.settle_map()
    b.done(slot)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0}


def test_deletes_push_nothing_out_and_are_not_kept() -> None:
    b = Bench(keepdirty=2)
    for n in range(2):
        b.whole_write(n)
    slot = b.request(DELETE, 4096, 10 * 4096)
    b.settle_map()
    b.done(slot)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0, 1}


def test_delete_of_everything() -> None:
    b = Bench(keepdirty=2, short=512)
    slot = b.request(DELETE, 0, b.geometry.datasize)
    assert b.updating() == set(range(16))
    b.map_done()
    b.done(slot)
    b.rest()
    assert b.seq.dirty() == set() and b.map == 0


def test_ndirty_counts_extents_under_way_or_out_of_sync_once() -> None:
    b = Bench(load=0b11)
    assert b.seq.s.ndirty == 2
    one, two, three = b.write(1), b.write(4), b.write(4, 512)
    assert b.seq.s.ndirty == 3
    b.settle_map()
    b.done(one)
    b.done(two)
    assert b.seq.s.ndirty == 3
    b.local_done(three)
    b.remote_done(three, 5)
    assert b.seq.s.ndirty == 3 and b.seq.sync() == {0, 1, 4}
