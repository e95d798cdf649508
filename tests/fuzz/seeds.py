"""Where a fuzzer begins when it has no corpus: captured messages, and examples of each format."""

from __future__ import annotations

import struct
from pathlib import Path

from hast.messages import Handshake2Reply, PeerSizes, SyncSource, encode_payload
from tests import vectors
from tests.fuzz.nvmutator import HEAD
from tests.fuzz.targets import HERE, Target

ROOT = HERE.parents[1]
# Which captured messages a target takes, by the beginning of their names.
NV = {
    "nv": ("",),
    "messages": ("write", "read", "delete", "flush", "keepalive", "sync"),
    "handshake_primary": ("hs",),
    "handshake_secondary": ("hs",),
    "control": ("ctl",),
    "metadata": ("metadata",),
}
CONFIGS = (
    "resource data { local /dev/sda\n on a { remote none } }\n",
    "control /run/h\nlisten tcp4://10.0.0.1:8457\nreplication async\ncompression lzf\nchecksum crc32\ntimeout 5\n"
    "on a { listen [::1]:1\n pidfile /p }\nresource d { name x\n device nbd\n directio off\n syncrate 10M\n"
    "on a { local /x\n source tcp4://10.0.0.1\n remote tcp4://10.0.0.2:1\n metaflush off }\n"
    "on b { local /y\n remote a } }\n",
)
ADDRESSES = ("10.0.0.1", "tcp://host:80", "tcp4://1.2.3.4:5", "tcp6://[::1]:9", "::1", "uds:///run/x", "/x", "a.b-c.d")
NAME = struct.pack(">I", 4) + b"data" + struct.pack(">HHH", 2, 1, 3)
PLAIN = struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 8, 0) + b"IHAVEOPT" + struct.pack(">II", 2, 0)
OPTIONS = (
    bytes((0, 9, 1, 8, 0, 7, len(NAME))) + NAME,
    bytes((0, 3, 1, 3, 0, 6, len(NAME))) + NAME + bytes((2, 0)),
    bytes((0, 5, 3, 1, 4)) + b"data",
    bytes((1, 5)) + PLAIN,
)

# Operations of native/fuzz_nbd.c, so that its fuzzer need not find the long ways itself.
NBD_READ, NBD_WRITE = bytes((0, 0, 0, 0, 0, 28)), bytes((0, 0x41, 0, 0, 0, 26))
DEAF, TURN, WORK, FAIL, HANG_UP = b"\xfa", b"\x09", b"\x0b\x00\x09", b"\x0b\xc0\x09", b"\xcf"
NBD = (
    b"\x01" + NBD_READ * 4 + DEAF + b"\x0d\xfd" + TURN,
    b"\x00" + NBD_READ * 4 + DEAF + b"\x0d\xfd" + TURN,
    b"\x01" + NBD_WRITE + b"\x64" + TURN + b"\x08\x64" + TURN + b"\x08\xff" + TURN,
    b"\x01" + NBD_WRITE + b"\x8c" + TURN * 2 + WORK + FAIL + b"\x08\x64" + TURN + b"\x08\xff" + TURN,
    b"\x01" + NBD_WRITE + b"\x4c" + TURN * 2 + HANG_UP + TURN,
    b"\x15" + (NBD_WRITE + b"\x4c" + TURN + b"\x0e") * 2 + FAIL + HANG_UP + TURN,
)


def captured(beginnings: tuple[str, ...]) -> list[vectors.Vector]:
    """The vectors whose names begin so."""
    found = [vectors.load(path.stem) for path in sorted(vectors.DIRECTORY.glob("*.hex"))]
    return [vector for vector in found if vector.name.startswith(beginnings)]


def good_replies() -> list[bytes]:
    """Answers to step 2 that the primary of py_handshake_primary.py takes, with a map packed in each way."""
    from tests.fuzz.py_handshake_primary import METADATA

    found = []
    for bits in (b"", bytes(METADATA.mapsize), b"\xff" * METADATA.mapsize, bytes(range(256)) * 2, b"ab" * 2048):
        for packing, algorithm in (("none", "none"), ("hole", "crc32"), ("lzf", "sha256")):
            payload, data = encode_payload(bits, packing, algorithm)
            sizes = PeerSizes(METADATA.datasize, METADATA.extentsize, 1, 0)
            reply = Handshake2Reply(sizes, SyncSource.SECONDARY, bool(bits), len(bits), data, hast=True)
            found.append(bytes((2, 1, 0, 0)) + reply.to_nv().encode() + bytes(1) + payload)
    return found


def seeds(target: Target) -> list[bytes]:
    """Inputs to begin with."""
    name = target.name
    if name in NV:
        messages = [v for v in captured(NV[name]) if v.is_message or name == "metadata"]
        found = [bytes((n, 0, 0, 128)) + v.header + bytes(1) + v.data[:600] for v in messages for n in range(3)]
        return found + (good_replies() if name == "handshake_primary" else [])
    if name == "wire":
        return [bytes((kind,)) + v.header for v in captured(NV["messages"]) for kind in (0, 1)]
    if name == "config":
        return [text.encode() for text in CONFIGS] + [(ROOT / "etc" / "hast.conf.sample").read_bytes()]
    if name == "address":
        return [text.encode() for text in ADDRESSES]
    if name == "nbd_negotiation":
        return list(OPTIONS)
    if name == "control_server":
        return [bytes((size,)) + v.raw for v in captured(("ctl",)) for size in (2, 255)]
    if name == "peer_listener":
        hello = vectors.load("hs1_primary_to_secondary").raw
        typed = bytes((0, len(hello))) + hello + bytes((13,))
        return [bytes((4, 13)), bytes((4, 13, 4, 13)), typed, bytes((0x0F, 4, 6, 5))]
    if name == "nbd":
        return list(NBD)
    if name == "lzf":
        return [b"\x20\x00\x04hello\x20\x04\x00", bytes(2) + b"abcabcabcabcabcabc" * 8]
    return [bytes(range(64)), bytes(64)]


def write(target: Target, where: Path) -> Path:
    """The seeds as files in a directory of their own."""
    where.mkdir(parents=True, exist_ok=True)
    assert HEAD == 4
    for n, seed in enumerate(seeds(target)):
        (where / f"seed-{n:03}").write_bytes(seed[: target.max_len])
    return where
