"""A mutator that knows nv: elements are taken out, doubled, swapped, put in; names, types and values are changed; now
and then the bytes as such, so that what is not valid comes about as well.

The first HEAD bytes of an input are the target's own and are changed as bytes.
"""

from __future__ import annotations

import random
from collections.abc import Callable

HEAD = 4
SIZES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 8, 8: 8}
NAMES = {
    "cmd": 2, "seq": 8, "offset": 8, "length": 8, "memsync": 2, "received": 1, "error": 3, "compression": 17,
    "checksum": 17, "notice": 17, "hash": 10,
    "size": 6, "resource": 17, "version": 2, "token": 10, "resuid": 8, "localcnt": 8, "remotecnt": 8,
    "virgin": 1, "datasize": 7, "extentsize": 5, "syncsrc": 2, "mapsize": 6, "errmsg": 17, "wait": 2, "role": 2,
    "resource0": 17, "resource1": 17, "error0": 3, "role0": 17, "status0": 17, "dirty0": 8, "keepdirty0": 6,
    "keepdirty": 6, "prevrole": 17, "syncing": 2, "alone": 2, "discard": 2, "hast": 2, "workerpid0": 5, "force": 1,
    "provname0": 17,
}  # fmt: skip
TEXTS = (
    b"hole", b"lzf", b"crc32", b"sha256", b"data", b"all", b"init", b"primary", b"secondary", b"complete", b"degraded",
    b"Split-brain condition!", b"none", b"synced", b"ahead", b"\xff\xfe",
)  # fmt: skip
NUMBERS = (
    0, 1, 2, 3, 4, 5, 7, 16, 64, 127, 128, 255, 512, 4096, 4608, 8192, 65536, 131072, 2097152, 6553600, 2**31 - 1,
    2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1,
)  # fmt: skip

Part = tuple[int, bytes, bytes]  # type, name with its NUL, value


def parse(data: bytes) -> tuple[list[Part], bytes]:
    """The elements at the beginning, without any judgement, and what stands behind them."""
    parts: list[Part] = []
    pos = 0
    while len(data) - pos >= 6 and data[pos]:
        kind, namesize, dsize = data[pos], data[pos + 1], int.from_bytes(data[pos + 2 : pos + 6], "little")
        value_at = pos + 6 + (namesize + 7) // 8 * 8
        end = value_at + (dsize + 7) // 8 * 8
        if end > len(data):
            break
        parts.append((kind, data[pos + 6 : pos + 6 + namesize], data[value_at : value_at + dsize]))
        pos = end
    return parts, data[pos:]


def build(parts: list[Part]) -> bytes:
    """The bytes of elements; sizes are those that they have."""
    out = bytearray()
    for kind, name, value in parts:
        name = name[:255]
        out += bytes((kind & 0xFF, len(name))) + len(value).to_bytes(4, "little")
        out += name + bytes(-len(name) % 8) + value + bytes(-len(value) % 8)
    return bytes(out)


def value_of(kind: int, chance: random.Random) -> bytes:
    """A value that fits a type."""
    if kind == 17:
        return chance.choice(TEXTS) + b"\0"
    if kind in SIZES:
        return chance.choice(NUMBERS).to_bytes(8, "little")[: SIZES[kind]]
    return chance.randbytes(chance.choice((4, 16, 32, 8, 64)))


def new_part(chance: random.Random) -> Part:
    """A known element, nearly always of its type."""
    name = chance.choice(list(NAMES))
    kind = NAMES[name] if chance.random() < 0.9 else chance.randint(1, 18)
    return kind, name.encode() + b"\0", value_of(kind, chance)


def change(parts: list[Part], chance: random.Random, mutate_bytes: Callable[[bytes, int], bytes]) -> None:
    """One change of the list in place."""
    what = chance.randrange(8)
    if not parts or what == 0:
        parts.insert(chance.randint(0, len(parts)), new_part(chance))
        return
    at = chance.randrange(len(parts))
    kind, name, value = parts[at]
    if what == 1:
        del parts[at]
    elif what == 2:
        parts.insert(chance.randint(0, len(parts)), parts[at])
    elif what == 3:
        parts.append(parts.pop(at))
    elif what == 4:
        parts[at] = (chance.choice((kind ^ 0x80, chance.randint(0, 20))), name, value)
    elif what == 5:
        odd = (b"\0", b"", name[:-1], name[:1] + b"\0" + name[1:], name * 2)
        name = chance.choice(odd) if chance.random() < 0.5 else mutate_bytes(name, 255)
        parts[at] = (kind, name, value)
    elif what == 6:
        parts[at] = (kind, name, value_of(kind, chance))
    else:
        parts[at] = (kind, name, mutate_bytes(value, max(len(value), 8)))


def mutate(data: bytes, max_size: int, seed: int, mutate_bytes: Callable[[bytes, int], bytes]) -> bytes:
    """A changed input, at most max_size bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        return mutate_bytes(data, max_size)
    head, (parts, rest) = data[:HEAD].ljust(HEAD, b"\0"), parse(data[HEAD:])
    if chance.random() < 0.15:
        head = mutate_bytes(head, HEAD).ljust(HEAD, b"\0")[:HEAD]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        change(parts, chance, mutate_bytes)
    if rest and chance.random() < 0.3:
        rest = mutate_bytes(rest, len(rest) + 16)
    return (head + build(parts) + rest)[:max_size]
