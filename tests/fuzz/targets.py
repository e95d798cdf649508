"""The fuzz targets: what each one feeds, and how it is built or called.

A C target is native/fuzz_<name>.c, linked with the sources of hast/ffi, AddressSanitizer, UBSan and libFuzzer. A Python
target is the function `check(data)` of py_<name>.py: it returns when hast did what it may do with these bytes
(understood them, or refused them with an error of its own), and raises anything else when it did not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"


@dataclass(frozen=True)
class Target:
    """kind: "c" or "python". max_len: bytes of the longest input. nv: mutated as a run of elements. plain: sources that
    have targets of their own, and are linked without measuring their coverage here."""

    name: str
    kind: str
    what: str
    max_len: int = 1024
    nv: bool = False
    plain: tuple[str, ...] = ()

    @property
    def corpus(self) -> Path:
        """The committed inputs."""
        return CORPUS / self.name

    @property
    def dictionary(self) -> Path | None:
        path = HERE / "dict" / f"{self.name}.dict"
        return path if path.exists() else None

    @property
    def source(self) -> Path:
        """The C file of a C target."""
        return HERE / "native" / f"fuzz_{self.name}.c"


PACKING = ("lzf", "crc32", "sha256")
TARGETS = {
    target.name: target
    for target in (
        Target("wire", "c", "headers of requests and replies, in C"),
        Target("lzf", "c", "LZF blocks: decompression, and the way there and back", 4096),
        Target("transform", "c", "data of messages: checksums and compression", 4096),
        Target("recv_secondary", "c", "what a primary sends to a secondary's pump", plain=PACKING),
        Target("recv_primary", "c", "what a secondary sends to a primary's pump", plain=PACKING),
        Target("nbd", "c", "NBD clients after the negotiation: the ggate pump", plain=PACKING),
        Target("fuse", "c", "requests of a FUSE channel: the ggate pump", plain=PACKING),
        Target("nv", "python", "name/value data: decode, encode", 2048, nv=True),
        Target("messages", "python", "headers of requests and replies: Python and C say the same", 2048, nv=True),
        Target("payload", "python", "data of messages: Python and C say the same"),
        Target("handshake_primary", "python", "a primary's handshake with any replies", 4096, nv=True),
        Target("handshake_secondary", "python", "a secondary's handshake with any requests", 2048, nv=True),
        Target("peer_listener", "python", "the port for peers: any bytes on several connections"),
        Target("control", "python", "control requests and replies", 4096, nv=True),
        Target("control_server", "python", "the control socket: any bytes of a client"),
        Target("metadata", "python", "the metadata block", 4096, nv=True),
        Target("config", "python", "hast.conf", 2048),
        Target("address", "python", "addresses", 256),
        Target("nbd_negotiation", "python", "the negotiation with an NBD client, in any pieces", 2048),
    )
}

# Wrong on purpose, to test the runner.
SELFTESTS = {
    target.name: target for target in (Target("selftest_c", "c", "", 64), Target("selftest_python", "python", "", 64))
}


def checker(name: str) -> Callable[[bytes], None]:
    """The function of a Python target."""
    module = __import__(f"tests.fuzz.py_{name}", fromlist=["check"])
    check: Callable[[bytes], None] = module.check
    return check
