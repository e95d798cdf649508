"""Invariant 3: of two mutations that overlap the later starts when the earlier has completed everywhere."""

import pytest

from tests.sim.harness import ASYNC, DELETE, FULLSYNC, MEMSYNC, SECTOR, WRITE, Bench


def hot(mode: int = FULLSYNC) -> Bench:
    """Extents 0 to 3 are dirty on disk: nothing waits for the map."""
    b = Bench(mode=mode, keepdirty=4)
    for n in range(4):
        b.whole_write(n)
    return b


def sectors(b: Bench, first: int, count: int, cmd: int = WRITE) -> int:
    return b.request(cmd, first * SECTOR, count * SECTOR)


@pytest.mark.parametrize("first", ["local", "remote"])
@pytest.mark.parametrize("mode", [FULLSYNC, MEMSYNC, ASYNC])
def test_later_write_waits_for_both_components_in_every_mode(mode: int, first: str) -> None:
    b = hot(mode)
    one = sectors(b, 0, 4)
    two = sectors(b, 0, 4)
    assert b.local == [one] and b.remote == [one]
    (b.local_done if first == "local" else b.remote_done)(one)
    assert two not in b.local and two not in b.remote
    (b.remote_done if first == "local" else b.local_done)(one)
    assert b.local == [two] and b.remote == [two]


def test_memsync_write_that_is_only_received_still_holds_its_range() -> None:
    b = hot(MEMSYNC)
    one = sectors(b, 0, 4)
    two = sectors(b, 0, 4)
    b.received(one)
    b.local_done(one)
    assert one in b.answers and two not in b.remote
    b.remote_done(one)
    assert b.remote == [two]


@pytest.mark.parametrize("first,count", [(2, 1), (0, 3), (5, 3), (0, 8), (3, 1), (4, 1)])
def test_partial_overlap_waits(first: int, count: int) -> None:
    b = hot()
    one = sectors(b, 2, 4)
    two = sectors(b, first, count)
    assert b.local == [one]
    b.done(one)
    assert b.local == [two]


@pytest.mark.parametrize("first,count", [(0, 2), (1, 1), (6, 1), (6, 8)])
def test_neighbours_do_not_wait(first: int, count: int) -> None:
    b = hot()
    one = sectors(b, 2, 4)
    two = sectors(b, first, count)
    assert b.local == [one, two] and b.remote == [one, two]


def test_chain_starts_one_by_one_in_order_of_arrival() -> None:
    b = hot()
    chain = [sectors(b, 0, 2) for _ in range(5)]
    for slot in chain:
        assert b.local == [slot] and b.remote == [slot]
        b.done(slot)
    assert list(b.answers) == chain


def test_overlap_with_one_that_itself_waits() -> None:
    """The third does not touch the first, only the second, which is waiting: it must not pass it."""
    b = hot()
    one, two, three = sectors(b, 0, 4), sectors(b, 2, 4), sectors(b, 4, 4)
    assert b.local == [one]
    b.done(one)
    assert b.local == [two]
    b.done(two)
    assert b.local == [three]


def test_one_that_waits_for_two() -> None:
    b = hot()
    one, two = sectors(b, 0, 2), sectors(b, 4, 2)
    wide = sectors(b, 1, 4)
    after = sectors(b, 1, 1)
    assert b.local == [one, two]
    b.done(two)
    assert b.local == [one]
    b.done(one)
    assert b.local == [wide]
    b.done(wide)
    assert b.local == [after]


def test_all_that_waited_for_one_start_together() -> None:
    b = hot()
    wide = sectors(b, 0, 8)
    rest = [sectors(b, n, 1) for n in range(6)]
    assert b.local == [wide]
    b.done(wide)
    assert b.local == rest and b.remote == rest


@pytest.mark.parametrize("cmds", [(DELETE, WRITE), (WRITE, DELETE), (DELETE, DELETE)])
def test_deletes_are_mutations(cmds: tuple[int, int]) -> None:
    b = hot()
    one = sectors(b, 0, 8, cmds[0])
    two = sectors(b, 4, 8, cmds[1])
    assert b.local == [one]
    b.done(one)
    assert b.local == [two]


def test_reads_wait_for_nobody_and_hold_nobody_up() -> None:
    b = hot()
    one = sectors(b, 0, 8)
    read = b.read(0)
    two = sectors(b, 20, 1)
    over = b.read(2, 2048)
    assert b.local == [one, read, two, over] and b.remote == [one, two]


def test_failed_mutation_lets_the_next_one_go() -> None:
    b = hot()
    one, two = sectors(b, 0, 4), sectors(b, 0, 4)
    b.local_done(one, 5)
    assert two not in b.local and one not in b.answers
    b.remote_done(one)
    assert b.answers[one] == 5 and b.local == [two]


def test_the_next_one_goes_while_the_first_waits_for_its_grant() -> None:
    b = hot()
    b.disconnect()
    one, two = sectors(b, 0, 4), sectors(b, 0, 4)
    b.local_done(one)
    assert b.answers == {} and b.local == [two]


def test_waiting_for_the_map_holds_the_range() -> None:
    b = hot()
    one = b.write(9)
    two = b.write(9)
    assert b.local == [b.seq.map_slot]
    b.map_done()
    assert b.local == [one]
    b.done(one)
    assert b.local == [two]


def test_refused_write_lets_the_next_one_try() -> None:
    b = hot()
    one = b.write(9)
    two = b.write(9)
    b.map_done(28)
    assert b.answers == {one: 28} and b.updating() == {0, 1, 2, 3, 9}
    b.map_done()
    assert b.local == [two]
