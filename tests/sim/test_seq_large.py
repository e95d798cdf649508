"""Maps of several blocks, and the last extents of a device."""

from tests.sim.harness import DELETE, SECTOR, WRITE, Bench

BLOCK = 8 * 4096  # extents of one block of the map


def test_update_writes_only_the_block_that_changed() -> None:
    b = Bench(extents=3 * BLOCK, extentsize=512)
    b.write(BLOCK + 5)
    bio = b.seq.bio[b.seq.map_slot]
    assert (bio.offset, bio.length) == (4096, 4096)
    b.map_done()
    assert b.map == 1 << BLOCK + 5


def test_last_block_of_the_map_may_be_short() -> None:
    b = Bench(extents=BLOCK + 17, extentsize=512)
    assert b.geometry.mapsize == 4096 + 512
    slot = b.write(BLOCK + 16)
    bio = b.seq.bio[b.seq.map_slot]
    assert (bio.offset, bio.length) == (4096, 512)
    b.map_done()
    assert b.local == [slot]


def test_more_changed_blocks_than_a_slab_holds() -> None:
    b = Bench(extents=5 * BLOCK, extentsize=512, slab_size=8192)
    slot = b.request(DELETE, 0, b.geometry.datasize)
    sizes = []
    while b.updating() is not None:
        assert b.remote == []
        bio = b.seq.bio[b.seq.map_slot]
        sizes.append((bio.offset, bio.length))
        b.map_done()
    assert sizes == [(0, 8192), (8192, 8192), (16384, 4096)]
    assert b.remote == [slot] and b.map == (1 << 5 * BLOCK) - 1
    b.done(slot)
    b.rest()
    assert b.map == 0 and b.seq.dirty() == set()


def test_write_that_waits_for_two_blocks() -> None:
    b = Bench(extents=2 * BLOCK, extentsize=512)
    slot = b.request(WRITE, (BLOCK - 1) * 512, 1024)
    assert b.updating() == {BLOCK - 1}
    b.map_done()
    assert b.updating() == {BLOCK} and b.remote == []
    b.map_done()
    assert b.remote == [slot]


def test_failure_of_the_second_block_refuses_the_write() -> None:
    b = Bench(extents=2 * BLOCK, extentsize=512)
    slot = b.request(WRITE, (BLOCK - 1) * 512, 1024)
    b.map_done()
    b.map_done(5)
    assert b.answers == {slot: 5} and b.remote == [] and b.seq.quiet()


def test_neighbours_in_different_blocks_do_not_wait_for_each_other() -> None:
    b = Bench(extents=3 * BLOCK, extentsize=512)
    one, two = b.write(0), b.write(2 * BLOCK)
    b.map_done()
    assert b.local[0] == one and two not in b.local
    b.map_done()
    assert two in b.local


def test_merge_of_a_large_map() -> None:
    b = Bench(extents=3 * BLOCK + 100, extentsize=512, connected=False)
    theirs = {0, 7, 8, BLOCK - 1, BLOCK, 2 * BLOCK + 12345, 3 * BLOCK + 99}
    b.connect(sum(1 << n for n in theirs))
    updates = 0
    while not b.raised:
        assert b.seq.s.connected == 0
        b.map_done()
        updates += 1
    assert updates == 4 and b.seq.sync() == theirs == b.seq.ondisk()
    assert b.map == sum(1 << n for n in theirs) and b.seq.s.ndirty == len(theirs)


def test_clearing_in_several_blocks() -> None:
    b = Bench(extents=3 * BLOCK, extentsize=512, keepdirty=1)
    for n in (5, BLOCK + 5, 2 * BLOCK + 5):
        b.whole_write(n)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {2 * BLOCK + 5} and b.map == 1 << 2 * BLOCK + 5


def test_last_extent_is_a_short_one() -> None:
    b = Bench(extents=9, extentsize=4096, short=4096 - SECTOR)
    assert b.geometry.datasize == 8 * 4096 + SECTOR
    slot = b.request(WRITE, 8 * 4096, SECTOR)
    assert b.updating() == {8}
    b.map_done()
    b.done(slot)
    assert b.answers == {slot: 0}
    claimed = b.seq.claim()
    assert b.seq.submit(claimed, WRITE, 8 * 4096, 2 * SECTOR) == -22


def test_one_extent_larger_than_the_device() -> None:
    b = Bench(extents=1, extentsize=1 << 21, short=(1 << 21) - SECTOR)
    b.whole_write(0)
    b.whole_flush()
    b.rest()
    assert b.seq.dirty() == {0}


def test_default_geometry_of_a_large_component() -> None:
    """Two tebibytes, 2 MiB extents: the last extents, and a delete of all of it."""
    extents = 1 << 20
    b = Bench(extents=extents, extentsize=1 << 21, slab_size=131072, keepdirty=64)
    b.whole_write(extents - 1, (1 << 21) - 4096, 4096)
    slot = b.request(DELETE, 0, b.geometry.datasize)
    assert b.seq.s.ndirty == extents
    b.settle_map()
    b.done(slot)
    b.rest()
    assert b.seq.dirty() == {extents - 1} and b.seq.s.ndirty == 0
