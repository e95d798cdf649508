"""The model of a disk: what it allows, what it does not, and that the difference is noticed."""

from __future__ import annotations

import pytest

from tests.chaos.nemesis.model import SECTOR, Kind, Model, Op, WrongDataError, sector

CELL = 4 * SECTOR


def model() -> Model:
    return Model(8, CELL)


def cell(value: int, number: int = 0) -> bytes:
    return sector(value, number) * (CELL // SECTOR)


def write(model: Model, value: int, first: int = 0, count: int = 1) -> Op:
    op = Op(Kind.WRITE, first, count, value=value)
    model.begin(op)
    return op


def read(model: Model, data: bytes, first: int = 0) -> None:
    op = Op(Kind.READ, first, len(data) // CELL)
    model.begin(op)
    model.end(op, data)


def done(model: Model, value: int, first: int = 0, count: int = 1) -> None:
    model.end(write(model, value, first, count))


def refused(model: Model, data: bytes, first: int = 0) -> None:
    with pytest.raises(WrongDataError):
        read(model, data, first)


def test_what_was_acknowledged_is_there_and_nothing_else() -> None:
    m = model()
    read(m, cell(0))
    done(m, 1)
    read(m, cell(1))
    refused(m, cell(0))
    refused(m, cell(2))


def test_data_of_another_place_is_noticed() -> None:
    m = model()
    done(m, 1, 0, 2)
    read(m, cell(1, 0) + cell(1, 1))
    refused(m, cell(1, 1) + cell(1, 0))


def test_one_sector_that_is_old_is_noticed() -> None:
    m = model()
    done(m, 1)
    done(m, 2)
    refused(m, cell(2)[:-SECTOR] + sector(1, 0))


def test_a_read_meets_a_write_before_or_after() -> None:
    m = model()
    done(m, 1)
    reading = Op(Kind.READ, 0, 1)
    m.begin(reading)
    done(m, 2)
    m.end(reading, cell(1))
    refused(m, cell(1))
    read(m, cell(2))


def test_a_read_that_meets_a_write_may_be_given_some_bytes_of_both() -> None:
    """Of both, and of nothing else; and only while they are under way at the same time."""
    mixed = cell(2)[:80] + cell(1)[80:]
    for data, fine in ((mixed, True), (cell(3)[:80] + cell(1)[80:], False), (cell(2)[:80] + cell(1, 5)[80:], False)):
        m = model()
        done(m, 1)
        reading = Op(Kind.READ, 0, 1)
        m.begin(reading)
        writing = write(m, 2)
        if fine:
            m.end(reading, data)
        else:
            with pytest.raises(WrongDataError):
                m.end(reading, data)
        m.end(writing)
        refused(m, mixed)


def test_writes_that_raced_may_have_had_any_order_until_somebody_looked() -> None:
    m = model()
    one, other = write(m, 1), write(m, 2)
    m.end(other)
    m.end(one)
    read(m, cell(2))
    refused(m, cell(1))
    read(m, cell(2))


def test_a_write_without_an_answer_may_have_happened_or_not() -> None:
    m = model()
    done(m, 1)
    m.lost(write(m, 2))
    for value in (1, 2, 1):  # the other node may be the one that lacks it
        read(m, cell(value))
    assert m.maybes() == 1
    done(m, 3)
    refused(m, cell(2))


def test_a_torn_write_without_an_answer() -> None:
    m = model()
    done(m, 1)
    m.lost(write(m, 2))
    read(m, sector(1, 0) + sector(2, 0) * 3)


def test_zeros_are_a_value() -> None:
    m = model()
    done(m, 1, 0, 3)
    op = Op(Kind.TRIM, 1, 1)
    m.begin(op)
    m.end(op)
    read(m, cell(1, 0) + cell(0, 1) + cell(1, 2))
    refused(m, cell(1, 1), 1)


def test_a_copy_has_all_of_it_or_what_a_flush_covers() -> None:
    m = model()
    done(m, 1)
    flush = Op(Kind.FLUSH)
    m.begin(flush)
    done(m, 2)
    m.end(flush)  # 2 was not acknowledged before it was asked for
    open_ = write(m, 3, 1)
    for value in (1, 2):
        read(m.fork(m.flushed), cell(value))
    read(m.fork(None), cell(2))
    refused(m.fork(None), cell(1))
    refused(m.fork(m.flushed), cell(0))
    for value in (0, 3):
        read(m.fork(None), cell(value, 1), 1)
    m.end(open_)
    refused(m, cell(0, 1), 1)
    # A copy that was left behind: all since both were in sync may be missing.
    read(m.fork(0), cell(0))


def test_in_sync_ends_all_doubt() -> None:
    m = model()
    done(m, 1)
    m.lost(write(m, 2))
    m.pin(0, cell(2), "in sync")
    refused(m, cell(1))
    refused(m.fork(0), cell(1))
    with pytest.raises(WrongDataError):
        m.pin(0, cell(1), "in sync")
