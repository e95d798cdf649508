"""hole and lzf: when they are used, that they round-trip, and that no garbage gets past the decoder."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hast.compression import HOLE, LZF, NONE, choose, is_zero, lzf_compress, lzf_decompress, undo
from hast.errors import DataError

# Data with and without repetitions, near and far.
WORDS = st.lists(st.sampled_from((b"the ", b"quick ", b"\0" * 40, b"ab", b"x" * 300)), max_size=60)
DATA = st.binary(max_size=600) | WORDS.map(b"".join)


def noise(size: int) -> bytes:
    """Bytes that cannot be compressed, the same each time."""
    value, out = 1, bytearray()
    while len(out) < size:
        value = value * 6364136223846793005 + 1442695040888963407 & (1 << 64) - 1
        out += (value >> 32).to_bytes(4, "little")
    return bytes(out[:size])


def test_choice() -> None:
    zeros, text, random = bytes(4096), b"0123456789abcdef" * 256, noise(4096)
    assert choose(zeros, NONE) == (NONE, zeros)
    assert choose(zeros, HOLE) == choose(zeros, LZF) == (HOLE, bytes((0, 16, 0, 0)))
    assert choose(text, HOLE) == (NONE, text)
    name, payload = choose(text, LZF)
    assert name == LZF and payload[:4] == bytes((0, 16, 0, 0)) and len(payload) < 200
    assert choose(random, LZF) == (NONE, random)
    assert choose(b"", LZF) == (NONE, b"")
    with pytest.raises(DataError, match="gzip"):
        choose(zeros, "gzip")


def test_lzf_is_for_more_than_1024_bytes_and_saves_as_many() -> None:
    assert choose(b"a" * 1024, LZF)[0] == NONE
    # 1025 and more bytes of one letter shrink to few, but not by 1024 at once.
    sizes = [size for size in range(1025, 1200) if choose(b"a" * size, LZF)[0] == LZF]
    assert sizes and sizes == list(range(sizes[0], 1200))
    payload = choose(b"a" * sizes[0], LZF)[1]
    assert len(payload) + 1024 <= sizes[0]
    # Compressible, but not by enough: noise with a repetition of 900 bytes.
    mixed = noise(2000) + b"b" * 900
    assert len(lzf_compress(mixed)) < len(mixed)
    assert choose(mixed, LZF) == (NONE, mixed)


@given(DATA.filter(bool), st.sampled_from((NONE, HOLE, LZF)))
def test_undo_restores(data: bytes, setting: str) -> None:
    name, payload = choose(data, setting)
    assert undo(name, payload, len(data)) == data


@pytest.mark.parametrize(
    ("name", "payload", "length"),
    [
        (NONE, b"abc", 4),
        (NONE, b"abc", 2),
        ("zstd", b"abcd", 4),
        (HOLE, b"\4\0\0", 4),
        (HOLE, b"\4\0\0\0\0", 4),
        (HOLE, b"\5\0\0\0", 4),
        (HOLE, b"\xff\xff\xff\xff", 4),
        (LZF, b"\4\0", 4),
        (LZF, b"\4\0\0\0", 4),
        (LZF, b"\5\0\0\0\3abcd", 4),
        (LZF, b"\xff\xff\xff\xff\3abcd", 4),
    ],
)
def test_undo_refuses(name: str, payload: bytes, length: int) -> None:
    with pytest.raises(DataError):
        undo(name, payload, length)


@given(DATA)
def test_lzf_round_trips(data: bytes) -> None:
    assert lzf_decompress(lzf_compress(data), len(data)) == data


def test_lzf_far_and_long_matches() -> None:
    for gap in (1, 8188, 8189, 8190, 9000):
        data = b"!" + b"needle in hay" + noise(gap) + b"needle in hay" + b"z" * 1000
        assert lzf_decompress(lzf_compress(data), len(data)) == data


# What liblzf's format means, byte by byte: stream, result.
STREAMS = [
    (b"\0a", b"a"),
    (b"\x1f" + bytes(range(32)), bytes(range(32))),
    (b"\2abc\x20\2", b"abcabc"),
    (b"\0a\x20\0", b"aaaa"),
    (b"\1ab\xe0\0\1", b"ab" + b"abababab" + b"a"),
    (b"\1ab\xe0\1\1", b"ab" + b"ababababab"),
    (b"\0a\xe0\xff\0", b"a" * 265),
    (b"\0a\xc0\0", b"a" * 9),
    (b"", b""),
]


@pytest.mark.parametrize(("stream", "data"), STREAMS)
def test_lzf_streams_by_hand(stream: bytes, data: bytes) -> None:
    assert lzf_decompress(stream, len(data)) == data
    for length in (len(data) - 1, len(data) + 1):
        with pytest.raises(DataError):
            lzf_decompress(stream, length)


@pytest.mark.parametrize(
    "stream",
    [b"\0", b"\1a", b"\x20", b"\x20\0", b"\0a\x20", b"\0a\xe0", b"\0a\xe0\0", b"\0a\x20\1", b"\0a\x3f\xff"],
)
def test_lzf_streams_that_are_cut_or_point_outside(stream: bytes) -> None:
    for length in range(12):
        with pytest.raises(DataError):
            lzf_decompress(stream, length)


@given(st.binary(max_size=100), st.integers(0, 300))
def test_lzf_garbage_is_refused_or_has_the_length(stream: bytes, length: int) -> None:
    try:
        assert len(lzf_decompress(stream, length)) == length
    except DataError:
        pass


def test_is_zero() -> None:
    assert is_zero(b"") and is_zero(bytes(5000))
    for at in (0, 1, 2500, 4999):
        assert not is_zero(bytes(at) + b"\1" + bytes(4999 - at))
