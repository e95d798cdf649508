"""The options of a connection's pump, and what its stage tells the worker.

Invariant: a connection is reported lost once, with a reason; the stage goes on until the worker stops it.
"""

from __future__ import annotations

from typing import Any

from hast.ffi import _hast
from hast.stages.context import DISK, GGATE, RECV, ConnSettings, StageContext

ffi, lib = _hast.ffi, _hast.lib

COMPRESSIONS = {
    "none": lib.HAST_WIRE_COMPRESSION_NONE,
    "hole": lib.HAST_WIRE_COMPRESSION_HOLE,
    "lzf": lib.HAST_WIRE_COMPRESSION_LZF,
}
CHECKSUMS = {
    "none": lib.HAST_WIRE_CHECKSUM_NONE,
    "crc32": lib.HAST_WIRE_CHECKSUM_CRC32,
    "sha256": lib.HAST_WIRE_CHECKSUM_SHA256,
}


def options(context: StageContext, settings: ConnSettings) -> Any:
    """struct hast_conn_options for this stage."""
    bells = context.bells
    return ffi.new(
        "struct hast_conn_options *",
        {
            "in": settings.fd_in,
            "out": settings.fd_out,
            "own_bell": bells.get(RECV, -1),
            "control": context.control.fileno(),
            "seq_bell": bells.get(GGATE, -1),
            "disk_bell": bells.get(DISK, -1),
            "secondary": int(context.role == "secondary"),
            "version": settings.version,
            "compression": COMPRESSIONS[settings.compression],
            "checksum": CHECKSUMS[settings.checksum],
            "keepalive_ms": round(settings.keepalive * 1000),
            "timeout_ms": round(settings.timeout * 1000),
            "silence_ms": round(settings.silence * 1000),
            "foreign": int(settings.foreign),
            "sector": settings.sector,
            "max_io": settings.max_io,
        },
    )


def tell_lost(context: StageContext, errno: int, why: Any) -> None:
    """Report why the connection is lost: a number for decisions, a sentence for people."""
    context.control.send({"event": "lost", "errno": errno, "why": ffi.string(why).decode(errors="replace")})
