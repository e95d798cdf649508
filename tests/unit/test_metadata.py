"""The metadata block: four distinct refusals, the counter pair by role, our own element."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast import activemap
from hast.confgrammar import MAX_NAME
from hast.control import Role
from hast.errors import DataError
from hast.metadata import (
    BlankMetadataError,
    Counters,
    DamagedMetadataError,
    ForeignMetadataError,
    MediaSizeError,
    Metadata,
    Pair,
    check_media,
    unpack,
)
from hast.nv import Nv, decode
from tests import vectors
from tests.unit.strategies import U64, damaged

GOOD = unpack(vectors.load("metadata_primary_degraded").raw, "data")


@st.composite
def blocks(draw: st.DrawFn) -> Metadata:
    layout = activemap.geometry(
        draw(st.integers(16 << 10, 1 << 50)), 1 << draw(st.integers(20, 30)), draw(st.sampled_from((512, 4096)))
    )
    return Metadata(
        resource=draw(st.text("abc/-._é", min_size=1, max_size=100)),
        datasize=layout.datasize,
        extentsize=layout.extentsize,
        keepdirty=draw(st.integers(0, 2**32 - 1)),
        offset=layout.offset,
        resuid=draw(U64),
        pair=Pair(draw(U64), draw(U64)),
        prevrole=draw(st.sampled_from(list(Role))),
        syncing=draw(st.booleans()),
    )


@given(blocks())
def test_round_trip(block: Metadata) -> None:
    raw = block.pack()
    assert len(raw) == 4096
    assert unpack(raw, block.resource) == block


@given(damaged(blocks().map(Metadata.pack)).map(lambda raw: raw[:4096].ljust(4096, b"\0")) | st.binary(max_size=5000))
def test_garbage_is_refused_or_read(raw: bytes) -> None:
    try:
        block = unpack(raw, "a")
    except DataError as error:
        assert "\n" not in str(error) and str(error).startswith("a: ")
    else:
        assert unpack(block.pack(), "a") == block


def test_blank_damaged_and_foreign_are_told_apart() -> None:
    with pytest.raises(BlankMetadataError, match="hastctl create data"):
        unpack(bytes(4096), "data")
    with pytest.raises(DamagedMetadataError, match="no valid metadata"):
        unpack(b"\xeb\x3c\x90" + bytes(4093), "data")
    with pytest.raises(DamagedMetadataError, match="no valid metadata"):
        unpack(bytes(8) + GOOD.pack()[8:], "data")
    with pytest.raises(ForeignMetadataError, match="belongs to resource 'data'"):
        unpack(GOOD.pack(), "other")
    for length in (0, 4095, 4097):
        with pytest.raises(DamagedMetadataError, match=f"{length} of 4096 bytes"):
            unpack(bytes(length), "data")


def test_a_foreign_name_is_shown_on_one_line() -> None:
    with pytest.raises(ForeignMetadataError, match=r"resource 'a\\nb'"):
        unpack(replace(GOOD, resource="a\nb").pack(), "data")


@pytest.mark.parametrize("name", [element.name for element in decode(GOOD.pack())])
def test_each_element_is_needed(name: str) -> None:
    nv = Nv([element for element in decode(GOOD.pack()) if element.name != name])
    with pytest.raises(DamagedMetadataError, match=f"'{name}'.*missing"):
        unpack(nv.encode().ljust(4096, b"\0"), "data")


@pytest.mark.parametrize(
    "wrong",
    [
        {"extentsize": 0},
        {"extentsize": 3 << 20},
        {"extentsize": 256},
        {"extentsize": 1 << 31},
        {"datasize": 0},
        {"datasize": 513},
        {"datasize": 1 << 63},
        {"offset": 0},
        {"offset": 4096},
        {"offset": 4609},
        {"offset": 1 << 40},
        {"datasize": (1 << 63) - 512},
        {"extentsize": 4096},  # 16383 extents: their map does not fit into 512 bytes
    ],
)
def test_sizes_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(DamagedMetadataError):
        unpack(replace(GOOD, **wrong).pack(), "data")  # type: ignore[arg-type]


def test_an_unknown_role_is_damage() -> None:
    nv = Nv([element for element in decode(GOOD.pack()) if element.name != "prevrole"])
    nv.add_string("prevrole", "king")
    with pytest.raises(DamagedMetadataError, match="king"):
        unpack(nv.encode().ljust(4096, b"\0"), "data")


def test_a_media_that_shrank() -> None:
    check_media(GOOD, 64 << 20)
    check_media(GOOD, 65 << 20)
    with pytest.raises(MediaSizeError, match=f"has {(64 << 20) - 1} bytes but its metadata needs {64 << 20}"):
        check_media(GOOD, (64 << 20) - 1)


def test_the_pair_belongs_to_the_role_that_reads_it() -> None:
    pair = Pair(7, 3)
    block = replace(GOOD, pair=pair)
    assert block.counters(Role.INIT) == Counters(primary=pair, secondary=pair)
    assert block.counters(Role.PRIMARY) == Counters(primary=pair, secondary=None)
    assert block.counters(Role.SECONDARY) == Counters(primary=None, secondary=pair)


def test_syncing_is_ours_and_absent_when_false() -> None:
    marked = replace(GOOD, syncing=True)
    assert "syncing" not in decode(GOOD.pack())
    assert decode(marked.pack()).get_uint8("syncing") == 1
    # What the original knows stands before it, unchanged.
    length = len(decode(GOOD.pack()).encode())
    assert marked.pack()[:length] == GOOD.pack()[:length]
    assert unpack(marked.pack(), "data").syncing


def test_unknown_elements_are_ignored() -> None:
    nv = decode(GOOD.pack())
    nv.add_string("later", "extension")
    assert unpack(nv.encode().ljust(4096, b"\0"), "data") == GOOD


def test_a_block_that_would_not_fit_is_not_written() -> None:
    with pytest.raises(DataError, match="larger than"):
        replace(GOOD, resource="x" * 4000).pack()


def test_mapsize_is_the_area_before_the_data() -> None:
    assert GOOD.mapsize == 512


def test_all_that_is_said_stands_in_one_sector() -> None:
    """So no loss of power can leave half of it: a disk writes a sector or does not."""
    largest = (1 << 64) - 1
    block = Metadata(
        "n" * MAX_NAME, (1 << 62), 1 << 30, (1 << 32) - 1, 4096 + (1 << 30), largest, Pair(largest, largest),
        Role.SECONDARY, syncing=True, alone=True, discard=True, unmapped=True, blank=True, unsaid=True, bond=largest,
    )  # fmt: skip
    assert len(block.pack().rstrip(b"\0")) <= activemap.FILE_SECTOR_SIZE
