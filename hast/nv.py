"""The name/value encoding of message headers and of the metadata block (docs/protocol.md section 1).

Invariants:
- decode() accepts exactly what the format allows and refuses everything else with a DataError; it reads
  nothing past the end of what it was given, and its cost is linear in that.
- What encode() writes, decode() reads back equal, order and types included; all padding is zero.
- The order of elements and duplicates survive decode(); look-ups see the first element of a name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from hast.errors import DataError

ELEMENT_HEADER = struct.Struct("<BBI")
NAME_MAX = 254  # bytes, without the final NUL


class NvType(IntEnum):
    """The type byte of an element."""

    INT8 = 1
    UINT8 = 2
    INT16 = 3
    UINT16 = 4
    INT32 = 5
    UINT32 = 6
    INT64 = 7
    UINT64 = 8
    INT8_ARRAY = 9
    UINT8_ARRAY = 10
    INT16_ARRAY = 11
    UINT16_ARRAY = 12
    INT32_ARRAY = 13
    UINT32_ARRAY = 14
    INT64_ARRAY = 15
    UINT64_ARRAY = 16
    STRING = 17

    @property
    def label(self) -> str:
        """The name that people read: "uint8", "int64_array", "string"."""
        return self.name.lower()


# struct codes and sizes of the eight integers; array type n holds the integers of type n - 8.
CODES = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "q", 8: "Q"}
SIZES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8}

# An integer, a string, the bytes of a uint8 array, or the integers of any other array.
Value = int | str | bytes | tuple[int, ...]


def roundup8(n: int) -> int:
    """n rounded up to a multiple of 8."""
    return (n + 7) & ~7


def printable(text: str) -> str:
    """Text from outside made fit for one line of a log: control and undecodable characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Element:
    """One name with its typed value. Strings keep bytes that are not UTF-8 as surrogates (PEP 383)."""

    name: str
    type: NvType
    value: Value

    def encode(self) -> bytes:
        """The element as bytes. Raises DataError when name or value do not fit the type."""
        try:
            name = self.name.encode("utf-8", "surrogateescape")
            if not name or len(name) > NAME_MAX or 0 in name:
                raise ValueError(f"a name has 1 to {NAME_MAX} bytes and no NUL")
            value = self._encode_value()
        except (ValueError, struct.error) as error:
            raise DataError(f"nv element {self.name!r} ({self.type.label}): {error}") from None
        return (
            ELEMENT_HEADER.pack(self.type, len(name) + 1, len(value))
            + name.ljust(roundup8(len(name) + 1), b"\0")
            + value.ljust(roundup8(len(value)), b"\0")
        )

    def _encode_value(self) -> bytes:
        """The value as bytes. Raises ValueError or struct.error when it does not fit the type."""
        value = self.value
        if self.type is NvType.STRING:
            if not isinstance(value, str) or "\0" in value:
                raise ValueError("a string without NUL is needed")
            return value.encode("utf-8", "surrogateescape") + b"\0"
        if self.type < NvType.INT8_ARRAY:
            return struct.pack("<" + CODES[self.type], value)
        if not isinstance(value, bytes | tuple) or not value:
            raise ValueError("an array has at least one element")
        return struct.pack(f"<{len(value)}{CODES[self.type - 8]}", *value)


class Nv:
    """An ordered run of elements, built with add_*() and read with get_*().

    get_*(name) raises DataError when the element is missing or of another type; with a default, a missing
    element gives the default (another type is still refused).
    """

    def __init__(self, elements: list[Element] | None = None) -> None:
        self.elements: list[Element] = []
        self._first: dict[str, Element] = {}
        for element in elements or []:
            self.add(element)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Nv) and self.elements == other.elements

    def __iter__(self) -> Iterator[Element]:
        return iter(self.elements)

    def __len__(self) -> int:
        return len(self.elements)

    def __contains__(self, name: str) -> bool:
        return name in self._first

    def __repr__(self) -> str:
        return "Nv(" + ", ".join(f"{e.name}({e.type.label})={e.value!r}" for e in self.elements) + ")"

    def add(self, element: Element) -> None:
        """Append an element; when the name is there already, look-ups keep seeing the earlier one."""
        self.elements.append(element)
        self._first.setdefault(element.name, element)

    def encode(self, limit: int | None = None) -> bytes:
        """All elements as bytes. Raises DataError when a value does not fit, or all together exceed limit."""
        data = b"".join(element.encode() for element in self.elements)
        if limit is not None and len(data) > limit:
            raise DataError(f"nv of {len(data)} bytes is larger than the {limit} bytes allowed")
        return data

    # Writers, one per type in use.

    def add_int8(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.INT8, value))

    def add_uint8(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.UINT8, value))

    def add_int16(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.INT16, value))

    def add_uint16(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.UINT16, value))

    def add_int32(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.INT32, value))

    def add_uint32(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.UINT32, value))

    def add_int64(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.INT64, value))

    def add_uint64(self, name: str, value: int) -> None:
        self.add(Element(name, NvType.UINT64, value))

    def add_uint8_array(self, name: str, value: bytes) -> None:
        self.add(Element(name, NvType.UINT8_ARRAY, bytes(value)))

    def add_string(self, name: str, value: str) -> None:
        self.add(Element(name, NvType.STRING, value))

    # Readers.

    def _value(self, name: str, wanted: NvType) -> Value | None:
        element = self._first.get(name)
        if element is None:
            return None
        if element.type is not wanted:
            raise DataError(f"element {name!r} is of type {element.type.label}, {wanted.label} is needed")
        return element.value

    def _int(self, name: str, wanted: NvType, default: int | None) -> int:
        value = self._value(name, wanted)
        if value is None:
            if default is None:
                raise DataError(f"element {name!r} ({wanted.label}) is missing")
            return default
        assert isinstance(value, int)
        return value

    def get_int8(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.INT8, default)

    def get_uint8(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.UINT8, default)

    def get_int16(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.INT16, default)

    def get_uint16(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.UINT16, default)

    def get_int32(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.INT32, default)

    def get_uint32(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.UINT32, default)

    def get_int64(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.INT64, default)

    def get_uint64(self, name: str, default: int | None = None) -> int:
        return self._int(name, NvType.UINT64, default)

    def get_uint8_array(self, name: str, default: bytes | None = None) -> bytes:
        value = self._value(name, NvType.UINT8_ARRAY)
        if value is None:
            if default is None:
                raise DataError(f"element {name!r} (uint8_array) is missing")
            return default
        assert isinstance(value, bytes)
        return value

    def get_string(self, name: str, default: str | None = None) -> str:
        value = self._value(name, NvType.STRING)
        if value is None:
            if default is None:
                raise DataError(f"element {name!r} (string) is missing")
            return default
        assert isinstance(value, str)
        return value


def decode(data: bytes | bytearray | memoryview, limit: int | None = None) -> Nv:
    """Read a run of elements. Raises DataError for anything that docs/protocol.md section 1 refuses.

    limit: the largest number of bytes that is looked at at all; more is refused.
    """
    if limit is not None and len(data) > limit:
        raise DataError(f"nv of {len(data)} bytes is larger than the {limit} bytes allowed")
    data = bytes(data)
    nv = Nv()
    pos = 0
    while pos < len(data) and data[pos] != 0:
        element, pos = _decode_element(data, pos)
        nv.add(element)
    return nv


def _decode_element(data: bytes, pos: int) -> tuple[Element, int]:
    """The element that begins at pos, and the position behind it."""
    at = f"nv element at byte {pos}"
    if len(data) - pos < ELEMENT_HEADER.size:
        raise DataError(f"{at}: {len(data) - pos} bytes are too few for an element")
    kind, namesize, dsize = ELEMENT_HEADER.unpack_from(data, pos)
    if kind & 0x80:
        raise DataError(f"{at}: network byte order (type byte {kind:#04x}) is not supported")
    if kind > NvType.STRING:
        raise DataError(f"{at}: unknown type {kind}")
    if namesize < 2:
        raise DataError(f"{at}: name size {namesize} is too small")
    name_at = pos + ELEMENT_HEADER.size
    value_at = name_at + roundup8(namesize)
    end = value_at + roundup8(dsize)
    if end > len(data):
        raise DataError(f"{at}: runs {end - len(data)} bytes past the end")
    name = data[name_at : name_at + namesize]
    if name.find(0) != namesize - 1:
        raise DataError(f"{at}: the name does not end with its only NUL")
    text = name[:-1].decode("utf-8", "surrogateescape")
    try:
        value = _decode_value(NvType(kind), data[value_at : value_at + dsize])
    except ValueError as error:
        raise DataError(f"{at} ({text!r}, {NvType(kind).label}): {error}") from None
    return Element(text, NvType(kind), value), end


def _decode_value(kind: NvType, value: bytes) -> Value:
    """The value of one element. Raises ValueError with the reason when it does not fit its type."""
    if not value:
        raise ValueError("the value is empty")
    if kind is NvType.STRING:
        if value.find(0) != len(value) - 1:
            raise ValueError("the string does not end with its only NUL")
        return value[:-1].decode("utf-8", "surrogateescape")
    if kind < NvType.INT8_ARRAY:
        if len(value) != SIZES[kind]:
            raise ValueError(f"the value has {len(value)} bytes, {SIZES[kind]} are needed")
        number: int = struct.unpack("<" + CODES[kind], value)[0]
        return number
    if kind is NvType.UINT8_ARRAY:
        return bytes(value)
    size = SIZES[kind - 8]
    if len(value) % size:
        raise ValueError(f"the value has {len(value)} bytes, a multiple of {size} is needed")
    return struct.unpack(f"<{len(value) // size}{CODES[kind - 8]}", value)
