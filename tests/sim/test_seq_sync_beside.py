"""A resynchronisation beside clients: how much of it is under way, who goes first, and that nobody waits for ever."""

from tests.sim.harness import SYNC_DONE, Bench
from tests.sim.test_seq_sync import behind

MARKED = range(4, 32)
SLAB = 128 << 10
SHORT = 64 << 10  # a chunk beside clients
WINDOW = 2  # chunks beside clients


def busy() -> Bench:
    """Extents of one chunk each are out of sync; a client's request came to its end just now."""
    b = behind(*MARKED, extents=32, nsync=8)
    assert len(chunks(b)) > WINDOW
    finished(b, b.read(0))
    tick(b)
    return b


def tick(b: Bench) -> None:
    """Without time: one chunk may be issued before its turn."""
    b.seq.lib.hast_seq_sync_tick(b.seq.arena, 0)
    b.look()


def finished(b: Bench, slot: int) -> None:
    b.done(slot)
    b.forget(slot)


def chunks(b: Bench) -> list[int]:
    """Those under way."""
    return sorted(slot for slot in {*b.local, *b.remote} if b.geometry.nclient <= slot < b.geometry.nclient + 8)


def copied(b: Bench) -> None:
    """All that are under way."""
    for slot in chunks(b):
        b.done(slot)


def test_a_chunk_lets_those_go_first_that_the_one_before_it_met() -> None:
    b = busy()
    one, two = b.read(0), b.read(1)
    copied(b)
    assert len(chunks(b)) == 2, "one in its turn, one as a tick has passed"
    copied(b)
    assert chunks(b) == []
    finished(b, one)
    assert chunks(b) == []
    three = b.read(2)
    finished(b, two)
    assert len(chunks(b)) == 1
    copied(b)
    assert chunks(b) == []
    finished(b, three)
    assert len(chunks(b)) == WINDOW, "nobody is there, but somebody was just now"


def test_clients_that_get_nowhere_hold_nothing_up() -> None:
    """They may wait for the end of this very resynchronisation."""
    b = busy()
    stuck = b.read(0)
    copied(b)
    copied(b)
    assert chunks(b) == []
    tick(b)
    assert len(chunks(b)) == WINDOW
    while chunks(b):
        copied(b)
    assert b.seq.sync() == set() and not b.raised & SYNC_DONE
    b.done(b.seq.own_flush_slot)
    assert b.raised & SYNC_DONE
    finished(b, stuck)


def test_it_gets_on_however_long_requests_take() -> None:
    b = busy()
    for extent in (1, 2):
        slow = b.read(extent)
        copied(b)
        copied(b)
        left = len(b.seq.sync())
        other = b.read(0)
        finished(b, other)
        tick(b)
        copied(b)
        assert len(b.seq.sync()) < left
        finished(b, slow)


def test_all_of_it_goes_on_when_clients_are_gone() -> None:
    b = busy()
    copied(b)
    assert len(chunks(b)) == WINDOW
    tick(b)
    assert len(chunks(b)) > WINDOW


def test_chunks_are_short_beside_clients() -> None:
    """A client's request may have to wait for a whole one."""
    b = behind(*MARKED, extents=32, nsync=8, extentsize=SLAB, slab_size=SLAB)
    assert {b.seq.bio[slot].length for slot in chunks(b)} == {SLAB}
    finished(b, b.read(0))
    tick(b)
    copied(b)
    copied(b)
    assert [b.seq.bio[slot].length for slot in chunks(b)] == [SHORT] * WINDOW
