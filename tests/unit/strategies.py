"""Hypothesis strategies for the formats, shared by their tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from hast.messages import Cmd, DataInfo, Reply, Request
from hast.nv import Element, Nv, NvType

U64 = st.integers(0, 2**64 - 1)
INTEGERS = {
    NvType.INT8: (-(2**7), 2**7 - 1),
    NvType.UINT8: (0, 2**8 - 1),
    NvType.INT16: (-(2**15), 2**15 - 1),
    NvType.UINT16: (0, 2**16 - 1),
    NvType.INT32: (-(2**31), 2**31 - 1),
    NvType.UINT32: (0, 2**32 - 1),
    NvType.INT64: (-(2**63), 2**63 - 1),
    NvType.UINT64: (0, 2**64 - 1),
}
# Names that messages have, so that types and values meet the readers, and any others.
KNOWN_NAMES = (
    "cmd", "seq", "offset", "length", "memsync", "received", "error", "compression", "checksum", "hash",
    "size", "resource", "version", "token", "resuid", "localcnt", "remotecnt", "virgin", "datasize",
    "extentsize", "syncsrc", "mapsize", "errmsg", "wait", "role", "resource0", "resource1", "role0", "error0",
)  # fmt: skip


def decodable(raw: bytes) -> str:
    return raw.replace(b"\0", b"").decode("utf-8", "surrogateescape")


ANY_NAME = st.binary(min_size=1, max_size=40).map(decodable).filter(bool)
TEXTS = st.sampled_from(("hole", "lzf", "crc32", "sha256", "none", "data", "")) | st.binary(max_size=40).map(
    decodable
)


@st.composite
def elements(draw: st.DrawFn, names: st.SearchStrategy[str] = ANY_NAME) -> Element:
    """Any element that can be encoded."""
    name, kind = draw(names), draw(st.sampled_from(list(NvType)))
    value: Any
    if kind is NvType.STRING:
        value = draw(TEXTS)
    elif kind is NvType.UINT8_ARRAY:
        value = draw(st.binary(min_size=1, max_size=40))
    elif kind in INTEGERS:
        value = draw(st.integers(*INTEGERS[kind]))
    else:
        item = st.integers(*INTEGERS[NvType(kind - 8)])
        value = tuple(draw(st.lists(item, min_size=1, max_size=10)))
    return Element(name, kind, value)


def nvs(names: st.SearchStrategy[str] = ANY_NAME) -> st.SearchStrategy[Nv]:
    """Runs of up to ten elements."""
    return st.lists(elements(names), max_size=10).map(Nv)


MESSAGE_NVS = nvs(st.sampled_from(KNOWN_NAMES) | ANY_NAME)


@st.composite
def data_infos(draw: st.DrawFn, min_size: int = 0) -> DataInfo:
    """What an nv may say about data; nothing at all when the size is 0."""
    size = draw(st.integers(min_size, 2**32 - 1))
    if size == 0:
        return DataInfo()
    algorithm, length = draw(st.sampled_from((("none", 0), ("crc32", 4), ("sha256", 32))))
    packing = draw(st.sampled_from(("none", "hole", "lzf")))
    return DataInfo(size, packing, algorithm, draw(st.binary(min_size=length, max_size=length)))


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Requests that a primary could send, sizes aside."""
    cmd = draw(st.sampled_from(list(Cmd)))
    if cmd == Cmd.KEEPALIVE:
        return Request(cmd)
    data = draw(data_infos(min_size=1)) if cmd == Cmd.WRITE else DataInfo()
    return Request(cmd, draw(st.integers(1, 2**64 - 1)), draw(U64), draw(U64), draw(st.booleans()), data)


# Errors that exist on both sides, by this host's number.
ERRNOS = st.sampled_from((0, 1, 5, 22, 28, 30))


@st.composite
def replies(draw: st.DrawFn) -> Reply:
    """Replies that a secondary could send."""
    return Reply(draw(st.integers(1, 2**64 - 1)), draw(st.booleans()), draw(ERRNOS), draw(data_infos()))


@st.composite
def damaged(draw: st.DrawFn, source: st.SearchStrategy[bytes]) -> bytes:
    """Bytes from source with a few of them overwritten, cut off, or added."""
    raw = bytearray(draw(source))
    for _ in range(draw(st.integers(0, 4))):
        if raw:
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.sampled_from((0, 1, 2, 17, 127, 128, 255)))
    if draw(st.booleans()):
        del raw[draw(st.integers(0, len(raw))) :]
    return bytes(raw) + draw(st.binary(max_size=8))
