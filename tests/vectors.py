"""Loads the captured messages and blocks of tests/vectors/*.hex, and helps to compare with them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DIRECTORY = Path(__file__).parent / "vectors"
ELEMENT = re.compile(r"(?:^|, )(\w+)\((u?int(?:8|16|32|64)(?:_array)?|string)\)=")
BLOCKS = ("metadata_", "activemap_")  # names of vectors that are no messages


@dataclass(frozen=True)
class Vector:
    """One file: its comments, what the `# nv:` comment promises, and its bytes."""

    name: str
    comment: str
    elements: tuple[tuple[str, str, int | str | bytes], ...]  # name, type, value
    raw: bytes

    @property
    def is_message(self) -> bool:
        return not self.name.startswith(BLOCKS)

    @property
    def header(self) -> bytes:
        """The nv alone: without main header and data; of a metadata block, all of it."""
        if not self.is_message:
            return self.raw
        return self.raw[5 : 5 + int.from_bytes(self.raw[1:5], "little")]

    @property
    def data(self) -> bytes:
        """What follows the nv of a message."""
        return self.raw[5 + len(self.header) :]

    @property
    def normal(self) -> bytes:
        """The bytes with zeros for the undefined padding of names."""
        if not self.is_message:
            return without_name_padding(self.raw)
        return self.raw[:5] + without_name_padding(self.header) + self.data


def names(prefix: str = "") -> list[str]:
    """The names of all vectors that begin with prefix."""
    return sorted(path.stem for path in DIRECTORY.glob(f"{prefix}*.hex"))


@cache
def load(name: str) -> Vector:
    """One vector. Fails when its length is not what its comment says."""
    lines = (DIRECTORY / f"{name}.hex").read_text().splitlines()
    comments = [line for line in lines if line.startswith("#")]
    raw = bytes.fromhex("".join(line for line in lines if not line.startswith("#")))
    elements: tuple[tuple[str, str, int | str | bytes], ...] = ()
    for line in comments:
        if line.startswith("# nv: "):
            text, _, length = line.removeprefix("# nv: ").rpartition(" ; ")
            assert length == f"{len(raw)} bytes", f"{name}: {len(raw)} bytes, but the comment says {length}"
            elements = tuple(_elements(text))
    return Vector(name, comments[0], elements, raw)


def _elements(text: str) -> list[tuple[str, str, int | str | bytes]]:
    found = list(ELEMENT.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    result: list[tuple[str, str, int | str | bytes]] = []
    for match, end in zip(found, ends, strict=True):
        name, kind, value = match[1], match[2], text[match.end() : end]
        if kind == "string":
            result.append((name, kind, value))
        elif kind == "uint8_array":
            result.append((name, kind, bytes.fromhex(value)))
        else:
            result.append((name, kind, int(value)))
    return result


def without_name_padding(nv: bytes) -> bytes:
    """A valid nv with zeros behind each name. Written without hast.nv, so that it can judge it."""
    out = bytearray(nv)
    pos = 0
    while pos < len(out) and out[pos]:
        namesize, dsize = out[pos + 1], int.from_bytes(out[pos + 2 : pos + 6], "little")
        padded = (namesize + 7) // 8 * 8
        out[pos + 6 + namesize : pos + 6 + padded] = bytes(padded - namesize)
        pos += 6 + padded + (dsize + 7) // 8 * 8
    return bytes(out)
