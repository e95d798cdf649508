"""Rings and doorbells between processes: millions of entries, consumers that sleep and wake, and kill -9."""

from __future__ import annotations

import ctypes
import random
import signal
from pathlib import Path

import pytest

from tests.shm.bench import CORRUPT, LOST_WAKE, MAX_BATCH, Bench, load, until
from tests.shm.native import compiler

KINDS = pytest.mark.parametrize("eventfd", [False, True], ids=["futex", "eventfd"])
ENDLESS = 2**62


@pytest.fixture(scope="module")
def pump(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if compiler() is None:
        pytest.skip("no C compiler")
    return load(tmp_path_factory.mktemp("pump"))


def finish(bench: Bench, consumer: int) -> None:
    """No producer is left: the consumer takes the rest and ends, and every entry is accounted for."""
    bench.close()
    assert bench.reap(consumer) == 0, bench.state()
    for lane in range(bench.lanes):
        assert bench.processed(lane) + bench.lost(lane) == bench.pushed(lane), bench.state()
        assert bench.used(lane) == 0, bench.state()


def make_progress(bench: Bench, entries: int) -> None:
    """Lets so many entries through."""
    goal = bench.total() + entries
    until(lambda: bench.total() >= goal, f"no progress; {bench.state()}")


@KINDS
@pytest.mark.parametrize(
    ("lanes", "entries", "count"),
    [(1, 1, 20_000), (1, 1024, 2_000_000), (2, 8, 100_000), (3, 256, 600_000), (4, 64, 250_000)],
)
def test_each_entry_once_and_in_order(
    pump: ctypes.CDLL, eventfd: bool, lanes: int, entries: int, count: int
) -> None:
    with Bench(pump, lanes, entries, count, eventfd) as bench:
        consumer = bench.consumer(seed=7)
        producers = [bench.producer(lane, seed=100 + lane) for lane in range(lanes)]
        assert [bench.reap(pid) for pid in producers] == [0] * lanes, bench.state()
        finish(bench, consumer)
        assert [bench.processed(lane) for lane in range(lanes)] == [count] * lanes
        assert bench.waits() > 0  # otherwise nothing was shown about doorbells


@KINDS
@pytest.mark.parametrize("seed", [1, 2])
def test_producers_killed_and_replaced(pump: ctypes.CDLL, eventfd: bool, seed: int) -> None:
    rng = random.Random(seed)
    with Bench(pump, 3, 64, ENDLESS, eventfd) as bench:
        consumer = bench.consumer(seed=seed)
        producers = [bench.producer(lane, seed=10 + lane) for lane in range(3)]
        for turn in range(60):
            make_progress(bench, rng.randrange(1, 5000))
            lane = rng.randrange(3)
            assert bench.kill(producers[lane])
            # What it had pushed reaches the consumer through its successor's force, if not before.
            producers[lane] = bench.producer(lane, seed=1000 + turn, successor=True)
        bench.stop()
        assert [bench.reap(pid) for pid in producers] == [0] * 3, bench.state()
        finish(bench, consumer)
        assert [bench.lost(lane) for lane in range(3)] == [0] * 3  # the consumer was never killed


@KINDS
@pytest.mark.parametrize("seed", [3, 4])
def test_consumer_killed_and_replaced(pump: ctypes.CDLL, eventfd: bool, seed: int) -> None:
    rng = random.Random(seed)
    kills = 60
    with Bench(pump, 2, 128, ENDLESS, eventfd) as bench:
        consumer = bench.consumer(seed=seed)
        producers = [bench.producer(lane, seed=10 + lane) for lane in range(2)]
        for turn in range(kills):
            make_progress(bench, rng.randrange(1, 5000))
            assert bench.kill(consumer)
            consumer = bench.consumer(seed=1000 + turn)
        bench.stop()
        assert [bench.reap(pid) for pid in producers] == [0] * 2, bench.state()
        finish(bench, consumer)
        assert sum(bench.lost(lane) for lane in range(2)) <= kills * 2 * MAX_BATCH


@KINDS
def test_everybody_killed_at_random(pump: ctypes.CDLL, eventfd: bool) -> None:
    rng = random.Random(5)
    with Bench(pump, 2, 32, ENDLESS, eventfd) as bench:
        consumer = bench.consumer(seed=5)
        producers = [bench.producer(lane, seed=10 + lane) for lane in range(2)]
        for turn in range(60):
            make_progress(bench, rng.randrange(1, 3000))
            who = rng.randrange(3)
            if who == 2:
                assert bench.kill(consumer)
                consumer = bench.consumer(seed=1000 + turn)
            else:
                assert bench.kill(producers[who])
                producers[who] = bench.producer(who, seed=1000 + turn, successor=True)
        bench.stop()
        assert [bench.reap(pid) for pid in producers] == [0] * 2, bench.state()
        finish(bench, consumer)


def sleep_through_a_death(bench: Bench) -> int:
    """Has a producer die between taking the announcement and the wake-up; gives the pid of the sleeping consumer."""
    consumer = bench.consumer(seed=9)
    stat = Path(f"/proc/{consumer}/stat")
    until(
        lambda: bench.sleeping() and bench.waits() == 1 and stat.read_text().rpartition(")")[2].split()[0] == "S",
        "the consumer does not go to sleep",
    )
    assert bench.reap(bench.dying_producer(0)) == -signal.SIGKILL
    return consumer


@KINDS
def test_successor_wakes_who_the_dead_one_left_asleep(pump: ctypes.CDLL, eventfd: bool) -> None:
    with Bench(pump, 1, 8, 1, eventfd) as bench:
        consumer = sleep_through_a_death(bench)
        # The entry is the only one that there will be: its successor finds the target reached, forces, and ends.
        assert bench.reap(bench.producer(0, seed=3, successor=True)) == 0
        until(lambda: bench.processed(0) == 1, bench.state())
        finish(bench, consumer)


@KINDS
def test_without_force_it_would_sleep_on(tmp_path: Path, eventfd: bool) -> None:
    """The same with a successor that does not force: the test has to notice."""
    with Bench(load(tmp_path, "-DHAST_TEST_BREAK_FORCE"), 1, 8, 1, eventfd, wait_ms=2000) as bench:
        consumer = sleep_through_a_death(bench)
        assert bench.reap(bench.producer(0, seed=3, successor=True)) == 0
        assert bench.reap(consumer) == LOST_WAKE
        assert (bench.processed(0), bench.used(0)) == (0, 1)


@KINDS
def test_damaged_index_ends_the_consumer(pump: ctypes.CDLL, eventfd: bool) -> None:
    """A producer that goes mad: the consumer says so, and what it had taken before was right."""
    with Bench(pump, 2, 64, ENDLESS, eventfd) as bench:
        consumer = bench.consumer(seed=11)
        producers = [bench.producer(lane, seed=10 + lane) for lane in range(2)]
        until(lambda: bench.total() > 10_000, bench.state())
        assert bench.kill(producers[0])
        before = bench.processed(0)
        pump.bench_damage_tail(bench.base, 0, 1 << 20)
        assert bench.reap(consumer) == CORRUPT
        assert before <= bench.processed(0) <= bench.pushed(0) + MAX_BATCH
        bench.stop()
        assert bench.reap(producers[1]) == 0


def test_missing_second_look_is_found_out(tmp_path: Path) -> None:
    """A consumer that does not look at its rings after the announcement misses a ring sooner or later."""
    with Bench(load(tmp_path, "-DHAST_TEST_BREAK_RECHECK"), 1, 1, 1_000_000, eventfd=False, wait_ms=500) as bench:
        consumer = bench.consumer(seed=13)
        bench.producer(0, seed=14)
        assert bench.reap(consumer) == LOST_WAKE
