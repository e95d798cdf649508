"""Sizes, layout and bits of the activemap."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import activemap
from hast.activemap import (
    all_dirty,
    clear_bit,
    count_dirty,
    dirty_bytes,
    dirty_ranges,
    extent_range,
    geometry,
    is_set,
    ondisk_size,
    or_into,
    set_bit,
)
from hast.errors import DataError

SIZES = st.integers(1, 1 << 60)
EXTENTS = st.integers(12, 30).map(lambda n: 1 << n)
SECTORS = st.sampled_from((512, 4096))


@pytest.mark.parametrize(
    ("mediasize", "extentsize", "sectorsize", "size"),
    [
        (1, 2 << 20, 512, 512),
        (512 * 8 * (2 << 20), 2 << 20, 512, 512),
        (512 * 8 * (2 << 20) + 1, 2 << 20, 512, 1024),
        (512 * 8 * (2 << 20) + 1, 2 << 20, 4096, 4096),
        (1 << 40, 2 << 20, 512, 65536),
        (1 << 40, 4096, 512, 32 << 20),
    ],
)
def test_ondisk_size(mediasize: int, extentsize: int, sectorsize: int, size: int) -> None:
    assert ondisk_size(mediasize, extentsize, sectorsize) == size


@given(SIZES, EXTENTS, SECTORS)
def test_ondisk_size_is_enough_and_not_more(mediasize: int, extentsize: int, sectorsize: int) -> None:
    size = ondisk_size(mediasize, extentsize, sectorsize)
    assert size % sectorsize == 0
    assert size * 8 * extentsize >= mediasize
    assert (size - sectorsize) * 8 * extentsize < mediasize


@given(st.integers(0, 1 << 45), EXTENTS, SECTORS)
def test_geometry_covers_the_media(mediasize: int, extentsize: int, sectorsize: int) -> None:
    if mediasize < 4096 + 2 * sectorsize:
        with pytest.raises(DataError, match="too small"):
            geometry(mediasize, extentsize, sectorsize)
        return
    try:
        layout = geometry(mediasize, extentsize, sectorsize)
    except DataError as error:
        # The map of a media that is barely there takes the rest of it, or is too large to handle.
        assert "too small" in str(error) or "larger extent size" in str(error)
        return
    assert layout.offset == 4096 + layout.mapsize
    assert 0 <= mediasize - (layout.offset + layout.datasize) < sectorsize
    assert layout.datasize > 0
    assert layout.datasize % sectorsize == layout.offset % sectorsize == 0
    assert layout.mapsize * 8 >= layout.extents


def test_the_smallest_component() -> None:
    assert geometry(4096 + 1024, 2 << 20, 512).datasize == 512
    with pytest.raises(DataError, match="5119 bytes are too small"):
        geometry(5119, 2 << 20, 512)


@pytest.mark.parametrize("extentsize", [0, -4096, 1, 256, 3 << 20, (2 << 20) + 512, 1 << 31])
def test_extent_sizes_that_are_refused(extentsize: int) -> None:
    with pytest.raises(DataError, match="power of two"):
        geometry(64 << 20, extentsize, 512)


def test_an_extent_has_whole_sectors() -> None:
    with pytest.raises(DataError, match="multiple of the sector size"):
        geometry(64 << 20, 2048, 4096)


def test_a_map_too_large_is_refused() -> None:
    with pytest.raises(DataError, match="larger extent size"):
        geometry(1 << 60, 512, 512)


def test_extent_range() -> None:
    assert extent_range(0, 1, 4096) == range(1)
    assert extent_range(4095, 1, 4096) == range(1)
    assert extent_range(4095, 2, 4096) == range(2)
    assert extent_range(4096, 4096, 4096) == range(1, 2)
    assert extent_range(8191, 8194, 4096) == range(1, 5)  # bytes 8191 to 16384


def test_bits_count_from_the_least_significant() -> None:
    bits = bytearray(2)
    set_bit(bits, 0)
    set_bit(bits, 10)
    set_bit(bits, 15)
    assert bits == b"\x01\x84"
    clear_bit(bits, 10)
    assert bits == b"\x01\x80"
    assert [is_set(bits, n) for n in (0, 1, 10, 15)] == [True, False, False, True]
    for function in (set_bit, clear_bit, is_set):
        with pytest.raises(IndexError):
            function(bits, 16)


MAPS = st.lists(st.sampled_from((0, 0xFF, 0x01, 0x80, 0x7E)) | st.integers(0, 255), min_size=1, max_size=20).map(
    bytearray
)


@given(MAPS, st.data())
def test_ranges_and_counts_agree_with_single_bits(bits: bytearray, data: st.DataObject) -> None:
    extents = data.draw(st.integers(0, len(bits) * 8))
    ranges = list(dirty_ranges(bits, extents))
    assert [n for run in ranges for n in run] == [n for n in range(extents) if is_set(bits, n)]
    assert all(before.stop < after.start for before, after in itertools.pairwise(ranges))
    assert count_dirty(bits, extents) == sum(map(len, ranges))


@given(MAPS, st.data())
def test_or(bits: bytearray, data: st.DataObject) -> None:
    other = data.draw(st.binary(min_size=len(bits), max_size=len(bits)))
    merged = bytearray(bits)
    or_into(merged, other)
    assert merged == bytes(a | b for a, b in zip(bits, other, strict=True))


def test_or_refuses_another_size() -> None:
    bits = bytearray(512)
    with pytest.raises(DataError, match="1024 bytes"):
        or_into(bits, bytes(1024))


def test_dirty_bytes_of_a_short_last_extent() -> None:
    full = all_dirty(512)
    assert len(full) == 512
    assert dirty_bytes(full, 10000, 4096) == 10000
    assert dirty_bytes(full, 8192, 4096) == 8192
    assert dirty_bytes(b"\x04", 10000, 4096) == 10000 - 8192
    assert dirty_bytes(b"\x03", 10000, 4096) == 8192
    assert dirty_bytes(b"\xf8", 10000, 4096) == 0


def test_defaults_are_the_formats() -> None:
    assert (activemap.DEFAULT_EXTENTSIZE, activemap.DEFAULT_KEEPDIRTY) == (2097152, 64)
