"""The name/value encoding: what it writes, what it refuses, and that garbage raises DataError only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.errors import DataError
from hast.nv import Element, Nv, NvType, decode, printable, roundup8
from tests.unit.strategies import damaged, nvs


def raw(kind: int, name: bytes, value: bytes, namesize: int | None = None, dsize: int | None = None) -> bytes:
    """One element made by hand, right or wrong. name comes with its NUL."""
    namesize = len(name) if namesize is None else namesize
    dsize = len(value) if dsize is None else dsize
    head = bytes((kind, namesize)) + dsize.to_bytes(4, "little")
    return head + name.ljust(roundup8(len(name)), b"\0") + value.ljust(roundup8(len(value)), b"\0")


def test_layout_of_one_element() -> None:
    nv = Nv()
    nv.add_uint8("cmd", 5)
    assert nv.encode() == bytes.fromhex("020401000000 636d640000000000 0500000000000000")


def test_every_type_has_its_reader() -> None:
    nv = Nv()
    for n, kind in enumerate(("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")):
        value = n + 1 if kind.startswith("u") else -n - 1
        getattr(nv, f"add_{kind}")(kind, value)
    nv.add_string("text", "a value")
    nv.add_uint8_array("token", b"\0\1\2")
    back = decode(nv.encode())
    for n, kind in enumerate(("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")):
        assert getattr(back, f"get_{kind}")(kind) == (n + 1 if kind.startswith("u") else -n - 1)
    assert back.get_string("text") == "a value"
    assert back.get_uint8_array("token") == b"\0\1\2"
    assert back == nv
    assert len(back) == 10


@given(nvs())
def test_round_trip_keeps_order_types_and_duplicates(nv: Nv) -> None:
    encoded = nv.encode()
    assert len(encoded) % 2 == 0
    back = decode(encoded)
    assert back == nv
    assert back.encode() == encoded


@given(nvs(), st.integers(0, 64))
def test_trailing_zeros_end_the_run(nv: Nv, zeros: int) -> None:
    assert decode(nv.encode() + bytes(zeros)) == nv


def test_a_zero_type_hides_what_follows() -> None:
    assert len(decode(bytes(8) + raw(2, b"cmd\0", b"\5"))) == 0


def test_padding_is_ignored() -> None:
    nv = Nv()
    nv.add_uint8("cmd", 5)
    noisy = bytearray(nv.encode())
    noisy[10:14] = b"\xaa" * 4  # behind the name
    noisy[15:22] = b"\xbb" * 7  # behind the value
    assert decode(noisy) == nv


def test_the_first_of_two_counts() -> None:
    nv = decode(raw(2, b"n\0", b"\1") + raw(2, b"n\0", b"\2") + raw(17, b"n\0", b"x\0"))
    assert nv.get_uint8("n") == 1
    assert len(nv) == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (raw(0x82, b"cmd\0", b"\1"), "network byte order"),
        (raw(0x80, b"cmd\0", b"\1"), "network byte order"),
        (raw(18, b"cmd\0", b"\1"), "unknown type 18"),
        (raw(2, b"", b"\1"), "name size 0"),
        (raw(2, b"\0", b"\1"), "name size 1"),
        (raw(2, b"cmd", b"\1"), "only NUL"),
        (raw(2, b"c\0d\0", b"\1"), "only NUL"),
        (raw(2, b"cmd\0", b"", dsize=0), "empty"),
        (raw(17, b"cmd\0", b"", dsize=0), "empty"),
        (raw(10, b"cmd\0", b"", dsize=0), "empty"),
        (raw(2, b"cmd\0", b"\1\2"), "1 are needed"),
        (raw(8, b"cmd\0", b"\1\2\3\4"), "8 are needed"),
        (raw(12, b"cmd\0", b"\1\2\3"), "multiple of 2"),
        (raw(15, b"cmd\0", bytes(12)), "multiple of 8"),
        (raw(17, b"cmd\0", b"text"), "only NUL"),
        (raw(17, b"cmd\0", b"te\0xt\0"), "only NUL"),
        (raw(2, b"cmd\0", b"\1")[:-1], "1 bytes past the end"),
        (raw(2, b"cmd\0", b"\1")[:5], "too few"),
        (raw(10, b"cmd\0", b"\1", dsize=0xFFFFFFFF), "past the end"),
        (raw(2, b"cmd\0", b"\1", namesize=255), "past the end"),
    ],
)
def test_refused(data: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        decode(data)
    good = raw(2, b"good\0", b"\1")
    with pytest.raises(DataError, match=f"at byte {len(good)}.*{reason}"):
        decode(good + data)


@given(damaged(nvs().map(Nv.encode)) | st.binary(max_size=200))
def test_garbage_is_refused_or_read(data: bytes) -> None:
    try:
        nv = decode(data)
    except DataError as error:
        assert "\n" not in str(error)
        return
    # What was accepted can be written and read again.
    assert decode(nv.encode()) == nv


def test_missing_and_mistyped_elements() -> None:
    nv = Nv()
    nv.add_uint32("size", 4)
    assert nv.get_uint64("seq", 7) == 7
    assert nv.get_string("text", "x") == "x"
    assert nv.get_uint8_array("token", b"x") == b"x"
    with pytest.raises(DataError, match=r"'seq'.*missing"):
        nv.get_uint64("seq")
    with pytest.raises(DataError, match=r"'text'.*missing"):
        nv.get_string("text")
    with pytest.raises(DataError, match=r"'token'.*missing"):
        nv.get_uint8_array("token")
    with pytest.raises(DataError, match="'size' is of type uint32, uint64 is needed"):
        nv.get_uint64("size", 7)
    assert "size" in nv and "seq" not in nv


@pytest.mark.parametrize(
    "element",
    [
        Element("", NvType.UINT8, 1),
        Element("a\0b", NvType.UINT8, 1),
        Element("n" * 255, NvType.UINT8, 1),
        Element("\ud800", NvType.UINT8, 1),
        Element("n", NvType.UINT8, 256),
        Element("n", NvType.INT8, -129),
        Element("n", NvType.UINT64, -1),
        Element("n", NvType.UINT8, "1"),
        Element("n", NvType.STRING, "a\0"),
        Element("n", NvType.STRING, 1),
        Element("n", NvType.UINT8_ARRAY, b""),
        Element("n", NvType.INT16_ARRAY, (1, 40000)),
        Element("n", NvType.INT16_ARRAY, 1),
    ],
)
def test_what_cannot_be_encoded_raises(element: Element) -> None:
    with pytest.raises(DataError):
        element.encode()


def test_longest_name() -> None:
    nv = Nv([Element("n" * 254, NvType.UINT8, 1)])
    assert decode(nv.encode()) == nv


def test_limits() -> None:
    nv = Nv()
    nv.add_uint8_array("data", bytes(range(256)))
    encoded = nv.encode()
    assert nv.encode(len(encoded)) == encoded
    assert decode(encoded, len(encoded)) == nv
    with pytest.raises(DataError, match="larger than"):
        nv.encode(len(encoded) - 1)
    with pytest.raises(DataError, match="larger than"):
        decode(encoded, len(encoded) - 1)


def test_printable_is_one_line() -> None:
    assert printable("a b\n\x1b\udc80é") == "a b\\n\\x1b\\udc80é"
